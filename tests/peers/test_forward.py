"""The ``forward`` verification of models that read pictures or sounds, and of those that it cannot run."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import loreg
from loreg.checkpoint import Checkpoint
from loreg.errors import Unsupported
from loreg.format.recipe import MergeRecord
from loreg.merge.forward import check_plan
from loreg.merge.plan import MergePlan
from loreg.merge.samples import Runnable
from loreg.merge.verify import Check

SEEN = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip
HEARD = {
    "vocab_size": 99, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_source_positions": 20,
    "max_target_positions": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3,
}  # fmt: skip
SERIES = {"d_model": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 32, "context_length": 32}

MODELS: dict[str, Callable[[], Any]] = {
    "vit": lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**SEEN)),
    "vit mae": lambda: transformers.ViTMAEForPreTraining(
        transformers.ViTMAEConfig(
            **SEEN, decoder_hidden_size=32, decoder_num_hidden_layers=1, decoder_num_attention_heads=4
        )
    ),
    "resnet": lambda: transformers.ResNetModel(
        transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    ),
    "whisper": lambda: transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**HEARD)),
    "vilt": lambda: transformers.ViltModel(transformers.ViltConfig(**SEEN, vocab_size=99)),
}
LAYERS = {"resnet": "convolution", "vilt": "query"}


def _pushed(family: str, folder: Path) -> loreg.Registry:
    torch.manual_seed(7)
    model = MODELS[family]()
    model.save_pretrained(folder / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = get_peft_model(model, LoraConfig(r=2, target_modules=[LAYERS.get(family, "q_proj")]))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    adapted.save_pretrained(folder / "adapter")
    registry = loreg.open(folder / "home")
    registry.push(folder / "adapter", base=folder / "base", name="adapter")
    return registry


@pytest.mark.parametrize("family", ["vit", "resnet", "whisper"])
def test_a_model_is_run_on_what_it_reads(family: str, tmp_path: Path, seeded: None) -> None:
    registry = _pushed(family, tmp_path)
    verification = registry.merge("adapter", tmp_path / "merged", verify="forward").verification
    assert verification.ok and verification.checks[-1].name == "forward"
    runnable = Runnable.of(tmp_path / "base")
    base, merged = (runnable.load(tmp_path / name, None) for name in ("base", "merged"))
    plain, found = runnable.outputs(base), runnable.outputs(merged)
    theirs = PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload()
    for a, b, c in zip(runnable.outputs(theirs), found, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(b, c, rtol=1e-4, atol=1e-4)  # what is compared shows the adapter


def _changed(registry: loreg.Registry, folder: Path, change: Callable[[Path], None]) -> Check:
    """What ``forward`` says of a merged model that was changed, with a record that says so too."""
    merged = registry.merge("adapter", folder / "merged", verify="none").out
    change(merged)
    record = MergeRecord.parse((merged / "loreg.json").read_bytes())
    manifest = Checkpoint.open(merged).manifest()
    record = replace(record, tensors=manifest.tensors, weights_root=manifest.identity.weights_root)
    (merged / "loreg.json").write_bytes(record.dump())
    return registry.verify(merged, kind="forward").checks[-1]


def test_another_model_computes_something_else(tmp_path: Path, seeded: None) -> None:
    def change(merged: Path) -> None:
        tensors = load_file(merged / "model.safetensors")
        name = min(name for name in tensors if name.endswith(("query.weight", "q_proj.weight")))
        tensors[name] = tensors[name].roll(1, 0).contiguous()
        save_file(tensors, merged / "model.safetensors", {"format": "pt"})

    check = _changed(_pushed("vit", tmp_path), tmp_path, change)
    assert (check.name, check.ok) == ("forward", False) and "noise floor of torch.float32" in check.detail


def test_a_merged_model_that_does_not_run(tmp_path: Path, seeded: None) -> None:
    def change(merged: Path) -> None:
        config = json.loads((merged / "config.json").read_bytes())
        (merged / "config.json").write_text(json.dumps(config | {"hidden_act": "none such"}))

    check = _changed(_pushed("vit", tmp_path), tmp_path, change)
    assert (check.name, check.ok) == ("forward", False)
    assert check.detail.startswith("the unmerged model runs, and the merged does not: ")


def test_a_model_that_wants_more_leaves_nothing(tmp_path: Path, seeded: None) -> None:
    registry = _pushed("vilt", tmp_path)
    with pytest.raises(Unsupported, match=r"ViltModel cannot be run on input_ids of .*verify with probe or exact\."):
        registry.merge("adapter", tmp_path / "merged", verify="forward")
    assert not (tmp_path / "merged").exists()


def test_what_a_model_draws_at_random_is_the_same_in_every_run(tmp_path: Path) -> None:
    MODELS["vit mae"]().save_pretrained(tmp_path)
    runnable = Runnable.of(tmp_path)
    model = runnable.load(tmp_path, None)
    first = runnable.outputs(model)
    torch.rand(1)  # and whatever else is drawn between two runs
    state = torch.random.get_rng_state()
    for a, b in zip(first, runnable.outputs(model), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(torch.random.get_rng_state(), state)


# Before anything is merged


def _saved(folder: Path, architecture: str, config: Any, **changed: Any) -> Path:
    """A directory with a config alone."""
    config.architectures = [architecture]
    config.save_pretrained(folder)
    document = json.loads((folder / "config.json").read_bytes()) | changed
    (folder / "config.json").write_text(json.dumps(document))
    return folder


@pytest.mark.parametrize(
    ("architecture", "config", "shapes"),
    [
        ("ResNetModel", lambda: transformers.ResNetConfig(), {"pixel_values": (1, 3, 224, 224)}),
        ("Swinv2Model", lambda: transformers.Swinv2Config(image_size=(32, 64)), {"pixel_values": (1, 3, 32, 64)}),
        ("VivitModel", lambda: transformers.VivitConfig(num_frames=4), {"pixel_values": (1, 4, 3, 224, 224)}),
        ("ASTModel", lambda: transformers.ASTConfig(max_length=64), {"input_values": (1, 64, 128)}),
        ("HubertModel", lambda: transformers.HubertConfig(), {"input_values": (1, 16000)}),
        ("EncodecModel", lambda: transformers.EncodecConfig(audio_channels=2), {"input_values": (1, 2, 16000)}),
        ("Wav2Vec2BertModel", lambda: transformers.Wav2Vec2BertConfig(), {"input_features": (1, 128, 160)}),
        (
            "WhisperModel", lambda: transformers.WhisperConfig(max_source_positions=10),
            {"input_features": (1, 80, 20), "decoder_input_ids": (1, 8)},
        ),
        (
            "CLIPModel", lambda: transformers.CLIPConfig(),
            {"input_ids": (1, 32), "pixel_values": (1, 3, 224, 224)},
        ),
        ("T5Model", lambda: transformers.T5Config(), {"input_ids": (1, 32), "decoder_input_ids": (1, 32)}),
        ("VJEPA2Model", lambda: transformers.VJEPA2Config(crop_size=16), {"pixel_values_videos": (1, 64, 3, 16, 16)}),
        ("DetrModel", lambda: transformers.DetrConfig(), {"pixel_values": (1, 3, 224, 224)}),
        ("LlavaForConditionalGeneration", lambda: transformers.LlavaConfig(), {"input_ids": (1, 32)}),
    ],
)  # fmt: skip
def test_samples_are_of_the_sizes_of_the_config(
    architecture: str, config: Callable[[], Any], shapes: dict[str, tuple[int, ...]], tmp_path: Path
) -> None:
    samples = Runnable.of(_saved(tmp_path, architecture, config())).samples
    assert [{name: tuple(value.shape) for name, value in sample.items()} for sample in samples] == [shapes] * 4
    for again, sample in zip(Runnable.of(tmp_path).samples, samples, strict=True):
        for name, value in sample.items():
            assert torch.equal(again[name], value)
            assert torch.equal(value.to(torch.bfloat16).double(), value.double()) or not value.is_floating_point()


@pytest.mark.parametrize(
    ("architecture", "config", "changed", "message"),
    [
        ("PatchTSTModel", lambda: transformers.PatchTSTConfig(**SERIES), {}, "PatchTSTModel is run on 'past_values'"),
        ("NoSuchModel", lambda: transformers.ViTConfig(), {}, "names no architecture"),
        ("ViTImageProcessor", lambda: transformers.ViTConfig(), {}, "names no architecture"),
        ("ViTModel", lambda: transformers.ViTConfig(), {"image_size": 10**6}, "has pixel_values .1, 3, 1000000"),
        ("ViTModel", lambda: transformers.ViTConfig(), {"image_size": 0}, "has image_size 0, so that no sample"),
        ("ViTModel", lambda: transformers.ViTConfig(), {"model_type": "vit5"}, "cannot read the config .ValueError"),
        ("LlamaModel", lambda: transformers.LlamaConfig(), {"vocab_size": -4}, "LlamaModel has vocab_size -4"),
    ],
)
def test_what_cannot_be_run_is_known_from_the_config(
    architecture: str, config: Callable[[], Any], changed: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(Unsupported, match=message) as caught:
        Runnable.of(_saved(tmp_path, architecture, config(), **changed))
    assert str(caught.value).endswith("verify with probe or exact.")


def test_a_plan_is_refused_for_what_its_merge_would_be(tmp_path: Path) -> None:
    info = SimpleNamespace(dtype="F32", nbytes=4)
    root = _saved(tmp_path, "ViTModel", transformers.ViTConfig())
    plan = {
        "unties": False,
        "resized": {},
        "outputs": [SimpleNamespace(info=info)],
        "base": SimpleNamespace(root=root),
    }

    def check(**changed: Any) -> None:
        check_plan(cast(MergePlan, SimpleNamespace(**plan | changed)))

    check()
    with pytest.raises(Unsupported, match="unties the embedding"):
        check(unties=True)
    with pytest.raises(Unsupported, match="changes the number of rows"):
        check(resized={4: 5})
    with pytest.raises(Unsupported, match="no tensors of bfloat16"):
        check(outputs=[])
