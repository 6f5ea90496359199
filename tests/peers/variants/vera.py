"""VeRA by PEFT."""

from __future__ import annotations

import torch
from peft import VeraConfig

from tests.peers.variants import Case
from tests.peers.variants.models import gpt2, llama, peft_adapter

_LINEAR = ["q_proj", "k_proj", "down_proj"]

CASES = [
    Case("VeRA", "PEFT", peft_adapter(llama, VeraConfig(r=6, target_modules=_LINEAR))),
    Case(
        "VeRA: Conv1D (GPT-2), trained biases",
        "PEFT",
        peft_adapter(gpt2, VeraConfig(r=6, target_modules=["c_attn", "c_proj"], bias="vera_only")),
    ),
    Case(
        "VeRA: bfloat16",
        "PEFT",
        peft_adapter(llama, VeraConfig(r=6, target_modules=_LINEAR), before=lambda model: model.to(torch.bfloat16)),
        tolerance=0.02,
        note="compared with a forward pass in bfloat16, which rounds every activation",
    ),
    Case(
        "VeRA: save_projection false",
        "PEFT",
        peft_adapter(llama, VeraConfig(r=6, target_modules=_LINEAR, save_projection=False)),
        refused="save_projection is false.*not in the file.*save it again",
    ),
]
