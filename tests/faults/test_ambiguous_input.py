"""Input of which two readings are possible: the one that is meant, or a refusal, and never a guess."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny
from refusal import refused

import loreg
from loreg.checkpoint import Checkpoint
from loreg.errors import BadInput, Conflict, NotFound, Unsupported


def test_of_two_bases_with_one_root_the_one_that_the_adapter_names_is_merged_into(
    pushed: loreg.Registry, tiny_base: Path, tmp_path: Path
) -> None:
    """The tensors are the same, the config beside them need not be."""
    twin = shutil.copytree(tiny_base, tmp_path / "twin")
    (twin / "extra.txt").write_text("of another model")
    pushed.add_base(twin, "aaa")
    merged = pushed.merge("sql", tmp_path / "out").out
    assert not (merged / "extra.txt").exists()
    pushed.unmerge(merged, tmp_path / "again")
    assert tiny.files_in(tmp_path / "again") == tiny.files_in(tiny_base)


def test_a_saved_tensor_beyond_the_model_is_a_stranger(pushed: loreg.Registry, tmp_path: Path) -> None:
    """modules_to_save names a module that the base has; a tensor of it that fits nowhere is consumed by nothing."""
    name, value = next((n, t) for n, t in tiny.model().items() if n.endswith(".weight") and len(t.shape) == 2)
    module = name.split(".")[-2]
    folder = tiny.write_adapter(tmp_path / "new", {}, full={f"layers.77.{module}.weight": value})
    with refused(pushed, tmp_path / "out", BadInput, r"layers\.77", 5):
        pushed.push(folder, base="base", name="new")


def test_a_saved_module_that_the_base_has_not_is_added(pushed: loreg.Registry, tmp_path: Path) -> None:
    value = next(iter(tiny.model().values()))
    pushed.push(tiny.write_adapter(tmp_path / "new", {}, full={"score.weight": value}), base="base", name="new")
    merged = pushed.merge("new", tmp_path / "out", allow_base_mismatch=True).out
    assert tiny.tensors_in(merged)["score.weight"] == value


def test_two_tensors_that_mean_the_same(pushed: loreg.Registry, tmp_path: Path) -> None:
    name, value = next((n, t) for n, t in tiny.model().items() if n.endswith(".weight"))
    path = name.removesuffix(".weight")
    folder = tiny.write_adapter(tmp_path / "new", {}, full={name: value, f"{path}.base_layer.weight": value})
    with refused(pushed, tmp_path / "out", BadInput, "both mean", 5):
        pushed.push(folder, base="base", name="new")


@pytest.mark.parametrize("pattern", ["((.+)+)+x", "(a|b)*c", "(.*.*)*x", "a*b*c*d*" * 20])
def test_an_expression_that_python_would_never_end_is_matched(
    pushed: loreg.Registry, tmp_path: Path, pattern: str
) -> None:
    folder = tiny.write_adapter(tmp_path / "new", tiny.adapter(), alpha_pattern={pattern: 3})
    assert pushed.push(folder, base="base", name="new").created


@pytest.mark.parametrize("pattern", [r"(a|b)\1", "(a*)++", "x" * 5000])
def test_an_expression_that_is_not_matched_is_refused(pushed: loreg.Registry, tmp_path: Path, pattern: str) -> None:
    folder = tiny.write_adapter(tmp_path / "new", tiny.adapter(), alpha_pattern={pattern: 3})
    with refused(pushed, tmp_path / "out", Unsupported, "alpha_pattern", 5):
        pushed.push(folder, base="base", name="new")


def test_usual_patterns_are_accepted(pushed: loreg.Registry, tmp_path: Path) -> None:
    pattern = {r"model\.layers\.[0-9]+\.q_proj": 3, ".*v_proj": 4, "(up|down)_proj": 5}
    folder = tiny.write_adapter(tmp_path / "new", tiny.adapter(), alpha_pattern=pattern)
    assert pushed.push(folder, base="base", name="new").created


def test_a_single_file_beside_an_index(tiny_base: Path) -> None:
    index = {"weight_map": dict.fromkeys(tiny.tensors_in(tiny_base), "model.safetensors")}
    (tiny_base / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(BadInput, match="which is the model cannot be told"):
        Checkpoint.open(tiny_base)


def test_an_adapter_is_no_base(registry: loreg.Registry, tiny_adapter: Path) -> None:
    with pytest.raises(BadInput, match="holds an adapter"):
        registry.add_base(tiny_adapter)


def test_output_inside_what_it_is_made_from(pushed: loreg.Registry, tiny_base: Path, tmp_path: Path) -> None:
    with pytest.raises(Conflict, match="choose a directory outside"):
        pushed.merge("sql", tiny_base / "merged")
    merged = pushed.merge("sql", tmp_path / "out").out
    with pytest.raises(Conflict, match="choose a directory outside"):
        pushed.unmerge(merged, merged / "base")
    assert not (tiny_base / "merged").exists()


def test_output_here(pushed: loreg.Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(Conflict, match="runs in"):
        pushed.merge("sql", ".")
    assert list((tmp_path / "empty").iterdir()) == []


def test_a_mistyped_base_is_not_the_networks_fault(
    pushed: loreg.Registry, tiny_adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(NotFound, match="did you mean base"):
        pushed.push(tiny_adapter, base="bas", name="x")


def test_what_is_not_copied_is_said(pushed: loreg.Registry, tiny_base: Path, tmp_path: Path) -> None:
    (tiny_base / "2_Dense").mkdir()
    (tiny_base / "2_Dense" / "model.safetensors").write_bytes(b"other weights")
    (tiny_base / ".gitattributes").write_text("x")
    assert pushed.merge("sql", tmp_path / "out").left_out == (".gitattributes", "2_Dense/model.safetensors")


def test_a_file_with_an_odd_name_is_left_out(pushed: loreg.Registry, tiny_adapter: Path) -> None:
    (tiny_adapter / "we ird\nname.txt").write_text("x")
    assert pushed.push(tiny_adapter, base="base", name="sql").left_out == ("we ird\nname.txt",)
