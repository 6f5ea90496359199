"""One module of a version as PEFT's LoRA has it: what can be said in its tensors and numbers, and what cannot."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from loreg.adapters.draft import RawTensor
from loreg.errors import Unsupported
from loreg.format.module import Module
from loreg.format.terms import BiasTerm, FormTerm, LowRankTerm

Read = Callable[[str], RawTensor]
"""Brings a tensor by its name in the manifest: ``factors:NAME`` or ``full:NAME``."""

_DORA: Mapping[str, Any] = {"axis": "out", "epsilon": 0.0}


@dataclass(frozen=True, slots=True)
class Layer:
    """A LoRA layer of PEFT's: α/r·B·A, decomposed by ``magnitude`` if there is one; and α/r·bias."""

    A: RawTensor
    B: RawTensor
    alpha: float
    bias: RawTensor | None = None
    magnitude: RawTensor | None = None

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


@dataclass(frozen=True, slots=True)
class Rows:
    """Trained rows of an embedding."""

    rows: RawTensor
    indices: list[int]


def layer_of(path: str, module: Module, read: Read) -> Layer | Rows:
    """The module at ``path``. Raises Unsupported for more than PEFT's LoRA says."""
    first = module.terms[0]
    if isinstance(first, FormTerm) and first.form == "rows":
        if len(module.terms) > 1 or first.weight * first.scale != 1 or module.kind != "embedding":
            raise _unsayable(path, "trained rows beside other terms, or at another weight than 1")
        return Rows(read(f"factors:{first.tensors['rows'].content_name}"), list(first.parameters["indices"]))
    factors = [_factors(path, index, term, module, read) for index, term in enumerate(module.terms)]
    layer = _shaped(_joined(factors, list(_biases(path, module, read))), module)
    if isinstance(first, FormTerm) and "magnitude" in first.tensors:
        if len(module.terms) > 1 or first.weight != 1 or {name: first.parameters[name] for name in _DORA} != _DORA:
            raise _unsayable(path, "a DoRA beside other terms, at another weight than 1, or with other norms")
        if layer.bias is not None:
            raise _unsayable(path, "DoRA with a trained bias")
        magnitude = read(f"factors:{first.tensors['magnitude'].content_name}")
        shape = (1, module.out_features, *_ones(module)) if module.kind == "conv" else (module.out_features,)
        return replace(layer, magnitude=replace(magnitude, shape=shape))
    return layer


def _unsayable(path: str, what: str) -> Unsupported:
    return Unsupported(
        f"Module {path!r} is adapted by {what}, which PEFT's LoRA cannot say: export the adapters that it was made "
        "from with --format original, or merge it."
    )


def _factors(
    path: str, index: int, term: LowRankTerm | FormTerm, module: Module, read: Read
) -> tuple[RawTensor, RawTensor, float]:
    """A, B and scale of a term that is LoRA."""
    if isinstance(term, LowRankTerm):
        A, B = (read(f"factors:{name}") for name, _ in term.named(path, index))
        return A, B, term.scale
    blocks = {term.parameters.get(name, 1) for name in ("groups", "groups_in")}
    if term.form != "lora" or blocks != {1} or module.kind == "experts":
        raise _unsayable(path, f"{term.form!r}" + (" in blocks" if blocks != {1} else ""))
    if "magnitude" in term.tensors and len(module.terms) > 1:
        raise _unsayable(path, "a DoRA beside other terms")
    A, B = (read(f"factors:{term.tensors[role].content_name}") for role in "AB")
    return A, B, term.weight * term.scale


def _biases(path: str, module: Module, read: Read) -> Iterator[tuple[RawTensor, float]]:
    for index, term in enumerate(module.bias_terms):
        if not isinstance(term, BiasTerm):
            raise _unsayable(path, f"{term.form!r} on its bias")
        ((name, _),) = term.named(path, index)
        yield read(f"factors:{name}"), term.scale


def _joined(factors: list[tuple[RawTensor, RawTensor, float]], biases: list[tuple[RawTensor, float]]) -> Layer:
    """One pair of factors with an α: as it is, if α/r gives its scale back to the bit; else folded."""
    A, B, scale = factors[0]
    rank = sum(A.shape[0] for A, _, _ in factors)
    size = abs(scale)
    exact = size * rank / rank == size and {abs(each) for _, _, each in factors} == {size} - {0.0}
    if len(factors) == 1 and exact and len(biases) <= 1 and all(each == scale for _, each in biases):
        return Layer(A, B, scale * rank, biases[0][0] if biases else None)

    from loreg.adapters.folding import fold, fold_bias

    common = size if exact and not biases else 1.0
    A, B = fold(factors, common)
    return Layer(A, B, common * rank, fold_bias(biases) if biases else None)


def _ones(module: Module) -> tuple[int, ...]:
    return (1,) * (len(module.shape) - 2)


def _shaped(layer: Layer, module: Module) -> Layer:
    """With factors of the shapes that PEFT's layer has: of a convolution, A has its kernel and B one of ones."""
    if module.kind != "conv":
        return layer
    A = replace(layer.A, shape=(layer.rank, *module.shape[1:]))
    return replace(layer, A=A, B=replace(layer.B, shape=(module.out_features, layer.rank, *_ones(module))))
