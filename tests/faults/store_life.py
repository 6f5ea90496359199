"""What a registry lives through while the disk's calls are written down; after each step it says what it shows."""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from shim import Shim
from store_jobs import shown

import loreg

Say = Callable[[loreg.Registry], None]


def life(root: Path, place: Path, say: Say) -> None:
    """From nothing: pushes, tags, the trash, collections; with the catalog's log emptied in between, and not."""
    with loreg.open(place / "home") as registry:
        registry.push(root / "sql1", base=root / "base", name="sql", tags=["prod"])
        say(registry)
        registry.push(root / "humor", base="base", name="team/humor")
        say(registry)
    with loreg.open(place / "home") as registry:
        registry.push(root / "sql5", base="base", name="sql", note="more")
        say(registry)
        registry.tag("sql:v2", "prod")
        say(registry)
        registry.remove("sql:v1")
        say(registry)
        registry.restore("sql:v1")
        say(registry)
        registry.remove("sql:v1")
        say(registry)
        registry.collect(grace=timedelta())
        say(registry)
    with loreg.open(place / "home") as registry:
        registry.push(root / "sql1", base="base", name="sql", tags=["prod"])
        say(registry)
        registry.push(root / "new", base="base", name="new")
        say(registry)
        registry.fsck(repair=True)
        registry.collect()
        say(registry)


def upgrade(root: Path, place: Path, say: Say) -> None:
    """A registry of an old release, opened, and pushed to."""
    with loreg.open(place / "home") as registry:
        say(registry)
        registry.push(root / "new", base="base", name="sql", tags=["prod"])
        say(registry)


LIVES: dict[str, Callable[[Path, Path, Say], None]] = {"life": life, "upgrade": upgrade}


def recorded(job: dict[str, Any]) -> dict[str, Any]:
    """Lives it, with the record in a file. ``synchronous``: another one than the catalog asks for."""
    place, stand = Path(job["place"]), Shim()
    if "synchronous" in job:
        _weaken(job["synchronous"])
    stand.arm([str(place)], "none")
    descriptor = os.open(job["record"], os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    stand.record(descriptor)
    LIVES[job["life"]](Path(job["root"]), place, lambda registry: stand.mark(json.dumps(shown(registry))))
    stand.record(-1)
    os.close(descriptor)
    return {}


def _weaken(synchronous: str) -> None:
    connect = sqlite3.connect

    def weak(kind: Any) -> Any:
        class Weak(kind):
            def execute(self, statement: str, *given: Any) -> sqlite3.Cursor:
                return super().execute(
                    statement.replace("synchronous = FULL", f"synchronous = {synchronous}"), *given
                )

        return Weak

    def connected(*given: Any, factory: Any = sqlite3.Connection, **options: Any) -> sqlite3.Connection:
        return connect(*given, factory=weak(factory), **options)

    sqlite3.connect = connected  # type: ignore[assignment]
