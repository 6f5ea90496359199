"""What every kind of database has in common: the newest revision, how migrations are run, how long writers wait."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from sqlalchemy import Connection, Engine

from loreg.catalog.changes import Changes
from loreg.errors import BadInput, NotFound

if TYPE_CHECKING:
    from alembic.config import Config

HEAD = "0004"
"""The newest revision in ``migrations/``: a constant, because importing alembic costs half a command."""

BUSY_TIMEOUT_MS = 30_000
"""How long a writer waits for another one before it gives up."""

OURS = {"alembic_version", "adapters", "blobs"}
"""Tables by which a catalog is told from somebody else's database."""


class Kind(Protocol):
    """Where a catalog is, in one kind of database. ``name`` is what messages call it, and holds no password."""

    name: str
    reading: Mapping[str, Any]
    """The execution options of a transaction that is one snapshot, and in which every write fails."""
    writing: Mapping[str, Any]
    """The execution options of a transaction that is alone among the writers from its start to its commit."""

    remedy: str
    """What to do about a damaged one."""

    def engine(self) -> Engine:
        """Connections to it, for transactions with one of these options."""

    def prepare(self, backup_dir: Path | None) -> None:
        """Have it there, at revision ``HEAD``: made if there is none, upgraded after a backup, or refused."""

    def stamp(self) -> Hashable | None:
        """What is another one after a commit that changes what a name stands for, by whomever; None if it cannot be
        told."""

    def close(self) -> None:
        """Let go of what ``stamp`` keeps."""

    def announce(self, connection: Connection, names: Collection[str] | None) -> None:
        """Have who watches one of ``names``, or anything for None, told when this transaction commits."""

    def changes(self, name: str | None) -> Changes:
        """Whether what that name stands for may have changed; of any name for None."""

    def is_full(self) -> bool:
        """Whether the disk that it is on has no room left, for what does not say so itself."""


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


def run_migrations(connection: Connection) -> None:
    from alembic import command

    command.upgrade(alembic_config(connection), "head")


def require_known(name: str, revision: str) -> None:
    """Raises BadInput for a revision that this loreg has no migration to or from."""
    from alembic.script import ScriptDirectory

    known = {script.revision for script in ScriptDirectory.from_config(alembic_config()).walk_revisions()}
    if revision not in known:
        raise BadInput(
            f"the catalog {name} is at revision {revision}, and this loreg knows revisions up to {HEAD}: "
            "it was written by a newer loreg; upgrade loreg."
        )


def require_ours(name: str, tables: set[str], otherwise: str) -> None:
    """Raises BadInput for a database with other tables than a catalog's; ``otherwise`` says what to do then."""
    if not tables >= OURS:
        found = f"found the tables {', '.join(sorted(tables)[:5])}" if tables else "found no tables"
        raise BadInput(f"{name} is not a catalog of loreg: expected its tables, {found}; {otherwise}.")


def the_one(name: str, revisions: list[str], remedy: str) -> str:
    """The revision that a catalog says it is at; raises BadInput if it says none, or several."""
    if len(revisions) != 1:
        raise BadInput(f"the catalog {name} is damaged: expected one revision, found {len(revisions)}; {remedy}.")
    return revisions[0]
