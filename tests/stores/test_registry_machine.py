"""Any sequence of what people and machines do to a registry does to it what it does to a dict, wherever it is kept.

Two handles act on the same place, one of them also in the middle of what the other does. Copies of blobs are damaged
and mended in between. After every step the catalog has what the dict has, and the bytes are those that were pushed.
"""

from __future__ import annotations

import copy
import itertools
import random
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import options
import pytest
import tiny
from backends import PLACES
from compiled import one_compilation
from contents import Content, contents
from hypothesis import HealthCheck, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from options import counts
from registry_model import LATEST, Kept, Model
from sqlalchemy import text

import loreg
from loreg.catalog import queries
from loreg.digest import Digest
from loreg.errors import BadInput, Conflict, NotFound, UsageError
from loreg.registry.storage import PendingBlob
from loreg.store import BlobKey, new_generation

sys.path.append(str(Path(__file__).parent.parent / "faults"))
from places import in_memory

__all__ = ["one_compilation"]

RUNS, STEPS, PARTS = 300, 40, 4
"""Of every place; in parts, which run on several cores."""
NAMES, TAGS = ("a", "b", "own/c"), ("prod", "next", LATEST)
LONG = timedelta(days=1)
handle = st.integers(0, 1)
name_ = st.sampled_from(NAMES)
tags_ = st.lists(st.sampled_from(TAGS), max_size=2)
note_ = st.sampled_from([None, "first try", "100% _sql_"])
pick = st.integers(0, 5)


class Stocked:
    """What all runs share: contents, a registry that has them all, and an empty catalog to begin with."""

    def __init__(self, root: Path) -> None:
        self.root, self.backup = root, root / "backup"
        self.contents = list(contents(self.backup, root, 6))
        loreg.open(root / "empty").close()
        self.catalog = (root / "empty" / "catalog.db").read_bytes()
        self.numbers = itertools.count()
        self.full_runs = 0


class RegistryAgainstADict(RuleBasedStateMachine):
    def __init__(self, place_name: str, stocked: Stocked) -> None:
        super().__init__()
        self.stocked = stocked
        self.folder = stocked.root / f"run{next(stocked.numbers)}"
        self.folder.mkdir()
        self.place = PLACES[place_name](self.folder)
        if self.place.catalog is None:  # or the migrations would take most of the time
            self.place.home.mkdir(parents=True, exist_ok=True)
            (self.place.home / "catalog.db").write_bytes(stocked.catalog)
        self.registries = [self.place.open(), self.place.open()]
        self.model = Model()
        self.universe = {str(digest) for content in stocked.contents for digest in content.data}
        self.steps = 0
        self.whole: set[BlobKey] = set()  # what the catalog vouches for, and nobody has damaged
        self.read: set[BlobKey] = set()
        self.seen: Counter[Digest] | None = None

    def teardown(self) -> None:
        try:
            self.shown(1)
            self.read.clear()
            self.seen = None
            self._every_byte_is_what_was_pushed()
            whole = [
                key for key, kept in self.model.versions().items() if not {*kept.content.data} & {*self.model.bad}
            ]
            for name, number in whole[:1]:
                content = self.model.names[name].versions[number].content
                self._exported(self.registries[0], f"{name}:v{number}", content)
            self.stocked.full_runs += self.steps == STEPS
        finally:
            for registry in self.registries:
                registry.close()
            self.place.leave()
            shutil.rmtree(self.folder)

    # Pushes

    def _push(self, who: int, name: str, content: Content, tags: list[str], note: str | None) -> None:
        written = self.model.absent(content)
        version = self.registries[who].commit_version(name, content.manifest, list(content.blobs), tags, note)
        assert (version.number, version.created) == self.model.push(name, content, tags, note, written)

    @initialize(name=name_, number=pick)
    def something_is_there(self, name: str, number: int) -> None:
        self._push(0, name, self.stocked.contents[number], [], None)

    @rule(who=handle, name=name_, number=pick, tags=tags_, note=note_)
    def push(self, who: int, name: str, number: int, tags: list[str], note: str | None) -> None:
        self._push(who, name, self.stocked.contents[number], tags, note)

    @rule(
        who=handle,
        name=name_,
        number=pick,
        tags=tags_,
        what=st.sampled_from(["gc", "rm", "push", "both"]),
        other=pick,
    )
    def push_while_the_other_acts(
        self, who: int, name: str, number: int, tags: list[str], what: str, other: int
    ) -> None:
        """Between what the push writes and its commit."""
        content = self.stocked.contents[number]

        def act() -> None:
            if what in ("rm", "both"):
                self._remove(1 - who, other, None)
            if what in ("gc", "both"):
                self._collect(1 - who, timedelta(), False, pinned=content.data)
            if what == "push":
                self._push(1 - who, name, self.stocked.contents[(number + other // 3) % 6], [], None)

        written = self.model.absent(content)
        with _before_the_commit(self.registries[who], act):
            version = self.registries[who].commit_version(name, content.manifest, list(content.blobs), tags)
        assert (version.number, version.created) == self.model.push(name, content, tags, None, written)

    @rule(who=handle, name=name_, number=pick)
    def push_whose_lease_is_taken(self, who: int, name: str, number: int) -> None:
        content = self.stocked.contents[number]

        def reap() -> None:
            with self.registries[1 - who].database.write() as session:
                session.execute(text("DELETE FROM leases"))

        self.model.orphans.update(self.model.absent(content))
        with _before_the_commit(self.registries[who], reap), pytest.raises(Conflict, match="lease"):
            self.registries[who].commit_version(name, content.manifest, list(content.blobs), ["prod"])

    @rule(who=handle, name=name_, number=pick, at=pick)
    def push_that_ends_in_the_middle(self, who: int, name: str, number: int, at: int) -> None:
        content = self.stocked.contents[number]
        blobs, written = list(content.blobs), self.model.absent(content)
        at %= len(blobs)
        blobs[at] = PendingBlob(blobs[at].fingerprint, _breaking)
        if blobs[at].digest not in written:
            return
        with pytest.raises(RuntimeError, match="the source broke"):
            self.registries[who].commit_version(name, content.manifest, blobs)
        self.model.orphans.update(written[: written.index(blobs[at].digest)])

    # What people do to versions

    def _some(self, number: int, removed: bool = False) -> tuple[str, int]:
        there = sorted(self.model.versions(removed))
        return there[number % len(there)]

    def _remove(self, who: int, number: int, to: int | None) -> None:
        if not self.model.versions():
            return
        name, version = self._some(number)
        live = list(self.model.names[name].live())
        tags_to = None if to is None else live[to % len(live)]
        given = None if tags_to is None else f"{name}:v{tags_to}"
        registry = self.registries[who]
        if tags_to == version:
            with pytest.raises(UsageError, match="is the version that is to be removed"):
                registry.remove(f"{name}:v{version}", tags_to=given)
        elif self.model.remove(name, version, tags_to):
            assert registry.remove(f"{name}:v{version}", tags_to=given).number == version
        else:
            with pytest.raises(Conflict, match="is what the tags"):
                registry.remove(f"{name}:v{version}", tags_to=given)

    @rule(who=handle, number=pick, to=st.none() | pick)
    def remove(self, who: int, number: int, to: int | None) -> None:
        self._remove(who, number, to)

    @precondition(lambda self: self.model.versions(removed=True))
    @rule(who=handle, number=pick)
    def restore(self, who: int, number: int) -> None:
        name, version = self._some(number, removed=True)
        assert self.registries[who].restore(f"{name}:v{version}").number == version
        self.model.restore(name, version)

    @rule(who=handle, name=name_, number=st.integers(1, 9))
    def restore_what_is_not_in_the_trash(self, who: int, name: str, number: int) -> None:
        if (name, number) not in self.model.versions(removed=True):
            with pytest.raises(NotFound):
                self.registries[who].restore(f"{name}:v{number}")

    @precondition(lambda self: self.model.versions())
    @rule(who=handle, number=pick, tag=st.sampled_from(TAGS))
    def tag(self, who: int, number: int, tag: str) -> None:
        name, version = self._some(number)
        self.model.names[name].move(tag, version)
        self._read(
            self.model.names[name].versions[version].content,
            lambda: self.registries[who].tag(f"{name}:v{version}", tag),
        )

    # Reading

    def _read(self, content: Content, call: Callable[[], loreg.Version]) -> None:
        """A manifest that was damaged is not read, and is put aside."""
        state = self.model.bad.get(content.digest)
        if state is None:
            version = call()
            assert version.digest == content.digest and version.manifest == content.manifest
            return
        with pytest.raises(BadInput if state == "corrupt" else NotFound):
            call()
        self.model.bad[content.digest] = "missing"

    @precondition(lambda self: self.model.versions())
    @rule(who=handle, number=pick, digits=st.integers(8, 64), by=st.sampled_from(["number", "tag", "name", "digest"]))
    def resolve(self, who: int, number: int, digits: int, by: str) -> None:
        name, version = self._some(number)
        named = self.model.names[name]
        reference = f"{name}:v{version}"
        if by == "tag":
            tag, version = sorted(named.tags.items())[number % len(named.tags)]
            reference = f"{name}:{tag}"
        elif by == "name":
            reference, version = name, max(named.live())
        elif by == "digest":
            prefix = f"blake3:{named.versions[version].content.digest.hex[:digits]}"
            reference = f"{name}@{prefix}" if number % 2 else prefix
        self._read(named.versions[version].content, lambda: self.registries[who].resolve(reference))

    @rule(who=handle, name=name_, number=st.integers(1, 9), content=pick, tag=st.sampled_from(TAGS))
    def what_is_not_there_is_not_found(self, who: int, name: str, number: int, content: int, tag: str) -> None:
        there, digest = self.model.versions(), self.stocked.contents[content].digest
        named = self.model.names.get(name)
        absent = [] if (name, number) in there else [f"{name}:v{number}"]
        absent += [] if named and tag in named.tags else [f"{name}:{tag}"]
        absent += [] if any(kept.content.digest == digest for kept in there.values()) else [str(digest)]
        for reference in absent:
            with pytest.raises(NotFound):
                self.registries[who].resolve(reference)

    @rule(who=handle, by=st.sampled_from(["rank", "query", "base", "target"]), number=pick)
    def listed(self, who: int, by: str, number: int) -> None:
        value = _ASKED[by][number % len(_ASKED[by])]
        rows = self.registries[who].list_versions(**{by: value})
        newest = {(name, max(live)): live[max(live)] for name in NAMES if (live := self._live(name))}
        hits = {key for key, kept in newest.items() if _meets(key[0], kept, by, value)}
        assert [(row.name, row.number) for row in rows] == sorted(hits)

    def _live(self, name: str) -> dict[int, Kept]:
        return self.model.names[name].live() if name in self.model.names else {}

    @precondition(lambda self: self.model.versions())
    @rule(who=handle, number=pick)
    def export(self, who: int, number: int) -> None:
        name, version = self._some(number)
        content = self.model.names[name].versions[version].content
        reference, bad = f"{name}:v{version}", {d: self.model.bad[d] for d in content.data if d in self.model.bad}
        if not bad:
            self._exported(self.registries[who], reference, content)
            return
        out = self.folder / f"out{next(self.stocked.numbers)}"
        with pytest.raises((BadInput, NotFound)):
            self.registries[who].export(reference, out)
        assert not out.exists()
        aside = [digest for digest, state in bad.items() if state == "corrupt" and not self._copy_is_there(digest)]
        assert aside or "missing" in bad.values()
        self.model.bad.update(dict.fromkeys(aside, "missing"))  # the first that it came to

    def _exported(self, registry: loreg.Registry, reference: str, content: Content) -> None:
        out = self.folder / f"out{next(self.stocked.numbers)}"
        registry.export(reference, out)
        assert tiny.files_in(out) == content.files
        shutil.rmtree(out)

    # Damage and repair

    def _row(self, digest: Digest) -> BlobKey:
        with self.registries[0].database.read() as session:
            row = queries.find_blob(session, digest)
            assert row is not None
            return BlobKey(digest, row.generation)

    def _copy_is_there(self, digest: Digest) -> bool:
        return self.registries[0].storage.store.size(self._row(digest)) is not None

    @precondition(lambda self: set(self.model.rows) - set(self.model.bad))
    @rule(number=pick, flip=st.booleans(), bit=st.integers(0, 10_000))
    def damage(self, number: int, flip: bool, bit: int) -> None:
        whole = sorted(set(self.model.rows) - set(self.model.bad))
        key = self._row(whole[number % len(whole)])
        store = self.registries[0].storage.store
        path = store.path(key)
        if flip and path is not None and path.is_file():  # an object in a bucket is replaced whole, or not
            data = bytearray(path.read_bytes())
            data[bit // 8 % len(data)] ^= 1 << bit % 8
            path.chmod(0o644)
            path.write_bytes(data)
            self.model.bad[key.digest] = "corrupt"
        else:
            store.delete(key)
            self.registries[0].storage.cache.path(key.digest).unlink(missing_ok=True)  # it would be read all the same
            self.model.bad[key.digest] = "missing"

    @rule(number=pick)
    def a_copy_that_nobody_knows(self, number: int) -> None:
        content = self.stocked.contents[number]
        digest = sorted(content.data)[number % len(content.data)]
        self.registries[0].storage.store.put(digest, new_generation(), [content.data[digest]])
        self.model.orphans[digest] += 1

    @rule(who=handle)
    def fsck(self, who: int) -> None:
        found = self.registries[who].fsck()
        assert {problem.what: problem.kind for problem in found.problems} == self._problems()
        assert found.ok == (not self.model.bad) and found.orphans == self.model.orphans.total()

    @rule(who=handle, source=st.booleans())
    def repair(self, who: int, source: bool) -> None:
        sources = [self.stocked.backup] if source else []
        expected, model = self._problems(), self.model
        self.read.clear()
        self.seen = None
        found = self.registries[who].fsck(repair=True, sources=sources)
        assert {problem.what: problem.kind for problem in found.problems} == expected
        for digest in list(model.bad):
            if model.orphans[digest] or source:
                del model.bad[digest]
            else:
                model.bad[digest] = "missing"
        assert found.ok == (not model.bad)

    def _problems(self) -> dict[str, str]:
        return {str(digest): state for digest, state in self.model.bad.items()}

    # Collections

    def _collect(self, who: int, grace: timedelta, dry_run: bool, pinned: Any = ()) -> None:
        registry, everything = self.registries[who], not grace
        if not self.model.collectable(everything):
            with pytest.raises(BadInput, match="othing was collected"):
                registry.collect(grace=grace, dry_run=dry_run)
            return
        self.seen = None
        found = registry.collect(grace=grace, dry_run=dry_run)
        model = copy.deepcopy(self.model) if dry_run else self.model
        purged = set(model.versions(removed=True)) if everything else set()
        assert {(row.name, row.number) for row in found.versions} == purged
        gone = model.collect(everything, pinned)
        assert Counter(key.digest for key in found.copies if str(key.digest) in self.universe) == gone
        assert found.unfinished == ()

    @rule(who=handle, grace=st.sampled_from([timedelta(), timedelta(), LONG]), dry_run=st.booleans())
    def collect(self, who: int, grace: timedelta, dry_run: bool) -> None:
        self._collect(who, grace, dry_run)

    @rule(who=handle)
    def reopen(self, who: int) -> None:
        self.registries[who].close()
        self.registries[who] = self.place.open()

    # After every step

    @invariant()
    def the_catalog_has_what_the_dict_has(self) -> None:
        """Read by SQL alone: the registry's own calls take most of the time, and are rules."""
        self.steps += 1
        model, removed = self.model, self.model.versions(removed=True)
        every = model.versions() | removed
        with self.registries[0].database.read() as session:
            said = session.connection().exec_driver_sql
            known = {digest: generation for digest, generation in said(_BLOBS) if digest in self.universe}
            assert {(name, number): tuple(rest) for name, number, *rest in said(_VERSIONS)} == {
                key: (str(kept.content.digest), kept.note, key in removed) for key, kept in every.items()
            }
            assert {(name, tag): (number, seq) for name, tag, number, seq in said(_TAGS)} == {
                (name, tag): (number, len(named.moves[tag]))
                for name, named in model.names.items()
                for tag, number in named.tags.items()
            }
            assert [*said("SELECT lease_id FROM intents")] == []
        assert model.needed() <= model.rows
        assert set(known) == {str(digest) for digest in model.rows}
        live = {BlobKey(Digest.parse(digest), generation) for digest, generation in known.items()}
        self.whole = {key for key in live if key.digest not in model.bad}
        self._every_byte_is_what_was_pushed()

    def _every_byte_is_what_was_pushed(self) -> None:
        """In the store: copies are read once, and once more after a repair and when the run ends; and listed where
        the dict says that there are others than before, after a collection or a repair, and when the run ends."""
        store, copies = self.registries[0].storage.store, self.model.copies()
        self.read &= self.whole
        for key in self.whole - self.read:
            store.read(key)  # verified
        self.read |= self.whole
        if self.seen != copies:
            self.seen = Counter(key.digest for key in store.keys() if str(key.digest) in self.universe)  # noqa: SIM118
            assert self.seen == copies

    @rule(who=handle)
    def shown(self, who: int) -> None:
        registry, model = self.registries[who], self.model
        rows = {(row.name, row.number): (row.digest, row.note) for row in registry.list_versions(all_versions=True)}
        assert rows == {key: (kept.content.digest, kept.note) for key, kept in model.versions().items()}
        assert {(row.name, row.number) for row in registry.trash()} == set(model.versions(removed=True))
        for name, named in model.names.items():
            versions, moves = registry.log(name)
            assert [row.number for row in versions] == list(named.live())
            history: dict[str, list[int | None]] = {}
            for move in moves:
                history.setdefault(move.name, []).append(move.number)
                assert move.seq == len(history[move.name])
            assert history == named.moves
            assert registry.tags(name) == named.tags


_BLOBS = "SELECT digest, generation FROM blobs WHERE state = 'live'"
_VERSIONS = """SELECT a.name, v.number, v.digest, v.note, v.removed_at IS NOT NULL
    FROM versions v JOIN adapters a ON a.id = v.adapter_id"""
_TAGS = """SELECT a.name, t.name, v.number, t.seq
    FROM tags t JOIN adapters a ON a.id = t.adapter_id JOIN versions v ON v.id = t.version_id"""


@contextmanager
def _before_the_commit(registry: loreg.Registry, then: Callable[[], None]) -> Iterator[None]:
    """``then`` happens once, when a push has written all that it has to."""
    database, calls = registry.storage.database, itertools.count()
    write = database.write

    def interposed() -> Any:
        if next(calls) == 1:  # the first transaction pins, the second commits
            then()
        return write()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(database, "write", interposed)
        yield


_ASKED: dict[str, list[Any]] = {
    "rank": [1, 2, 3, 4],
    "query": ["a", "own", "100%", "try", "Q_PROJ", "_"],
    "base": ["base", "other"],
    "target": ["q_proj", "x"],
}


def _meets(name: str, kept: Kept, by: str, value: Any) -> bool:
    manifest = kept.content.manifest
    if by == "query":
        return any(value.lower() in text.lower() for text in (name, kept.note or "", *manifest.targets))
    known = {"rank": [manifest.rank], "base": [manifest.base.name], "target": manifest.targets}
    return value in known[by]


def _breaking() -> Any:
    yield b""
    raise RuntimeError("the source broke")


@pytest.fixture(scope="module")
def stocked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stocked]:
    # In memory where that can be: a hundred thousand syncs of a disk would show nothing.
    with in_memory(tmp_path_factory.mktemp("machine")) as root:
        yield Stocked(root)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.usefixtures("one_compilation")
@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("place_name", PLACES)
def test_a_registry_is_a_dict(stocked: Stocked, place_name: str, part: int) -> None:
    chosen = part if not options.nightly else random.SystemRandom().randrange(2**32)
    print(f"seed {chosen}")
    runs, before = counts(RUNS) // PARTS, stocked.full_runs
    run_state_machine_as_test(
        seed(chosen)(lambda: RegistryAgainstADict(place_name, stocked)),
        settings=settings(
            max_examples=runs,
            stateful_step_count=STEPS,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
        _min_steps=STEPS - 1,  # or one run of three would be shorter
    )
    assert stocked.full_runs - before >= runs
