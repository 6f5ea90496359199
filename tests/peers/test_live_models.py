"""Merges in the memory of transformers' models, against the models that it loads from a merge on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from live_models import bytes_of, load
from peer_models import DTYPES, BaseOf, load_model, save_adapter
from peft import LoraConfig, get_peft_model

import loreg
from loreg import serving
from loreg.errors import BadInput, BaseMismatch, Unsupported
from tests.peers.variants.experts import mixtral
from tests.peers.variants.models import llama, randomise

TARGETS = {
    "gpt2": ["c_attn", "attn.c_proj"],
    "gpt2-hub": ["c_attn", "attn.c_proj", "wpe"],
    "gpt2-body": ["c_attn"],
    "roberta-mlm": ["query", "value"],
    "llama": ["q_proj", "v_proj", "down_proj"],
    "llama-sharded": ["q_proj"],
}


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("family", TARGETS)
def test_the_model_is_the_one_that_is_loaded_from_a_merge(
    family: str, dtype: str, base_of: BaseOf, registry: loreg.Registry, tmp_path: Path
) -> None:
    base = base_of(family, dtype)
    registry.add_base(base, "base")
    more = {"modules_to_save": ["classifier"]} if family == "roberta-mlm" else {"use_dora": family == "llama-sharded"}
    for seed, name in enumerate(("one", "two"), 1):
        save_adapter(family, base, tmp_path / name, dtype, seed, target_modules=TARGETS[family], **more)
        registry.push(tmp_path / name, base="base", name=name)
    expression = "one" if family == "roberta-mlm" else "0.7*one - two"
    registry.merge(expression, tmp_path / "out", verify="none")
    model = load_model(family, base, DTYPES[dtype])
    before = bytes_of(model)
    merged = serving.merge_(model, expression, registry)
    expected = bytes_of(load_model(family, tmp_path / "out", DTYPES[dtype]))
    assert bytes_of(model) == expected != before
    serving.unmerge_(model, merged)
    assert bytes_of(model) == before


def test_a_compiled_model_and_a_wrapped_one(base_of: BaseOf, registry: loreg.Registry, tmp_path: Path) -> None:
    base = base_of("llama", "bf16")
    save_adapter("llama", base, tmp_path / "sql", "bf16", target_modules=["q_proj"])
    registry.push(tmp_path / "sql", base=base, name="sql")
    model = load_model("llama", base, torch.bfloat16)
    before = bytes_of(model)
    for wrapped in (torch.compile(model), torch.nn.DataParallel(model)):
        merged = serving.merge_(wrapped, "sql", registry)
        assert bytes_of(model) != before
        serving.unmerge_(wrapped, merged)
        assert bytes_of(model) == before
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(BadInput, match=r"q_proj.weight', and the model has no such.*without wrappers"):
        serving.merge_(adapted, "sql", registry)


def _pushed(base: Any, registry: loreg.Registry, folder: Path, **lora: Any) -> Any:
    """A saved base, an adapter of ``lora`` that is pushed, and the model that is loaded from the base."""
    base.save_pretrained(folder / "base")
    model = get_peft_model(base, LoraConfig(**lora))
    randomise(model)
    model.save_pretrained(folder / "adapter")
    registry.push(folder / "adapter", base=folder / "base", name="adapter")
    return load(folder / "base")


def test_a_tied_embedding_that_both_share_stays_tied(registry: loreg.Registry, tmp_path: Path) -> None:
    model = _pushed(
        llama(tied=True), registry, tmp_path, target_modules=["q_proj"], trainable_token_indices=[1, 5],
        ensure_weight_tying=True,
    )  # fmt: skip
    before = bytes_of(model)
    merged = serving.merge_(model, "adapter", registry)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    registry.merge("adapter", tmp_path / "out", verify="none")
    assert bytes_of(model) == bytes_of(load(tmp_path / "out"))
    serving.unmerge_(model, merged)
    assert bytes_of(model) == before


def test_a_tied_head_is_not_untied_in_memory(registry: loreg.Registry, tmp_path: Path) -> None:
    model = _pushed(llama(tied=True), registry, tmp_path, target_modules=["lm_head"])
    before = bytes_of(model)
    with pytest.raises(Unsupported, match=r"lm_head.weight.*embed_tokens.weight.*not untied"):
        serving.merge_(model, "adapter", registry)
    assert bytes_of(model) == before
    # Where each has its own memory, it is done.
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    serving.merge_(model, "adapter", registry)
    registry.merge("adapter", tmp_path / "out", verify="none")
    assert bytes_of(model) == bytes_of(load(tmp_path / "out"))


def test_parameters_that_the_model_has_tied_and_the_adapter_takes_for_two(
    registry: loreg.Registry, tmp_path: Path
) -> None:
    model = _pushed(llama(), registry, tmp_path, target_modules=["lm_head"])
    model.model.embed_tokens.weight = model.lm_head.weight
    with pytest.raises(Unsupported, match=r"'lm_head.weight' and 'model.embed_tokens.weight' are one parameter"):
        serving.merge_(model, "adapter", registry)


def test_experts_that_memory_stacks(registry: loreg.Registry, tmp_path: Path) -> None:
    """Layers of single experts on disk, rows of a stack in memory; and a base that is another in one of them."""
    parameters = ["experts.gate_up_proj", "experts.down_proj"]
    model = _pushed(
        mixtral().to(torch.bfloat16), registry, tmp_path, r=2, target_modules=[], target_parameters=parameters
    )
    before = bytes_of(model)
    merged = serving.merge_(model, "adapter", registry)
    assert set(merged.tensors) == {f"model.layers.{layer}.mlp.{name}" for layer in range(2) for name in parameters}
    registry.merge("adapter", tmp_path / "out", verify="none")
    assert bytes_of(model) == bytes_of(load(tmp_path / "out"))
    serving.unmerge_(model, merged)
    assert bytes_of(model) == before
    with torch.no_grad():
        model.model.layers[1].mlp.experts.gate_up_proj[2, -1, -1] += 1
    with pytest.raises(BaseMismatch, match=r"1 of the 24 tensors.*layers.1.mlp.experts.gate_up_proj"):
        serving.merge_(model, "adapter", registry)


def test_a_model_of_other_words_than_the_checkpoint(registry: loreg.Registry, tmp_path: Path) -> None:
    """ViT's attention is called otherwise in memory than on disk."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    base = transformers.ViTForImageClassification(transformers.ViTConfig(**sizes, image_size=16, patch_size=8))
    model = _pushed(base, registry, tmp_path, target_modules=["q_proj", "fc1"], modules_to_save=["classifier"])
    merged = serving.merge_(model, "adapter", registry)
    assert not set(merged.tensors) <= set(registry.resolve("adapter").manifest.base.touched)
    registry.merge("adapter", tmp_path / "out", verify="none")
    assert bytes_of(model) == bytes_of(load(tmp_path / "out"))
