"""Bad adapters: refused on push, or, where a stored one was damaged since, on merge; nothing is left behind."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from refusal import refused

import loreg
from loreg.errors import BadInput, LoregError, NotFound, Unsupported

MODEL, NORM = tiny.model(), tiny.NORM


def _edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def _tensors(folder: Path, change: Callable[[dict[str, tiny.Tensor]], object]) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = tiny.contents(path)
    change(tensors)
    path.write_bytes(tiny.container(tensors.items()))


class Bomb:
    """Pickles into a call."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("boom",)


def _pickle(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps({"x": Bomb()}, protocol=2))


def _cut(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-3])


PREFIX = "base_model.model."
A, B = f"{PREFIX}{tiny.V}.lora_A.weight", f"{PREFIX}{tiny.V}.lora_B.weight"
BAD_ADAPTERS: dict[str, tuple[Callable[[Path], object], type[LoregError], str]] = {
    "truncated": (_cut, BadInput, "is truncated"),
    "a pickle": (_pickle, BadInput, "is not a state dict that loads without running code"),
    "no r": (lambda f: _edit(f, lambda c: c.pop("r")), BadInput, "r"),
    "no alpha": (lambda f: _edit(f, lambda c: c.pop("lora_alpha")), BadInput, "lora_alpha"),
    "another method": (lambda f: _edit(f, lambda c: c.update(peft_type="NEW")), Unsupported, "peft_type is 'NEW'"),
    "an unknown field": (lambda f: _edit(f, lambda c: c.update(new_field=2)), Unsupported, "new_field is 2"),
    "a tensor of no module": (
        lambda f: _tensors(f, lambda t: t.update({f"{PREFIX}model.other": t[A]})),
        BadInput,
        "The adapter has 'model.other', and the base has no such tensor",
    ),
    "a module of another model": (
        lambda f: (
            _tensors(f, lambda t: t.update({k.replace("layers.0", "layers.7"): t.pop(k) for k in list(t)})),
            _edit(f, lambda c: c.update(target_modules=["q_proj", "v_proj"])),
        ),
        BadInput,
        r"layers\.7.* no such tensor",
    ),
    "a module that the config does not name": (
        lambda f: _edit(f, lambda c: c.update(target_modules=[tiny.Q])),
        BadInput,
        f"{A}.*target_modules does not name it",
    ),
    "half a module": (lambda f: _tensors(f, lambda t: t.pop(B)), BadInput, f"Module '{tiny.V}'.*expected lora_A"),
    "another shape": (
        lambda f: _tensors(f, lambda t: t.update({B: tiny.tensor("F32", np.ones((5, 2)))})),
        BadInput,
        "does not fit its base",
    ),
    "not finite": (
        lambda f: _tensors(f, lambda t: t.update({A: tiny.tensor("F32", np.full((2, 6), np.nan))})),
        BadInput,
        "holds NaN or infinity",
    ),
    "integers": (
        lambda f: _tensors(f, lambda t: t.update({A: tiny.tensor("I64", np.ones((2, 6)))})),
        Unsupported,
        "has dtype I64",
    ),
    "DoRA": (
        lambda f: _tensors(f, lambda t: t.update({f"{PREFIX}{tiny.V}.lora_magnitude_vector": t[B]})),
        Unsupported,
        "belongs to DoRA",
    ),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), NotFound, "neither adapter_model"),
    "no config": (lambda f: (f / "adapter_config.json").unlink(), NotFound, "holds no adapter that loreg knows"),
}


@pytest.mark.parametrize("what", BAD_ADAPTERS)
def test_a_bad_adapter_is_refused(
    pushed: loreg.Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    monkeypatch.chdir(tmp_path)
    change, error, message = BAD_ADAPTERS[what]
    folder = tiny.write_adapter(tmp_path / "bad", tiny.adapter(seed=4))
    change(folder)
    # By path and under a name of its own: neither a version nor a base may appear.
    other = tiny.write_model(tmp_path / "unregistered", MODEL | {NORM: MODEL[NORM].flipped(2)})
    with refused(pushed, tmp_path / "out", error, message, error.exit_code):
        pushed.push(folder, base=other)
    assert not (tmp_path / "boom").exists()


def test_a_good_adapter_is_not_refused(pushed: loreg.Registry, tmp_path: Path) -> None:
    assert pushed.push(tiny.write_adapter(tmp_path / "good", tiny.adapter(seed=4)), base="base").created


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone", "manifest flipped"])
def test_a_damaged_blob_is_refused(pushed: loreg.Registry, tmp_path: Path, damage: str) -> None:
    version = pushed.resolve("sql")
    blob = version.manifest.blob("factors")
    assert blob is not None
    path = pushed.storage.path(version.digest if damage.startswith("manifest") else blob.digest)
    path.chmod(0o644)
    data = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(data[:-1] if damage == "cut" else data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    error = NotFound if damage == "gone" else BadInput
    with (
        loreg.open(pushed.home) as again,  # what this process has verified once it does not verify again
        refused(again, tmp_path / "out", error, "is not in the store|is corrupt", error.exit_code),
    ):
        again.merge("sql", tmp_path / "out")


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.ones(4, 6, device="meta"), "expected a dense tensor"),
        (torch.ones(1).expand(4_000_000_000, 1000), "more elements than the file holds"),
    ],
    ids=["meta", "spread"],
)
def test_a_pickled_tensor_that_is_not_all_there_is_refused(
    pushed: loreg.Registry, tmp_path: Path, tensor: torch.Tensor, message: str
) -> None:
    folder = tiny.write_adapter(tmp_path / "pickled", tiny.adapter())
    (folder / "adapter_model.safetensors").unlink()
    torch.save({f"{PREFIX}{tiny.Q}.lora_A.weight": tensor}, folder / "adapter_model.bin")
    with pytest.raises(BadInput, match=message):
        pushed.push(folder, base="base")


@pytest.mark.parametrize("pattern", ["a{99999999999}", "(" * 600, r"(v_proj)\1", "v" * 5000])
def test_a_pattern_that_is_not_matched_is_refused(pushed: loreg.Registry, tmp_path: Path, pattern: str) -> None:
    folder = tiny.write_adapter(tmp_path / "slow", tiny.adapter(), alpha_pattern={pattern: 4})
    with pytest.raises(BadInput, match="alpha_pattern"):
        pushed.push(folder, base="base")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("pattern", ["(a|a)" * 40 + "b", "(?:.*_?)*x", ".*.*.*.*.*.*.*.*x", "(?:[a-z.0-9_]+)+x"])
def test_a_pattern_that_could_take_for_ever_is_matched(pushed: loreg.Registry, tmp_path: Path, pattern: str) -> None:
    folder = tiny.write_adapter(tmp_path / "slow", tiny.adapter(), alpha_pattern={pattern: 4})
    version = pushed.push(folder, base="base").manifest
    assert {term.alpha for module in version.modules.values() for term in module.terms} == {16}


def test_factors_whose_product_no_double_holds_are_refused(pushed: loreg.Registry, tmp_path: Path) -> None:
    huge = tiny.Factors(tiny.tensor("F64", np.full((2, 6), 1e300)), tiny.tensor("F64", np.full((6, 2), 1e300)))
    pushed.push(tiny.write_adapter(tmp_path / "huge", {tiny.V: huge}), base="base")
    with refused(pushed, tmp_path / "out", BadInput, "exceeds the largest finite torch.bfloat16", 5):
        pushed.merge("huge", tmp_path / "out")


def test_a_card_of_empty_lines_is_read_at_once(pushed: loreg.Registry, tmp_path: Path) -> None:
    folder = tiny.write_adapter(tmp_path / "card", tiny.adapter())
    (folder / "README.md").write_text("---\n" + "\n" * 300_000)
    assert pushed.push(folder, base="base").manifest.provenance.license is None


def test_a_norm_of_another_size_is_no_resize(pushed: loreg.Registry, tmp_path: Path) -> None:
    size = tiny.model()[tiny.NORM].shape[0]
    full = {tiny.NORM: tiny.normal(np.random.default_rng(0), "BF16", size + 1)}
    pushed.push(tiny.write_adapter(tmp_path / "norm", {}, full=full), base="base")
    with pytest.raises(Unsupported, match="a matrix can gain or lose rows"):
        pushed.merge("norm", tmp_path / "out")
