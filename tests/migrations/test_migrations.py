"""Catalogs are made, upgraded and refused; the schema of every revision is a reviewed snapshot.

``schema_0001.sql`` is what a catalog at 0001 holds, ``catalog_0001.sql`` one that was written by the loreg of that
revision. Neither changes: a new revision adds its own, the catalog by ``make_catalog.py``.
"""

from __future__ import annotations

import os
import re
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine
from sqlalchemy.dialects import postgresql
from sqlalchemy.schema import CreateTable

from loreg.catalog import HEAD, Database, kinds, migrations_path, queries, sqlite
from loreg.catalog.models import Model
from loreg.errors import BadInput, CheckFailed, LoregError, UsageError

HERE = Path(__file__).resolve().parent
ADAPTER = "INSERT INTO adapters VALUES (1, 'sql', 1, 0)"


def schema(path: Path) -> str:
    """Every CREATE statement of a database, one a paragraph, in order of kind and name."""
    with closing(sqlite3.connect(path)) as raw:
        rows = raw.execute(
            "SELECT sql FROM sqlite_master WHERE sql IS NOT NULL AND name <> 'alembic_version' "
            "ORDER BY type DESC, name"
        ).fetchall()
    # A column that was added stands behind the last one, in its line.
    lines = (re.sub(r", (?=\w+ (INTEGER|TEXT)\b)", ",\n\t", sql).strip().splitlines() for (sql,) in rows)
    return "\n".join("\n".join(line.rstrip() for line in each) + ";\n" for each in lines)


def is_index(name: str | None, kind: str) -> bool:
    """Of the tables that SQLite keeps of a full-text index."""
    return kind == "table" and str(name).partition("_")[0] == "search"


def execute(path: Path, *statements: str) -> list:
    with closing(sqlite3.connect(path)) as raw, raw:
        rows: list = []
        for statement in statements:
            rows = raw.execute(statement).fetchall()
        return rows


def in_children(count: int, function: Callable[[int], None]) -> list[int]:
    """Run it in forked processes that start together; their exit codes, 99 for an exception."""
    ready, go = os.pipe()
    pids = []
    for number in range(count):
        pid = os.fork()
        if pid == 0:
            os.close(go)
            os.read(ready, 1)
            try:
                function(number)
            except BaseException:
                traceback.print_exc()
                os._exit(99)
            os._exit(0)
        pids.append(pid)
    os.close(ready)
    os.close(go)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "home" / "catalog.db"


@pytest.fixture
def made(path: Path) -> Path:
    Database.open(path).close()
    return path


# --- the schema -------------------------------------------------------------------------------------


def test_a_fresh_catalog_is_the_snapshot_and_nothing_beside_it(made: Path) -> None:
    assert schema(made) == (HERE / f"schema_{HEAD}.sql").read_text()
    assert execute(made, "SELECT version_num FROM alembic_version") == [(HEAD,)]
    assert os.listdir(made.parent) == ["catalog.db"]


def test_the_models_are_the_migrations(made: Path, tmp_path: Path) -> None:
    engine = create_engine(f"sqlite:///{tmp_path}/models.db")
    Model.metadata.create_all(engine)
    engine.dispose()
    assert schema(made) == schema(tmp_path / "models.db")
    engine = create_engine(f"sqlite:///{made}")
    with engine.connect() as connection:
        options = {"compare_type": True, "include_name": lambda name, kind, _: not is_index(name, kind)}
        context = MigrationContext.configure(connection, opts=options)
        assert compare_metadata(context, Model.metadata) == []
    engine.dispose()


def test_the_constant_is_the_head_of_the_scripts() -> None:
    scripts = ScriptDirectory.from_config(kinds.alembic_config())
    assert scripts.get_heads() == [HEAD]
    revisions = [script.revision for script in scripts.walk_revisions()]
    assert sorted(revisions) == sorted(p.name.split("_")[0] for p in migrations_path().glob("versions/*.py"))
    for revision in revisions:
        assert (HERE / f"schema_{revision}.sql").is_file() and (HERE / f"catalog_{revision}.sql").is_file()


def test_down_and_up_again(made: Path) -> None:
    before = schema(made)
    for move, target in ((command.downgrade, "base"), (command.upgrade, "head")):
        with sqlite._migrating(made) as connection:
            move(kinds.alembic_config(connection), target)
        assert (schema(made) == "") == (target == "base")
    assert schema(made) == before


def test_the_models_compile_for_postgresql() -> None:
    for table in Model.metadata.sorted_tables:
        ddl = str(CreateTable(table).compile(dialect=postgresql.dialect()))
        assert "STRICT" not in ddl
        assert "GLOB" not in ddl
        assert "INTEGER" not in ddl


# --- upgrades ---------------------------------------------------------------------------------------

NEXT = f"{int(HEAD) + 1:04d}"
ADD_COLUMN = (
    f"revision, down_revision = {NEXT!r}, {HEAD!r}"
    """
from alembic import op
import sqlalchemy as sa

def upgrade():
    with op.batch_alter_table("versions", recreate="always", table_kwargs={"sqlite_strict": True}) as batch:
        batch.add_column(sa.Column("extra", sa.Text()))
"""
)
FAIL = ADD_COLUMN + "    raise RuntimeError('half-way')\n"
BREAK = ADD_COLUMN + "    op.execute('DELETE FROM adapters')\n"


@pytest.fixture
def next_release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    def install(script: str) -> None:
        scripts = tmp_path / "50% migrations"
        shutil.copytree(migrations_path(), scripts, ignore=shutil.ignore_patterns("__pycache__"))
        (scripts / "versions" / f"{NEXT}_next.py").write_text(script)
        monkeypatch.setattr(kinds, "migrations_path", lambda: scripts)
        monkeypatch.setattr(kinds, "HEAD", NEXT)

    return install


@pytest.fixture
def filled(made: Path) -> Path:
    digest = "blake3:" + "0" * 64
    execute(
        made,
        f"INSERT INTO blobs VALUES ('{digest}', '{'0' * 16}', '{'0' * 64}', 1, 'live', 0)",
        ADAPTER,
        f"INSERT INTO versions VALUES (1, 1, 1, '{digest}', '{digest}', 'gpt2', 8, 1, 1, NULL, 0, NULL)",
        "INSERT INTO targets VALUES (1, 'c_attn')",
        "INSERT INTO tags VALUES (1, 'latest', 1, 1)",
        "INSERT INTO tag_history VALUES (1, 'latest', 1, 1, 0)",
    )
    return made


def contents(path: Path) -> dict[str, list]:
    """The rows of every table that is there."""
    there = {name for (name,) in execute(path, "SELECT name FROM sqlite_master WHERE type = 'table'")}
    tables = [table.name for table in Model.metadata.sorted_tables if table.name in there]
    return {name: execute(path, f"SELECT * FROM {name}") for name in tables}


def test_an_older_catalog_is_upgraded_after_a_backup(filled: Path, next_release: Callable) -> None:
    before, before_schema = contents(filled), schema(filled)
    next_release(ADD_COLUMN)
    Database.open(filled).close()
    after = contents(filled)
    # The rows that refer to the table that was copied are all there: nothing cascaded.
    assert after.pop("versions") == [(*row, None) for row in before["versions"]]
    assert after == {name: rows for name, rows in before.items() if name != "versions"}
    assert execute(filled, "SELECT version_num FROM alembic_version") == [(NEXT,)]
    (backup,) = [entry for entry in filled.parent.iterdir() if entry != filled]
    assert backup.name.startswith(f"catalog.db.{HEAD}.")
    assert backup.suffix == ".bak"
    assert contents(backup) == before
    assert schema(backup) == before_schema
    Database.open(filled).close()
    assert len(list(filled.parent.iterdir())) == 2


OLD = sorted(HERE.glob("catalog_*.sql"))


def is_kept(before: dict[str, list], after: dict[str, list]) -> None:
    """Every row is there, and what is new since is filled."""
    assert len(after["registry"]) == 1
    # Of what is older than the ledger the next transaction that changes a name writes down everything.
    assert after["ledger"] == before.get("ledger", [])
    assert len(after["documents"]) == len(after["versions"])
    for name, rows in before.items():
        assert [row[: len(rows[0])] for row in after[name]] == rows, name


def can_be_worked_with(db: Database, revision: str) -> None:
    with db.read() as s:
        assert {row.name: row.number for row in queries.list_versions(s)} == {"sql": 2, "team/humor": 1, "both": 1}
        assert queries.find_version(s, "sql", tag="prod").number == 1
        assert [row.name for row in queries.list_versions(s, query="umo")] == ["team/humor"]
        removed = [(row.name, row.number) for row in queries.removed_versions(s)]
        assert removed == ([("sql", 3)] if revision > "0001" else [])


@pytest.mark.parametrize("old", OLD, ids=lambda path: path.stem)
def test_a_real_catalog_of_an_earlier_release(path: Path, old: Path) -> None:
    """Up, down to where it was, and up again: no row is lost, and it can be worked with."""
    revision = old.stem.removeprefix("catalog_")
    path.parent.mkdir()
    with closing(sqlite3.connect(path)) as raw:
        raw.executescript(old.read_text())
    before = contents(path)
    Database.open(path).close()
    after = contents(path)
    is_kept(before, after)
    assert schema(path) == (HERE / f"schema_{HEAD}.sql").read_text()
    with Database.open(path) as db:
        can_be_worked_with(db, revision)
    with sqlite._migrating(path) as connection:
        command.downgrade(kinds.alembic_config(connection), revision)
    assert contents(path) == before
    assert schema(path) == (HERE / f"schema_{revision}.sql").read_text()
    Database.open(path).close()
    is_kept(before, contents(path))
    assert contents(path)["documents"] == after["documents"]


def test_the_trash_leaves_with_its_column(path: Path) -> None:
    path.parent.mkdir()
    with closing(sqlite3.connect(path)) as raw:
        raw.executescript((HERE / "catalog_0001.sql").read_text())
    Database.open(path).close()
    execute(path, "DELETE FROM tags WHERE version_id = 2", "UPDATE versions SET removed_at = 1 WHERE id = 2")
    with sqlite._migrating(path) as connection:
        command.downgrade(kinds.alembic_config(connection), "0001")
    assert execute(path, "SELECT id FROM versions ORDER BY id") == [(1,), (3,), (4,)]
    assert execute(path, "PRAGMA foreign_key_check") == []


def test_a_backup_goes_where_it_is_told(filled: Path, next_release: Callable, tmp_path: Path) -> None:
    next_release(ADD_COLUMN)
    Database.open(filled, backup_dir=tmp_path / "new" / "backups").close()
    (backup,) = (tmp_path / "new" / "backups").iterdir()
    assert execute(backup, "PRAGMA integrity_check") == [("ok",)]
    assert os.listdir(filled.parent) == ["catalog.db"]


@pytest.mark.parametrize(
    ("script", "error", "says"),
    [(FAIL, RuntimeError, "half-way"), (BREAK, CheckFailed, "would refer to nothing")],
    ids=["fails", "breaks a reference"],
)
def test_an_upgrade_that_fails_changes_nothing(
    filled: Path, next_release: Callable, script: str, error: type[Exception], says: str
) -> None:
    before = contents(filled), schema(filled)
    next_release(script)
    with pytest.raises(error, match=says):
        Database.open(filled)
    assert (contents(filled), schema(filled)) == before
    assert execute(filled, "SELECT version_num FROM alembic_version") == [(HEAD,)]


def test_processes_that_upgrade_at_once_upgrade_once(filled: Path, next_release: Callable) -> None:
    next_release(ADD_COLUMN)
    assert in_children(4, lambda _: Database.open(filled).close()) == [0] * 4
    assert len(list(filled.parent.glob("*.bak"))) == 1
    assert len(execute(filled, "SELECT extra FROM versions")) == 1


def test_a_backup_that_cannot_be_made_stops_the_upgrade(filled: Path, next_release: Callable, tmp_path: Path) -> None:
    next_release(ADD_COLUMN)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UsageError):
        Database.open(filled, backup_dir=tmp_path / "file")
    assert execute(filled, "SELECT version_num FROM alembic_version") == [(HEAD,)]


# --- fresh catalogs ---------------------------------------------------------------------------------


def test_processes_that_open_at_once_make_one_catalog(path: Path) -> None:
    def open_and_write(number: int) -> None:
        with Database.open(path) as db, db.write() as s:
            s.connection().exec_driver_sql(f"INSERT INTO adapters VALUES ({number}, 'sql{number}', 1, 0)")

    assert in_children(5, open_and_write) == [0] * 5
    assert len(execute(path, "SELECT * FROM adapters")) == 5
    assert os.listdir(path.parent) == ["catalog.db"]


def test_a_crash_while_a_catalog_is_made_leaves_none(path: Path) -> None:
    steps = 0
    while True:

        def crash(_number: int, remaining: int = steps) -> None:

            def stepping(original: Callable) -> Callable:
                def step(*args, **options):
                    nonlocal remaining
                    remaining -= 1
                    if remaining == -1:
                        os._exit(42)
                    return original(*args, **options)

                return step

            for module, name in ((os, "link"), (os, "fsync"), (os, "unlink"), (kinds, "run_migrations")):
                setattr(module, name, stepping(getattr(module, name)))
            Database.open(path).close()

        (code,) = in_children(1, crash)
        if path.exists():
            assert schema(path) == (HERE / f"schema_{HEAD}.sql").read_text()
        Database.open(path).close()
        assert schema(path) == (HERE / f"schema_{HEAD}.sql").read_text()
        if code == 0:
            break
        assert code == 42
        path.unlink()
        steps += 1
    assert steps >= 4


def test_an_orphaned_log_is_not_replayed_into_a_new_catalog(made: Path) -> None:
    with Database.open(made) as db:
        with db.write() as s:
            s.connection().exec_driver_sql(ADAPTER)
        shutil.copy(f"{made}-wal", f"{made}-saved")
    made.unlink()
    Path(f"{made}-saved").rename(f"{made}-wal")
    with pytest.raises(BadInput, match="is missing, but its log"):
        Database.open(made)
    assert not made.exists()


# --- refusals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("revision", [NEXT, "9999", "", "0001; DROP TABLE blobs"])
def test_a_newer_catalog_is_refused_and_left_alone(made: Path, revision: str) -> None:
    execute(made, f"UPDATE alembic_version SET version_num = '{revision}'")
    before = made.read_bytes()
    with pytest.raises(BadInput, match=f"at revision {revision}, .* up to {HEAD}.*upgrade loreg"):
        Database.open(made)
    assert made.read_bytes() == before
    assert {entry.suffix for entry in made.parent.iterdir()} <= {".db", ".db-wal", ".db-shm"}
    made.rename(made.with_suffix(".newer"))
    Database.open(made).close()  # what reading left beside it is empty, and no orphaned log


@pytest.mark.parametrize("rows", [[], ["0001", "0000"]])
def test_a_catalog_without_one_revision_is_damaged(made: Path, rows: list[str]) -> None:
    execute(made, "DELETE FROM alembic_version", *(f"INSERT INTO alembic_version VALUES ('{r}')" for r in rows))
    with pytest.raises(BadInput, match=f"found {len(rows)}"):
        Database.open(made)


def foreign(path: Path) -> None:
    execute(path, "CREATE TABLE customers (id INTEGER)", "INSERT INTO customers VALUES (1)")


def foreign_with_alembic(path: Path) -> None:
    execute(path, "CREATE TABLE alembic_version (version_num TEXT)", "INSERT INTO alembic_version VALUES ('0001')")


def foreign_in_wal(path: Path) -> None:
    execute(path, "PRAGMA journal_mode = WAL", "CREATE TABLE customers (id INTEGER)")


@pytest.mark.parametrize(
    "make",
    [
        foreign,
        foreign_with_alembic,
        foreign_in_wal,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"not a database" * 1000),
        lambda path: path.write_bytes(b"SQLite format 3\0" + b"\xff" * 5000),
    ],
    ids=["tables", "alembic", "wal", "empty", "text", "header"],
)
def test_what_is_no_catalog_is_refused_and_left_alone(tmp_path: Path, make: Callable) -> None:
    path = tmp_path / "catalog.db"
    make(path)
    before = path.read_bytes()
    with pytest.raises(BadInput, match=str(path)):
        Database.open(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("keep", [1, 99, 4096, 5000])
def test_a_truncated_catalog_is_refused(made: Path, keep: int) -> None:
    os.truncate(made, keep)
    with pytest.raises(BadInput):
        Database.open(made)


def test_a_place_where_no_catalog_can_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for path in (tmp_path, tmp_path / "file" / "catalog.db"):
        with pytest.raises(UsageError, match="LOREG_CATALOG"):
            Database.open(path)


@pytest.fixture
def public() -> Iterator[Path]:
    """A directory that another user can reach."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


def as_nobody(function: Callable[[], None]) -> int:
    def change(_number: int) -> None:
        if os.getuid() == 0:
            os.setgid(65534)
            os.setuid(65534)
        function()

    return in_children(1, change)[0]


def test_a_catalog_that_may_not_be_written(public: Path) -> None:
    path = public / "catalog.db"
    Database.open(path).close()
    path.chmod(0o444)
    public.chmod(0o777)

    def read_and_write() -> None:
        with Database.open(path) as db:
            with db.read() as s:
                assert s.connection().exec_driver_sql("SELECT * FROM adapters").all() == []
            with pytest.raises(UsageError, match="writable"), db.write() as s:
                s.connection().exec_driver_sql(ADAPTER)

    assert as_nobody(read_and_write) == 0


def test_a_directory_that_may_not_be_written(public: Path) -> None:
    path = public / "catalog.db"
    Database.open(path).close()
    public.chmod(0o555)

    def refused() -> None:
        with pytest.raises(LoregError, match="LOREG_CATALOG"):
            Database.open(path)
        with pytest.raises(UsageError, match="Permission denied"):
            Database.open(public / "other" / "catalog.db")

    assert as_nobody(refused) == 0


def test_an_installed_package_carries_its_migrations(tmp_path: Path) -> None:
    root = HERE.parents[1]
    site = tmp_path / "site"
    for name in ("__init__.py", "addresses.py", "errors.py", "digest.py"):
        (site / "loreg").mkdir(parents=True, exist_ok=True)
        shutil.copy(root / "loreg" / name, site / "loreg" / name)
    for name in ("catalog", "format"):
        shutil.copytree(root / "loreg" / name, site / "loreg" / name)
    shutil.copytree(root / "migrations", site / "loreg" / "migrations")
    code = (
        "import sys; from pathlib import Path; from loreg.catalog import Database, migrations_path\n"
        "Database.open(Path(sys.argv[1])).close(); print(migrations_path())"
    )
    found = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "catalog.db")],
        cwd=site,
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.strip() == str(site / "loreg" / "migrations")
