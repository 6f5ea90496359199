"""(IA)³ by PEFT."""

from __future__ import annotations

import torch
from peft import IA3Config
from torch import nn

from tests.peers.variants import Case
from tests.peers.variants.hadamard import network_adapter
from tests.peers.variants.models import gpt2, llama, peft_adapter


def _grouped() -> nn.Module:
    """A grouped convolution whose kernel has as many numbers as there are groups, so that sizes do not tell them."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, (2, 2), groups=4), nn.Conv2d(8, 4, 1)).eval()


def _volumes() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv3d(2, 4, 2), nn.Conv3d(4, 4, 2, groups=2)).eval()


_NOTE = "PEFT scales what a layer puts out, bias included; of feed-forward layers, what goes in"

CASES = [
    Case(
        "(IA)³",
        "PEFT",
        peft_adapter(
            llama, IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])
        ),
    ),
    Case(
        "(IA)³: Conv1D (GPT-2), with biases",
        "PEFT",
        peft_adapter(gpt2, IA3Config(target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"])),
        note=_NOTE,
    ),
    Case(
        "(IA)³: Conv2d, grouped ones too, feed-forward by an expression",
        "PEFT",
        network_adapter(IA3Config(target_modules=["0", "1", "2"], feedforward_modules="[01]"), _grouped),
        note=_NOTE,
    ),
    Case(
        "(IA)³: Conv3d, saved modules",
        "PEFT",
        network_adapter(
            IA3Config(target_modules=["0"], feedforward_modules=[], modules_to_save=["1"]), _volumes, (2, 2, 4, 4, 4)
        ),
        note=_NOTE,
    ),
]
