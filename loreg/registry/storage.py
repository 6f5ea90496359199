"""Store and catalog together: blobs by digest, and the one way in which anything is committed.

This is the only place that knows both. The order of the steps is the safety argument (a model of it, with
crashes at every step, is in the design): pin before look, a fresh generation for every write, and a fence at
the commit. Leave one out and a collector that runs beside a push loses data.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TypeVar

from sqlalchemy.orm import Session

from loreg.catalog import Database, queries
from loreg.catalog.models import Blob
from loreg.checkpoint import FileStamp
from loreg.digest import Digest, Fingerprint, Hasher, fingerprint
from loreg.errors import BadInput, CheckFailed, Conflict, LoregError, NotFound
from loreg.registry.recording import Recorder
from loreg.registry.verified import Verified
from loreg.store import BlobCache, BlobKey, Store, new_generation, pieces

LEASE = timedelta(hours=1)
_KNOWN = 100_000
"""Blobs of which the place is remembered."""
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
    """The blobs of one registry. ``cache``: where those are kept as files that the store does not have in files."""

    def __init__(self, database: Database, store: Store, cache: BlobCache, strict: bool = False) -> None:
        self.database = database
        self.store = store
        self.cache = cache
        self.recorder = Recorder(database, store)
        self.strict = strict
        self._verified = Verified(database, strict)
        self._whole: dict[Digest, BlobKey] = {}

    def writing(self) -> AbstractContextManager[Session]:
        """One transaction, alone among the writers; what it says of names and tags is in the store's ledger too when
        this returns. Raises Conflict if the store is another catalog's."""
        return self.recorder.writing()

    def commit(self, blobs: Sequence[PendingBlob], finish: Callable[[Session], T]) -> T:
        """Store ``blobs``, then run ``finish`` in the one transaction that makes them reachable.

        Nothing is visible before that transaction, and all of it after. Raises Conflict if the lease was lost
        or a blob vanished meanwhile, and whatever the store raises; orphans are left to the collector.
        """
        unique = {blob.digest: blob for blob in blobs}
        self.recorder.own()
        with self.pinned(unique) as lease:  # pin before look
            with self.database.read() as session:
                known = queries.find_blobs(session, unique)
            written = {digest: self._ensure(blob, known.get(digest)) for digest, blob in unique.items()}
            with self.writing() as session:
                queries.require_lease(session, lease, utcnow())  # the fence
                known = queries.find_blobs(session, unique)
                copies = []
                for digest, blob in unique.items():
                    # A copy that was found may have been replaced since, by a repair.
                    generation = written[digest] or (known[digest].generation if digest in known else None)
                    if generation is None or self.store.size(BlobKey(digest, generation)) != blob.fingerprint.size:
                        raise Conflict(f"Blob {digest} vanished while it was pushed: push again.")
                    copies.append((blob.fingerprint, generation))
                queries.record_blobs(session, copies, utcnow())
                result = finish(session)
                queries.release_lease(session, lease)
                return result

    @contextmanager
    def pinned(self, digests: Collection[Digest]) -> Iterator[str]:
        """A lease on ``digests``, for the transaction that vouches for them to require and to release."""
        owner = f"{socket.gethostname()}:{os.getpid()}"
        with self.database.write() as session:
            lease = queries.begin_lease(session, owner, digests, utcnow(), LEASE)
        try:
            yield lease
        except BaseException:
            # Also on Ctrl-C: a pin that nobody holds keeps garbage until it expires. Should this fail as well
            # (a locked catalog, say), it does expire, and the first error is the one to report.
            with suppress(LoregError), self.database.write() as session:
                queries.release_lease(session, lease)
            raise

    def _ensure(self, blob: PendingBlob, row: Blob | None) -> str | None:
        """The generation of the fresh copy that is written unless the row's own is whole; None if that is."""
        own = BlobKey(blob.digest, row.generation) if row is not None and row.state == "live" else None
        if own is not None and self.store.size(own) == blob.fingerprint.size:
            return None
        generation = new_generation()
        self.store.put(blob.digest, generation, blob.chunks())
        return generation

    def key(self, digest: Digest) -> BlobKey:
        """Where the live copy lies. Raises NotFound."""
        with self.database.read() as session:
            generation = queries.live_generation(session, digest)
        if generation is None:
            raise NotFound(f"Blob {digest} is not in the store: restore it from a backup, or push its adapter again.")
        return BlobKey(digest, generation)

    def read(self, digest: Digest) -> bytes:
        """All bytes of a blob, verified. Raises NotFound; BadInput if they are others, which then are put aside."""
        if (known := self._whole.get(digest)) is not None:
            with suppress(LoregError):
                data = self.store.read(known, verify=False)
                if Digest.of(data) == digest:
                    return data
        key = self.key(digest)
        if self.store.path(key) is None:
            with suppress(OSError, CheckFailed):  # it may leave the cache before it is read, or find no room in it
                data = self._cached(key).read_bytes()
                if Digest.of(data) == digest:
                    return data
        data = self.store.read(key, verify=False)
        if (found := Digest.of(data)) != digest:
            raise self._damaged(key, found)
        self._note(key)
        return data

    def path(self, digest: Digest) -> Path:
        """A local file with the blob's bytes, verified unless it was and has not been changed since.

        Raises NotFound, BadInput; CheckFailed if it has to be fetched, and the disk is full.
        """
        if (known := self._whole.get(digest)) is not None:
            there = self.store.path(known)
            with suppress(NotFound):
                if there is not None and self._verified.holds(digest, FileStamp.of(there)):
                    return there
        key = self.key(digest)
        path = self.store.path(key)
        if path is None:
            return self._cached(key)
        if not path.is_file():
            raise NotFound(f"Blob {digest} is not in the store: restore it from a backup, or push its adapter again.")
        found = self.found(digest, path)
        if found != digest:
            raise self._damaged(key, found)
        self._note(key)
        return path

    def _note(self, key: BlobKey) -> None:
        """That a copy was whole. Whoever finds it so again need not ask the catalog, which takes longer than to look;
        who does not, asks."""
        if len(self._whole) >= _KNOWN:
            self._whole.clear()
        if self.store.path(key) is not None:
            self._whole[key.digest] = key

    def _cached(self, key: BlobKey) -> Path:
        """The local copy of a blob that is elsewhere, fetched unless it is there and whole."""
        path = self.cache.path(key.digest)
        self.cache.note(path)
        with suppress(LoregError):  # absent, or unreadable
            if self.found(key.digest, path) == key.digest:
                return path
        for _ in range(2):  # what went wrong on the way has nothing put aside
            found = self.cache.add(key.digest, pieces(self.store, key))
            if found == key.digest:
                return path
        raise self._damaged(key, found)

    def found(self, digest: Digest, path: Path) -> Digest:
        """What a file's bytes hash to; taken to be as they should if they were, and nobody has changed it since."""
        began, stamp = time.time_ns(), FileStamp.of(path)
        if self._verified.holds(digest, stamp):
            return digest
        hasher = Hasher(Hasher.ALL)
        try:
            with path.open("rb") as file:
                while chunk := file.read(1 << 20):
                    hasher.update(chunk)
        except OSError as error:
            raise BadInput(f"Blob {digest} cannot be read: {error.strerror}; check the disk.") from error
        found = hasher.digest()
        if found == digest:
            self._verified.remember(digest, stamp, began)
        return found

    def _damaged(self, key: BlobKey, found: Digest) -> BadInput:
        """What is said of a copy with other bytes than it should have. It is put aside, so that a push of the same
        content, which takes what is there of the right size for whole, writes it anew."""
        with self.database.read() as session:
            touches = ", ".join(queries.touched_by(session, key.digest)) or "nothing"
        kept = ""
        with suppress(LoregError):  # a store that cannot be written
            kept = f", and are kept in {self.store.quarantine(key)}"
        return BadInput(
            f"Blob {key.digest} is corrupt: its bytes hash to {found}{kept}; {touches} needs it: restore it with "
            "`loreg fsck --repair --from` another registry, or push its adapter again."
        )
