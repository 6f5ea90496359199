"""The cache of blobs that are elsewhere: nothing in it is believed for its name, and it stays within its bounds."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import tampering
import tiny
from backends import PLACES, Place

import loreg
from loreg.digest import Digest
from loreg.errors import BadInput, CheckFailed, UsageError
from loreg.store import BlobCache, BlobKey, cache
from loreg.store.object_store import ObjectStore

HOUR = 3600


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return PLACES["sqlite-s3"](tmp_path)


@pytest.fixture
def registry(place: Place) -> Iterator[loreg.Registry]:
    with place.open() as opened:
        yield opened


@pytest.fixture
def gets(monkeypatch: pytest.MonkeyPatch) -> list[BlobKey]:
    """What is fetched."""
    found: list[BlobKey] = []
    original = ObjectStore.open

    def counted(self: ObjectStore, key: BlobKey) -> object:
        found.append(key)
        return original(self, key)

    monkeypatch.setattr(ObjectStore, "open", counted)
    return found


def _some(registry: loreg.Registry) -> BlobKey:
    return registry.storage.key(registry.find("sql").digest)


def _write(path: Path, data: bytes) -> None:
    path.chmod(0o644)
    path.write_bytes(data)


def test_fetched_once(pushed: loreg.Registry, place: Place, gets: list[BlobKey]) -> None:
    key = _some(pushed)
    path = pushed.storage.path(key.digest)
    assert path == pushed.home / "cache" / "blobs" / key.digest.hex[:2] / key.digest.hex
    assert Digest.of(path.read_bytes()) == key.digest and path.stat().st_mode & 0o777 == 0o444
    assert pushed.storage.path(key.digest) == path and pushed.storage.read(key.digest) == path.read_bytes()
    assert gets == [key]
    with place.open() as another:
        assert another.storage.path(key.digest) == path
    assert gets == [key]


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty", "gone", "unreadable"])
@pytest.mark.parametrize("anew", [False, True], ids=["the same process", "another process"])
def test_what_is_damaged_is_fetched_again(
    pushed: loreg.Registry, place: Place, gets: list[BlobKey], damage: str, anew: bool
) -> None:
    key = _some(pushed)
    path = pushed.storage.path(key.digest)
    data = path.read_bytes()
    if damage in ("gone", "unreadable"):
        path.unlink()
        if damage == "unreadable":
            path.symlink_to(path)
    else:
        _write(path, {"flipped": data[:-1] + b"?", "cut": data[:-1], "empty": b""}[damage])
    with place.open() as another:
        reader = another if anew else pushed
        assert reader.storage.path(key.digest).read_bytes() == data
        assert reader.storage.read(key.digest) == data
    assert gets == [key, key]


def test_a_corrupt_copy_elsewhere_is_put_aside_and_a_push_heals_it(
    pushed: loreg.Registry, tiny_adapter: Path
) -> None:
    key, store = _some(pushed), pushed.storage.store
    data = store.read(key)
    for read in (pushed.storage.path, pushed.storage.read):
        tampering.overwrite(store, pushed.storage.key(key.digest), data[:-1] + b"?")
        (pushed.home / "cache" / "blobs" / key.digest.hex[:2] / key.digest.hex).unlink(missing_ok=True)
        with pytest.raises(BadInput, match=r"is corrupt.*are kept in .*quarantine.*sql:v1 needs it"):
            read(key.digest)
        assert not list((pushed.home / "cache").rglob(f"*{key.digest.hex}*"))
        pushed.push(tiny_adapter, base="base", name="sql")
        assert pushed.storage.read(key.digest) == data
    assert pushed.fsck().ok


def test_no_fetch_that_failed_leaves_anything(tmp_path: Path) -> None:
    def failing() -> Iterator[bytes]:
        yield b"half"
        raise ValueError("of the source")

    found = BlobCache(tmp_path)
    with pytest.raises(ValueError, match="of the source"):
        found.add(Digest.of(b"x"), failing())
    assert found.add(Digest.of(b"x"), [b"y"]) == Digest.of(b"y")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_disk_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(CheckFailed, match="LOREG_HOME"):
        BlobCache(tmp_path / "file").add(Digest.of(b"x"), [b"x"])


def _aged(path: Path, hours: float) -> None:
    then = time.time() - hours * HOUR
    os.utime(path, (then, path.stat().st_mtime))


def test_the_least_recently_used_leave(tmp_path: Path) -> None:
    first = BlobCache(tmp_path, limit=10_000)
    data = [bytes([number]) * 1000 for number in range(20)]
    for number, one in enumerate(data):
        first.add(Digest.of(one), [one])
        _aged(first.path(Digest.of(one)), hours=100 - number)
    assert all(first.path(Digest.of(one)).exists() for one in data)  # this process may have them open
    second = BlobCache(tmp_path, limit=10_000)
    second.note(second.path(Digest.of(data[3])))
    held = second.path(Digest.of(data[5]))
    second.add(Digest.of(b"new"), [b"new"])
    left = [
        number for number, one in enumerate(data) if (tmp_path / Digest.of(one).hex[:2] / Digest.of(one).hex).exists()
    ]
    assert left == [3, 5, *range(13, 20)] and held.exists()


def test_what_was_used_within_the_hour_stays(tmp_path: Path) -> None:
    first = BlobCache(tmp_path, limit=0)
    path = first.path(Digest.of(b"x"))
    first.add(Digest.of(b"x"), [b"x"])
    BlobCache(tmp_path, limit=0).add(Digest.of(b"y"), [b"y"])
    assert path.exists()
    _aged(path, 1.1)
    BlobCache(tmp_path, limit=0).add(Digest.of(b"z"), [b"z"])
    assert not path.exists()


def test_what_was_left_behind_goes_after_a_day(tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    for name, age in (("old", 25), ("new", 23)):
        (tmp_path / "tmp" / name).write_bytes(b"half")
        then = time.time() - age * HOUR
        os.utime(tmp_path / "tmp" / name, (then, then))
    BlobCache(tmp_path).add(Digest.of(b"x"), [b"x"])
    assert [path.name for path in (tmp_path / "tmp").iterdir()] == ["new"]


def test_many_fetch_at_once(pushed: loreg.Registry, place: Place) -> None:
    digests = [blob.digest for blob in pushed.resolve("sql").manifest.blobs]
    found: list[Digest] = []

    def fetch() -> None:
        with place.open() as another:
            found.extend(Digest.of(another.storage.path(digest).read_bytes()) for digest in digests)

    threads = [threading.Thread(target=fetch) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == sorted(digests * 4)


@pytest.mark.parametrize("text", ["-1", "1e9", "ten", "٣", "1 "])
def test_a_limit_that_is_none(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOREG_CACHE_BYTES", text)
    with pytest.raises(UsageError, match="LOREG_CACHE_BYTES"):
        cache.limit_from_environment()


def test_everything_works_on_it(pushed: loreg.Registry, tmp_path: Path, tiny_base: Path, tiny_adapter: Path) -> None:
    """Merges map the files; what comes out is what comes out of a store in files."""
    with loreg.open(tmp_path / "other") as files:
        files.add_base(tiny_base, "base")
        files.push(tiny_adapter, base="base", name="sql")
        files.push(tiny_adapter.parent / "humor", base="base", name="humor")
        expected = files.merge("sql+humor", tmp_path / "expected")
    merged = pushed.merge("sql+humor", tmp_path / "merged", undo=True)
    assert merged.weights_root == expected.weights_root and merged.verification.ok
    assert pushed.unmerge(tmp_path / "merged", tmp_path / "again", journal=True).matches_base
    exported = pushed.export("sql", tmp_path / "exported")
    assert {path.name: path.read_bytes() for path in exported.iterdir()} == {
        path.name: path.read_bytes() for path in tiny_adapter.iterdir()
    }
    assert pushed.compose("sql+humor", "both", method="svd", rank=2).version.number == 1
    assert pushed.load("both")
    assert pushed.verify("sql").ok
    tiny.write_adapter(tmp_path / "third", tiny.adapter(seed=8))
    assert pushed.fsck().ok and pushed.collect().copies == ()
