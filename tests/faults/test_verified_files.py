"""Wrong elements in files that are there: ``exact`` finds one, ``probe`` a row; and in what a killed merge left."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from vector_cases.primitives import Tensor, identity, jcs

import loreg
from loreg import staging
from loreg.digest import Digest
from loreg.errors import CheckFailed
from loreg.merge.resume import Finished

E, OUT, INTO = 3, 12, 10


@dataclass(frozen=True)
class Kind:
    """A tensor to edit, how many elements a row of what is judged has, and the adapter that edits it."""

    name: str
    tensor: tiny.Tensor
    row: int
    adapter: Callable[[Path], Path]


def _factors(folder: Path) -> Path:
    """Large enough to be seen in float8."""
    factors = tiny.factors(np.random.default_rng(5), OUT, INTO, 2, std=0.5)
    return tiny.write_adapter(folder, {tiny.Q: factors}, alpha=2)


def _biased(folder: Path) -> Path:
    rng = np.random.default_rng(6)
    factors = tiny.factors(rng, OUT, INTO, 2)._replace(bias=tiny.normal(rng, "F32", OUT))
    return tiny.write_adapter(folder, {tiny.Q: factors}, alpha=2, lora_bias=True, bias="none")


def _convolution(folder: Path) -> Path:
    rng = np.random.default_rng(7)
    A, B = tiny.normal(rng, "F32", 2, 5, 3, 3, std=0.1), tiny.normal(rng, "F32", OUT, 2, 1, 1, std=0.1)
    return tiny.write_adapter(folder, {"conv": tiny.Factors(A, B)}, alpha=2)


def _stack(folder: Path) -> Path:
    """PEFT's ``target_parameters``: ranks of all experts in one pair of factors."""
    rng = np.random.default_rng(8)
    A, B = tiny.normal(rng, "F32", 2 * E, INTO, std=0.1), tiny.normal(rng, "F32", OUT, 2 * E, std=0.1)
    folder = tiny.write_adapter(folder, {"mlp.experts": tiny.Factors(A, B)}, alpha=2)
    config = json.loads((folder / "adapter_config.json").read_text())
    config |= {"r": 2, "target_parameters": ["mlp.experts.down_proj"], "target_modules": []}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def _float8(dtype: str, base: int) -> tiny.Tensor:
    """Values near one, of either sign."""
    rng = np.random.default_rng(9)
    words = base + rng.integers(0, 4, (OUT, INTO)) + 128 * rng.integers(0, 2, (OUT, INTO))
    return tiny.Tensor(dtype, (OUT, INTO), words.astype(np.uint8).tobytes())


def _normal(*shape: int) -> tiny.Tensor:
    return tiny.normal(np.random.default_rng(10), "BF16", *shape)


KINDS = {
    "matrix": Kind(f"{tiny.Q}.weight", _normal(OUT, INTO), INTO, _factors),
    "e4m3": Kind(f"{tiny.Q}.weight", _float8("F8_E4M3", 0x38), INTO, _factors),
    "e5m2": Kind(f"{tiny.Q}.weight", _float8("F8_E5M2", 0x3C), INTO, _factors),
    "bias": Kind(f"{tiny.Q}.bias", _normal(OUT), 1, _biased),
    "conv": Kind("conv.weight", _normal(OUT, 5, 3, 3), 45, _convolution),
    "stack": Kind("mlp.experts.down_proj", _normal(E, OUT, INTO), INTO, _stack),
}


def _merged(registry: loreg.Registry, folder: Path, kind: Kind) -> Path:
    model = {f"{tiny.Q}.weight": _normal(OUT, INTO), tiny.NORM: _normal(INTO), kind.name: kind.tensor}
    base = tiny.write_model(folder / "base", model, config={"model_type": "tiny"})
    registry.push(kind.adapter(folder / "sql"), base=base, name="sql")
    out = registry.merge("sql", folder / "out", verify="exact").out
    assert tiny.tensors_in(out)[kind.name].data != kind.tensor.data
    return out


def _spoil(path: Path, name: str, spoil: Callable[[bytearray, int], None]) -> None:
    """The data of a tensor changed in its file; ``spoil`` is given them, and the bytes of an element."""
    raw = bytearray(path.read_bytes())
    (length,) = struct.unpack("<Q", raw[:8])
    entry = json.loads(raw[8 : 8 + length])[name]
    start, end = (8 + length + offset for offset in entry["data_offsets"])
    data = raw[start:end]
    spoil(data, (end - start) // int(np.prod(entry["shape"])))
    raw[start:end] = data
    path.write_bytes(raw)


def _restate(out: Path, name: str) -> None:
    """``loreg.json`` of the files as they are now: what only a look at the numbers can tell from a merge."""
    record = json.loads((out / "loreg.json").read_text())
    record["tensors"][name]["digest"] = str(Digest.of(tiny.tensors_in(out)[name].data))
    tensors = [Tensor(name, *tensor) for name, tensor in tiny.tensors_in(out).items()]
    record["weights_root"] = identity(tensors)["weights_root"]
    (out / "loreg.json").write_bytes(jcs(record))


@pytest.mark.parametrize("place", ["first", "last"])
@pytest.mark.parametrize("kind", KINDS)
def test_one_element_and_one_row(registry: loreg.Registry, tmp_path: Path, kind: str, place: str) -> None:
    """The least change of one element; and all of a row moved by an eighth of themselves and more."""
    what = KINDS[kind]
    out = _merged(registry, tmp_path, what)
    file, was = out / "model.safetensors", (out / "model.safetensors").read_bytes()
    assert registry.verify(out, kind="exact").ok and registry.verify(out, kind="probe").ok

    def element(data: bytearray, width: int) -> None:
        data[0 if place == "first" else len(data) - width] ^= 1

    def row(data: bytearray, width: int) -> None:
        size = what.row * width
        for at in range(0, size, width) if place == "first" else range(len(data) - size, len(data), width):
            data[at] ^= 0x40 if width > 1 else 0x02

    for spoil, by in ((element, ("exact",)), (row, ("exact", "probe"))):
        file.write_bytes(was)
        _spoil(file, what.name, spoil)
        assert registry.verify(out, kind="probe").reason.startswith("files: 1 tensor is not as loreg.json says")
        _restate(out, what.name)
        for verified in by:
            found = registry.verify(out, kind=verified)
            assert not found.ok and found.reason.startswith(f"touched: {what.name!r}"), (verified, found)


class Killed(BaseException):
    """Not an error, and nothing is tidied up after it."""


@pytest.mark.parametrize("verify", ["probe", "exact", "none"])
def test_a_shard_that_is_taken_over_is_verified(registry: loreg.Registry, tmp_path: Path, verify: str) -> None:
    """One that was damaged before its record was written, so that the two agree: only its numbers tell."""
    model = {f"layers.{i}.weight": _normal(OUT, INTO) for i in range(2)}
    base = tiny.write_model(tmp_path / "base", model, shards=[[name] for name in model])
    rng = np.random.default_rng(11)
    modules = {f"layers.{i}": tiny.factors(rng, OUT, INTO, 2) for i in range(2)}
    registry.push(tiny.write_adapter(tmp_path / "sql", modules), base=base, name="sql")
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
            registry.merge("sql", tmp_path / "out", threads=1)
    (left,) = tmp_path.glob(".out.*.partial")
    (said,) = left.glob(".finished/*.json")
    shard, (name,) = left / said.name.removesuffix(".json"), json.loads(said.read_text())["changed"]

    def row(data: bytearray, width: int) -> None:
        for at in range(0, INTO * width, width):
            data[at] ^= 0x40

    _spoil(shard, name, row)
    document = json.loads(said.read_text())
    document["changed"][name] = Digest.of(tiny.contents(shard)[name].data).hex
    said.write_text(json.dumps(document))
    if verify == "none":  # so it is taken over, and what is wrong then is for a later look to find
        out = registry.merge("sql", tmp_path / "out", verify="none").out
        assert not registry.verify(out, kind="exact").ok
        return
    with pytest.raises(CheckFailed, match=f"does not verify.*{name}"):
        registry.merge("sql", tmp_path / "out", verify=verify)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out.*"))
    assert registry.merge("sql", tmp_path / "out", verify="exact").verification.ok
