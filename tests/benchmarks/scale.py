"""A catalog of 100,000 versions of 20,000 names, against one of a few: what finding, listing and pushing take there.

The versions are rows that are inserted at once, with notes, targets, edges and tags, and no bytes behind them. One
adapter is pushed beside them, which has; pushes are of new contents each time.
"""

from __future__ import annotations

import os
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

from sqlalchemy import insert, text

import loreg
from loreg import serving
from loreg.catalog import Database, queries
from loreg.catalog.models import Adapter, Blob, Document, Edge, Tag, TagMove, Target, Version
from loreg.catalog.searching import document
from loreg.digest import Digest
from loreg.serving.beside import Record
from loreg.serving.resolving import Resolver
from tests import postgres_server
from tests.benchmarks.bench import Bench, Lines
from tests.benchmarks.models import TINY, Shape, make_adapter, make_base
from tests.benchmarks.pairs import Goal, Row, Timing, alternately, seconds_of, unmeasured

FIVE_MB = Shape("of 5 MB", 512, 1408, 16, 8, 8, 1024)
RESOLVE, LIST = Goal(1e-3, "≤ 1 ms"), Goal(10e-3, "≤ 10 ms")
PUSH = Goal(5, "≤ 5 ×")
SERVED = Goal(1e-3, "p99 ≤ 1 ms")
NOW = datetime(2026, 1, 1, tzinfo=UTC)
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head")
WORDS = [a + b for a in ("sql", "chat", "code", "math", "med", "law", "news", "poem", "tool", "vision")
         for b in ("", "-eu", "-base", "ify", "bench", "ical", "set", "-v", "ward", "less")]  # fmt: skip


def scale(bench: Bench) -> Lines:
    """Both kinds of catalogs, empty and full."""
    names, each = (40, 5) if bench.small else (20_000, 5)
    yield f"## {names * each:,} versions of {names:,} names"
    for kind, begun in (("SQLite", _sqlite), ("PostgreSQL", _postgres)):
        yield ""
        with ExitStack() as stack:
            try:
                places = [stack.enter_context(begun(bench.scratch / f"{kind}{size}")) for size in (0, names)]
                worlds = [
                    stack.enter_context(_world(bench, folder, url, size, each))
                    for (folder, url), size in zip(places, (0, names), strict=True)
                ]
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                yield unmeasured(f"all of {kind}", f"{type(error).__name__}: {error}")
                continue
            yield from _measured(bench, kind, *worlds)


@contextmanager
def _sqlite(folder: Path) -> Iterator[tuple[Path, str | None]]:
    yield folder, None


@contextmanager
def _postgres(folder: Path) -> Iterator[tuple[Path, str | None]]:
    server = postgres_server.begin(Path(tempfile.gettempdir()), fsync="on", autovacuum="on", shared_buffers="256MB")
    try:
        yield folder, server.fresh()[1]
    finally:
        server.remove()


@dataclass
class World:
    """A registry with ``real``, which can be read, among ``names`` that cannot."""

    bench: Bench
    folder: Path
    registry: loreg.Registry
    names: list[str]
    digest: Digest
    random: random.Random
    pushes: int = 0

    @property
    def shape(self) -> Shape:
        return TINY if self.bench.small else FIVE_MB

    def name(self) -> str:
        return self.random.choice(self.names) if self.names else "real"

    def adapter(self) -> Path:
        """One that was never pushed; on the disk."""
        self.pushes += 1
        path = self.folder / f"adapter{self.pushes}"
        make_adapter(path, self.shape, self.pushes)
        os.sync()
        return path

    def push(self) -> float:
        path = self.adapter()
        return seconds_of(lambda: self.registry.push(path, base="base", name=f"{self.name()}"))

    def copy(self) -> float:
        """``cp`` and fsync of the same files, within this process."""
        path = self.adapter()

        def work() -> None:
            out = self.folder / f"copy{self.pushes}"
            shutil.copytree(path, out)
            for each in (*out.iterdir(), out):
                descriptor = os.open(each, os.O_RDONLY)
                os.fsync(descriptor)
                os.close(descriptor)

        return seconds_of(work)


@contextmanager
def _world(bench: Bench, folder: Path, url: str | None, names: int, each: int) -> Iterator[World]:
    folder.mkdir(parents=True)
    with loreg.open(folder / "home", catalog=url) as registry:
        world = World(bench, folder, registry, [], Digest.of(b""), random.Random(0))
        make_base(folder / "base", world.shape)
        registry.add_base(folder / "base", "base")
        version = registry.push(world.adapter(), base="base", name="real", tags=["prod"])
        world.digest = version.digest
        if names:
            world.names = populate(registry.database, names, each)
        registry.list_versions(limit=1)
        yield world


_GRAMS = "SELECT indexdef FROM pg_indexes WHERE indexname = 'ix_documents_grams' AND schemaname = current_schema()"


def populate(database: Database, names: int, each: int) -> list[str]:
    """Rows of ``names`` times ``each`` versions."""
    rng = random.Random(1)
    tables: dict[Any, list[dict[str, Any]]] = {
        table: [] for table in (Blob, Adapter, Version, Edge, Target, Document, Tag, TagMove)
    }
    roots = [Digest.of(b"base%d" % number) for number in range(4)]
    called = [f"team{number % 97}/{rng.choice(WORDS)}-{number}" for number in range(names)]
    for number, name in enumerate(called):
        adapter = 1000 + number
        tables[Adapter].append({"id": adapter, "name": name, "last_number": each, "created_at": NOW})
        kinds = sorted(rng.sample(TARGETS[:7], 4)) + (["lm_head"] if number % 2000 == 0 else [])
        base = 3 if number % 1000 == 0 else number % 3
        for version in range(1, each + 1):
            ident = 1000 + number * each + version
            note = f"{' '.join(rng.choices(WORDS, k=8))} run {ident}"
            digests = [Digest.of(b"%d %d" % (ident, place)) for place in range(2)]
            tables[Blob] += [
                {"digest": digest, "generation": "0" * 16, "sha256": "0" * 64, "size": 9, "state": "live",
                 "created_at": NOW}
                for digest in digests
            ]  # fmt: skip
            tables[Edge].append({"source": digests[0], "blob": digests[1]})
            tables[Version].append(
                {"id": ident, "adapter_id": adapter, "number": version, "digest": digests[0],
                 "base_root": roots[base], "base_name": f"base{base}", "rank": 4 << rng.randrange(5), "modules": 28,
                 "bytes": 5_000_000, "note": note, "created_at": NOW + timedelta(seconds=ident)}
            )  # fmt: skip
            tables[Target] += [{"version_id": ident, "target": kind} for kind in kinds]
            tables[Document].append({"version_id": ident, "text": document(name, note, kinds)})
            move = {"adapter_id": adapter, "name": "latest", "seq": version, "version_id": ident}
            tables[TagMove].append({**move, "moved_at": NOW})
        tables[Tag].append(move)
    with database.write() as session:
        on_postgresql = session.connection().dialect.name == "postgresql"
        if on_postgresql:  # to make it at the end is much faster
            ((made,),) = session.execute(text(_GRAMS))
            session.execute(text("DROP INDEX ix_documents_grams"))
        for table, rows in tables.items():
            for start in range(0, len(rows), 20_000):
                session.execute(insert(table), rows[start : start + 20_000])
        if on_postgresql:
            session.execute(text(made))
            for table in ("adapters", "versions"):
                session.execute(text(f"SELECT setval('{table}_id_seq', (SELECT max(id) FROM {table}))"))
    if on_postgresql:
        with database.write() as session:
            session.execute(text("ANALYZE"))
    return called


def _find(world: World) -> object:
    return world.registry.find(f"{world.name()}:latest")


def _find_by_digest(world: World) -> object:
    return world.registry.find(f"blake3:{_some_digest(world).hex[:16]}")


def _find_by_prefix(world: World) -> object:
    name = world.name()
    digest = world.digest if name == "real" else None
    if digest is None:
        with world.registry.database.read() as session:
            digest = queries.find_version(session, name).digest
    return world.registry.find(f"{name}@blake3:{digest.hex[:12]}")


def _some_digest(world: World) -> Digest:
    return world.digest


def _show(world: World) -> None:
    """What ``loreg show`` asks."""
    row, version = world.registry.find("real:prod"), world.registry.resolve("real:prod")
    assert world.registry.tags(row.name) and version.manifest.modules


def _listed(**conditions: Any) -> Callable[[World], object]:
    return lambda world: world.registry.list_versions(limit=50, **conditions)


READS: dict[str, tuple[Callable[[World], object], Goal | None]] = {
    "find by tag, any name": (_find, RESOLVE),
    "find by a digest's prefix": (_find_by_digest, RESOLVE),
    "resolve by tag, with its manifest": (lambda world: world.registry.resolve("real:prod"), None),
    "show": (_show, None),
    "ls": (_listed(), LIST),
    "ls --base, common": (_listed(base="base1"), LIST),
    "ls --base, rare": (_listed(base="base3"), LIST),
    "ls --rank": (_listed(rank=16), LIST),
    "ls --target, common": (_listed(target="q_proj"), LIST),
    "ls --target, rare": (_listed(target="lm_head"), LIST),
    "ls QUERY, common word": (_listed(query="sql"), LIST),
    "ls QUERY, rare word": (_listed(query="team7/ 777"), LIST),
    "ls QUERY, of no version": (_listed(query="nowhere"), LIST),
    "ls QUERY of two letters": (_listed(query="zq"), None),
    "ls, all four": (_listed(base="base1", rank=16, target="q_proj", query="chat"), LIST),
    "ls --all": (_listed(all_versions=True), LIST),
    "the trash": (lambda world: world.registry.trash(), None),
    "a name that is not there": (lambda world: _refused(world, "team1/sqll-1"), None),
}
SLOW: dict[str, Callable[[World], object]] = {
    "gc: what stands (`roots`)": lambda world: _read(world, queries.roots),
    "gc: copies that are known": lambda world: _read(world, queries.known_copies),
    "gc: mark what nothing needs": lambda world: _marked(world),
    "fsck: every blob's row": lambda world: _read(world, queries.every_blob),
    "fsck: contradictions": lambda world: _read(world, queries.contradictions),
}


def _refused(world: World, name: str) -> None:
    try:
        world.registry.find(name)
    except loreg.LoregError:
        return


def _read(world: World, query: Callable[..., object]) -> object:
    with world.registry.database.read() as session:
        return query(session)


class _Undo(Exception):
    pass


def _marked(world: World) -> None:
    try:
        with world.registry.database.write() as session:
            queries.mark_unneeded(session)
            raise _Undo
    except _Undo:
        pass


def _measured(bench: Bench, kind: str, few: World, many: World) -> Lines:
    yield from (
        f"| {kind} | many versions | a few | many / few | goal |",
        "| --- | --- | --- | --- | --- |",
    )
    for name, (work, goal) in READS.items():
        times = _medians(bench, work, few, many)
        yield _row(f"{kind}: {name}", *times, goal)
    for name, slow in SLOW.items():
        works = [partial(_timed, slow, world) for world in (few, many)]
        times = alternately(1, works)
        yield _row(f"{kind}: {name}", *times, None)
    often = bench.runs if bench.small else 2 * bench.runs + 1
    few_pushes, pushes, copies = alternately(often, [few.push, many.push, many.copy])
    yield _row(f"{kind}: push of a new adapter", few_pushes, pushes, None)
    ratio = pushes.median / copies.median
    yield Row((f"{kind}: push, against `cp` and fsync", str(pushes), f"`cp` {copies}",
               PUSH.judged(ratio, f"{ratio:.2f} ×"), PUSH.text))  # fmt: skip
    yield _served(bench, kind, many)


def _served(bench: Bench, kind: str, world: World) -> Row:
    """Warm calls, in random order, for directories that are there: small ones, of what is never read again."""
    count = 40 if bench.small else 10_000
    references = [f"{name}:latest" for name in world.names[:count]]
    with tempfile.TemporaryDirectory(dir=next(filter(os.path.isdir, ["/dev/shm"]), None)) as folder:
        resolver = Resolver.of(world.registry, Path(folder))
        for reference in references:
            found = world.registry.find(reference)
            files = {"adapter_config.json": found.digest.raw * 20, "adapter_model.safetensors": found.digest.raw * 99}
            resolver.directories.make(
                found.digest.hex,
                partial(_in_pieces, files),
                partial(Record, found.digest, found.base_root, found.rank),
            )
        time.sleep(2.1)  # what was just written is not taken to be settled
        resolve = partial(serving.resolve, registry=world.registry, cache=Path(folder))
        for reference in references:
            resolve(reference)
        chosen = world.random.choices(references, k=2 * count)
        seconds = sorted(seconds_of(partial(resolve, reference)) for reference in chosen)
    most = seconds[int(0.99 * len(seconds))]
    shown = f"{seconds[len(seconds) // 2] * 1e3:.3g} / **{most * 1e3:.3g}** / {seconds[-1] * 1e3:.3g} ms"
    name = f"{kind}: `serving.resolve`, warm, any of {count:,} (median / **p99** / max)"
    return Row((name, SERVED.judged(most, shown), "", "", SERVED.text))


def _in_pieces(files: Mapping[str, bytes]) -> Iterator[tuple[str, list[bytes | memoryview]]]:
    yield from ((name, [data]) for name, data in files.items())


def _medians(bench: Bench, work: Callable[[World], object], few: World, many: World) -> list[Timing]:
    """Of single calls, after some that warm up."""
    for world in (few, many):
        for _ in range(3):
            work(world)
    return alternately(
        (1 if bench.small else 10) * bench.runs, [partial(_timed, work, world) for world in (few, many)]
    )


def _timed(work: Callable[[World], object], world: World) -> float:
    return seconds_of(lambda: work(world))


def _row(name: str, few: Timing, many: Timing, goal: Goal | None) -> Row:
    ratio = many.median / few.median
    shown = _ms(many)
    return Row((name, goal.judged(many.median, shown) if goal else shown, _ms(few), f"{ratio:.2f} ×",
                goal.text if goal else ""))  # fmt: skip


def _ms(timing: Timing) -> str:
    low, high = min(timing.seconds) * 1e3, max(timing.seconds) * 1e3
    return f"{low:.3g} / **{statistics.median(timing.seconds) * 1e3:.3g}** / {high:.3g} ms"
