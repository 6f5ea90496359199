"""Every call to the disk that a command on a registry makes, spoiled in each way that it can be.

The calls are found by recording a run. Then each of them fails, finds no room, is the last before a kill or the
first that a kill prevents; and of reads and writes, each does half of what it is asked. After each the registry is
opened by a process that knows nothing, and looked at: see ``store_jobs.examine``.

Three things are done by sample, and --nightly does all of each. SQLite reads and writes page after page: of calls
of one kind on one file that follow each other, the first three, the last and one of five of the others are spoiled.
A kill after a call leaves what a kill before the next one leaves, so one call of two is killed before and after. And
the calls that do half do so all in one run, as each is made up for by its own caller.
"""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import options
import pytest
import store_world
from forks import Forks, forks
from hub_server import HubServer
from places import in_memory

CHANGES = "open,write,pwrite,writev,fsync,fdatasync,ftruncate,rename,link,mkdir,rmdir,unlink,fchmod,mmap"
LOOKS = "read,pread,stat,opendir"
FAULTS: dict[str, tuple[str, dict[str, Any]]] = {
    "killed before": (CHANGES, {"mode": "kill before"}),
    "killed after": (CHANGES, {"mode": "kill after"}),
    "failing": (f"{CHANGES},{LOOKS}", {"mode": "fail", "code": errno.EIO}),
    "full": (
        "open,write,pwrite,writev,fsync,fdatasync,ftruncate,rename,link,mkdir,mmap",
        {"mode": "fail", "code": errno.ENOSPC},
    ),
    "halving": ("write,pwrite,writev,read,pread", {"mode": "half"}),
}
COMMANDS: dict[str, Callable[[Path, Path], None]] = {
    "push": store_world.with_log,
    "pull": store_world.with_log,
    "export": store_world.with_log,
    "gc": store_world.with_log,
    "fsck": store_world.damaged,
    "migrate": store_world.old,
    "first": store_world.nothing,
}
"""And the registry that each finds."""
EVERY = -1


class Disk:
    def __init__(self, root: Path, server: Forks) -> None:
        self.root, self._server = root, server

    def job(self, command: str) -> dict[str, Any]:
        template = self.root / command
        COMMANDS[command](self.root, template)
        return {"command": command, "root": self.root, "place": self.root / "place", "template": template}

    def send(self, job: dict[str, Any]) -> None:
        """Puts on the Hub what is to be pulled."""
        told = self._server({**job, "command": "send"})
        assert "error" not in told and not told["killed"], told

    def unbroken(self, job: dict[str, Any]) -> dict[str, Any]:
        return self._server(job, counted={"calls": f"{CHANGES},{LOOKS}"})

    def spoiled(self, job: dict[str, Any], fault: str, places: list[int]) -> list[dict[str, Any]]:
        calls, shim = FAULTS[fault]
        shims = [{"calls": calls, "at": at, **shim} for at in places]
        return list(self._server(job, kills=fault.startswith("killed"), shims=shims)["runs"])


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Disk]:
    with in_memory(tmp_path_factory.mktemp("disk")) as root, HubServer() as hub:
        store_world.inputs(root)
        store_world.spare(root)
        variables = {**hub.environment(root / "hf"), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        with forks(root, root, "store_server.py", variables) as server:
            if not server.shim:
                pytest.skip("there is no C compiler to make what stands before the C library")
            yield Disk(root, server)


def _places(fault: str, calls: list[list[str]]) -> list[int]:
    """Which of the calls are spoiled, by their numbers from 1 on."""
    if fault == "halving":
        return [EVERY, *(range(1, len(calls) + 1) if options.nightly else ())]
    if options.nightly:
        return list(range(1, len(calls) + 1))
    chosen: list[int] = []
    for _, group in groupby(enumerate(calls, 1), lambda each: each[1]):
        alike = [at for at, _ in group]
        chosen += [at for place, at in enumerate(alike) if place < 3 or place % 5 == 0 or at == alike[-1]]
    if fault.startswith("killed"):
        return [*chosen[::2], *([chosen[-1]] if fault == "killed after" and len(chosen) % 2 == 0 else [])]
    return chosen


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("command", COMMANDS)
def test_every_call(disk: Disk, command: str) -> None:
    job = disk.job(command)
    if command == "pull":
        disk.send(job)
    unbroken = disk.unbroken(job)
    assert "error" not in unbroken, unbroken
    job |= {"before": unbroken["before"], "after": unbroken["after"]}
    counts, wrong, states, met = Counter[str](), [], 0, Counter[str]()
    for fault, (calls, _) in FAULTS.items():
        places = _places(fault, [call for call in unbroken["calls"] if call[0] in calls.split(",")])
        for at, told in zip(places, disk.spoiled(job, fault, places), strict=True):
            problem = _problem(fault, told)
            end = "killed" if told["killed"] else "refused" if "error" in told else "all the same"
            counts[f"{fault}, {end}"] += 1
            met[fault] += 1
            states += told["found"].get("new", False)
            if problem:
                wrong.append((problem, fault, at, told.get("met"), told.get("error"), told.get("said")))
    print(command, len(unbroken["calls"]), "calls", dict(counts), states, "states examined")
    assert not wrong, (len(wrong), wrong[:3])
    assert all(counts[f"{fault}, refused"] >= met[fault] / 3 for fault in ("failing", "full")), counts


def _problem(fault: str, told: dict[str, Any]) -> str | None:
    if "failed" in told["found"]:
        return str(told["found"]["failed"])[-1500:]
    if fault.startswith("killed"):
        return None if told["killed"] else "it was not killed"
    if fault == "halving":
        return "half of a call is not made up for" if "error" in told else None
    # 3 is what a blob that cannot be opened is to those who read tensors from it.
    if "error" in told and told["code"] not in (1, 2, 3, 5, 6):
        return "an error that is not typed"
    return None
