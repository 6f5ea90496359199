"""``fsck`` finds every flipped bit: in every class of bytes of every kind of blob, in every column of the catalog,
and in the pages of its file."""

from __future__ import annotations

import itertools
import json
import random
import shutil
import sqlite3
import struct
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from compiled import one_compilation
from options import counts
from sqlalchemy import Text

import loreg
from loreg.catalog.models import Model
from loreg.checkpoint import FileStamp
from loreg.errors import LoregError
from loreg.format.manifest import AdapterManifest

__all__ = ["one_compilation"]

pytestmark = pytest.mark.usefixtures("one_compilation")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two bases, versions of every kind, tags that moved, and a version in the trash; closed."""
    folder = tmp_path_factory.mktemp("flips")
    base = tiny.write_model(folder / "base", tiny.model())
    rng = np.random.default_rng(3)
    full = {tiny.NORM: tiny.normal(rng, "BF16", 6)}
    tiny.write_adapter(folder / "sql", tiny.adapter(), metadata={"format": "pt", "by": "me"})
    tiny.write_adapter(folder / "humor", tiny.adapter(seed=2, rank=3), full=full)
    with loreg.open(folder / "home") as registry:
        registry.add_base(base, "base")
        registry.add_base(tiny.write_model(folder / "other", tiny.model(seed=5)), "other")
        registry.push(folder / "sql", base="base", name="sql", tags=["prod"], note="first")
        registry.push(folder / "humor", base="base", name="sql", tags=["prod"])
        for adapter in ("sql", "humor"):
            registry.push(folder / adapter, base="base", name="humor")
        registry.remove("humor:v1")
        registry.collect(grace=timedelta())  # a number that is free, so that another may become it
        registry.compose("0.5*sql:v1 + sql:v2", "both")  # its manifest holds a recipe
        registry.push(folder / "sql", base="other", name="sql")
        registry.remove("sql:v3")
        registry.bases.cache.put(FileStamp(1, 2, 3, 4, 5), "{}")
        assert registry.fsck().ok
    with closing(sqlite3.connect(folder / "home" / "catalog.db")) as raw:
        raw.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return folder / "home"


@pytest.fixture
def copied(home: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(home, tmp_path / "home"))


# --- blobs ----------------------------------------------------------------------------------------------


def _classes(role: str, data: bytes) -> Iterator[tuple[str, int]]:
    """Places in a blob, by what they are for: all of the short ones, some of the long ones."""
    if data[:1] == b"{":
        step = max(1, len(data) // 40)
        yield from ((f"{role}: JSON", place) for place in {*range(0, len(data), step), len(data) - 1})
        return
    (length,) = struct.unpack("<Q", data[:8])
    text = data[8 : 8 + length]
    used = len(text.rstrip(b" "))
    yield from ((f"{role}: length of the header", place) for place in range(8))
    yield from ((f"{role}: header", 8 + place) for place in {*range(0, used, 1 + used // 30), used - 1})
    yield from ((f"{role}: padding", 8 + place) for place in range(used, length))
    for name, entry in json.loads(text).items():
        if name != "__metadata__" and len(data) > 8 + length:
            begin, end = (8 + length + offset for offset in entry["data_offsets"])
            yield from ((f"{role}: tensor", place) for place in (begin, (begin + end) // 2, end - 1))


KINDS = {
    "adapter's manifest: JSON",
    "base's manifest: JSON",
    "source: JSON",
    *(f"factors: {what}" for what in ("length of the header", "header", "padding", "tensor")),
    *(f"full: {what}" for what in ("length of the header", "header", "padding", "tensor")),
    *(f"source: {what}" for what in ("length of the header", "header", "padding")),
}
"""A recipe is in the manifest of what was composed by it. An undo journal is no blob: it lies in the merged directory
and has digests of its own (tests/unit/test_undo_journal.py)."""


def _roles(registry: loreg.Registry) -> dict[str, str]:
    roles = {str(row.manifest): "base's manifest" for row in registry.list_bases()}
    for row in (*registry.list_versions(all_versions=True), *registry.trash()):
        manifest = AdapterManifest.parse(registry.storage.read(row.digest))
        roles[str(row.digest)] = "adapter's manifest"
        roles.update((str(blob.digest), blob.role) for blob in manifest.blobs)
    return roles


@pytest.mark.slow
def test_every_class_of_bytes_of_every_kind_of_blob(copied: Path) -> None:
    """One bit in each blob at a time: every check has to name them all, and nothing else."""
    chance, seen = random.Random(1), Counter[str]()
    with loreg.open(copied) as registry:
        roles = _roles(registry)
        paths = {str(key.digest): copied / key.location for key in registry.storage.store.keys()}  # noqa: SIM118
        assert set(roles) == set(paths)
        whole = {digest: path.read_bytes() for digest, path in paths.items()}
        places = {digest: list(_classes(roles[digest], data)) for digest, data in whole.items()}
        for path in paths.values():
            path.chmod(0o644)
        for number in range(max(map(len, places.values()))):
            for digest, path in paths.items():
                kind, place = places[digest][number % len(places[digest])]
                seen[kind] += 1
                flipped = bytearray(whole[digest])
                flipped[place] ^= 1 << chance.randrange(8)
                path.write_bytes(flipped)
            found = registry.fsck()
            assert {(problem.kind, problem.what) for problem in found.problems} == {("corrupt", d) for d in paths}
        for digest, path in paths.items():
            path.write_bytes(whole[digest])
        assert registry.fsck().ok
    assert set(seen) == KINDS, seen


# --- columns --------------------------------------------------------------------------------------------

UNCOVERED = {
    "bases.id": "nothing refers to it",
    "blobs.created_at": "nothing reads it",
    "file_hashes.device": "a cache",
    "file_hashes.inode": "a cache",
    "file_hashes.size": "a cache",
    "file_hashes.mtime_ns": "a cache",
    "file_hashes.ctime_ns": "a cache",
    "file_hashes.leaves": "a cache; a merge into a base whose digests are others is refused",
    "file_hashes.seen_at": "a cache",
}
"""What is not found, or not always. All else is, in every row."""
UNCOVERED_ROWS = {
    "file_hashes": "a cache",
    "ledger": "what is in the store already, but for the last one",
}
PAGE_FLIPS = 200
EMPTY = {"leases", "intents"}
"""No push is under way."""


def _other(column: Any, value: Any, others: list[Any]) -> Iterator[Any]:
    """Values that look as good: another row's, and one with its last digit or letter changed."""
    yield from [other for other in others if other != value][:1]
    if value is None:
        yield "x" if isinstance(column.type, Text) else 1_700_000_000_000_000
    elif isinstance(value, int):
        yield from (value + 1, value - 1)
    elif value:
        yield value[:-1] + ("0" if value[-1] != "0" else "1")


def _tables() -> list[Any]:
    return [table for table in Model.metadata.sorted_tables if table.name not in EMPTY]


def _rows(path: Path) -> dict[str, list[Any]]:
    """All that any query can see."""
    with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as raw:
        return {
            table.name: sorted(raw.execute(f"SELECT rowid, * FROM {table.name}").fetchall(), key=repr)
            for table in Model.metadata.sorted_tables
        } | {"alembic_version": raw.execute("SELECT * FROM alembic_version").fetchall()}


def _says(registry: loreg.Registry) -> bool:
    """Whether fsck says that something is wrong: as a problem, or as an error of loreg."""
    try:
        return not registry.fsck().ok
    except LoregError:
        return True


def _found(home: Path) -> bool:
    """The same, where opening it may say so already."""
    try:
        with loreg.open(home) as registry:
            return _says(registry)
    except LoregError:
        return True


def _changed(raw: sqlite3.Connection, table: str, column: str, row: int, value: Any) -> bool:
    """Whether the database took it, and has one row so changed."""
    try:
        return raw.execute(f"UPDATE {table} SET {column} = ? WHERE rowid = ?", (value, row)).rowcount == 1
    except sqlite3.IntegrityError:
        return False


@pytest.mark.slow
@pytest.mark.parametrize("table", _tables(), ids=lambda table: table.name)
def test_every_column_of_the_catalog(copied: Path, table: Any) -> None:
    missed, tried = set(), 0
    with (
        loreg.open(copied) as registry,
        closing(sqlite3.connect(copied / "catalog.db", isolation_level=None)) as raw,
    ):
        raw.execute("PRAGMA ignore_check_constraints = ON")  # a flip asks nobody
        names = [column.name for column in table.columns]
        rows = raw.execute(f"SELECT rowid, {', '.join(names)} FROM {table.name} ORDER BY rowid").fetchall()
        for (place, name), row in itertools.product(enumerate(names, 1), {rows[0], rows[len(rows) // 2], rows[-1]}):
            for value in _other(table.columns[name], row[place], [other[place] for other in rows]):
                if _changed(raw, table.name, name, row[0], value):
                    tried += 1
                    if not _says(registry):
                        missed.add(f"{table.name}.{name}")
                    there = value if [name] == table.primary_key.columns.keys() and row[place] == row[0] else row[0]
                    assert _changed(raw, table.name, name, there, row[place])
        assert registry.fsck().ok
    assert tried > len(names)
    assert missed == {column for column in UNCOVERED if column.startswith(f"{table.name}.")}


@pytest.mark.slow
@pytest.mark.parametrize("table", _tables(), ids=lambda table: table.name)
def test_every_row_of_the_catalog(copied: Path, table: Any) -> None:
    """That is gone, and with it nothing else."""
    missed = set()
    with (
        loreg.open(copied) as registry,
        closing(sqlite3.connect(copied / "catalog.db", isolation_level=None)) as raw,
    ):
        for (row,) in raw.execute(f"SELECT rowid FROM {table.name}").fetchall():
            (kept,) = raw.execute(f"SELECT * FROM {table.name} WHERE rowid = ?", (row,)).fetchall()
            raw.execute(f"DELETE FROM {table.name} WHERE rowid = ?", (row,))
            if not _says(registry):
                missed.add(table.name)
            raw.execute(f"INSERT INTO {table.name} VALUES ({', '.join('?' * len(kept))})", kept)
        assert registry.fsck().ok
    assert missed == UNCOVERED_ROWS.keys() & {table.name}


# --- pages ----------------------------------------------------------------------------------------------


def _differing(before: dict[str, list[Any]], after: dict[str, list[Any]]) -> set[str]:
    """Columns in which rows differ, and tables in which there are others."""
    found = set()
    for name, rows in before.items():
        mine, theirs = {row[0]: row for row in rows}, {row[0]: row for row in after[name]}
        if name == "alembic_version":
            found |= {name} if mine != theirs else set()
            continue
        if mine.keys() != theirs.keys() or len(rows) != len(after[name]):
            found.add(name)
        columns = ["rowid", *Model.metadata.tables[name].columns.keys()]
        for key in mine.keys() & theirs.keys():
            pairs = itertools.zip_longest(columns, mine[key], theirs[key], fillvalue="gone")
            found |= {f"{name}.{column}" for column, old, new in pairs if (old, type(old)) != (new, type(new))}
    return found


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_pages_of_the_catalog(copied: Path, part: int) -> None:
    """A flip may hit nothing that is read: free space of a page, a free page, a counter, the text of a constraint.

    The oracle is what a query sees, by SQL alone: if all rows are as before, nothing is lost; if not, or if it cannot
    be read, it is found. Three of four flips are where there is something, and not in the zeros of free space."""
    catalog, chance, outcomes = copied / "catalog.db", random.Random(part), Counter[str]()
    whole, before = catalog.read_bytes(), _rows(catalog)
    used = [place for place, byte in enumerate(whole) if byte]
    for _ in range(counts(PAGE_FLIPS) // 4):
        place, bit = chance.choice([chance.randrange(len(whole)), *chance.choices(used, k=3)]), chance.randrange(8)
        flipped = bytearray(whole)
        flipped[place] ^= 1 << bit
        catalog.write_bytes(flipped)
        try:
            changed = _differing(before, _rows(catalog))
        except (sqlite3.Error, UnicodeDecodeError, OverflowError):
            changed = {"unreadable"}
        found = _found(copied)
        assert found or changed <= UNCOVERED.keys() | UNCOVERED_ROWS.keys(), (place, bit, changed)
        outcomes["found" if found else "only the catalog knows it" if changed else "nothing is read there"] += 1
        for suffix in ("-wal", "-shm"):
            Path(f"{catalog}{suffix}").unlink(missing_ok=True)
    print(dict(outcomes))
    assert outcomes["found"] > sum(outcomes.values()) // 10


LOG_FLIPS = 60
OLDER_IS_FOUND = True
"""Whether an older state of the catalog, with nothing wrong in it, is known to be older."""


@pytest.mark.slow
def test_the_log_of_the_catalog(copied: Path, tmp_path: Path) -> None:
    """SQLite takes what is behind a damaged record of its log for never written: the catalog is then an older one."""
    states, chance, outcomes = [], random.Random(7), Counter[str]()

    def seen(path: Path) -> dict[str, list[Any]]:
        return {name: rows for name, rows in _rows(path).items() if name not in EMPTY}

    with loreg.open(copied) as registry:
        states.append(seen(copied / "catalog.db"))
        for tag in "abcdef":
            registry.tag("sql:v2", tag)
            states.append(seen(copied / "catalog.db"))
        registry.remove("both:v1")
        states.append(seen(copied / "catalog.db"))
        shutil.copytree(copied, tmp_path / "cut")  # as after a crash, with the log not yet in the database
    log = tmp_path / "cut" / "catalog.db-wal"
    whole, database = log.read_bytes(), (tmp_path / "cut" / "catalog.db").read_bytes()
    assert len(whole) > 32 and seen(tmp_path / "cut" / "catalog.db") == states[-1]
    used = [place for place, byte in enumerate(whole) if byte]
    for place in chance.choices(used, k=counts(LOG_FLIPS)):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << chance.randrange(8)
        (tmp_path / "cut" / "catalog.db-shm").unlink(missing_ok=True)
        (tmp_path / "cut" / "catalog.db").write_bytes(database)
        log.write_bytes(flipped)
        after = seen(tmp_path / "cut" / "catalog.db")
        found = _found(tmp_path / "cut")
        assert after in states, "a part of a transaction"
        assert found or after == states[-1] or not OLDER_IS_FOUND, place
        outcomes["found" if found else "as it was" if after == states[-1] else "an older state"] += 1
    print(dict(outcomes))
    assert outcomes["found"] + outcomes["an older state"] > counts(LOG_FLIPS) // 2
