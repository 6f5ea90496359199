"""A store as objects below a prefix in an S3-compatible bucket, named as the files of a local one are.

``blobs/<aa>/<64 hex>.<generation>``, ``ledger/<16 digits>``, ``store.json``; in ``quarantine/`` what was put aside.

What fits into one part is written by a conditional request (``If-None-Match: *``). A larger blob is written in parts,
and appears whole when they are completed; few servers know a condition for that step. It needs none: what makes two
writers of one key impossible is its generation, 64 random bits that the writer has just drawn, and a completion
that comes late or twice writes the bytes of the digest under that same key. Each write also leaves a mark of its own
on the object, so that after an answer that was lost the writer knows its own success from somebody else's key.

A delete that arrives late names a generation too, and can only hit the copy that it was meant for.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, BinaryIO

from loreg.digest import Digest
from loreg.errors import BadInput, Conflict, NotFound
from loreg.store.base import BlobKey, Unfinished, new_generation
from loreg.store.objects import Objects
from loreg.store.upload import Upload

if TYPE_CHECKING:
    from pathlib import Path

_RECORD = re.compile(r"ledger/(\d{16})")


class ObjectStore:
    """A :class:`~loreg.store.base.Store` in a bucket, ``s3://bucket/prefix``, by obstore.

    Makes no request before it is used. Before the first write it tries whether the server keeps preconditions, and
    raises Unsupported if not. Network and server raise RemoteError, a wrong bucket or credentials UsageError.
    """

    def __init__(self, place: str) -> None:
        self._objects = Objects(place)

    def __repr__(self) -> str:
        return f"ObjectStore({str(self)!r})"

    def __str__(self) -> str:
        return str(self._objects)

    def put(self, digest: Digest, generation: str, chunks: Iterable[bytes | memoryview]) -> None:
        upload = Upload(digest, chunks)
        if not self._objects.write(f"write blob {digest}", BlobKey(digest, generation).location, upload):
            raise Conflict(
                f"blob {digest} is already in the store under generation {generation}: "
                "every write draws a generation of its own; try again."
            )

    def size(self, key: BlobKey) -> int | None:
        return self._objects.size(f"look for blob {key.digest}", key.location)

    def open(self, key: BlobKey) -> BinaryIO:
        try:
            return self._objects.open(f"read blob {key.digest}", key.location)
        except NotFound:
            pass
        raise NotFound(
            f"blob {key.digest} is not in the store {self._objects} (generation {key.generation}): "
            "restore the store from a backup, or push its adapter again."
        )

    def path(self, key: BlobKey) -> Path | None:
        return None

    def read(self, key: BlobKey, verify: bool = True) -> bytes:
        with self.open(key) as file:
            data = file.read()
        if verify and (found := Digest.of(data)) != key.digest:
            raise BadInput(
                f"blob {key.digest} in the store {self._objects} is corrupt: its {len(data)} bytes hash to "
                f"{found}; restore it from a backup, or push its adapter again."
            )
        return data

    def keys(self) -> Iterator[BlobKey]:
        for location in self._objects.list("list the blobs", "blobs"):
            # What is not named as a blob, in its own place, is not ours: not listed, hence never deleted.
            with suppress(BadInput):
                key = BlobKey.parse(location.rpartition("/")[2])
                if key.location == location:
                    yield key

    def delete(self, key: BlobKey) -> None:
        self._objects.delete(f"delete blob {key.digest}", key.location)

    def quarantine(self, key: BlobKey) -> str:
        return self._put_aside(f"blob {key.digest}", key.location, key.name)

    def unfinished(self) -> Iterator[Unfinished]:
        """None: an upload of a writer that died is no object, nor does obstore list uploads. It takes space that
        nobody sees, until a lifecycle rule of the bucket removes it."""
        return iter(())

    def discard(self, write: Unfinished) -> None:
        """Nothing: there is nothing that :meth:`unfinished` could have named."""

    def check_writable(self) -> None:
        pass  # only a write tells what these credentials may do

    def owner(self) -> bytes | None:
        return self._small("store.json")

    def claim(self, owner: bytes) -> bytes:
        return self._write_small("store.json", owner)

    def disown(self) -> None:
        self._objects.delete("remove store.json", "store.json")

    def records(self, beyond: int = 0) -> Iterator[int]:
        for location in self._objects.list("list the ledger", "ledger", _record(beyond)):
            if (found := _RECORD.fullmatch(location)) is not None:
                yield int(found[1])

    def read_record(self, seq: int) -> bytes | None:
        return self._small(_record(seq))

    def write_record(self, seq: int, data: bytes) -> None:
        if self._write_small(_record(seq), data) != data:
            raise Conflict(
                f"the store {self._objects} has another record {seq} of its ledger: the catalog is an older copy of "
                "the one that wrote it; restore the newest, or make it again with `loreg fsck --rebuild-catalog`."
            )

    def delete_record(self, seq: int) -> None:
        self._objects.delete(f"delete record {seq}", _record(seq))

    def quarantine_record(self, seq: int) -> str:
        return self._put_aside(f"record {seq}", _record(seq), f"ledger-{seq:016d}.{new_generation()}")

    def _put_aside(self, what: str, location: str, name: str) -> str:
        aside = f"quarantine/{name}"
        if not self._objects.move(f"put {what} aside", location, aside):
            raise NotFound(f"{what} is not in the store {self._objects}: nothing to put aside.")
        return f"{self._objects}/{aside}"

    def _small(self, location: str) -> bytes | None:
        with suppress(NotFound), self._objects.open(f"read {location}", location) as file:
            return file.read()
        return None

    def _write_small(self, location: str, data: bytes) -> bytes:
        """What the object has now: ``data``, or what was there before."""
        while (there := self._small(location)) is None:
            if self._objects.write(f"write {location}", location, Upload(Digest.of(data), [data])):
                return data
        return there


def _record(seq: int) -> str:
    return f"ledger/{seq:016d}"
