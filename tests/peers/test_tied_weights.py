"""Weights that a model uses in several places: what a merge stores of them, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from loreg.errors import Unsupported
from loreg.registry import Registry
from tests.peers.variants import Built
from tests.peers.variants.lora_ties import CASES
from tests.peers.variants.models import randomise

_BY_NAME = {case.variant: case for case in CASES}
_BERT, _BIAS = "cls.predictions.decoder.weight", "cls.predictions.decoder.bias"

# Variant → the names that the output has and the base has not, and whether its config says that they are tied.
STORED = {
    "Head of BERT, tied": ({_BERT, _BIAS}, False),
    "Embedding of BERT, tied": ({_BERT, _BIAS}, False),
    "Inside of BERT, `bias`: all": (set(), True),
    "Head of XLM, tied": ({"pred_layer.proj.weight"}, False),
    "Head of T5, tied": ({"lm_head.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"}, True),
}


@pytest.mark.parametrize("variant", STORED)
def test_what_is_stored(variant: str, registry: Registry, tmp_path: Path) -> None:
    added, tied = STORED[variant]
    _merge(_BY_NAME[variant].build(tmp_path), registry, tmp_path)
    tensors = load_file(tmp_path / "merged" / "model.safetensors")
    assert set(tensors) - set(load_file(tmp_path / "base" / "model.safetensors")) == added
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is tied


@pytest.mark.parametrize("change", ["both stored", "named without the model", "bias by its other name", "unsaid"])
def test_other_checkpoints_of_the_same_model(change: str, registry: Registry, tmp_path: Path) -> None:
    built = _BY_NAME["Head of BERT, tied, `bias`: all"].build(tmp_path)
    path = tmp_path / "base" / "model.safetensors"
    tensors = load_file(path)
    if change == "both stored":
        tensors[_BERT] = tensors["bert.embeddings.word_embeddings.weight"].clone()
        tensors[_BIAS] = tensors["cls.predictions.bias"].clone()
    elif change == "named without the model":
        tensors = {name.removeprefix("bert."): value for name, value in tensors.items()}
    elif change == "bias by its other name":
        tensors[_BIAS] = tensors.pop("cls.predictions.bias")
    else:
        config = json.loads((tmp_path / "base" / "config.json").read_text())
        del config["tie_word_embeddings"]
        (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    save_file(tensors, path, metadata={"format": "pt"})
    _merge(built, registry, tmp_path)
    assert torch.allclose(built.run(tmp_path / "merged"), built.expected, atol=1e-5)


def test_a_base_that_holds_two_values_for_one_weight_is_refused(registry: Registry, tmp_path: Path) -> None:
    built = _BY_NAME["Head of BERT, tied"].build(tmp_path)
    path = tmp_path / "base" / "model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, _BIAS: tensors["cls.predictions.bias"] + 1}, path, metadata={"format": "pt"})
    with pytest.raises(Unsupported, match=f"{_BIAS}.*different values"):
        _merge(built, registry, tmp_path)


def test_a_head_of_its_own_is_left_as_it_is(registry: Registry, tmp_path: Path) -> None:
    """The adapter holds T5's embedding, unchanged: it is not that of a head which the base stores on its own."""
    built = _BY_NAME["Head of T5, not tied"].build(tmp_path)
    base = load_file(tmp_path / "base" / "model.safetensors")
    path = built.adapter / "adapter_model.safetensors"
    tensors = {name: value for name, value in load_file(path).items() if "lm_head" not in name}
    save_file({**tensors, "base_model.model.shared.weight": base["shared.weight"]}, path)
    _merge(built, registry, tmp_path)
    assert torch.equal(load_file(tmp_path / "merged" / "model.safetensors")["lm_head.weight"], base["lm_head.weight"])


def test_a_resized_embedding_of_an_encoder_is_refused(registry: Registry, tmp_path: Path) -> None:
    built = _BY_NAME["Embedding of XLM, tied"].build(tmp_path)
    base = transformers.XLMWithLMHeadModel.from_pretrained(built.base)
    base.resize_token_embeddings(70, mean_resizing=False)
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_lin"]))
    model.save_pretrained(tmp_path / "resized")
    with pytest.raises(Unsupported, match=r"resizes.*\[64, 32\].*bias of its head"):
        registry.push(tmp_path / "resized", base=built.base, name="resized")


def test_the_embedding_of_a_decoder_in_a_model_without_a_head_by_its_name(registry: Registry, tmp_path: Path) -> None:
    """Blip2Model has the whole decoder inside, with its tied head."""
    inner = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    text = {**inner, "model_type": "opt", "vocab_size": 90, "ffn_dim": 48, "word_embed_proj_dim": 32}
    config = transformers.Blip2Config(
        vision_config={**inner, "image_size": 28, "patch_size": 14},
        qformer_config={**inner, "vocab_size": 80, "encoder_hidden_size": 32},
        text_config={**text, "max_position_embeddings": 64},
        num_query_tokens=4,
        image_token_index=89,
    )
    base = transformers.Blip2Model(config)
    base.save_pretrained(tmp_path / "base")
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["decoder.embed_tokens"]))
    randomise(model)
    model.save_pretrained(tmp_path / "adapter")
    registry.push(tmp_path / "adapter", base=tmp_path / "base", name="words")
    with pytest.raises(Unsupported, match=r"decoder.embed_tokens.*use it twice"):
        registry.merge("words", tmp_path / "merged")


def _merge(built: Built, registry: Registry, folder: Path) -> None:
    registry.push(built.adapter, base=built.base, name="words")
    registry.merge("words", folder / "merged")
