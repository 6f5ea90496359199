"""Store and catalog together: blobs by digest, and the one way in which anything is committed.

This is the only place that knows both. The order of the steps is the safety argument (a model of it, with
crashes at every step, is in the design): pin before look, a fresh generation for every write, and a fence at
the commit. Leave one out and a collector that runs beside a push loses data.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TypeVar

from sqlalchemy.orm import Session

from loreg.catalog import Database, queries
from loreg.checkpoint import FileStamp
from loreg.digest import Digest, Fingerprint, Hasher, fingerprint
from loreg.errors import BadInput, Conflict, LoregError, NotFound
from loreg.store import BlobKey, Store, new_generation

LEASE = timedelta(hours=1)
T = TypeVar("T")


@dataclass(frozen=True)
class PendingBlob:
    """Bytes that are to be stored: what they are, and how to produce them, as often as needed."""

    fingerprint: Fingerprint
    chunks: Callable[[], Iterable[bytes | memoryview]]

    @classmethod
    def of(cls, data: bytes) -> PendingBlob:
        return cls(fingerprint([data]), lambda: [data])

    @classmethod
    def of_file(cls, path: Path) -> PendingBlob:
        def chunks() -> Iterator[bytes]:
            with path.open("rb") as file:
                while chunk := file.read(1 << 20):
                    yield chunk

        return cls(fingerprint(chunks()), chunks)

    @property
    def digest(self) -> Digest:
        return self.fingerprint.digest


def utcnow() -> datetime:
    return datetime.now(UTC)


class Storage:
    """The blobs of one registry."""

    def __init__(self, database: Database, store: Store) -> None:
        self.database = database
        self.store = store
        self._verified: dict[BlobKey, FileStamp] = {}

    def commit(self, blobs: Sequence[PendingBlob], finish: Callable[[Session], T]) -> T:
        """Store ``blobs``, then run ``finish`` in the one transaction that makes them reachable.

        Nothing is visible before that transaction, and all of it after. Raises Conflict if the lease was lost
        or a blob vanished meanwhile, and whatever the store raises; orphans are left to the collector.
        """
        unique = {blob.digest: blob for blob in blobs}
        owner = f"{socket.gethostname()}:{os.getpid()}"
        with self.database.write() as session:  # pin before look
            lease = queries.begin_lease(session, owner, list(unique), utcnow(), LEASE)
        try:
            written = [(blob.fingerprint, self._ensure(blob)) for blob in unique.values()]
            with self.database.write() as session:
                queries.require_lease(session, lease, utcnow())  # the fence
                for print_, generation in written:
                    if self.store.size(BlobKey(print_.digest, generation)) != print_.size:
                        raise Conflict(f"Blob {print_.digest} vanished while it was pushed: push again.")
                queries.record_blobs(session, written, utcnow())
                result = finish(session)
                queries.release_lease(session, lease)
                return result
        except BaseException:
            # Also on Ctrl-C: a pin that nobody holds keeps garbage until it expires. Should this fail as well
            # (a locked catalog, say), it does expire, and the first error is the one to report.
            with suppress(LoregError), self.database.write() as session:
                queries.release_lease(session, lease)
            raise

    def _ensure(self, blob: PendingBlob) -> str:
        """The generation under which the blob lies: the live one if it is whole, else a fresh copy's."""
        with self.database.read() as session:
            row = queries.find_blob(session, blob.digest)
            if row is not None and row.state == "live":
                key = BlobKey(blob.digest, row.generation)
                if self.store.size(key) == blob.fingerprint.size:
                    return row.generation
        generation = new_generation()
        self.store.put(blob.digest, generation, blob.chunks())
        return generation

    def key(self, digest: Digest) -> BlobKey:
        """Where the live copy lies. Raises NotFound."""
        with self.database.read() as session:
            row = queries.find_blob(session, digest)
            if row is None or row.state != "live":
                raise NotFound(
                    f"Blob {digest} is not in the store: restore it from a backup, or push its adapter again."
                )
            return BlobKey(digest, row.generation)

    def read(self, digest: Digest) -> bytes:
        """All bytes of a blob, verified. Raises NotFound, BadInput."""
        return self.store.read(self.key(digest))

    def path(self, digest: Digest) -> Path:
        """A local file with the blob's bytes, verified when this process first asks, and if it was changed since.

        Raises NotFound, BadInput.
        """
        key = self.key(digest)
        path = self.store.path(key)
        if path is None or not path.is_file():
            raise NotFound(f"Blob {digest} is not in the store: restore it from a backup, or push its adapter again.")
        stamp = FileStamp.of(path)
        if self._verified.get(key) != stamp:
            hasher = Hasher(Hasher.ALL)
            try:
                with path.open("rb") as file:
                    while chunk := file.read(1 << 20):
                        hasher.update(chunk)
            except OSError as error:
                raise BadInput(f"Blob {digest} cannot be read: {error.strerror}; check the disk.") from error
            if hasher.digest() != digest:
                raise BadInput(
                    f"Blob {digest} is corrupt: its bytes hash to {hasher.digest()}; restore it from a backup, or "
                    "push its adapter again."
                )
            self._verified[key] = stamp
        return path
