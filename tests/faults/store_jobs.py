"""Commands on a registry, and what must hold of it whatever became of one of them.

``root`` holds what goes in (``base``, ``new``, ``spare``); ``place`` holds the registry in ``home``, and ``out``.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Any

import loreg
from loreg.digest import Digest
from loreg.errors import BadInput

Shown = dict[str, Any]


def push(root: Path, place: Path) -> None:
    with loreg.open(place / "home") as registry:
        registry.push(root / "new", base="base", name="sql", tags=["prod"])


def first(root: Path, place: Path) -> None:
    """Where there is nothing: the catalog, its directory and the base are made too."""
    with loreg.open(place / "home") as registry:
        registry.push(root / "new", base=root / "base", name="sql")


def pull(root: Path, place: Path) -> None:
    with loreg.open(place / "home") as registry:
        registry.sync_pull("hf://team/new", "theirs", ["prod"])


def export(root: Path, place: Path) -> None:
    # Written by a command before this one, which was killed before it could say so.
    if not os.path.exists(place / "out"):
        with loreg.open(place / "home") as registry:
            registry.export("sql:v1", place / "out")


def gc(root: Path, place: Path) -> None:
    with loreg.open(place / "home") as registry:
        registry.collect(grace=timedelta())


def fsck(root: Path, place: Path) -> None:
    with loreg.open(place / "home") as registry:
        registry.fsck(repair=True, sources=[root / "spare"])


def migrate(root: Path, place: Path) -> None:
    loreg.open(place / "home").close()


def send(root: Path, place: Path) -> None:
    """Puts on the Hub what ``pull`` brings."""
    with loreg.open(root / "spare") as registry:
        registry.sync_push("new", "hf://team/new")


COMMANDS: dict[str, Callable[[Path, Path], None]] = {
    command.__name__: command for command in (push, first, pull, export, gc, fsck, migrate, send)
}


def shown(registry: loreg.Registry) -> Shown:
    """All that a user sees of a registry."""
    rows = registry.list_versions(all_versions=True)
    return {
        "versions": sorted([row.name, row.number, str(row.digest), row.note] for row in rows),
        "trash": sorted([row.name, row.number, str(row.digest)] for row in registry.trash()),
        "tags": {name: registry.tags(name) for name in sorted({row.name for row in rows})},
    }


def problems(registry: loreg.Registry) -> list[list[str]]:
    return sorted([problem.kind, problem.what] for problem in registry.fsck().problems if not problem.repaired)


def damage(home: Path) -> Iterator[str]:
    """The blobs of every version that are not whole, by SQL and the disk alone."""
    needed = (
        "SELECT digest, digest FROM versions UNION SELECT source, blob FROM edges JOIN versions ON source = digest "
        "UNION SELECT manifest, manifest FROM bases"
    )
    with closing(sqlite3.connect(f"{(home / 'catalog.db').as_uri()}?mode=ro", uri=True)) as raw:
        assert raw.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        live = dict(raw.execute("SELECT digest, generation FROM blobs WHERE state = 'live'"))
        digests = {blob for _, blob in raw.execute(needed)}
    for text in sorted(digests):
        digest = Digest.parse(text)
        path = home / "blobs" / digest.hex[:2] / f"{digest.hex}.{live.get(text)}"
        if not path.is_file() or Digest.of(path.read_bytes()) != digest:
            yield text


def aside(home: Path) -> list[list[str]]:
    """Sound copies in quarantine, as problems: a repair puts aside what it cannot read, if only this once."""
    digests = [(Digest(path.name.partition(".")[0]), path) for path in (home / "quarantine").glob("*")]
    return [["missing", str(digest)] for digest, path in digests if Digest.of(path.read_bytes()) == digest]


def is_backup(path: Path) -> bool:
    """Whether it is the catalog as it was before an upgrade."""
    try:
        with closing(sqlite3.connect(path)) as raw:
            sound = raw.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            return sound and raw.execute("SELECT version_num FROM alembic_version").fetchall() == [("0001",)]
    except sqlite3.Error:
        return False


def whole(registry: loreg.Registry, allowed: list[list[str]]) -> None:
    """Every version that is shown, or can be taken back, is there; what is amiss is what was amiss before."""
    amiss = {what for _, what in allowed}
    assert set(damage(registry.home)) <= amiss
    for name, number, digest, _ in shown(registry)["versions"]:
        if digest not in amiss:
            assert str(registry.resolve(f"{name}:v{number}").digest) == digest
    assert all(is_backup(path) for path in registry.home.glob("*.bak"))


def tidied(registry: loreg.Registry, allowed: list[list[str]]) -> None:
    """Once the time of those that were killed is over, a collection leaves nothing that is not needed."""
    with registry.database.write() as session:
        session.connection().exec_driver_sql("DELETE FROM leases")
    try:
        registry.collect(grace=timedelta(days=36500))
    except BadInput:  # a manifest is missing: then nothing may be collected
        assert any(kind == "missing" for kind, _ in allowed)
        return
    found = registry.fsck()
    assert found.orphans == 0 and not list(registry.storage.store.unfinished())
    assert all([problem.kind, problem.what] in allowed for problem in found.problems), found.problems


def examine(command: str, root: Path, place: Path, before: Shown, after: Shown) -> str:
    """Raises AssertionError, or says whether what was there before is seen, or what the command makes of it."""
    with loreg.open(place / "home") as registry:
        seen = shown(registry)
        assert seen in (before["shown"], after["shown"]), seen
        allowed = before["problems"] + after["problems"] + aside(registry.home)
        whole(registry, allowed)
        found = problems(registry)
        assert all(problem in allowed for problem in found), found
    COMMANDS[command](root, place)
    with loreg.open(place / "home") as registry:
        assert shown(registry) == after["shown"], shown(registry)
        allowed = after["problems"] + aside(registry.home)
        whole(registry, allowed)
        tidied(registry, allowed)
        assert shown(registry) == after["shown"]
    assert not (place / "out").exists() or contents(place / "out") == contents(root / "sql1")
    return "before" if seen == before["shown"] else "after"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
