"""Tiny models to make cases with, and the one way in which a PEFT adapter is made and run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

from tests.peers.variants import Built

IDS = torch.arange(1, 25).reshape(2, 12) % 61


def llama(tied: bool = False) -> Any:
    """A decoder of two layers with grouped keys, float32, seeded."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=tied,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def gpt2() -> Any:
    """A GPT-2 of two layers, float32, seeded: its linear layers are Conv1D, and its head is tied."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=64, n_positions=64, n_embd=32, n_layer=2, n_head=4)
    return transformers.GPT2LMHeadModel(config).eval()


def randomise(model: torch.nn.Module, seed: int = 1, size: float = 0.1) -> None:
    """Every trainable parameter moved at random, so that no factor is zero and nothing is the identity."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += size * torch.randn(parameter.shape, generator=generator)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits.double()


def causal(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """A saved causal model; one of another dtype in float64, so that nothing but its weights is rounded."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    return model if dtype is torch.float32 else model.double()


def run_causal(folder: Path) -> torch.Tensor:
    """The logits of a saved causal model."""
    return logits(causal(folder))


def peft_adapter(
    make: Callable[[], Any],
    config: Any,
    before: Callable[[Any], None] | None = None,
    after: Callable[[Any], None] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Callable[[Path], Built]:
    """A case's ``build``: the model with an adapter of ``config``, every trained parameter at random.

    ``before``: something done to the base before it is saved. ``after``: to the saved one, before the adapter is
    made, and before an exported one is loaded. ``dtype``: of the base's weights; where it is not float32, all outputs
    are those of the same weights in float64.
    """

    def build(folder: Path) -> Built:
        base = make()
        if before is not None:
            before(base)
        base.to(dtype).save_pretrained(folder / "base")
        if after is not None or dtype is not torch.float32:  # `to` has rounded the tables of the positions as well
            base = transformers.AutoModelForCausalLM.from_pretrained(folder / "base", dtype="auto")
        if after is not None:
            after(base)
        model = peft.get_peft_model(base, config)
        randomise(model)
        model.save_pretrained(folder / "adapter")
        expected = logits(model if dtype is torch.float32 else model.double())

        def reload(exported: Path) -> torch.Tensor:
            clean = causal(folder / "base", dtype)
            if after is not None:
                after(clean)
            return logits(peft.PeftModel.from_pretrained(clean, exported))

        return Built(
            folder / "base", folder / "adapter", expected, lambda out: logits(causal(out, dtype)), reload=reload
        )

    return build
