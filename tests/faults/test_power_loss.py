"""The power fails at any instant: what was acknowledged by then is there, and nothing is half there.

A registry lives while every call that changes the disk is written down, SQLite's among them. Then disks are made as a
loss of power could leave them (``power_loss.py``), and opened. Weaker programs, that leave out one of the calls that
make something safe, lose versions on such disks: else these would show nothing.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import power_loss
import pytest
import store_jobs
import store_world
from forks import Forks, forks
from options import counts
from places import in_memory
from power_loss import Disk, Image, Step
from statements import compiled_once

import loreg

IMAGES = counts(500)
"""Of each life in each model: 2,000 in all."""
EMPTY = {"versions": [], "trash": [], "tags": {}}
EXTREMES = ((0.0, 0.0), (1.0, 1.0), (1.0, 0.0), (0.0, 1.0))
"""Nothing that was not synced is there; all; all names but no bytes; all bytes but no names."""


@dataclass
class Record:
    """``there``: what was on the disk before the first step. ``lost``: what is amiss in it anyway."""

    top: Path
    there: list[tuple[str, int, bytes | None]]
    steps: list[Step]
    lost: set[str]

    def says(self) -> list[dict[str, Any]]:
        return [json.loads(step.path) for step in self.steps if step.kind == "m"]


class Recorder:
    def __init__(self, root: Path, server: Forks) -> None:
        self.root, self._server = root, server

    def __call__(self, life: str, **options: str) -> Record:
        place, record = self.root / "place", self.root / "record"
        shutil.rmtree(place, ignore_errors=True)
        record.unlink(missing_ok=True)
        (store_world.nothing if life == "life" else store_world.old)(self.root, place)
        there = [(str(path), path.stat().st_ino, None if path.is_dir() else path.read_bytes())
                 for path in sorted(place.rglob("*"))]  # fmt: skip
        job = {"command": "record", "life": life, "root": self.root, "place": place, "record": record, **options}
        told = self._server(job)
        assert not told["killed"] and "failed" not in told, told
        steps, disk = power_loss.parse(record.read_bytes()), Disk(place, there)
        for step in steps:
            disk.do(step)
        assert disk.now() == _read(place), "the record does not say all that was done"
        with loreg.open(place / "home") as registry:
            lost = {what for _, what in store_jobs.problems(registry)}
        return Record(place, there, steps, lost)


@pytest.fixture(scope="module")
def recorder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recorder]:
    with in_memory(tmp_path_factory.mktemp("power")) as root:
        store_world.inputs(root)
        with forks(root, root, "store_server.py") as server:
            if not server.shim:
                pytest.skip("there is no C compiler to make what stands before the C library")
            with compiled_once():
                yield Recorder(root, server)


class Looker:
    """Opens disks. One that is as another was, once its log is in the catalog, is not looked at again."""

    def __init__(self, folder: Path, lost: set[str]) -> None:
        self._place, self._lost = folder, lost
        self._known: dict[bytes, Any] = {}

    def __call__(self, image: Image) -> Any:
        """What it shows; or what is wrong with it, as a string."""
        key = _key(image)
        if key not in self._known:
            self._make(image)
            try:
                loreg.open(self._place / "home").close()
                opened = _key(_kept(self._place))
                if opened not in self._known:
                    self._known[opened] = self._look()
                self._known[key] = self._known[opened]
            except Exception as error:
                self._known[key] = f"{type(error).__name__}: {error}"
        return self._known[key]

    def _look(self) -> Any:
        with loreg.open(self._place / "home") as registry:
            damaged = set(store_jobs.damage(registry.home)) - self._lost
            problems = [problem for problem in store_jobs.problems(registry) if problem[1] not in self._lost]
            if damaged or problems:
                return f"damaged: {sorted(damaged)}, fsck: {problems}"
            if not all(store_jobs.is_backup(path) for path in registry.home.glob("*.bak")):
                return "a backup is none"
            shown = store_jobs.shown(registry)
            for name, number, digest, _ in shown["versions"]:
                if digest not in self._lost:
                    assert str(registry.resolve(f"{name}:v{number}").digest) == digest
            return shown

    def _make(self, image: Image) -> None:
        shutil.rmtree(self._place, ignore_errors=True)
        self._place.mkdir()
        for path, data in image.items():
            if data is None:
                (self._place / path).mkdir()
            elif not path.endswith("-shm"):  # an index that SQLite makes anew
                (self._place / path).write_bytes(data)


def _read(place: Path) -> Image:
    paths = sorted(place.rglob("*"))
    return {str(path.relative_to(place)): path.read_bytes() if path.is_file() else None for path in paths}


def _kept(place: Path) -> Image:
    """All but what nothing reads any more: what was being written, and did not come to its name."""
    left = re.compile(r"home/tmp/|.*\.partial$|.*\.new(-|$)")
    return {name: data for name, data in _read(place).items() if not left.match(name)}


def _key(image: Image) -> bytes:
    hasher = hashlib.sha256()
    for path, data in sorted(image.items()):
        hasher.update(f"{path}\0{-1 if data is None else len(data)}\0".encode() + (data or b""))
    return hasher.digest()


def cuts(record: Record, number: int, seed: int) -> list[tuple[int, int, float, float]]:
    """After how many steps the power fails, the seed of the image, and the chances of names and bytes."""
    marks = [at for at, step in enumerate(record.steps, 1) if step.kind == "m"]
    chance = random.Random(seed)
    chosen = [(at, number, *extreme) for number, at in enumerate(marks) for extreme in EXTREMES]
    for _ in range(number - len(chosen)):
        names, data = chance.choice([0.1, 0.5, 0.9]), chance.choice([0.1, 0.5, 0.9])
        names, data = chance.choice([(names, data), (names, data), *EXTREMES])
        chosen.append((chance.randint(1, len(record.steps)), chance.randrange(1 << 32), names, data))
    return sorted(chosen)


def losses(record: Record, model: str, folder: Path, number: int = 0) -> tuple[list[str], Counter[str]]:
    """What is wrong with so many images, the extremes at the acknowledgements always among them; and counts."""
    disk, look, done, acknowledged = Disk(record.top, record.there), Looker(folder, record.lost), 0, 0
    says, wrong, seen = record.says(), [], Counter[str]()
    states = [says[0] if record.there else EMPTY, *says]
    for at, seed, names, data in cuts(record, number, 9):
        for step in record.steps[done:at]:
            disk.do(step)
            acknowledged += step.kind == "m"
        done = at
        found = look(power_loss.MODELS[model](disk, random.Random(seed), names, data).image())
        if found not in states[acknowledged : acknowledged + 2]:
            wrong.append(
                f"power lost after step {at} ({record.steps[at - 1]}), seed {seed}, {names}, {data}: {found}"
            )
        seen["after" if found == states[min(acknowledged + 1, len(says))] else "before"] += 1
    seen["different"] = len(look._known)
    return wrong, seen


WEAKER = {
    "the bytes of a blob": ("life", r"home/tmp/"),
    "the name of a blob": ("life", r"home/blobs/[0-9a-f]{2}$"),
    "the name of a directory of blobs": ("life", r"home/blobs$"),
    "the log of the catalog": ("life", r"home/catalog\.db-wal$"),
    "the catalog, before its log is written from its start again": ("life", r"home/catalog\.db$"),
    "the name of the catalog": ("life", r"home$"),
    "the name of the home": ("life", r"place$"),
    "the bytes of a backup": ("upgrade", r"\.partial$"),
}
"""What is not synced, and the life in which that loses something."""


@pytest.mark.parametrize("left_out", WEAKER)
def test_a_sync_that_is_left_out_is_found(recorder: Recorder, left_out: str) -> None:
    life, pattern = WEAKER[left_out]
    record = recorder(life)
    steps = [step for step in record.steps if step.kind != "s" or not re.search(pattern, step.path)]
    assert len(steps) < len(record.steps)
    assert losses(replace(record, steps=steps), "posix", recorder.root / "image")[0]


def test_a_log_that_is_synced_now_and_then_is_found(recorder: Recorder) -> None:
    record = recorder("life", synchronous="NORMAL")
    for model in power_loss.MODELS:
        assert losses(record, model, recorder.root / "image")[0], model


@pytest.mark.slow
@pytest.mark.parametrize("model", power_loss.MODELS)
@pytest.mark.parametrize("life", ["life", "upgrade"])
def test_nothing_acknowledged_is_lost(recorder: Recorder, tmp_path: Path, life: str, model: str) -> None:
    record = recorder(life)
    wrong, seen = losses(record, model, recorder.root / "image", IMAGES)
    kinds = Counter(step.kind for step in record.steps)
    print(life, model, len(record.steps), "steps", dict(kinds), IMAGES, "images", dict(seen))
    assert not wrong, (len(wrong), wrong[:3])
