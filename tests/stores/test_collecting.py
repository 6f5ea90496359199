"""The trash and the collector: what nothing needs goes, what anything needs or a push has pinned stays."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import tampering
import tiny
from backends import PLACES, Place
from sqlalchemy import text

import loreg
from loreg.catalog import queries
from loreg.catalog.models import Blob
from loreg.digest import Digest
from loreg.errors import BadInput, Conflict, NotFound, UsageError
from loreg.registry import collecting, storage
from loreg.registry.storage import PendingBlob
from loreg.store import BlobKey, LocalStore, new_generation

NONE = timedelta()


@pytest.fixture(params=list(PLACES))
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    return PLACES[request.param](tmp_path)


@pytest.fixture
def registry(place: Place) -> Iterator[loreg.Registry]:
    with place.open() as opened:
        yield opened


def _keys(registry: loreg.Registry) -> set[BlobKey]:
    return set(registry.storage.store.keys())


def _rows(registry: loreg.Registry) -> dict[str, str]:
    with registry.database.read() as session:
        return {row.digest: row.state for row in session.execute(text("SELECT digest, state FROM blobs"))}


def _whole(registry: loreg.Registry) -> None:
    """Every version that is shown reads back, and what the catalog knows is what is stored."""
    for row in registry.list_versions(all_versions=True):
        version = registry.resolve(f"{row.name}:v{row.number}")
        for blob in version.manifest.blobs:
            registry.storage.read(blob.digest)
    assert set(_rows(registry)) <= {str(key.digest) for key in _keys(registry)}


def _push(registry: loreg.Registry, tmp_path: Path, name: str, seed: int) -> loreg.Version:
    folder = tiny.write_adapter(tmp_path / f"{name}{seed}", tiny.adapter(seed=seed))
    return registry.push(folder, base="base", name=name)


# --- the trash ------------------------------------------------------------------------------------------


def test_removed_and_restored(pushed: loreg.Registry, tmp_path: Path) -> None:
    second = _push(pushed, tmp_path, "sql", 7)
    assert pushed.remove("sql:v2").digest == second.digest
    assert [row.number for row in pushed.log("sql")[0]] == [1]
    assert pushed.tags("sql") == {"latest": 1}
    assert pushed.resolve("sql").number == 1
    (row,) = pushed.trash()
    assert (row.name, row.number, row.digest) == ("sql", 2, second.digest) and row.removed_at is not None
    with pytest.raises(NotFound, match=r"sql:v2 is in the trash.*loreg restore sql:v2"):
        pushed.resolve("sql:v2")
    for reference in (f"sql@{second.digest}", str(second.digest)):
        with pytest.raises(NotFound):
            pushed.resolve(reference)
    assert [row.number for row in pushed.list_versions(query="sql", all_versions=True)] == [1]
    assert pushed.restore("sql:v2").number == 2
    assert pushed.tags("sql") == {"latest": 2} and pushed.trash() == []
    assert pushed.resolve("sql").digest == second.digest


def test_the_last_version_of_a_name(pushed: loreg.Registry) -> None:
    pushed.remove("sql")
    assert pushed.tags("sql") == {} and pushed.list_versions(query="sql") == []
    with pytest.raises(NotFound, match="no versions"):
        pushed.resolve("sql")
    pushed.restore("sql:v1")
    assert pushed.tags("sql") == {"latest": 1}
    assert [move.seq for move in pushed.log("sql")[1] if move.name == "latest"] == [1, 2, 3]


def test_the_same_content_again_takes_it_out(pushed: loreg.Registry, tiny_adapter: Path) -> None:
    pushed.remove("sql")
    again = pushed.push(tiny_adapter, base="base", name="sql")
    assert (again.number, again.created) == (1, False)
    assert pushed.tags("sql") == {"latest": 1} and pushed.trash() == []


def test_tags_are_never_left_pointing_nowhere(pushed: loreg.Registry, tmp_path: Path) -> None:
    _push(pushed, tmp_path, "sql", 7)
    pushed.tag("sql:v1", "prod")
    with pytest.raises(Conflict, match="sql:v1 is what the tags prod point to"):
        pushed.remove("sql:v1")
    with pytest.raises(UsageError, match="is the version that is to be removed"):
        pushed.remove("sql:v1", tags_to="sql:prod")
    with pytest.raises(UsageError, match="version of 'humor'"):
        pushed.remove("sql:v1", tags_to="humor")
    assert pushed.tags("sql") == {"latest": 2, "prod": 1}
    pushed.remove("sql:v1", tags_to="sql:v2")
    assert pushed.tags("sql") == {"latest": 2, "prod": 2}


@pytest.mark.parametrize("reference", ["sql", "sql:prod", "nobody:v1", "sql:v9", "sql:v1"])
def test_what_cannot_be_restored(pushed: loreg.Registry, reference: str) -> None:
    with pytest.raises((NotFound, UsageError)):
        pushed.restore(reference)


# --- collecting -----------------------------------------------------------------------------------------


def test_nothing_is_collected_of_what_is_needed(pushed: loreg.Registry) -> None:
    before = _keys(pushed)
    found = pushed.collect(grace=NONE)
    assert (found.copies, found.unfinished, found.versions, found.nbytes) == ((), (), (), 0)
    assert _keys(pushed) == before
    _whole(pushed)


def test_the_trash_is_kept_for_its_time(pushed: loreg.Registry) -> None:
    before, size = _keys(pushed), len(_rows(pushed))
    pushed.remove("sql")
    assert pushed.collect().copies == ()
    assert pushed.collect(grace=timedelta(minutes=1)).versions == ()
    pushed.restore("sql:v1")
    pushed.remove("sql")
    rehearsed = pushed.collect(grace=NONE, dry_run=True)
    assert _keys(pushed) == before and len(pushed.trash()) == 1
    found = pushed.collect(grace=NONE)
    assert found == rehearsed
    assert [(row.name, row.number) for row in found.versions] == [("sql", 1)]
    assert found.copies and _keys(pushed) == before - set(found.copies)
    assert len(_rows(pushed)) == size - len(found.copies)
    assert pushed.trash() == []
    _whole(pushed)
    assert pushed.collect(grace=NONE).copies == ()


def test_a_number_is_never_given_again(pushed: loreg.Registry, tiny_adapter: Path) -> None:
    pushed.remove("sql")
    pushed.collect(grace=NONE)
    assert pushed.push(tiny_adapter, base="base", name="sql").number == 2
    _whole(pushed)


def test_what_two_versions_share_stays(pushed: loreg.Registry, tiny_adapter: Path) -> None:
    pushed.push(tiny_adapter, base="base", name="other")  # the same content under two names
    before = _keys(pushed)
    pushed.remove("sql")
    assert pushed.collect(grace=NONE).copies == () and _keys(pushed) == before
    pushed.remove("other")
    assert pushed.collect(grace=NONE).copies
    _whole(pushed)


def test_orphans(pushed: loreg.Registry) -> None:
    store, data = pushed.storage.store, b"of a push that died"
    orphan = BlobKey(Digest.of(data), new_generation())
    store.put(orphan.digest, orphan.generation, [data])
    known = next(key for key in _keys(pushed) if key != orphan)
    copy = BlobKey(known.digest, new_generation())
    store.put(copy.digest, copy.generation, [store.read(known)])
    found = pushed.collect()
    assert set(found.copies) == {orphan, copy}
    assert found.nbytes == len(data) + store.size(known)  # type: ignore[operator]
    _whole(pushed)


def _left_behind(registry: loreg.Registry, digest: Digest) -> Path:
    """What a write has left that did not end. None can be seen in other stores than those in files."""
    if not isinstance(registry.storage.store, LocalStore):
        pytest.skip("an upload that did not end is no object, and the bucket's lifecycle rule removes it")
    partial = registry.home / "tmp" / f"{digest.hex}.{new_generation()}.{new_generation()}"
    partial.write_bytes(b"half")
    return partial


def test_unfinished_writes(pushed: loreg.Registry) -> None:
    partial = _left_behind(pushed, Digest.of(b"x"))
    (pushed.home / "tmp" / "notes.txt").write_bytes(b"a person's")
    (pushed.home / "blobs" / "notes.txt").write_bytes(b"a person's")
    found = pushed.collect()
    assert [write.name for write in found.unfinished] == [partial.name]
    assert not partial.exists() and found.nbytes == 4
    assert (pushed.home / "tmp" / "notes.txt").exists() and (pushed.home / "blobs" / "notes.txt").exists()
    _whole(pushed)


def test_what_a_push_has_pinned_stays(pushed: loreg.Registry) -> None:
    store, data, now = pushed.storage.store, b"of a push that is alive", datetime.now(UTC)
    key = BlobKey(Digest.of(data), new_generation())
    with pushed.database.write() as session:
        lease = queries.begin_lease(session, "me", [key.digest], now, timedelta(hours=1))
    store.put(key.digest, key.generation, [data])
    assert pushed.collect() == collecting.Collected((), (), (), 0)
    assert key in _keys(pushed)
    with pushed.database.write() as session:
        queries.release_lease(session, lease)
    assert pushed.collect().copies == (key,)


def test_what_a_push_is_writing_stays(pushed: loreg.Registry) -> None:
    with pushed.database.write() as session:
        queries.begin_lease(session, "me", [Digest.of(b"x")], datetime.now(UTC), timedelta(hours=1))
    partial = _left_behind(pushed, Digest.of(b"x"))
    assert pushed.collect() == collecting.Collected((), (), (), 0) and partial.exists()


def test_a_collector_that_died_is_followed_by_another(
    pushed: loreg.Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    pushed.remove("sql")

    def dies(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(type(pushed.storage.store), "delete", dies)
        with pytest.raises(KeyboardInterrupt):
            pushed.collect(grace=NONE)
    assert "deleting" in _rows(pushed).values()
    found = pushed.collect(grace=NONE)
    assert found.copies and set(_rows(pushed).values()) == {"live"}
    _whole(pushed)


def _missing(registry: loreg.Registry, version: loreg.Version) -> None:
    tampering.remove(registry.storage.store, registry.storage.key(version.digest))


def _flipped(registry: loreg.Registry, version: loreg.Version) -> None:
    key = registry.storage.key(version.digest)
    tampering.overwrite(registry.storage.store, key, b"X" + registry.storage.store.read(key)[1:])


def _unknown(registry: loreg.Registry, version: loreg.Version) -> None:
    with registry.database.write() as session:
        session.execute(text("DELETE FROM edges WHERE source = :source"), {"source": str(version.digest)})


@pytest.mark.parametrize("damage", [_missing, _flipped, _unknown])
def test_a_damaged_catalog_or_store_is_not_collected_by(
    pushed: loreg.Registry, damage: Callable[[loreg.Registry, loreg.Version], None]
) -> None:
    store = pushed.storage.store
    store.put(Digest.of(b"x"), new_generation(), [b"x"])
    pushed.remove("humor")
    damage(pushed, pushed.resolve("sql"))
    before, rows = _keys(pushed), _rows(pushed)
    for dry_run in (True, False):
        with pytest.raises(BadInput, match=r"othing was collected.*loreg fsck"):
            pushed.collect(grace=NONE, dry_run=dry_run)
    assert _keys(pushed) == before and _rows(pushed) == rows and len(pushed.trash()) == 1


# --- beside pushes: what the model says of each rule, on the real code --------------------------------------


def _interposed(monkeypatch: pytest.MonkeyPatch, owner: object, name: str, then: Callable[[], object]) -> None:
    """``then`` once, just before the call."""
    original, done = getattr(owner, name), False

    def call(*args: Any, **options: Any) -> Any:
        nonlocal done
        if not done:
            done = True
            then()
        return original(*args, **options)

    monkeypatch.setattr(owner, name, call)


def test_a_push_while_a_delete_is_on_its_way(
    pushed: loreg.Registry, tiny_adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mark is committed, and the collector stands still; the same content is pushed again."""
    pushed.remove("sql")
    again: list[loreg.Version] = []
    _interposed(
        monkeypatch,
        type(pushed.storage.store),
        "delete",
        lambda: again.append(pushed.push(tiny_adapter, base="base", name="sql")),
    )
    assert pushed.collect(grace=NONE).copies
    assert again[0].number == 2
    _whole(pushed)
    assert set(_rows(pushed).values()) == {"live"}


def test_a_push_between_the_listing_and_the_mark(
    pushed: loreg.Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _interposed(monkeypatch, collecting, "_check", lambda: _push(pushed, tmp_path, "new", 11))
    assert pushed.collect(grace=NONE).copies == ()
    _whole(pushed)
    assert pushed.resolve("new").number == 1


def test_a_collection_between_the_look_and_the_commit(
    pushed: loreg.Registry, place: Place, tiny_adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The push has found live copies of what nothing else needs."""
    found = {blob.digest for blob in pushed.resolve("sql").manifest.blobs}
    pushed.remove("sql")
    ensure, before = storage.Storage._ensure, _keys(pushed)

    def ensure_and_collect(self: storage.Storage, blob: PendingBlob, row: Blob | None) -> str | None:
        generation = ensure(self, blob, row)
        if blob.digest in found:
            assert generation is None
            with place.open() as other:
                assert other.collect(grace=NONE).copies == ()
        return generation

    monkeypatch.setattr(storage.Storage, "_ensure", ensure_and_collect)
    version = pushed.push(tiny_adapter, base="base", name="sql")
    monkeypatch.undo()
    assert version.number == 2  # the first left the trash for good, its blobs were pinned
    assert _keys(pushed) == before
    _whole(pushed)


def test_a_push_whose_lease_was_reaped_is_fenced(
    pushed: loreg.Registry, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stood still for longer than its lease; what it wrote was collected."""
    folder = tiny.write_adapter(tmp_path / "late", tiny.adapter(seed=12))
    monkeypatch.setattr(storage, "LEASE", timedelta(microseconds=1))
    ensure = storage.Storage._ensure

    def ensure_and_collect(self: storage.Storage, blob: PendingBlob, row: Blob | None) -> str | None:
        generation = ensure(self, blob, row)
        with place.open() as other:
            other.collect()
        return generation

    monkeypatch.setattr(storage.Storage, "_ensure", ensure_and_collect)
    with pytest.raises(Conflict, match="lease"):
        pushed.push(folder, base="base", name="late")
    monkeypatch.undo()
    with pytest.raises(NotFound):
        pushed.resolve("late")
    assert pushed.push(folder, base="base", name="late").number == 1
    _whole(pushed)
    assert list(pushed.storage.store.unfinished()) == []
