"""A catalog in a schema of a PostgreSQL database, through psycopg 3.

How it gives pushes and collections what ``BEGIN IMMEDIATE`` gives them on SQLite, whose proof takes every transaction
to be atomic and alone:

- A writer's first act is to take the catalog's advisory lock, which ends with its transaction: after the commit is
  there for all to see, or with the connection of a process that died. So writers are strictly one after the other; no
  schedule of them has to be thought about, and no caller has to try again, as ``SERIALIZABLE`` would ask of all.
- Writers are ``READ COMMITTED``. Under ``REPEATABLE READ`` the snapshot is that of the first statement, which is the
  one that waits for the lock: the writer would not see what the one that it waited for has committed. Once the lock
  is held nobody else writes, so all statements of the transaction see one state.
- Readers are ``REPEATABLE READ READ ONLY``: one snapshot, which waits for nobody, and in which a write is refused.
- ``synchronous_commit`` is at least ``on``, whatever the server or the role has as default: a commit that was
  acknowledged outlives a crash of the server.

All tables are in one schema, and no other is searched: what people have in ``public`` is never taken for a catalog's,
and two users whose search paths differ cannot lock, or write, two halves of one. Migrations run in one transaction
under the same lock, so a catalog is there whole or not at all, and processes that open at once make it once.
"""

from __future__ import annotations

import os
import socket
import threading
import zlib
from collections.abc import Collection, Hashable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Dialect, Engine, create_engine, event, text
from sqlalchemy.pool import QueuePool

from loreg.catalog import kinds
from loreg.catalog.changes import wait_for
from loreg.catalog.connecting import connect
from loreg.catalog.refusals import typed
from loreg.errors import LoregError, NotFound, Unsupported, UsageError

_OLDEST = 140_000
"""The oldest server: PostgreSQL 14, the first that parses the body of a function when it is made."""

_NAMED = 16
"""As many names are announced by themselves; more are one announcement, of anything."""
_HEARTBEAT = 30.0
"""Seconds of silence, after which it is asked whether the server is still there."""

_DEFAULTS = {
    "application_name": "loreg",
    "connect_timeout": "10",
    # A host that vanished while it held the lock would hold it for the two hours that TCP waits of itself.
    "keepalives_idle": "30",
    "keepalives_interval": "10",
    "keepalives_count": "3",
}
_ABLE = "SELECT current_setting('server_version_num')::int, current_setting('server_encoding')"
_SCHEMAS = """
    SELECT s.name, array(
        SELECT c.relname::text FROM pg_catalog.pg_class c
        JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
        WHERE n.nspname = s.name AND c.relkind IN ('r', 'p', 'f') ORDER BY 1
    ) FROM unnest(current_schemas(false)::text[]) WITH ORDINALITY AS s (name, place) ORDER BY s.place
"""
_SETTINGS = """
    SELECT set_config('search_path', quote_ident(%s), false),
        set_config('lock_timeout', %s, false),
        set_config('synchronous_commit',
            CASE current_setting('synchronous_commit') WHEN 'remote_apply' THEN 'remote_apply' ELSE 'on' END, false),
        set_config('jit', 'off', false),
        set_config('tcp_keepalives_idle', '30', false),
        set_config('tcp_keepalives_interval', '10', false),
        set_config('tcp_keepalives_count', '3', false)
"""


class PostgreSQL:
    """A catalog in the first schema of the search path that has one, or in the first."""

    remedy = (
        "restore a backup; or rename its schema, make an empty one in its place, and fill that from the store with "
        "`loreg fsck --rebuild-catalog`"
    )
    reading: Mapping[str, Any] = {"isolation_level": "REPEATABLE READ", "postgresql_readonly": True}
    writing: Mapping[str, Any] = {
        "isolation_level": "READ COMMITTED",
        "postgresql_readonly": False,
        "loreg_writes": True,
    }

    def __init__(self, url: URL) -> None:
        """Raises NotFound if psycopg is not installed, UsageError for a URL that it does not understand."""
        self.name = _shown(url)
        self._schema: str | None = None
        self._looking = threading.Lock()
        self._looker: tuple[int, Notifications] | None = None
        self._looked = object()
        self._own = {name: value for name, value in _DEFAULTS.items() if name not in url.query}
        try:
            self._engine = create_engine(
                url.set(drivername="postgresql+psycopg"),
                connect_args=self._own,
                poolclass=QueuePool,
                # A server that was started again since the last transaction is found out before the next begins.
                pool_pre_ping=True,
                use_native_hstore=False,
            )
        except ImportError as error:
            raise NotFound(
                f"the catalog {self.name} needs psycopg, which cannot be imported ({error}): "
                "pip install 'loreg[postgres]'."
            ) from error
        event.listen(self._engine, "do_connect", self._connect)
        event.listen(self._engine, "connect", self._connected)
        event.listen(self._engine, "begin", self._begin)

    def engine(self) -> Engine:
        return self._engine

    def stamp(self) -> Hashable | None:
        """By what a connection that listens is told of: one round trip, and what was committed before has come by
        then, as a server sends out the notices of a transaction before it acknowledges its commit."""
        with self._looking:
            if self._looker is None or self._looker[0] != os.getpid():
                self._looker = os.getpid(), Notifications(self, None)
            _, changes = self._looker
            if changes.happened():
                self._looked = object()
            return self._looked if changes.told else None

    def close(self) -> None:
        with self._looking:
            if self._looker is not None and self._looker[0] == os.getpid():
                self._looker[1].close()
            self._looker = None

    def is_full(self) -> bool:
        return False  # a server says so itself

    def announce(self, connection: Connection, names: Collection[str] | None) -> None:
        """By NOTIFY, which the server delivers when the transaction has committed, and only then."""
        if names is None or len(names) > _NAMED:
            names = ("",)
        for name in sorted(names):
            connection.exec_driver_sql("SELECT pg_notify(%s, %s)", (self.channel, name))

    def changes(self, name: str | None) -> Notifications:
        return Notifications(self, name)

    @staticmethod
    def errors() -> type[Exception]:
        import psycopg

        return psycopg.Error

    def listening(self) -> Any:
        """A connection of psycopg's own, outside the pool, on which the server tells what :meth:`announce` says.
        Raises as a read of the catalog."""
        with typed(self):
            fairy = self._engine.raw_connection()
            fairy.detach()
            raw: Any = fairy.dbapi_connection
            raw.autocommit = True
            raw.execute(f"LISTEN {self.channel}")
        return raw

    def prepare(self, backup_dir: Path | None) -> None:
        """``backup_dir`` is SQLite's: a server cannot write to the files of its clients."""
        with self._engine.execution_options(**self.reading).begin() as connection:
            found = self._revision(connection)
        if found == kinds.HEAD:
            return
        if found is not None:
            kinds.require_known(self.name, found)  # before anything waits for the lock
        with self._engine.execution_options(**self.writing).begin() as connection:
            found = self._revision(connection)  # again, under the lock: another process may have upgraded it
            if found == kinds.HEAD:
                return
            if found is not None:
                kinds.require_known(self.name, found)
                self._back_up(connection, found)
            kinds.run_migrations(connection)

    def _connect(self, dialect: Dialect, _record: Any, given: Sequence[Any], settings: dict[str, Any]) -> Any:
        return connect(self.name, lambda: dialect.connect(*given, **settings), settings, self._own)

    def _connected(self, raw: Any, _record: Any) -> None:
        """Settle the schema, when it is the first connection, and what every session needs."""
        raw.autocommit = True  # what is set in a transaction that is rolled back is set no more
        with raw.cursor() as cursor:
            if self._schema is None:
                cursor.execute(_ABLE)
                _require_able(self.name, *cursor.fetchone())
                cursor.execute(_SCHEMAS)
                self._schema = _schema_of(self.name, cursor.fetchall())
            cursor.execute(_SETTINGS, (self._schema, str(kinds.BUSY_TIMEOUT_MS)))
        raw.autocommit = False

    def _begin(self, connection: Connection) -> None:
        if connection.get_execution_options().get("loreg_writes"):
            connection.exec_driver_sql("SELECT pg_advisory_xact_lock(%s, %s)", self._lock)

    @property
    def _lock(self) -> tuple[int, int]:
        """Of all catalogs of the database, this one's: by the name of its schema, as a dump restores it."""
        return 0x6C6F7265, zlib.crc32(str(self._schema).encode()) - 2**31

    @property
    def channel(self) -> str:
        """The same of the channels, whose names are as short as those of schemas. One that two share only wakes more
        than it has to."""
        return f"loreg_{zlib.crc32(str(self._schema).encode()):08x}"

    def _revision(self, connection: Connection) -> str | None:
        """What the catalog says it is at; None if there is nothing at all."""
        found = connection.exec_driver_sql(_SCHEMAS).all()
        tables = {table for schema, names in found if schema == self._schema for table in names}
        if not tables:
            return None
        kinds.require_ours(
            f"schema {self._schema!r} of {self.name}",
            tables,
            "give the catalog a schema of its own: CREATE SCHEMA loreg, and ?options=-csearch_path%3Dloreg at the "
            "end of LOREG_CATALOG",
        )
        revisions = connection.execute(text("SELECT version_num FROM alembic_version")).scalars()
        return kinds.the_one(self.name, [str(revision) for revision in revisions], self.remedy)

    def _back_up(self, connection: Connection, revision: str) -> None:
        """Every row, by table, in a schema of its own, in the transaction that upgrades: there is a backup if there
        was an upgrade and only then, and it needs no tool and no disk but the server's."""
        now = datetime.now(UTC).strftime("%Y%m%dt%H%M%S%fz")
        quote = connection.dialect.identifier_preparer.quote
        backup, schema = quote(f"backup_{revision}_{now}_{self._schema}"[:63]), quote(str(self._schema))
        connection.exec_driver_sql(f"CREATE SCHEMA {backup}")
        for name, tables in connection.exec_driver_sql(_SCHEMAS).all():
            for table in map(quote, tables if name == self._schema else ()):
                connection.exec_driver_sql(f"CREATE TABLE {backup}.{table} AS TABLE {schema}.{table}")


class Notifications:
    """What the server tells of one name. Where no connection can be had for that, or one is lost, anything may have
    changed each time that is asked, until there is another."""

    def __init__(self, kind: PostgreSQL, name: str | None) -> None:
        self._kind, self._name = kind, name
        self._heard: list[str] = []
        self._raw: Any = None

    @property
    def told(self) -> bool:
        return self._raw is not None

    def happened(self) -> bool:
        if self._raw is None:
            with suppress(LoregError):  # whether the catalog can be read, the read will tell
                self._raw = self._kind.listening()
                self._raw.add_notify_handler(lambda note: self._heard.append(note.payload))
            return True
        try:
            # Brings what the server has to tell, and shows that it is there: one that vanished tells nothing either.
            self._raw.execute("SELECT 1")
            self._drain()
        except self._kind.errors():
            self.close()
            return True
        heard, self._heard[:] = set(self._heard), ()
        return bool(heard) if self._name is None else not heard.isdisjoint(("", self._name))

    def wait(self, wake: socket.socket, seconds: float) -> None:
        if self._raw is None:
            wait_for(seconds, wake)
            return
        self._drain()  # what came right behind an answer lies in libpq's memory, and its socket is silent
        if not self._heard:
            wait_for(min(seconds, _HEARTBEAT), wake, self._raw.fileno())

    def close(self) -> None:
        self._heard.clear()
        if self._raw is not None:
            with suppress(self._kind.errors()):
                self._raw.close()
            self._raw = None

    def _drain(self) -> None:
        while (note := self._raw.pgconn.notifies()) is not None:
            self._heard.append(note.extra.decode())


def _shown(url: URL) -> str:
    """Where it is, without what is nobody's business."""
    host = url.host or next(iter(url.normalized_query.get("host", ())), "")
    return f"postgresql://{host}{f':{url.port}' if url.port else ''}/{url.database or ''}"


def _require_able(name: str, version: int, encoding: str) -> None:
    if version < _OLDEST:
        raise Unsupported(
            f"the catalog {name} is on PostgreSQL {version // 10_000}: expected {_OLDEST // 10_000} or later."
        )
    if encoding != "UTF8":
        raise Unsupported(f"the database {name} holds {encoding}: expected one that was made with ENCODING 'UTF8'.")


def _schema_of(name: str, found: list[tuple[str, list[str]]]) -> str:
    for schema, tables in found:
        if set(tables) >= kinds.OURS:
            return schema
    if not found:
        raise UsageError(
            f"{name} has none of the schemas of the search path: make one with CREATE SCHEMA, or name another by "
            "?options=-csearch_path%3Dschema at the end of LOREG_CATALOG."
        )
    return found[0][0]
