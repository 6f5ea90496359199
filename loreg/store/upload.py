"""The bytes of one write to an object store: cut into parts, hashed once, provable by what the server answers."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from itertools import chain

from loreg.digest import Digest, Hasher
from loreg.errors import BadInput
from loreg.store.base import as_bytes

PART = 16 << 20
"""Bytes in a part. S3 takes 10,000 of at least 5 MiB, so a blob may have 156 GiB; four on their way are 64 MiB."""

CONCURRENCY = 4


class Upload:
    """Parts of a blob, each of ``part`` bytes but the last. ``whole``: its bytes, if one part is all.

    Iterating raises BadInput at the end if the bytes were not those of ``digest``, so that what is under way is never
    completed. ``failure`` is what the source raised, or that: a library in between may change it.
    """

    def __init__(self, digest: Digest, chunks: Iterable[bytes | memoryview]) -> None:
        self.failure: BaseException | None = None
        self.part = PART
        self.digest = digest
        self._hasher = Hasher()
        self._marks: list[bytes] = []
        self._stopped = False
        self._parts = self._cut(chunks)
        first, second = next(self._parts, b""), next(self._parts, None)
        self.whole = first if second is None else None
        self._rest = chain([first, second or b""], self._parts)

    def __iter__(self) -> Iterator[bytes]:
        try:
            yield from self._rest
            self.check()
        except BaseException as error:
            self.failure = error
            raise

    def stop(self) -> None:
        """End it at the next part, from another thread."""
        self._stopped = True

    def check(self) -> None:
        """Once all of it has been read: raises BadInput if it is not of the digest."""
        if (found := self._hasher.digest()) != self.digest:
            raise BadInput(
                f"the bytes given for blob {self.digest} are not its bytes: they hash to {found}; the source changed "
                "while it was read, or was corrupt: try again."
            )

    def proved_by(self, etag: str | None) -> bool:
        """Whether the server's tag says that it has these very bytes: their MD5, or that of the parts' MD5s.

        It need not be: with keys of one's own, for instance, S3 makes tags of something else.
        """
        if etag is None:
            return False
        if self.whole is not None:
            expected = _md5(self.whole).hex()
        else:
            expected = f"{_md5(b''.join(self._marks)).hex()}-{len(self._marks)}"
        return etag.strip('"') == expected

    def _cut(self, chunks: Iterable[bytes | memoryview]) -> Iterator[bytes]:
        part = bytearray()
        for chunk in chunks:
            view = as_bytes(chunk)
            self._hasher.update(view)
            while view:
                if self._stopped:
                    raise InterruptedError
                taken = self.part - len(part)
                part += view[:taken]
                view = view[taken:]
                if len(part) == self.part:
                    yield self._marked(bytes(part))
                    part.clear()
        if part:
            yield self._marked(bytes(part))

    def _marked(self, part: bytes) -> bytes:
        self._marks.append(_md5(part))
        return part


def _md5(data: bytes) -> bytes:
    return hashlib.md5(data, usedforsecurity=False).digest()
