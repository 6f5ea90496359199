"""Registries for the faults of a disk: one in use, one that is damaged, one of an old release; and their inputs."""

from __future__ import annotations

import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import tiny

import loreg
from loreg.digest import Digest

OLD = Path(__file__).parents[1] / "migrations" / "catalog_0001.sql"


def inputs(root: Path) -> None:
    """The base, and adapters by name; those of the old catalog are among them."""
    tiny.write_model(root / "base", tiny.model())
    for seed in (1, 5, 7):
        tiny.write_adapter(root / f"sql{seed}", tiny.adapter(seed=seed))
    tiny.write_adapter(root / "humor", tiny.adapter(seed=2, rank=3), use_rslora=True)
    (root / "sql7").rename(root / "new")
    tiny.write_adapter(root / "gone", tiny.adapter(seed=8))


def spare(root: Path) -> None:
    """Another registry, with a good copy of each version but one, and with the one that is to be pulled."""
    with loreg.open(root / "spare") as registry:
        registry.add_base(root / "base", "base")
        for name in ("sql1", "sql5", "new"):
            registry.push(root / name, base="base", name=name)


def in_use(root: Path, place: Path) -> None:
    """Versions, tags, one version in the trash, one copy that no row knows, one write that did not end."""
    with loreg.open(place / "home") as registry:
        registry.add_base(root / "base", "base")
        registry.push(root / "sql1", base="base", name="sql", tags=["prod"])
        registry.push(root / "humor", base="base", name="team/humor")
        registry.push(root / "gone", base="base", name="gone")
        registry.remove("gone:v1")
        store = registry.storage.store
        store.put(Digest.of(b"nobody's"), "0" * 16, [b"nobody's"])
        (place / "home" / "tmp" / f"{Digest.of(b'half').hex}.{'1' * 16}.{'2' * 16}").write_bytes(b"ha")


def with_log(root: Path, place: Path) -> None:
    """As above, and then a push whose process was killed when it had said so."""
    source = place.parent / f"{place.name}.made"
    in_use(root, source)
    home = source / "home"
    with closing(sqlite3.connect(home / "catalog.db")) as reader:
        reader.execute("SELECT count(*) FROM versions").fetchall()  # the last one to close would empty the log
        with loreg.open(home) as registry:
            registry.push(root / "sql5", base="base", name="sql", tags=["next"])
        shutil.copytree(source, place, ignore=shutil.ignore_patterns("*-shm"))
    assert (place / "home" / "catalog.db-wal").stat().st_size
    shutil.rmtree(source)


def damaged(root: Path, place: Path) -> None:
    """As above; and one blob is missing and two are corrupt, one of them beyond repair; rows are wrong too."""
    with_log(root, place)
    home = place / "home"
    with loreg.open(home) as registry:
        sql, humor = registry.resolve("sql:v1").manifest, registry.resolve("team/humor").manifest
        factors = [manifest.blob("factors") for manifest in (sql, humor, registry.resolve("sql:v2").manifest)]
        missing, lost, corrupt = [registry.storage.path(blob.digest) for blob in factors if blob is not None]
    missing.unlink()
    for path in (lost, corrupt):
        path.chmod(0o644)
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    with closing(sqlite3.connect(home / "catalog.db")) as raw, raw:
        raw.execute("DELETE FROM edges WHERE source = ? AND blob = ?", (str(sql.digest), str(sql.blobs[0].digest)))
        raw.execute("UPDATE versions SET rank = 99 WHERE digest = ?", (str(humor.digest),))


def old(root: Path, place: Path) -> None:
    """The catalog of an old release, and the blobs of three of its four versions."""
    home = place / "home"
    home.mkdir(parents=True)
    with closing(sqlite3.connect(home / "catalog.db")) as raw:
        raw.executescript(OLD.read_text())
        generations = dict(raw.execute("SELECT digest, generation FROM blobs"))
    source = root / "same"
    with loreg.open(source) as registry:
        registry.add_base(root / "base", "base")
        for name in ("sql1", "sql5", "humor"):
            registry.push(root / name, base="base", name=name)
    for path in (source / "blobs").rglob("*.*"):
        digest = path.name.partition(".")[0]
        folder = home / "blobs" / digest[:2]
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder / f"{digest}.{generations['blake3:' + digest]}")
    shutil.rmtree(source)


def nothing(root: Path, place: Path) -> None:
    place.mkdir()
