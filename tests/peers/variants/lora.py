"""LoRA by PEFT."""

from __future__ import annotations

from peft import LoraConfig

from tests.peers.variants import Case
from tests.peers.variants.models import gpt2, llama, peft_adapter

_LINEAR = ["q_proj", "v_proj", "down_proj"]

CASES = [
    Case("Linear", "PEFT", peft_adapter(llama, LoraConfig(r=4, lora_alpha=8, target_modules=_LINEAR))),
    Case(
        "Conv1D (GPT-2)",
        "PEFT",
        peft_adapter(gpt2, LoraConfig(r=4, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)),
    ),
    Case(
        "rsLoRA", "PEFT", peft_adapter(llama, LoraConfig(r=4, lora_alpha=8, use_rslora=True, target_modules=_LINEAR))
    ),
]
