"""The real command line on a disk that has no room: an exit code, the reason, and nothing under the output's name."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import engine_servers
import numpy as np
import pytest
import tiny
from places import small_disk

import loreg
from loreg.errors import CheckFailed, UsageError


@pytest.fixture
def merged(registry: loreg.Registry, tmp_path: Path) -> Path:
    """A merged model of 12 MB in three shards, with its journal; its base and its adapter are registered."""
    words = np.random.default_rng(0).integers(0x3C00, 0x3F80, (1024, 1024), dtype=np.uint16)
    model = {f"layers.{i}.weight": tiny.Tensor("BF16", words.shape, words.tobytes()) for i in range(6)}
    names = sorted(model)
    base = tiny.write_model(tmp_path / "base", model, shards=[names[part::3] for part in range(3)])
    factors = tiny.factors(np.random.default_rng(1), *words.shape, 4, std=0.01)
    registry.push(tiny.write_adapter(tmp_path / "sql", {"layers.0": factors}), base=base, name="sql")
    return registry.merge("sql", tmp_path / "merged", undo=True, verify="none").out


def _said(registry: loreg.Registry, *words: object) -> str:
    """What a command says that fails as a disk makes it fail."""
    command = [sys.executable, "-m", "loreg.cli", *map(str, words), "--home", str(registry.home)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == CheckFailed.exit_code, done
    assert "Traceback" not in done.stderr and done.stdout == ""
    return " ".join(done.stderr.split())


def test_merge(registry: loreg.Registry, merged: Path, tmp_path: Path) -> None:
    """Where it cannot fit, before anything is written; where room for another file ends, after two."""
    with small_disk(tmp_path / "small", "size=8m") as disk:
        said = _said(registry, "merge", "--apply", "sql", "--out", disk / "out", "--undo")
        assert "bytes free, and the merge writes" in said and list(disk.iterdir()) == []
    # Itself, the directory, two shards: the third is one too many, and no look at the free bytes foresees it.
    with small_disk(tmp_path / "few", "size=64m,nr_inodes=4") as disk:
        said = _said(registry, "merge", "--apply", "sql", "--out", disk / "out", "--undo")
        assert "No space left on device" in said and list(disk.iterdir()) == []


@pytest.mark.parametrize("way", ["--journal", "--base"])
def test_unmerge(registry: loreg.Registry, merged: Path, tmp_path: Path, way: str) -> None:
    """In the middle of a shard."""
    with small_disk(tmp_path / "small", "size=8m") as disk:
        given = [way] if way == "--journal" else [way, tmp_path / "base"]
        said = _said(registry, "unmerge", merged, "--out", disk / "out", *given)
        assert "No space left on device" in said and list(disk.iterdir()) == []


WORDS = (["ls"], ["show", "sql"], ["rm", "sql"], ["gc"], ["fsck"], ["push", "sql", "--base", "base"])


@pytest.mark.parametrize("left", [0, 1, 8, 9])
def test_whatever_a_registry_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: int) -> None:
    """To read, too, needs room, for the index of SQLite's log; the advice is never to restore a backup. ``left``: so
    many pages."""
    model = {"layers.0.weight": tiny.Tensor("F32", (8, 8), bytes(256))}
    base = tiny.write_model(tmp_path / "base", model)
    factors = tiny.factors(np.random.default_rng(1), 8, 8, 2, std=0.01)
    adapter = tiny.write_adapter(tmp_path / "sql", {"layers.0": factors})
    monkeypatch.chdir(tmp_path)
    with small_disk(tmp_path / "small", "size=4m") as disk:
        with loreg.open(disk / "home") as registry:
            registry.push(adapter, base=base, name="sql")
        with open(disk / "filled", "wb", buffering=0) as file, suppress(OSError):
            while file.write(bytes(4096)):
                pass
        os.truncate(disk / "filled", (disk / "filled").stat().st_size - 4096 * left)
        told = 0
        for words in WORDS:
            command = [sys.executable, "-m", "loreg.cli", *words, "--home", str(registry.home)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=120)
            if done.returncode:
                told += 1
                assert done.returncode == CheckFailed.exit_code, done
                assert "free some space" in done.stderr and "backup" not in done.stderr, done.stderr
        assert told >= (len(WORDS) if not left else 1)
        (disk / "filled").unlink()
        with loreg.open(registry.home) as registry:
            assert registry.fsck().ok


def test_a_new_registry(tmp_path: Path) -> None:
    with small_disk(tmp_path / "small", "size=64k") as disk:
        with pytest.raises(CheckFailed, match="free some space"):
            loreg.open(disk / "home")
        assert not list((disk / "home").glob("*"))
    few = small_disk(tmp_path / "few", "size=4m,nr_inodes=2")
    with few as disk, pytest.raises(CheckFailed, match="No space left on device; free some space"):
        loreg.open(disk / "home")
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="Not a directory; choose another place"):
        loreg.open(tmp_path / "file" / "home")


def test_serve_push(pushed: loreg.Registry) -> None:
    """No room for the file that says that the directory is held: the engine is not told of it."""
    # There is an inode for the lock, for each file of the directory and for its record, and no more.
    with engine_servers.serving(engine_servers.VLLM()) as engine:
        with small_disk(pushed.home / "serving", "size=8m,nr_inodes=7") as disk:
            said = _said(pushed, "serve-push", "sql", "--engine", "vllm", "--url", engine.url)
            assert ".hold cannot be written: No space left on device" in said
            assert sorted(path.suffix for path in disk.iterdir()) == ["", ".record"]
        assert engine.asked == []
