"""The five steps of a push on a real store and a real catalog, with a crash before every call of either.

Whatever happens: every version that the catalog shows is complete and reads back, and a push that is
tried again succeeds.
"""

from __future__ import annotations

import os
import shutil
import traceback
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from backends import ON_FILES, PLACES, Place
from sqlalchemy import event, select, text

from loreg.catalog import Database, queries
from loreg.catalog.models import Blob, Edge, Version
from loreg.digest import Digest, Fingerprint, fingerprint
from loreg.errors import Conflict
from loreg.store import BlobKey, LocalStore, new_generation

NOW = datetime(2025, 3, 1, tzinfo=UTC)
TTL = timedelta(hours=1)
FACTORS, HEAD, MANIFEST = b"factors" * 1000, b"head" * 1000, b'{"format":"loreg/1"}'
ROOT = Digest.of(b"base")
DISK_CALLS = ("write", "link", "unlink")  # every one is tried in tests/stores/test_local_store.py


@pytest.fixture(params=ON_FILES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def place(name: str, tmp_path: Path) -> Place:
    return _empty(name, tmp_path)


def _empty(name: str, directory: Path) -> Place:
    found = PLACES[name](directory)
    found.home.mkdir(parents=True, exist_ok=True)
    found.database().close()
    return found


def push(
    db: Database,
    store: LocalStore,
    *,
    now: datetime = NOW,
    before_commit: Callable[[], None] = lambda: None,
) -> int:
    """The protocol, in the order of the design; the number of the version."""
    contents = {Digest.of(data): data for data in (FACTORS, HEAD, MANIFEST)}
    *blobs, manifest = contents
    with db.write() as s:
        lease = queries.begin_lease(s, f"{os.getpid()}", list(contents), NOW, TTL)
    written = [present(db, store, digest, data) or write(store, digest, data) for digest, data in contents.items()]
    before_commit()
    with db.write() as s:
        queries.require_lease(s, lease, now)
        for found, generation in written:
            if store.size(BlobKey(found.digest, generation)) != found.size:
                raise Conflict(f"blob {found.digest} is gone.")
        queries.record_blobs(s, written, NOW)
        queries.record_edges(s, manifest, blobs)
        seen = queries.tag_seq(s, "sql", "latest")
        version, created = queries.add_version(
            s,
            "sql",
            manifest,
            base_root=ROOT,
            base_name="gpt2",
            rank=8,
            modules=1,
            bytes=1,
            targets=["c_attn"],
            note=None,
            now=NOW,
        )
        if created:
            queries.move_tag(s, "sql", "latest", version, seen, NOW)
        queries.release_lease(s, lease)
    return version.number


def present(db: Database, store: LocalStore, digest: Digest, data: bytes) -> tuple[Fingerprint, str] | None:
    with db.read() as s:
        row = queries.find_blob(s, digest)
    if row is None or row.state != "live" or store.size(BlobKey(digest, row.generation)) != len(data):
        return None
    return Fingerprint(row.digest, row.sha256, row.size), row.generation


def write(store: LocalStore, digest: Digest, data: bytes) -> tuple[Fingerprint, str]:
    generation = new_generation()
    store.put(digest, generation, [data[:500], data[500:]])
    return fingerprint([data]), generation


def check(place: Place) -> int:
    """Assert what must always hold; how many versions there are."""
    store = LocalStore(place.home)
    with place.database() as db, db.read() as s:
        if s.connection().dialect.name == "sqlite":
            assert s.execute(text("PRAGMA integrity_check")).scalar() == "ok"
            assert s.execute(text("PRAGMA foreign_key_check")).all() == []
        rows = {row.digest: row for row in s.scalars(select(Blob))}
        versions = s.scalars(select(Version)).all()
        for row in rows.values():
            assert len(store.read(BlobKey(row.digest, row.generation))) == row.size
        for version in versions:
            needs = set(s.scalars(select(Edge.blob).where(Edge.source == version.digest)))
            assert needs == {Digest.of(FACTORS), Digest.of(HEAD)}
            assert {version.digest, *needs} <= set(rows)
            assert queries.find_version(s, "sql", tag="latest").id == version.id
        if not versions:
            assert rows == {}
    for key in store.keys():  # noqa: SIM118 - not a dict
        store.read(key)
    return len(versions)


def crash_before(step: int, home: Path, db: Database) -> None:
    """Have the process end before its call number ``step`` of the disk, SQL or COMMIT."""
    remaining = step

    def count(*_: object) -> None:
        nonlocal remaining
        remaining -= 1
        if remaining == -1:
            os._exit(42)

    def stepping(original: Callable) -> Callable:
        def call(*args, **options):
            count()
            return original(*args, **options)

        return call

    for name in DISK_CALLS:
        setattr(os, name, stepping(getattr(os, name)))
    event.listen(db._engine, "before_cursor_execute", count)
    event.listen(db._engine, "commit", count)


def children(*functions: Callable[[], None]) -> Iterator[int]:
    pids = []
    for function in functions:
        pid = os.fork()
        if pid == 0:
            try:
                function()
            except Conflict:
                os._exit(6)
            except BaseException:
                traceback.print_exc()
                os._exit(99)
            os._exit(0)
        pids.append(pid)
    for pid in pids:
        yield os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.slow
def test_a_crash_before_any_call_leaves_no_version_or_a_whole_one(name: str, tmp_path: Path) -> None:
    outcomes = []
    empty = _empty(name, tmp_path / "empty")
    for step in range(1000):
        if name == "sqlite-files":  # a closed database is one file
            place = Place(tmp_path / str(step))
            shutil.copytree(empty.home, place.home)
        else:
            place = _empty(name, tmp_path / str(step))

        def crashing(place: Place = place, step: int = step) -> None:
            db = place.database()
            crash_before(step, place.home, db)
            push(db, LocalStore(place.home))

        (code,) = children(crashing)
        outcomes.append(check(place))
        with place.database() as db:
            assert push(db, LocalStore(place.home)) == 1
        assert check(place) == 1
        if code == 0:
            break
        assert code == 42
    assert len(outcomes) > 40
    # One call commits: before it nothing is to be seen, after it everything.
    assert outcomes == sorted(outcomes)
    assert outcomes[-2:] == [0, 1]


def test_the_fence_keeps_out_a_push_whose_lease_was_taken(place: Place) -> None:
    with place.database() as db:

        def reap() -> None:
            with db.write() as s:
                s.execute(text("DELETE FROM leases"))

        with pytest.raises(Conflict, match="taken away"):
            push(db, LocalStore(place.home), before_commit=reap)
        assert check(place) == 0
        with pytest.raises(Conflict, match="expired"):
            push(db, LocalStore(place.home), now=NOW + TTL)
        assert check(place) == 0
        assert push(db, LocalStore(place.home)) == 1
    assert check(place) == 1


def test_a_late_delete_never_hits_a_fresh_copy(place: Place) -> None:
    store = LocalStore(place.home)
    with place.database() as db:
        with db.write() as s:
            old = write(store, Digest.of(FACTORS), FACTORS)
            queries.record_blobs(s, [old], NOW)
            s.execute(text("UPDATE blobs SET state = 'deleting'"))
        assert push(db, store) == 1
    store.delete(BlobKey(old[0].digest, old[1]))  # the collector that marked it wakes up
    assert check(place) == 1


def test_a_blob_that_vanished_before_the_commit_stops_it(place: Place) -> None:
    store = LocalStore(place.home)

    def vanish() -> None:
        for key in list(store.keys()):
            store.delete(key)

    with place.database() as db, pytest.raises(Conflict, match="is gone"):
        push(db, store, before_commit=vanish)
    assert check(place) == 0


def test_a_present_blob_is_not_written_again(place: Place) -> None:
    store = LocalStore(place.home)
    with place.database() as db:
        assert push(db, store) == 1
        before = list(store.keys())
        assert push(db, store) == 1
    assert list(store.keys()) == before
    assert len(before) == 3


def test_pushers_of_one_content_at_once_make_one_version(place: Place) -> None:
    def pushing() -> None:
        with place.database() as db:
            push(db, LocalStore(place.home))

    assert list(children(*[pushing] * 4)) == [0] * 4
    assert check(place) == 1
    with place.database() as db, db.read() as s:
        assert s.execute(text("SELECT count(*) FROM leases")).scalar() == 0
        assert [move.seq for move in queries.tag_history(s, "sql")] == [1]
