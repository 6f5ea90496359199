"""SGLang 0.5.23: ``sglang/srt/lora/lora_config.py``, ``lora.py``, ``lora_manager.py``, ``mem_pool.py``, ``utils.py``.

Of the config it reads ``r``, ``lora_alpha``, ``target_modules``, ``use_dora`` and ``peft_type``. Its buffers have one
rank and one scale for all modules of an adapter. Tensors go by names: of numbered ``layers``, ``embed_tokens`` and
``lm_head``; what is elsewhere is skipped, with a warning at most. In a numbered layer every tensor has to have a
buffer that it fits: else SGLang says that it has loaded the adapter, and its scheduler, and so the server, ends with
an error when a request is the first to use it. That counts as refused here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from loreg.serving.engines import limits, rules
from loreg.serving.engines.described import Described, Layer
from loreg.serving.engines.rules import MERGE, EngineRules, Finding, mended, some

_LAYER = re.compile(r"layers\.\d+\.")
_ENDS = "SGLang loads the adapter, and ends when a request first uses it"
_EVERYTHING = ("all", "all-linear")
_CALLED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj", "qkv_proj"),
    "gate_up_proj": ("gate_proj", "up_proj", "gate_up_proj"),
    "down_proj": ("down_proj",),
    "embed_tokens": ("embed_tokens", "vocab_emb", "embeddings", "word_embeddings"),
    "lm_head": ("lm_head", "output", "unembed_tokens"),
    "fused_qkv_a_proj_with_mqa": ("q_a_proj", "kv_a_proj_with_mqa", "fused_qkv_a_proj_with_mqa"),
    "indexer.wq_b": ("wq_b",),
    "indexer.wk": ("wk",),
    "indexer.weights_proj": ("weights_proj",),
}
"""The names that a config may have for each buffer. w1, w2 and w3 of experts are renamed among the tensors, and not
in a config (``get_normalized_target_modules``), so that no buffer is found for them."""
_OWN = {name: target for target, names in _CALLED.items() for name in names}
_KNOWN = {*_CALLED, "qkvr", "o_proj", "wo_ud", "out_proj", "in_proj", "in_proj_qkvz", "up_proj"}
_KNOWN |= {"fc1_latent_proj", "fc2_latent_proj", "q_b_proj", "kv_b_proj"}


def _findings(described: Described, given: Mapping[str, Any]) -> Iterator[Finding]:
    words = described.words
    remedy = f"start SGLang with --max-lora-rank {described.rank}"
    yield from rules.over(described, given, None, words.r, remedy)
    if dora := [layer.path for layer in described.layers if layer.magnitude]:
        yield Finding("refuses", "use_dora", f"{some(dora)}: SGLang refuses DoRA.", f"{MERGE}, or {rules.RESIZE}")
    if odd := [layer for layer in described.layers if layer.rank != words.r]:
        what = f"{odd[0].path!r} has rank {odd[0].rank}, and SGLang's buffers are for the config's r, {words.r}"
        reason = f"{what}: {_ENDS}."
        yield mended(described, Finding("refuses", "rank_pattern", reason, MERGE))
    fitting = tuple(layer for layer in described.layers if layer.rank == words.r)
    yield from rules.scales(described, root=False, own_rank=False, layers=fitting)
    yield from _parts(described)
    yield from _targets(described, given.get("lora_target_modules"))
    yield from _apart(described.layers)
    yield from rules.strangers(described, "misreads")


def _parts(described: Described) -> Iterator[Finding]:
    """What is no factor of a layer that has a place."""
    biased = [layer.path for layer in described.layers if layer.bias]
    takes = "SGLang takes it for lora_B or drops it, as the order of the file has it"
    yield from rules.no_place(described, "misreads", {"lora_bias": biased, "bias": described.biases}, takes)
    divided = [layer.path for layer in described.layers if layer.divided]
    yield from rules.no_place(described, "refuses", {"use_bdlora": divided}, "SGLang has no blocks in its buffers")
    strange: dict[str, Sequence[str]] = {
        "modules_to_save": described.saved,
        "base_layer": described.beneath,
        "trainable_token_indices": described.rows,
        "target_parameters": [stack.path for stack in described.stacks],
        "embedding": [path for path in described.of_kind("embedding") if "embed_tokens" not in path],
        "conv": described.of_kind("conv"),
        "attention": described.of_kind("attention", "vector"),
        "layers": [layer.path for layer in described.layers if layer.kind in ("linear", "conv1d") and _lost(layer)],
    }
    numbered = {subject: [path for path in paths if _LAYER.search(path)] for subject, paths in strange.items()}
    yield from rules.no_place(described, "refuses", numbered, f"there is no buffer for it, so {_ENDS}")
    elsewhere = {subject: [path for path in paths if not _LAYER.search(path)] for subject, paths in strange.items()}
    yield from rules.no_place(
        described, "ignores", elsewhere, "SGLang has no place for it, and serves the base there"
    )


def _lost(layer: Layer) -> bool:
    return not _LAYER.search(layer.path) and not any(name in layer.path for name in ("lm_head", "embed_tokens"))


def _targets(described: Described, wanted: frozenset[str] | None) -> Iterator[Finding]:
    said = described.words.targets
    mine = {layer.leaf for layer in described.layers if layer.kind in ("linear", "conv1d", "embedding")}
    used = named = _normal(mine)
    refuses = "SGLang refuses the adapter"
    if not isinstance(said, str):
        named = _normal({name.rpartition(".")[2] for name in said})
    elif said in _EVERYTHING:
        refuses = _ENDS  # no names are compared
    else:
        reason = f"target_modules is the expression {said[:60]!r}, and SGLang expects names."
        yield mended(described, Finding("refuses", "target_modules", reason, MERGE))
    if unknown := used - _KNOWN:
        reason = f"SGLang has no LoRA for modules called {some(unknown)}: {refuses}."
        yield Finding("refuses", "target_modules", reason, MERGE)
    if wanted is None or not wanted.isdisjoint(_EVERYTHING):
        return
    if missing := used - unknown - _normal(wanted):
        reason = f"{some(missing)}: not among lora_target_modules, so {refuses}."
        yield Finding("refuses", "target_modules", reason, "start SGLang with these modules too")
    elif idle := named - used - _normal(wanted):
        reason = f"target_modules names {some(idle)}, not among lora_target_modules, though nothing there is adapted."
        yield mended(described, Finding("refuses", "target_modules", reason, "start SGLang with these modules too"))


def _normal(names: set[str] | frozenset[str]) -> set[str]:
    return {_OWN.get(name.rpartition(".")[2], name.rpartition(".")[2]) for name in names}


def _apart(layers: tuple[Layer, ...]) -> Iterator[Finding]:
    """Layers of which SGLang stacks several, and some of them are not adapted: q, k and v by q's name, gate and up by
    gate's. Only k, and up, may be left out."""
    found: dict[str, set[str]] = {}
    for layer in layers:
        owner, _, leaf = layer.path.rpartition(".")
        found.setdefault(owner, set()).add(leaf)
    for owner, leaves in found.items():
        if "q_proj" in leaves and "v_proj" not in leaves:
            reason = f"{owner!r} has factors for q_proj and none for v_proj, which SGLang stacks with it."
            yield Finding("refuses", "target_modules", reason, f"{MERGE}, or train v_proj too")
            return
        orphans = (leaves & {"k_proj", "v_proj"} if "q_proj" not in leaves else set()) | (
            {"up_proj"} & leaves if "gate_proj" not in leaves else set()
        )
        if orphans:
            what = f"{owner!r} has factors for {some(orphans)} and none for the layer that SGLang stacks it under"
            reason = f"{what}: {_ENDS}."
            yield Finding("refuses", "target_modules", reason, f"{MERGE}, or train all that are stacked")
            return


RULES = EngineRules(
    "SGLang",
    "0.5.23",
    _findings,
    limits={"max_lora_rank": limits.count, "lora_target_modules": limits.names},
)
