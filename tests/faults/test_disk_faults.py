"""Calls to the disk refused, once with each answer that a disk has: a typed error and nothing, or all of it.

What stands before the C library counts the calls of a run, and spoils one of them in the next: also those that are
not Python's own, and those of the threads. --nightly spoils every one, else one of sixteen.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from forks import Forks, forks
from options import one_of
from places import in_memory

import loreg

# Which calls can answer so. That of a half-done one is no error, and the rest has to follow.
ANSWERS = {
    "full": ("open,write,pwrite,copy_file_range,sendfile,fsync,fdatasync,ftruncate,rename,mkdir", errno.ENOSPC),
    "failing": (
        "open,read,pread,preadv,write,pwrite,copy_file_range,sendfile,fsync,fdatasync,ftruncate,rename,mkdir,mmap",
        errno.EIO,
    ),
    "halving": ("read,pread,preadv,write,pwrite,copy_file_range,sendfile", 0),
}
EACH = one_of(16)
"""Every one of the calls, or one of so many."""
VERBS = ("merge", "undo", "many", "resumed", "journal", "base")


class Disk:
    """A base of three shards, and each verb with what it gives on a disk that works."""

    def __init__(self, root: Path, server: Forks) -> None:
        self.root, self.place, self._server = root, root / "place", server
        place, merged = self.place, root / "merged"
        undo = {"wanted": [("sql + humor", place / "one")], "options": {"undo": True, "threads": 1}}
        self.jobs: dict[str, dict[str, Any]] = {
            "merge": {"wanted": [("sql", place / "one")], "options": {"threads": 1}},
            "undo": undo,
            "many": {"wanted": [("sql", place / "one"), ("humor", place / "two")], "options": {"threads": 1}},
            "resumed": undo,
            "journal": {"verb": "unmerge", "merged": merged, "out": place / "one", "options": {"journal": True}},
            "base": {"verb": "unmerge", "merged": merged, "out": place / "one", "options": {"journal": False}},
        }

    def run(self, verb: str, shims: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The verb, once with each shim, each time where nothing of it is; but what was killed is."""
        job = {"verb": "merge", **self.jobs[verb]}
        left = self.root / "left" if verb == "resumed" else None
        found = self._server(job, runs=shims, place=self.place, left=left)
        assert not found["killed"], found
        return list(found["runs"])


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Disk]:
    with in_memory(tmp_path_factory.mktemp("disk")) as root:
        names = list(model := tiny.model())
        base = tiny.write_model(root / "base", model, shards=[names[:3], names[3:5], names[5:]])
        with loreg.open(root / "home") as registry:
            for seed, name in enumerate(("sql", "humor")):
                registry.push(tiny.write_adapter(root / name, tiny.adapter(seed=seed)), base=base, name=name)
            registry.merge("sql + humor", root / "merged", undo=True)
        with forks(root / "home", root) as server:
            if not server.shim:
                pytest.skip("there is no C compiler to make what stands before the C library")
            made = Disk(root, server)
            made.place.mkdir()
            job = {"verb": "merge", **made.jobs["undo"]}
            # Killed as the second shard gets its record: what is left is gone on from, again and again.
            shim = {"folders": [made.place], "calls": "rename", "at": 2, "mode": "kill after"}
            assert server(job, shim=shim)["killed"]
            shutil.copytree(made.place, root / "left")
            shutil.rmtree(made.place)
            made.place.mkdir()
            yield made


@pytest.mark.parametrize("verb", VERBS)
def test_every_call_refused(disk: Disk, verb: str) -> None:
    folders = [disk.place, disk.root / "base", disk.root / "merged", disk.root / "home" / "blobs"]
    plain, again = disk.run(verb, [{"folders": folders}] * 2)
    assert plain["root"] == again["root"] and plain["bytes"] == again["bytes"] and not plain["open"]
    counts, wrong = Counter[str](), []
    left = {path.name for path in (disk.root / "left").iterdir()} if verb == "resumed" else set()
    for answer, (calls, code) in ANSWERS.items():
        # A disk that is full refuses what is written, and is read as ever.
        where = [disk.place] if answer == "full" else folders
        mode = "fail" if code else "half"
        (counted,) = disk.run(verb, [{"folders": where, "calls": calls}])
        number = len(counted["calls"])
        shims = [{"folders": where, "calls": calls, "at": at, "code": code, "mode": mode}
                 for at in range(1 + VERBS.index(verb) % EACH, number + 2, EACH)]  # fmt: skip
        for shim, told in zip(shims, disk.run(verb, shims), strict=True):
            problem = _problem(told, plain, code, left)
            counts[f"{answer}, {'all the same' if 'root' in told else 'refused'}"] += 1
            if problem:
                call = told["calls"][shim["at"] - 1 :][:1]
                wrong.append((problem, answer, call, told.get("error"), told.get("said"), told["place"]))
    print(verb, dict(counts))
    assert not wrong, wrong[:5]
    assert counts["full, refused"] >= 48 // EACH and counts["failing, refused"] >= 64 // EACH, counts


def _problem(told: dict[str, Any], plain: dict[str, Any], code: int, left: set[str]) -> str | None:
    """What is wrong with the end of a job one of whose calls was refused."""
    if told["open"]:
        return f"left open: {told['open']}"
    if "root" in told:  # got round, or there was none of that number
        return None if (told["root"], told["bytes"]) == (plain["root"], plain["bytes"]) else "other bytes"
    if not code or told["code"] is None:
        return "an error that is not typed"
    if os.strerror(code) not in told["said"]:
        return "the reason is not said"
    # Of two, the first may have been renamed; and what a killed merge left stays until another is in it.
    if not set(told["place"]) - left < set(plain["place"]):
        return "something is left"
    return None
