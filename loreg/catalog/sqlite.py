"""A catalog in a file of SQLite.

A catalog appears under its name complete or not at all: a new one is built beside it and linked in
place, so two processes that open at once cannot see each other's half-made tables, and an empty file is
never mistaken for a new catalog. (A truncated one would be filled with empty tables, and the next
garbage collection would delete every blob.)
"""

from __future__ import annotations

import errno
import os
import socket
import sqlite3
import threading
from collections.abc import Collection, Hashable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event, text
from sqlalchemy.exc import DisconnectionError
from sqlalchemy.pool import NullPool, QueuePool

from loreg.catalog import kinds
from loreg.catalog.changes import wait_for
from loreg.errors import BadInput, CheckFailed, Conflict, UsageError

_PROBE = 1 << 16
"""Bytes: two pieces of the index of a log."""
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT}
_REMEDY = (
    "restore a backup; or move it away, with the files -wal and -shm beside it, and make it again from the store "
    "with `loreg fsck --rebuild-catalog`"
)


class SQLite:
    """A catalog at ``path``."""

    remedy = _REMEDY
    reading: Mapping[str, Any] = {"loreg_writes": False}
    writing: Mapping[str, Any] = {"loreg_writes": True}

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = str(path)
        self._looking = threading.Lock()
        self._looker: tuple[Hashable, sqlite3.Connection, object] | None = None

    @classmethod
    def of_url(cls, url: URL) -> SQLite:
        """Raises UsageError for a URL that does not name a file, and nothing else. None of it is repeated."""
        found = {
            "no path": url.database in (None, "", ":memory:"),
            "a host, a user or a password": any((url.host, url.port, url.username, url.password)),
            "settings after a ?": bool(url.query),
        }
        if any(found.values()):
            raise UsageError(
                "what starts with sqlite:// does not name a catalog: expected sqlite:/// and the path of a file "
                f"alone, found {' and '.join(what for what, there in found.items() if there)}."
            )
        return cls(Path(str(url.database)).absolute())

    def engine(self) -> Engine:
        return _engine(self.path)

    def stamp(self) -> Hashable | None:
        """By ``PRAGMA data_version`` of a connection that does nothing else: it tells of commits by all others, and
        is compared with itself alone. Takes some microseconds."""
        with self._looking:
            try:
                at = _file(self.path), os.getpid()  # a catalog that was put there since is another one
                if self._looker is None or self._looker[0] != at:
                    self._looker = at, _connect(self.path), object()
                _, connection, own = self._looker
                return own, connection.execute("PRAGMA data_version").fetchone()
            except (OSError, Conflict, sqlite3.Error):  # whoever looks at the rows is told
                return None

    def announce(self, connection: Connection, names: Collection[str] | None) -> None:
        """A file tells nobody."""

    def changes(self, name: str | None) -> FileChanges:
        return FileChanges(self)

    def close(self) -> None:
        with self._looking:
            if self._looker is not None:
                self._looker[1].close()
            self._looker = None

    def is_full(self) -> bool:
        return _is_full(self.path.parent)

    def prepare(self, backup_dir: Path | None) -> None:
        path = self.path
        with _typed_files(path):
            # In this order: a log is never older than its database, so a log seen before a database
            # that is missing afterwards is an orphan, which SQLite would replay into the new one.
            orphan = _has_bytes(_beside(path, "-wal"))
            if not path.exists():
                if orphan:
                    raise BadInput(
                        f"the catalog {path} is missing, but its log {path.name}-wal is there: expected both "
                        "or neither; restore the catalog from a backup; or move the log away, and make the catalog "
                        "again from the store with `loreg fsck --rebuild-catalog`."
                    )
                _create(path)
            if not path.is_file():
                raise UsageError(
                    f"the catalog {path} is not a file: expected one, or a path where one can be made; "
                    "choose another with LOREG_CATALOG or LOREG_HOME."
                )
            if _revision(path) != kinds.HEAD:
                _upgrade(path, backup_dir or path.parent)


class FileChanges:
    """By the stamp of the file, which takes microseconds: any commit changes it."""

    told = False

    def __init__(self, kind: SQLite) -> None:
        self._kind = kind
        self._seen: Hashable | None = None

    def happened(self) -> bool:
        before, self._seen = self._seen, self._kind.stamp()
        return self._seen is None or self._seen != before

    def wait(self, wake: socket.socket, seconds: float) -> None:
        wait_for(seconds, wake)

    def close(self) -> None:
        """The stamp is the registry's."""


class _Connection(sqlite3.Connection):
    """``file``: which one was at its path just before it was opened."""

    file: tuple[int, int] | None = None


def _file(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def _connect(path: Path) -> sqlite3.Connection:
    file = None
    try:
        file = _file(path)
    except FileNotFoundError as error:
        raise Conflict(
            f"the catalog {path} is not there any more: expected it where it was opened; put it back, or open the "
            "registry again."
        ) from error
    except OSError:
        pass  # to open it says what is wrong
    # mode=rw never creates: a catalog deleted under us is an error, not a new and empty one.
    connection = sqlite3.connect(
        f"{path.as_uri()}?mode=rw",
        uri=True,
        timeout=kinds.BUSY_TIMEOUT_MS / 1000,
        isolation_level=None,
        check_same_thread=False,
        factory=_Connection,
    )
    connection.file = file
    return connection


def _engine(path: Path, *, migrating: bool = False) -> Engine:
    """Connections with the pragmas of the design, and transactions begun by us and not by ``sqlite3``."""

    engine = create_engine(
        "sqlite://", creator=partial(_connect, path), poolclass=NullPool if migrating else QueuePool
    )

    @event.listens_for(engine, "connect")
    def set_pragmas(connection: sqlite3.Connection, _record: Any) -> None:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        # Copying a table, as SQLite's migrations do, would cascade; an upgrade checks the keys at its end.
        connection.execute(f"PRAGMA foreign_keys = {'OFF' if migrating else 'ON'}")

    @event.listens_for(engine, "checkout")
    def check_file(connection: _Connection, _record: Any, _proxy: Any) -> None:
        """A catalog that was put in place of the one that is open, as by a restore, is the catalog: what is read and
        written in the other one is lost."""
        try:
            same = connection.file == _file(path)
        except OSError:
            same = False
        if not same:
            raise DisconnectionError("another file is at the catalog's path")

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        writes = migrating or connection.get_execution_options().get("loreg_writes", False)
        connection.exec_driver_sql(f"PRAGMA query_only = {'OFF' if writes else 'ON'}")
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


def _create(path: Path) -> None:
    _make_directory(path.parent)
    new = _beside(path, f".{os.urandom(8).hex()}.new")
    try:
        new.touch(0o644, exist_ok=False)
        with _migrating(new) as connection:
            kinds.run_migrations(connection)
        if _has_bytes(_beside(new, "-wal")):
            # Closing copies the log into the catalog, and says nothing of it where the disk fails.
            number = errno.ENOSPC if _is_full(path.parent) else errno.EIO
            raise OSError(number, os.strerror(number))
        _sync(new)
        with suppress(FileExistsError):  # another process was faster, and its catalog is as good
            os.link(new, path)
        _sync(path.parent)
    finally:
        for suffix in ("", "-wal", "-shm"):
            with suppress(OSError):
                _beside(new, suffix).unlink(missing_ok=True)


def _upgrade(path: Path, backup_dir: Path) -> None:
    kinds.require_known(str(path), _revision(path))  # before anything is opened for writing
    with _migrating(path) as connection:
        found = _revision(path)  # and again under the lock: another process may have upgraded meanwhile
        kinds.require_known(str(path), found)
        if found == kinds.HEAD:
            return
        _back_up(path, backup_dir, found)
        kinds.run_migrations(connection)
        if broken := connection.execute(text("PRAGMA foreign_key_check")).all():
            raise CheckFailed(
                f"the catalog {path} stays at revision {found}: after an upgrade to {kinds.HEAD}, rows "
                f"would refer to nothing, {len(broken)} in all, first in table {broken[0][0]}; please report this."
            )


@contextmanager
def _migrating(path: Path) -> Iterator[Connection]:
    engine = _engine(path, migrating=True)
    try:
        with engine.begin() as connection:
            yield connection
    finally:
        engine.dispose()


def _revision(path: Path) -> str:
    """What the catalog says it is at; reads only, so that a foreign database stays as it was."""
    try:
        return _stated_revision(path, "ro")
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode != sqlite3.SQLITE_READONLY_ROLLBACK:
            raise
        # A process was killed in a write of a catalog that was not in WAL mode: one that was read in from a dump.
        # Only who may write can undo that write, and until it is undone nobody can read.
        return _stated_revision(path, "rw")


def _stated_revision(path: Path, mode: str) -> str:
    timeout = kinds.BUSY_TIMEOUT_MS / 1000
    with closing(sqlite3.connect(f"{path.as_uri()}?mode={mode}", uri=True, timeout=timeout)) as raw:
        tables = {name for (name,) in raw.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        kinds.require_ours(str(path), tables, f"choose another path with LOREG_CATALOG, or {_REMEDY}")
        revisions = [str(revision) for (revision,) in raw.execute("SELECT version_num FROM alembic_version")]
    return kinds.the_one(str(path), revisions, _REMEDY)


def _back_up(path: Path, directory: Path, revision: str) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    now = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%fZ")
    final = directory / f"{path.name}.{revision}.{now}.bak"
    partial = _beside(final, ".partial")
    try:
        with (
            closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as source,
            closing(sqlite3.connect(partial)) as target,
        ):
            source.backup(target)
        _sync(partial)
        partial.rename(final)
        _sync(directory)
    finally:
        partial.unlink(missing_ok=True)


def _make_directory(path: Path) -> None:
    """There, and the entry of each directory that was made in its parent on disk: else a power loss takes the home of
    the registry away, with all that was acknowledged and synced in it."""
    missing = [each for each in (path, *path.parents) if not each.exists()]
    for each in reversed(missing):
        each.mkdir(exist_ok=True)
        _sync(each.parent)


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def _is_full(directory: Path) -> bool:
    """Of a disk without room for its log, or for the index of that, SQLite says only that it failed."""
    try:
        with TemporaryFile(dir=directory, buffering=0) as file:
            return file.write(bytes(_PROBE)) < _PROBE
    except OSError as error:
        return error.errno in _NO_ROOM


def _has_bytes(path: Path) -> bool:
    try:
        return path.stat().st_size > 0
    except FileNotFoundError:
        return False


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _typed_files(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raised, advice = (CheckFailed, "free some space, or ") if error.errno in _NO_ROOM else (UsageError, "")
        raise raised(
            f"could not open the catalog {path}: {error.strerror or error}; {advice}choose another place with "
            "LOREG_CATALOG or LOREG_HOME."
        ) from error
