"""llama.cpp, main branch of 2026: ``convert_lora_to_gguf.py``, ``src/llama-adapter.cpp`` and ``.h``, and how
``convert_hf_to_gguf.py`` converts GPT-2.

A PEFT directory is converted to GGUF first. The conversion reads ``lora_alpha`` alone, and stops at a tensor that is
no factor; the scale is α divided by the rank of each module, and 1 if α is 0. The server has no limits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from loreg.serving.engines import rules
from loreg.serving.engines.described import Described
from loreg.serving.engines.rules import MERGE, EngineRules, Finding, mended, some

_NORM = ("_layernorm", ".norm")


def _findings(described: Described, given: Mapping[str, Any]) -> Iterator[Finding]:
    if described.words.alpha == 0 and described.layers:
        reason = "lora_alpha is 0 in the config, which llama.cpp takes for a scale of 1."
        yield mended(described, Finding("misreads", "lora_alpha", reason, MERGE))
    else:
        yield from rules.scales(described, root=False, own_rank=True, layers=described.layers)
    yield from _turned(described)
    norms = [path for path in described.saved if any(part in f".{path}" for part in _NORM)]
    refused = {
        "use_dora": [layer.path for layer in described.layers if layer.magnitude],
        "lora_bias": [layer.path for layer in described.layers if layer.bias],
        "bias": described.biases,
        "modules_to_save": sorted(set(described.saved) - set(norms)),
        "trainable_token_indices": described.rows,
        "target_parameters": [stack.path for stack in described.stacks],
        "conv": described.of_kind("conv"),
        "attention": described.of_kind("attention", "vector"),
        "use_bdlora": [layer.path for layer in described.layers if layer.divided],
    }
    yield from rules.no_place(described, "refuses", refused, "the conversion to GGUF stops at such a tensor")
    ignored = {"modules_to_save": norms, "base_layer": described.beneath}
    yield from rules.no_place(described, "ignores", ignored, "llama.cpp keeps the base's weight")
    tied = [layer for layer in described.layers if layer.tied]
    if heads := [layer.path for layer in tied if layer.kind != "embedding"]:
        reason = (
            f"{some(heads)}: the head is the embedding's weight, and the conversion or the server refuses a LoRA on "
            "such a head."
        )
        yield Finding("refuses", "lm_head", reason, MERGE)
    if embeddings := [layer.path for layer in tied if layer.kind == "embedding"]:
        reason = (
            f"{some(embeddings)}: the embedding is the head's weight too, for which the server takes its factors as "
            "well, and ends, as they do not fit there."
        )
        yield Finding("refuses", "embedding", reason, MERGE)
    for stack, lack in rules.incomplete_experts(described).items():
        yield Finding("refuses", "experts", f"{stack!r} {lack}, and llama.cpp stacks all experts.", MERGE)
    if described.carried:
        reason = (
            f"{some(described.carried)}: the file carries these weights of the base, at which the conversion stops."
        )
        yield mended(described, Finding("refuses", "save_embedding_layers", reason, "save it again without them"))
    yield from rules.strangers(described, "refuses")


def _turned(described: Described) -> Iterator[Finding]:
    """GPT-2's layers store (in, out), and the conversion turns the product as it turns the weight; but PEFT's factors
    are for (out, in) there too. Only a square one still fits then, and is wrong."""
    layers = [layer for layer in described.layers if layer.kind == "conv1d"]
    if odd := [layer.path for layer in layers if not layer.square]:
        reason = f"{some(odd)}: the conversion transposes the factors of a Conv1D, which then fit no more."
        yield Finding("refuses", "conv1d", reason, MERGE)
    elif layers:
        reason = f"{some(layer.path for layer in layers)}: the conversion transposes the factors of a Conv1D."
        yield Finding("misreads", "conv1d", reason, MERGE)


RULES = EngineRules("llama.cpp", "main, 2026", _findings)
