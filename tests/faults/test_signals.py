"""The real command line under signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tiny

import loreg


@pytest.fixture
def large(registry: loreg.Registry, tmp_path: Path) -> loreg.Registry:
    """A base of 25 MB in three shards, every tensor of which is touched: time enough to be met."""
    rng = np.random.default_rng(0)
    words = rng.integers(0x3C00, 0x3F80, (1024, 1024), dtype=np.uint16)
    model = {f"layers.{i}.weight": tiny.Tensor("BF16", words.shape, words.tobytes()) for i in range(12)}
    names = sorted(model)
    base = tiny.write_model(tmp_path / "base", model, shards=[names[part::3] for part in range(3)])
    factors = tiny.factors(rng, *words.shape, 16, std=0.01)
    registry.push(tiny.write_adapter(tmp_path / "sql", {f"layers.{i}": factors for i in range(12)}), base=base)
    return registry


def _merge(registry: loreg.Registry, out: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "loreg.cli", "merge", "--apply", "sql", "--out", str(out), "--undo"]
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # also where the suite runs in the background
    return subprocess.Popen(
        [*command, "--home", str(registry.home)], stdout=-1, stderr=-1, text=True, preexec_fn=heard
    )


def test_interrupted_and_terminated(large: loreg.Registry, tmp_path: Path) -> None:
    """Ctrl-C leaves nothing; SIGTERM, which is no request to tidy up, what the same command goes on from."""
    place = tmp_path / "place"
    place.mkdir()
    for number in (signal.SIGINT, signal.SIGTERM):
        with _merge(large, place / "out") as running:
            while running.poll() is None and not any(place.glob(".out.*/*.safetensors")):
                time.sleep(0.002)
            os.kill(running.pid, number)
            _, said = running.communicate(timeout=120)
        assert not (place / "out").exists()
        if number == signal.SIGINT:
            assert running.returncode == 130 and "interrupted" in said and "Traceback" not in said
            assert list(place.iterdir()) == []
        else:
            assert running.returncode == -signal.SIGTERM
            assert [path.suffix for path in place.iterdir()] == [".partial"]
    with _merge(large, place / "out") as running:
        _, said = running.communicate(timeout=120)
    assert running.returncode == 0, said
    assert [path.name for path in place.iterdir()] == ["out"] and large.verify(place / "out").ok
