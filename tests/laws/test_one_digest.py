"""One result, however it is made: threads × tiles × shardings × file systems × unbroken or resumed."""

from __future__ import annotations

import hashlib
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

import loreg
from loreg.merge.resume import Finished

sys.path.append(str(Path(__file__).parent.parent / "faults"))
from places import in_memory, kind_of

THREADS = (1, 2)
TILES = (3_000, 100_000, 8 << 20)
SHARDINGS = (1, 2, 5)
MERGES: dict[str, tuple[str, bool]] = {"one": ("sql", False), "sum": ("sql + humor", False), "undo": ("sql", True)}
# Of what is merged here, for ever: another number is another arithmetic, or another digest.
ONE = "blake3:8d7861da8bd1f15476425140302aa255042a002f39e69005245d5fffa3f5ef21"
ROOTS = {"one": ONE, "undo": ONE, "sum": "blake3:6df699a1aa2c126a6b924a15068cceb811310f898b7b98c5d714133dce9db30d"}


class Killed(BaseException):
    """Not an error, and nothing is tidied up after it."""


def _bytes(seed: str, count: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The same in every release of every library."""
    return np.frombuffer(hashlib.shake_128(seed.encode()).digest(count), np.uint8)


def _words(seed: str, *shape: int) -> bytes:
    """Of BF16: sizes from 2^-10 to 2^-3, of either sign."""
    low, high = _bytes(seed, 2 * shape[0] * shape[1]).reshape(2, -1).astype("<u2")
    words = ((high & 0x80) << 8) | (0x3A80 + ((high & 0x07) << 7)) | (low & 0x7F)
    return words.astype("<u2").tobytes()


def _factors(seed: str, rows: int, columns: int) -> tiny.Factors:
    A, B = (_bytes(f"{seed} {what}", 4 * size).reshape(-1, 4) for what, size in (("A", columns), ("B", rows)))
    scaled = [tiny.tensor("F32", (values.astype(np.float64) - 127.5) / 1024) for values in (A.T, B)]
    return tiny.Factors(*scaled)


@pytest.fixture(scope="module")
def homes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[loreg.Registry, Path]]]:
    """A registry on each kind of file system, each with the base in every sharding. Blocks of a journal, of 65,536
    elements, end inside its tensors."""
    shapes = {"a": (300, 333), "b": (40, 50), "c": (7, 90), "d": (64, 64), "e": (333, 20)}
    model = {f"{name}.weight": tiny.Tensor("BF16", shape, _words(name, *shape)) for name, shape in shapes.items()}
    names = sorted(model)
    disk = tmp_path_factory.mktemp("matrix")
    with in_memory(disk / "memory") as memory:
        found = {}
        for kind, root in (("disk", disk), ("memory", memory)):
            root.mkdir(exist_ok=True)
            registry = loreg.open(root / "home")
            for count in SHARDINGS:
                shards = [names[part::count] for part in range(count)]
                tiny.write_model(root / f"base{count}", model, shards=shards if count > 1 else None)
            for name, some in (("sql", "abe"), ("humor", "bc")):
                modules = {module: _factors(f"{name} {module}", *shapes[module]) for module in some}
                registry.push(tiny.write_adapter(root / name, modules), base=root / "base1", name=name)
            found[kind] = registry, root
        yield found
        for registry, _ in found.values():
            registry.close()


def _merged(registry: loreg.Registry, out: Path, what: str, resumed: bool, **options: Any) -> loreg.MergeResult:
    expression, undo = MERGES[what]
    record, count = Finished.record, 0

    def killing(*given: Any) -> Any:
        nonlocal count
        count += 1
        if count > 1:
            raise Killed
        return record(*given)

    if resumed:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Finished, "record", killing)
            patch.setattr("loreg.staging.shutil.rmtree", lambda *args, **given: None)
            with pytest.raises(Killed):
                registry.merge(expression, out, undo=undo, verify="none", **options)
    return registry.merge(expression, out, undo=undo, verify="none", **options)


@pytest.mark.parametrize("what", MERGES)
def test_one_result(
    homes: dict[str, tuple[loreg.Registry, Path]], what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    roots, journals, files = set(), dict[int, set[bytes]](), dict[int, set[str]]()
    contents, runs = set(), 0
    for kind, tile, shards in itertools.product(homes, TILES, SHARDINGS):
        monkeypatch.setattr("loreg.merge.resources.TILE_BYTES", tile)
        registry, root = homes[kind]
        for threads, resumed in itertools.product(THREADS, (False, True)):
            if resumed and shards == 1:
                continue  # one shard that is finished is the whole merge
            out, runs = root / f"{what}{runs}", runs + 1
            result = _merged(registry, out, what, resumed, base=root / f"base{shards}", threads=threads)
            roots.add(str(result.weights_root))
            contents.add(tuple((tensor.name, str(tensor.content)) for tensor in result.record.tensors))
            there = tiny.files_in(out)
            journals.setdefault(shards, set()).add(there.pop("loreg.undo", b""))
            files.setdefault(shards, set()).add(str(sorted(there.items())))
    assert runs == len(homes) * len(TILES) * len(THREADS) * (2 * len(SHARDINGS) - 1)
    assert roots == {ROOTS[what]} and len(contents) == 1
    assert all(len(found) == 1 for found in (*files.values(), *journals.values()))
    assert len(set.union(*journals.values())) == 1  # of no sharding either


def test_the_file_systems_are_two(homes: dict[str, tuple[loreg.Registry, Path]]) -> None:
    kinds = {kind_of(root) for _, root in homes.values()}
    if len(kinds) < 2:
        pytest.skip(f"all that can be written to here is {kinds}")
    assert "tmpfs" in kinds
