"""A blob is hashed when its bytes are first read, by whatever process, and again when its file was changed."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import astuple
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import loreg
from loreg import checkpoint
from loreg.catalog import queries
from loreg.checkpoint import FileStamp
from loreg.cli import main
from loreg.digest import Digest
from loreg.errors import BadInput, UsageError
from loreg.registry import storage, verified


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[Digest]:
    """What was hashed for being read as a file."""
    found: list[Digest] = []

    class Counting(storage.Hasher):
        def digest(self) -> Digest:
            found.append(digest := super().digest())
            return digest

    monkeypatch.setattr(storage, "Hasher", Counting)
    return found


@pytest.fixture
def old(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if every file had been there for long: no call sets a ctime."""
    monkeypatch.setattr(checkpoint, "_SETTLED_NS", -(10**18))


@pytest.fixture
def worth(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every blob is large."""
    monkeypatch.setattr(verified, "WORTH", 1)


def _blob(registry: loreg.Registry) -> Digest:
    return registry.resolve("sql").manifest.blobs[0].digest


def _flip(path: Path) -> None:
    """One bit, with all that people can set as it was."""
    stat = path.stat()
    path.chmod(0o644)
    with path.open("r+b") as file:
        data = file.read()
        file.seek(len(data) // 2)
        file.write(bytes([data[len(data) // 2] ^ 1]))
    path.chmod(stat.st_mode)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.usefixtures("old")
def test_hashed_once_by_a_process(pushed: loreg.Registry, hashed: list[Digest]) -> None:
    digest = _blob(pushed)
    for _ in range(3):
        pushed.storage.path(digest)
    assert hashed == [digest]
    with loreg.open(pushed.home) as other:  # as another process would: so small a blob is not written down
        other.storage.path(digest)
    assert hashed == [digest] * 2


@pytest.mark.usefixtures("old", "worth")
def test_a_large_one_is_hashed_once_by_all(pushed: loreg.Registry, hashed: list[Digest]) -> None:
    digest = _blob(pushed)
    path = pushed.storage.path(digest)
    for _ in range(3):
        with loreg.open(pushed.home) as other:
            assert other.storage.path(digest) == path
    assert hashed == [digest]
    assert pushed.bases.cache.get(FileStamp.of(path)) is None  # it is no file of a base


@pytest.mark.usefixtures("old", "worth")
def test_damage_is_seen_although_size_and_mtime_are_kept(pushed: loreg.Registry, tiny_adapter: Path) -> None:
    for reopened in (False, True):
        digest = _blob(pushed)
        path = pushed.storage.path(digest)
        os.utime(path, ns=(10**18, 10**18))
        path = pushed.storage.path(digest)
        _flip(path)
        assert path.stat().st_mtime_ns == 10**18
        registry = loreg.open(pushed.home) if reopened else pushed
        with pytest.raises(BadInput, match="is corrupt: its bytes hash to"):
            registry.storage.path(digest)
        if reopened:
            registry.close()
        pushed.push(tiny_adapter, base="base", name="sql")


@pytest.mark.usefixtures("worth")
def test_a_file_that_was_just_written_is_not_believed(
    pushed: loreg.Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Changed within the same tick of the clock, it keeps all of its stamp. Here a tick is a second."""
    fine, second = FileStamp.of, 10**9

    def coarse(path: Path) -> FileStamp:
        stamp = fine(path)
        times = (stamp.mtime_ns // second * second, stamp.ctime_ns // second * second)
        return FileStamp(stamp.device, stamp.inode, stamp.size, *times)

    monkeypatch.setattr(FileStamp, "of", coarse)
    digest = _blob(pushed)
    path = pushed.storage.path(digest)
    for _ in range(20):
        assert pushed.storage.path(digest) == path
        _flip(path)
        key = pushed.storage.key(digest)
        with pytest.raises(BadInput, match="is corrupt"):
            pushed.storage.path(digest)
        aside = pushed.home / "quarantine" / key.name
        _flip(aside)
        aside.rename(path)


@pytest.mark.usefixtures("old", "worth")
def test_strict_believes_nothing(
    pushed: loreg.Registry, hashed: list[Digest], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a clock was set back, or a disk rots, stat says what it said before."""
    digest = _blob(pushed)
    path = pushed.storage.path(digest)
    stamp = FileStamp.of(path)
    with loreg.open(pushed.home, strict=True) as strict:
        for _ in range(3):
            strict.storage.path(digest)
        assert hashed == [digest] * 4
        _flip(path)
        monkeypatch.setattr(FileStamp, "of", lambda _: stamp)
        assert pushed.storage.path(digest) == path  # what strict is for
        with loreg.open(pushed.home) as other:
            assert other.storage.path(digest) == path
        with pytest.raises(BadInput, match="is corrupt"):
            strict.storage.path(digest)


@pytest.mark.usefixtures("old", "worth")
def test_strict_for_every_command(pushed: loreg.Registry, hashed: list[Digest], tmp_path: Path) -> None:
    def exported(out: str, said: str) -> int:
        words = ["export", "sql", "--out", str(tmp_path / out), "--home", str(pushed.home)]
        return CliRunner().invoke(main, words, env={"LOREG_VERIFY": said}).exit_code

    assert exported("one", "") == 0 and len(hashed) == 1
    assert exported("two", "once") == 0 and len(hashed) == 1
    assert exported("three", "always") == 0 and len(hashed) == 2
    assert exported("four", "sometimes") == UsageError.exit_code and not (tmp_path / "four").exists()


@pytest.mark.usefixtures("old", "worth")
def test_a_catalog_that_cannot_be_written(
    pushed: loreg.Registry, hashed: list[Digest], monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = _blob(pushed)

    def refuses(*_: Any) -> None:
        raise UsageError("read-only")

    with monkeypatch.context() as patch:
        patch.setattr(pushed.database, "write", refuses)
        pushed.storage.path(digest)
    with loreg.open(pushed.home) as other:
        other.storage.path(digest)
    assert hashed == [digest] * 2


@pytest.mark.usefixtures("old", "worth")
@pytest.mark.parametrize("said", ["", "{}", "null", "[]", "not JSON", '"blake3:00"'])
def test_what_the_catalog_says_is_no_more_than_a_hint(
    pushed: loreg.Registry, hashed: list[Digest], said: str
) -> None:
    digest = _blob(pushed)
    path = pushed.storage.store.path(pushed.storage.key(digest))
    assert path is not None
    with pushed.database.write() as session:
        queries.remember_leaves(session, astuple(FileStamp.of(path)), said, storage.utcnow())
    pushed.storage.path(digest)
    assert hashed == [digest]


@pytest.mark.usefixtures("old", "worth")
def test_changed_while_it_was_hashed(
    pushed: loreg.Registry, monkeypatch: pytest.MonkeyPatch, hashed: list[Digest]
) -> None:
    digest = _blob(pushed)
    original: Callable[..., None] = verified.Verified.remember

    path = pushed.storage.store.path(pushed.storage.key(digest))
    assert path is not None

    def late(self: verified.Verified, digest: Digest, stamp: FileStamp, began: int) -> None:
        _flip(path)  # behind the reader, and before it says what it has seen
        original(self, digest, stamp, began)

    with monkeypatch.context() as patch:
        patch.setattr(verified.Verified, "remember", late)
        pushed.storage.path(digest)
    with pytest.raises(BadInput, match="is corrupt"):
        pushed.storage.path(digest)
