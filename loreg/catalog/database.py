"""Open a catalog: make it if there is none, upgrade an older one after a backup, refuse everything else.

A catalog appears under its name complete or not at all: a new one is built beside it and linked in
place, so two processes that open at once cannot see each other's half-made tables, and an empty file is
never mistaken for a new catalog. (A truncated one would be filled with empty tables, and the next
garbage collection would delete every blob.)
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection, Engine, create_engine, event, make_url, text
from sqlalchemy.exc import ArgumentError
from sqlalchemy.orm import Session, sessionmaker
from sqlalchemy.pool import NullPool, QueuePool

from loreg.catalog.refusals import typed
from loreg.errors import BadInput, CheckFailed, NotFound, Unsupported, UsageError

if TYPE_CHECKING:
    from alembic.config import Config

HEAD = "0001"
"""The newest revision in ``migrations/``: a constant, because importing alembic costs half a command."""

BUSY_TIMEOUT_MS = 30_000
"""How long a writer waits for another one before it gives up."""


class Database:
    """A catalog at revision :data:`HEAD`. Safe to share between threads, and between processes that each
    open their own."""

    def __init__(self, path: Path) -> None:
        """Use :meth:`open`: this neither makes nor checks anything."""
        self.path = path
        self._engine = _engine(path)
        self._reading = sessionmaker(self._engine.execution_options(loreg_writes=False))
        # What a commit leaves loaded stays readable: rows are handed out of the block.
        self._writing = sessionmaker(self._engine.execution_options(loreg_writes=True), expire_on_commit=False)

    @classmethod
    def open(cls, url_or_path: str | Path, *, backup_dir: Path | None = None) -> Database:
        """The catalog at a path or ``sqlite:///`` URL, made or upgraded if it has to be.

        An upgrade first copies the catalog to ``<name>.<old revision>.<time>.bak`` in ``backup_dir``, or
        beside it. Raises BadInput for a file that is no catalog, is corrupt, or was written by a newer
        loreg, and leaves it untouched; Unsupported for another database; Conflict if it stays locked.
        """
        path = _sqlite_path(url_or_path)
        with typed(path), _typed_files(path):
            # In this order: a log is never older than its database, so a log seen before a database
            # that is missing afterwards is an orphan, which SQLite would replay into the new one.
            orphan = _has_bytes(_beside(path, "-wal"))
            if not path.exists():
                if orphan:
                    raise BadInput(
                        f"the catalog {path} is missing, but its log {path.name}-wal is there: expected both "
                        "or neither; restore the catalog from a backup, or move the log away."
                    )
                _create(path)
            if not path.is_file():
                raise UsageError(
                    f"the catalog {path} is not a file: expected one, or a path where one can be made; "
                    "choose another with LOREG_CATALOG or LOREG_HOME."
                )
            if _revision(path) != HEAD:
                _upgrade(path, backup_dir or path.parent)
            database = cls(path)
            with database.read():
                pass
        return database

    @contextmanager
    def read(self) -> Iterator[Session]:
        """One snapshot. A write in it fails, rather than be lost at the end."""
        with typed(self.path), self._reading() as session:
            session.connection()
            yield session

    @contextmanager
    def write(self) -> Iterator[Session]:
        """One transaction, alone among the writers from its start; committed unless the block raises."""
        with typed(self.path), self._writing.begin() as session:
            session.connection()
            yield session

    def close(self) -> None:
        self._engine.dispose()

    def __enter__(self) -> Database:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def migrations_path() -> Path:
    """The migrations: inside the package when installed from a wheel, else at the root of the checkout."""
    package = Path(__file__).resolve().parents[1]
    for path in (package / "migrations", package.parent / "migrations"):
        if (path / "env.py").is_file():
            return path
    raise NotFound(
        f"the migrations of the catalog are missing: expected them in {package / 'migrations'}; install loreg again."
    )


def alembic_config(connection: Connection | None = None) -> Config:
    """For alembic's own commands, over a connection that is already in a transaction."""
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(migrations_path()).replace("%", "%%"))
    config.attributes["connection"] = connection
    return config


def _sqlite_path(url_or_path: str | Path) -> Path:
    if isinstance(url_or_path, Path) or "://" not in url_or_path:
        return Path(url_or_path).absolute()
    try:
        url = make_url(url_or_path)
    except ArgumentError as error:
        raise UsageError(f"{url_or_path!r} is not a database URL: expected sqlite:///path/to/catalog.db.") from error
    if url.get_backend_name() != "sqlite":
        raise Unsupported(
            f"a catalog in {url.get_backend_name()} is not supported by this version of loreg: "
            "expected sqlite:///path/to/catalog.db."
        )
    if url.database in (None, "", ":memory:") or url.query:
        raise UsageError(
            f"{url_or_path!r} does not name a catalog: expected sqlite:/// and the path of a file alone."
        )
    return Path(str(url.database)).absolute()


def _engine(path: Path, *, migrating: bool = False) -> Engine:
    """Connections with the pragmas of the design, and transactions begun by us and not by ``sqlite3``."""

    def connect() -> sqlite3.Connection:
        # mode=rw never creates: a catalog deleted under us is an error, not a new and empty one.
        return sqlite3.connect(
            f"{path.as_uri()}?mode=rw",
            uri=True,
            timeout=BUSY_TIMEOUT_MS / 1000,
            isolation_level=None,
            check_same_thread=False,
        )

    engine = create_engine("sqlite://", creator=connect, poolclass=NullPool if migrating else QueuePool)

    @event.listens_for(engine, "connect")
    def set_pragmas(connection: sqlite3.Connection, _record: Any) -> None:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        # Copying a table, as SQLite's migrations do, would cascade; an upgrade checks the keys at its end.
        connection.execute(f"PRAGMA foreign_keys = {'OFF' if migrating else 'ON'}")

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        writes = migrating or connection.get_execution_options().get("loreg_writes", False)
        connection.exec_driver_sql(f"PRAGMA query_only = {'OFF' if writes else 'ON'}")
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


def _create(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = _beside(path, f".{os.urandom(8).hex()}.new")
    try:
        new.touch(0o644, exist_ok=False)
        with _migrating(new) as connection:
            _run_migrations(connection)
        _sync(new)
        with suppress(FileExistsError):  # another process was faster, and its catalog is as good
            os.link(new, path)
        _sync(path.parent)
    finally:
        for suffix in ("", "-wal", "-shm"):
            with suppress(OSError):
                _beside(new, suffix).unlink(missing_ok=True)


def _upgrade(path: Path, backup_dir: Path) -> None:
    _upgradable(path)  # before anything is opened for writing
    with _migrating(path) as connection:
        found = _upgradable(path)  # and again under the lock: another process may have upgraded meanwhile
        if found == HEAD:
            return
        _back_up(path, backup_dir, found)
        _run_migrations(connection)
        if broken := connection.execute(text("PRAGMA foreign_key_check")).all():
            raise CheckFailed(
                f"the catalog {path} stays at revision {found}: after an upgrade to {HEAD}, {len(broken)} "
                f"rows would refer to nothing, the first in table {broken[0][0]}; please report this."
            )


def _upgradable(path: Path) -> str:
    """The revision that the catalog is at, if it is one that this loreg knows."""
    from alembic.script import ScriptDirectory

    found = _revision(path)
    known = {script.revision for script in ScriptDirectory.from_config(alembic_config()).walk_revisions()}
    if found not in known:
        raise BadInput(
            f"the catalog {path} is at revision {found}, and this loreg knows revisions up to {HEAD}: "
            "it was written by a newer loreg; upgrade loreg."
        )
    return found


@contextmanager
def _migrating(path: Path) -> Iterator[Connection]:
    engine = _engine(path, migrating=True)
    try:
        with engine.begin() as connection:
            yield connection
    finally:
        engine.dispose()


def _run_migrations(connection: Connection) -> None:
    from alembic import command

    command.upgrade(alembic_config(connection), "head")


def _revision(path: Path) -> str:
    """What the catalog says it is at; reads only, so that a foreign database stays as it was."""
    timeout = BUSY_TIMEOUT_MS / 1000
    with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True, timeout=timeout)) as raw:
        tables = {name for (name,) in raw.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if not {"alembic_version", "adapters", "blobs"} <= tables:
            found = f"found the tables {', '.join(sorted(tables)[:5])}" if tables else "found no tables"
            raise BadInput(
                f"{path} is not a catalog of loreg: expected its tables, {found}; "
                "choose another path with LOREG_CATALOG, or restore a backup."
            )
        revisions = [revision for (revision,) in raw.execute("SELECT version_num FROM alembic_version")]
    if len(revisions) != 1:
        raise BadInput(
            f"the catalog {path} is damaged: expected one revision, found {len(revisions)}; restore a backup."
        )
    return str(revisions[0])


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


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


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
        raise UsageError(
            f"could not open the catalog {path}: {error.strerror or error}; free some space, or choose "
            "another place with LOREG_CATALOG or LOREG_HOME."
        ) from error
