"""A process that has imported all that a registry needs: each command on one runs in a fork of it, its calls spoiled.

One line of JSON on stdin for each job, one on stdout for what became of it. A fork does the same each time, up to the
call that is spoiled: so of what it left behind, byte for byte, each kind has to be examined once, however many calls
end in it.
"""

from __future__ import annotations

import _sqlite3
import ctypes
import gc
import hashlib
import json
import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import store_cycles
import store_jobs
import store_life
from shim import Shim
from sqlalchemy.orm import configure_mappers
from statements import compiled_once

import loreg
from loreg.errors import LoregError

SECOND = int(time.time()) + 600  # after all that is there was made, and then the trash is old enough
SQLITE = ctypes.CDLL(_sqlite3.__file__)


def forked(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What it returns, done by a fork; ``killed`` if that did not live to say so."""
    ours, theirs = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.close(ours)
            told = work()
        except BaseException:
            told = {"failed": traceback.format_exc()}
        os.write(theirs, json.dumps(told).encode())
        os._exit(0)
    os.close(theirs)
    with os.fdopen(ours) as file:
        said = file.read()
    _, status = os.waitpid(pid, 0)
    killed = os.WIFSIGNALED(status)
    assert killed or said, status
    return {"killed": killed, **(json.loads(said) if said else {})}


def attempt(job: dict[str, Any], shim: dict[str, Any]) -> dict[str, Any]:
    place, stand = Path(job["place"]), Shim()
    SQLITE.sqlite3_randomness(0, None)  # or its numbers went on from those of the last attempt
    stand.determine(SECOND)
    stand.arm([str(place)], **shim)
    told: dict[str, Any] = {}
    try:
        store_jobs.COMMANDS[job["command"]](Path(job["root"]), place)
    except LoregError as error:
        told = {"error": type(error).__name__, "said": str(error), "code": error.exit_code}
    except BaseException:
        told = {"error": traceback.format_exc(), "code": None}
    calls = stand.seen()
    stand.arm([])
    stand.determine(0)
    return {**told, **({"calls": calls} if "at" not in shim else {"met": calls[shim["at"] - 1 :][:1]})}


def left(place: Path) -> str:
    """What is on the disk, but for the index of the log, which no process takes over from another that was alone."""
    hasher = hashlib.sha256()
    for folder, folders, files in os.walk(place):
        folders.sort()
        hasher.update(os.path.relpath(folder, place).encode() + b"\0")
        for name in sorted(files):
            if not name.endswith("-shm"):
                with open(os.path.join(folder, name), "rb") as file:
                    data = file.read()
                hasher.update(b"%s\0%d\0" % (name.encode(), len(data)) + data)
    return hasher.hexdigest()


def look(place: Path) -> dict[str, Any]:
    with loreg.open(place / "home") as registry:
        return {"shown": store_jobs.shown(registry), "problems": store_jobs.problems(registry)}


class Server:
    """``known``: what an examination said, by the command and the state of the disk that it found."""

    def __init__(self) -> None:
        self.known: dict[tuple[str, str], dict[str, Any]] = {}

    def answer(self, job: dict[str, Any]) -> dict[str, Any]:
        if job["command"] == "send":
            return forked(lambda: attempt({**job, "place": job["root"]}, {}))  # its client leaves threads
        if job["command"] == "cycles":
            return self.cycles(job)
        if job["command"] == "record":
            return forked(lambda: store_life.recorded(job))
        if "shims" not in job:
            return self.unbroken(job)
        spoiled = self.killed if job["kills"] else self.failed
        return {"killed": False, "runs": spoiled(job)}

    def cycles(self, job: dict[str, Any]) -> dict[str, Any]:
        try:
            return store_cycles.cycles(job)
        except AssertionError:
            return {"killed": False, "failed": traceback.format_exc()}

    def unbroken(self, job: dict[str, Any]) -> dict[str, Any]:
        """The calls of a command, and what is seen before and after it."""
        place = reset(job)
        # Here, so that its forks find imported and compiled what it was the first to need; but a pull leaves threads.
        for name in forked(lambda: modules(job))["modules"]:
            import_module(name)
        if job["command"] != "pull":
            store_jobs.COMMANDS[job["command"]](Path(job["root"]), reset(job))
        look(place)
        gc.collect()
        gc.freeze()
        reset(job)
        before = forked(lambda: look(place))
        reset(job)
        told = forked(lambda: attempt(job, job["counted"]))
        state = left(place)
        after = forked(lambda: look(place))
        reset(job)
        forked(lambda: attempt(job, job["counted"]))
        assert left(place) == state, "it does not do the same each time"
        return {**told, "before": before, "after": after}

    def killed(self, job: dict[str, Any]) -> list[dict[str, Any]]:
        runs = []
        for shim in job["shims"]:
            place = reset(job)
            told = forked(lambda shim=shim: attempt(job, shim))  # type: ignore[misc]
            runs.append({**told, "found": self.found(job, place, [left(place)])})
        return runs

    def failed(self, job: dict[str, Any]) -> list[dict[str, Any]]:
        """One fork for all, as a fork takes longer than a command; what it leaves is examined by others."""
        place, aside = Path(job["place"]), Path(job["place"] + ".aside")
        runs = list(forked(lambda: {"runs": self.attempts(job, aside)})["runs"])
        for number, told in enumerate(runs):
            if (aside / str(number)).exists():
                shutil.rmtree(place, ignore_errors=True)
                (aside / str(number)).rename(place)
            told |= {"killed": False, "found": self.found(job, place, [told.pop("state")])}
        return runs

    def attempts(self, job: dict[str, Any], aside: Path) -> list[dict[str, Any]]:
        """What was left in a state that is not known goes aside."""
        told, met = [], set()
        aside.mkdir(exist_ok=True)
        for number, shim in enumerate(job["shims"]):
            place = reset(job)
            told.append(attempt(job, shim))
            gc.collect(0)
            told[-1]["state"] = state = left(place)
            if (job["command"], state) not in self.known and state not in met:
                place.rename(aside / str(number))
            met.add(state)
        return told

    def found(self, job: dict[str, Any], place: Path, states: list[str]) -> dict[str, Any]:
        """What an examination of the place says: made once for each state of it, and of it once it was opened."""
        known = self.known.get((job["command"], states[-1]))
        if known is not None:
            found = {**known, "new": False}
        elif len(states) == 1:
            told = forked(lambda: opened(place))
            found = told if "failed" in told else self.found(job, place, [*states, left(place)])
        else:
            found = {**forked(lambda: examined(job, place)), "new": True}
        for state in states:
            self.known[job["command"], state] = found
        return found


def reset(job: dict[str, Any]) -> Path:
    place = Path(job["place"])
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(job["template"], place)
    return place


def modules(job: dict[str, Any]) -> dict[str, Any]:
    before = set(sys.modules)
    told = attempt(job, {})
    assert "error" not in told, told
    return {"modules": [name for name in sys.modules if name not in before]}


def opened(place: Path) -> dict[str, Any]:
    """Whatever a log held is in the catalog then."""
    loreg.open(place / "home").close()
    return {}


def examined(job: dict[str, Any], place: Path) -> dict[str, Any]:
    root = Path(job["root"])
    return {"seen": store_jobs.examine(job["command"], root, place, job["before"], job["after"])}


def main() -> None:
    configure_mappers()
    gc.disable()
    server = Server()
    with compiled_once():
        for line in sys.stdin:
            answer = server.answer(json.loads(line))
            threads = len(os.listdir("/proc/self/task"))
            assert threads == 1, f"{threads} threads, and a fork would have one"
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
