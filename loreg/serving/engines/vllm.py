"""vLLM 0.32.0: ``peft_helper.py``, ``lora_model.py``, ``model_manager.py``, ``lora_weights.py`` and ``utils.py`` in
``vllm/lora``, and ``vllm/config/lora.py``.

It reads both patterns and ``use_rslora`` as PEFT does, and looks at the config before the weights. Which layers a
model has LoRA for is in the model's class, which a manifest does not name: embeddings other than ``embed_tokens``
and layers that are not linear are in none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from typing import Any

from loreg.serving.engines import limits, rules
from loreg.serving.engines.described import Described
from loreg.serving.engines.rules import MERGE, EngineRules, Finding, mended, some

_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_DEFAULT_RANK = 16
_CLASSIFIERS = ("score", "classifier")
_STACKED: tuple[Set[str], ...] = ({"gate_up_proj", "down_proj"},)
_PACKED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
_NO_LAYER = "vLLM has LoRA for linear layers, experts and embed_tokens, and none for this"


def _findings(described: Described, given: Mapping[str, Any]) -> Iterator[Finding]:
    words = described.words
    claimed = max((words.r, *map(int, words.ranks)))
    fitting = next((rank for rank in _RANKS if rank >= described.rank), None)
    remedy = f"start vLLM with --max-lora-rank {fitting}" if fitting else "serve it by another engine"
    yield from rules.over(described, given, _DEFAULT_RANK, claimed, remedy)
    yield from _refused_words(described)
    yield from _refused_parts(described)
    yield from _saved(described, given.get("max_lora_cls_labels"))
    yield from _experts(described, given.get("enable_mixed_moe_lora_format", False))
    yield from rules.strangers(described, "refuses")
    if "lora_target_modules" in given:
        yield from _left_out(described, given["lora_target_modules"])


def _refused_words(described: Described) -> Iterator[Finding]:
    """What the config says, and vLLM refuses whatever the weights are."""
    words = described.words
    if dora := [layer.path for layer in described.layers if layer.magnitude]:
        yield Finding(
            "refuses", "use_dora", f"{some(dora)}: vLLM does not compute DoRA.", f"{MERGE}, or {rules.RESIZE}"
        )
    if biased := [layer.path for layer in described.layers if layer.bias]:
        yield Finding("refuses", "lora_bias", f"{some(biased)}: vLLM adds no bias of a LoRA.", MERGE)
    if described.biases:
        reason = f"{some(described.biases)}: vLLM replaces no bias (bias is {words.bias!r})."
        yield Finding("refuses", "bias", reason, MERGE)
    elif words.bias != "none":
        reason = f"bias is {words.bias!r} in the config, which trained none here, and vLLM expects 'none'."
        yield mended(described, Finding("refuses", "bias", reason, MERGE))
    if odd := [rank for rank in words.ranks if not isinstance(rank, int) or rank < 1]:
        reason = f"rank_pattern holds {odd[0]!r} in the config, and vLLM expects whole numbers."
        yield mended(described, Finding("refuses", "rank_pattern", reason, MERGE))


def _refused_parts(described: Described) -> Iterator[Finding]:
    """Tensors of the file that vLLM has no place for."""
    embeddings = [layer.path for layer in described.layers if layer.kind == "embedding"]
    subjects = {
        "trainable_token_indices": described.rows,
        "conv": described.of_kind("conv"),
        "attention": described.of_kind("attention", "vector"),
        "use_bdlora": [layer.path for layer in described.layers if layer.divided],
        "embedding": [path for path in embeddings if path.rpartition(".")[2] != "embed_tokens"],
    }
    yield from rules.no_place(described, "refuses", subjects, _NO_LAYER)
    if described.beneath:
        reason = f"{some(described.beneath)}: a LoRA lies on a weight that is replaced, and vLLM keeps the base's."
        yield Finding("ignores", "base_layer", reason, MERGE)
    if described.carried:
        reason = f"{some(described.carried)}: the file carries these weights of the base, which are no LoRA to vLLM."
        yield mended(described, Finding("refuses", "save_embedding_layers", reason, "save it again without them"))


def _saved(described: Described, labels: int | None) -> Iterator[Finding]:
    """Modules that are replaced: vLLM has one head of a classifier, called ``score`` or ``classifier``."""
    heads = [path for path in described.saved if path.rpartition(".")[2] in _CLASSIFIERS]
    if others := sorted(set(described.saved) - set(heads)):
        reason = f"{some(others)}: vLLM replaces no module but a classifier, called {' or '.join(_CLASSIFIERS)}."
        yield Finding("refuses", "modules_to_save", reason, MERGE)
    elif len(heads) > 1:
        yield Finding("refuses", "modules_to_save", f"{some(heads)}: vLLM replaces one module at most.", MERGE)
    elif unknown := [name for name in described.words.saved if name not in _CLASSIFIERS]:
        reason = f"modules_to_save names {some(unknown)} in the config, and vLLM expects {' or '.join(_CLASSIFIERS)}."
        yield mended(described, Finding("refuses", "modules_to_save", reason, MERGE))
    if labels is not None and described.labels > labels:
        reason = f"{some(heads)} has {described.labels} labels, above max_lora_cls_labels {labels}."
        yield Finding("refuses", "modules_to_save", reason, f"start vLLM with {described.labels} of them")


def _experts(described: Described, mixed: bool) -> Iterator[Finding]:
    for path, lack in rules.incomplete_experts(described).items():
        yield Finding("refuses", "experts", f"{path!r} {lack}, and vLLM packs all experts of a layer.", MERGE)
    for stack in described.stacks:
        if stack.parts not in (_STACKED if stack.whole else rules.GATED) or not stack.path.endswith("experts"):
            reason = f"{stack.path!r}: {some(stack.parts)} are adapted, and vLLM takes all of the experts or none."
            yield Finding("refuses", "target_parameters", reason, MERGE)
        elif not stack.whole and not mixed:
            reason = f"{stack.path!r} is adapted as one stack, and vLLM has experts that are stored one by one apart."
            remedy = "start vLLM with --enable-mixed-moe-lora-format, and ask with is_3d_lora_weight"
            yield Finding("refuses", "target_parameters", reason, remedy)


def _left_out(described: Described, wanted: frozenset[str]) -> Iterator[Finding]:
    """Modules that the deployment has no LoRA on: their factors are dropped without a word."""

    def kept(layer_name: str, path: str) -> bool:
        packs = [{parent, *children} for parent, children in _PACKED.items() if layer_name in (parent, *children)]
        return path in wanted or any(not names.isdisjoint(wanted) for names in [{layer_name}, *packs])

    if dropped := [layer.path for layer in described.layers if not kept(layer.leaf, layer.path)]:
        reason = f"{some(dropped)}: not among lora_target_modules, so vLLM serves the base there."
        yield Finding("ignores", "target_modules", reason, "start vLLM with these modules too")


RULES = EngineRules(
    "vLLM",
    "0.32.0",
    _findings,
    limits={
        "max_lora_rank": limits.one_of(*_RANKS),
        "lora_target_modules": limits.names,
        "max_lora_cls_labels": limits.count,
        "enable_mixed_moe_lora_format": limits.flag,
    },
)
