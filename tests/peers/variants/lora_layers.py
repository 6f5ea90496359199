"""LoRA by PEFT on layers that are no matrices: convolutions and torch's attention."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import nn

from tests.peers.variants import Built, Case
from tests.peers.variants.models import randomise


class _Convolutions(nn.Module):
    """One layer of each dimension, with kernels, strides and paddings of several kinds."""

    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        self.one = nn.Conv1d(4, 6, 3, padding=1, groups=groups)
        self.two = nn.Conv2d(4, 8, (3, 2), stride=2, groups=groups)
        self.point = nn.Conv2d(8, 6, 1, bias=False)
        self.three = nn.Conv3d(4, 4, 2, groups=groups)

    def forward(self) -> torch.Tensor:
        x = torch.linspace(-1, 1, 4 * 6**3).reshape(1, 4, 6, 6, 6).sin().to(self.one.weight.dtype)
        found = self.one(x[..., 0, 0]), self.point(self.two(x[..., 0])), self.three(x)
        return torch.cat([value.flatten() for value in found])


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(16, 2, batch_first=True)
        nn.init.normal_(self.attn.in_proj_bias)
        self.head = nn.Linear(16, 8)

    def forward(self) -> torch.Tensor:
        x = torch.linspace(-1, 1, 2 * 5 * 16).reshape(2, 5, 16).sin().to(self.head.weight.dtype)
        return self.head(self.attn(x, x.flip(1), x.cos())[0]).flatten()


def _adapted(
    make: Callable[[], nn.Module], dtype: torch.dtype = torch.float32, **config: Any
) -> Callable[[Path], Built]:
    """A case's ``build`` for a module of torch's, whose checkpoint is its state and no config. Runs in float64."""

    def module(state: Mapping[str, torch.Tensor]) -> Any:
        model = make()
        model.load_state_dict(state)
        return model.eval()

    @torch.no_grad()
    def run(model: nn.Module) -> torch.Tensor:
        return model.double().eval()()

    def build(folder: Path) -> Built:
        torch.manual_seed(0)
        (folder / "base").mkdir()
        weights = {name: value.to(dtype) for name, value in make().state_dict().items()}
        save_file(weights, folder / "base" / "model.safetensors")
        (folder / "base" / "config.json").write_text("{}")
        model = peft.get_peft_model(module(weights).to(dtype), LoraConfig(r=4, lora_alpha=6, **config))
        randomise(model)
        model.save_pretrained(folder / "adapter")
        expected = run(model)

        def merged(out: Path) -> torch.Tensor:
            return run(module(load_file(out / "model.safetensors")))

        def reload(exported: Path) -> torch.Tensor:
            return run(peft.PeftModel.from_pretrained(module(weights), exported))

        return Built(folder / "base", folder / "adapter", expected, merged, reload=reload)

    return build


_LAYERS = ["one", "two", "point", "three"]


def _grouped() -> nn.Module:
    return _Convolutions(groups=2)


CASES = [
    Case(
        "Conv1d, Conv2d, Conv3d",
        "PEFT",
        _adapted(_Convolutions, target_modules=_LAYERS),
        note="PEFT's A has no dilation and no padding mode: beside a layer that has, no weight is what it computes, "
        "and neither the adapter nor the base tells",
    ),
    Case("Conv2d, rsLoRA", "PEFT", _adapted(_Convolutions, target_modules=["two"], use_rslora=True)),
    Case(
        "Conv1d, Conv2d, Conv3d, bfloat16 base",
        "PEFT",
        _adapted(_Convolutions, torch.bfloat16, target_modules=_LAYERS),
        tolerance=5e-3,
    ),
    Case(
        "Conv1d, Conv2d: `lora_bias`", "PEFT", _adapted(_Convolutions, target_modules=["one", "two"], lora_bias=True)
    ),
    Case("DoRA: Conv1d, Conv2d, Conv3d", "PEFT", _adapted(_Convolutions, target_modules=_LAYERS, use_dora=True)),
    Case("Conv1d, grouped", "PEFT", _adapted(_grouped, target_modules=["one"]), refused="all 12 inputs.* 2 groups"),
    Case("Conv2d, grouped", "PEFT", _adapted(_grouped, target_modules=["two"]), refused="all 24 inputs.* 2 groups"),
    Case(
        "MultiheadAttention",
        "PEFT",
        _adapted(_Attention, target_modules=["attn", "head"], bias="lora_only"),
        note="PEFT's forward adds the delta of out_proj twice (PEFT #3774), as it was trained: so does the merge",
    ),
    Case("MultiheadAttention, rsLoRA", "PEFT", _adapted(_Attention, target_modules=["attn"], use_rslora=True)),
    Case(
        "MultiheadAttention: `lora_bias`",
        "PEFT",
        _adapted(_Attention, target_modules=["attn"], lora_bias=True),
        refused="lora_bias.*ignores",
    ),
]
