"""A process that has imported all that a merge needs and started no threads: each job runs in a fork of it.

One line of JSON on stdin for each job, one on stdout for what became of it. Importing torch takes longer than
merging, and a job is killed at its instant by the process that forked it, which has nothing else to do.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import select
import shutil
import signal
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

from shim import Shim
from sqlalchemy.orm import configure_mappers

import loreg
import loreg.catalog
import loreg.merge.output
import loreg.merge.resources
import loreg.merge.undo
import loreg.registry.merging
from loreg.errors import LoregError
from loreg.staging import staged

BEGUN = b"\n"
"""What a fork says first: all is looked up, and what it writes begins."""


def work(registry: loreg.Registry, job: dict[str, Any]) -> str:
    """Does it; the root of the weights that were written."""
    options = dict(job.get("options", {}))
    loreg.merge.resources.TILE_BYTES = options.pop("tile", 1 << 18)
    if job["verb"] == "unmerge":
        done = registry.unmerge(job["merged"], job["out"], **options)
        assert done.matches_base
        return str(done.weights_root)
    wanted = [(expression, Path(out)) for expression, out in job["wanted"]]
    return ",".join(str(result.weights_root) for result in registry.merge_many(wanted, **options))


def outcome(registry: loreg.Registry, job: dict[str, Any]) -> dict[str, Any]:
    try:
        return {"root": work(registry, job)}
    except LoregError as error:
        return {"error": type(error).__name__, "said": str(error), "code": error.exit_code}
    except BaseException as error:
        return {"error": type(error).__name__, "said": str(error), "code": None}


def spoiled(registry: loreg.Registry, job: dict[str, Any], shim: dict[str, Any]) -> dict[str, Any]:
    """A job in a fresh place, or one that a killed job left, with its calls spoiled; and what is there then."""
    place, counting = Path(job["place"]), Shim()
    shutil.rmtree(place)
    shutil.copytree(job["left"], place) if job.get("left") else place.mkdir()
    registry.storage._verified.clear()  # or a process that lives on reads no blob again
    counting.arm(**shim)
    told = outcome(registry, job)
    calls = counting.seen()
    counting.arm([])
    held = [os.readlink(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd") if int(name) > 2
            and os.path.islink(f"/proc/self/fd/{name}")]  # fmt: skip
    kept = [path for path in held if path.startswith(job["place"])]
    hasher = hashlib.sha256()
    for path in sorted(path for path in place.rglob("*") if path.is_file()):
        hasher.update(str(path).encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    names = sorted(path.name for path in place.iterdir())
    return {**told, "calls": calls, "place": names, "bytes": hasher.hexdigest(), "open": kept}


def announcing(pipe: int) -> list[float]:
    """Has the first directory that is made for an output said through the pipe; the instants of all, once there."""
    began: list[float] = []

    def announced(*given: Any, **options: Any) -> Any:
        if not began:
            os.write(pipe, BEGUN)
        began.append(time.monotonic())
        return staged(*given, **options)

    loreg.merge.output.staged = announced
    loreg.merge.undo.staged = announced
    return began


def child(job: dict[str, Any], pipe: int) -> None:
    before = set(sys.modules)
    told: dict[str, Any]
    if "shim" in job:
        shim = Shim()
        shim.arm(**job["shim"])
    with loreg.open(job["home"]) as registry:
        if "runs" in job:
            told = {"runs": [spoiled(registry, job, shim) for shim in job["runs"]]}
        else:
            began = announcing(pipe)
            told = outcome(registry, job)
            told["seconds"] = time.monotonic() - began[0] if began else 0
    if "shim" in job:
        told["calls"] = shim.seen()
    if "modules" in job:
        told["modules"] = [name for name in sys.modules if name not in before]
    with os.fdopen(pipe, "w") as file:
        json.dump(told, file)


def run(job: dict[str, Any]) -> dict[str, Any]:
    """``after``: seconds from its first directory until it is killed, unless it has ended."""
    ours, theirs = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.close(ours)
            child(job, theirs)
        finally:
            os._exit(0)
    os.close(theirs)
    first, after = os.read(ours, len(BEGUN)), job.get("after")
    if first == BEGUN and after is not None and not select.select([ours], [], [], after)[0]:
        os.kill(pid, signal.SIGKILL)
    with os.fdopen(ours) as file:
        told = (first.decode() + file.read()).strip()
    _, status = os.waitpid(pid, 0)
    killed = os.WIFSIGNALED(status)
    found = json.loads(told) if told and not killed else {}
    return {"killed": killed, "signal": os.WTERMSIG(status), **found}


def main() -> None:
    configure_mappers()
    gc.freeze()
    for line in sys.stdin:
        job = json.loads(line)
        answer = run(job)
        for name in answer.pop("modules", ()):
            import_module(name)  # what the first of its kind was the first to need
        threads = len(os.listdir("/proc/self/task"))
        assert threads == 1, f"{threads} threads, and a fork would have one"
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
