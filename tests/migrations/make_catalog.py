"""Prints the catalog of a registry that was lived in, as ``catalog_*.sql`` are kept: every new revision adds its own.

    python tests/migrations/make_catalog.py > tests/migrations/catalog_0004.sql

With PYTHONPATH at an older checkout and its tests, what is written is that release's.
"""

from __future__ import annotations

import os
import sqlite3
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing
from datetime import timedelta
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

import tiny

import loreg


def live(root: Path) -> Path:
    """Bases, pushes, tags that move, a composition, a removal, a collection, and a push that was killed."""
    base = tiny.write_model(root / "base", tiny.model())

    def adapter(seed: int, rank: int = 2) -> Path:
        return tiny.write_adapter(root / f"adapter{seed}", tiny.adapter(seed=seed, rank=rank))

    with loreg.open(root / "home") as registry:
        registry.add_base(base, "base")
        registry.add_base(tiny.write_model(root / "other", tiny.model(seed=1)), "other")
        registry.push(adapter(1), base="base", name="sql", tags=["prod", "old"], note="first")
        registry.push(adapter(2), base="base", name="sql")
        registry.push(adapter(3, rank=3), base="base", name="team/humor", note="Größer, 100% – 'witty'\nand shorter")
        registry.compose("sql:v1 + 0.5 * team/humor", "both")
        registry.tag("sql:v2", "old")
        registry.push(adapter(4), base="other", name="gone")
        registry.remove("gone:v1")
        registry.collect(grace=timedelta())
        registry.push(adapter(5), base="base", name="sql", note="in the trash")
        registry.remove("sql:v3")
        if not os.fork():
            registry.storage.store.put = lambda *_: os._exit(0)  # type: ignore[method-assign]
            registry.push(adapter(6), base="base", name="never")
        os.wait()
    return root / "home" / "catalog.db"


def dump(path: Path) -> Iterator[str]:
    """Tables with their rows, then what is made from them."""
    with closing(sqlite3.connect(path)) as raw:
        found = "SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL AND type {} ORDER BY rowid"
        derived = raw.execute("SELECT sql FROM sqlite_master WHERE sql LIKE 'CREATE VIRTUAL%'").fetchall()
        yield "BEGIN TRANSACTION;"
        for name, sql in raw.execute(found.format("= 'table'")).fetchall():
            if name.partition("_")[0] == "search":  # the index, and what SQLite keeps of it
                continue
            yield f"{sql};"
            for row in raw.execute(f"SELECT * FROM {name}").fetchall():
                quoted = (raw.execute("SELECT quote(?)", (value,)).fetchone()[0] for value in row)
                yield f"INSERT INTO {name} VALUES ({', '.join(map(str, quoted))});"
        for (sql,) in derived:
            yield f"{sql};"
            yield "INSERT INTO search (search) VALUES ('rebuild');"
        for _, sql in raw.execute(found.format("<> 'table'")).fetchall():
            yield f"{sql};"
        yield "COMMIT;"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        for statement in dump(live(Path(folder))):
            print(statement.replace(folder, "/models"))
