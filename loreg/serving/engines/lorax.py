"""LoRAX, main branch: ``server/lorax_server/adapters/lora.py``, ``models/model.py``, ``models/flash_llama.py``,
``utils/adapter.py``, ``utils/weights.py``, ``utils/sgmv.py`` and ``utils/sources/local.py``.

It reads ``r``, ``lora_alpha`` and ``use_rslora``; looks up the factors of the layers that it has LoRA for, and takes
no notice of other tensors. Layers of one name are stacked, all or none of them, and the ranks padded for its kernels;
tensor parallelism splits along the rank. The rank of the config is overwritten with the padded one before the scale
of the next kind of layer is computed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from loreg.serving.engines import limits, rules
from loreg.serving.engines.described import Described
from loreg.serving.engines.rules import MERGE, EngineRules, Finding, mended

_LAYER = re.compile(r"(?P<stem>.+?)\.(?P<number>\d{1,9})\.(?P<kind>[^\d].*)")
_SMALLEST, _BLOCK = 8, 16


def _findings(described: Described, given: Mapping[str, Any]) -> Iterator[Finding]:
    kinds = _kinds(described)
    mixed = {kind: ranks for kind, layers in kinds.items() if len(ranks := set(layers.values())) > 1}
    if mixed:
        kind, ranks = min(mixed.items())
        reason = (
            f"Layers {kind!r} have ranks {', '.join(map(str, sorted(ranks)))}, which LoRAX stacks into one tensor."
        )
        yield mended(described, Finding("refuses", "rank_pattern", reason, MERGE))
    yield from rules.scales(described, root=True, own_rank=False, layers=described.layers)
    yield from _padding(described, given.get("num_shard", 1), len(kinds))
    last = max((number for layers in kinds.values() for number in layers), default=0)
    for kind, layers in kinds.items():
        lacking = next(number for number in range(len(layers) + 1) if number not in layers)
        if lacking <= last:
            reason = f"Layer {lacking} has no factors for {kind!r}, and LoRAX then applies those of no layer."
            yield Finding("ignores", "layers_to_transform", reason, MERGE)
            break
    yield from _unread(described)
    if described.pickled:
        reason = "Its weights are adapter_model.bin, and LoRAX reads safetensors from a directory."
        yield mended(described, Finding("refuses", "adapter_model.bin", reason, "save it again as safetensors"))


def _kinds(described: Described) -> dict[str, dict[int, int]]:
    """Kind of layer, as ``self_attn.q_proj`` → number → rank."""
    found: dict[str, dict[int, int]] = {}
    for layer in described.layers:
        if layer.plain and layer.kind in ("linear", "conv1d") and (match := _LAYER.fullmatch(layer.path)):
            found.setdefault(match["kind"], {})[int(match["number"])] = layer.rank
    return found


def _padding(described: Described, shards: int, kinds: int) -> Iterator[Finding]:
    """Ranks that are padded, or split over GPUs with a rest."""
    smallest = _SMALLEST * shards
    r = described.words.r
    padded = smallest if r <= smallest else -(-r // _BLOCK) * _BLOCK
    if padded != r and kinds > 1:
        reason = (
            f"Rank {r} is padded to {padded}, by which LoRAX then divides α for all kinds of layers but the first."
        )
        remedy = f"{MERGE}, or start LoRAX with DISABLE_SGMV=1"
        yield Finding("misreads", "rank", reason, remedy)
    if padded % shards:
        reason = f"Rank {padded} is split over {shards} GPUs, and LoRAX drops the rest of {padded % shards}."
        yield Finding("misreads", "rank", reason, "serve it on a number of GPUs that divides the rank")


def _unread(described: Described) -> Iterator[Finding]:
    dora = {"use_dora": [layer.path for layer in described.layers if layer.magnitude]}
    yield from rules.no_place(described, "misreads", dora, "LoRAX applies the factors without the magnitude")
    divided = {"use_bdlora": [layer.path for layer in described.layers if layer.divided]}
    yield from rules.no_place(described, "misreads", divided, "LoRAX knows no blocks")
    parts = {
        "lora_bias": [layer.path for layer in described.layers if layer.bias],
        "bias": described.biases,
        "modules_to_save": described.saved,
        "base_layer": described.beneath,
        "trainable_token_indices": described.rows,
        "target_parameters": [stack.path for stack in described.stacks],
        "embedding": described.of_kind("embedding"),
        "conv": described.of_kind("conv"),
        "attention": described.of_kind("attention", "vector"),
    }
    yield from rules.no_place(described, "ignores", parts, "LoRAX does not read it, and serves the base there")


RULES = EngineRules("LoRAX", "main", _findings, limits={"num_shard": limits.count})
