"""Unmerging from the journal: the base's own bytes, from the merged model and the adapters alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file

import loreg
from loreg.errors import BadInput, BaseMismatch, CheckFailed, LoregError, NotFound
from loreg.merge.journal import Journal
from loreg.merge.resume import Finished

RNG = np.random.default_rng


def _undone(
    registry: loreg.Registry, base: Path, tmp_path: Path, expression: str = "sql", **options: Any
) -> loreg.MergeResult:
    """Merges, hides the base, and takes the merge back."""
    expected, hidden = tiny.files_in(base), base.with_name("hidden")
    result = registry.merge(expression, tmp_path / "out", base=base, undo=True, verify="exact", **options)
    plain = registry.merge(expression, tmp_path / "plain", base=base, verify="none", **options)
    merged = tiny.files_in(tmp_path / "out")
    assert len(merged.pop("loreg.undo")) == result.undo_bytes
    assert merged == tiny.files_in(plain.out)
    base.rename(hidden)
    try:
        back = registry.unmerge(tmp_path / "out", tmp_path / "back", journal=True)
    finally:
        hidden.rename(base)
    assert (back.method, back.matches_base) == ("journal", True)
    assert tiny.files_in(tmp_path / "back") == expected
    return result


@pytest.mark.parametrize("expression", ["sql", "humor", "sql + humor", "0.3*sql - 2*humor"])
def test_the_base_is_given_back(pushed: loreg.Registry, tmp_path: Path, expression: str) -> None:
    result = _undone(pushed, tmp_path / "base", tmp_path, expression)
    load_file(tmp_path / "out" / "loreg.undo")  # any reader of safetensors can open it
    assert Journal(tmp_path / "out" / "loreg.undo").tensors == set(result.touched)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_converted_model(pushed: loreg.Registry, tmp_path: Path, dtype: str) -> None:
    """With another dtype in config.json, and every tensor touched."""
    config = {**tiny.CONFIG, "dtype": "bfloat16"}
    base = tiny.write_model(tmp_path / "configured", tiny.model(), config=config)
    _undone(pushed, base, tmp_path, dtype=dtype)


@pytest.mark.parametrize("method", ["ties", "dare_linear", "svd"])
def test_other_methods(pushed: loreg.Registry, tmp_path: Path, method: str) -> None:
    parameters = {"svd": {"rank": 2}}.get(method, {"density": 0.5})
    _undone(pushed, tmp_path / "base", tmp_path, "sql + humor", method=method, parameters=parameters)


def test_replaced_tensors_and_what_reads_the_base(pushed: loreg.Registry, tmp_path: Path) -> None:
    """A norm that is replaced, one that is interpolated, and DoRA: their originals are kept."""
    norm = tiny.model()[tiny.NORM]
    full = {tiny.NORM: tiny.tensor(norm.dtype, norm.values + 1)}
    saved = tiny.write_adapter(tmp_path / "saved", tiny.adapter(seed=3), full=full, modules_to_save=["norm"])
    pushed.push(saved, base="base", name="saved")
    _undone(pushed, tmp_path / "base", tmp_path, "saved")
    for folder in ("out", "plain", "back"):
        shutil.rmtree(tmp_path / folder)
    _undone(pushed, tmp_path / "base", tmp_path, "0.5*saved + sql")


def test_shards_and_a_base_that_is_a_merge(pushed: loreg.Registry, tmp_path: Path) -> None:
    model = tiny.model()
    names = sorted(model)
    base = tiny.write_model(tmp_path / "sharded", model, shards=[names[part::3] for part in range(3)])
    _undone(pushed, base, tmp_path)
    first = pushed.merge("humor", tmp_path / "first", base=base).out
    for folder in ("out", "plain", "back"):
        shutil.rmtree(tmp_path / folder)
    _undone(pushed, first, tmp_path, allow_base_mismatch=True)  # whose own loreg.json comes back


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_many_blocks_in_any_tiles(
    registry: loreg.Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    """Blocks of 65,536 elements straddle rows and tiles; the journal is the same whatever these are."""
    rng = RNG(5)
    model = {"a.weight": tiny.normal(rng, dtype, 211, 700, std=0.02), "b.weight": tiny.normal(rng, dtype, 700, 333)}
    model["tiny.weight"] = tiny.normal(rng, dtype, 300, 300, std=1e-7 if dtype != "F16" else 1e-4)
    base = tiny.write_model(tmp_path / "base", model)
    factors = {name.removesuffix(".weight"): tiny.factors(rng, *t.shape, 3, std=0.02) for name, t in model.items()}
    registry.push(tiny.write_adapter(tmp_path / "sql", factors), base=base, name="sql")
    journals = set()
    for tile, threads in ((8 << 20, 1), (100_000, 2), (3_000, 2)):
        monkeypatch.setattr("loreg.merge.resources.TILE_BYTES", tile)
        _undone(registry, base, tmp_path, threads=threads)
        journals.add((tmp_path / "out" / "loreg.undo").read_bytes())
        for folder in ("out", "plain", "back"):
            shutil.rmtree(tmp_path / folder)
    assert len(journals) == 1


def test_it_costs_three_in_a_hundred_of_the_touched_bytes(registry: loreg.Registry, tmp_path: Path) -> None:
    rng = RNG(6)
    weight = tiny.Tensor("BF16", (512, 768), (rng.normal(0, 0.02, (512, 768)).astype("<f4").view("<u4") >> 16)
                         .astype("<u2").tobytes())  # fmt: skip
    base = tiny.write_model(tmp_path / "base", {"a.weight": weight})
    adapter = {"a": tiny.factors(rng, 512, 768, 16, std=(0.0002 / 4) ** 0.5)}
    registry.push(tiny.write_adapter(tmp_path / "sql", adapter, alpha=16), base=base, name="sql")
    result = _undone(registry, base, tmp_path)
    before, after = (load_file(f / "model.safetensors")["a.weight"].double() for f in (base, tmp_path / "out"))
    ratio = float(torch.linalg.matrix_norm(after - before) / torch.linalg.matrix_norm(before))
    assert 0.008 < ratio < 0.013
    assert result.undo_bytes is not None and result.undo_bytes <= 0.03 * 2 * 512 * 768


def test_a_killed_merge_goes_on_with_its_journal(
    pushed: loreg.Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException): ...

    model = tiny.model()
    names = sorted(model)
    base = tiny.write_model(tmp_path / "sharded", model, shards=[names[part::3] for part in range(3)])
    record, count = Finished.record, 0

    def killing(*args: Any) -> Any:
        nonlocal count
        count += 1
        if count > 2:
            raise Killed
        return record(*args)

    for damage in (None, "cut", "flip", "gone"):
        count = 0
        with monkeypatch.context() as patch:
            patch.setattr(Finished, "record", killing)
            patch.setattr("loreg.staging.shutil.rmtree", lambda *args, **given: None)
            with pytest.raises(Killed):
                pushed.merge("sql", tmp_path / "out", base=base, undo=True)
        (left,) = tmp_path.glob(".out.*.partial")
        spills = [path for path in left.glob(".finished/*.undo") if path.stat().st_size]
        assert spills
        for spill in spills:
            if damage == "cut":
                spill.write_bytes(spill.read_bytes()[:-1])
            elif damage == "flip":
                spill.write_bytes(bytes([spill.read_bytes()[0] ^ 1]) + spill.read_bytes()[1:])
            elif damage == "gone":
                spill.unlink()
        _undone(pushed, base, tmp_path)
        for folder in ("out", "plain", "back"):
            shutil.rmtree(tmp_path / folder)


def test_a_merge_without_a_journal_is_not_taken_for_one_with(
    pushed: loreg.Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("loreg.merge.output._finish", lambda *args: 1 / 0)
        patch.setattr("loreg.staging.shutil.rmtree", lambda *args, **given: None)
        with pytest.raises(ZeroDivisionError):
            pushed.merge("sql", tmp_path / "out")
    assert list(tmp_path.glob(".out.*.partial/.finished/*.json"))
    _undone(pushed, tmp_path / "base", tmp_path)


@pytest.fixture
def merged(pushed: loreg.Registry, tmp_path: Path) -> Path:
    return pushed.merge("sql", tmp_path / "out", undo=True).out


def test_which_of_the_two(pushed: loreg.Registry, merged: Path, tmp_path: Path) -> None:
    assert pushed.unmerge(merged, tmp_path / "1").method == "base"
    assert pushed.unmerge(merged, tmp_path / "2", journal=True).method == "journal"
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    assert pushed.unmerge(merged, tmp_path / "3").method == "journal"
    with pytest.raises(NotFound):
        pushed.unmerge(merged, tmp_path / "4", journal=False)
    assert pushed.unmerge(merged, tmp_path / "5", base=tmp_path / "elsewhere").method == "base"
    (merged / "loreg.undo").unlink()
    with pytest.raises(NotFound, match=r"no loreg\.undo.*--undo"):
        pushed.unmerge(merged, tmp_path / "4", journal=True)


def test_another_merge_s_journal(pushed: loreg.Registry, merged: Path, tmp_path: Path) -> None:
    other = pushed.merge("humor", tmp_path / "other", undo=True).out
    shutil.copy(other / "loreg.undo", merged / "loreg.undo")
    with pytest.raises(BaseMismatch, match="another merge"):
        pushed.unmerge(merged, tmp_path / "back", journal=True)


def test_a_merged_model_that_was_changed(pushed: loreg.Registry, merged: Path, tmp_path: Path) -> None:
    file = merged / "model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    with pytest.raises(BadInput, match="changed after the merge"):
        pushed.unmerge(merged, tmp_path / "back", journal=True)
    assert not (tmp_path / "back").exists()


def test_every_flipped_byte_is_found(pushed: loreg.Registry, merged: Path, tmp_path: Path) -> None:
    """Typed, or the base's root says so; never another base under the name of the result."""
    file = merged / "loreg.undo"
    raw = file.read_bytes()
    step = max(1, len(raw) // 150)
    for at in [*range(0, len(raw), step), *range(len(raw) - 20, len(raw))]:
        file.write_bytes(raw[:at] + bytes([raw[at] ^ 0x41]) + raw[at + 1 :])
        with pytest.raises(LoregError):
            pushed.unmerge(merged, tmp_path / "back", journal=True)
        assert not (tmp_path / "back").exists() and not list(tmp_path.glob(".back*"))


CUTS: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda raw: b"",
    "cut": lambda raw: raw[:-1],
    "longer": lambda raw: raw + b"\0",
    "half": lambda raw: raw[: len(raw) // 2],
}


@pytest.mark.parametrize("cut", CUTS)
def test_a_journal_that_was_cut(pushed: loreg.Registry, merged: Path, tmp_path: Path, cut: str) -> None:
    file = merged / "loreg.undo"
    file.write_bytes(CUTS[cut](file.read_bytes()))
    with pytest.raises(BadInput):
        pushed.unmerge(merged, tmp_path / "back", journal=True)


def test_corrections_are_of_this_adapter(pushed: loreg.Registry, merged: Path, tmp_path: Path) -> None:
    """What the recipe names is what is taken: a blob under a wrong digest would be found by the root."""
    record = json.loads((merged / "loreg.json").read_text())
    record["recipe"]["terms"][0]["weight"] = "0.5"
    (merged / "loreg.json").write_text(json.dumps(record, separators=(",", ":"), sort_keys=True))
    with pytest.raises((BaseMismatch, CheckFailed)):
        pushed.unmerge(merged, tmp_path / "back", journal=True)
