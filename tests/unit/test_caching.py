"""``serving.Cache``: what is used stays, what was used longest ago leaves, and no tier holds more than it may."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from concurrent.futures import Future
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

import loreg
from loreg import serving
from loreg.errors import CheckFailed, NotFound, UsageError
from loreg.serving import directories
from loreg.serving.tiers import Tier

NAMES = [f"a{seed}" for seed in range(3, 8)]


@pytest.fixture
def many(pushed: loreg.Registry, tmp_path: Path) -> list[str]:
    for seed, name in enumerate(NAMES, 3):
        pushed.push(tiny.write_adapter(tmp_path / name, tiny.adapter(seed=seed)), base="base", name=name)
    return NAMES


def size_of(registry: loreg.Registry, name: str) -> int:
    return sum(A.nbytes + B.nbytes for A, B, _ in serving.load(name, registry).values())


def same(one: Any, other: Any) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(A, other[path][0]) and torch.equal(B, other[path][1]) and scale == other[path][2]
        for path, (A, B, scale) in one.items()
    )


# ---- one tier ----


class Machine(RuleBasedStateMachine):
    """Against a dict in the order of last use."""

    LIMIT = 10

    def __init__(self) -> None:
        super().__init__()
        self.tier: Tier[str] = Tier("cpu", self.LIMIT)
        self.model: OrderedDict[int, list[int]] = OrderedDict()  # key → [bytes, users]
        self.hits = self.misses = self.evicted = 0

    def _leaving(self, nbytes: int) -> list[int] | None:
        """By the model: who leaves for so many bytes; None if there is no room."""
        left, leaving = sum(size for size, _ in self.model.values()), []
        for key, (size, users) in self.model.items():
            if left + nbytes <= self.LIMIT:
                break
            if not users:
                leaving.append(key)
                left -= size
        return leaving if left + nbytes <= self.LIMIT else None

    @rule(key=st.integers(0, 6), fails=st.booleans())
    def acquire(self, key: int, fails: bool) -> None:
        nbytes = key + 1

        def make() -> str:
            if fails:
                raise NotFound("no")
            return str(key)

        if key in self.model:
            assert self.tier.acquire(key, "it", lambda: nbytes, make) == str(key)
            self.model.move_to_end(key)
            self.model[key][1] += 1
            self.hits += 1
            return
        leaving = self._leaving(nbytes)
        if leaving is None:
            with pytest.raises(CheckFailed, match=f"it needs {nbytes} bytes of cpu, of which 10 are allowed"):
                self.tier.acquire(key, "it", lambda: nbytes, make)
            return
        for gone in leaving:
            del self.model[gone]
            self.evicted += 1
        self.misses += 1
        if fails:
            with pytest.raises(NotFound):
                self.tier.acquire(key, "it", lambda: nbytes, make)
            return
        assert self.tier.acquire(key, "it", lambda: nbytes, make) == str(key)
        self.model[key] = [nbytes, 1]

    @precondition(lambda self: any(users for _, users in self.model.values()))
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from([key for key, (_, users) in self.model.items() if users]))
        self.tier.release(key)
        self.model[key][1] -= 1

    @invariant()
    def same(self) -> None:
        found = self.tier.statistics
        nbytes = sum(size for size, _ in self.model.values())
        used = sum(bool(users) for _, users in self.model.values())
        assert (found.entries, found.nbytes, found.used) == (len(self.model), nbytes, used)
        assert (found.hits, found.misses, found.evictions) == (self.hits, self.misses, self.evicted)
        assert nbytes <= self.LIMIT
        assert all(self.tier.peek(key) == (str(key) if key in self.model else None) for key in range(7))


Machine.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestTier = Machine.TestCase


def test_what_several_ask_for_is_made_once() -> None:
    tier: Tier[int] = Tier("cpu", None)
    made, found = [0], list[int]()
    begun = threading.Event()

    def make() -> int:
        made[0] += 1
        begun.set()
        time.sleep(0.05)
        return 7

    threads = [
        threading.Thread(target=lambda: found.append(tier.acquire(1, "it", lambda: 1, make))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [1] and found == [7] * 8
    assert tier.statistics.used == 1
    for _ in range(8):
        tier.release(1)
    assert tier.statistics.used == 0


# ---- the cache ----


@pytest.mark.parametrize("place", ["cpu", "gpu"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_factors_within_a_limit(
    pushed: loreg.Registry, many: list[str], place: Any, dtype: torch.dtype | None
) -> None:
    if place == "cpu" and dtype is not None:
        dtype = None  # which only the device has
    expected = {name: serving.load(name, pushed, dtype=dtype) for name in many}
    size = sum(A.nbytes + B.nbytes for A, B, _ in expected[many[0]].values())
    limits: dict[str, Any] = {place: 2 * size, "device": "cpu", "dtype": dtype}
    with serving.Cache(pushed, **limits) as cache:
        for name in many:
            with cache.factors(name, place) as found:
                assert same(found, expected[name])
        assert cache.statistics()[place] == serving.Statistics(2, 2 * size, 2 * size, 0, 0, 5, 3)
        with cache.factors(many[-1], place) as one, cache.factors(many[-1], place) as two:
            assert one is two
            assert cache.statistics()[place].used == 1
        assert cache.statistics()[place].hits == 2


def test_what_is_in_use_stays_and_no_more_comes(pushed: loreg.Registry, many: list[str]) -> None:
    size = size_of(pushed, many[0])
    with serving.Cache(pushed, cpu=2 * size) as cache:
        first = cache.pin(many[0], "cpu")
        refused = pytest.raises(CheckFailed, match=rf"{many[2]}:v1 needs .* bytes of cpu.* in use")
        with cache.factors(many[1]), refused:
            cache.pin(many[2], "cpu")
        with cache.pin(many[2], "cpu"):
            pass
        assert cache.statistics()["cpu"].entries == 2
        first.close()
        first.close()
        with cache.factors(many[3]), cache.factors(many[4]):
            pass
        assert cache.statistics()["cpu"].used == 0


def test_one_that_is_removed_while_it_is_pinned_stays(pushed: loreg.Registry, tmp_path: Path) -> None:
    expected = serving.load("sql", pushed, dtype=torch.float32)
    with serving.Cache(pushed, root=tmp_path / "served", spared=0) as cache:
        pin, directory = cache.pin("sql", "cpu"), cache.pin("sql", "disk")
        pushed.remove("sql:v1")
        assert pushed.collect(grace=timedelta(0)).copies
        with pytest.raises(NotFound):
            cache.pin("sql", "cpu")
        assert isinstance(pin.value, dict) and same(pin.value, expected)
        assert isinstance(directory.value, serving.Resolved)
        assert set(tiny.files_in(directory.value.path)) >= {"adapter_config.json", "adapter_model.safetensors"}


def test_a_tag_that_moves_is_another_entry(pushed: loreg.Registry, tmp_path: Path) -> None:
    with serving.Cache(pushed) as cache, cache.factors("sql") as before:
        other = tiny.write_adapter(tmp_path / "other", tiny.adapter(seed=9))
        pushed.push(other, base="base", name="sql")
        with cache.factors("sql") as after:
            assert not same(before, after)
        with cache.factors("sql:v1") as again:
            assert again is before


def test_what_is_prefetched_is_there(pushed: loreg.Registry, many: list[str]) -> None:
    with serving.Cache(pushed, device="cpu") as cache:
        futures = [*cache.prefetch([*many, "nobody"], "cpu"), *cache.prefetch(many[:2], "gpu")]
        for future in (*futures[:5], *futures[6:]):
            future.result()
        with pytest.raises(NotFound, match="nobody"):
            futures[5].result()
        found = cache.statistics()
        assert (found["cpu"].entries, found["gpu"].entries, found["cpu"].used) == (5, 2, 0)
        with cache.factors(many[0], "gpu"):
            pass
        assert cache.statistics()["gpu"].hits == 1


def test_directories_within_a_limit_of_all_processes(
    pushed: loreg.Registry, many: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(directories, "_NOTED", 0.0)
    size = serving.resolve(many[0], pushed).nbytes
    root = tmp_path / "served"
    holds = f"""
import sys, loreg
from loreg import serving
with loreg.open({str(pushed.home)!r}) as registry, serving.Cache(registry, root={str(root)!r}) as cache:
    with cache.directory({many[0]!r}):
        print("held", flush=True)
        sys.stdin.readline()
"""
    code = holds.replace(f"root={str(root)!r}", f"root=__import__('pathlib').Path({str(root)!r})")
    other = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None and other.stdout.readline() == "held\n"
    with serving.Cache(pushed, disk=2 * size + size // 2, root=root, spared=0) as cache:
        for name in many[1:]:
            cache.resolve(name)
            time.sleep(0.01)
        there = {path.name for path in root.iterdir() if path.is_dir()}
        assert there == {pushed.resolve(name).digest.hex for name in (many[0], many[-1])}
        found = cache.statistics()["disk"]
        assert (found.entries, found.used, found.misses, found.evictions) == (2, 1, 4, 3)
        other.kill()  # as whatever may happen to an engine
        other.wait()
        assert cache.statistics()["disk"].used == 0
        cache.resolve(many[1])
        time.sleep(0.01)
        cache.resolve(many[2])
        assert not (root / pushed.resolve(many[0]).digest.hex).exists()


def test_what_is_larger_than_the_disk_tier_is_refused_before_it_is_made(
    pushed: loreg.Registry, tmp_path: Path
) -> None:
    with serving.Cache(pushed, disk=100, root=tmp_path / "served") as cache:
        with pytest.raises(CheckFailed, match=r"sql:v1 has [\d,]+ bytes, and 100 at most"):
            cache.resolve("sql")
        assert not (tmp_path / "served").exists()


def test_what_makes_no_sense(pushed: loreg.Registry) -> None:
    with pytest.raises(UsageError, match="limit of cpu is -1"):
        serving.Cache(pushed, cpu=-1)
    with serving.Cache(pushed) as cache:
        with pytest.raises(UsageError, match="'tape' holds no factors"):
            cache.pin("sql", "tape")  # type: ignore[arg-type]
        if not torch.cuda.is_available():
            with pytest.raises(NotFound, match="CUDA"):
                cache.pin("sql", "gpu")


def test_what_cannot_be_locked_is_not_tried_for_ever(pushed: loreg.Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a process has no descriptors left, which does not look like a directory that was deleted."""
    real, tried = os.open, [0]
    with serving.Cache(pushed) as cache:
        name = cache.resolve("sql").path.name

        def full(path: Any, *given: Any, **named: Any) -> int:
            if str(path).endswith(name):
                tried[0] += 1
                assert tried[0] < 10
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            return real(path, *given, **named)

        monkeypatch.setattr(os, "open", full)
        with pytest.raises(CheckFailed, match="cannot be opened to be locked: Too many open files"):
            cache.directory("sql").__enter__()


@pytest.mark.parametrize("whose", ["maker", "waiter"])
def test_ctrl_c_is_for_one_thread_alone(whose: str) -> None:
    """And who was interrupted uses nothing."""
    tier, inside, go = Tier[int]("cpu", None), threading.Event(), threading.Event()
    found: list[object] = []

    def slow() -> int:
        inside.set()
        go.wait(20)
        if whose == "maker":
            raise KeyboardInterrupt
        return 1

    def call(make: Any) -> None:
        try:
            found.append(tier.acquire("key", "it", lambda: 1, make))
            tier.release("key")
        except KeyboardInterrupt:
            found.append("interrupted")

    first = threading.Thread(target=call, args=(slow,))
    first.start()
    inside.wait()
    if whose == "waiter":
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Future, "result", lambda _: (_ for _ in ()).throw(KeyboardInterrupt()))
            call(lambda: 2)
    second = threading.Thread(target=call, args=(lambda: 2,))
    second.start()
    time.sleep(0.1)
    go.set()
    first.join()
    second.join()
    assert sorted(found, key=str) == ([2, "interrupted"] if whose == "maker" else [1, 1, "interrupted"])
    assert tier.statistics.used == 0


def test_who_counts_at_once_counts_nobody_else(pushed: loreg.Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory is locked for a moment, here a longer one, by who looks whether it is."""
    serving.resolve("sql", registry=pushed)
    used, start, flock = list[int](), threading.Barrier(4), fcntl.flock

    def slow(lock: int, how: int) -> None:
        flock(lock, how)
        if how & fcntl.LOCK_NB:
            time.sleep(0.005)

    def look() -> None:
        start.wait()
        used.append(directories.Directories(pushed.home / "serving").look()[2])

    monkeypatch.setattr(fcntl, "flock", slow)
    threads = [threading.Thread(target=look) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert used == [0, 0, 0, 0]
