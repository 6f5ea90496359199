"""Binding a draft to a base: names resolved, orientations decided, shapes checked, nothing left over."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from loreg.adapters import models, names
from loreg.adapters.draft import Draft, DraftModule, RawTensor
from loreg.errors import BadInput, Unsupported
from loreg.format.fingerprint import BaseTensor
from loreg.format.module import IN_OUT, OUT_IN

Found = Callable[[str], BaseTensor]
"""The base's weight for a module path."""


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

    def weight_of(path: str) -> BaseTensor:
        return tensors[found[weights[path]]]

    modules = {
        path: BoundModule(
            draft=module,
            tensor=found[weights[path]],
            kind=_kind(
                module,
                orientation := _orientation(path, module, draft, weight_of, config),
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
        if added and not _is_new(name, draft.saved_modules, tensors):
            raise _missing(name, tensors, config)
        target = found.get(name, name)
        if target in full:
            raise BadInput(f"Two tensors of the adapter would replace {target!r}: expected one.")
        full[target] = BoundFull(tensor, module, added)
    return full


def _is_new(name: str, saved_modules: Collection[str], tensors: Collection[str]) -> bool:
    """Whether the tensor is of a saved module that the base knows nothing of, such as a classifier's head.

    Where the base has that module somewhere, a tensor of it that fits nowhere is a stranger: layer 7 of 2.
    """
    of = [f".{saved}." for saved in saved_modules if f".{saved}." in f".{name}"]
    return bool(of) and not any(part in f".{known}" for part in of for known in tensors)


def _orientation(path: str, module: DraftModule, draft: Draft, found: Found, config: Mapping[str, Any]) -> str:
    weight = found(path)
    fits = _fitting(module, weight)
    if not fits:
        outer, inner = module.term.B.shape[0], module.term.A.shape[1]
        raise BadInput(
            f"Module {path!r} does not fit its base: expected {weight.name!r} of shape {[outer, inner]}, found "
            f"{list(weight.shape)}; was the adapter trained on another base?"
        )
    if len(fits) == 1:
        return fits.pop()
    leaf = path.rpartition(".")[2]
    if models.stores_in_out(config, leaf):
        return IN_OUT
    # The config's fan_in_fan_out speaks of the last layer that PEFT looked at, so for a square layer it proves
    # nothing; other layers of the same name whose shapes tell do.
    if not module.in_out_hint and not models.may_store_in_out(leaf):
        return OUT_IN
    told = [_fitting(other, found(name)) for name, other in draft.modules.items() if name.rpartition(".")[2] == leaf]
    evidence = {kind for kinds in told if len(kinds) == 1 for kind in kinds}
    if len(evidence) == 1:
        return evidence.pop()
    raise Unsupported(
        f"Module {path!r} is square, and neither config.json (model_type {config.get('model_type')!r}) nor another "
        "layer of that name tells whether it is stored as (in, out): its orientation would be a guess."
    )


def _fitting(module: DraftModule, weight: BaseTensor) -> set[str]:
    """The orientations in which the factors have the shape of the weight."""
    inner, outer = module.term.A.shape[1], module.term.B.shape[0]
    fits = {kind for kind, shape in ((OUT_IN, (outer, inner)), (IN_OUT, (inner, outer))) if weight.shape == shape}
    return fits & {IN_OUT} if module.embedding else fits


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
