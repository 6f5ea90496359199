"""kill -9 at random instants and at every step: what has the output's name is whole, and the same command ends it.

A fork says when it begins to write, and is killed at an instant drawn over the time that unbroken work takes from
there. --nightly kills ten times as often.
"""

from __future__ import annotations

import random
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from forks import Forks, forks
from options import counts
from places import in_memory

import loreg

TIMES = counts(1)
KILLS = 41 * TIMES
"""Of each of the five verbs at random instants; those at chosen steps come to them."""
VERBS = ("merge", "undo", "many", "journal", "base")
MERGES = {"merge", "undo", "many"}


@dataclass
class World:
    """A registry, a base of six shards, and what each verb gives when nobody kills it."""

    root: Path
    registry: loreg.Registry
    forks: Forks
    jobs: dict[str, dict[str, Any]]
    expected: dict[str, dict[str, dict[str, bytes]]]

    @property
    def place(self) -> Path:
        """Where all outputs go; nothing else is there."""
        return self.root / "place"

    def outs(self, verb: str) -> list[Path]:
        job = self.jobs[verb]
        return [Path(out) for _, out in job["wanted"]] if "wanted" in job else [Path(job["out"])]

    def whole(self, verb: str) -> list[str]:
        """The outputs that are there; each is whole."""
        there = [out for out in self.outs(verb) if out.exists()]
        for out in there:
            assert tiny.files_in(out) == self.expected[verb][out.name], out.name
        return [out.name for out in there]

    def rest(self, verb: str) -> dict[str, Any]:
        """The same command, for the outputs that are not there."""
        job, there = self.jobs[verb], self.whole(verb)
        if "wanted" not in job:
            return job
        return {**job, "wanted": [pair for pair in job["wanted"] if Path(pair[1]).name not in there]}

    def stage(self, verb: str) -> str:
        """How far a killed job came."""
        if self.whole(verb):
            return "renamed" if len(self.whole(verb)) == len(self.outs(verb)) else "one of two renamed"
        left = list(self.place.iterdir())
        if not left:
            return "before"
        if any((folder / "loreg.json").exists() for folder in left):
            return "written"
        records = sum(len(list(folder.glob(".finished/*.json"))) for folder in left)
        files = sum(len(list(folder.glob("*.safetensors"))) for folder in left)
        return f"{records} finished" if records else f"{files} begun" if files else "made"

    def usable(self) -> None:
        assert self.registry.verify("sql").ok and self.registry.verify("humor").ok

    def seconds(self, verb: str) -> float:
        """That the unbroken work takes, from its first directory on."""
        taken = []
        for _ in range(3):
            taken.append(self.forks(self.jobs[verb])["seconds"])
            self.clear()
        return sorted(taken)[1]

    def clear(self) -> None:
        for path in self.place.iterdir():
            shutil.rmtree(path)


def _base(root: Path) -> tuple[Path, dict[str, tiny.Factors]]:
    rng = np.random.default_rng(0)
    words = rng.integers(0x3C00, 0x3F80, (256, 512), dtype=np.uint16)
    model = {f"layers.{i}.weight": tiny.Tensor("BF16", words.shape, np.roll(words, i).tobytes()) for i in range(12)}
    names = list(model)
    factors = tiny.factors(rng, *words.shape, 4, std=0.02)
    base = tiny.write_model(root / "base", model, shards=[names[part::6] for part in range(6)])
    return base, {f"layers.{i}": factors for i in range(12)}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    # In memory where that can be: a kill loses nothing that the kernel has, and waiting for a disk shows nothing.
    with in_memory(tmp_path_factory.mktemp("kills")) as root:
        yield from _world(root)


def _world(root: Path) -> Iterator[World]:
    base, modules = _base(root)
    (root / "place").mkdir()
    with loreg.open(root / "home") as registry, forks(root / "home", root) as server:
        for name, count in (("sql", 8), ("humor", 5)):
            some = dict(list(modules.items())[:count])
            registry.push(tiny.write_adapter(root / name, some), base=base, name=name)
        registry.merge("sql + humor", root / "merged", undo=True)
        place, options = root / "place", {"threads": 2}
        quick = {**options, "verify": "none"}
        jobs: dict[str, dict[str, Any]] = {
            "merge": {"wanted": [("sql", place / "one")], "options": options},
            "undo": {"wanted": [("sql + humor", place / "one")], "options": {**quick, "undo": True}},
            "many": {"wanted": [("sql", place / "one"), ("humor", place / "two")], "options": quick},
            "journal": {"merged": root / "merged", "out": place / "one", "options": {"journal": True}},
            "base": {"merged": root / "merged", "out": place / "one", "options": {"journal": False}},
        }
        made = World(root, registry, server, {}, {})
        for verb, job in jobs.items():
            made.jobs[verb] = {"verb": "unmerge" if "merged" in job else "merge", **job}
            assert server(made.jobs[verb], modules=True).get("root"), verb
            made.expected[verb] = {out.name: tiny.files_in(out) for out in made.outs(verb)}
            made.clear()
        yield made


def _chain(world: World, verb: str, seconds: float, chance: random.Random, seen: Counter[str]) -> None:
    """Kills the job a few times, each time in what the one before left, and runs it to its end."""
    for _ in range(chance.randint(3, 6)):
        told = world.forks(world.rest(verb), after=chance.random() * seconds)
        if not told["killed"]:
            break
        stage = world.stage(verb)
        seen[stage] += 1
        assert len(list(world.place.iterdir())) <= len(world.outs(verb))  # found again, and not piled up
        if stage == "renamed":
            break
    else:
        told = world.forks(world.rest(verb))
    assert told["killed"] or told.get("root"), told
    assert sorted(world.whole(verb)) == sorted(path.name for path in world.place.iterdir())
    assert len(world.whole(verb)) == len(world.outs(verb))
    world.usable()
    world.clear()


def test_two_hundred_kills() -> None:
    assert KILLS * len(VERBS) >= 200


@pytest.mark.parametrize("verb", VERBS)
def test_killed_at_random(world: World, verb: str) -> None:
    seed = random.SystemRandom().randrange(2**32) if TIMES > 1 else 7
    chance, seen, seconds = random.Random(seed), Counter[str](), world.seconds(verb)
    try:
        while sum(seen.values()) < KILLS:
            _chain(world, verb, seconds, chance, seen)
    except AssertionError:
        print(f"seed {seed}")
        raise
    finally:
        world.clear()
    print(verb, dict(sorted(seen.items())), f"{seconds:.3f} s")
    # Else all kills came before or after the work, and this has shown nothing.
    inside = sum(count for stage, count in seen.items() if stage not in ("before", "made", "renamed"))
    assert sum(seen.values()) >= KILLS and inside >= KILLS // 3, seen
    assert len(seen) >= (3 if verb in MERGES else 2), seen


STEPS = ("mkdir", "open", "ftruncate", "copy_file_range", "pwrite", "fsync", "fdatasync", "rename", "unlink", "rmdir")


@pytest.mark.parametrize("verb", VERBS)
def test_killed_at_chosen_steps(world: World, verb: str) -> None:
    """Before or after a call of each kind, often the first or the last; the catalog's own calls too."""
    if not world.forks.shim:
        pytest.skip("there is no C compiler to make what stands before the C library")
    shim = {"folders": [world.place, world.root / "home"]}
    calls = Counter(name for name, _ in world.forks(world.jobs[verb], shim=shim)["calls"])
    world.clear()
    seen, chance = Counter[str](), random.Random(11)
    for name in STEPS:
        if not calls[name]:
            continue
        for place in (chance.choice([1, calls[name], chance.randint(1, calls[name])]) for _ in range(TIMES)):
            mode = chance.choice(["kill before", "kill after"])
            told = world.forks(world.rest(verb), shim={**shim, "calls": name, "at": place, "mode": mode})
            assert told["killed"] or told.get("root"), (name, place, told)
            seen[world.stage(verb)] += told["killed"]
            world.usable()
            if len(world.whole(verb)) < len(world.outs(verb)):
                told = world.forks(world.rest(verb))
                assert told.get("root"), (name, place, mode, told)
            assert len(world.whole(verb)) == len(world.outs(verb)) == len(list(world.place.iterdir()))
            world.clear()
    print(verb, dict(sorted(seen.items())))
    assert sum(seen.values()) >= 5 and len(seen) >= 2, seen
