"""LoRA as PEFT writes it, DoRA and the other variants of it that have a weight of their own.

Scale (PEFT, ``tuners/lora/layer.py``): α/r, or α/√r with ``use_rslora``; α from the first key of
``alpha_pattern``, in the order of the file, that matches as ``(.*\\.)?(KEY)$``. The rank is that of the tensor,
whatever the config says.

A convolution's A has neither the dilation nor the padding mode of its layer (`_ConvNd.update_layer`), so where the
layer has one PEFT's forward is not that of any weight; a checkpoint does not tell.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import NoReturn

from loreg import layers
from loreg.adapters import renames
from loreg.adapters.draft import Draft, DraftModule, DraftTerm, RawTensor
from loreg.adapters.peft import attention, initial, lora_fields, parameters, saved, tokens
from loreg.adapters.peft.config import CONFIG, first_match
from loreg.adapters.peft.contents import PREFIX, Config, Contents
from loreg.adapters.peft.parts import require_biases
from loreg.errors import BadInput, Unsupported
from loreg.format.fingerprint import BaseTensor

_PART = re.compile(
    r"(?P<path>.+)\.(?:(?P<part>lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_embedding_[AB])"
    r"|(?P<magnitude>lora_magnitude_vector)(?:\.weight)?)"
)
_ROWS = re.compile(r"(?P<path>.+)\.token_adapter\.(?P<part>trainable_tokens_(?:delta|original))")

# What some variants use in training alone, and the field that says so.
_TRAINING = {".lora_velora_embed": "velora_config", ".lora_monteclora_sampler.": "monteclora_config"}

# How a key of another method looks, and what to call it: a config that says LoRA is not that of such a file.
_STRANGERS = {
    "trainable_tokens": "trainable tokens",
    "lora_E": "AdaLoRA",
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "vera_lambda": "VeRA",
    "ia3_l": "(IA)³",
    "oft_": "OFT",
}

_MATRICES = ("lora_A.weight", "lora_B.weight")
_EMBEDDINGS = ("lora_embedding_A", "lora_embedding_B")
_MAGNITUDE, _BIAS = "lora_magnitude_vector", "lora_B.bias"

Parts = Mapping[str, RawTensor]
"""The tensors of a module by the ends of their keys, such as ``lora_A.weight``."""


def read(tensors: Mapping[str, RawTensor], config: Config, path: Path, first: Path | None = None) -> Contents:
    """See ``ReadContents``. ``first``: the directory of the adapter before training, whose factors are taken off."""
    lora_fields.check(config, path)
    found = _sorted(tensors, config)
    modules = _modules(found.parts, config)
    if lora_fields.changes_base(config, path) or first is not None:
        begun = _sorted(initial.tensors(first, config, path), config)
        modules = initial.taken_off(modules, _modules(begun.parts, config))
    modules = _tied(modules) if config.get("ensure_weight_tying") else modules
    rows = tokens.read(found.rows, config, path)
    if both := sorted(set(rows) & set(modules)):
        raise Unsupported(f"Module {both[0]!r} has a LoRA and trained rows, which PEFT does not put on one layer.")
    whole = saved.read(found.rest, config)
    used = {raw.key for raw in (*whole.full.values(), *found.rows.values())}
    used.update(raw.key for parts in found.parts.values() for raw in parts.values())
    repeated = (module for module in (*modules.values(), *rows.values()) if module.repeats)
    used.difference_update(raw.key for module in repeated for term in module.terms for raw in term.tensors.values())
    locate = partial(_with_biases, config.get("bias") or "none")
    return Contents(
        {**modules, **rows}, whole.full, whole.together, unused=frozenset(set(tensors) - used), locate=locate
    )


def _with_biases(trained: str, draft: Draft, tensors: Mapping[str, BaseTensor], base: layers.Config) -> Draft:
    """The draft as it is, unless trained biases of its layers are lost. ``trained``: the config's ``bias``."""
    if trained != "none":
        known = renames.Known(tensors, base)
        found = known.resolve(f"{path}.weight" for path in draft.modules)
        # Each bias beside its weight: one that is looked for by its own name may be that of another layer.
        live = {
            path: renames.in_memory(found[f"{path}.weight"], base)
            for path in draft.modules
            if f"{path}.weight" in found
        }
        having = [path for path, name in live.items() if f"{name.removesuffix('weight')}bias" in known.memory]
        require_biases(trained, [f"{path}.bias" for path in having], draft)
    return replace(draft, locate=None)


def alpha_of(path: str, config: Config) -> float:
    """The α of a module, or of a parameter. Raises Unsupported where releases of PEFT differ about it."""
    alphas: Mapping[str, float] = config.get("alpha_pattern") or {}
    alpha = float(alphas.get(first_match(path, alphas), config["lora_alpha"]))
    # Older PEFT (0.13, for one) looked for one key in both patterns, those of the ranks first, and took α from that.
    older = first_match(path, [*(config.get("rank_pattern") or {}), *alphas])
    if not config.get("peft_version") and float(alphas.get(older, config["lora_alpha"])) != alpha:
        raise Unsupported(
            f"Module {path!r}: rank_pattern and alpha_pattern overlap, by which α is {alpha:g} in today's PEFT and "
            f"another in older ones, and the adapter does not say which wrote it; give whole paths in {CONFIG}."
        )
    return alpha


@dataclass(frozen=True, slots=True)
class _Sorted:
    """The tensors of a file: ``parts`` and ``rows`` by module path as the keys have it, ``rest`` by name.

    Not in it: what changes nothing in the model.
    """

    parts: dict[str, dict[str, RawTensor]] = field(default_factory=dict)
    rows: dict[str, RawTensor] = field(default_factory=dict)
    rest: dict[str, RawTensor] = field(default_factory=dict)


def _sorted(tensors: Mapping[str, RawTensor], config: Config) -> _Sorted:
    found = _Sorted()
    for key, tensor in tensors.items():
        if not key.startswith(PREFIX):
            raise Unsupported(f"Tensor {key!r} does not begin with {PREFIX!r}, as PEFT writes it.")
        name = key.removeprefix(PREFIX)
        if match := _PART.fullmatch(name):
            _add(found.parts.setdefault(match["path"], {}), match["part"] or match["magnitude"], tensor)
        elif match := _ROWS.fullmatch(name):
            if match["part"].endswith("delta"):  # the others are the base's own rows, for PEFT's unmerging
                found.rows[match["path"]] = tensor
        elif any(part in name and config.get(variant) for part, variant in _TRAINING.items()):
            continue
        elif stranger := next((what for part, what in _STRANGERS.items() if part in name), None):
            raise Unsupported(
                f"Tensor {key!r} belongs to {stranger}, and peft_type is LORA: this is another's config."
            )
        elif "lora_" in name:
            raise Unsupported(f"Tensor {key!r} is none of the parts of a LoRA that are handled.")
        else:
            found.rest[name] = tensor
    return found


def _add(parts: dict[str, RawTensor], part: str, tensor: RawTensor) -> None:
    if part in parts:
        raise BadInput(f"Tensors {parts[part].key!r} and {tensor.key!r} both mean one: expected one of them.")
    parts[part] = tensor


def _modules(parts: Mapping[str, Parts], config: Config) -> dict[str, DraftModule]:
    def ordinary(path: str, found: Parts) -> DraftModule:
        return _module(path, found, config)

    found = parameters.read(parts, config, ordinary, lambda path: alpha_of(path, config))
    return attention.joined(found, config)


def _module(path: str, parts: Parts, config: Config) -> DraftModule:
    def refuse(reason: str) -> NoReturn:
        raise BadInput(f"Module {path!r} of the adapter is not acceptable: {reason}.")

    embedding = any(name in parts for name in _EMBEDDINGS)
    names = _EMBEDDINGS if embedding else _MATRICES
    if set(parts) - {*names, _BIAS, _MAGNITUDE} or not set(names) <= set(parts):
        refuse(f"expected {' and '.join(names)}, found {', '.join(sorted(parts))}")
    A, B = parts[names[0]], parts[names[1]]
    if len(A.shape) != len(B.shape) or len(A.shape) < 2 or 0 in (*A.shape, *B.shape) or A.shape[0] % B.shape[1]:
        refuse(f"expected A (rank, in) and B (out, rank), found {list(A.shape)} and {list(B.shape)}")
    groups = _groups(path, A, B, config)
    if A.shape[0] != B.shape[1] * groups["groups"]:
        refuse(f"expected A (rank, in) and B (out, rank), found {list(A.shape)} and {list(B.shape)}")
    bias = parts.get(_BIAS)
    if bias is not None and bias.shape != (B.shape[0],):
        refuse(f"expected a bias of shape [{B.shape[0]}], found {list(bias.shape)}")
    rank = A.shape[0]
    alpha = alpha_of(path.removesuffix(attention.WRAPPED), config)  # PEFT looks for that of the whole attention
    scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    term = _decomposed(path, DraftTerm("lora", {"A": A, "B": B}, scale, alpha, groups), parts, config)
    return DraftModule(
        terms=(term,),
        bias_terms=(DraftTerm("dense", {"value": bias}, scale),) if bias is not None else (),
        embedding=embedding,
        in_out_hint=bool(config.get("fan_in_fan_out")),
    )


def _groups(path: str, A: RawTensor, B: RawTensor, config: Config) -> dict[str, int]:
    """The blocks that factors are of: of a grouped convolution's B, and of BD-LoRA's (`BdLoraLinearVariant.init`)."""
    if len(A.shape) > 2:
        return {"groups": A.shape[0] // B.shape[1]}
    count, named = lora_fields.blocks(config, Path(CONFIG))
    split = {factor: any(part in path for part in parts) for factor, parts in named.items()}
    if all(split.values()):
        raise BadInput(
            f"Module {path!r}: use_bdlora of the config names it for both factors: expected one of them to be of "
            "blocks."
        )
    if count == 1 or not any(split.values()):
        return {"groups": 1}
    return {"groups": count} if split["b"] else {"groups": 1, "groups_in": count}


def _decomposed(path: str, term: DraftTerm, parts: Parts, config: Config) -> DraftTerm:
    """The term with its magnitude, where it is DoRA: PEFT's norms are of rows, as the layer has them, without ε."""
    if (_MAGNITUDE in parts) != bool(config.get("use_dora")):
        if _MAGNITUDE in parts:
            key = parts[_MAGNITUDE].key
            raise Unsupported(f"Tensor {key!r} belongs to DoRA, and use_dora is not set: this is another's config.")
        raise BadInput(f"Module {path!r} of the adapter has no {_MAGNITUDE}, and use_dora is set: save it again.")
    if _MAGNITUDE not in parts:
        return term
    if _BIAS in parts:
        raise Unsupported(f"Module {path!r} is DoRA with a lora_bias, which PEFT does not define.")
    return replace(
        term,
        tensors={**term.tensors, "magnitude": parts[_MAGNITUDE]},
        parameters={**term.parameters, "axis": "out", "epsilon": 0.0},
    )


def _tied(modules: Mapping[str, DraftModule]) -> dict[str, DraftModule]:
    """``ensure_weight_tying``: a head whose factors are an embedding's, exchanged and transposed, repeats its edit.

    DoRA's magnitudes are of other directions in the two, so these stay two edits.
    """
    result = dict(modules)
    for name, embedding in modules.items():
        if not embedding.embedding or "magnitude" in embedding.terms[0].tensors:
            continue
        for other, head in modules.items():
            if not head.embedding and _is_turned(embedding.terms, head.terms):
                result[name] = replace(result[name], together=True)
                result[other] = replace(head, together=True, repeats=name)
    return result


def _is_turned(terms: tuple[DraftTerm, ...], others: tuple[DraftTerm, ...]) -> bool:
    return len(terms) == len(others) and all(
        set(one.tensors) == set(two.tensors) == {"A", "B"}
        and one.scale == two.scale
        and all(
            one.tensors[a].shape == two.tensors[b].shape[::-1] and one.tensors[a].transposed().same_as(two.tensors[b])
            for a, b in ("AB", "BA")
        )
        for one, two in zip(terms, others, strict=True)
    )
