"""The contract of a blob store: everything that a backend must keep, on one screen."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from loreg.digest import Digest, Fingerprint
from loreg.errors import BadInput

_GENERATION = re.compile(r"[0-9a-f]{16}")


def new_generation() -> str:
    """16 random lower-case hex digits, drawn afresh for every write.

    Random, not a counter and not constant: a collector that stalled between its decision and its
    delete may come back after a day. It deletes ``<digest>.<generation>``, and must never hit a
    copy that somebody wrote since. Two writers that cannot see each other must differ too.
    """
    return os.urandom(8).hex()


@dataclass(frozen=True, order=True, slots=True)
class BlobKey:
    """One written copy of a blob. Raises BadInput unless ``generation`` is 16 lower-case hex digits."""

    digest: Digest
    generation: str

    def __post_init__(self) -> None:
        # A key becomes a path: nothing but hex, so that no catalog row can point out of the store.
        if not _GENERATION.fullmatch(self.generation):
            raise BadInput(f"{self.generation!r} is not a generation: expected 16 lower-case hex digits.")

    @classmethod
    def parse(cls, name: str) -> BlobKey:
        """From ``<64 hex>.<16 hex>``; raises BadInput for anything else."""
        digest, _, generation = name.partition(".")
        return cls(Digest(digest), generation)

    @property
    def name(self) -> str:
        return f"{self.digest.hex}.{self.generation}"

    @property
    def location(self) -> str:
        """Where every backend keeps it, relative to its root: ``blobs/<aa>/<64 hex>.<16 hex>``."""
        return f"blobs/{self.digest.hex[:2]}/{self.name}"


class Store(Protocol):
    """Immutable blobs. A key is either absent or holds exactly the bytes of its digest, also after a
    crash at any moment; what lies on a disk may rot, so readers verify. Safe to share between
    processes. Every failure is an error of :mod:`loreg.errors`; what ``chunks`` raises passes unchanged.
    """

    def put(self, digest: Digest, generation: str, chunks: Iterable[bytes | memoryview]) -> Fingerprint:
        """Write the concatenation of ``chunks``, durable when this returns. Nothing stays behind on failure.

        Raises BadInput if the bytes are not those of ``digest``, Conflict if the key is there already,
        CheckFailed if the disk is full.
        """

    def size(self, key: BlobKey) -> int | None:
        """Length in bytes, None if absent."""

    def open(self, key: BlobKey) -> BinaryIO:
        """For reading in pieces, *not* verified: the caller hashes what it reads. Raises NotFound."""

    def path(self, key: BlobKey) -> Path | None:
        """Where the bytes lie as a local file, whether or not they are there; None if never in files."""

    def read(self, key: BlobKey, verify: bool = True) -> bytes:
        """All of it. Raises NotFound; BadInput if ``verify`` and the bytes are not those of the digest."""

    def keys(self) -> Iterator[BlobKey]:
        """Every key that was there throughout; those written or deleted meanwhile may or may not come."""

    def delete(self, key: BlobKey) -> None:
        """Remove this very copy. Absent is done already, and no other generation is touched."""
