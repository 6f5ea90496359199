"""LoRA by PEFT on and beside embeddings and heads: tied, resized, trained whole, or row by row.

What PEFT computes is in each case that of its forward pass: a layer that it adapts is no more the one that the model
ties to it, unless ``ensure_weight_tying`` says so. (Its ``merge_and_unload`` changes both, PEFT #2018, #2777.)
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from tests.peers.variants import Built, Case
from tests.peers.variants.models import gpt2, llama, peft_adapter


def _tied() -> Any:
    return llama(tied=True)


def _lora(
    make: Callable[[], Any] = _tied,
    *targets: str,
    rows: int | None = None,
    moved: bool = False,
    dtype: torch.dtype = torch.float32,
    **config: Any,
) -> Any:
    """A case's ``build``: LoRA on a layer of the model's inside, on ``targets``, and what ``config`` says.

    ``rows``: what the vocabulary is resized to before training. ``moved``: the embedding has other values then.
    """
    inside = "c_attn" if make in (gpt2, _hub_gpt2) else "q_proj"

    def changed(model: Any) -> None:
        torch.manual_seed(5)
        if rows is not None:
            model.resize_token_embeddings(rows, mean_resizing=False)
        if moved:
            torch.nn.init.normal_(model.get_input_embeddings().weight, std=0.02)

    chosen = LoraConfig(r=3, lora_alpha=5, target_modules=[inside, *targets], **config)
    build = peft_adapter(make, chosen, after=changed if rows or moved else None, dtype=dtype)
    return _without_prefix(build) if make is _hub_gpt2 else build


def _hub_gpt2() -> Any:
    return gpt2()


def _without_prefix(build: Callable[[Path], Built]) -> Callable[[Path], Built]:
    """The base's names as in GPT-2's file on the Hub."""

    def built(folder: Path) -> Built:
        made = build(folder)
        path = made.base / "model.safetensors"
        tensors = {name.removeprefix("transformer."): value for name, value in load_file(path).items()}
        save_file(tensors, path, metadata={"format": "pt"})
        return made

    return built


_BOTH = {"trainable_token_indices": {"lm_head": [3, 5], "embed_tokens": [2, 7]}}
_PLACES = {"trainable_token_indices": {"wte": [3, 5], "wpe": [2, 7]}}

CASES = [
    Case("lm_head, tied", "PEFT", _lora(_tied, "lm_head"), note="untied by the merge, in files and config"),
    Case("lm_head, tied (GPT-2)", "PEFT", _lora(gpt2, "lm_head")),
    Case("lm_head, tied (GPT-2, names of the Hub)", "PEFT", _lora(_hub_gpt2, "lm_head")),
    Case("lm_head, tied, bfloat16 base", "PEFT", _lora(_tied, "lm_head", dtype=torch.bfloat16), tolerance=5e-3),
    Case("lm_head, DoRA, tied", "PEFT", _lora(_tied, "lm_head", use_dora=True)),
    Case("lm_head", "PEFT", _lora(llama, "lm_head")),
    Case("Embedding", "PEFT", _lora(llama, "embed_tokens")),
    Case("Embedding, rsLoRA", "PEFT", _lora(llama, "embed_tokens", use_rslora=True)),
    Case("Embedding, tied", "PEFT", _lora(_tied, "embed_tokens"), note="untied by the merge, in files and config"),
    Case("Embedding, tied (GPT-2)", "PEFT", _lora(gpt2, "wte")),
    Case("Embedding, DoRA, tied", "PEFT", _lora(_tied, "embed_tokens", use_dora=True)),
    Case("Embedding and lm_head, tied", "PEFT", _lora(_tied, "embed_tokens", "lm_head")),
    Case(
        "Embedding and lm_head, `ensure_weight_tying`",
        "PEFT",
        _lora(_tied, "embed_tokens", "lm_head", ensure_weight_tying=True),
        note="stays tied; PEFT saves the factors twice",
    ),
    Case(
        "Embedding and lm_head, `ensure_weight_tying`, not tied",
        "PEFT",
        _lora(llama, "embed_tokens", "lm_head", ensure_weight_tying=True),
    ),
    Case(
        "Embedding and lm_head, `ensure_weight_tying`, DoRA",
        "PEFT",
        _lora(_tied, "embed_tokens", ensure_weight_tying=True, use_dora=True),
        note="untied by the merge: the magnitudes of the two are of other directions",
    ),
    Case("`modules_to_save`: embedding, tied", "PEFT", _lora(modules_to_save=["embed_tokens"])),
    Case("`modules_to_save`: lm_head, tied", "PEFT", _lora(modules_to_save=["lm_head"])),
    Case("`modules_to_save`: both, tied", "PEFT", _lora(modules_to_save=["embed_tokens", "lm_head"])),
    Case(
        "`modules_to_save`: both, `ensure_weight_tying`",
        "PEFT",
        _lora(modules_to_save=["embed_tokens", "lm_head"], ensure_weight_tying=True),
        note="stays tied",
    ),
    Case(
        "`modules_to_save`: both, bfloat16 base",
        "PEFT",
        _lora(modules_to_save=["embed_tokens", "lm_head"], dtype=torch.bfloat16),
        tolerance=5e-3,
    ),
    Case("`trainable_token_indices`", "PEFT", _lora(llama, trainable_token_indices=[7, 3, 20])),
    Case("`trainable_token_indices`, tied", "PEFT", _lora(trainable_token_indices=[7, 3, 20]), note="stays tied"),
    Case("`trainable_token_indices`, tied (GPT-2)", "PEFT", _lora(gpt2, trainable_token_indices=[7, 3])),
    Case(
        "`trainable_token_indices`, tied, bfloat16 base",
        "PEFT",
        _lora(trainable_token_indices=[7, 3, 20], dtype=torch.bfloat16),
        tolerance=5e-3,
    ),
    Case("`trainable_token_indices`: a dict", "PEFT", _lora(llama, trainable_token_indices={"embed_tokens": [4]})),
    Case("`trainable_token_indices`: lm_head, tied", "PEFT", _lora(trainable_token_indices={"lm_head": [3, 5]})),
    Case("`trainable_token_indices`: other rows of both, tied", "PEFT", _lora(**_BOTH)),
    Case("`trainable_token_indices`: words and positions, tied", "PEFT", _lora(gpt2, **_PLACES), note="stays tied"),
    Case("`trainable_token_indices`: other rows of both", "PEFT", _lora(llama, **_BOTH)),
    Case(
        "`trainable_token_indices` and lm_head, tied",
        "PEFT",
        _lora(_tied, "lm_head", trainable_token_indices=[7, 3]),
        note="the rows are of both, the LoRA of the head alone: untied by the merge",
    ),
    Case("More words", "PEFT", _lora(llama, rows=70), note="vocab_size follows"),
    Case("More words, tied", "PEFT", _lora(rows=70), note="stays tied"),
    Case("Fewer words, tied (GPT-2)", "PEFT", _lora(gpt2, rows=62)),
    Case("More words, Embedding, tied", "PEFT", _lora(_tied, "embed_tokens", rows=70)),
    Case("More words, Embedding by its path, tied", "PEFT", _lora(_tied, "model.embed_tokens", rows=70)),
    Case("More words, Embedding, tied (GPT-2)", "PEFT", _lora(gpt2, "wte", rows=70)),
    Case("More words, Embedding, DoRA, tied", "PEFT", _lora(_tied, "embed_tokens", rows=70, use_dora=True)),
    Case("Fewer words, lm_head, tied", "PEFT", _lora(_tied, "lm_head", rows=62)),
    Case("More words, Embedding and lm_head, tied", "PEFT", _lora(_tied, "embed_tokens", "lm_head", rows=70)),
    Case("Fewer words, Embedding and lm_head", "PEFT", _lora(llama, "embed_tokens", "lm_head", rows=62)),
    Case(
        "More words, Embedding and lm_head, `ensure_weight_tying`",
        "PEFT",
        _lora(_tied, "embed_tokens", rows=70, ensure_weight_tying=True),
        note="stays tied",
    ),
    Case(
        "More words, Embedding",
        "PEFT",
        _lora(llama, "embed_tokens", rows=70),
        refused="lm_head.*64.*lost",
        note="PEFT does not save the new rows of the head",
    ),
    Case(
        "Another embedding than the base's, DoRA on it, tied",
        "PEFT",
        _lora(_tied, "embed_tokens", moved=True, use_dora=True),
        note="PEFT saves the embedding that it trained on",
    ),
    Case("More words, `trainable_token_indices`, tied", "PEFT", _lora(rows=70, trainable_token_indices=[3, 69])),
    Case("More words, `trainable_token_indices`", "PEFT", _lora(llama, rows=70, trainable_token_indices=[3, 69])),
    Case(
        "More words, `modules_to_save`, tied",
        "PEFT",
        _lora(rows=70, modules_to_save=["embed_tokens"]),
        note="PEFT saves the trained one twice, and the one it replaces; the file is kept whole",
    ),
    Case(
        "More words, `modules_to_save`: both",
        "PEFT",
        _lora(llama, rows=70, modules_to_save=["embed_tokens", "lm_head"]),
    ),
    Case(
        "More words, `modules_to_save`: both, tied, bfloat16 base",
        "PEFT",
        _lora(rows=70, modules_to_save=["embed_tokens", "lm_head"], dtype=torch.bfloat16),
        tolerance=5e-3,
    ),
]
