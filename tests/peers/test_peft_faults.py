"""What PEFT's own sums get wrong, beside the float64 truth that loreg's are compared with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

import loreg

X = torch.arange(24, dtype=torch.float64).reshape(4, 6) / 7 - 1


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(6, 5, dtype=torch.float64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin(x)


def _trained(folder: Path, seed: int, **options: Any) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        adapted = get_peft_model(_base(), LoraConfig(target_modules=["lin"], init_lora_weights=False, **options))
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_" in name:
                    parameter += torch.randn_like(parameter)
    adapted.save_pretrained(folder)


def _base() -> _Net:
    net = _Net()
    with torch.no_grad():
        net.lin.weight.copy_(torch.linspace(-1, 1, 30).reshape(5, 6))
        net.lin.bias.copy_(torch.linspace(0, 1, 5))
    return net


def _save(folder: Path) -> Path:
    folder.mkdir()
    save_file({name: tensor.float() for name, tensor in _base().state_dict().items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({}))
    return folder


def _outputs(adapter: Path) -> torch.Tensor:
    model = PeftModel.from_pretrained(_base(), adapter)
    return model(X).detach()  # type: ignore[no-any-return]


def _of_loreg(registry: loreg.Registry, adapters: dict[str, Path], expression: str, folder: Path) -> torch.Tensor:
    for name, path in adapters.items():
        registry.push(path, base=folder / "base", name=name)
    registry.compose(expression, name="sum")
    merged = load_file(registry.merge("sum", folder / "merged").out / "model.safetensors")
    return X @ merged["lin.weight"].double().T + merged["lin.bias"].double()


def _of_peft(adapters: dict[str, Path], weights: list[float], kind: str) -> torch.Tensor:
    first, *others = adapters
    model = PeftModel.from_pretrained(_base(), adapters[first], adapter_name=first)
    for name in others:
        model.load_adapter(adapters[name], adapter_name=name)
    model.add_weighted_adapter(list(adapters), weights, "sum", combination_type=kind)
    model.set_adapter("sum")
    return model(X).detach()  # type: ignore[no-any-return]


@torch.no_grad()
def _off(found: torch.Tensor, truth: torch.Tensor) -> float:
    return float((found - truth).norm() / (truth - _base()(X)).norm())


@pytest.mark.parametrize("option", ["use_rslora", "lora_bias", "use_dora"])
def test_one_adapter_at_weight_1(option: str, registry: loreg.Registry, tmp_path: Path) -> None:
    """PEFT #3761: what ``add_weighted_adapter`` makes of one adapter at weight 1 is silently another adapter."""
    _save(tmp_path / "base")
    _trained(tmp_path / "a", 1, r=2, lora_alpha=3, **{option: True})
    truth, adapters = _outputs(tmp_path / "a"), {"a": tmp_path / "a"}
    assert _off(_of_peft(adapters, [1.0], "linear"), truth) > 0.1
    assert _off(_of_loreg(registry, adapters, "a", tmp_path), truth) < 1e-6


@pytest.mark.parametrize("weights", [[1.0, 1.0], [0.7, -0.3]])
def test_linear_is_the_sum(weights: list[float], registry: loreg.Registry, tmp_path: Path) -> None:
    """PEFT's ``linear`` multiplies the sum of the Bs by that of the As: every B by every other adapter's A."""
    _save(tmp_path / "base")
    for seed, name in enumerate("ab"):
        _trained(tmp_path / name, seed, r=2, lora_alpha=3)
    adapters = {name: tmp_path / name for name in "ab"}
    base = _base()(X).detach()
    truth = base + sum(w * (_outputs(path) - base) for w, path in zip(weights, adapters.values(), strict=True))
    assert _off(_of_peft(adapters, weights, "linear"), truth) > 0.1
    expression = f"{weights[0]}*a {'-' if weights[1] < 0 else '+'} {abs(weights[1])}*b"
    assert _off(_of_loreg(registry, adapters, expression, tmp_path), truth) < 1e-6
