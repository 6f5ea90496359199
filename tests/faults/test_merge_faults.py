"""A merge that is killed, interrupted, refused by the disk or raced: a whole result under its name, or nothing."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from places import small_disk

import loreg
from loreg.errors import BadInput, CheckFailed, Conflict

NAMES = list(tiny.model())
# Processes are forked from a server that has imported everything: importing torch takes longer than merging. Not
# from this process, whose threads a fork would lose.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["loreg.registry.merging", "loreg.merge.output", "loreg.catalog"])


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith(".out"))


class Merging:
    """A merge in a process of its own, which is about to begin."""

    def __init__(self, registry: loreg.Registry, expression: str, out: Path) -> None:
        self._ours, theirs = SERVER.Pipe(duplex=False)
        self.process = SERVER.Process(target=_merge, args=(theirs, registry.home, expression, out), daemon=True)
        self.process.start()
        theirs.close()
        assert self._ours.recv() == "ready"

    def outcome(self) -> str:
        """What became of it: the root of the weights, the name of the exception, or nothing if it was killed."""
        self.process.join()
        try:
            found: str = self._ours.recv()
        except EOFError:
            return ""
        return found


def _merge(pipe: Any, home: Path, expression: str, out: Path) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job inherits a shell's "ignore"
    try:
        with loreg.open(home) as registry:
            pipe.send("ready")
            pipe.send(str(registry.merge(expression, out).weights_root))
    except BaseException as error:
        pipe.send(type(error).__name__)


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[loreg.Registry, Path]]:
    """A base of 64 MB, so that a merge takes long enough to be hit, and an adapter for a quarter of it."""
    root = tmp_path_factory.mktemp("big")
    rng = np.random.default_rng(0)
    words = rng.integers(0x3C00, 0x3F80, (2048, 1024), dtype=np.uint16)
    model = {f"layers.{i}.weight": tiny.Tensor("BF16", words.shape, np.roll(words, i).tobytes()) for i in range(16)}
    names = list(model)
    base = tiny.write_model(root / "base", model, shards=[names[:8], names[8:]])
    factors = tiny.factors(rng, *words.shape, 8)
    with loreg.open(root / "home") as registry:
        registry.push(tiny.write_adapter(root / "sql", {f"layers.{i}": factors for i in range(4)}), base=base)
        yield registry, root


def test_a_merge_that_is_interrupted_leaves_nothing(big: tuple[loreg.Registry, Path], tmp_path: Path) -> None:
    registry, _ = big
    out = tmp_path / "out"
    merging = Merging(registry, "sql", out)
    while merging.process.is_alive() and not any(tmp_path.glob(".out.*/*.safetensors")):
        time.sleep(0.001)
    pid = merging.process.pid
    assert pid is not None
    os.kill(pid, signal.SIGINT)
    assert merging.outcome() == "KeyboardInterrupt"
    assert list(tmp_path.iterdir()) == []


def test_two_processes_at_one_output_end_with_one_whole_result(
    big: tuple[loreg.Registry, Path], tmp_path: Path
) -> None:
    registry, _ = big
    out = tmp_path / "out"
    mergings = [Merging(registry, expression, out) for expression in ("sql", "sql", "2*sql")]
    outcomes = sorted(merging.outcome() for merging in mergings)
    assert outcomes[:2] == ["Conflict", "Conflict"] and outcomes[2].startswith("blake3:")
    assert registry.verify(out).ok
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_second_merge_at_the_same_work_is_refused_and_does_not_disturb_the_first(
    pushed: loreg.Registry, tmp_path: Path
) -> None:
    results: list[Any] = []
    go, hold = threading.Event(), threading.Event()

    def slow(label: str, total: int) -> Callable[[int], None]:
        def advance(done: int) -> None:
            if label == "merging" and not hold.is_set():
                hold.set()
                assert go.wait(60)

        return advance

    first = threading.Thread(target=lambda: results.append(pushed.merge("sql", tmp_path / "out", progress=slow)))
    first.start()
    assert hold.wait(60)
    with pytest.raises(Conflict, match="Another process is writing"):
        pushed.merge("sql", tmp_path / "out")
    go.set()
    first.join()
    assert results[0].verification.ok
    assert leftovers(tmp_path) == []


def test_an_output_that_appears_meanwhile_is_not_overwritten(pushed: loreg.Registry, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def progress(label: str, total: int) -> Callable[[int], None]:
        if label == "verifying":
            out.mkdir()
            (out / "precious").write_text("mine")
        return lambda done: None

    with pytest.raises(Conflict, match="was written by another process meanwhile"):
        pushed.merge("sql", out, progress=progress)
    assert tiny.files_in(out) == {"precious": b"mine"}
    assert leftovers(tmp_path) == []


# What the disk says


CALLS = ("open", "pwrite", "ftruncate", "copy_file_range", "fsync", "preadv", "rename", "mkdir")


class Faulty:
    """``os.NAME`` that fails at its ``at``-th call, and counts."""

    def __init__(self, name: str, at: int, code: int) -> None:
        self.real, self.at, self.code, self.calls = getattr(os, name), at, code, 0

    def __call__(self, *args: Any, **options: Any) -> Any:
        self.calls += 1
        if self.calls == self.at:
            raise OSError(self.code, os.strerror(self.code))
        return self.real(*args, **options)


@pytest.fixture
def ready(pushed: loreg.Registry, tmp_path: Path) -> Callable[[], loreg.Registry]:
    """A merge of a sharded base that has run once: all is looked up, and only base and output are touched again."""
    names = [NAMES[:3], NAMES[3:]]
    base = tiny.write_model(tmp_path / "sharded", tiny.model(), shards=names)
    pushed.push(tmp_path / "sql", base=base, name="faulty")

    def run() -> loreg.Registry:
        pushed.merge("faulty", tmp_path / "out", base=base)
        return pushed

    run()
    return run


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
@pytest.mark.parametrize("name", CALLS)
def test_every_refusal_of_the_disk_is_typed_and_leaves_nothing(
    ready: Callable[[], loreg.Registry], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, code: int
) -> None:
    expected = tiny.files_in(tmp_path / "out")
    refused, at = 0, 0
    while True:
        at += 1
        for path in (tmp_path / "out").iterdir() if (tmp_path / "out").exists() else ():
            path.unlink()
        with monkeypatch.context() as patch:
            fault = Faulty(name, at, code)
            patch.setattr(os, name, fault)
            try:
                ready()
            except (CheckFailed, BadInput) as error:
                refused += 1
                assert os.strerror(code) in str(error)
                assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())
            else:  # past the last call, or a failure that could be got round
                assert tiny.files_in(tmp_path / "out") == expected
        assert leftovers(tmp_path) == []
        if fault.calls < at:
            break
    # Where a copy inside the kernel fails, the bytes are read and written: then it is known which of the two it was.
    assert refused >= 1 or (name, code) == ("copy_file_range", errno.EIO)


@pytest.mark.parametrize("code", [errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM])
@pytest.mark.parametrize("at", [1, 2])
def test_without_copy_file_range_the_bytes_are_the_same(
    ready: Callable[[], loreg.Registry], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, at: int
) -> None:
    expected = tiny.files_in(tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "first")
    real, calls = os.copy_file_range, 0

    def refusing(source: int, target: int, count: int, *offsets: int) -> int:
        nonlocal calls
        calls += 1
        if calls >= at:
            raise OSError(code, os.strerror(code))
        return real(source, target, min(count, 5), *offsets)  # a short copy, and then none

    monkeypatch.setattr(os, "copy_file_range", refusing)
    ready()
    assert calls >= at
    assert tiny.files_in(tmp_path / "out") == expected


def test_short_reads_and_writes_are_continued(
    ready: Callable[[], loreg.Registry], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = tiny.files_in(tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "first")
    read, write, copy = os.preadv, os.pwrite, os.copy_file_range
    monkeypatch.setattr(os, "preadv", lambda fd, into, offset: read(fd, [into[0][:3]], offset))
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: write(fd, data[:3], offset))
    monkeypatch.setattr(os, "copy_file_range", lambda a, b, n, *offsets: copy(a, b, min(n, 3), *offsets))
    ready()
    assert tiny.files_in(tmp_path / "out") == expected


def test_a_file_system_that_is_full(pushed: loreg.Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with small_disk(tmp_path / "disk", "size=8m") as disk:
        with pytest.raises(CheckFailed, match="bytes free, and the merge writes"):
            pushed.merge("sql", disk / "out")
        assert list(disk.iterdir()) == []
        # The room goes between the look and the writing, as it does when others write too.
        monkeypatch.setattr("loreg.merge.output.check_space", lambda plan, folder: None)
        (disk / "others").write_bytes(bytes(8 << 20))
        for write in (
            lambda: pushed.merge("sql", disk / "out"),
            lambda: pushed.export("sql", disk / "out"),
            lambda: pushed.unmerge(pushed.merge("sql", tmp_path / "out").out, disk / "out"),
        ):
            with pytest.raises(CheckFailed, match="No space left on device; free some space"):
                write()
            assert [path.name for path in disk.iterdir()] == ["others"]
        (disk / "others").unlink()
        pushed.merge("humor", disk / "out")


@pytest.mark.parametrize("name", ["pwrite", "ftruncate", "copy_file_range", "fsync", "preadv", "rename"])
def test_an_interrupt_at_any_call_leaves_nothing(
    ready: Callable[[], loreg.Registry], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    real = getattr(os, name)
    for at in (1, 2):
        (tmp_path / "out").rename(tmp_path / f"before {at}") if (tmp_path / "out").exists() else None
        calls = 0

        def interrupted(*args: Any, at: int = at, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == at:
                raise KeyboardInterrupt
            return real(*args, **options)

        with monkeypatch.context() as patch:
            patch.setattr(os, name, interrupted)
            with pytest.raises(KeyboardInterrupt):
                ready()
        assert not (tmp_path / "out").exists()
        assert leftovers(tmp_path) == []


def test_a_killed_merge_of_another_recipe_does_not_stand_in_the_way(pushed: loreg.Registry, tmp_path: Path) -> None:
    stale = tmp_path / ".out.0123456789ab.partial"
    stale.mkdir()
    (stale / "model.safetensors").write_bytes(b"half")
    digest = pushed.merge("sql", tmp_path / "reference").recipe
    mine = tmp_path / f".out.{digest.short}.partial"
    (mine / "deep").mkdir(parents=True)
    (mine / "deep/file").write_text("x")
    (mine / "model.safetensors").write_bytes(b"half")
    (mine / "link").symlink_to(tmp_path / "base")
    pushed.merge("sql", tmp_path / "out")
    assert tiny.files_in(tmp_path / "out") == tiny.files_in(tmp_path / "reference")
    assert (tmp_path / "base/config.json").exists()
    assert not mine.exists()
