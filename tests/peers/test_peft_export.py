"""PEFT directories that loreg writes itself: of versions that were not pushed as such, loaded by PEFT."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

from loreg.errors import Unsupported
from loreg.registry import Registry
from tests.peers.variants import Built, Case

_MODULES = ("lora", "lora_initial", "lora_layers", "lora_words")
_BY_NAME: dict[str, Case] = {
    case.variant: case for name in _MODULES for case in importlib.import_module(f"tests.peers.variants.{name}").CASES
}

SAID = [
    "Rank and alpha patterns, rsLoRA",
    "`lora_bias`, `bias='all'`",
    "DoRA: Conv1D (GPT-2)",
    "DoRA: Embedding",
    "Conv1d, Conv2d: `lora_bias`",
    "DoRA: Conv1d, Conv2d, Conv3d",
    "MultiheadAttention",
    "PiSSA, rsLoRA and patterns",
    "PiSSA, DoRA",
    "Embedding and lm_head, `ensure_weight_tying`",
    "`modules_to_save`: both, `ensure_weight_tying`",
    "`trainable_token_indices`, tied (GPT-2)",
    "`trainable_token_indices`: other rows of both, tied",
    "More words, Embedding, tied",
    "More words, `trainable_token_indices`, tied",
]
UNSAID = {
    "BD-LoRA": "in blocks",
    "`trainable_token_indices` and lm_head, tied": "rows beside other terms",
}


def _composed(variant: str, registry: Registry, folder: Path) -> Built:
    """The version ``same``: the case's adapter, but of no files that could be given back."""
    built = _BY_NAME[variant].build(folder)
    registry.push(built.adapter, base=built.base, name="adapter", **built.push)
    registry.compose("adapter", "same")
    return built


@pytest.mark.parametrize("variant", SAID)
def test_peft_computes_the_same_of_it(variant: str, registry: Registry, tmp_path: Path) -> None:
    built = _composed(variant, registry, tmp_path)
    registry.export("same", tmp_path / "peft", format="peft")
    assert built.reload is not None
    off = (built.reload(tmp_path / "peft") - built.expected).abs().max() / built.expected.abs().max()
    assert float(off) <= 1e-6


@pytest.mark.parametrize("variant", UNSAID)
def test_what_peft_cannot_say_is_refused(variant: str, registry: Registry, tmp_path: Path) -> None:
    _composed(variant, registry, tmp_path)
    with pytest.raises(Unsupported, match=UNSAID[variant]):
        registry.export("same", tmp_path / "peft", format="peft")
    assert not (tmp_path / "peft").exists()


def test_initial_factors_are_exported_as_peft_converts_them(registry: Registry, tmp_path: Path) -> None:
    """Not as they were pushed: PEFT would take the first factors out of the base once more."""
    built = _BY_NAME["PiSSA"].build(tmp_path)
    registry.push(built.adapter, base=built.base, name="adapter", **built.push)
    registry.export("adapter", tmp_path / "peft", format="peft")
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert (config["init_lora_weights"], config["r"], config["lora_alpha"]) == (True, 8, 12)
