"""Digests: BLAKE3 is the identity of everything; SHA-256 is recorded beside it.

The Hub and OCI registries speak SHA-256, so both are computed in the same pass over the bytes.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass

from blake3 import blake3

from loreg.errors import BadInput

_HEX = re.compile(r"[0-9a-f]{64}")
_PREFIX = "blake3:"


@dataclass(frozen=True, order=True, slots=True)
class Digest:
    """A BLAKE3 digest of 32 bytes [D1]. Its text is ``blake3:`` and 64 lower-case hex digits."""

    hex: str

    def __post_init__(self) -> None:
        if not _HEX.fullmatch(self.hex):
            raise BadInput(f"{self.hex!r} is not a digest: expected 64 lower-case hex digits.")

    @classmethod
    def parse(cls, text: str) -> Digest:
        """From ``blake3:<64 hex>``; raises BadInput for anything else, upper case included."""
        if not isinstance(text, str) or not text.startswith(_PREFIX):
            raise BadInput(f"{text!r} is not a digest: expected 'blake3:' and 64 lower-case hex digits.")
        return cls(text[len(_PREFIX) :])

    @classmethod
    def of(cls, data: bytes | bytearray | memoryview) -> Digest:
        return cls(blake3(data).hexdigest())

    def __str__(self) -> str:
        return _PREFIX + self.hex

    @property
    def raw(self) -> bytes:
        """The 32 bytes themselves."""
        return bytes.fromhex(self.hex)

    @property
    def short(self) -> str:
        """Twelve hex digits, for people; never for look-up."""
        return self.hex[:12]


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What is known about a run of bytes: both digests (``sha256`` as 64 hex digits [D2]) and its length."""

    digest: Digest
    sha256: str
    size: int


class Hasher:
    """BLAKE3 alone, fed in pieces. ``threads``: how many cores a large piece may use, or ``Hasher.ALL``."""

    ALL = blake3.AUTO

    def __init__(self, threads: int = 1) -> None:
        self._single = blake3(max_threads=threads)

    def update(self, data: bytes | bytearray | memoryview) -> None:
        self._single.update(data)

    def digest(self) -> Digest:
        return Digest(self._single.hexdigest())


class DoubleHasher:
    """BLAKE3 and SHA-256 and the length, in one pass."""

    def __init__(self) -> None:
        self._blake3 = blake3()
        self._sha256 = hashlib.sha256()
        self._size = 0

    def update(self, data: bytes | bytearray | memoryview) -> None:
        self._blake3.update(data)
        self._sha256.update(data)
        self._size += len(data) if not isinstance(data, memoryview) else data.nbytes

    def result(self) -> Fingerprint:
        return Fingerprint(Digest(self._blake3.hexdigest()), self._sha256.hexdigest(), self._size)


def fingerprint(chunks: Iterable[bytes | bytearray | memoryview]) -> Fingerprint:
    """Both digests and the length of the concatenation of ``chunks``."""
    hasher = DoubleHasher()
    for chunk in chunks:
        hasher.update(chunk)
    return hasher.result()
