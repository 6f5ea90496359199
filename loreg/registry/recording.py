"""The ledger beside the catalog: what a transaction says of names is in the store before anybody is told of it.

A record commits with its transaction, in the catalog, and is then written into the store. A process that dies in
between has told nobody yet; its record is still in the catalog, and whoever commits next writes it first. So the
store never lacks a record of what was acknowledged, and never has one of what was not committed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from sqlalchemy.orm import Session

from loreg.catalog import Database, queries
from loreg.errors import Conflict, LoregError
from loreg.format.ledger import Owner, sealed
from loreg.store import Store


class Recorder:
    """The transactions of one process that change what the ledger says. Threads may share it."""

    def __init__(self, database: Database, store: Store) -> None:
        self._database = database
        self._store = store
        self._owned: bytes | None = None  # what the store says of its owner, once it is this catalog's
        self._written = 0  # every record up to this one is in the store

    @contextmanager
    def writing(self) -> Iterator[Session]:
        """See ``Storage.writing``."""
        self.own()
        self._store.check_writable()
        self._settle()
        with self._database.write() as session:
            yield session
            queries.forget_records(session, self._written)
        try:
            self._settle()
        except LoregError as error:
            raise type(error)(f"{error} The catalog has what was asked for, the ledger not yet.") from error

    def own(self) -> None:
        """Raises Conflict unless the store is this catalog's, or nobody's and then becomes it.

        It is looked at each time: a disk can be unmounted under a process that runs for weeks, and what that wrote
        into the empty directory would be acknowledged, and gone.
        """
        if self._owned is not None and self._store.owner() == self._owned:
            return
        said = self.check()
        with self._database.read() as session:
            mine = queries.identity(session)
        if said is None:
            said = self._store.claim(Owner(mine.catalog, os.urandom(16).hex()).dump())
            check_owner(self._store, mine.catalog, mine.store, said)
        if mine.store is None:
            with self._database.write() as session:
                queries.identity(session).store = Owner.parse(said).store
        self._owned = said

    def check(self) -> bytes | None:
        """What the store says of its owner, having looked that it is this catalog's or nobody's. Raises Conflict.

        Two catalogs that write into one store would take each other's blobs for garbage, and a catalog with two
        stores would miss in one what it wrote into the other.
        """
        with self._database.read() as session:
            mine = queries.identity(session)
        said = self._store.owner()
        check_owner(self._store, mine.catalog, mine.store, said)
        self._check_newest()
        return said

    def reclaim(self) -> bool:
        """Write anew what the store should say of its owner, if that is damaged or lost and the store has the very
        record that the catalog ends with; whether it was."""
        with self._database.read() as session:
            mine, head = queries.identity(session), queries.last_record(session)
        with suppress(LoregError):
            if self._store.owner() is not None and Owner.parse(self._store.owner() or b""):
                return False  # it is another's, and in good order
        if head is None or mine.store is None or self._store.read_record(head.seq) != sealed(head.body.encode()):
            return False
        self._store.disown()
        self._store.claim(Owner(mine.catalog, mine.store).dump())
        return True

    def check_new(self) -> None:
        """As ``check``, for a catalog that has no store yet: one that was made just now, as the old one is lost?"""
        with self._database.read() as session:
            if queries.identity(session).store is not None:
                return
        self.check()

    def _check_newest(self) -> None:
        """An older copy of the catalog does not know what was pushed since: it would give its numbers and records a
        second time, and a collection would delete its blobs.

        Any record beyond its last one tells: the next may be gone, if the ledger was begun anew meanwhile.
        """
        while True:
            last = self._last()
            if next(self._store.records(beyond=last), None) is None:
                return
            if self._last() == last:  # else somebody has just written it
                raise self._older(last)

    def _older(self, last: int) -> Conflict:
        return Conflict(
            f"The catalog ends at record {last} of the ledger, and {self._store} has more: it is an older copy. "
            "Restore the newest one; or move it away, and make it again from the store with "
            "`loreg fsck --rebuild-catalog`."
        )

    def _last(self) -> int:
        with self._database.read() as session:
            row = queries.last_record(session)
            return row.seq if row else 0

    def _settle(self) -> None:
        """Write the records that are not in the store yet, whoever committed them.

        Raises Conflict if somebody has put an older copy in the catalog's place.
        """
        written = self._written  # before the catalog is read: other threads go on
        with self._database.read() as session:
            kept = queries.kept_records(session)
        if (last := kept[-1].seq if kept else 0) < written:
            raise self._older(last)
        for row in kept:
            if row.seq > self._written:
                self._store.write_record(row.seq, sealed(row.body.encode()))
                self._written = row.seq


def check_owner(store: Store, catalog: str, own: str | None, said: bytes | None) -> None:
    """Raises Conflict unless what a store says of its owner (None: nothing yet) fits a catalog and its own store."""
    owner = None if said is None else Owner.parse(said)
    if owner is not None and owner.catalog != catalog:
        raise Conflict(
            f"{store} belongs to another catalog: expected {catalog}, found {owner.catalog}. Open it with its own; "
            "if that is lost, move this one away, and make it again with `loreg fsck --rebuild-catalog`."
        )
    if own is not None and (owner is None or owner.store != own):
        found = "an empty one" if owner is None else owner.store
        raise Conflict(
            f"The catalog belongs to another store than {store}: expected {own}, found {found}. Choose its own with "
            "LOREG_STORE; if it is on a disk that is not mounted, mount it; if it is lost, bring a copy of it here "
            "with `loreg store copy --no-catalog`."
        )
