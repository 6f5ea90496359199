"""The queries of the catalog, what the database itself refuses, and its transactions."""

from __future__ import annotations

import re
import shutil
import sqlite3
import string
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import postgres_server
import psycopg
import pytest
from backends import ON_FILES, PLACES
from hypothesis import example, given
from hypothesis import strategies as st
from sqlalchemy import text
from sqlalchemy.orm import Session

from loreg.catalog import Database, kinds, models, queries
from loreg.catalog.queries import VersionRow
from loreg.digest import Digest, fingerprint
from loreg.errors import BadInput, CheckFailed, Conflict, NotFound, Unsupported, UsageError

NOW = datetime(2025, 3, 1, 12, 30, 15, 123456, tzinfo=UTC)
LATER = NOW + timedelta(hours=1)
HOUR = timedelta(hours=1)
ROOT = Digest.of(b"base")


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("empty") / "catalog.db"
    Database.open(path).close()
    return path


@pytest.fixture
def sqlite_db(tmp_path: Path, empty: Path) -> Iterator[Database]:
    shutil.copy(empty, tmp_path)
    with Database.open(tmp_path / "catalog.db") as opened:
        yield opened


@pytest.fixture(params=ON_FILES)
def db(tmp_path: Path, empty: Path, request: pytest.FixtureRequest) -> Iterator[Database]:
    if request.param == "sqlite-files":
        (tmp_path / "home").mkdir()
        shutil.copy(empty, tmp_path / "home")
    with PLACES[request.param](tmp_path).database() as opened:
        yield opened


@pytest.fixture
def s(db: Database) -> Iterator[Session]:
    with db.write() as session:
        yield session


def blob(s: Session, data: bytes) -> Digest:
    """A recorded blob: its digest."""
    found = fingerprint([data])
    queries.record_blobs(s, [(found, "0" * 16)], NOW)
    return found.digest


def push(s: Session, name: str, data: bytes, **fields) -> tuple[VersionRow, bool]:
    values = {
        "base_root": ROOT,
        "base_name": "gpt2",
        "rank": 8,
        "modules": 12,
        "bytes": 1000,
        "targets": ["c_attn", "c_proj"],
        "note": None,
        "now": NOW,
    }
    return queries.add_version(s, name, blob(s, data), **values | fields)


def add_base(s: Session, name: str, root: Digest = ROOT, **fields) -> queries.BaseRow:
    values = {
        "manifest": blob(s, b"manifest of " + name.encode()),
        "weights_root": root,
        "structure_root": Digest.of(b"structure"),
        "content_set": Digest.of(b"content"),
        "tensors": 148,
        "bytes": 500_000_000,
        "now": NOW,
    }
    return queries.add_base(s, name, **values | fields)


# --- versions ---------------------------------------------------------------------------------------


def test_versions_are_numbered_and_the_same_content_is_the_same_version(s: Session) -> None:
    first, created = push(s, "sql", b"one", note="hello", targets=["q", "k", "q"])
    assert created
    assert first == VersionRow(
        id=first.id,
        name="sql",
        number=1,
        digest=Digest.of(b"one"),
        base_root=ROOT,
        base_name="gpt2",
        rank=8,
        modules=12,
        bytes=1000,
        note="hello",
        created_at=NOW,
        removed_at=None,
        targets=("k", "q"),
    )
    second, _ = push(s, "sql", b"two")
    assert second.number == 2
    assert push(s, "sql", b"one", note="another note", now=LATER) == (first, False)
    assert queries.versions_of(s, "sql") == [first, second]
    other, created = push(s, "owner/sql", b"one")
    assert (other.number, created) == (1, True)
    assert queries.versions_by_digest(s, Digest.of(b"one")) == [other, first]
    assert queries.versions_by_digest(s, Digest.of(b"nothing")) == []


def test_a_number_is_never_given_twice(s: Session) -> None:
    push(s, "sql", b"one")
    removed, _ = push(s, "sql", b"two")
    s.execute(text("DELETE FROM versions WHERE id = :id"), {"id": removed.id})
    assert push(s, "sql", b"three")[0].number == 3
    assert push(s, "sql", b"two")[0].number == 4


def test_rows_outlive_their_transaction(db: Database) -> None:
    with db.write() as s:
        version, _ = push(s, "sql", b"one")
        base = add_base(s, "gpt2")
    with db.read() as s:
        found = queries.find_blob(s, version.digest)
        read = queries.find_base(s, name="gpt2")
    assert (version.number, base.name, found.generation, read.created_at) == (1, "gpt2", "0" * 16, NOW)


def test_find_version(s: Session) -> None:
    one, two = push(s, "sql", b"one")[0], push(s, "sql", b"two")[0]
    queries.move_tag(s, "sql", "prod", one, None, NOW)
    assert queries.find_version(s, "sql") == two
    assert queries.find_version(s, "sql", number=1) == one
    assert queries.find_version(s, "sql", tag="prod") == one
    assert queries.find_version(s, "sql", digest_prefix=two.digest.hex[:8]) == two
    assert queries.find_version(s, "sql", digest_prefix=str(two.digest)) == two
    with pytest.raises(NotFound, match=r"number 3.*2 versions, v1 to v2.*prod"):
        queries.find_version(s, "sql", number=3)
    with pytest.raises(NotFound, match="'main'"):
        queries.find_version(s, "sql", tag="main")
    with pytest.raises(NotFound, match="number 2 and tag 'prod'"):
        queries.find_version(s, "sql", number=2, tag="prod")


def test_another_adapters_tag_of_that_name_is_not_followed(s: Session) -> None:
    one, other = push(s, "sql", b"one")[0], push(s, "humor", b"one")[0]
    queries.move_tag(s, "humor", "prod", other, None, NOW)
    assert queries.find_version(s, "humor", tag="prod") == other
    with pytest.raises(NotFound):
        queries.find_version(s, "sql", tag="prod")
    assert queries.tags_of(s, one.name) == []


def test_a_name_that_is_not_there_suggests_near_names(s: Session) -> None:
    push(s, "humor", b"one")
    for look in (queries.find_version, queries.versions_of, queries.tags_of, queries.tag_history):
        with pytest.raises(NotFound, match="did you mean 'humor'"):
            look(s, "humour")
    with pytest.raises(NotFound, match="loreg ls"):
        queries.find_version(s, "zzz")


def test_prefixes(s: Session) -> None:
    by_digit: dict[str, list[VersionRow]] = {}
    for i in range(17):
        version, _ = push(s, "sql", f"{i}".encode())
        by_digit.setdefault(version.digest.hex[0], []).append(version)
    for digit in string.hexdigits[:16]:
        found = by_digit.get(digit, [])
        if len(found) == 1:
            assert queries.find_version(s, "sql", digest_prefix=digit) == found[0]
            assert queries.blob_matching_prefix(s, digit).digest == found[0].digest
        else:
            error = UsageError if found else NotFound
            with pytest.raises(error, match=str(found[-1].digest) if found else digit):
                queries.find_version(s, "sql", digest_prefix=digit)
            with pytest.raises(error):
                queries.blob_matching_prefix(s, digit)
    assert any(len(found) > 1 for found in by_digit.values())
    for hostile in ("", "g", "%", "A", "blake3:", "' OR 1=1 --"):
        with pytest.raises(UsageError, match="hex digits"):
            queries.blob_matching_prefix(s, hostile)
        with pytest.raises(UsageError, match="hex digits"):
            queries.find_version(s, "sql", digest_prefix=hostile)


def listed(s: Session, **conditions) -> list[tuple[str, int]]:
    conditions.setdefault("all_versions", False)
    return [(v.name, v.number) for v in queries.list_versions(s, **conditions)]


def test_list_versions(s: Session) -> None:
    llama = Digest.of(b"llama")
    push(s, "sql", b"1", rank=8)
    push(s, "sql", b"2", rank=16, note="100% Better_")
    push(s, "humor", b"3", targets=["Q_Proj"], base_root=llama, base_name="llama-as-pushed")
    add_base(s, "llama", llama)
    assert listed(s) == [("humor", 1), ("sql", 2)]
    assert listed(s, all_versions=True) == [("humor", 1), ("sql", 1), ("sql", 2)]
    assert listed(s, all_versions=True, limit=2) == [("humor", 1), ("sql", 1)]
    assert listed(s, rank=8) == [("humor", 1)]  # of the newest versions, not the newest with that rank
    assert listed(s, rank=8, all_versions=True) == [("humor", 1), ("sql", 1)]
    assert listed(s, target="c_attn") == [("sql", 2)]
    assert listed(s, target="c_att") == []
    for base in ("llama", "llama-as-pushed", str(llama)):
        assert listed(s, base=base) == [("humor", 1)]
    assert listed(s, base="gpt2") == [("sql", 2)]
    for query in ("SQL", "100%", "better_", "C_ATTN"):
        assert listed(s, query=query) == [("sql", 2)], query
    assert listed(s, query="q_proj") == [("humor", 1)]
    assert listed(s, query="r%B") == []
    assert listed(s, query="zzz") == []
    rows = queries.list_versions(s, all_versions=True, limit=1)
    assert rows[0].targets == ("Q_Proj",)


# --- tags -------------------------------------------------------------------------------------------


def test_a_tag_moves_and_keeps_its_history(s: Session) -> None:
    one, two = push(s, "sql", b"one")[0], push(s, "sql", b"two")[0]
    assert queries.tag_seq(s, "sql", "prod") is None
    assert queries.move_tag(s, "sql", "prod", one, None, NOW) == 1
    assert queries.move_tag(s, "sql", "prod", two, 1, LATER) == 2
    assert queries.tag_seq(s, "sql", "prod") == 2
    (tag,) = queries.tags_of(s, "sql")
    assert (tag.name, tag.seq, tag.number, tag.digest) == ("prod", 2, 2, two.digest)
    history = [(m.name, m.seq, m.number, m.moved_at) for m in queries.tag_history(s, "sql")]
    assert history == [("prod", 1, 1, NOW), ("prod", 2, 2, LATER)]


def test_of_two_moves_from_the_same_place_one_is_a_conflict(db: Database) -> None:
    with db.write() as s:
        one, two = push(s, "sql", b"one")[0], push(s, "sql", b"two")[0]
        queries.move_tag(s, "sql", "prod", one, None, NOW)
    with db.write() as s:
        queries.move_tag(s, "sql", "prod", two, 1, NOW)
    with pytest.raises(Conflict, match="move 1, found it at 2"), db.write() as s:
        queries.move_tag(s, "sql", "prod", one, 1, NOW)
    with pytest.raises(Conflict, match="move 0, found it at 2"), db.write() as s:
        queries.move_tag(s, "sql", "prod", one, None, NOW)
    with pytest.raises(Conflict, match="move 1, found it at 0"), db.write() as s:
        queries.move_tag(s, "sql", "new", one, 1, NOW)
    with db.read() as s:
        assert [(t.name, t.seq, t.number) for t in queries.tags_of(s, "sql")] == [("prod", 2, 2)]
        assert len(queries.tag_history(s, "sql")) == 2


def test_threads_that_race_for_a_tag_move_it_one_after_the_other(db: Database) -> None:
    with db.write() as s:
        version, _ = push(s, "sql", b"one")
    seen: list[int | str] = []

    def move() -> None:
        for _ in range(5):
            with db.read() as s:
                expected = queries.tag_seq(s, "sql", "prod")
            try:
                with db.write() as s:
                    seen.append(queries.move_tag(s, "sql", "prod", version, expected, NOW))
            except Conflict:
                seen.append("conflict")

    threads = [threading.Thread(target=move) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    moved = [item for item in seen if item != "conflict"]
    assert len(seen) == 20
    assert sorted(moved) == list(range(1, len(moved) + 1))
    with db.read() as s:
        assert len(queries.tag_history(s, "sql")) == len(moved)


def test_a_tag_that_was_removed_goes_on_counting(s: Session) -> None:
    one, two = push(s, "sql", b"one")[0], push(s, "sql", b"two")[0]
    queries.move_tag(s, "sql", "prod", one, None, NOW)
    s.execute(text("DELETE FROM tags"))
    s.execute(text("DELETE FROM versions WHERE number = 1"))
    s.expire_all()
    assert queries.move_tag(s, "sql", "prod", two, None, LATER) == 2
    assert [(m.seq, m.number) for m in queries.tag_history(s, "sql")] == [(1, None), (2, 2)]


def test_tags_that_make_no_sense(s: Session) -> None:
    version, _ = push(s, "sql", b"one")
    push(s, "humor", b"two")
    for tag in ("", "A", "a/b", "v2", "-", "x" * 129):
        with pytest.raises(UsageError):
            queries.move_tag(s, "sql", tag, version, None, NOW)
    with pytest.raises(UsageError, match="humor"):
        queries.move_tag(s, "humor", "prod", version, None, NOW)


# --- blobs and leases -------------------------------------------------------------------------------


def test_blobs_are_recorded_live_with_their_newest_generation(s: Session) -> None:
    found = fingerprint([b"one"])
    assert queries.find_blob(s, found.digest) is None
    queries.record_blobs(s, [(found, "1" * 16)], NOW)
    s.execute(text("UPDATE blobs SET state = 'deleting'"))
    s.expire_all()
    assert queries.find_blob(s, found.digest).state == "deleting"
    queries.record_blobs(s, [(found, "2" * 16)])
    row = queries.find_blob(s, found.digest)
    assert (row.generation, row.state, row.size, row.sha256) == ("2" * 16, "live", 3, found.sha256)
    assert abs(datetime.now(UTC) - row.created_at) < timedelta(minutes=5)


def test_edges_may_be_repeated_and_need_their_blobs(db: Database) -> None:
    source = Digest.of(b"manifest")
    with db.write() as s:
        digests = [blob(s, b"one"), blob(s, b"two")]
        queries.record_edges(s, source, digests[:1])
        queries.record_edges(s, source, [*digests, *digests])
    with db.read() as s:
        assert len(s.execute(text("SELECT * FROM edges")).all()) == 2
    with pytest.raises(Conflict), db.write() as s:
        queries.record_edges(s, source, [Digest.of(b"not recorded")])


def test_the_lease_is_a_fence(s: Session) -> None:
    digests = [Digest.of(b"one"), Digest.of(b"two"), Digest.of(b"one")]
    lease = queries.begin_lease(s, "host:1", digests, NOW, HOUR)
    assert len(s.execute(text("SELECT * FROM intents")).all()) == 2
    queries.require_lease(s, lease, NOW)
    queries.require_lease(s, lease, NOW + HOUR - timedelta(microseconds=1))
    with pytest.raises(Conflict, match="expired"):
        queries.require_lease(s, lease, NOW + HOUR)
    other = queries.begin_lease(s, "host:2", digests, NOW, HOUR)
    queries.release_lease(s, lease)
    queries.release_lease(s, lease)
    with pytest.raises(Conflict, match="taken away"):
        queries.require_lease(s, lease, NOW)
    queries.require_lease(s, other, NOW)
    assert len(s.execute(text("SELECT * FROM intents")).all()) == 2  # those of the other, which still pin
    queries.release_lease(s, other)
    assert s.execute(text("SELECT * FROM intents")).all() == []


# --- bases and the cache ----------------------------------------------------------------------------


def test_bases(s: Session) -> None:
    base = add_base(s, "gpt2", path="/models/gpt2")
    again = add_base(s, "gpt2", hub_repo="openai-community/gpt2", hub_commit="0" * 40, now=LATER)
    assert again.id == base.id
    assert (again.path, again.hub_repo, again.created_at) == ("/models/gpt2", "openai-community/gpt2", NOW)
    assert add_base(s, "gpt2", path="/elsewhere").hub_commit == "0" * 40
    other = Digest.of(b"other weights")
    with pytest.raises(Conflict, match=f"{ROOT}.*{other}"):
        add_base(s, "gpt2", other)
    add_base(s, "also-gpt2")
    add_base(s, "other", other)
    assert [row.name for row in queries.list_bases(s)] == ["also-gpt2", "gpt2", "other"]
    assert queries.find_base(s, weights_root=ROOT).name == "gpt2"
    assert queries.find_base(s, name="also-gpt2").weights_root == ROOT
    assert queries.find_base(s, name="gpt2", weights_root=other) is None
    assert queries.find_base(s, name="nothing") is None
    with pytest.raises(UsageError):
        add_base(s, "GPT2")


@pytest.mark.parametrize("inode", [0, 1, 2**63 - 1, 2**63, 2**64 - 1])
def test_leaves_are_remembered_by_the_whole_key(s: Session, inode: int) -> None:
    key = (2**64 - 1, inode, 3, 4, 5)
    assert queries.cached_leaves(s, key) is None
    queries.remember_leaves(s, key, "[]", NOW)
    queries.remember_leaves(s, key, '["x"]', LATER)
    s.expire_all()
    assert queries.cached_leaves(s, key) == '["x"]'
    for field in range(5):
        assert queries.cached_leaves(s, (*key[:field], 77, *key[field + 1 :])) is None


# --- what the database itself refuses ---------------------------------------------------------------

WORD = r"[a-z0-9][a-z0-9._-]{0,127}"
ANY_TEXT = st.text(st.sampled_from("ab0./_-A \0é\n"), max_size=12)
LENGTH = st.integers(0, 130)
LONG = st.builds(lambda a, slash, b: "a" * a + slash + "b" * b, LENGTH, st.sampled_from(["", "/", "//"]), LENGTH)


def holds(check: str, value: str) -> bool:
    connection = sqlite3.connect(":memory:")
    try:
        return connection.execute(f"SELECT {check} FROM (SELECT ? AS x)", (value,)).fetchone() == (1,)
    finally:
        connection.close()


@given(ANY_TEXT | LONG)
@example("a" * 128 + "/" + "b" * 128)
@example("a" * 129)
@example("a\0")
@example("a/b\0c")
@example("")
def test_the_check_of_a_name_is_the_syntax_of_names(value: str) -> None:
    assert holds(models.name_check("x"), value) == bool(re.fullmatch(f"(?:{WORD}/)?{WORD}", value))
    assert holds(models.word_check("x"), value) == bool(re.fullmatch(WORD, value))


VALID = "blake3:" + "0123456789abcdef" * 4


ALMOST = st.builds(
    lambda i, c, tail: VALID[:i] + c + VALID[i + len(c) :] + tail,
    st.integers(0, 71),
    st.sampled_from(["", "a", "A", "g", "\0", "é", "\n"]),
    st.sampled_from(["", "", "0", "\0", "\0junk", "\n"]),
)


@given(ALMOST)
@example(VALID)
@example("")
def test_the_check_of_a_digest_is_the_syntax_of_digests(value: str) -> None:
    assert holds(models.digest_check("x"), value) == bool(re.fullmatch("blake3:[0-9a-f]{64}", value))


def test_the_checks_hold_on_postgresql_as_well() -> None:
    """Of texts without NUL, which it cannot hold."""
    checks = ", ".join((models.name_check("x"), models.word_check("x"), models.digest_check("x")))
    syntax = (f"(?:{WORD}/)?{WORD}", WORD, "blake3:[0-9a-f]{64}")
    with postgres_server.shared().connect() as connection:

        @given(ANY_TEXT | LONG | ALMOST)
        @example("a" * 128 + "/" + "b" * 128)
        @example(VALID)
        def same(value: str) -> None:
            value = value.replace("\0", "?")
            found = connection.execute(f"SELECT {checks} FROM (SELECT %s::text AS x) AS one", (value,))  # type: ignore[arg-type]
            assert found.fetchone() == tuple(bool(re.fullmatch(each, value)) for each in syntax)

        same()
        with pytest.raises(psycopg.DataError):
            connection.execute("SELECT %s::text", ("a\0",))


BLOB = f"INSERT INTO blobs VALUES ('{VALID}', '{'0' * 16}', '{'0' * 64}', 1, 'live', 0)"
ADAPTER = "INSERT INTO adapters VALUES (1, 'sql', 1, 0)"


@pytest.mark.parametrize(
    "statement",
    [
        "INSERT INTO adapters VALUES (1, 'Upper', 0, 0)",
        "INSERT INTO adapters VALUES (1, 'a/b/c', 0, 0)",
        "INSERT INTO tags VALUES (1, 'a/b', 1, 1)",
        "INSERT INTO tags VALUES (1, 'a', 1, 0)",
        BLOB.replace("blake3", "sha256"),
        BLOB.replace("0123456789abcdef'", "0123456789ABCDEF'"),
        BLOB.replace("'live'", "'gone'"),
        BLOB.replace(", 1,", ", -1,"),
        BLOB.replace(f"'{'0' * 16}'", "'../../x'"),
        f"INSERT INTO intents VALUES ('{'0' * 32}', 'not a digest')",
        f"INSERT INTO edges VALUES ('x', '{VALID}')",
    ],
)
def test_the_database_refuses_a_malformed_row(db: Database, statement: str) -> None:
    with pytest.raises(UsageError, match=r"CHECK constraint failed|violates check constraint"), db.write() as s:
        if s.connection().dialect.name == "sqlite":
            s.connection().exec_driver_sql("PRAGMA defer_foreign_keys = ON")
        s.connection().exec_driver_sql(statement)


@pytest.mark.parametrize(
    ("statement", "says"),
    [
        (BLOB, "UNIQUE"),
        (ADAPTER, "UNIQUE"),
        (f"INSERT INTO edges VALUES ('{VALID}', '{VALID[:-1]}0')", "FOREIGN KEY"),
        ("INSERT INTO targets VALUES (77, 'q')", "FOREIGN KEY"),
        (f"DELETE FROM blobs WHERE digest = '{VALID}'", "FOREIGN KEY"),
    ],
)
def test_the_database_refuses_a_contradiction(db: Database, statement: str, says: str) -> None:
    with db.write() as s:
        for row in (
            BLOB,
            ADAPTER,
            f"INSERT INTO versions VALUES (1, 1, 1, '{VALID}', '{VALID}', 'gpt2', 8, 1, 1, NULL, 0, NULL)",
        ):
            s.connection().exec_driver_sql(row)
    with pytest.raises(Conflict, match=f"(?i){says}"), db.write() as s:
        s.connection().exec_driver_sql(statement)


def test_the_tables_are_strict(sqlite_db: Database) -> None:
    db = sqlite_db
    with db.read() as s:
        loose = s.execute(text("SELECT name FROM pragma_table_list WHERE NOT strict AND name NOT LIKE 's%'"))
        assert [name for (name,) in loose] == ["alembic_version"]
    with pytest.raises(UsageError, match="TEXT value in INTEGER column"), db.write() as s:
        s.connection().exec_driver_sql(BLOB.replace("'live', 0", "'live', 'yesterday'"))


@pytest.mark.parametrize("name", ["", "Sql", "a/b/c", "../x", "x" * 129, "sql\n", "sql:v1"])
def test_a_malformed_name_is_refused(s: Session, name: str) -> None:
    with pytest.raises(UsageError, match="is not a name"):
        push(s, name, b"one")


# --- transactions -----------------------------------------------------------------------------------


def test_an_exception_undoes_the_whole_write(db: Database) -> None:
    with pytest.raises(ZeroDivisionError), db.write() as s:
        push(s, "sql", b"one")
        1 / 0
    with db.read() as s:
        assert queries.list_versions(s, all_versions=True) == []


def test_a_read_is_one_snapshot(db: Database) -> None:
    with db.read() as reading:
        assert queries.list_versions(reading, all_versions=True) == []
        with db.write() as s:
            push(s, "sql", b"one")
        assert queries.list_versions(reading, all_versions=True) == []
    with db.read() as s:
        assert len(queries.list_versions(s, all_versions=True)) == 1


def test_a_write_in_a_read_fails(db: Database) -> None:
    with pytest.raises(UsageError), db.read() as s:
        push(s, "sql", b"one")
    with db.write() as s:
        push(s, "sql", b"one")


@pytest.mark.parametrize("name", ON_FILES)
def test_writers_wait_for_one_another_and_then_give_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    place = PLACES[name](tmp_path)
    monkeypatch.setattr(kinds, "BUSY_TIMEOUT_MS", 50)
    with place.database() as one, place.database() as two, one.write():
        with pytest.raises(Conflict, match="another process"), two.write():
            pass
        with two.read():
            pass


def test_a_full_disk_is_a_sentence_and_changes_nothing(sqlite_db: Database) -> None:
    db = sqlite_db
    with pytest.raises(CheckFailed, match="free some space"), db.write() as s:
        pages = s.execute(text("PRAGMA page_count")).scalar_one()
        s.execute(text(f"PRAGMA max_page_count = {pages}"))
        for i in range(1000):
            push(s, f"sql{i}", b"one")
    with db.read() as s:
        assert queries.list_versions(s, all_versions=True) == []


@pytest.mark.parametrize("note", ["\udcff", "x\ud800"])
def test_text_that_is_no_unicode_is_refused(db: Database, note: str) -> None:
    with pytest.raises(UsageError, match="Unicode"), db.write() as s:
        push(s, "sql", b"one", note=note)
    with pytest.raises(UsageError, match=r"64 bits|out of range"), db.write() as s:
        push(s, "sql", b"one", rank=2**70)


def test_a_damaged_page_is_bad_input(tmp_path: Path) -> None:
    path = tmp_path / "catalog.db"
    with Database.open(path) as db, db.write() as s:
        for i in range(300):
            push(s, f"sql{i}", b"%d" % i)
    data = bytearray(path.read_bytes())
    for page in range(4096 * 20, len(data), 4096):
        data[page : page + 100] = b"\xa5" * 100
    path.write_bytes(data)
    with pytest.raises(BadInput, match="malformed"), Database.open(path) as db, db.read() as s:
        queries.list_versions(s, all_versions=True)


@given(st.datetimes(datetime(1970, 1, 1), datetime(9999, 1, 1)), st.integers(-12, 12))
def test_instants_are_kept_to_the_microsecond(naive: datetime, hours: int) -> None:
    kind = models.UtcMicroseconds()
    instant = naive.replace(tzinfo=UTC)
    stored = kind.process_bind_param(instant.astimezone(timezone(timedelta(hours=hours))), None)
    back = kind.process_result_value(stored, None)
    assert back == instant
    assert back.tzinfo is UTC


# --- opening ----------------------------------------------------------------------------------------


def test_urls(tmp_path: Path) -> None:
    path = tmp_path / "a dir" / "cat?a%log#.db"
    with Database.open(path) as db, db.write() as s:
        push(s, "sql", b"one")
    (tmp_path / "plain").mkdir()
    with Database.open(f"sqlite:///{tmp_path}/plain/c.db") as db:
        assert db.kind.name == str(tmp_path / "plain/c.db")
    for bad in ("sqlite://", "sqlite:///:memory:", "sqlite:///x?mode=ro", "nonsense://", "://"):
        with pytest.raises((UsageError, Unsupported)):
            Database.open(bad)


def test_the_pragmas(sqlite_db: Database) -> None:
    for context in (sqlite_db.read, sqlite_db.write):
        with context() as s:
            names = ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
            assert [s.execute(text(f"PRAGMA {name}")).scalar() for name in names] == ["wal", 2, 1, 30_000]


def test_an_open_catalog_costs_neither_alembic_nor_tensors(tmp_path: Path) -> None:
    Database.open(tmp_path / "catalog.db").close()
    code = (
        "import sys; from pathlib import Path\n"
        "from loreg.catalog import Database, queries\n"
        "with Database.open(Path(sys.argv[1])) as db, db.read() as s: queries.list_versions(s, all_versions=False)\n"
        "print([m for m in ('alembic', 'torch', 'numpy') if m in sys.modules])"
    )
    found = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "catalog.db")],
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.strip() == "[]"
