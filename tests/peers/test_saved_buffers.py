"""A batch norm in ``modules_to_save``, whose statistics and counter training changed, against PEFT's own merge."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

import loreg


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin, self.norm, self.out = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.norm(self.lin(x)))


def test_a_batch_norm_is_that_of_peft(registry: loreg.Registry, tmp_path: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        net = _Net()
        (tmp_path / "base").mkdir()
        save_file(net.state_dict(), tmp_path / "base" / "model.safetensors")
        (tmp_path / "base" / "config.json").write_text(json.dumps({}))
        config = LoraConfig(r=2, target_modules=["lin"], modules_to_save=["norm"], init_lora_weights=False)
        tuned = get_peft_model(net, config)
        for _ in range(3):
            tuned(torch.randn(8, 4))
        with torch.no_grad():
            for parameter in tuned.base_model.model.norm.parameters():
                parameter += torch.randn_like(parameter)
    tuned.save_pretrained(tmp_path / "adapter")
    registry.push(tmp_path / "adapter", base=tmp_path / "base", name="norms")
    found = load_file(registry.merge("norms", tmp_path / "out").out / "model.safetensors")
    expected = tuned.merge_and_unload().state_dict()
    assert found.keys() == expected.keys() and expected["norm.num_batches_tracked"] == 3
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value) or (name == "lin.weight" and torch.allclose(found[name], value))
