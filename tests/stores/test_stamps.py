"""``Database.stamp``: another one after whatever changes what a name stands for, so that nothing old is believed."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import postgres_server
import pytest
import tiny
from backends import PLACES, Place

import loreg
from loreg import serving
from loreg.errors import NotFound
from loreg.serving.resolving import Resolver


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    found = PLACES[request.param](tmp_path)
    yield found
    found.leave()


def push(registry: loreg.Registry, folder: Path, seed: int, **options: object) -> loreg.Version:
    adapter = tiny.write_adapter(folder / f"adapter{seed}", tiny.adapter(seed=seed))
    return registry.push(adapter, base="base", name="sql", **options)


def test_whatever_anybody_does_is_seen_by_the_next_call(place: Place, tmp_path: Path) -> None:
    """A registry that remembers what it found, against one that asks each time; changes by these two and a third."""
    chosen = random.Random(7)
    with place.open() as remembering, place.open() as asking, place.open() as third:
        asking.add_base(tiny.write_model(tmp_path / "base", tiny.model()), "base")
        for seed in range(1, 5):
            push(asking, tmp_path, seed, tags=["prod"])
        resolver = Resolver.of(remembering)
        kept = 0
        for step in range(60):
            who = chosen.choice([remembering, asking, third])
            number = chosen.randint(1, 4)
            try:
                match chosen.choice(["tag", "rm", "restore", "push", "gc", "none"]):
                    case "tag":
                        who.tag(f"sql:v{number}", "prod")
                    case "rm":
                        who.remove(f"sql:v{number}", tags_to=f"sql:v{number % 4 + 1}")
                    case "restore":
                        who.restore(f"sql:v{number}")
                    case "push":
                        push(who, tmp_path, number)
                    case "gc":
                        who.collect(grace=timedelta(days=1))
            except loreg.LoregError:
                pass
            before = remembering.database.stamp()
            assert before is not None
            for reference in ("sql", "sql:prod", "sql:v1", "sql:v2", "sql:v3", "sql:v4"):
                found = []
                for find in (resolver.find, asking.find):
                    try:
                        found.append(find(reference).digest)
                    except NotFound:
                        found.append(None)
                assert found[0] == found[1], (step, reference)
            kept += remembering.database.stamp() == before
        assert kept == 60  # to ask changes nothing


def test_a_child_has_its_own(place: Place, tmp_path: Path) -> None:
    with place.open() as registry:
        registry.add_base(tiny.write_model(tmp_path / "base", tiny.model()), "base")
        push(registry, tmp_path, 1)
        stamp = registry.database.stamp()
        child = os.fork()
        if not child:
            os._exit(registry.database.stamp() == stamp)
        assert os.waitpid(child, 0)[1] == 0
        assert registry.database.stamp() == stamp


def test_a_server_that_is_started_again(tmp_path: Path) -> None:
    """While it is away there is no stamp, and after that another one."""
    server = postgres_server.begin()
    try:
        with loreg.open(tmp_path / "home", catalog=server.fresh()[1]) as registry:
            registry.add_base(tiny.write_model(tmp_path / "base", tiny.model()), "base")
            push(registry, tmp_path, 1)
            stamp, found = registry.database.stamp(), serving.resolve("sql", registry)
            assert stamp is not None and registry.database.stamp() == stamp
            server.stop()
            assert registry.database.stamp() is None
            with pytest.raises(loreg.LoregError):
                serving.resolve("sql", registry)
            server.start()
            again = registry.database.stamp()
            assert again not in (None, stamp)
            assert serving.resolve("sql", registry) == found
    finally:
        server.remove()
