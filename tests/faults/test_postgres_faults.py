"""A PostgreSQL server that is killed at each edge of each transaction of a push, a tag, a removal and a collection.

The edges: a transaction is about to begin, it is about to be committed, and it was committed but the answer is lost.
Whatever happens, and whenever: the error is one of loreg; what was acknowledged is there after the server has started
again; what was not is there whole or not at all; and the same again succeeds.
"""

from __future__ import annotations

import os
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import postgres_server
import psycopg
import pytest
import tiny
from backends import Place
from postgres_server import Server
from sqlalchemy import event, text

import loreg
from loreg.catalog import kinds
from loreg.errors import Conflict, NotFound, RemoteError
from loreg.registry import storage
from loreg.store import LocalStore

NONE = timedelta()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """One of its own: it is killed."""
    begun = postgres_server.begin()
    yield begun
    begun.remove()


@pytest.fixture
def place(server: Server, tmp_path: Path) -> Place:
    return Place(tmp_path / "home", server.made()[1])


@pytest.fixture
def registry(place: Place) -> Iterator[loreg.Registry]:
    with place.open() as opened:
        yield opened


class Edges:
    """Kills the server at one of the edges that are met from now on."""

    def __init__(self, registry: loreg.Registry, server: Server) -> None:
        self._server, self._left, self.struck = server, -1, False
        engine = registry.database._engine
        commit = engine.dialect.do_commit

        def lost(raw: Any) -> None:
            commit(raw)
            if self._met():
                raise psycopg.OperationalError("the answer is lost")

        engine.dialect.do_commit = lost  # type: ignore[method-assign]
        event.listen(engine, "checkout", self._met)
        event.listen(engine, "commit", self._met)

    def arm(self, edge: int) -> None:
        self._left, self.struck = edge, False

    def _met(self, *_: object) -> bool:
        self._left -= 1
        if self._left == -1:
            self._server.kill()
            self.struck = True
        return self._left == -1

    def disarm(self) -> None:
        self._left = -1


def state(registry: loreg.Registry) -> dict[str, Any]:
    """What is shown, which reads back to the last blob; what is in the trash; and where tags point."""
    shown = registry.list_versions(all_versions=True)
    for row in shown:
        for blob in registry.resolve(f"{row.name}:v{row.number}").manifest.blobs:
            registry.storage.read(blob.digest)
    return {
        "versions": {(row.name, row.number): str(row.digest) for row in shown},
        "trash": {(row.name, row.number) for row in registry.trash()},
        "tags": {row.name: registry.tags(row.name) for row in shown},
    }


@pytest.fixture
def world(pushed: loreg.Registry, tmp_path: Path) -> loreg.Registry:
    for seed in (11, 12):
        folder = tiny.write_adapter(tmp_path / f"more{seed}", tiny.adapter(seed=seed))
        pushed.push(folder, base="base", name="sql")
    return pushed


def _push(registry: loreg.Registry, folder: Path, number: int) -> None:
    path = folder / f"new{number}"
    if not path.exists():
        tiny.write_adapter(path, tiny.adapter(seed=100 + number))
    registry.push(path, base="base", name="new", tags=["prod"])


def _tag(registry: loreg.Registry, _folder: Path, number: int) -> None:
    registry.tag(f"sql:v{1 + number % 2}", "prod")


def _remove(registry: loreg.Registry, _folder: Path, number: int) -> None:
    with suppress(NotFound):  # when it was done already
        registry.remove("sql:v3")


def _collect(registry: loreg.Registry, _folder: Path, _number: int) -> None:
    registry.collect(grace=NONE)


def _again(registry: loreg.Registry) -> None:
    """Take back what a removal did."""
    if ("sql", 3) in {(row.name, row.number) for row in registry.trash()}:
        registry.restore("sql:v3")


def _garbage(registry: loreg.Registry, folder: Path, number: int) -> None:
    """Something to collect."""
    path = tiny.write_adapter(folder / f"garbage{number}", tiny.adapter(seed=500 + number))
    registry.push(path, base="base", name="garbage")
    registry.remove("garbage")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("work", "prepare", "fewest"),
    [
        (_push, lambda *_: None, 11),
        (_tag, lambda *_: None, 5),
        (_remove, lambda registry, *_: _again(registry), 3),
        (_collect, _garbage, 7),
    ],
    ids=["push", "tag", "rm", "gc"],
)
def test_a_server_that_is_killed_at_each_edge(
    world: loreg.Registry,
    server: Server,
    place: Place,
    tmp_path: Path,
    work: Callable[[loreg.Registry, Path, int], None],
    prepare: Callable[[loreg.Registry, Path, int], None],
    fewest: int,
) -> None:
    edges, met, seen = Edges(world, server), 0, set()
    while True:
        prepare(world, tmp_path, met)
        before = state(world)
        edges.arm(met)
        try:
            work(world, tmp_path, met)
            acknowledged = True
        except RemoteError:
            acknowledged = False
        edges.disarm()
        if not edges.struck:
            assert acknowledged
            break
        server.start()
        after = state(world)  # the registry whose server was killed under it goes on
        with place.open() as fresh:
            for name in ("sql:v1", "humor:v1"):  # were acknowledged long ago
                assert fresh.resolve(name)
            assert before["versions"].items() <= after["versions"].items() or work is _remove
            work(fresh, tmp_path, met)
            done = state(fresh)
            assert after in (before, done)
            assert not acknowledged or after == done
            assert fresh.fsck().ok
        seen.add((after == before, acknowledged))
        met += 1
    assert met >= fewest
    assert (True, False) in seen  # before the commit nothing is to be seen, whatever was written
    if work is not _collect:  # which shows nobody anything
        assert (False, False) in seen  # and after it all, though nobody was told


def test_a_connection_that_is_ended_in_the_middle(world: loreg.Registry, server: Server) -> None:
    before = state(world)

    def end() -> None:
        with server.connect() as other:
            other.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'loreg'")

    with pytest.raises(RemoteError, match="there or not"), world.database.write() as s:
        s.execute(text("UPDATE versions SET rank = 77"))
        end()
        s.execute(text("UPDATE versions SET rank = 78"))
    assert state(world) == before
    end()  # between two transactions: nobody notices
    assert state(world) == before


def test_a_lock_that_is_held_for_too_long(
    place: Place, world: loreg.Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = state(world)
    monkeypatch.setattr(kinds, "BUSY_TIMEOUT_MS", 100)
    with place.open() as other:
        with world.database.write():
            for refused in (
                lambda: _push(other, tmp_path, 1),
                lambda: other.collect(),
                lambda: other.remove("sql:v1"),
            ):
                with pytest.raises(Conflict, match="another process holds it"):
                    refused()
            assert state(other) == before  # to read waits for nobody
        _push(other, tmp_path, 1)
    assert state(world)["tags"]["new"] == {"latest": 1, "prod": 1}


def test_a_pusher_that_stands_still_past_its_lease_is_fenced(
    world: loreg.Registry, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGSTOP after it has written its first blob; that is collected; SIGCONT."""
    before = state(world)
    world.database.close()  # a fork must not speak on its connection
    pid = os.fork()
    if pid == 0:
        try:
            monkeypatch.setattr(storage, "LEASE", timedelta(milliseconds=1))
            put, written = LocalStore.put, []

            def put_and_stop(*given: Any, **options: Any) -> Any:
                written.append(put(*given, **options))
                if len(written) == 1:
                    os.kill(os.getpid(), signal.SIGSTOP)
                return written[-1]

            monkeypatch.setattr(LocalStore, "put", put_and_stop)
            with place.open() as own:
                _push(own, tmp_path, 1)
            os._exit(0)
        except Conflict as error:
            os._exit(6 if "lease" in str(error) else 7)
        except BaseException:
            traceback.print_exc()
            os._exit(99)
    assert os.WIFSTOPPED(os.waitpid(pid, os.WUNTRACED)[1])
    assert world.collect(grace=NONE).copies
    os.kill(pid, signal.SIGCONT)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 6
    assert state(world) == before and world.fsck().ok
    world.collect(grace=NONE)
    _push(world, tmp_path, 1)
    assert state(world)["tags"]["new"] == {"latest": 1, "prod": 1}
