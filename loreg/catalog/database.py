"""Open a catalog: make it if there is none, upgrade an older one after a backup, refuse everything else.

What its kind of database does for that is in ``sqlite.py`` and ``postgres.py``.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError
from sqlalchemy.orm import Session, sessionmaker

from loreg.addresses import expanded, split
from loreg.catalog.changes import Changes
from loreg.catalog.kinds import Kind
from loreg.catalog.ledger import close_record
from loreg.catalog.refusals import typed
from loreg.errors import Unsupported, UsageError

_EXPECTED = "the path of a file, sqlite:///path/to/catalog.db or postgresql://user@host:port/database"


class Database:
    """A catalog at the newest revision. Safe to share between threads, and between processes that each
    open their own."""

    def __init__(self, kind: Kind) -> None:
        """Use :meth:`open`: this neither makes nor checks anything."""
        self.kind = kind
        self._engine = kind.engine()
        self._reading = sessionmaker(self._engine.execution_options(**kind.reading))
        # What a commit leaves loaded stays readable: rows are handed out of the block.
        self._writing = sessionmaker(self._engine.execution_options(**kind.writing), expire_on_commit=False)

    @classmethod
    def open(cls, url_or_path: str | Path, *, backup_dir: Path | None = None) -> Database:
        """The catalog at a path, ``sqlite:///`` or ``postgresql://`` URL, made or upgraded if it has to be.

        An upgrade first backs the catalog up: SQLite's to ``<name>.<old revision>.<time>.bak`` in ``backup_dir``, or
        beside it; PostgreSQL's to a schema ``backup_<old revision>_<time>`` of the same database. Raises BadInput for
        what is no catalog, is corrupt, or was written by a newer loreg, and leaves it untouched; Unsupported for
        another database; NotFound if the driver is not installed; Conflict if it stays locked; RemoteError if a
        server cannot be reached.
        """
        kind = _kind(url_or_path)
        with typed(kind):
            kind.prepare(backup_dir)
            database = cls(kind)
            with database.read():
                pass
        return database

    @contextmanager
    def read(self) -> Iterator[Session]:
        """One snapshot. A write in it fails, rather than be lost at the end."""
        with typed(self.kind), self._reading() as session:
            session.connection()
            yield session

    @contextmanager
    def write(self) -> Iterator[Session]:
        """One transaction, alone among the writers from its start; committed unless the block raises.

        What it changes of names and tags is in the record of the ledger that commits with it.
        """
        with typed(self.kind), self._writing.begin() as session:
            session.connection()
            yield session
            self.kind.announce(session.connection(), close_record(session, datetime.now(UTC)))

    def changes(self, name: str | None = None) -> Changes:
        """Whether what ``name`` stands for may have changed, as one thread asks; of any name for None. The caller
        closes it."""
        return self.kind.changes(name)

    def stamp(self) -> Hashable | None:
        """What is another one after each commit that changes what a name stands for, so that what was found stays
        known as long as it is the same; None if it cannot be told. Cheap, and of no snapshot."""
        return self.kind.stamp()

    def close(self) -> None:
        self.kind.close()
        self._engine.dispose()

    def __enter__(self) -> Database:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def file_of(url_or_path: str | Path) -> Path | None:
    """The file that a catalog at this address is, None for one on a server. Raises as ``Database.open``."""
    return getattr(_kind(url_or_path), "path", None)


def _kind(url_or_path: str | Path) -> Kind:
    """Each kind is imported when it is asked for."""
    from loreg.catalog.sqlite import SQLite

    scheme, rest = split(url_or_path, "a catalog", _EXPECTED)
    if scheme is None:
        return SQLite(expanded(rest).absolute())
    url = _parsed("postgresql" if scheme == "postgres" else scheme, rest)  # as hosting services spell it
    if url.get_backend_name() == "sqlite":
        return SQLite.of_url(url)
    if url.drivername in ("postgresql", "postgresql+psycopg"):
        from loreg.catalog.postgres import PostgreSQL

        return PostgreSQL(url)
    raise Unsupported(
        f"a catalog by {url.drivername} is not supported by this version of loreg: expected {_EXPECTED}."
    )


def _parsed(scheme: str, rest: str) -> URL:
    """Raises UsageError, which has nothing but the scheme in it."""
    # SQLAlchemy would take what follows the first of these for the host, and a host is named in messages.
    if scheme.partition("+")[0] != "sqlite" and re.search(r"[@/?#].*@", rest, re.DOTALL):
        raise UsageError(
            f"what starts with {scheme}:// is ambiguous: expected one @ at most, before the host, and before it none "
            "of /, ? and #; write such characters of a user, a password or a setting as %40, %2F, %3F and %23."
        )
    with suppress(ArgumentError, ValueError):
        return make_url(f"{scheme}://{rest}")
    raise UsageError(f"what starts with {scheme}:// is not a database URL: expected {_EXPECTED}.")
