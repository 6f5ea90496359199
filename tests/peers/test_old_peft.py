"""Adapters that old releases of PEFT wrote (``fixtures/``), against what those very releases say they mean."""

from __future__ import annotations

import json
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest
import torch
import transformers
from peer_oracle import rounded
from safetensors.torch import load_file

from loreg.registry import Registry

FIXTURES = Path(__file__).parent / "fixtures"
VERSIONS = ("0.5.0", "0.7.1", "0.10.0", "0.13.2", "0.17.1")
MODELS = json.loads((FIXTURES / "models.json").read_text())
_CLASSES = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "gpt2": (transformers.GPT2Config, transformers.GPT2LMHeadModel),
}


def _base(name: str, dtype: torch.dtype, folder: Path) -> Path:
    """The model of the fixtures with numbers that hang on nothing but the names: the adapters fit any numbers."""
    config, kind = _CLASSES[name]
    model = kind(config(**MODELS[name])).to(dtype)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            numbers = np.random.default_rng(crc32(key.encode())).standard_normal(tuple(parameter.shape)) * 0.1
            parameter.copy_(torch.from_numpy(numbers))
    model.save_pretrained(folder)
    return folder


def test_every_fixture_is_tested() -> None:
    assert sorted(path.name for path in FIXTURES.glob("peft-*")) == sorted(f"peft-{version}" for version in VERSIONS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("name", _CLASSES)
@pytest.mark.parametrize("version", VERSIONS)
def test_old_adapters_mean_what_they_meant(
    version: str, name: str, dtype: torch.dtype, registry: Registry, tmp_path: Path
) -> None:
    folder = FIXTURES / f"peft-{version}"
    expected = load_file(folder / f"{name}.expected.safetensors")
    base = _base(name, dtype, tmp_path / "base")
    registry.push(folder / name, base=base, name="old")
    result = registry.merge("old", tmp_path / "merged", verify="exact")
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "merged" / "model.safetensors")
    assert before.keys() == after.keys()
    deltas = {key.removeprefix("delta:") + ".weight": value for key, value in expected.items() if "delta:" in key}
    full = {key.removeprefix("full:"): value for key, value in expected.items() if "full:" in key}
    assert set(result.touched) == {*deltas, *full}
    for key, tensor in after.items():
        if key in deltas:
            assert torch.equal(tensor, rounded(before[key].double() + deltas[key], dtype)), key
            assert not torch.equal(tensor, before[key]), key
        elif key in full:
            assert torch.equal(tensor, rounded(full[key].double(), dtype)), key
        else:
            assert torch.equal(tensor, before[key]), key
    registry.export("old", tmp_path / "back")
    assert _files(tmp_path / "back") == _files(folder / name)


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}
