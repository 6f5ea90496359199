"""LoRA by PEFT whose first factors are taken out of the base: PiSSA, OLoRA, CorDA, LoRA-GA."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft import LoraConfig
from peft.tuners.lora.config import CordaConfig, LoraGAConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.loraga import preprocess_loraga

from tests.peers.variants import Built, Case
from tests.peers.variants.models import IDS, causal, gpt2, llama, logits, randomise

_LINEAR = ["q_proj", "down_proj"]


def _prepare(model: Any, config: LoraConfig) -> None:
    """What CorDA and LoRA-GA want to know of the data before they begin."""
    if config.init_lora_weights == "corda":
        torch.manual_seed(3)
        samples = torch.randint(0, 64, (8, 1, 32))
        preprocess_corda(model, config, lambda: [model(sample) for sample in samples])
    if config.init_lora_weights == "lora_ga":
        preprocess_loraga(model, config, lambda: model(input_ids=IDS, labels=IDS).loss.backward())
        model.zero_grad()


def _trained(
    make: Callable[[], Any],
    given: bool = True,
    converted: bool = False,
    dtype: torch.dtype = torch.float32,
    **config: Any,
) -> Callable[[Path], Built]:
    """A case's ``build``: saved before training and after. ``given``: the first of these is given to the push.
    ``converted``: PEFT itself has taken it off."""

    def build(folder: Path) -> Built:
        make().to(dtype).save_pretrained(folder / "base")
        torch.manual_seed(9)
        base = transformers.AutoModelForCausalLM.from_pretrained(folder / "base", dtype="auto")
        chosen = LoraConfig(
            **{"r": 4, "lora_alpha": 6, "target_modules": _LINEAR, **config}, fan_in_fan_out=make is gpt2
        )
        _prepare(base, chosen)
        model = peft.get_peft_model(base, chosen)
        model.save_pretrained(folder / "initial")
        randomise(model)
        if converted:
            model.save_pretrained(
                folder / "adapter", path_initial_model_for_weight_conversion=str(folder / "initial")
            )
        else:
            model.save_pretrained(folder / "adapter")
        expected = logits(model if dtype is torch.float32 else model.double())

        def reload(exported: Path) -> torch.Tensor:
            return logits(peft.PeftModel.from_pretrained(causal(folder / "base", dtype), exported))

        return Built(
            folder / "base",
            folder / "adapter",
            expected,
            lambda out: logits(causal(out, dtype)),
            push={"initial": folder / "initial"} if given else {},
            reload=reload,
        )

    return build


def _corda() -> dict[str, Any]:
    return {"init_lora_weights": "corda", "corda_config": CordaConfig(corda_method="kpm")}


def _lora_ga() -> dict[str, Any]:
    return {"init_lora_weights": "lora_ga", "lora_ga_config": LoraGAConfig()}


_PISSA = {"init_lora_weights": "pissa"}
_PATTERNS = {"rank_pattern": {"q_proj": 6}, "alpha_pattern": {"q_proj": 3}}

CASES = [
    Case("PiSSA", "PEFT", _trained(llama, **_PISSA)),
    Case(
        "PiSSA, without the initial factors", "PEFT", _trained(llama, False, **_PISSA), refused="'pissa'.*--initial"
    ),
    Case("PiSSA, converted by PEFT", "PEFT", _trained(llama, False, True, **_PISSA)),
    Case("PiSSA, rsLoRA", "PEFT", _trained(llama, use_rslora=True, **_PISSA)),
    Case("PiSSA, rsLoRA, converted by PEFT", "PEFT", _trained(llama, False, True, use_rslora=True, **_PISSA)),
    Case("PiSSA, patterns", "PEFT", _trained(llama, **_PATTERNS, **_PISSA)),
    Case("PiSSA, patterns, converted by PEFT", "PEFT", _trained(llama, False, True, **_PATTERNS, **_PISSA)),
    Case("PiSSA, rsLoRA and patterns", "PEFT", _trained(llama, use_rslora=True, **_PATTERNS, **_PISSA)),
    Case("PiSSA, Conv1D (GPT-2)", "PEFT", _trained(gpt2, target_modules=["c_attn", "c_proj"], **_PISSA)),
    Case("PiSSA, Embedding beside", "PEFT", _trained(llama, target_modules=["q_proj", "embed_tokens"], **_PISSA)),
    Case("PiSSA, DoRA", "PEFT", _trained(llama, use_dora=True, **_PISSA)),
    Case(
        "PiSSA, bfloat16 base",
        "PEFT",
        _trained(llama, dtype=torch.bfloat16, **_PISSA),
        note="PEFT trained on W - s·B₀A₀ rounded; the merge rounds once",
        tolerance=5e-3,
    ),
    Case("PiSSA by fast SVD", "PEFT", _trained(llama, init_lora_weights="pissa_niter_4")),
    Case("OLoRA", "PEFT", _trained(llama, init_lora_weights="olora")),
    Case("OLoRA, converted by PEFT", "PEFT", _trained(llama, False, True, init_lora_weights="olora")),
    Case(
        "OLoRA, without the initial factors", "PEFT", _trained(llama, False, init_lora_weights="olora"), "--initial"
    ),
    Case("CorDA", "PEFT", _trained(llama, **_corda())),
    Case("CorDA, converted by PEFT", "PEFT", _trained(llama, False, True, **_corda())),
    Case("CorDA, without the initial factors", "PEFT", _trained(llama, False, **_corda()), "--initial"),
    Case("LoRA-GA", "PEFT", _trained(llama, **_lora_ga())),
    Case("LoRA-GA, converted by PEFT", "PEFT", _trained(llama, False, True, **_lora_ga())),
    Case("LoRA-GA, without the initial factors", "PEFT", _trained(llama, False, **_lora_ga()), "--initial"),
    Case(
        "LoRA with initial factors",
        "PEFT",
        _trained(llama, init_lora_weights="gaussian"),
        "leaves the base as it is",
        note="they were never taken out of the base",
    ),
]
