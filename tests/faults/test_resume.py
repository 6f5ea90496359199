"""A merge that was killed goes on from its finished shards, if they are what this merge would write."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny

import loreg
from loreg import staging
from loreg.merge.resume import Finished

NAMES = ["model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors", "model-00003-of-00003.safetensors"]


class Killed(BaseException):
    """Not an error, and nothing is tidied up after it."""


@pytest.fixture
def sharded(registry: loreg.Registry, tmp_path: Path) -> loreg.Registry:
    """A base of three shards, and two adapters."""
    model = tiny.model()
    names = sorted(model)
    tiny.write_model(tmp_path / "base", model, shards=[names[part::3] for part in range(3)])
    registry.add_base(tmp_path / "base", "base")
    for seed, name in enumerate(("sql", "humor")):
        registry.push(tiny.write_adapter(tmp_path / name, tiny.adapter(seed=seed)), base="base", name=name)
    return registry


def _killed(registry: loreg.Registry, out: Path, at: int, expression: str = "sql", **options: Any) -> Path:
    """Merges up to the shard number ``at``; returns the directory that is left."""
    record, count = Finished.record, 0

    def killing(*args: Any) -> None:
        nonlocal count
        count += 1
        if count > at:
            raise Killed
        record(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Finished, "record", killing)
        patch.setattr(staging.shutil, "rmtree", lambda *args, **given: None)
        with pytest.raises(Killed):
            registry.merge(expression, out, **options)
    (left,) = out.parent.glob(f".{out.name}.*.partial")
    return left


def _inodes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_ino for path in folder.glob("*.safetensors")}


def _went_on(registry: loreg.Registry, out: Path, **options: Any) -> set[str]:
    """Merges again, to the right result; the shards that were taken over."""
    (left,) = out.parent.glob(f".{out.name}.*.partial")
    before = _inodes(left)
    # Held, so that no new file can get the number of one that is removed.
    held = [(left / name).open("rb") for name in before]
    result = registry.merge("sql", out, **options)
    expected = registry.merge("sql", out.with_name("expected"), **options)
    for file in held:
        file.close()
    assert tiny.files_in(out) == tiny.files_in(expected.out)
    assert result.weights_root == expected.weights_root and registry.verify(out).ok
    assert not list(out.parent.glob(".*.partial"))
    return {name for name, inode in _inodes(out).items() if before.get(name) == inode}


@pytest.mark.parametrize("at", [0, 1, 2])
def test_it_goes_on_from_the_last_finished_shard(sharded: loreg.Registry, tmp_path: Path, at: int) -> None:
    _killed(sharded, tmp_path / "out", at)
    assert _went_on(sharded, tmp_path / "out") == set(NAMES[:at])


def test_a_shard_that_is_not_recorded_is_written_again(sharded: loreg.Registry, tmp_path: Path) -> None:
    left = _killed(sharded, tmp_path / "out", 2)
    (left / ".finished" / f"{NAMES[1]}.json").unlink()
    assert _went_on(sharded, tmp_path / "out") == {NAMES[0]}


def _flip(path: Path, at: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "header": lambda path: _flip(path, 12),
    "data": lambda path: _flip(path, -1),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "gone": lambda path: path.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_shard_that_is_not_what_was_recorded_is_written_again(
    sharded: loreg.Registry, tmp_path: Path, damage: str
) -> None:
    left = _killed(sharded, tmp_path / "out", 2)
    DAMAGE[damage](left / NAMES[0])
    assert _went_on(sharded, tmp_path / "out") == {NAMES[1]}


@pytest.mark.parametrize("text", ["", "{", "[]", '{"recipe": 1}', '{"recipe": "RECIPE", "changed": {"x": "y"}}'])
def test_a_record_that_cannot_be_read_is_none(sharded: loreg.Registry, tmp_path: Path, text: str) -> None:
    left = _killed(sharded, tmp_path / "out", 2)
    record = left / ".finished" / f"{NAMES[0]}.json"
    recipe = json.loads(record.read_text())["recipe"]
    record.write_text(text.replace("RECIPE", recipe))
    assert _went_on(sharded, tmp_path / "out") == {NAMES[1]}


def test_another_recipe_does_not_go_on_from_it(sharded: loreg.Registry, tmp_path: Path) -> None:
    """Not even if its directory is called so: the record says whose it is."""
    theirs = _killed(sharded, tmp_path / "out", 2, "humor")
    recipe = sharded.merge("sql", tmp_path / "expected").recipe
    shutil.rmtree(tmp_path / "expected")
    theirs.rename(tmp_path / f".out.{recipe.short}.partial")
    assert _went_on(sharded, tmp_path / "out") == set()


def test_what_was_beside_the_base_is_copied_again(sharded: loreg.Registry, tmp_path: Path) -> None:
    left = _killed(sharded, tmp_path / "out", 2)
    (left / "tokenizer.json").write_text("of an older base")
    (left / "folder").mkdir()
    (left / "folder" / "file").write_text("")
    assert _went_on(sharded, tmp_path / "out") == set(NAMES[:2])


def test_a_base_that_is_split_otherwise_is_merged_anew(sharded: loreg.Registry, tmp_path: Path) -> None:
    _killed(sharded, tmp_path / "out", 2)
    model = tiny.model()
    names = sorted(model)
    tiny.write_model(tmp_path / "split", model, shards=[names[:2], names[2:3], names[3:]])
    sharded.add_base(tmp_path / "split", "split")
    assert _went_on(sharded, tmp_path / "out", base="split") == set()
