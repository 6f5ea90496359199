"""Binding a draft to a base: names resolved, orientations decided, shapes checked, nothing left over."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loreg.adapters import names
from loreg.adapters.draft import Draft, DraftModule, RawTensor
from loreg.errors import BadInput, Unsupported
from loreg.format.fingerprint import BaseTensor
from loreg.format.module import IN_OUT, OUT_IN

# transformers' Conv1D layers, which store (in, out): model type → last part of the module path. Needed for square
# weights, such as GPT-2's attn.c_proj, where the shape cannot tell.
_CONV1D_LAYERS: Mapping[str, frozenset[str]] = {
    model: frozenset({"c_attn", "c_proj", "c_fc", "q_attn"})
    for model in ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
}


@dataclass(frozen=True, slots=True)
class BoundModule:
    """A module of the draft, and the checkpoint tensors that it adapts."""

    draft: DraftModule
    tensor: str
    kind: str
    orientation: str
    bias_tensor: str | None


@dataclass(frozen=True, slots=True)
class BoundFull:
    """A tensor that is replaced, or added if the checkpoint has none of its name."""

    tensor: RawTensor
    module: str
    added: bool


@dataclass(frozen=True, slots=True)
class Binding:
    """``modules`` by path in the model, ``full`` by name in the checkpoint."""

    modules: Mapping[str, BoundModule]
    full: Mapping[str, BoundFull]


def bind(draft: Draft, tensors: Mapping[str, BaseTensor], config: Mapping[str, Any]) -> Binding:
    """Tie ``draft`` to a checkpoint with these ``tensors`` and this ``config.json``.

    Raises BadInput naming the first module or tensor that has no place in the checkpoint, or does not fit it;
    Unsupported for a head that the base does not store because it is tied to the embedding.
    """
    weights = {path: f"{path}.weight" for path in draft.modules}
    biases = {path: f"{path}.bias" for path, module in draft.modules.items() if module.bias is not None}
    found = names.resolve([*weights.values(), *biases.values(), *draft.full], tensors)
    for wanted in (*weights.values(), *biases.values()):
        if wanted not in found:
            raise _missing(wanted, tensors, config)
    modules = {
        path: BoundModule(
            draft=module,
            tensor=found[weights[path]],
            kind=_kind(
                module,
                orientation := _orientation(path, module, tensors[found[weights[path]]], draft, config),
            ),
            orientation=orientation,
            bias_tensor=found[biases[path]] if path in biases else None,
        )
        for path, module in draft.modules.items()
    }
    return Binding(modules, _full(draft, found, tensors, config))


def _full(
    draft: Draft, found: Mapping[str, str], tensors: Mapping[str, BaseTensor], config: Mapping[str, Any]
) -> dict[str, BoundFull]:
    full: dict[str, BoundFull] = {}
    for name, tensor in draft.full.items():
        module = name.rpartition(".")[0]
        added = name not in found
        if added and not any(f".{saved}." in f".{name}" for saved in draft.saved_modules):
            raise _missing(name, tensors, config)
        target = found.get(name, name)
        if target in full:
            raise BadInput(f"Two tensors of the adapter would replace {target!r}: expected one.")
        full[target] = BoundFull(tensor, module, added)
    return full


def _orientation(path: str, module: DraftModule, weight: BaseTensor, draft: Draft, config: Mapping[str, Any]) -> str:
    inner, outer = module.term.A.shape[1], module.term.B.shape[0]
    fits = {kind for kind, shape in ((OUT_IN, (outer, inner)), (IN_OUT, (inner, outer))) if weight.shape == shape}
    if module.embedding:
        fits &= {IN_OUT}
    if not fits:
        raise BadInput(
            f"Module {path!r} does not fit its base: expected {weight.name!r} of shape {[outer, inner]}, found "
            f"{list(weight.shape)}; was the adapter trained on another base?"
        )
    if len(fits) == 1:
        return fits.pop()
    leaf = path.rpartition(".")[2]
    if leaf in _CONV1D_LAYERS.get(config.get("model_type", ""), ()):
        return IN_OUT
    if not module.in_out_hint:
        return OUT_IN
    if config.get("model_type"):
        raise BadInput(
            f"Module {path!r} is square and the adapter says fan_in_fan_out, but {config['model_type']!r} is not "
            "known to store its weights as (in, out): its orientation cannot be told; it is refused."
        )
    return IN_OUT


def _kind(module: DraftModule, orientation: str) -> str:
    if module.embedding:
        return "embedding"
    return "linear" if orientation == OUT_IN else "conv1d"


def _missing(name: str, tensors: Mapping[str, BaseTensor], config: Mapping[str, Any]) -> BadInput:
    if name.endswith("lm_head.weight") and config.get("tie_word_embeddings", True):
        return Unsupported(
            f"The adapter adapts {name!r}, which this base does not store: the head is tied to the embedding. "
            "Tied heads are not handled yet; nothing was stored."
        )
    example = min(tensors)
    return BadInput(
        f"The adapter has {name!r}, and the base has no such tensor (it has {len(tensors)}, such as {example!r}); "
        "was the adapter trained on another base?"
    )
