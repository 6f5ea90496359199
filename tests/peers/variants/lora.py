"""LoRA by PEFT: scales, biases, DoRA, and what is LoRA once it is trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora.config import BdLoraConfig, MontecloraConfig, VeloraConfig
from safetensors.torch import load_file, save_file

from tests.peers.variants import Built, Case
from tests.peers.variants.models import gpt2, llama, peft_adapter

_LINEAR = ["q_proj", "v_proj", "down_proj"]
_CONV1D = ["c_attn", "c_proj"]


def _lora(make: Callable[[], Any] = llama, dtype: torch.dtype = torch.float32, **config: Any) -> Any:
    usual = {"r": 4, "lora_alpha": 6, "target_modules": _LINEAR if make is llama else _CONV1D}
    return peft_adapter(make, LoraConfig(**{**usual, **config}, fan_in_fan_out=make is gpt2), dtype=dtype)


def _with_keys(build: Callable[[Path], Built], old: str, new: str) -> Callable[[Path], Built]:
    """The same with the ends of keys as some writers have them."""

    def built(folder: Path) -> Built:
        made = build(folder)
        path = made.adapter / "adapter_model.safetensors"
        save_file({key.replace(old, new): value for key, value in load_file(path).items()}, path)
        return made

    return built


_PATTERNS: dict[str, Any] = {
    "rank_pattern": {"q_proj": 6, "layers.1.self_attn.v_proj": 3},
    "alpha_pattern": {"layers.0.self_attn.q_proj": 3, "q_proj": 12, "v_proj": 5},
}
_DORA: dict[str, Any] = {"use_dora": True}

CASES = [
    Case("Linear", "PEFT", _lora()),
    Case("Linear, bfloat16 base", "PEFT", _lora(dtype=torch.bfloat16), tolerance=5e-3),
    Case("Conv1D (GPT-2)", "PEFT", _lora(gpt2)),
    Case("rsLoRA", "PEFT", _lora(use_rslora=True)),
    Case(
        "Rank and alpha patterns", "PEFT", _lora(**_PATTERNS), note="the first key that matches, in the file's order"
    ),
    Case("Rank and alpha patterns, rsLoRA", "PEFT", _lora(**_PATTERNS, use_rslora=True)),
    Case("`lora_bias`", "PEFT", _lora(gpt2, lora_bias=True)),
    Case("`lora_bias`, `bias='all'`", "PEFT", _lora(gpt2, lora_bias=True, bias="all")),
    Case("`bias='lora_only'`", "PEFT", _lora(gpt2, bias="lora_only")),
    Case("DoRA: Linear", "PEFT", _lora(**_DORA)),
    Case("DoRA: Linear, bfloat16 base", "PEFT", _lora(dtype=torch.bfloat16, **_DORA), tolerance=5e-3),
    Case("DoRA: Conv1D (GPT-2)", "PEFT", _lora(gpt2, **_DORA)),
    Case("DoRA: Conv1D (GPT-2), `bias='all'`", "PEFT", _lora(gpt2, bias="all", **_DORA)),
    Case("DoRA: rsLoRA, patterns", "PEFT", _lora(**_PATTERNS, use_rslora=True, **_DORA)),
    Case("DoRA: Embedding", "PEFT", _lora(target_modules=["embed_tokens", "q_proj"], **_DORA)),
    Case(
        "DoRA: keys that end in `.weight`",
        "PEFT",
        _with_keys(_lora(**_DORA), "lora_magnitude_vector", "lora_magnitude_vector.weight"),
    ),
    Case(
        "BD-LoRA",
        "PEFT",
        _lora(
            target_modules=["q_proj", "o_proj", "up_proj"],
            use_bdlora=BdLoraConfig(["o_proj"], ["q_proj"], nblocks=2, match_strict=False),
        ),
    ),
    Case("VeLoRA", "PEFT", _lora(velora_config=VeloraConfig(num_groups=4)), note="differs from LoRA in training"),
    Case("MonteCLoRA", "PEFT", _lora(monteclora_config=MontecloraConfig()), note="differs from LoRA in training"),
    Case("MiCA", "PEFT", _lora(init_lora_weights="mica"), note="the base is left as it is"),
    Case("Orthogonal", "PEFT", _lora(init_lora_weights="orthogonal")),
    Case("Gaussian", "PEFT", _lora(init_lora_weights="gaussian")),
    Case("EVA", "PEFT", _lora(init_lora_weights="eva"), note="the base is left as it is"),
]
