"""PEFT directories that loreg writes itself: of versions that were not pushed as such, loaded by PEFT."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from lycoris import LycorisNetwork, create_lycoris
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from loreg.errors import Unsupported
from loreg.registry import Registry
from tests.peers.variants import Built, Case
from tests.peers.variants.models import randomise

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


FOLDED = ["Rank and alpha patterns, rsLoRA", "PiSSA, rsLoRA and patterns", "Embedding, rsLoRA", "Conv1D (GPT-2)"]
BEYOND = ["DoRA: Conv1D (GPT-2)", "`lora_bias`, `bias='all'`", "`modules_to_save`: both, `ensure_weight_tying`"]


@pytest.mark.parametrize("variant", FOLDED)
def test_folded_scales_need_no_more_than_r_and_lora_alpha(variant: str, registry: Registry, tmp_path: Path) -> None:
    built = _composed(variant, registry, tmp_path)
    registry.export("adapter", tmp_path / "folded", format="folded")
    config = json.loads((tmp_path / "folded" / "adapter_config.json").read_text())
    factors = load_file(tmp_path / "folded" / "adapter_model.safetensors")
    assert config["lora_alpha"] == config["r"]
    assert not (config["use_rslora"] or config["rank_pattern"] or config["alpha_pattern"])
    assert not any("." in target for target in config["target_modules"])
    assert {min(tensor.shape) for tensor in factors.values()} == {config["r"]}
    assert built.reload is not None
    off = (built.reload(tmp_path / "folded") - built.expected).abs().max() / built.expected.abs().max()
    assert float(off) <= 1e-6


@pytest.mark.parametrize("variant", BEYOND)
def test_what_has_no_folded_form_is_refused(variant: str, registry: Registry, tmp_path: Path) -> None:
    _composed(variant, registry, tmp_path)
    with pytest.raises(Unsupported, match="no form with folded scales"):
        registry.export("same", tmp_path / "folded", format="folded")
    assert not (tmp_path / "folded").exists()


# Models that are not called on disk as they are in memory

TEXT = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
TEXT |= {"num_attention_heads": 4, "num_key_value_heads": 2}
VISION = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
VISION |= {"image_size": 32, "patch_size": 8}
PIXELS = {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32).sin()}
WORDS = {"input_ids": torch.arange(1, 25).reshape(2, 12)}


def _vit() -> Any:
    return tf.ViTForImageClassification(tf.ViTConfig(**VISION))


def _llava() -> Any:
    text, vision = tf.LlamaConfig(**TEXT), tf.CLIPVisionConfig(**VISION)
    return tf.LlavaForConditionalGeneration(
        tf.LlavaConfig(text_config=text, vision_config=vision, image_token_index=63, image_seq_length=16)
    )


def _headless_llava() -> Any:
    return tf.LlavaModel(_llava().config)


RENAMED: dict[str, tuple[Callable[[], Any], dict[str, torch.Tensor], list[str]]] = {
    "vit": (_vit, PIXELS, ["q_proj", "projection", "classifier"]),
    "llava": (_llava, WORDS, ["q_proj", "lm_head"]),
    "headless": (_headless_llava, WORDS, ["q_proj", "embed_tokens"]),
}


@torch.no_grad()
def _said(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return model.eval()(**inputs)[0]  # type: ignore[no-any-return]


def _check_export(
    kind: Any, inputs: dict[str, torch.Tensor], expected: torch.Tensor, registry: Registry, folder: Path
) -> None:
    """PEFT serves the exported ``version`` as transformers does what loreg merges; neither is the base."""
    registry.merge("version", folder / "merged")
    registry.export("version", folder / "peft", format="peft")
    base = _said(kind.from_pretrained(folder / "base"), inputs)
    served = PeftModel.from_pretrained(kind.from_pretrained(folder / "base"), folder / "peft")
    for found in (_said(kind.from_pretrained(folder / "merged"), inputs), _said(served, inputs)):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(found, base, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("model", RENAMED)
def test_what_is_extracted_is_exported_as_memory_calls_it(model: str, registry: Registry, tmp_path: Path) -> None:
    make, inputs, targets = RENAMED[model]
    torch.manual_seed(0)
    tuned = make()
    randomise(tuned, 1, 0.05)
    tuned.save_pretrained(tmp_path / "base")
    adapted = get_peft_model(tuned, LoraConfig(r=2, target_modules=targets))
    randomise(adapted, 2, 0.1)
    merged = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path / "tuned")
    registry.extract(tmp_path / "base", tmp_path / "tuned", "version", rank=2)
    _check_export(type(merged), inputs, _said(merged, inputs), registry, tmp_path)


def test_what_lycoris_trained_is_exported_as_memory_calls_it(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = _vit()
    randomise(model, 1, 0.05)
    model.save_pretrained(tmp_path / "base")
    monkeypatch.setattr(LycorisNetwork, "TARGET_REPLACE_MODULE", [])
    monkeypatch.setattr(LycorisNetwork, "TARGET_REPLACE_NAME", [".*q_proj", ".*fc1", ".*projection"])
    network = create_lycoris(model.eval(), 1.0, linear_dim=4, linear_alpha=2.0, algo="lora")
    network.apply_to()
    randomise(network, 2, 0.05)
    tensors = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    save_file(tensors, tmp_path / "lycoris.safetensors", {"ss_network_args": "{}"})
    version = registry.push(tmp_path / "lycoris.safetensors", base=tmp_path / "base", name="version")
    assert "vit.layers.0.attention.q_proj" in version.manifest.modules
    _check_export(type(model), PIXELS, _said(model, PIXELS), registry, tmp_path)


def test_a_norm_of_a_base_from_tensorflow_is_exported_as_memory_calls_it(registry: Registry, tmp_path: Path) -> None:
    """Its checkpoint has ``LayerNorm.gamma`` where memory has ``LayerNorm.weight``."""
    torch.manual_seed(0)
    sizes = {name: value for name, value in VISION.items() if "size" not in name or name.startswith(("hid", "int"))}
    model = tf.BertModel(tf.BertConfig(**sizes, vocab_size=64))
    model.save_pretrained(tmp_path / "base")
    path = tmp_path / "base" / "model.safetensors"
    ends = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    old = {
        next((name.replace(end, ends[end]) for end in ends if name.endswith(end)), name): tensor
        for name, tensor in load_file(path).items()
    }
    save_file(old, path, {"format": "pt"})
    adapted = get_peft_model(
        model, LoraConfig(r=2, target_modules=["query"], modules_to_save=["embeddings.LayerNorm"])
    )
    randomise(adapted, 2, 0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    registry.push(tmp_path / "adapter", base=tmp_path / "base", name="adapter")
    registry.compose("adapter", "version")
    registry.export("version", tmp_path / "peft", format="peft")
    served = PeftModel.from_pretrained(tf.BertModel.from_pretrained(tmp_path / "base"), tmp_path / "peft")
    torch.testing.assert_close(_said(served, WORDS), _said(adapted, WORDS), rtol=1e-4, atol=1e-5)


def test_a_head_that_memory_has_elsewhere_is_exported_with_its_embedding(registry: Registry, tmp_path: Path) -> None:
    tokens = {"boi_token_index": 60, "eoi_token_index": 61, "image_token_index": 62, "mm_tokens_per_image": 4}
    text = tf.Gemma3TextConfig(**TEXT, head_dim=8, pad_token_id=0)
    config = tf.Gemma3Config(text_config=text, vision_config=tf.SiglipVisionConfig(**VISION), **tokens)
    torch.manual_seed(0)
    model = tf.Gemma3ForConditionalGeneration(config)
    model.save_pretrained(tmp_path / "base")
    both = LoraConfig(r=2, target_modules=["embed_tokens", "lm_head"], ensure_weight_tying=True)
    adapted = get_peft_model(model, both)
    randomise(adapted, 2, 0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    registry.push(tmp_path / "adapter", base=tmp_path / "base", name="adapter")
    registry.compose("adapter", "version")
    _check_export(type(model), WORDS, _said(adapted, WORDS), registry, tmp_path)
    factors = [
        {name for name in load_file(tmp_path / folder / "adapter_model.safetensors") if ".lora_" in name}
        for folder in ("adapter", "peft")
    ]
    assert factors[0] == factors[1]
