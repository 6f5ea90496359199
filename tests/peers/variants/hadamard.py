"""LoHa and LoKr by PEFT: products of low-rank matrices, element by element and by Kronecker."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from peft import LoHaConfig, LoKrConfig
from safetensors.torch import load_file, save_file
from torch import nn

from tests.peers.variants import Built, Case
from tests.peers.variants.models import llama, peft_adapter, randomise


def convolutions() -> nn.Module:
    """Layers of every kind that PEFT adapts and a model of words has not, one after the other, with biases."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 6, 3, padding=1),
        nn.Conv2d(6, 6, 1),
        nn.Conv2d(6, 8, 3, groups=2),
        nn.Flatten(2),
        nn.Conv1d(8, 6, 3),
        nn.Linear(14, 5),
    ).eval()


def run_network(make: Callable[[], nn.Module], x: torch.Tensor) -> Callable[[Path], torch.Tensor]:
    """The outputs of a network whose weights are in a directory."""

    @torch.no_grad()
    def run(folder: Path) -> torch.Tensor:
        model = make()
        model.load_state_dict(load_file(folder / "model.safetensors"))
        return model(x).double()

    return run


def network_adapter(
    config: Any, make: Callable[[], nn.Module] = convolutions, shape: tuple[int, ...] = (2, 4, 6, 6)
) -> Callable[[Path], Built]:
    """A case's ``build``, for a network that is no model of transformers; ``shape``: of its input."""

    @torch.no_grad()
    def build(folder: Path) -> Built:
        base = make()
        (folder / "base").mkdir()
        save_file(base.state_dict(), folder / "base" / "model.safetensors", {"format": "pt"})
        (folder / "base" / "config.json").write_text("{}")
        model = peft.get_peft_model(base, config)
        randomise(model)
        x = torch.randn(shape, generator=torch.Generator().manual_seed(2))
        expected = model.eval()(x).double()
        model.save_pretrained(folder / "adapter")

        def reload(exported: Path) -> torch.Tensor:
            clean = make()
            clean.load_state_dict(load_file(folder / "base" / "model.safetensors"))
            return peft.PeftModel.from_pretrained(clean, exported).eval()(x).double()

        return Built(
            folder / "base", folder / "adapter", expected, run_network(make, x), reload=torch.no_grad()(reload)
        )

    return build


_LINEAR = ["q_proj", "k_proj", "down_proj"]
_CONVOLUTIONS = ["0", "1", "2", "4", "5"]
_RANKS = {"rank_pattern": {"q_proj": 2, "down.*": 3}, "alpha_pattern": {"k_proj": 3, ".*layers.1.mlp.down_proj": 5}}


def _of_0_13(build: Callable[[Path], Built]) -> Callable[[Path], Built]:
    """An adapter whose α/r is 1, with the config of a release that computed so whatever α was."""

    def old(folder: Path) -> Built:
        built = build(folder)
        path = built.adapter / "adapter_config.json"
        config = json.loads(path.read_text())
        for field in ("rank_dropout_scale", "exclude_modules", "peft_version"):
            del config[field]
        path.write_text(json.dumps(config | {"alpha": 40}))
        return Built(built.base, built.adapter, built.expected, built.run)

    return old


CASES = [
    Case(
        "LoHa: linear, rank and α patterns",
        "PEFT",
        peft_adapter(llama, LoHaConfig(r=4, alpha=6, target_modules=_LINEAR, **_RANKS)),
    ),
    Case(
        "LoHa: convolutions, grouped ones too",
        "PEFT",
        network_adapter(LoHaConfig(r=3, alpha=6, target_modules=_CONVOLUTIONS)),
    ),
    Case(
        "LoHa: convolutions with use_effective_conv2d",
        "PEFT",
        network_adapter(LoHaConfig(r=3, alpha=6, target_modules=_CONVOLUTIONS, use_effective_conv2d=True)),
    ),
    Case(
        "LoKr: both factors whole",
        "PEFT",
        peft_adapter(llama, LoKrConfig(r=8, alpha=6, target_modules=_LINEAR, rank_pattern={"k_proj": 10})),
    ),
    Case(
        "LoKr: decompose_both, decompose_factor, patterns",
        "PEFT",
        peft_adapter(
            llama,
            LoKrConfig(r=1, alpha=2, target_modules=_LINEAR, decompose_both=True, decompose_factor=4, **_RANKS),
        ),
    ),
    Case(
        "LoKr of PEFT 0.13",
        "PEFT",
        _of_0_13(peft_adapter(llama, LoKrConfig(r=8, alpha=8, target_modules=_LINEAR))),
        note="it had no scale (PEFT #2180); later releases load it with α/r",
    ),
    Case(
        "LoKr: convolutions, with whole factors",
        "PEFT",
        network_adapter(LoKrConfig(r=8, alpha=6, target_modules=_CONVOLUTIONS)),
        note="a Conv1d's axes meet in another way than a Conv2d's: PEFT gives the smaller factor no third axis",
    ),
    Case(
        "LoKr: convolutions, with factors of rank 1",
        "PEFT",
        network_adapter(LoKrConfig(r=1, alpha=2, target_modules=_CONVOLUTIONS, decompose_both=True)),
    ),
    Case(
        "LoKr: convolutions with use_effective_conv2d",
        "PEFT",
        network_adapter(
            LoKrConfig(r=2, alpha=3, target_modules=_CONVOLUTIONS, use_effective_conv2d=True, decompose_factor=1)
        ),
    ),
]
