"""Models whose names differ between memory and disk: what loreg merges is what PEFT merges and transformers saves."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers as tf
from peft import LoraConfig, PeftConfig, VeraConfig, get_peft_model
from safetensors.torch import load_file, save_file

import loreg
from loreg.errors import LoregError
from tests.peers.variants.models import randomise

TEXT = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
TEXT |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0}
GEMMA = {**TEXT, "head_dim": 8}
VISION = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
VISION |= {"image_size": 32, "patch_size": 8}
DINO = {key: VISION[key] for key in VISION if key != "intermediate_size"}
MROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
QWEN = {"hidden_size": 32, "num_heads": 4, "depth": 2, "patch_size": 8}


def _llava() -> Any:
    text, vision = tf.LlamaConfig(**TEXT), tf.CLIPVisionConfig(**VISION)
    return tf.LlavaForConditionalGeneration(
        tf.LlavaConfig(text_config=text, vision_config=vision, image_token_index=63, image_seq_length=16)
    )


def _llava_next() -> Any:
    text, vision = tf.LlamaConfig(**TEXT), tf.CLIPVisionConfig(**VISION)
    return tf.LlavaNextForConditionalGeneration(
        tf.LlavaNextConfig(text_config=text, vision_config=vision, image_token_index=63)
    )


def _gemma3() -> Any:
    tokens = {"boi_token_index": 60, "eoi_token_index": 61, "image_token_index": 62, "mm_tokens_per_image": 4}
    text, vision = tf.Gemma3TextConfig(**GEMMA), tf.SiglipVisionConfig(**VISION)
    return tf.Gemma3ForConditionalGeneration(tf.Gemma3Config(text_config=text, vision_config=vision, **tokens))


def _paligemma() -> Any:
    text = tf.GemmaConfig(**GEMMA).to_dict()
    vision = tf.SiglipVisionConfig(**VISION, projection_dim=32).to_dict()
    return tf.PaliGemmaForConditionalGeneration(
        tf.PaliGemmaConfig(
            text_config=text, vision_config=vision, projection_dim=32, hidden_size=32, image_token_index=63
        )
    )


def _qwen2_vl() -> Any:
    return tf.Qwen2VLForConditionalGeneration(
        tf.Qwen2VLConfig(
            text_config={**TEXT, "rope_parameters": MROPE}, vision_config={**QWEN, "embed_dim": 32, "mlp_ratio": 2}
        )
    )


def _qwen2_5_vl() -> Any:
    return tf.Qwen2_5_VLForConditionalGeneration(
        tf.Qwen2_5_VLConfig(
            text_config={**TEXT, "rope_parameters": MROPE},
            vision_config={**QWEN, "out_hidden_size": 32, "intermediate_size": 48},
        )
    )


def _colpali() -> Any:
    text = tf.GemmaConfig(**GEMMA, num_image_tokens=4).to_dict()
    vision = tf.SiglipVisionConfig(**VISION, projection_dim=32, vision_use_head=False).to_dict()
    sizes: dict[str, Any] = {"projection_dim": 32, "hidden_size": 32, "image_token_index": 63}
    inner = tf.PaliGemmaConfig(text_config=text, vision_config=vision, **sizes)
    return tf.ColPaliForRetrieval(tf.ColPaliConfig(vlm_config=inner, text_config=None, embedding_dim=16))


def _mask2former() -> Any:
    sizes: dict[str, Any] = {"image_size": 32, "patch_size": 4, "embed_dim": 8, "window_size": 4}
    stages = {"depths": [1, 1, 1, 1], "num_heads": [2, 2, 2, 2]}
    backbone = tf.SwinConfig(**sizes, **stages, out_features=["stage1", "stage2", "stage3", "stage4"])
    hidden: dict[str, Any] = dict.fromkeys(("feature_size", "mask_feature_size", "hidden_dim"), 32)
    hidden |= {"encoder_feedforward_dim": 24, "dim_feedforward": 24, "encoder_layers": 1, "decoder_layers": 2}
    return tf.Mask2FormerForUniversalSegmentation(
        tf.Mask2FormerConfig(backbone_config=backbone, **hidden, num_attention_heads=2, num_queries=5)
    )


def _swin() -> Any:
    sizes: dict[str, Any] = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "window_size": 4}
    return tf.SwinForImageClassification(tf.SwinConfig(**sizes, depths=[1, 1], num_heads=[2, 2]))


def _segformer() -> Any:
    sizes: dict[str, Any] = {"hidden_sizes": [8, 16, 16, 32], "num_attention_heads": [1, 1, 2, 2]}
    return tf.SegformerForSemanticSegmentation(
        tf.SegformerConfig(**sizes, depths=[1, 1, 1, 1], decoder_hidden_size=16)
    )


def _rt_detr() -> Any:
    backbone = tf.RTDetrResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 8, 16, 16],
        depths=[1, 1, 1, 1],
        out_features=["stage2", "stage3", "stage4"],
    )
    return tf.RTDetrForObjectDetection(
        tf.RTDetrConfig(
            backbone_config=backbone,
            backbone=None,
            use_pretrained_backbone=False,
            encoder_hidden_dim=16,
            encoder_in_channels=[8, 16, 16],
            d_model=16,
            decoder_in_channels=[16, 16, 16],
            encoder_ffn_dim=24,
            decoder_ffn_dim=24,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            decoder_layers=2,
            num_queries=5,
            num_denoising=0,
        )
    )


ENTWINED = {
    "llava": _llava,
    "llava_next": _llava_next,
    "gemma3": _gemma3,
    "paligemma": _paligemma,
    "qwen2_vl": _qwen2_vl,
    "qwen2_5_vl": _qwen2_5_vl,
}
SEEING = {
    "vit": lambda: tf.ViTForImageClassification(tf.ViTConfig(**VISION)),
    "deit": lambda: tf.DeiTForImageClassification(tf.DeiTConfig(**VISION)),
    "beit": lambda: tf.BeitForImageClassification(tf.BeitConfig(**VISION)),
    "ast": lambda: tf.ASTForAudioClassification(tf.ASTConfig(**VISION, max_length=32, num_mel_bins=16)),
    "vit_mae": lambda: tf.ViTMAEForPreTraining(
        tf.ViTMAEConfig(**VISION, decoder_hidden_size=16, decoder_num_hidden_layers=1, decoder_num_attention_heads=2)
    ),
    "dinov2": lambda: tf.Dinov2ForImageClassification(tf.Dinov2Config(**DINO)),
    "swin": _swin,
    "segformer": _segformer,
    "rt_detr": _rt_detr,
    "neox": lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**{**TEXT, "num_key_value_heads": None})),
}
# Of both towers, and what joins them; an image tower's own head is a MultiheadAttention, whose out_proj stands idle.
BOTH = ["q_proj", "v_proj", "up_proj", "fc1", "qkv", "proj", "linear_1", "multi_modal_projector.linear"]
HOW: dict[str, dict[str, Any]] = {
    "both": {"target_modules": BOTH},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "saved": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "rows": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]},
}


class Trained(NamedTuple):
    """The class of a model, and its tensors by their names in memory: as they were, and as PEFT merges them.

    ``logits``: of the model with its adapter beside it.
    """

    kind: Any
    base: dict[str, torch.Tensor]
    merged: dict[str, torch.Tensor]
    logits: torch.Tensor | None


def _trained(make: Callable[[], Any], config: PeftConfig, folder: Path, logits: bool = False) -> Trained:
    """Writes the base and the adapter."""
    torch.manual_seed(0)
    model = make()
    randomise(model, 1)
    model.save_pretrained(folder / "base")
    base, kind = _tensors(model), type(model)
    adapted = get_peft_model(model, config)
    randomise(adapted, 2)
    adapted.save_pretrained(folder / "adapter")
    said = _logits(adapted) if logits else None
    return Trained(kind, base, _tensors(adapted.merge_and_unload()), said)


@torch.no_grad()
def _logits(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=torch.arange(1, 25).reshape(2, 12)).logits  # type: ignore[no-any-return]


def _tensors(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict(keep_vars=True).items()}


def _merged(folder: Path) -> None:
    registry = loreg.open(folder / "home")
    registry.push(folder / "adapter", base=folder / "base", name="adapter")
    registry.merge("adapter", folder / "merged")


def _check(trained: Trained, folder: Path) -> None:
    merged = _tensors(trained.kind.from_pretrained(folder / "merged"))
    assert merged.keys() == trained.merged.keys()
    for name, tensor in trained.merged.items():
        torch.testing.assert_close(
            merged[name], tensor, rtol=1e-5, atol=1e-6, msg=lambda text, at=name: f"{at}: {text}"
        )
    assert any(not torch.equal(trained.base[name], tensor) for name, tensor in merged.items())


# RT-DETR has its heads in two places; a ViTMAE's decoder_embed is called as words are.
TARGETS = {"rt_detr": ["q_proj", "o_proj", "fc1", "fc2"], "vit_mae": ["q_proj", "o_proj", "fc1"]}


@pytest.mark.parametrize("kind", sorted(SEEING))
def test_every_linear_layer(kind: str, tmp_path: Path) -> None:
    make = SEEING[kind]
    targets = TARGETS.get(kind, "all-linear")
    trained = _trained(make, LoraConfig(r=3, lora_alpha=5, target_modules=targets), tmp_path)
    _merged(tmp_path)
    _check(trained, tmp_path)


@pytest.mark.parametrize(
    ("kind", "how"),
    [(kind, "both") for kind in ENTWINED]
    + [(kind, how) for kind in ("llava", "gemma3", "qwen2_vl") for how in HOW if how != "both"],
)
def test_models_of_several(kind: str, how: str, tmp_path: Path) -> None:
    # PEFT merges into both of two tied weights what it had added to one.
    one_of_two = kind == "gemma3" and how in ("head", "embedding")
    trained = _trained(ENTWINED[kind], LoraConfig(r=3, lora_alpha=5, **HOW[how]), tmp_path, logits=one_of_two)
    _merged(tmp_path)
    if trained.logits is None:
        _check(trained, tmp_path)
    else:
        found = _logits(trained.kind.from_pretrained(tmp_path / "merged"))
        torch.testing.assert_close(found, trained.logits, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(_logits(trained.kind.from_pretrained(tmp_path / "base")), found, atol=0.01)


# As vidore/colpali has it: the projections of the language model, and the layer that is ColPali's own.
COLPALI = (
    r"(.*(language_model).*(down_proj|gate_proj|up_proj|k_proj|q_proj|v_proj|o_proj).*$|.*(embedding_proj_layer).*$)"
)


@pytest.mark.parametrize(
    ("make", "targets"), [(_colpali, COLPALI), (_mask2former, ["q_proj", "fc1", "o_proj"])], ids=["colpali", "swin"]
)
def test_models_within_models(make: Callable[[], Any], targets: Any, tmp_path: Path) -> None:
    trained = _trained(make, LoraConfig(r=3, lora_alpha=5, target_modules=targets), tmp_path)
    _merged(tmp_path)
    _check(trained, tmp_path)


def test_a_tower_of_one_of_two_is_refused_by_a_weight_that_the_adapter_has(tmp_path: Path) -> None:
    """Not by a bias, which it has none of."""
    clip = tf.CLIPModel(tf.CLIPConfig(text_config={**TEXT, "num_key_value_heads": None}, vision_config=VISION))
    _trained(lambda: clip.vision_model, LoraConfig(r=3, target_modules=["q_proj"]), tmp_path)
    clip.save_pretrained(tmp_path / "base")
    with pytest.raises(LoregError, match=r"q_proj\.weight' is not in the checkpoint, and no single prefix"):
        _merged(tmp_path)


def test_a_trained_bias_is_looked_for_beside_its_weight(tmp_path: Path) -> None:
    _trained(SEEING["vit"], LoraConfig(r=3, target_modules=["q_proj"], bias="lora_only"), tmp_path)
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    lost = "base_model.model.vit.layers.0.attention.q_proj.base_layer.bias"
    save_file({key: tensor for key, tensor in tensors.items() if key != lost}, path)
    assert lost in tensors
    with pytest.raises(LoregError, match=r"trained 'vit\.layers\.0\.attention\.q_proj\.bias' is not in the file"):
        _merged(tmp_path)


def test_vera_asks_a_renamed_base_for_its_shapes(tmp_path: Path) -> None:
    trained = _trained(SEEING["vit"], VeraConfig(r=3, target_modules=["q_proj", "v_proj"]), tmp_path)
    _merged(tmp_path)
    _check(trained, tmp_path)


def test_outputs_of_a_renamed_model_are_compared(tmp_path: Path) -> None:
    _trained(SEEING["neox"], LoraConfig(r=3, target_modules=["query_key_value", "lm_head"]), tmp_path)
    registry = loreg.open(tmp_path / "home")
    registry.push(tmp_path / "adapter", base=tmp_path / "base", name="adapter")
    assert registry.merge("adapter", tmp_path / "merged", verify="forward").verification.ok


def test_convolutions_of_a_renamed_model(tmp_path: Path) -> None:
    config = LoraConfig(r=3, target_modules=["sequence_reduction.sequence_reduction", "projection", "classifier"])
    trained = _trained(_segformer, config, tmp_path)
    _merged(tmp_path)
    _check(trained, tmp_path)


@pytest.mark.parametrize("stored", ["memory", "transformers 4.51"])
@pytest.mark.parametrize("named", ["memory", "disk"])
def test_other_layouts_of_a_base_and_of_an_adapter(stored: str, named: str, tmp_path: Path) -> None:
    """A base that is stored under the names of memory, or that transformers 4.51 saved; an adapter of today, or of
    when memory had the names of the disk."""
    trained = _trained(_llava, LoraConfig(r=3, target_modules=["q_proj", "lm_head", "linear_1"]), tmp_path)
    path = tmp_path / "base" / "model.safetensors"
    put = {"language_model.model.": "model.language_model.", "language_model.lm_head.": "lm_head."}
    put |= {"vision_tower.": "model.vision_tower.", "multi_modal_projector.": "model.multi_modal_projector."}
    if stored == "transformers 4.51":
        put = {"language_model.model.": "model.language_model.model."}
    tensors = load_file(path)
    renamed = {_put(name, put): tensor for name, tensor in tensors.items()}
    assert renamed.keys() != tensors.keys()
    save_file(renamed, path, {"format": "pt"})
    if named == "disk":
        path = tmp_path / "adapter" / "adapter_model.safetensors"
        back = {"model.language_model.": "language_model.model.", "lm_head.": "language_model.lm_head."}
        back |= {"model.vision_tower.": "vision_tower.vision_model.", "model.multi_modal": "multi_modal"}
        start = "base_model.model."
        old = {start + _put(key.removeprefix(start), back): tensor for key, tensor in load_file(path).items()}
        save_file(old, path)
    _merged(tmp_path)
    _check(trained, tmp_path)


def _put(name: str, prefixes: dict[str, str]) -> str:
    for taken, put in prefixes.items():
        if name.startswith(taken):
            return put + name.removeprefix(taken)
    return name


def test_a_head_that_is_untied_is_written_where_transformers_looks_for_it(tmp_path: Path) -> None:
    _trained(_gemma3, LoraConfig(r=3, target_modules=["lm_head"]), tmp_path)
    assert "language_model.lm_head.weight" not in load_file(tmp_path / "base" / "model.safetensors")
    _merged(tmp_path)
    assert "language_model.lm_head.weight" in load_file(tmp_path / "merged" / "model.safetensors")
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    assert config["text_config"].get("tie_word_embeddings") in (None, False)


def test_an_adapter_of_another_architecture_is_refused(tmp_path: Path) -> None:
    _trained(SEEING["vit"], LoraConfig(r=3, target_modules=["q_proj"]), tmp_path)
    torch.manual_seed(0)
    tf.BertModel(tf.BertConfig(**{**VISION, "image_size": None, "vocab_size": 64})).save_pretrained(tmp_path / "base")
    with pytest.raises(LoregError, match="the base has no such tensor"):
        _merged(tmp_path)
