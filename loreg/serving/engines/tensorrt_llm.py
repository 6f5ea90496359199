"""TensorRT-LLM, main of 2026: ``manager.py``, ``loaders.py`` and ``config.py`` in ``tensorrt_llm/_torch/peft/lora``
(before: ``tensorrt_llm/lora_manager.py``), ``examples/dora/README.md``, and the check of ranks in its LoRA operator.

It takes each module's rank from its tensors, ``lora_alpha`` and ``use_rslora`` from the config, and no pattern. Names
are those of numbered layers; a tensor under another name is refused, unless it is of the embedding or the head, which
it skips.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from loreg.serving.engines import limits, rules
from loreg.serving.engines.described import Described
from loreg.serving.engines.rules import MERGE, EngineRules, Finding, mended, some

_DEFAULT_RANK = 64
_NUMBERED = re.compile(r".+\.\d+(?:\.\w+){2,4}")
_SKIPPED = ("lm_head", "embed_tokens")
_CALLED: Mapping[str, str] = {
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "qkv_proj": "attn_qkv",
    "o_proj": "attn_dense",
    "gate_proj": "mlp_h_to_4h",
    "down_proj": "mlp_4h_to_h",
    "up_proj": "mlp_gate",
    "gate_up_proj": "mlp_gate_up",
    "w1": "moe_h_to_4h",
    "w2": "moe_4h_to_h",
    "w3": "moe_gate",
    "gate": "moe_router",
    "shared_expert.gate_proj": "shared_expert_h_to_4h",
    "shared_expert.down_proj": "shared_expert_4h_to_h",
    "shared_expert.up_proj": "shared_expert_gate",
    "in_proj": "mamba_in_proj",
    "out_proj": "mamba_out_proj",
    "fc1_latent_proj": "moe_latent_fc1",
    "fc2_latent_proj": "moe_latent_fc2",
}


def _findings(described: Described, given: Mapping[str, Any]) -> Iterator[Finding]:
    remedy = f"start TensorRT-LLM with max_lora_rank {described.rank}"
    yield from rules.over(described, given, _DEFAULT_RANK, described.rank, remedy)
    if dora := [layer.path for layer in described.layers if layer.magnitude]:
        reason = f"{some(dora)}: TensorRT-LLM expects magnitudes that are divided by the norms of the merged weights."
        yield Finding("misreads", "use_dora", reason, f"{MERGE}, or run its examples/dora/normalize_weights.py first")
    yield from rules.scales(described, root=True, own_rank=True, layers=described.layers)
    yield from _names(described)
    yield from _modules(described, given.get("lora_target_modules"))
    for stack, lack in rules.incomplete_experts(described).items():
        yield Finding("refuses", "experts", f"{stack!r} {lack}, and TensorRT-LLM stacks all experts.", MERGE)
    yield from rules.strangers(described, "refuses")


def _names(described: Described) -> Iterator[Finding]:
    """Tensors that are no factors of a numbered layer: refused, or skipped if of the embedding or the head."""
    odd = [layer.path for layer in described.layers if not layer.bias and not _is_read(layer.path, layer.kind)]
    parts = {
        "lora_bias": [layer.path for layer in described.layers if layer.bias],
        "bias": described.biases,
        "modules_to_save": described.saved,
        "base_layer": described.beneath,
        "trainable_token_indices": described.rows,
        "use_bdlora": [layer.path for layer in described.layers if layer.divided],
        "target_modules": odd,
    }
    for subject, paths in parts.items():
        skipped = [path for path in paths if any(name in path for name in _SKIPPED)]
        refused = sorted(set(paths) - set(skipped))
        yield from rules.no_place(described, "refuses", {subject: refused}, "TensorRT-LLM knows no such tensor")
        yield from rules.no_place(
            described, "ignores", {subject: skipped}, "TensorRT-LLM skips tensors of the embedding and the head"
        )
    if carried := [name for name in described.carried if not any(skipped in name for skipped in _SKIPPED)]:
        reason = f"{some(carried)}: the file carries these weights of the base, which TensorRT-LLM does not know."
        yield mended(described, Finding("refuses", "save_embedding_layers", reason, "save it again without them"))


def _is_read(path: str, kind: str) -> bool:
    return kind in ("linear", "conv1d") and _NUMBERED.fullmatch(path) is not None


def _modules(described: Described, wanted: frozenset[str] | None) -> Iterator[Finding]:
    found = [layer.path for layer in described.layers if _is_read(layer.path, layer.kind)]
    unknown = [path for path in found if _called(path) is None]
    stacks = [stack.path for stack in described.stacks]
    why = "TensorRT-LLM has no LoRA for it, and serves the base there"
    yield from rules.no_place(described, "ignores", {"target_modules": unknown, "target_parameters": stacks}, why)
    if wanted is not None and (dropped := [p for p in found if _called(p) is not None and _called(p) not in wanted]):
        missing = {str(_called(path)) for path in dropped}
        reason = f"{some(dropped)}: {some(missing)} is not among lora_target_modules, so the base is served there."
        yield Finding("ignores", "target_modules", reason, "start TensorRT-LLM with these modules too")


def _called(path: str) -> str | None:
    """TensorRT-LLM's name of the module at ``path``."""
    last = path.split(".")[-2:]
    return _CALLED.get(".".join(last)) or _CALLED.get(last[-1])


RULES = EngineRules(
    "TensorRT-LLM",
    "main, 2026",
    _findings,
    limits={"max_lora_rank": limits.count, "lora_target_modules": limits.names},
)
