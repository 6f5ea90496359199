"""Inputs that change under a merge, or between two: an error that names the file, and nothing of the result."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny

import loreg
from loreg import staging
from loreg.errors import BadInput, Conflict, LoregError, NotFound
from loreg.merge.resume import Finished

NAMES = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]


class Killed(BaseException):
    """Not an error, and nothing is tidied up after it."""


@pytest.fixture
def base(pushed: loreg.Registry, tmp_path: Path) -> Path:
    """One of three shards, whose digests are remembered; ``sql`` and ``humor`` fit it."""
    names = sorted(model := tiny.model())
    folder = tiny.write_model(tmp_path / "sharded", model, shards=[names[part::3] for part in range(3)])
    for path in folder.iterdir():
        os.utime(path, ns=(10**18, 10**18))
    return folder


def _flip(path: Path, at: int = -1) -> None:
    """Another byte, of the same size and with the times put back as far as that goes."""
    status = path.stat()
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.seek(at, os.SEEK_END)
        byte = file.read(1)
        file.seek(at, os.SEEK_END)
        file.write(bytes([byte[0] ^ 1]))
    path.chmod(status.st_mode & 0o777)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def _replaced(path: Path) -> None:
    """By another file under its name."""
    other = path.with_name("other")
    shutil.copy2(path, other)
    _flip(other)
    other.replace(path)


CHANGES: dict[str, Callable[[Path], object]] = {
    "flipped": _flip,
    "replaced": _replaced,
    "cut": lambda path: os.truncate(path, path.stat().st_size - 7),
    "emptied": lambda path: os.truncate(path, 0),
    "gone": lambda path: path.unlink(),
}


def _verbs(base: Path, out: Path) -> dict[str, Callable[[loreg.Registry, Any], Any]]:
    return {
        "merge": lambda registry, progress: registry.merge(
            "sql", out, base=base, verify="none", threads=1, progress=progress
        ),
        "undo": lambda registry, progress: registry.merge(
            "sql + humor", out, base=base, undo=True, verify="none", threads=1, progress=progress
        ),
        "many": lambda registry, progress: registry.merge_many(
            [("sql", out), ("humor", out.with_name("second"))], base=base, verify="none", threads=1, progress=progress
        ),
    }


def _during(label: str, at: int, act: Callable[[], object]) -> Any:
    """A progress that acts once ``at`` bytes of a stage are done."""

    def stage(name: str, total: int) -> Callable[[int], None]:
        done = -1

        def advance(more: int) -> None:
            nonlocal done
            if name == label and done < at <= (done := max(done, 0) + more):
                act()

        return advance

    return stage


def _nothing(tmp_path: Path) -> None:
    assert not [path.name for path in tmp_path.iterdir() if path.name in ("out", "second")]
    assert not list(tmp_path.glob(".*.partial"))


class Restored:
    """Files that are changed, and after each change are what they were."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._kept = folder, folder.with_name(f"{folder.name} as it was")
        shutil.copytree(folder, self._kept)

    def changes(self) -> Iterator[tuple[str, Callable[[Path], object]]]:
        for name, change in CHANGES.items():
            yield name, change
            shutil.rmtree(self._folder)
            shutil.copytree(self._kept, self._folder)


VERBS = ("merge", "undo", "many")


@pytest.mark.parametrize("shard", [0, 2])
@pytest.mark.parametrize("verb", VERBS)
def test_the_base_changes_during_a_merge(
    pushed: loreg.Registry, base: Path, tmp_path: Path, verb: str, shard: int
) -> None:
    """A shard that was read, and one that is yet to be: by its stamp or its digests, never unseen."""
    path, run = base / NAMES[shard], _verbs(base, tmp_path / "out")[verb]
    for name, change in Restored(base).changes():
        with pytest.raises((BadInput, NotFound)) as caught:
            run(pushed, _during("merging", 1, partial(change, path)))
        assert path.name in str(caught.value) and caught.value.exit_code in (3, 5), name
        _nothing(tmp_path)


def _factors(registry: loreg.Registry, name: str) -> Path:
    blobs = registry.resolve(name).manifest.blobs
    return registry.storage.path(next(blob.digest for blob in blobs if blob.role == "factors"))


@pytest.mark.parametrize("verb", VERBS)
def test_an_adapter_changes_during_a_merge(pushed: loreg.Registry, base: Path, tmp_path: Path, verb: str) -> None:
    path, run = _factors(pushed, "sql"), _verbs(base, tmp_path / "out")[verb]
    for name, change in Restored(pushed.home / "blobs").changes():
        with pytest.raises((BadInput, NotFound)) as caught:
            run(pushed, _during("merging", 1, partial(change, path)))
        assert path.name in str(caught.value) and caught.value.exit_code in (3, 5), name
        _nothing(tmp_path)
        with pytest.raises((BadInput, NotFound), match="push its adapter again"):  # this process knew it as whole
            run(pushed, None)
        _nothing(tmp_path)


@pytest.mark.parametrize("journal", [True, False])
def test_the_merged_model_or_the_base_changes_during_an_unmerge(
    pushed: loreg.Registry, base: Path, tmp_path: Path, journal: bool
) -> None:
    merged = pushed.merge("sql + humor", tmp_path / "merged", base=base, undo=True).out
    folder = merged if journal else base
    given: dict[str, Any] = {"journal": True} if journal else {"base": base}
    for name, change in Restored(folder).changes():
        for at in (1, 3) if journal else (3,):  # bytes of the whole, thirds: while it is checked, and taken back
            seen = 0

            def advance(done: int, at: int = at, change: Callable[[Path], object] = change) -> None:
                nonlocal seen
                before, seen = seen, seen + done
                if before < at * 100 <= seen:
                    change(folder / NAMES[2])

            with pytest.raises(LoregError) as caught:
                pushed.unmerge(merged, tmp_path / "out", advance=advance, **given)
            assert str(folder) in str(caught.value), (name, at, caught.value)
            _nothing(tmp_path)
            if name in ("cut", "emptied", "gone"):
                break


def _killed(registry: loreg.Registry, run: Callable[[loreg.Registry, Any], Any], at: int) -> None:
    """Up to the record of shard number ``at``."""
    record, count = Finished.record, 0

    def killing(*given: Any) -> Any:
        nonlocal count
        count += 1
        if count > at:
            raise Killed
        return record(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Finished, "record", killing)
        patch.setattr(staging.shutil, "rmtree", lambda *args, **given: None)
        with pytest.raises(Killed):
            run(registry, None)


@pytest.mark.parametrize("what", ["base", "adapter"])
def test_a_change_before_it_is_gone_on(pushed: loreg.Registry, base: Path, tmp_path: Path, what: str) -> None:
    """Never the old shards under the new: of a base that another byte makes another, the merge is another too."""
    run, fresh = _verbs(base, tmp_path / "out")["undo"], _verbs(base, tmp_path / "fresh")["undo"]
    path = base / NAMES[0] if what == "base" else _factors(pushed, "humor")
    for name, change in Restored(base if what == "base" else pushed.home / "blobs").changes():
        _killed(pushed, run, 2)
        change(path)
        if what == "base" and name in ("flipped", "replaced"):  # an untouched tensor: the adapters still apply
            run(pushed, None)
            fresh(pushed, None)
            assert tiny.files_in(tmp_path / "out") == tiny.files_in(tmp_path / "fresh")
            assert pushed.verify(tmp_path / "out", base=base).ok
            shutil.rmtree(tmp_path / "out")
            shutil.rmtree(tmp_path / "fresh")
        else:
            with pytest.raises(LoregError) as caught:
                run(pushed, None)
            assert caught.value.exit_code in (3, 5) and path.name.split(".")[0] in str(caught.value)
            assert not (tmp_path / "out").exists()
        for left in tmp_path.glob(".*.partial"):
            shutil.rmtree(left)


OTHER: dict[str, dict[str, Any]] = {
    "dtype": {"dtype": "float32"},
    "method": {"method": "ties"},
    "undo": {"undo": True},
    "adapters": {"expression": "sql + humor"},
    "weight": {"expression": "0.5*sql"},
    "threads": {"threads": 2},
    "memory": {"memory": 1 << 40},
    "verify": {"verify": "exact"},
}


@pytest.mark.parametrize("way", ["into", "from"])
def test_options_that_change_before_it_is_gone_on(
    pushed: loreg.Registry, base: Path, tmp_path: Path, way: str
) -> None:
    """Those that change the result begin anew, whatever directory they find; the others go on."""
    plain: dict[str, Any] = {"base": base, "threads": 1}
    for other, options in OTHER.items():
        first, then = (plain, plain | options) if way == "into" else (plain | options, plain)
        kept = _gone_on(pushed, tmp_path, first, then)
        goes_on = other in ("threads", "memory", "verify") or (other == "undo" and way == "from")
        assert kept == (set(NAMES[:2]) if goes_on else set()), other
        shutil.rmtree(tmp_path / "out")
        shutil.rmtree(tmp_path / "expected")


def _gone_on(registry: loreg.Registry, folder: Path, first: dict[str, Any], then: dict[str, Any]) -> set[str]:
    """A merge that is killed, and another in the directory that it left: the shards that are taken over."""

    def merge(options: dict[str, Any], name: str) -> loreg.MergeResult:
        given = dict(options)
        return registry.merge(given.pop("expression", "sql"), folder / name, **given)

    _killed(registry, lambda *_: merge(first, "out"), 2)
    (left,) = folder.glob(".out.*.partial")
    expected = merge(then, "expected")
    mine = left.rename(folder / f".out.{expected.recipe.short}.partial")  # as if the two had one name
    held = {path.name: path.open("rb") for path in mine.glob("*.safetensors")}
    before = {name: os.fstat(file.fileno()).st_ino for name, file in held.items()}
    merge(then, "out")
    for file in held.values():
        file.close()
    assert tiny.files_in(folder / "out") == tiny.files_in(expected.out)
    assert not list(folder.glob(".*.partial"))
    return {name for name, inode in before.items() if (folder / "out" / name).stat().st_ino == inode}


def _linked(shard: Path, elsewhere: Path) -> None:
    shutil.copy(shard, elsewhere)
    shard.unlink()
    os.link(elsewhere, shard)


def _symlinked(shard: Path, elsewhere: Path) -> None:
    shutil.move(shard, elsewhere)
    shard.symlink_to(elsewhere)


def _folder(shard: Path, elsewhere: Path) -> None:
    shard.unlink()
    shard.mkdir()
    (shard / "file").write_text("")


def _records_elsewhere(shard: Path, elsewhere: Path) -> None:
    shutil.move(shard.parent / ".finished", elsewhere)
    (shard.parent / ".finished").symlink_to(elsewhere)


def _pipe(shard: Path, elsewhere: Path) -> None:
    shard.unlink()
    os.mkfifo(shard)


STRANGE = {f.__name__: f for f in (_linked, _symlinked, _folder, _records_elsewhere, _pipe)}


@pytest.mark.parametrize("strange", STRANGE)
def test_what_is_not_a_file_of_its_own_is_not_taken_over(
    pushed: loreg.Registry, base: Path, tmp_path: Path, strange: str
) -> None:
    """A link into the output would let somebody else change it; and what it points to is left alone."""
    run = _verbs(base, tmp_path / "out")["undo"]
    _killed(pushed, run, 2)
    (left,) = tmp_path.glob(".out.*.partial")
    elsewhere = tmp_path / "elsewhere"
    STRANGE[strange](left / NAMES[0], elsewhere)
    there = tiny.files_in(elsewhere) if elsewhere.is_dir() else elsewhere.read_bytes() if elsewhere.exists() else None
    run(pushed, None)
    fresh = pushed.merge("sql + humor", tmp_path / "fresh", base=base, undo=True)
    assert tiny.files_in(tmp_path / "out") == tiny.files_in(fresh.out)
    assert all(not path.is_symlink() and path.stat().st_nlink == 1 for path in (tmp_path / "out").glob("*.*"))
    after = tiny.files_in(elsewhere) if elsewhere.is_dir() else elsewhere.read_bytes() if elsewhere.exists() else None
    assert after == there


def test_a_link_in_place_of_the_directory(pushed: loreg.Registry, base: Path, tmp_path: Path) -> None:
    """In a directory that others write to, its name can be foreseen: what it leads to is not emptied."""
    recipe = pushed.merge("sql", tmp_path / "fresh", base=base).recipe
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("mine")
    (tmp_path / f".out.{recipe.short}.partial").symlink_to(precious)
    with pytest.raises(Conflict, match=r"partial is a link: remove it"):
        pushed.merge("sql", tmp_path / "out", base=base)
    assert tiny.files_in(precious) == {"file": b"mine"} and not (tmp_path / "out").exists()


DEEP = "[" * 100_000
RECORD = '{"recipe": "RECIPE", "changed": CHANGED, "undo": {"tensor/x": {"extents": EXTENTS, "digest": "DIGEST"}}}'
EXTENTS = ("[[0, 1e400]]", "[[0, -5]]", "[[-1, 5]]", "[[0, 9000000000000000000]]", "[[0]]", "null")


def test_records_of_nonsense(pushed: loreg.Registry, base: Path, tmp_path: Path) -> None:
    run = _verbs(base, tmp_path / "out")["undo"]
    fresh = pushed.merge("sql + humor", tmp_path / "fresh", base=base, undo=True)
    for text in (DEEP, *(RECORD.replace("EXTENTS", extents) for extents in EXTENTS)):
        _killed(pushed, run, 2)
        (left,) = tmp_path.glob(".out.*.partial")
        for path in left.glob(".finished/*.json"):
            known = json.loads(path.read_text())
            record = text.replace("RECIPE", known["recipe"]).replace("CHANGED", json.dumps(known["changed"]))
            path.write_text(record.replace("DIGEST", "0" * 64))
        run(pushed, None)
        assert tiny.files_in(tmp_path / "out") == tiny.files_in(fresh.out), text[:100]
        shutil.rmtree(tmp_path / "out")
