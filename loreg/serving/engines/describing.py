"""From a manifest to what its PEFT directory says.

A version that was pushed as a PEFT directory is served as that; of every other, ``loreg.adapters.peft_export`` writes
one, or refuses to. What it writes follows from the manifest alone, and is said here once more, as it cannot be asked
without the tensors: a test compares the two over adapters of all kinds.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from loreg.errors import BadInput
from loreg.format import canonical_json
from loreg.format.manifest import AdapterManifest
from loreg.format.module import FullTensor, Module
from loreg.format.terms import BiasTerm, FormTerm, LowRankTerm
from loreg.serving.engines.described import Described, Layer, Stack, Words

CONFIG = "adapter_config.json"
PEFT = "peft"
"""The format of a version that is given back as the PEFT directory that it was."""

_WEIGHTS, _PICKLE = "adapter_model.safetensors", "adapter_model.bin"
_METHODS = {name: name.upper() for name in ("adalora", "vera", "loha", "lokr", "ia3", "oft", "boft")}
_ATTENTION, _HEAD = "in_proj_weight", "lm_head.weight"
_TIED_BY_PEFT = ("embed_tokens", "lm_head")
_DORA: Mapping[str, Any] = {"axis": "out", "epsilon": 0.0}
_CLASSIFIERS = ("score", "classifier")


def describe(manifest: AdapterManifest, pushed: Words | None = None) -> Described:
    """``pushed``: the config of a version that was pushed as PEFT; None takes what follows from the manifest."""
    as_pushed = manifest.source is not None and manifest.source.format == PEFT
    heads = {name: tie for name, tie in manifest.ties.items() if name.endswith(_HEAD)}
    tied = {*heads, *(tie.to for tie in heads.values())}
    attentions = {path for path, m in manifest.modules.items() if m.tensor.rpartition(".")[2] == _ATTENTION}
    layers: list[Layer] = []
    rows: list[str] = []
    stacks: dict[str, Stack] = {}
    for path, module in manifest.modules.items():
        form = getattr(module.terms[0], "form", "lora")
        if form == "rows":
            rows.append(path)
        elif form in ("lora_expert", "lora_experts") or (pushed and pushed.parameters and _in_stack(path, module)):
            owner, part = _owner(path, module)
            known = stacks.get(owner, Stack(owner, frozenset(), module.kind == "experts"))
            stacks[owner] = replace(known, parts=known.parts | {part})
        elif form == "lora":
            layers.append(_layer(path, module, as_pushed, attentions, tied))
    words = pushed or _words(manifest, layers, as_pushed)
    described = Described(
        words,
        unsayable=None if as_pushed else why_unsayable(manifest),
        layers=tuple(layers),
        rows=tuple(rows),
        stacks=tuple(stacks.values()),
        rank=manifest.rank,
    )
    described = _with_files(_with_full(described, manifest), manifest, as_pushed)
    return replace(described, foldable=_is_foldable(described, manifest))


def _is_foldable(described: Described, manifest: AdapterManifest) -> bool:
    """Whether it is LoRA of matrices, and nothing else: one scale and one rank can say that."""
    together = {tie.to for tie in manifest.ties.values() if not tie.untied}
    plain = [layer.plain and manifest.modules[layer.path].tensor not in together for layer in described.layers]
    return len(plain) == len(manifest.modules) > 0 and all(plain) and not manifest.replaced()


def words_of(raw: bytes) -> Words | None:
    """A pushed config. None for one that is not as PEFT writes it, as of a manifest that somebody made up."""
    try:
        config = canonical_json.loads(raw, what=CONFIG)
    except BadInput:
        return None
    if not isinstance(config, dict):
        return None
    r, alpha, targets = config.get("r", 1), config.get("lora_alpha", 1), config.get("target_modules") or []
    ranks = config.get("rank_pattern") or {}
    numbers = [alpha, *(ranks.values() if isinstance(ranks, dict) else [None])]
    if type(r) is not int or r < 1 or not all(type(n) in (int, float) and abs(n) < 1e300 for n in numbers):
        return None
    lists = [[] if isinstance(targets, str) else targets, config.get("modules_to_save") or []]
    if not all(isinstance(names, list) and all(isinstance(name, str) for name in names) for names in lists):
        return None
    return Words(
        method=str(config.get("peft_type")),
        r=r,
        alpha=float(alpha),
        root=config.get("use_rslora") is True,
        ranks=tuple(ranks.values()),
        bias=str(config.get("bias") or "none"),
        targets=targets if isinstance(targets, str) else tuple(targets),
        saved=tuple(lists[1]),
        tying=config.get("ensure_weight_tying") is True,
        parameters=bool(config.get("target_parameters")),
    )


def why_unsayable(manifest: AdapterManifest) -> str | None:
    """Why PEFT's LoRA cannot say what the version does; None if it can."""
    for path, module in manifest.modules.items():
        if reason := _why_not(module):
            return f"{path!r} is adapted by {reason}, which PEFT's LoRA cannot say"
    return _unsayable_together(manifest)


def _why_not(module: Module) -> str | None:
    first, alone = module.terms[0], len(module.terms) == 1
    if isinstance(first, FormTerm) and first.form == "rows":
        fits = alone and first.weight * first.scale == 1 and module.kind == "embedding"
        return None if fits else "trained rows beside other terms, or at another weight than 1"
    for term in (term for term in module.terms if isinstance(term, FormTerm)):
        if term.form != "lora" or module.kind == "experts":
            return repr(term.form)
        if _is_divided(term):
            return "'lora' in blocks"
        if "magnitude" in term.tensors:
            norms = {name: term.parameters.get(name) for name in _DORA} == _DORA
            if not alone or term.weight != 1 or not norms or module.bias_terms:
                return "a DoRA beside other terms, at another weight than 1, with a bias, or with other norms"
    bias = next((term.form for term in module.bias_terms if isinstance(term, FormTerm)), None)
    return f"{bias!r} on its bias" if bias else None


def _unsayable_together(manifest: AdapterManifest) -> str | None:
    """What PEFT has one setting for, and the modules differ in; and ties that it makes or does not."""
    modules = {path: m for path, m in manifest.modules.items() if getattr(m.terms[0], "form", "lora") != "rows"}
    rows = {m.tensor: m.terms[0] for path, m in manifest.modules.items() if path not in modules}
    for name, has in {"trained bias": _has_bias, "magnitude": _has_magnitude}.items():
        having = {path for path, module in modules.items() if has(module)}
        if having and (lacking := min(set(modules) - having, default=None)):
            return f"{lacking!r} has no {name} and other modules have, which PEFT sets for all or none"
    if odd := [path for path, m in modules.items() if m.kind == "embedding" and m.bias_terms]:
        return f"{odd[0]!r} is an embedding with a trained bias, which PEFT's LoRA has not"
    for path, module in modules.items():
        other = modules.get(f"{path}.out_proj")
        attention = module.tensor.rpartition(".")[2] == _ATTENTION
        if attention and (other is None or other.rank != module.rank or module.bias_terms or other.bias_terms):
            return f"{path!r} is a MultiheadAttention, which PEFT adapts with one rank, both layers, and no biases"
    tied = {tie.to for tie in manifest.ties.values() if not tie.untied}
    for path, module in modules.items():
        if module.tensor in tied and (path.rpartition(".")[2] not in _TIED_BY_PEFT or _has_magnitude(module)):
            return f"{path!r} is changed together with the head that it is tied to, which PEFT does for few"
    for head, embedding in manifest.untied.items():
        mine, theirs = rows.get(embedding), rows.get(head)
        if mine is not None and (theirs is None or _indices(mine) == _indices(theirs)):
            return f"rows of {embedding!r} are not those of the head that it is tied to, and PEFT would give it them"
    return None


def _layer(path: str, module: Module, as_pushed: bool, attentions: set[str], tied: set[str]) -> Layer:
    first = module.terms[0]
    scale = first.scale if as_pushed else _exported_scale(module)
    owner, _, leaf = path.rpartition(".")
    outer = leaf == "out_proj" and owner in attentions
    return Layer(
        path,
        "attention" if outer or path in attentions else module.kind,
        max(1, module.rank),
        scale / 2 if outer else scale,  # PEFT adds the delta of out_proj twice, and the manifest has what it does
        divided=isinstance(first, FormTerm) and _is_divided(first),
        magnitude=_has_magnitude(module),
        bias=_has_bias(module),
        tied=module.tensor in tied,
        square=module.in_features == module.out_features,
    )


def _exported_scale(module: Module) -> float:
    """The scale with which an export writes it: its own, if α/r gives that back to the bit; else 1, folded into B."""
    scales = [term.weight * term.scale if isinstance(term, FormTerm) else term.scale for term in module.terms]
    biases = [term.scale for term in module.bias_terms]
    rank, size = max(1, module.rank), abs(scales[0])
    exact = size * rank / rank == size and {abs(scale) for scale in scales} == {size} - {0.0}
    if len(scales) == 1 and exact and len(biases) <= 1 and all(bias == scales[0] for bias in biases):
        return scales[0]
    return size if exact and not biases else 1.0


def _words(manifest: AdapterManifest, layers: list[Layer], as_pushed: bool) -> Words:
    """What an exported config says, and one that was pushed has to have said."""
    modules = manifest.modules

    def alpha_of(layer: Layer) -> float:
        said = modules[layer.path].terms[0].alpha
        return said if as_pushed and said is not None else layer.scale * layer.rank

    root = any(
        not math.isclose(layer.scale, alpha_of(layer) / layer.rank)
        and math.isclose(layer.scale, alpha_of(layer) / math.sqrt(layer.rank))
        for layer in layers
    )
    ranks = Counter(layer.rank for layer in layers).most_common(1)
    alphas = Counter(alpha_of(layer) for layer in layers).most_common(1)
    forms = {term.form for module in modules.values() for term in module.terms if isinstance(term, FormTerm)}
    method = next((_METHODS[form] for form in sorted(forms) if form in _METHODS), "LORA")
    r = ranks[0][0] if ranks else 1
    return Words(
        method="TRAINABLE_TOKENS" if as_pushed and forms == {"rows"} and not layers else method,
        r=r,
        alpha=alphas[0][0] if alphas else 1.0,
        root=root,
        ranks=tuple(layer.rank for layer in layers if layer.rank != r),
        targets=tuple(sorted({layer.path for layer in layers})),
        parameters=bool(forms & {"lora_expert", "lora_experts"}),
    )


def _with_full(described: Described, manifest: AdapterManifest) -> Described:
    """With the tensors that are replaced, or only carried along."""
    layers = {layer.path for layer in described.layers}
    replaced: dict[str, set[str]] = {}
    beneath, carried, labels = set(), [], 0
    changed = manifest.replaced()
    for name, full in manifest.full.items():
        parameter = name.rpartition(".")[2]
        if name not in changed:
            carried += [] if full.module in layers else [name]
        elif full.module in layers and parameter != "bias":
            beneath.add(full.module)
        else:
            replaced.setdefault(full.module, set()).add(parameter)
            labels = max(labels, _labels(full))
    biases = {module for module, parameters in replaced.items() if parameters == {"bias"}}
    words = described.words
    if not words.saved:
        words = replace(words, saved=tuple(sorted(_named(manifest) - biases - {*manifest.modules})))
    if words.bias == "none" and biases:
        words = replace(words, bias="lora_only" if biases <= layers else "all")
    return replace(
        described,
        words=words,
        saved=tuple(sorted(set(replaced) - biases)),
        biases=tuple(sorted(biases)),
        beneath=tuple(sorted(beneath)),
        carried=tuple(sorted(carried)),
        labels=labels,
    )


def _named(manifest: AdapterManifest) -> set[str]:
    """Modules with tensors that PEFT has to be told of: a tied weight it puts into both places by itself."""
    tied = {tie.to for tie in manifest.ties.values() if not tie.untied}
    return {full.module for name, full in manifest.full.items() if name not in tied}


def _with_files(described: Described, manifest: AdapterManifest, as_pushed: bool) -> Described:
    """With what the names of the pushed files tell. A file of weights that is kept in one piece holds tensors that
    change nothing; but a head that repeats its embedding is an ordinary one."""
    files = {file.name: file for file in manifest.source.files} if manifest.source and as_pushed else {}
    weights = files.get(_WEIGHTS)
    more = weights is not None and not weights.tensors and not described.words.tying
    return replace(described, strangers=_WEIGHTS if more else None, pickled=weights is None and _PICKLE in files)


def _in_stack(path: str, module: Module) -> bool:
    """Of an adapter of parameters: whether this is one, or a part of one."""
    return ".experts." in path or path.endswith(".weight") or not module.tensor.endswith(".weight")


def _owner(path: str, module: Module) -> tuple[str, str]:
    """The module that holds the experts, and what is adapted of them."""
    stem, found, rest = path.rpartition(".experts.")
    owner = f"{stem}.experts" if found else path.rpartition(".")[0]
    return owner, rest.rpartition(".")[2] if found else path.rpartition(".")[2]


def _is_divided(term: FormTerm) -> bool:
    return any(term.parameters.get(name, 1) != 1 for name in ("groups", "groups_in"))


def _has_bias(module: Module) -> bool:
    return any(isinstance(term, BiasTerm) for term in module.bias_terms)


def _has_magnitude(module: Module) -> bool:
    return isinstance(module.terms[0], FormTerm) and "magnitude" in module.terms[0].tensors


def _indices(term: LowRankTerm | FormTerm) -> list[int]:
    return list(term.parameters["indices"]) if isinstance(term, FormTerm) else []


def _labels(full: FullTensor) -> int:
    shape = full.value.shape
    return shape[0] if full.module.rpartition(".")[2] in _CLASSIFIERS and shape else 0
