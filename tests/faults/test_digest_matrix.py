"""One merge has one digest: whatever the threads, tiles, files and disks, and however often it was killed.

--nightly takes every combination, else each vector has a third of them, and all vectors together all.
"""

from __future__ import annotations

import base64
import itertools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny
import vector_merges
from options import one_of
from places import in_memory, kind_of

import loreg
import loreg.merge.resources
from loreg import staging
from loreg.merge.resume import Finished

GOLDEN = json.loads((Path(__file__).parents[2] / "spec" / "vectors" / "merges.json").read_bytes())["vectors"]
VALID = {vector["id"]: vector for vector in GOLDEN if vector["expected"] == "valid"}
EACH = one_of(3)
THREADS = (1, 2)
TILES = (64, 1000, 8 << 20)
"""Bytes of a tile: a row or two, no whole number of rows, all of it."""


class Killed(BaseException):
    """Not an error, and nothing is tidied up after it."""


@contextmanager
def _places(folder: Path) -> Iterator[list[Path]]:
    with in_memory(folder / "shared") as memory:
        memory.mkdir(exist_ok=True)
        (folder / "disk").mkdir()
        yield [folder / "disk", memory]


def _begun(registry: loreg.Registry, expression: str, out: Path, **options: Any) -> None:
    """The merge, killed once its first shard has its record."""
    record, count = Finished.record, 0

    def killing(*given: Any) -> Any:
        nonlocal count
        count += 1
        if count > 1:
            raise Killed
        return record(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Finished, "record", killing)
        patch.setattr(staging.shutil, "rmtree", lambda *given, **more: None)
        with pytest.raises(Killed):
            registry.merge(expression, out, **options)
    assert not out.exists() and len(list(out.parent.glob(f".{out.name}.*.partial/.finished/*.json"))) == 1


@pytest.mark.parametrize("name", VALID)
def test_golden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Threads, tiles, disks, unbroken and gone on from: every file of the output, and its journal, as the vector has
    them. Both orders of the terms in turn."""
    given, expected = VALID[name]["input"], VALID[name]["result"]
    with vector_merges.ready(given, tmp_path) as (registry, terms, options), _places(tmp_path) as places:
        ways = list(enumerate(itertools.product(THREADS, TILES, places, (False, True))))
        for number, (threads, tile, place, resumed) in ways[list(VALID).index(name) % EACH :: EACH]:
            monkeypatch.setattr(loreg.merge.resources, "TILE_BYTES", tile)
            expression, out = " + ".join(terms[:: 1 if number % 2 else -1]), place / f"out{number}"
            more = {**options, "threads": threads, "verify": "none"}
            if resumed:
                _begun(registry, expression, out, **more)
            registry.merge(expression, out, **more)
            assert vector_merges.result(out) == expected, (threads, tile, kind_of(place), resumed)


def _split(given: dict[str, Any], folder: Path, parts: int) -> Path:
    """The base of the vector in another number of files."""
    raw = folder / "given"
    raw.mkdir()
    for name, data in given["base"].items():
        (raw / name).write_bytes(base64.b64decode(data))
    tensors = tiny.tensors_in(raw)
    names = sorted(tensors)
    shards = [names[part::parts] for part in range(parts)] if parts > 1 else None
    return tiny.write_model(
        folder / "split", tensors, shards=shards, config=json.loads((raw / "config.json").read_text())
    )


@pytest.mark.parametrize("parts", [1, 3, 6])
@pytest.mark.parametrize("name", ["sum", "undo-sum", "dtype-F16", "dtype-F32"])
def test_golden_in_other_files(tmp_path: Path, name: str, parts: int) -> None:
    """The base in one file, in three and in one for each tensor: the same tensors, and so the same model."""
    given, expected = VALID[name]["input"], VALID[name]["result"]
    with vector_merges.ready(given, tmp_path) as (registry, terms, options):
        base = _split(given, tmp_path, parts)
        made = registry.merge(" + ".join(terms), tmp_path / "out", **{**options, "base": base})
        found = vector_merges.result(made.out)
        assert len(list(made.out.glob("*.safetensors"))) == parts
        for key in ("weights_root", "tensors"):
            assert found[key] == expected[key]
        assert found["files"]["loreg.json"] == expected["files"]["loreg.json"]
        if given["undo"]:
            assert registry.unmerge(made.out, tmp_path / "back", journal=True).matches_base
