"""The contract of a blob store: everything that a backend must keep, on one screen."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol

from loreg.digest import Digest
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


class Unfinished(NamedTuple):
    """A write of ``digest`` that did not end; ``name`` is the store's own, and never used twice."""

    digest: Digest
    name: str
    size: int


class Store(Protocol):
    """Immutable blobs, the records of a ledger, and whose they are.

    A key is either absent or holds exactly the bytes of its digest, also after a crash at any moment; what lies on a
    disk may rot, so readers verify. Safe to share between processes. Every failure is an error of
    :mod:`loreg.errors`; what ``chunks`` raises passes unchanged. ``str`` of it is its path or address, for messages.
    """

    def put(self, digest: Digest, generation: str, chunks: Iterable[bytes | memoryview]) -> None:
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

    def quarantine(self, key: BlobKey) -> str:
        """Put this copy aside, for people to look at: it is no key any more. Returns where it is. Raises NotFound."""

    def unfinished(self) -> Iterator[Unfinished]:
        """Writes that did not end: those of processes that died, and those that are under way."""

    def discard(self, write: Unfinished) -> None:
        """Remove what such a write has left. Absent is done already; the write fails if it goes on."""

    def check_writable(self) -> None:
        """Raises UsageError where it is plain at once that nothing can be written, as on a disk mounted read-only."""

    def owner(self) -> bytes | None:
        """What the first :meth:`claim` said, None if nobody has."""

    def claim(self, owner: bytes) -> bytes:
        """Say whose the store is, durably, unless somebody has; returns what it says now. Raises as :meth:`put`."""

    def disown(self) -> None:
        """Take back what was claimed, for what cannot be read any more."""

    def records(self, beyond: int = 0) -> Iterator[int]:
        """The numbers of the ledger's records that are greater than ``beyond``, in any order."""

    def read_record(self, seq: int) -> bytes | None:
        """A record as it was written, *not* verified; None if absent."""

    def write_record(self, seq: int, data: bytes) -> None:
        """Durable when this returns. The same bytes again are fine; raises Conflict if the record has others, else
        as :meth:`put`."""

    def delete_record(self, seq: int) -> None:
        """Absent is done already."""

    def quarantine_record(self, seq: int) -> str:
        """Put a record aside, as :meth:`quarantine` does a copy. Returns where it is. Raises NotFound."""


def as_bytes(chunk: bytes | memoryview) -> memoryview:
    """The bytes of a chunk, whatever its elements and its shape."""
    view = memoryview(chunk)
    return view.cast("B") if view.nbytes else memoryview(b"")  # cast() refuses a zero in a shape
