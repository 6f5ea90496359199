"""AdaLoRA by PEFT."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft import AdaLoraConfig

from tests.peers.variants import Built, Case
from tests.peers.variants.hadamard import network_adapter
from tests.peers.variants.models import gpt2, llama, logits, peft_adapter, randomise, run_causal

_LINEAR = ["q_proj", "down_proj"]


def _config(targets: list[str], **options: Any) -> AdaLoraConfig:
    return AdaLoraConfig(target_modules=targets, init_r=4, total_step=10, **options)


def _reduced(make: Callable[[], Any], config: AdaLoraConfig) -> Callable[[Path], Built]:
    """With a ``rank_pattern``, as training leaves it: another mask for each module, and nothing of the first."""

    def build(folder: Path) -> Built:
        base = make()
        base.save_pretrained(folder / "base")
        model = peft.get_peft_model(base, config)
        randomise(model)
        layers = {name: layer.lora_E["default"] for name, layer in base.named_modules() if hasattr(layer, "lora_E")}
        masks = {name: [bool(index * 5 >> i & 1) for i in range(4)] for index, name in enumerate(layers)}
        with torch.no_grad():
            for name, E in layers.items():
                E *= torch.tensor(masks[name])[:, None]
        model.peft_config["default"].rank_pattern = {f"{name}.lora_E.default": mask for name, mask in masks.items()}
        expected = logits(model)
        model.save_pretrained(folder / "adapter")

        def reload(exported: Path) -> torch.Tensor:
            clean = transformers.AutoModelForCausalLM.from_pretrained(folder / "base", dtype="auto")
            return logits(peft.PeftModel.from_pretrained(clean, exported))

        return Built(folder / "base", folder / "adapter", expected, run_causal, reload=reload)

    return build


CASES = [
    Case("AdaLoRA", "PEFT", peft_adapter(llama, _config(_LINEAR, lora_alpha=6))),
    Case(
        "AdaLoRA: reduced ranks, none left of a module",
        "PEFT",
        _reduced(llama, _config(_LINEAR, lora_alpha=6)),
        note="the file is kept whole: a module of rank 0 has tensors without elements",
    ),
    Case("AdaLoRA: α not positive", "PEFT", peft_adapter(llama, _config(_LINEAR, lora_alpha=0))),
    Case(
        "AdaLoRA: Conv1D (GPT-2), trained biases",
        "PEFT",
        peft_adapter(gpt2, _config(["c_attn", "c_proj"], bias="lora_only")),
    ),
    Case("AdaLoRA: Conv2d", "PEFT", network_adapter(_config(["0", "1", "5"]))),
]
