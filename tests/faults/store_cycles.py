"""Processes that work on one registry, each under a name of its own, and are killed one after the other.

A process says through a pipe what it knows to be done and what it does next, in one line, before it does it. So once
it is killed the registry shows, of its name, what that line says, or that with the next thing done too.
"""

from __future__ import annotations

import json
import os
import random
import select
import signal
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import store_jobs

import loreg
from loreg.errors import Conflict, NotFound
from loreg.format.manifest import AdapterManifest
from loreg.registry.storage import PendingBlob

WORKERS = 2
WHOLE = 50
"""After so many kills everything is read."""

Content = tuple[AdapterManifest, list[PendingBlob]]
Step = dict[str, Any]


@dataclass
class Known:
    """What is known of a name: its versions and what may be in its trash, digests by their numbers; and its tags."""

    versions: dict[str, str] = field(default_factory=dict)
    trash: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def after(self, step: Step, number: str = "") -> Known:
        """Once a step is done; ``number``: of the version that a push gave."""
        versions, trash, tags = dict(self.versions), dict(self.trash), dict(self.tags)
        number = number or step.get("number", "")
        if step["do"] in ("push", "restore"):
            versions[number] = step["digest"]
            trash.pop(number, None)
        elif step["do"] == "remove":
            trash[number] = versions.pop(number)
        if step.get("tag"):
            tags[step["tag"]] = number
        tags.pop("latest", None)
        return Known(versions, trash, tags | ({"latest": max(versions, key=int)} if versions else {}))

    def shows(self) -> Any:
        return [self.versions, self.tags]


def next_step(known: Known, contents: list[Content], chance: random.Random) -> Step:
    what = chance.choices(("push", "remove", "restore", "tag", "gc", "fsck"), (45, 25, 8, 10, 9, 3))[0]
    tagged = {at for name, at in known.tags.items() if name != "latest"}
    free = [number for number in known.versions if number not in tagged]
    if what == "remove" and free:
        return {"do": what, "number": chance.choice(free)}
    if what == "restore" and known.trash:
        number = chance.choice(list(known.trash))
        return {"do": what, "number": number, "digest": known.trash[number]}
    if what == "tag" and known.versions:
        return {"do": what, "number": chance.choice(list(known.versions)), "tag": "prod"}
    if what in ("gc", "fsck"):
        return {"do": what}
    which = chance.randrange(len(contents))
    return {"do": "push", "which": which, "digest": str(contents[which][0].digest), "tag": chance.choice(["", "dev"])}


def take(registry: loreg.Registry, name: str, step: Step, contents: list[Content]) -> str:
    """The number that a push gives. Raises what the registry raises."""
    match step["do"]:
        case "push":
            manifest, blobs = contents[step["which"]]
            version = registry.commit_version(name, manifest, blobs, [step["tag"]] if step["tag"] else [])
            return str(version.number)
        case "remove":
            registry.remove(f"{name}:v{step['number']}")
        case "restore":
            registry.restore(f"{name}:v{step['number']}")
        case "tag":
            registry.tag(f"{name}:v{step['number']}", step["tag"])
        case "gc":
            registry.collect(grace=timedelta())
        case "fsck":
            found = registry.fsck(repair=True)
            assert found.ok, found.problems
    return ""


def work(home: Path, name: str, known: Known, contents: list[Content], chance: random.Random, pipe: int) -> None:
    with loreg.open(home) as registry:
        while True:
            step = next_step(known, contents, chance)
            os.write(pipe, json.dumps([vars(known), step]).encode() + b"\n")
            try:
                known = known.after(step, take(registry, name, step, contents))
            except NotFound:  # a collection was faster
                assert step["do"] == "restore", step
                del known.trash[step["number"]]
            except Conflict:  # a blob vanished, or a lease did: then nothing is done
                assert step["do"] == "push", step


class Worker:
    """The process that has a name now, or the one that had it last."""

    def __init__(self, home: Path, name: str, contents: list[Content]) -> None:
        self.home, self.name, self._contents = home, name, contents
        self.known = Known()

    def start(self, seed: int) -> None:
        self._pipe, pipe = os.pipe()
        self._pid = os.fork()
        if not self._pid:
            try:
                work(self.home, self.name, self.known, self._contents, random.Random(seed), pipe)
            except BaseException:
                traceback.print_exc()
            os._exit(1)
        os.close(pipe)

    def kill(self) -> Step | None:
        """The step in which it was killed; what it had said before is known from then on."""
        os.kill(self._pid, signal.SIGKILL)
        _, status = os.waitpid(self._pid, 0)
        assert os.WIFSIGNALED(status), "it had ended by itself: see what it printed"
        with os.fdopen(self._pipe) as file:
            *lines, _ = file.read().split("\n")  # of a line that was not written to its end nothing was begun
        if not lines:
            return None
        known, step = json.loads(lines[-1])
        self.known = Known(**known)
        return dict(step)

    def began(self) -> None:
        """Waits until it has said a thing."""
        select.select([self._pipe], [], [], 60)

    def check(self, registry: loreg.Registry, step: Step | None) -> bool:
        """Whether the step was done too. What is seen is known from then on."""
        rows = [row for row in registry.list_versions(all_versions=True) if row.name == self.name]
        versions = {str(row.number): str(row.digest) for row in rows}
        tags = {tag: str(number) for tag, number in registry.tags(self.name).items()} if rows else {}
        for number, digest in versions.items():
            assert str(registry.resolve(f"{self.name}:v{number}").digest) == digest
        seen = [versions, tags]
        if seen == self.known.shows():
            return False
        assert step is not None, (self.name, seen, self.known)
        given = set(versions) - set(self.known.versions) if step["do"] == "push" else ()
        already = [number for number, digest in versions.items() if digest == step.get("digest")]
        done = self.known.after(step, next(iter(given or already), ""))
        assert seen == done.shows(), (self.name, seen, self.known, step)
        self.known = done
        return True


def read_all(home: Path, workers: list[Worker]) -> None:
    """Everything, once the leases of those that were killed are over; then nothing is left that is not needed."""
    with loreg.open(home) as registry:
        assert registry.fsck().ok and not list(store_jobs.damage(home))
        for worker in workers:
            assert not worker.check(registry, None)
        store_jobs.tidied(registry, [])
        for worker in workers:
            worker.known.trash.clear()


def contents(registry: loreg.Registry, root: Path) -> list[Content]:
    found = []
    for name in ("sql1", "sql5", "humor", "new"):
        manifest = registry.push(root / name, base=root / "base", name="first").manifest
        raw = [registry.storage.read(blob.digest) for blob in manifest.blobs]
        found.append((manifest, [PendingBlob.of(data) for data in (*raw, manifest.dump())]))
    for number in range(1, len(found) + 1):
        registry.remove(f"first:v{number}")
    return found


def cycles(job: dict[str, Any]) -> dict[str, Any]:
    """So many kills; how many there were in each step, and how often it was done then."""
    home, chance, seen = Path(job["place"]) / "home", random.Random(job["seed"]), Counter[str]()
    with loreg.open(home) as registry:
        given = contents(registry, Path(job["root"]))
    workers = [Worker(home, f"w{number}", given) for number in range(WORKERS)]
    began, kills = time.monotonic(), 0
    while kills < job["kills"]:
        for worker in workers:
            worker.start(chance.randrange(1 << 32))
        while True:
            victim = chance.choice(workers)
            victim.began()
            time.sleep(chance.random() * 0.03)
            last = kills + WORKERS >= job["kills"] or (kills + WORKERS) % WHOLE < WORKERS
            for worker in workers if last else [victim]:
                step = worker.kill()
                with loreg.open(home) as registry:
                    done = worker.check(registry, step)
                seen[f"{step['do'] if step else 'opening'}{', done' if done else ''}"] += 1
                kills += 1
            if last:
                break
            victim.start(chance.randrange(1 << 32))
        read_all(home, workers)
        seen["read all"] += 1
    return {"seen": dict(seen), "killed": False, "kills": kills, "seconds": time.monotonic() - began}
