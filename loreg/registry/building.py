"""The modules of a composed version: made of the parts side by side, of their factors, or of their dense deltas."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import torch

from loreg.adapters.draft import RawTensor
from loreg.adapters.folding import raw_of
from loreg.algebra import factor_space
from loreg.algebra.delta import LowRank, concatenate
from loreg.algebra.densify import dense_delta
from loreg.algebra.rounding import round_to
from loreg.algebra.truncate import distance, norm, truncate_dense
from loreg.checkpoint import StoredTensor
from loreg.errors import BadInput, Unsupported
from loreg.format.manifest import AdapterManifest
from loreg.format.methods import METHODS, SUMS
from loreg.format.module import IN_OUT, Module
from loreg.format.reference import format_weight
from loreg.format.terms import BiasTerm, FormTerm, LowRankTerm
from loreg.merge.combining import Combining, mask_key
from loreg.merge.inputs import AdapterInput, values
from loreg.registry.packing import Package, reference

_COMFORTABLE = 32
"""Factors of up to two to this, and down to its inverse, are stored as they are."""

MERGE = "merge the expression by linear or by a method on dense deltas, which 'loreg methods' lists"
"""What can be done with what does not compose. Not by a method on factors: it composes before it merges."""

_NO_FACTORS = "expected some; compose or merge by linear, or by a method on dense deltas, which 'loreg methods' lists"

_T = TypeVar("_T", LowRankTerm | FormTerm, BiasTerm | FormTerm)


@dataclass(frozen=True)
class Part:
    """A summand: what a merge knows of it, and a reader of its tensors as they are stored."""

    input: AdapterInput
    read: Callable[[str], RawTensor]

    @property
    def manifest(self) -> AdapterManifest:
        return self.input.manifest

    @property
    def weight(self) -> float:
        return self.input.weight


@dataclass(frozen=True, slots=True)
class Built:
    """A composed module. ``norm`` and ``lost``: ‖ΔW‖ and ‖ΔW - ΔW'‖ in the Frobenius norm, of what the method gives
    without truncation and what is stored of it; both 0 where nothing is lost."""

    module: Module
    norm: float = 0.0
    lost: float = 0.0


class Builder(Protocol):
    """Makes the modules of a composition, putting their tensors in a package. Threads may ask for several at once."""

    def module(self, path: str) -> Built: ...


def of_path(path: str, parts: Sequence[Part]) -> list[tuple[Part, Module]]:
    """The parts that adapt the module at ``path``, which must agree on what it is. Raises Unsupported."""
    found = [(part, part.manifest.modules[path]) for part in parts if path in part.manifest.modules]
    first = found[0][1]
    for part, module in found:
        if (module.shape, module.view, module.orientation) != (first.shape, first.view, first.orientation):
            raise Unsupported(
                f"{path!r} is {_described(first)} in one adapter and {_described(module)} in {part.input.label}: "
                "expected the same, as deltas of different layers do not add; compose adapters of one model."
            )
    return found


def _described(module: Module) -> str:
    return f"{module.kind} of shape {list(module.shape)}, {module.orientation}"


def _sum_of_biases(path: str, found: Sequence[tuple[Part, Module]], package: Package) -> dict[str, Any]:
    """The bias of a composed module: the terms of all parts. Its tensors go into ``package``."""
    terms = [entry for part, module in found for entry in _named(part, path, module.bias_terms)]
    scaled = tuple(_scaled(part, path, term) for part, _, term in terms)
    _keep(package, path, scaled, [part.read(f"factors:{name}") for part, names, _ in terms for name in names])
    tensor = next((module.bias_tensor for _, module in found if module.bias_tensor), None)
    return {"bias_tensor": tensor, "bias_terms": scaled}


def _named(part: Part, path: str, terms: Iterable[_T]) -> Iterator[tuple[Part, list[str], _T]]:
    """Each term with the names of its tensors in the factors blob of its own version."""
    for index, term in enumerate(terms):
        yield part, [name for name, _ in term.named(path, index)], term


def _scaled(part: Part, path: str, term: _T) -> _T:
    """The term times the weight of its part. Raises BadInput where that has no double."""
    scaled = term.scaled(part.weight)
    _check_scale(part, path, scaled.weight if isinstance(scaled, FormTerm) else scaled.scale)
    return scaled


def _check_scale(part: Part, path: str, scale: float) -> None:
    if not math.isfinite(scale):
        raise BadInput(
            f"{part.input.label} at weight {format_weight(part.weight)} has no finite scale at {path!r}: the weight "
            "times the adapter's own scale is above what a double holds; give a smaller weight."
        )


def _keep(package: Package, path: str, terms: Sequence[_T], raws: Iterable[RawTensor]) -> None:
    """Put the tensors of ``terms``, in their order, into the package under the names that they have there."""
    names = (name for index, term in enumerate(terms) for name, _ in term.named(path, index))
    for name, raw in zip(names, raws, strict=True):
        package.put(name, raw)


@dataclass
class SideBySide:
    """``linear``: the terms of all parts, rank concatenation, with nothing folded and nothing rounded."""

    parts: Sequence[Part]
    package: Package

    def module(self, path: str) -> Built:
        found = of_path(path, self.parts)
        terms = [entry for part, module in found for entry in _named(part, path, module.terms)]
        scaled = tuple(_scaled(part, path, term) for part, _, term in terms)
        _keep(self.package, path, scaled, [part.read(f"factors:{n}") for part, names, _ in terms for n in names])
        return Built(replace(found[0][1], terms=scaled, **_sum_of_biases(path, found, self.package)))


@dataclass
class Factored:
    """A method of ``algebra.factor_space``: each module's factors become one pair. Biases only where it is a sum."""

    parts: Sequence[Part]
    package: Package
    method: str
    parameters: Mapping[str, Any]
    device: torch.device

    def module(self, path: str) -> Built:
        found = of_path(path, self.parts)
        biased = [part for part, module in found if module.bias_terms]
        if biased and not METHODS[self.method].sums:
            raise Unsupported(
                f"{biased[0].input.label} has a trained bias at {path!r}, for which {self.method} is not defined: "
                f"use {', '.join(SUMS)}, or one of the methods on dense deltas, which 'loreg methods' lists."
            )
        turned = found[0][1].orientation == IN_OUT
        given = [(part.weight, self._factors(part, path, turned)) for part in self.parts]
        keys = self._keys(found[0][1].tensor)
        made = factor_space.METHODS[self.method](given, self.parameters, keys)
        whole = norm(made.terms) if made.norm is None else made.norm
        delta = made.terms[0] if len(made.terms) == 1 else concatenate(made.terms, torch.float64)
        term, rounding = _stored(delta, found[0][1], self.package, path)
        module = replace(found[0][1], terms=(term,), **_sum_of_biases(path, found, self.package))
        # Orthogonal to 2⁻²⁴: what was cut off shares no direction with what is left, of which factors are rounded.
        return Built(module, whole, math.hypot(made.lost, rounding))

    def _keys(self, tensor: str) -> tuple[int, ...]:
        seed = self.parameters.get("seed", 0)
        return tuple(mask_key(seed, part.input.digest, tensor) for part in self.parts)

    def _factors(self, part: Part, path: str, turned: bool) -> tuple[LowRank, ...]:
        if path not in part.manifest.modules:
            return ()
        found = factors(part.input, path, self.device)
        for delta in found:
            _check_scale(part, path, part.weight * delta.scale)
        return tuple(delta.mT for delta in found) if turned else found


@dataclass
class Truncating:
    """A method of ``algebra.elementwise``: each module's dense delta, truncated to the adapter that is nearest.

    ``base``: brings a checkpoint tensor of the base, for adapters that read it.
    """

    parts: Sequence[Part]
    package: Package
    combining: Combining
    device: torch.device
    base: Callable[[str], StoredTensor]

    def module(self, path: str) -> Built:
        found = of_path(path, self.parts)
        module = found[0][1]
        if len(module.view) != 2:
            raise Unsupported(
                f"{path!r} is {_described(module)}, and what {self.combining.method} makes of it can be truncated "
                "only if it is a matrix: merge the expression by the same method, or compose it by linear."
            )

        def weight() -> torch.Tensor:
            return values(self.base(module.tensor)).reshape(module.view).to(self.device)

        edits = [(part.input, part.input.weight_edit(path, weight, self.device)) for part, _ in found]
        delta = dense_delta(self.combining.combine(module.tensor, module.view, edits, self.device))
        rank, energy = self.combining.parameters["rank"], self.combining.parameters["energy"]
        delta = delta.T if module.orientation == IN_OUT else delta
        result = truncate_dense(delta, rank=rank, energy=energy)
        term, rounding = _stored(result.delta, module, self.package, path)
        biases = [(part.input, m) for part, m in found if m.bias_tensor]
        extra: dict[str, Any] = {"bias_tensor": None, "bias_terms": ()}
        if biases:
            extra = self._bias(path, biases[0][1], [adapter for adapter, _ in biases])
        return Built(replace(module, terms=(term,), **extra), result.norm, math.hypot(result.lost, rounding))

    def _bias(self, path: str, module: Module, adapters: Sequence[AdapterInput]) -> dict[str, Any]:
        name = module.bias_tensor or ""

        def bias() -> torch.Tensor:
            return values(self.base(name)).to(self.device)

        edits = [(adapter, adapter.bias_edit(path, bias, self.device)) for adapter in adapters]
        made = dense_delta(self.combining.combine(name, (module.out_features,), edits, self.device))
        raw = raw_of(f"{path}.lora_bias.0", round_to(made, torch.float32).cpu())
        self.package.put(raw.key, raw)
        return {"bias_tensor": name, "bias_terms": (BiasTerm(1.0, reference(raw)),)}


def factors(adapter: AdapterInput, path: str, device: torch.device) -> tuple[LowRank, ...]:
    """The low-rank deltas of a module, unweighted. Raises Unsupported where it is no sum of such alone."""

    def base() -> torch.Tensor:
        raise Unsupported(
            f"{adapter.label} changes {path!r} in a way that depends on the base's weight (DoRA, a rotation, "
            f"replaced rows), so it has no factors: {_NO_FACTORS}."
        )

    module, edit = adapter.manifest.modules[path], adapter.weight_edit(path, base, device)
    if edit.dense or len(edit.shape or ()) != 2:
        raise Unsupported(
            f"{adapter.label} changes {path!r}, {_described(module)}, by what is no sum of products of two matrices: "
            f"{_NO_FACTORS}."
        )
    return edit.low_rank


def _stored(delta: LowRank, module: Module, package: Package, path: str) -> tuple[LowRankTerm | FormTerm, float]:
    """A delta in module orientation as a term with float32 factors and its own scale; they go into ``package``.

    And how far the term is from the delta, in the Frobenius norm.
    """
    delta = _in_range(delta)
    single = replace(delta, left=_single(delta.left), right=_single(delta.right))
    A, B = (raw_of(f"{path}.lora_{end}.0", x.cpu()) for end, x in (("A", single.right), ("B", single.left)))
    if module.stored is None:
        term: LowRankTerm | FormTerm = LowRankTerm(delta.rank, None, delta.scale, reference(A), reference(B))
    else:
        tensors = {"A": reference(A), "B": reference(B)}
        term = FormTerm("lora", delta.rank, None, delta.scale, 1.0, tensors, {"groups": 1})
    _keep(package, path, [term], [A, B])
    return term, distance(delta, single)


def _in_range(delta: LowRank) -> LowRank:
    """The same delta, with powers of two moved into its scale where float32 would not hold its factors."""
    for side in ("left", "right"):
        factor = getattr(delta, side).double()
        exponent = math.frexp(float(factor.abs().max()))[1]
        if abs(exponent) > _COMFORTABLE and factor.any():
            scale = math.ldexp(delta.scale, exponent)
            delta = replace(delta, scale=scale, **{side: torch.ldexp(factor, torch.tensor(-exponent))})
    return delta


def _single(factor: torch.Tensor) -> torch.Tensor:
    """Float32, unless it is narrower already."""
    return factor if factor.dtype != torch.float64 else round_to(factor, torch.float32)
