"""Types of PEFT that are refused, as the library writes them; ``tests/peers/test_peft_types.py`` has all of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch

from tests.peers.variants import Built, Case
from tests.peers.variants.models import llama, randomise, run_causal


def _saved(config: Any, make: Callable[[], Any] = llama) -> Callable[[Path], Built]:
    """An adapter that is only written: what it computes has no bearing."""

    def build(folder: Path) -> Built:
        base = make()
        base.save_pretrained(folder / "base")
        model = peft.get_peft_model(base, config)
        randomise(model)
        model.save_pretrained(folder / "adapter")
        return Built(folder / "base", folder / "adapter", torch.zeros(1), run_causal)

    return build


def _mixture(folder: Path) -> Built:
    """X-LoRA over two LoRAs, which it saves beside its router."""
    base = llama()
    base.save_pretrained(folder / "base")
    adapters = {}
    for name in ("first", "second"):
        peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(folder / name)
        adapters[name] = str(folder / name)
    config = peft.XLoraConfig(task_type="CAUSAL_LM", hidden_size=32, xlora_depth=1, adapters=adapters)
    base.config.use_cache = False
    peft.get_peft_model(base, config).save_pretrained(folder / "adapter")
    return Built(folder / "base", folder / "adapter", torch.zeros(1), run_causal)


_QUERIES = ["q_proj"]
_TOKENS = "trained vectors before the words"

CASES = [
    Case(
        "Prompt tuning",
        "PEFT",
        _saved(peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)),
        refused=_TOKENS,
    ),
    Case(
        "P-tuning",
        "PEFT",
        _saved(peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=8)),
        refused=_TOKENS,
    ),
    Case(
        "Prefix tuning",
        "PEFT",
        _saved(peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)),
        refused="trained keys and values before those of the input",
    ),
    Case("X-LoRA", "PEFT", _mixture, refused="mixes several LoRAs at run time.*push its LoRAs one by one"),
    Case("HRA", "PEFT", _saved(peft.HRAConfig(r=4, target_modules=_QUERIES)), refused="loreg has no form"),
    Case(
        "FourierFT",
        "PEFT",
        _saved(peft.FourierFTConfig(n_frequency=5, target_modules=_QUERIES)),
        refused="not in the file but drawn again",
    ),
]
