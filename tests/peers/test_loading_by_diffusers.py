"""A component of diffusers, adapted by ``loreg.integrations.peft`` or in place: what its own loader makes of the same
files."""

from __future__ import annotations

from pathlib import Path

import diffusers
import pytest
import torch
from live_models import bytes_of
from peer_models import randomise
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

import loreg
from loreg import serving
from loreg.integrations.peft import load


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(3)
    model = diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16), layers_per_block=1, sample_size=8, in_channels=4, out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8, attention_head_dim=2, norm_num_groups=4,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("unet")
    model.save_pretrained(folder)
    return folder


def unet(base: Path) -> torch.nn.Module:
    return diffusers.UNet2DConditionModel.from_pretrained(base).eval()


@torch.inference_mode()
def seen(model: torch.nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(1, 4, 8, 8, generator=generator)
    text = torch.randn(1, 3, 8, generator=generator)
    return model(noise, torch.tensor([7]), text).sample.clone()


def saved(base: Path, folder: Path, seed: int, **lora: object) -> Path:
    model = get_peft_model(unet(base), LoraConfig(**lora))
    randomise(model, lambda name: "lora_" in name, 0.2, seed)
    model.save_pretrained(folder)
    return folder


def by_diffusers(base: Path, adapter: Path) -> torch.Tensor:
    model = unet(base)
    state = {
        key.replace("base_model.model.", "unet."): value
        for key, value in load_file(adapter / "adapter_model.safetensors").items()
    }
    alphas = {key.replace("lora_A.weight", "alpha"): 6.0 for key in state if "lora_A" in key}
    model.load_lora_adapter(state, network_alphas=alphas, prefix="unet")
    return seen(model)


@pytest.mark.parametrize("targets", [["to_q", "to_v"], ["to_k", "conv1"]], ids=["attention", "convolutions"])
def test_a_unet_computes_what_diffusers_makes_of_the_files(
    registry: loreg.Registry, base: Path, tmp_path: Path, targets: list[str]
) -> None:
    registry.add_base(base, "unet")
    adapters = [
        saved(base, tmp_path / f"a{seed}", seed, r=rank, lora_alpha=6, target_modules=targets)
        for seed, rank in ((1, 4), (2, 2))
    ]
    for adapter in adapters:
        registry.push(adapter, base="unet", name="style")
    model = unet(base)
    plain = seen(model)
    turn = [(1, "loaded"), (2, "replaced" if "conv1" in targets else "swapped")]
    for version, action in turn:
        assert load(model, f"style:v{version}", registry).action == action
        expected = by_diffusers(base, adapters[version - 1])
        assert not torch.allclose(expected, plain, atol=1e-4)
        torch.testing.assert_close(seen(model), expected, rtol=1e-4, atol=1e-5)
    model.disable_lora()  # diffusers' own call knows it
    torch.testing.assert_close(seen(model), plain, rtol=0, atol=0)
    model.enable_lora()
    torch.testing.assert_close(seen(model), expected, rtol=1e-4, atol=1e-5)
    model.delete_adapters("default")
    torch.testing.assert_close(seen(model), plain, rtol=0, atol=0)


@pytest.mark.parametrize("targets", [["to_q", "to_v"], ["to_k", "conv1"]], ids=["attention", "convolutions"])
def test_a_unet_that_is_attached(registry: loreg.Registry, base: Path, tmp_path: Path, targets: list[str]) -> None:
    registry.add_base(base, "unet")
    adapters = [
        saved(base, tmp_path / f"a{seed}", seed, r=4, lora_alpha=6, target_modules=targets) for seed in (1, 2)
    ]
    for adapter in adapters:
        registry.push(adapter, base="unet", name="style")
    model = unet(base)
    before, live = bytes_of(model), serving.attach(model, registry)
    for version, adapter in enumerate(adapters, 1):
        live.swap(f"style:v{version}")
        torch.testing.assert_close(seen(model), by_diffusers(base, adapter), rtol=1e-4, atol=1e-5)
    live.restore()
    assert bytes_of(model) == before
