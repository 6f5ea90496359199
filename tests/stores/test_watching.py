"""``watch``: every move is told once and in order, whatever the catalog, the consumer's pace and the outages."""

from __future__ import annotations

import asyncio
import contextlib
import random
import shutil
import signal
import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import postgres_server
import pytest
import tiny
from backends import ON_FILES, PLACES, Place
from postgres_server import Server

import loreg
from loreg import serving
from loreg.errors import Conflict, UsageError
from loreg.serving import signals
from loreg.serving.signals import Series, Signals
from loreg.serving.watching import AsyncWatch, Moved, Watch

SOON, NEVER = 0.01, 600.0


@pytest.fixture
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    found = PLACES[request.param](tmp_path)
    yield found
    found.leave()


def filled(place: Place, folder: Path, versions: int = 3) -> loreg.Registry:
    """With that many versions of ``sql``, the first of which is ``prod``."""
    opened = place.open()
    opened.add_base(tiny.write_model(folder / "base", tiny.model()), "base")
    for seed in range(1, versions + 1):
        push(opened, folder, seed)
    opened.tag("sql:v1", "prod")
    return opened


def push(registry: loreg.Registry, folder: Path, seed: int, **options: object) -> loreg.Version:
    adapter = tiny.write_adapter(folder / f"adapter{seed}", tiny.adapter(seed=seed))
    return registry.push(adapter, base="base", name="sql", **options)


def digests(registry: loreg.Registry) -> list[loreg.Digest]:
    return [row.digest for row in registry.log("sql")[0]]


def told(watch: Watch) -> list[tuple[object, object]]:
    """What it tells until it has had nothing to tell for a moment."""
    return [(moved.old, moved.new) for moved in watch]


@pytest.mark.parametrize("place", PLACES, indirect=True)
def test_what_happens_to_a_reference_is_told(place: Place, tmp_path: Path) -> None:
    with place.open() as registry, place.open() as elsewhere:
        with (
            serving.watch("sql:prod", registry, interval=SOON, timeout=0.3) as prod,
            serving.watch("sql", registry, interval=SOON, timeout=0.3) as newest,
            serving.watch("sql:v2", registry, interval=SOON, timeout=0.3) as second,
        ):
            assert prod.current is None
            elsewhere.add_base(tiny.write_model(tmp_path / "base", tiny.model()), "base")
            one = push(elsewhere, tmp_path, 1, tags=["prod"]).digest
            moved = next(prod)
            assert (moved.reference, moved.old, moved.new) == ("sql:prod", None, one)
            assert abs(time.time() - moved.at.timestamp()) < 60
            assert told(newest) == [(None, one)]
            two = push(elsewhere, tmp_path, 2).digest
            assert (told(prod), told(newest), told(second)) == ([], [(one, two)], [(None, two)])
            registry.tag("sql:v2", "prod")  # by the very registry that is watched
            assert told(prod) == [(one, two)]
            elsewhere.remove("sql:v2", tags_to="sql:v1")
            assert (told(prod), told(newest), told(second)) == ([(two, one)], [(two, one)], [(two, None)])
            elsewhere.restore("sql:v2")
            assert (told(prod), told(newest), told(second)) == ([], [(one, two)], [(None, two)])
        content = serving.watch(str(two), registry, interval=SOON, timeout=0.3)
        assert content.current == two
        elsewhere.remove("sql:v2")
        assert told(content) == [(two, None)]
        content.close()


@pytest.mark.parametrize("place", ON_FILES, indirect=True)
def test_moves_that_nobody_took_are_one(place: Place, tmp_path: Path) -> None:
    with filled(place, tmp_path) as registry:
        one, two, three = digests(registry)
        with serving.watch("sql:prod", registry, interval=SOON, timeout=0.1) as watch:
            registry.tag("sql:v2", "prod")
            registry.tag("sql:v3", "prod")
            assert told(watch) == [(one, three)]
            registry.tag("sql:v2", "prod")
            registry.tag("sql:v3", "prod")
            assert told(watch) == []
            registry.tag("sql:v2", "prod")
            assert told(watch) == [(three, two)]
            assert watch.current == two


@pytest.mark.parametrize("place", ON_FILES, indirect=True)
def test_no_move_is_lost_or_told_twice_at_any_pace(place: Place, tmp_path: Path) -> None:
    draw = random.Random(7)
    with filled(place, tmp_path) as registry, place.open() as mover:
        all_of_them = digests(registry)

        def move() -> None:
            for _ in range(60):
                mover.tag(f"sql:v{draw.randint(1, 3)}", "prod")
                time.sleep(draw.choice([0, 0, 0.003]))

        watch = serving.watch("sql:prod", registry, interval=0.001, timeout=5.0)
        at, thread = watch.current, threading.Thread(target=move)
        thread.start()
        events = 0
        for moved in watch:
            assert moved.old == at != moved.new
            assert moved.new in all_of_them
            at, events = moved.new, events + 1
            time.sleep(random.choice([0, 0.002]))
        thread.join()
        assert events > 5
        assert at == registry.digest_of("sql:prod")
        watch.close()


@pytest.mark.parametrize("place", ON_FILES, indirect=True)
def test_a_move_while_it_looks_is_told(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with filled(place, tmp_path) as registry, place.open() as mover:
        one, two, three = digests(registry)
        look, moves = registry.digest_of, [2, 3]

        def overtaken(reference: object) -> object:
            found = look(reference)
            if moves:
                mover.tag(f"sql:v{moves.pop(0)}", "prod")
            return found

        monkeypatch.setattr(registry, "digest_of", overtaken)
        with serving.watch("sql:prod", registry, interval=SOON, timeout=0.5) as watch:
            assert watch.current == one
            assert told(watch) == [(one, two), (two, three)]


def test_postgresql_tells_at_once_and_on_commit_only(tmp_path: Path) -> None:
    place = PLACES["postgres-files"](tmp_path)
    with filled(place, tmp_path) as registry:
        one, two, _ = digests(registry)
        with serving.watch("sql:prod", registry, interval=NEVER) as watch:
            changes = watch._changes
            assert changes.told
            threading.Timer(0.3, registry.tag, ("sql:v2", "prod")).start()
            began = time.monotonic()
            moved = next(watch)
            assert (moved.old, moved.new) == (one, two)
            assert time.monotonic() - began < 20

            for _ in range(2):
                changes.happened()
            with contextlib.suppress(ZeroDivisionError), registry.storage.writing() as session:
                from loreg.catalog import queries

                row = queries.find_version(session, "sql", number=3)
                queries.move_tag(session, "sql", "prod", row, queries.tag_seq(session, "sql", "prod"), row.created_at)
                assert not changes.happened()
                1 / 0
            assert not changes.happened()
            assert registry.digest_of("sql:prod") == two
            registry.push(
                tiny.write_adapter(tmp_path / "other", tiny.adapter(seed=9)), base="base", name="other", tags=["prod"]
            )
            assert not changes.happened()  # what is told of other names wakes nobody
            registry.tag("sql:v3", "prod")
            assert changes.happened()
            with registry.database.write() as session:
                queries.begin_anew(session)
            assert changes.happened()  # a catalog whose facts were all stated anew may say anything
    place.leave()


def test_sqlite_is_read_only_if_somebody_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with filled(Place(tmp_path / "home"), tmp_path) as registry:
        reads: list[object] = []
        look = registry.digest_of
        monkeypatch.setattr(registry, "digest_of", lambda ref: reads.append(ref) or look(ref))
        with serving.watch("sql:prod", registry, interval=0.001, timeout=0.2) as watch:
            assert len(reads) == 1
            assert told(watch) == []
            assert len(reads) == 1
            registry.tag("sql:v3", "other")
            assert told(watch) == []
            assert 2 <= len(reads) <= 4  # the ledger is written beside


def test_a_catalog_that_is_replaced_by_a_backup_is_noticed(tmp_path: Path) -> None:
    with filled(Place(tmp_path / "home"), tmp_path) as registry:
        one, two, _ = digests(registry)
        source, backup = registry.home / "catalog.db", tmp_path / "backup.db"
        with contextlib.closing(sqlite3.connect(source)) as raw, contextlib.closing(sqlite3.connect(backup)) as copy:
            raw.backup(copy)
        registry.tag("sql:v2", "prod")
        with serving.watch("sql:prod", registry, interval=SOON, timeout=1.5) as watch:
            assert watch.current == two
            assert told(watch) == []
            shutil.move(backup, source)
            for beside in ("-wal", "-shm"):
                source.with_name(source.name + beside).unlink(missing_ok=True)
            assert told(watch) == [(two, one)]


def test_a_catalog_that_is_away_is_asked_again(tmp_path: Path) -> None:
    with filled(Place(tmp_path / "home"), tmp_path) as registry, loreg.open(registry.home) as other:
        one, two, _ = digests(registry)
        catalog, away = registry.home / "catalog.db", tmp_path / "away.db"
        with serving.watch("sql:prod", registry, interval=SOON, timeout=1.5) as watch:
            shutil.move(catalog, away)
            assert told(watch) == []
            for _ in range(2):
                with pytest.raises(Conflict, match="is not there any more"):
                    registry.tag("sql:v2", "prod")
            shutil.move(away, catalog)
            other.tag("sql:v2", "prod")
            assert told(watch) == [(one, two)]


def test_what_is_written_after_a_restore_is_in_what_was_restored(tmp_path: Path) -> None:
    with filled(Place(tmp_path / "home"), tmp_path) as registry:
        _, two, _ = digests(registry)
        source, backup = registry.home / "catalog.db", tmp_path / "backup.db"
        with contextlib.closing(sqlite3.connect(source)) as raw, contextlib.closing(sqlite3.connect(backup)) as copy:
            raw.backup(copy)
        shutil.move(backup, source)
        for beside in ("-wal", "-shm"):
            source.with_name(source.name + beside).unlink(missing_ok=True)
        registry.tag("sql:v2", "prod")
        with loreg.open(registry.home) as other:
            assert other.digest_of("sql:prod") == two


def test_a_catalog_that_cannot_be_read_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = Signals()
    before = signals.replace_default(counted)
    try:
        with filled(Place(tmp_path / "home"), tmp_path) as registry:
            one, two, _ = digests(registry)
            look, refusals = registry.digest_of, [2]

            def refusing(ref: object) -> object:
                if refusals[0]:
                    refusals[0] -= 1
                    raise Conflict("held")
                return look(ref)

            with serving.watch("sql:prod", registry, interval=SOON, timeout=0.5) as watch:
                monkeypatch.setattr(registry, "digest_of", refusing)
                registry.tag("sql:v2", "prod")
                assert told(watch) == [(one, two)]
        assert counted.snapshot().counts == {Series("watch_outages"): 2, Series("watch_moves"): 1}
    finally:
        signals.replace_default(before)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    begun = postgres_server.begin()
    yield begun
    begun.remove()


def test_a_server_that_is_killed_and_started_again_loses_no_move(server: Server, tmp_path: Path) -> None:
    place = Place(tmp_path / "home", server.made()[1])
    with filled(place, tmp_path) as registry, place.open() as mover:
        one, two, three = digests(registry)
        found: list[Moved] = []
        watch = serving.watch("sql:prod", registry, interval=0.05)
        thread = threading.Thread(target=lambda: found.extend(watch))
        thread.start()
        mover.tag("sql:v2", "prod")
        wait_until(lambda: len(found) == 1)
        for expected, version, end in ((2, 3, server.kill), (3, 1, server.stop), (4, 2, server.kill)):
            end()
            time.sleep(0.2)
            server.start()
            mover.tag(f"sql:v{version}", "prod")
            wait_until(lambda expected=expected: len(found) >= expected)
        wait_until(lambda: watch._changes.told)
        time.sleep(0.3)
        watch.close()
        thread.join(10)
        assert not thread.is_alive()
        assert [(moved.old, moved.new) for moved in found] == [(one, two), (two, three), (three, one), (one, two)]


def test_a_move_in_the_moment_of_an_outage_is_told(server: Server, tmp_path: Path) -> None:
    place = Place(tmp_path / "home", server.made()[1])
    with filled(place, tmp_path) as registry, place.open() as mover, server.connect() as own:
        one, two, _ = digests(registry)
        with serving.watch("sql:prod", registry, interval=SOON, timeout=1.0) as watch:
            mover.tag("sql:v2", "prod")
            pid = watch._changes._raw.info.backend_pid
            own.execute("SELECT pg_terminate_backend(%s, 5000)", (pid,))  # with what it was to tell
            assert told(watch) == [(one, two)]
            assert watch._changes.told  # on another connection
            assert watch._changes._raw.info.backend_pid != pid
            mover.tag("sql:v1", "prod")
            assert told(watch) == [(two, one)]


def test_where_no_connection_is_left_for_it_it_is_asked(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Place(tmp_path / "home", server.made()[1])
    with filled(place, tmp_path) as registry:
        one, two, _ = digests(registry)

        def refused() -> object:
            raise loreg.errors.RemoteError("too many are connected")

        monkeypatch.setattr(registry.database.kind, "listening", refused)
        with serving.watch("sql:prod", registry, interval=SOON, timeout=0.3) as watch:
            assert not watch._changes.told
            registry.tag("sql:v2", "prod")
            assert told(watch) == [(one, two)]


@pytest.mark.parametrize("place", ON_FILES, indirect=True)
def test_whoever_waits_is_woken_by_a_close(place: Place, tmp_path: Path) -> None:
    with filled(place, tmp_path) as registry:
        watch = serving.watch("sql:prod", registry, interval=NEVER)
        waiting = threading.Thread(target=lambda: told(watch))
        waiting.start()
        time.sleep(0.1)
        assert waiting.is_alive()
        watch.close()
        waiting.join(10)
        assert not waiting.is_alive()
        assert watch._wake.fileno() == -1  # and nothing is left open
        watch.close()
        assert told(watch) == []


def test_an_interval_may_be_of_any_length(pushed: loreg.Registry) -> None:
    with serving.watch("sql", pushed, interval=1e300) as watch:
        threading.Timer(0.2, watch.close).start()
        assert list(watch) == []


def test_an_interrupt_ends_it(pushed: loreg.Registry) -> None:
    watch = serving.watch("sql", pushed, interval=NEVER)
    threading.Timer(0.3, signal.pthread_kill, (threading.get_ident(), signal.SIGINT)).start()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt), watch:
        next(watch)
    assert time.monotonic() - began < 20
    assert watch._wake.fileno() == -1


def test_asynchronously(pushed: loreg.Registry, tmp_path: Path) -> None:
    other = tiny.write_adapter(tmp_path / "other", tiny.adapter(seed=9))

    async def follow() -> list[tuple[object, object]]:
        found = []
        async with serving.watch_async("sql", pushed, interval=SOON) as moves:
            start = moves.current
            threading.Thread(target=pushed.push, args=(other,), kwargs={"base": "base", "name": "sql"}).start()
            async for moved in moves:
                found.append((start, moved.new))
                break
            waiting = asyncio.ensure_future(anext(moves, None))
            await asyncio.sleep(0.05)
            await moves.aclose()
            assert await asyncio.wait_for(waiting, 10) is None
            assert await anext(moves, None) is None
        return found

    old, new = pushed.find("sql:v1").digest, None
    ((start, new),) = asyncio.run(follow())
    assert (start, new) == (old, pushed.find("sql:v2").digest)


def test_a_cancellation_ends_the_thread_that_waits(pushed: loreg.Registry) -> None:
    async def cancelled() -> AsyncWatch:
        moves = serving.watch_async("sql", pushed, interval=NEVER)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                async for _ in moves:
                    pass
        return moves

    began = time.monotonic()
    moves = asyncio.run(cancelled())
    wait_until(lambda: not any(thread.name.startswith("loreg watch") for thread in threading.enumerate()))
    assert moves._watch is not None and moves._watch._wake.fileno() == -1
    assert time.monotonic() - began < 20


def test_the_default_registry_is_the_users(pushed: loreg.Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOREG_HOME", str(pushed.home))
    with serving.watch("sql", timeout=0) as watch:
        assert watch.current == pushed.find("sql").digest
        assert told(watch) == []


@pytest.mark.parametrize(
    ("reference", "interval"), [("SQL!", 1.0), ("sql", 0.0), ("sql", -1.0), ("sql", float("nan"))]
)
def test_what_makes_no_sense_is_refused(pushed: loreg.Registry, reference: str, interval: float) -> None:
    with pytest.raises(UsageError):
        serving.watch(reference, pushed, interval=interval)


def wait_until(true: object, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)
