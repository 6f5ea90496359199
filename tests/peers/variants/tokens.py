"""Trainable tokens alone, by PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft import TrainableTokensConfig

from tests.peers.variants import Built, Case
from tests.peers.variants.models import llama, logits, peft_adapter, randomise, run_causal

_WORDS = 70


def _tied() -> Any:
    return llama(tied=True)


def _with_new_words(folder: Path) -> Built:
    """Two words more than the base has, and one of its own, as for a chat template."""
    _tied().save_pretrained(folder / "base")
    # PEFT looks there whether the number of words has changed
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "base", dtype="auto")
    model.resize_token_embeddings(_WORDS, mean_resizing=False)
    adapted = peft.get_peft_model(model, TrainableTokensConfig(token_indices=[7, _WORDS - 2, _WORDS - 1]))
    randomise(adapted)
    expected = logits(adapted)
    adapted.save_pretrained(folder / "adapter")

    def reload(exported: Path) -> torch.Tensor:
        clean = transformers.AutoModelForCausalLM.from_pretrained(folder / "base", dtype="auto")
        clean.resize_token_embeddings(_WORDS, mean_resizing=False)
        return logits(peft.PeftModel.from_pretrained(clean, exported))

    return Built(folder / "base", folder / "adapter", expected, run_causal, reload=reload)


CASES = [
    Case("Trainable tokens", "PEFT", peft_adapter(llama, TrainableTokensConfig(token_indices=[7, 3, 20]))),
    Case("Trainable tokens: tied head", "PEFT", peft_adapter(_tied, TrainableTokensConfig(token_indices=[7, 3, 20]))),
    Case("Trainable tokens: tied, new words", "PEFT", _with_new_words),
    Case(
        "Trainable tokens: head and embedding, apart",
        "PEFT",
        peft_adapter(llama, TrainableTokensConfig(token_indices=[7, 3], target_modules=["embed_tokens", "lm_head"])),
    ),
    Case(
        "Trainable tokens: tied head alone",
        "PEFT",
        peft_adapter(_tied, TrainableTokensConfig(token_indices=[7, 3], target_modules=["lm_head"])),
        note="PEFT replaces the rows of the head alone, which the merge unties",
    ),
]
