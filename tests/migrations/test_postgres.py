"""The same of catalogs in PostgreSQL: each revision's schema is a reviewed snapshot, old rows go up and down again.

``postgres_0001.sql`` is what a catalog at 0001 holds. No release wrote one at 0001 or 0002; the rows are those of the
SQLite catalogs that are kept.
"""

from __future__ import annotations

import re
import sqlite3
import traceback
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import postgres_server
import psycopg
import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from postgres_server import Server
from sqlalchemy import Connection, make_url
from test_migrations import FAIL, HERE, NEXT, OLD, can_be_worked_with, in_children, is_kept, next_release

from loreg.catalog import HEAD, Database, kinds, queries
from loreg.catalog.models import Model
from loreg.catalog.postgres import PostgreSQL
from loreg.errors import BadInput, Conflict, LoregError, NotFound, RemoteError, Unsupported, UsageError

__all__ = ["next_release"]

REVISIONS = sorted(path.stem.removeprefix("postgres_") for path in HERE.glob("postgres_*.sql"))


def schema_of(server: Server, schema: str) -> str:
    """Every table, constraint, index and function, as the server spells them out."""
    with server.connect() as connection:
        connection.execute(f"SET search_path = {schema}")
        lines = []
        tables = connection.execute(
            "SELECT oid, relname FROM pg_class WHERE relnamespace = %s::regnamespace AND relkind = 'r' "
            "AND relname <> 'alembic_version' ORDER BY relname",
            (schema,),
        ).fetchall()
        for oid, name in tables:
            lines.append(f"TABLE {name}")
            lines += [f"  {line}" for (line,) in connection.execute(COLUMNS, (oid,))]
            lines += [f"  {line}" for (line,) in connection.execute(CONSTRAINTS, (oid,))]
            lines += [f"  {line}" for (line,) in connection.execute(INDICES, (oid,))]
        lines += [line for (line,) in connection.execute(FUNCTIONS, (schema,))]
    return "\n".join(lines).replace(f"{schema}.", "").rstrip() + "\n" if lines else ""


COLUMNS = """
    SELECT concat_ws(' ', a.attname, format_type(a.atttypid, a.atttypmod),
        'COLLATE ' || CASE WHEN l.collname <> 'default' THEN l.collname END,
        CASE WHEN a.attnotnull THEN 'NOT NULL' END,
        CASE a.attgenerated WHEN 's' THEN 'GENERATED ' ELSE 'DEFAULT ' END || pg_get_expr(d.adbin, d.adrelid))
    FROM pg_attribute a LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
    LEFT JOIN pg_collation l ON l.oid = a.attcollation
    WHERE a.attrelid = %s AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attnum
"""
CONSTRAINTS = """
    SELECT conname || ' ' || pg_get_constraintdef(oid) FROM pg_constraint
    WHERE conrelid = %s AND contype <> 'n' ORDER BY contype, conname
"""
INDICES = """
    SELECT pg_get_indexdef(i.indexrelid) FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid WHERE i.indrelid = %s
    AND NOT EXISTS (SELECT 1 FROM pg_constraint WHERE conindid = i.indexrelid) ORDER BY c.relname
"""
FUNCTIONS = "SELECT pg_get_functiondef(oid) FROM pg_proc WHERE pronamespace = %s::regnamespace ORDER BY proname"


def flat(schema: str) -> list[str]:
    """Without the parentheses of conditions: what was changed once, the server spells with fewer of them."""
    return [re.sub("[()]", "", line) if " CHECK " in line else line for line in schema.splitlines()]


@pytest.fixture(scope="module")
def server() -> Server:
    return postgres_server.shared()


@pytest.fixture
def place(server: Server) -> tuple[str, str]:
    return server.fresh()


@contextmanager
def migrating(url: str) -> Iterator[Connection]:
    kind = PostgreSQL(make_url(url))
    try:
        with kind.engine().execution_options(**kind.writing).begin() as connection:
            yield connection
    finally:
        kind.engine().dispose()


def move(url: str, to: str, how: Callable = command.upgrade) -> None:
    with migrating(url) as connection:
        how(kinds.alembic_config(connection), to)


def contents(server: Server, schema: str) -> dict[str, list]:
    """The rows of every table, but not what the server derives from them."""
    with server.connect() as connection:
        connection.execute(f"SET search_path = {schema}")
        names = [
            name
            for name in Model.metadata.tables
            if connection.execute(f"SELECT to_regclass('{name}')").fetchone() != (None,)
        ]
        found = {}
        for name in names:
            columns = [column.name for column in Model.metadata.tables[name].columns]
            have = {
                row[0]
                for row in connection.execute(
                    "SELECT attname FROM pg_attribute WHERE attrelid = %s::regclass", (name,)
                )
            }
            wanted = ", ".join(column for column in columns if column in have)
            found[name] = sorted(connection.execute(f"SELECT {wanted} FROM {name}").fetchall(), key=repr)
        return found


def fill(server: Server, schema: str, script: Path) -> None:
    """The rows of a SQLite catalog, in a schema of the same revision."""
    with closing(sqlite3.connect(":memory:")) as raw, server.connect() as connection:
        raw.executescript(script.read_text())
        connection.execute(f"SET search_path = {schema}")
        for table in Model.metadata.sorted_tables:
            if not raw.execute("SELECT 1 FROM sqlite_master WHERE name = ?", (table.name,)).fetchone():
                continue
            rows = raw.execute(f"SELECT * FROM {table.name}").fetchall()
            connection.execute(f"DELETE FROM {table.name}")  # a new catalog's number
            for row in rows:
                connection.execute(f"INSERT INTO {table.name} VALUES ({', '.join(['%s'] * len(row))})", row)
            if (
                "id" in table.columns
                and rows
                and table.columns["id"].autoincrement is not False
                and table.name != "leases"
            ):
                connection.execute(f"SELECT setval('{table.name}_id_seq', (SELECT max(id) FROM {table.name}))")


# --- the schema -------------------------------------------------------------------------------------


def test_there_is_a_snapshot_of_every_revision() -> None:
    assert sorted(path.stem.removeprefix("schema_") for path in HERE.glob("schema_*.sql")) == REVISIONS
    assert REVISIONS[-1] == HEAD


@pytest.mark.parametrize("revision", REVISIONS)
def test_each_revision_is_its_snapshot_up_and_down(server: Server, place: tuple[str, str], revision: str) -> None:
    schema, url = place
    move(url, revision)
    expected = (HERE / f"postgres_{revision}.sql").read_text()
    assert schema_of(server, schema) == expected
    move(url, "head")
    assert flat(schema_of(server, schema)) == flat((HERE / f"postgres_{HEAD}.sql").read_text())
    move(url, revision, command.downgrade)
    assert flat(schema_of(server, schema)) == flat(expected)
    move(url, "base", command.downgrade)
    assert schema_of(server, schema) == ""


def test_a_fresh_catalog_is_the_snapshot_and_the_models(server: Server, place: tuple[str, str]) -> None:
    schema, url = place
    Database.open(url).close()
    assert schema_of(server, schema) == (HERE / f"postgres_{HEAD}.sql").read_text()
    other, other_url = server.fresh()
    with migrating(other_url) as connection:
        Model.metadata.create_all(connection)
    assert flat(schema_of(server, other)) == flat(schema_of(server, schema))
    with migrating(url) as connection:
        derived = {"grams", "ix_documents_grams"}
        options = {"compare_type": True, "include_name": lambda name, *_: name not in derived}
        assert compare_metadata(MigrationContext.configure(connection, opts=options), Model.metadata) == []


# --- upgrades ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("old", OLD, ids=lambda path: path.stem)
def test_the_rows_of_an_earlier_catalog(server: Server, place: tuple[str, str], old: Path) -> None:
    """Up after a backup, down to where it was, and up again: no row is lost, and it can be worked with."""
    schema, url = place
    revision = old.stem.removeprefix("catalog_")
    move(url, revision)
    fill(server, schema, old)
    before = contents(server, schema)
    with Database.open(url) as db:
        can_be_worked_with(db, revision)
    after = contents(server, schema)
    is_kept(before, after)
    with server.connect() as connection:
        found = connection.execute("SELECT nspname FROM pg_namespace WHERE nspname LIKE 'backup%%' || %s", (schema,))
        copies = [name for (name,) in found]
    assert [name[: len("backup_0001")] for name in copies] == [f"backup_{revision}"] * (revision != HEAD)
    assert all(contents(server, name) == before for name in copies)
    move(url, revision, command.downgrade)
    assert contents(server, schema) == before
    Database.open(url).close()
    is_kept(before, contents(server, schema))
    assert contents(server, schema)["documents"] == after["documents"]


def test_the_trash_leaves_with_its_column(server: Server, place: tuple[str, str]) -> None:
    schema, url = place
    move(url, "0001")
    fill(server, schema, HERE / "catalog_0001.sql")
    Database.open(url).close()
    with server.connect() as connection:
        connection.execute(f"SET search_path = {schema}")
        connection.execute("DELETE FROM tags WHERE version_id = 2")
        connection.execute("UPDATE versions SET removed_at = 1 WHERE id = 2")
    move(url, "0001", command.downgrade)
    assert [row[0] for row in contents(server, schema)["versions"]] == [1, 3, 4]


def test_an_upgrade_that_fails_changes_nothing(
    server: Server, place: tuple[str, str], next_release: Callable[[str], None]
) -> None:
    schema, url = place
    Database.open(url).close()
    before = schema_of(server, schema)
    next_release(FAIL.replace('recreate="always", table_kwargs={"sqlite_strict": True}', ""))
    with pytest.raises(RuntimeError, match="half-way"):
        Database.open(url)
    assert schema_of(server, schema) == before
    assert backups(server, schema) == 0


def test_processes_that_upgrade_at_once_upgrade_once(
    server: Server, place: tuple[str, str], next_release: Callable[[str], None]
) -> None:
    schema, url = place
    Database.open(url).close()
    next_release(
        f"revision, down_revision = {NEXT!r}, {HEAD!r}\nfrom alembic import op\n"
        "def upgrade():\n    op.execute('ALTER TABLE versions ADD COLUMN extra text')\n"
    )
    assert in_children(4, lambda _: Database.open(url).close()) == [0] * 4
    assert backups(server, schema) == 1


def backups(server: Server, schema: str) -> int:
    with server.connect() as connection:
        found = connection.execute("SELECT count(*) FROM pg_namespace WHERE nspname LIKE 'backup%%' || %s", (schema,))
        return found.fetchone()[0]  # type: ignore[index]


def test_processes_that_open_at_once_make_one_catalog(server: Server, place: tuple[str, str]) -> None:
    schema, url = place

    def open_and_write(number: int) -> None:
        with Database.open(url) as db, db.write() as s:
            s.connection().exec_driver_sql(f"INSERT INTO adapters VALUES ({number}, 'sql{number}', 1, 0)")

    assert in_children(5, open_and_write) == [0] * 5
    assert len(contents(server, schema)["adapters"]) == 5


# --- refusals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("revisions", [["9999"], [""], [], ["0001", "0000"]], ids=str)
def test_another_revision_is_refused_and_left_alone(
    server: Server, place: tuple[str, str], revisions: list[str]
) -> None:
    schema, url = place
    Database.open(url).close()
    with server.connect() as connection:
        connection.execute(f"SET search_path = {schema}")
        connection.execute("DELETE FROM alembic_version")
        for revision in revisions:
            connection.execute("INSERT INTO alembic_version VALUES (%s)", (revision,))
    before = contents(server, schema), schema_of(server, schema)
    with pytest.raises(BadInput, match="upgrade loreg" if len(revisions) == 1 else f"found {len(revisions)}"):
        Database.open(url)
    assert (contents(server, schema), schema_of(server, schema)) == before


def test_what_is_no_catalog_is_refused_and_left_alone(server: Server, place: tuple[str, str]) -> None:
    schema, url = place
    with server.connect() as connection:
        connection.execute(f"CREATE TABLE {schema}.customers (id int)")
        before = schema_of(server, schema)
        with pytest.raises(BadInput, match=r"found the tables customers.*CREATE SCHEMA"):
            Database.open(url)
        assert schema_of(server, schema) == before
        connection.execute(f"DROP TABLE {schema}.customers; CREATE TABLE {schema}.alembic_version (version_num text)")
        with pytest.raises(BadInput, match="is not a catalog"):
            Database.open(url)


def test_the_schema_that_has_a_catalog_is_taken(server: Server) -> None:
    """Whoever has a schema of another name before it in the path is in the same catalog, under the same lock."""
    (mine, _), (ours, url) = server.fresh(), server.made()
    with server.connect() as connection:  # what else they have there is not what a name in a statement means
        connection.execute(f"CREATE TABLE {mine}.adapters (id bigint, name text, number bigint, at bigint)")
    with Database.open(url) as one, Database.open(server.url(f"{mine},{ours}")) as two:
        with one.write() as s:
            s.connection().exec_driver_sql("INSERT INTO adapters VALUES (1, 'sql', 1, 0)")
        with two.read() as s:
            assert s.connection().exec_driver_sql("SELECT name FROM adapters").scalar() == "sql"
        assert one.kind._lock == two.kind._lock  # type: ignore[attr-defined]
    assert contents(server, mine) == {"adapters": []}


SECRET = "a-Secret%2F1"


@pytest.mark.parametrize(
    ("url", "family"),
    [
        (f"postgresql://me:{SECRET}@127.0.0.1:1/db", RemoteError),
        (f"postgresql+psycopg://me:{SECRET}@127.0.0.1:1/db", RemoteError),
        (f"postgres://me@127.0.0.1:1/db?password={SECRET}", RemoteError),
        (f"postgresql://me:{SECRET}@127.0.0.1:port/db", UsageError),
        (f"postgresql+asyncpg://me:{SECRET}@127.0.0.1:1/db", Unsupported),
        (f"mysql://me:{SECRET}@127.0.0.1:1/db", Unsupported),
        # An @ that is not escaped, and what else ends the part before the host.
        ("postgresql://me:top@secret@127.0.0.1:1/db", UsageError),
        ("postgresql://me:top@se/cret@127.0.0.1:1/db", UsageError),
        ("postgresql://me:top@secret?x@127.0.0.1:1/db", UsageError),
        ("postgresql://me:top/secret@127.0.0.1:1/db", UsageError),
        ("postgresql://me/top:secret@127.0.0.1:1/db", UsageError),
        ("postgresql://127.0.0.1:1/db?password=top@secret", UsageError),
        ("mysql://me:top@secret@127.0.0.1:1/db", UsageError),
        ("me:secret@postgresql://127.0.0.1:1/db", UsageError),
        ("postgresql:/me:topsecret@127.0.0.1:1/db", UsageError),
        ("postgresql:me:topsecret@127.0.0.1:1/db", UsageError),
        # What is no setting, or no value of one.
        ("postgresql://me@127.0.0.1:1/db?connect_timeout=topsecret", UsageError),
        ("postgresql://me@127.0.0.1:1/db?sslmode=topsecret", UsageError),
        ("postgresql://me@127.0.0.1:1/db?topsecret=1", UsageError),
        ("postgresql://me@127.0.0.1:1/db?autocommit=topsecret", UsageError),
        ("postgresql://me@127.0.0.1:1/db?sslrootcert=/topsecret&sslmode=verify-full", RemoteError),
        ("sqlite:///x.db?key=topsecret", UsageError),
        ("sqlite://me:topsecret@host/x.db", UsageError),
        ("sqlite:/me:topsecret@host/x.db", UsageError),
    ],
)
def test_a_password_is_never_said(
    url: str, family: type[LoregError], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor with ``--debug``, which shows the causes; and a URL that is none makes no file."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(family) as raised:
        Database.open(url)
    assert "ecret" not in f"{raised.value!r} {raised.value}"
    assert "ecret" not in "".join(traceback.format_exception(raised.value))
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def guarded(server: Server) -> Iterator[str]:
    """The URL of a role that needs a password, ``right``."""
    rules = server.directory / "data" / "pg_hba.conf"
    before = rules.read_text()
    with server.connect() as connection:
        connection.execute("CREATE ROLE guarded LOGIN PASSWORD 'right'")
        rules.write_text(f"local all guarded scram-sha-256\n{before}")
        connection.execute("SELECT pg_reload_conf()")
    yield server.url(server.fresh()[0]).replace("//loreg@", "//guarded:right@")
    rules.write_text(before)
    with server.connect() as connection:
        connection.execute("SELECT pg_reload_conf()")
        connection.execute("DROP ROLE guarded")


def test_who_is_not_let_in(guarded: str, server: Server) -> None:
    """The server runs, and is not to blame; nor may anything have been written."""
    with pytest.raises(UsageError, match="none of the schemas"):  # the right one comes as far as the catalog
        Database.open(guarded)
    refused = {
        guarded.replace(":right@", ":wrong@"): "authentication failed",
        guarded.replace(":right@", "@"): "no password",
        server.url().replace("//loreg@", "//nobody@"): 'role "nobody" does not exist',
        server.url().replace("/postgres?", "/nowhere?"): 'database "nowhere" does not exist',
    }
    for url, said in refused.items():
        with pytest.raises(UsageError, match=f"{said}.*check the user, the password and the database") as raised:
            Database.open(url)
        assert "wrong" not in str(raised.value) and "may be there" not in str(raised.value)


def test_too_many_connections(server: Server) -> None:
    with server.connect() as connection:
        connection.execute("CREATE ROLE one LOGIN CONNECTION LIMIT 0")
        try:
            with pytest.raises(RemoteError, match="too many are connected: try again later"):
                Database.open(server.url().replace("//loreg@", "//one@"))
        finally:
            connection.execute("DROP ROLE one")


def test_a_server_that_comes_up_meanwhile_refuses_nobody(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    _, url = server.made()
    connect, failed = psycopg.Connection.connect, []

    def late(*given: object, **settings: object) -> psycopg.Connection[object]:
        if not failed:
            failed.append(True)
            return connect("host=/nowhere")
        return connect(*given, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr(psycopg, "connect", late)
    with Database.open(url):
        assert failed


def test_a_schema_that_is_not_there(server: Server) -> None:
    with pytest.raises(UsageError, match="CREATE SCHEMA"):
        Database.open(server.url("nowhere"))


def test_a_role_that_may_not(server: Server) -> None:
    schema, url = server.made()
    with server.connect() as connection:
        connection.execute(f"CREATE ROLE reader LOGIN; GRANT USAGE ON SCHEMA {schema} TO reader")
        connection.execute(f"GRANT SELECT ON ALL TABLES IN SCHEMA {schema} TO reader")
    theirs = url.replace("//loreg@", "//reader@")
    with Database.open(theirs) as db:
        with db.read() as s:
            assert queries.list_versions(s) == []
        with pytest.raises(UsageError, match="permission denied"), db.write() as s:
            s.connection().exec_driver_sql("INSERT INTO adapters VALUES (1, 'sql', 1, 0)")
    empty, url = server.fresh()
    with server.connect() as connection:
        connection.execute(f"GRANT USAGE ON SCHEMA {empty} TO reader")
    with pytest.raises(UsageError, match="permission denied"):
        Database.open(url.replace("//loreg@", "//reader@"))


def test_an_encoding_that_holds_less(server: Server) -> None:
    with server.connect() as connection:
        connection.execute("CREATE DATABASE narrow ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0")
    with pytest.raises(Unsupported, match="LATIN1"):
        Database.open(server.url().replace("/postgres?", "/narrow?"))


def test_without_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "psycopg", None)
    with pytest.raises(NotFound, match=r"pip install 'loreg\[postgres\]'"):
        Database.open("postgresql://localhost/db")


def test_what_a_session_needs_is_set_whatever_the_server_has(server: Server) -> None:
    _, url = server.made()
    with psycopg.connect(server.url()) as plain:
        assert plain.execute("SHOW synchronous_commit").fetchone() == ("off",)
    names = ("synchronous_commit", "lock_timeout", "transaction_isolation", "transaction_read_only")
    with Database.open(url) as db:
        for context, expected in (
            (db.read, ["on", "30s", "repeatable read", "on"]),
            (db.write, ["on", "30s", "read committed", "off"]),
        ):
            with context() as s:
                assert [s.connection().exec_driver_sql(f"SHOW {name}").scalar() for name in names] == expected


def test_a_waiting_writer_sees_what_it_waited_for(server: Server) -> None:
    """With a snapshot from before the wait, the second would give the number again."""
    _, url = server.made()

    def count_up(_number: int) -> None:
        with Database.open(url) as db:
            for _ in range(25):
                with db.write() as s:
                    most = s.connection().exec_driver_sql("SELECT coalesce(max(id), 0) FROM adapters").scalar_one()
                    s.connection().exec_driver_sql(f"INSERT INTO adapters VALUES ({most + 1}, 'n{most + 1}', 1, 0)")

    assert in_children(4, count_up) == [0] * 4
    with Database.open(url) as db, db.read() as s:
        assert s.connection().exec_driver_sql("SELECT count(*), max(id) FROM adapters").one() == (100, 100)


def test_a_name_that_is_taken_and_a_server_that_ends_it(server: Server) -> None:
    _, url = server.made()
    with Database.open(url) as db:
        with pytest.raises(Conflict, match="contradicts"), db.write() as s:
            for number in (1, 2):
                s.connection().exec_driver_sql(f"INSERT INTO adapters VALUES ({number}, 'sql', 1, 0)")
        with pytest.raises(Conflict, match="took too long"), db.write() as s:
            s.connection().exec_driver_sql("SET LOCAL statement_timeout = 1")
            s.connection().exec_driver_sql("SELECT pg_sleep(5)")
        with pytest.raises(BadInput, match="restore a backup"), db.write() as s:
            s.connection().exec_driver_sql("SELECT * FROM no_such_table")
