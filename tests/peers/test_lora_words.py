"""Heads and embeddings on disk: what a merge ties, unties and resizes, in the files and in the config."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from loreg.registry import Registry
from tests.peers.variants.lora_words import CASES

_BY_NAME = {case.variant: case for case in CASES}

# Variant → whether head and embedding are still one, and the number of words.
OUTCOMES = {
    "lm_head, tied": (False, 64),
    "Embedding, tied (GPT-2)": (False, 64),
    "Embedding and lm_head, `ensure_weight_tying`": (True, 64),
    "`modules_to_save`: both, `ensure_weight_tying`": (True, 64),
    "`modules_to_save`: embedding, tied": (False, 64),
    "`trainable_token_indices`, tied": (True, 64),
    "`trainable_token_indices`: lm_head, tied": (False, 64),
    "More words, tied": (True, 70),
    "Fewer words, lm_head, tied": (False, 62),
    "More words, `trainable_token_indices`, tied": (True, 70),
}


@pytest.mark.parametrize("variant", OUTCOMES)
def test_ties_and_sizes(variant: str, registry: Registry, tmp_path: Path) -> None:
    tied, words = OUTCOMES[variant]
    built = _BY_NAME[variant].build(tmp_path)
    registry.push(built.adapter, base=built.base, name="words")
    registry.merge("words", tmp_path / "merged")
    tensors = load_file(tmp_path / "merged" / "model.safetensors")
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert ("lm_head.weight" not in tensors) == tied == config["tie_word_embeddings"]
    assert config["vocab_size"] == words
    sizes = {len(value) for name, value in tensors.items() if name.endswith(("wte.weight", "embed_tokens.weight"))}
    assert sizes == {words} and (tied or len(tensors["lm_head.weight"]) == words)


def test_what_peft_saves_twice_is_stored_once(registry: Registry, tmp_path: Path) -> None:
    """A tied weight, replaced in both places: one blob, and the pushed file comes back from it."""
    built = _BY_NAME["`modules_to_save`: both, `ensure_weight_tying`"].build(tmp_path)
    version = registry.push(built.adapter, base=built.base, name="words")
    assert list(version.manifest.full) == ["model.embed_tokens.weight"]
    source = version.manifest.source
    assert source is not None
    (weights,) = (file for file in source.files if file.name.endswith(".safetensors"))
    assert weights.tensors.count("full:model.embed_tokens.weight") == 2
    registry.export("words", tmp_path / "back")
    name = "adapter_model.safetensors"
    assert (tmp_path / "back" / name).read_bytes() == (built.adapter / name).read_bytes()
