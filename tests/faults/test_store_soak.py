"""Pushes, removals, collections and readings in many processes at once, killed at random or stopped for longer than
their leases last, against a ledger of what was acknowledged: no version is lost, none is half there, and what nothing
needs is gone in the end.

--nightly lets it run for ten times as long.
"""

from __future__ import annotations

import os
import random
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Self

import pytest
from backends import PLACES, Place
from contents import Content, contents
from options import counts

import loreg
from loreg.errors import Conflict, NotFound
from loreg.registry import storage
from loreg.registry.storage import PendingBlob

PUSHERS, COLLECTORS, READERS = 8, 2, 4
CONTENTS = 5
"""So few that pushes find what another just wrote, or a collector just marked."""
LEASE = timedelta(seconds=3)
"""Instead of an hour: a push on a machine that has too much to do may lose it too, and is made again."""
SHARED = [name for name in PLACES if name in ("sqlite-files", "postgres-files")]


class Ledger:
    """A line for each fact, appended at once: of a process that was killed what it said stays said."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.touch()

    def say(self, *words: object) -> None:
        descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND)
        os.write(descriptor, (" ".join(map(str, words)) + "\n").encode())
        os.close(descriptor)

    def lines(self) -> list[list[str]]:
        return [line.split() for line in self._path.read_text().splitlines()]


def _forked(work: Callable[[], None]) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _pusher(place: Place, name: str, given: list[Content], ledger: Ledger, seed: int, until: float) -> None:
    """Pushes under a name of its own, and removes what it pushed before."""
    rng = random.Random(seed)
    with place.open() as registry:
        while time.monotonic() < until:
            content = rng.choice(given)
            try:
                version = registry.commit_version(name, content.manifest, list(content.blobs))
            except Conflict:
                ledger.say("fenced", name, 0)
                continue
            ledger.say("pushed", name, version.number)
            for digest in content.data:
                registry.storage.read(digest)
            if rng.random() < 0.7:
                ledger.say("removing", name, version.number)
                registry.remove(f"{name}:v{version.number}")


def _late(place: Place, content: Content, ledger: Ledger, until: float) -> None:
    """Each time it has written all but its manifest, it stands still until somebody wakes it."""
    number = 0
    with place.open() as registry:
        while time.monotonic() < until:
            number += 1
            manifest = replace(content.manifest, annotations={"push": number})
            data = manifest.dump()

            def stopping(data: bytes = data) -> Iterator[bytes]:
                yield data
                os.kill(os.getpid(), signal.SIGSTOP)

            whole = [*content.blobs[:-1], PendingBlob.of(data)]
            with pytest.raises(Conflict, match="lease"):
                registry.commit_version("late", manifest, [*whole[:-1], PendingBlob(whole[-1].fingerprint, stopping)])
            with pytest.raises(NotFound):
                registry.resolve(str(manifest.digest))
            ledger.say("stopped", "late", number)
            while True:
                try:
                    version = registry.commit_version("late", manifest, whole)
                    break
                except Conflict:  # so slow a machine
                    ledger.say("fenced", "late", 0)
            assert version.number == number
            ledger.say("pushed", "late", number)


def _collect(place: Place, until: float = 0) -> None:
    with place.open() as registry:
        registry.collect(grace=timedelta())
        while time.monotonic() < until:
            registry.collect(grace=timedelta())


def _reader(place: Place, until: float) -> None:
    """What is listed reads back, unless it was removed meanwhile."""
    with place.open() as registry:
        while time.monotonic() < until:
            for row in registry.list_versions(all_versions=True):
                assert any(_reads_or_is_gone(registry, row.name, row.number) for _ in range(50)), row


def _repair(place: Place, until: float) -> None:
    """Nothing is damaged: what others are about to do is not taken for that."""
    with place.open() as registry:
        while time.monotonic() < until:
            found = registry.fsck(repair=True)
            assert not found.problems, found.problems


def _reads_or_is_gone(registry: loreg.Registry, name: str, number: int) -> bool:
    """Neither, where it was gone and has come back: its pusher puts it into the trash, and takes it out."""
    try:
        for blob in registry.resolve(f"{name}:v{number}").manifest.blobs:
            registry.storage.read(blob.digest)
    except NotFound:
        return all(number != other.number for other in registry.log(name)[0])
    return True


class Crowd:
    """Processes, by their work: those that are killed begin anew."""

    def __init__(self, works: list[Callable[[], None]]) -> None:
        self.running = {_forked(work): work for work in works}
        self.kills = self.stops = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for pid in self.running:  # where the test has failed
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)

    def wait(self, how: int = 0) -> tuple[int, int]:
        """The next that ended, or with ``os.WUNTRACED`` that stopped."""
        pid, status = os.waitpid(-1, how)
        if not pid or os.WIFSTOPPED(status):
            return pid, status
        work = self.running.pop(pid)
        if os.WIFSIGNALED(status):
            self.kills += 1
            self.running[_forked(work)] = work
        else:
            assert os.waitstatus_to_exitcode(status) == 0, "see what it printed"
        return pid, status

    def kill_some(self, until: float, rng: random.Random) -> None:
        while time.monotonic() < until - 1:
            time.sleep(rng.expovariate(1 / 0.25))
            os.kill(rng.choice(list(self.running)), signal.SIGKILL)
            self.wait()

    def stop_some(self, until: float, rng: random.Random, collect: Callable[[], None]) -> None:
        """The one that stops itself, and each time another one with it; a collection comes before they go on."""
        while time.monotonic() < until - 1:
            pid, status = self.wait(os.WUNTRACED | os.WNOHANG)
            if not (pid and os.WIFSTOPPED(status)):
                time.sleep(0.02)
                continue
            other = rng.choice([each for each in self.running if each != pid])
            time.sleep(LEASE.total_seconds() + 0.1)
            assert os.waitstatus_to_exitcode(os.waitpid(_forked(collect), 0)[1]) == 0
            os.kill(other, signal.SIGSTOP)
            time.sleep(rng.random() / 2)
            self.stops += 1
            for each in (other, pid):
                os.kill(each, signal.SIGCONT)
        while self.running:
            pid, status = self.wait(os.WUNTRACED)
            if os.WIFSTOPPED(status):
                time.sleep(LEASE.total_seconds() + 0.1)
                assert os.waitstatus_to_exitcode(os.waitpid(_forked(collect), 0)[1]) == 0
                os.kill(pid, signal.SIGCONT)


@pytest.fixture
def given(tmp_path: Path) -> list[Content]:
    return list(contents(tmp_path / "all", tmp_path, CONTENTS))


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("how", "seconds"), [("stopped", 60), ("killed", 20)])
@pytest.mark.parametrize("place_name", SHARED)
def test_nothing_is_lost(
    tmp_path: Path, given: list[Content], place_name: str, how: str, seconds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "LEASE", LEASE)
    place, ledger, seconds = PLACES[place_name](tmp_path), Ledger(tmp_path / "ledger"), counts(seconds)
    place.open().close()
    began = time.monotonic()
    until, rng = began + seconds, random.Random(5)
    works: list[Callable[[], None]] = [
        lambda n=n: _pusher(place, f"p{n}", given, ledger, n + int(time.monotonic() * 1000), until)  # type: ignore[misc]
        for n in range(PUSHERS)
    ]
    works += [lambda: _collect(place, until)] * COLLECTORS + [lambda: _reader(place, until)] * READERS
    works.append(lambda: _repair(place, until))
    if how == "stopped":
        works.append(lambda: _late(place, given[0], ledger, until - 2 * LEASE.total_seconds()))
    with Crowd(works) as crowd:
        if how == "killed":
            crowd.kill_some(until, rng)
        else:
            crowd.stop_some(until, rng, lambda: _collect(place))
        while crowd.running:
            crowd.wait()
    said = ledger.lines()
    print({what: sum(line[0] == what for line in said) for what in ("pushed", "removing", "fenced", "stopped")})
    if how == "killed":
        assert crowd.kills > seconds
    else:
        assert crowd.kills == 0 and sum(line[0] == "stopped" for line in said) >= crowd.stops >= seconds // 30
    with place.open() as registry:
        _check(registry, ledger)


def _check(registry: loreg.Registry, ledger: Ledger) -> None:
    said = ledger.lines()
    pushes = {(name, int(number)) for what, name, number in said if what == "pushed"}
    # Of one that was killed in between, the removal may have been made or not.
    kept = {(name, number) for name, number in pushes if _last(said, name, number) == "pushed"}
    assert sum(what == "pushed" for what, *_ in said) > PUSHERS
    for name, number in kept:
        registry.resolve(f"{name}:v{number}")
    with registry.database.write() as session:  # those of the killed, as if their time were over
        session.connection().exec_driver_sql("DELETE FROM leases")
    registry.collect(grace=timedelta())
    needed = set()
    for row in registry.list_versions(all_versions=True):
        manifest = registry.resolve(f"{row.name}:v{row.number}").manifest
        needed |= {row.digest, *(blob.digest for blob in manifest.blobs)}
        for blob in manifest.blobs:
            registry.storage.read(blob.digest)
    needed |= {row.manifest for row in registry.list_bases()}
    found = [key.digest for key in registry.storage.store.keys()]  # noqa: SIM118 - not a dict
    assert set(found) == needed and len(found) == len(needed)
    assert os.listdir(registry.home / "tmp") == []


def _last(said: list[list[str]], name: str, number: int) -> str:
    return [what for what, *which in said if which == [name, str(number)]][-1]
