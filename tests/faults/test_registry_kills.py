"""kill -9 at random instants of those who push, tag, remove, restore, collect and repair: what was done stays done.

And of the real command: pushed again it is the same version, and what the killed one left a collection takes away.
"""

from __future__ import annotations

import json
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import store_world
import tiny
from forks import forks
from options import counts
from places import in_memory

import loreg

KILLS = counts(500)
"""Of each of the two seeds: 1,000 in all."""


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", [1, 2])
def test_what_was_said_to_be_done_is_done(tmp_path: Path, seed: int) -> None:
    with in_memory(tmp_path / "cycles") as root:
        store_world.inputs(root)
        with forks(root, root, "store_server.py") as server:
            job = {"command": "cycles", "root": root, "place": root / "place", "kills": KILLS, "seed": seed}
            told = server(job)
    print(told)
    assert "failed" not in told, told["failed"]
    assert told["kills"] >= KILLS and told["seen"]["read all"] >= KILLS // 60
    # Else the kills came between the steps, and this has shown nothing.
    inside = sum(count for step, count in told["seen"].items() if step not in ("opening", "read all"))
    assert inside > KILLS // 2 and len(told["seen"]) > 5, told["seen"]


RANK = 300_000
"""So that a push writes for some tens of milliseconds."""


def _pushing(home: Path, root: Path, *more: str) -> list[str]:
    words = [
        "push",
        root / "adapter",
        "--base",
        "base",
        "--name",
        "sql",
        "--tag",
        "prod",
        "--json",
        "--home",
        home,
        *more,
    ]
    return [sys.executable, "-m", "loreg.cli", *map(str, words)]


def _said(command: list[str]) -> dict[str, Any]:
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done
    return dict(json.loads(done.stdout))


def _began_to_write(home: Path) -> bool:
    return any((home / "tmp").glob("*"))


def _has_a_new_blob(home: Path) -> bool:
    return len(list((home / "blobs").glob("*/*"))) > 1  # beside the manifest of the base


def _has_a_lease(home: Path) -> bool:
    return (home / "catalog.db-wal").exists() and (home / "catalog.db-wal").stat().st_size > 30_000


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_command(tmp_path: Path) -> None:
    """Killed as it begins, when it has its lease, as it writes a blob, when it has one; then pushed again."""
    with in_memory(tmp_path / "cli") as root:
        base = tiny.write_model(root / "base", tiny.model())
        tiny.write_adapter(root / "adapter", tiny.adapter(rank=RANK))
        with loreg.open(root / "expected") as registry:
            expected = registry.push(root / "adapter", base=base, name="sql").digest
            registry.collect()
            needed = len(list((registry.home / "blobs").glob("*/*")))
        stages: list[Callable[[Path], bool]] = [_has_a_lease, _began_to_write, _has_a_new_blob]
        left = 0
        for number, reached in enumerate([*stages, _began_to_write]):
            home = root / f"home{number}"
            with loreg.open(home) as registry:
                registry.add_base(base, "base")
            with subprocess.Popen(_pushing(home, root), stdout=subprocess.PIPE, text=True) as process:
                while not reached(home) and process.poll() is None:
                    time.sleep(0.0005)
                time.sleep(random.Random(number).random() * 0.02)
                process.kill()
                acknowledged = process.communicate()[0]
            if process.returncode == -signal.SIGKILL:
                left += _began_to_write(home) or _has_a_new_blob(home)
            said = _said(_pushing(home, root))
            assert said["digest"] == str(expected) and said["version"] == 1
            assert not acknowledged or not said["created"]
            with closing(sqlite3.connect(home / "catalog.db")) as raw, raw:
                raw.execute("UPDATE leases SET expires_at = 1")  # as if the hour of those that were killed were over
            _said([sys.executable, "-m", "loreg.cli", "gc", "--json", "--home", str(home)])
            with loreg.open(home) as registry:
                assert registry.fsck().ok
            assert len(list((home / "blobs").glob("*/*"))) == needed and not _began_to_write(home)
        assert left, "no kill left anything, and this has shown nothing"
