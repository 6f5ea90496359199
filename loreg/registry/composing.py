"""Composing: a weighted sum of versions, stored as a version of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch

from loreg.adapters.draft import RawTensor
from loreg.adapters.folding import raw_of, tensor_of
from loreg.algebra.combine import svd
from loreg.algebra.delta import LowRank
from loreg.digest import Digest
from loreg.errors import Unsupported, UsageError
from loreg.format.base import BaseReference
from loreg.format.manifest import AdapterManifest, Provenance, Tie
from loreg.format.module import FullTensor, Module
from loreg.format.recipe import EXACT, LAPACK, Recipe
from loreg.format.reference import check_name, check_tag, parse_expression
from loreg.format.terms import BiasTerm, FormTerm, LowRankTerm
from loreg.registry.core import Registry, Version
from loreg.registry.exporting import tensor_reader
from loreg.registry.merging import choose_device, same_base
from loreg.registry.packing import Package, reference

METHODS = ("linear", "svd")

_T = TypeVar("_T", LowRankTerm | FormTerm, BiasTerm | FormTerm)


@dataclass(frozen=True, slots=True)
class Composed:
    """A composed version, and how far it is from the sum: ‖Σ - result‖/‖Σ‖ over all modules (Frobenius).

    0 for ``linear``, which loses nothing; for ``svd`` from the discarded singular values, to which storing the
    factors in float32 adds at most 2⁻²³.
    """

    version: Version
    relative_error: float


@dataclass(frozen=True)
class _Part:
    """A summand: a version, its weight, and a reader of its tensors."""

    version: Version
    weight: float
    read: Callable[[str], RawTensor]

    @property
    def manifest(self) -> AdapterManifest:
        return self.version.manifest


def compose(
    registry: Registry,
    expression: str,
    name: str,
    *,
    method: str,
    rank: int | None,
    device: str,
    tags: Iterable[str],
    note: str | None,
) -> Composed:
    """See ``Registry.compose``."""
    check_name(name)
    wanted = [check_tag(tag) for tag in tags]
    if method not in METHODS:
        raise UsageError(f"{method!r} is not a method: expected one of {', '.join(METHODS)}.")
    if (method == "svd") != (rank is not None):
        raise UsageError("--rank goes with --method svd, and svd needs it: say to what rank to truncate.")
    parts = [_part(registry, registry.resolve(t.reference), t.weight) for t in parse_expression(expression)]
    parts = sorted((p for p in parts if p.weight != 0), key=lambda p: (p.version.digest, p.weight))
    if not parts:
        raise UsageError(f"{expression!r} has no term of a weight other than 0: there is nothing to compose.")
    same_base([(str(part.version), part.manifest) for part in parts])
    package = Package()
    modules = {path: _module(path, parts, package) for path in _paths(parts)}
    full = _full(parts, package)
    error = 0.0
    if rank is not None:
        modules, error = _truncated(modules, package, rank, choose_device(device))
    provenance = _provenance(parts, method, rank)
    manifest, blobs = package.finish(_base(parts), modules, full, None, provenance, _ties(parts))
    return Composed(registry.commit_version(name, manifest, blobs, wanted, note), error)


def _part(registry: Registry, version: Version, weight: float) -> _Part:
    return _Part(version, weight, tensor_reader(registry.storage, version.manifest))


def _paths(parts: Sequence[_Part]) -> list[str]:
    """Every adapted module. One tensor under two paths would be adapted twice: refused."""
    owner: dict[str, str] = {}
    for part in parts:
        for path, module in part.manifest.modules.items():
            first = owner.setdefault(module.tensor, path)
            if first != path:
                raise Unsupported(
                    f"{module.tensor!r} is called {first!r} by one adapter and {path!r} by {part.version}."
                )
    return sorted(owner.values())


def _module(path: str, parts: Sequence[_Part], package: Package) -> Module:
    """The terms of all parts side by side: rank concatenation, with nothing folded and nothing rounded."""
    found = [(part, part.manifest.modules[path]) for part in parts if path in part.manifest.modules]
    first = found[0][1]
    terms: list[tuple[_Part, list[str], LowRankTerm | FormTerm]] = []
    biases: list[tuple[_Part, list[str], BiasTerm | FormTerm]] = []
    for part, module in found:
        if (module.shape, module.view, module.orientation) != (first.shape, first.view, first.orientation):
            raise Unsupported(f"{path!r} has shape {first.shape} in one adapter and {module.shape} in another.")
        terms += ((part, name, term) for name, term in _with_names(path, module.terms))
        biases += ((part, name, term) for name, term in _with_names(path, module.bias_terms))
    composed = replace(
        first,
        terms=tuple(term.scaled(part.weight) for part, _, term in terms),
        bias_tensor=next((module.bias_tensor for _, module in found if module.bias_tensor), None),
        bias_terms=tuple(term.scaled(part.weight) for part, _, term in biases),
    )
    raws = (part.read(f"factors:{name}") for part, names, _ in (*terms, *biases) for name in names)
    for (name, _), raw in zip(composed.tensors(path), raws, strict=True):
        package.factors[name] = raw
    return composed


def _with_names(path: str, terms: Iterable[_T]) -> Iterator[tuple[list[str], _T]]:
    """Each term with the names of its tensors in the factors blob of its own version."""
    for index, term in enumerate(terms):
        yield [name for name, _ in term.named(path, index)], term


def _full(parts: Sequence[_Part], package: Package) -> dict[str, FullTensor]:
    full: dict[str, FullTensor] = {}
    for part in parts:
        for name, tensor in part.manifest.replaced().items():
            if name in full or part.weight != 1:
                raise Unsupported(
                    f"{part.version} replaces {name!r}: a replaced tensor can be composed only at weight 1 and from "
                    "one adapter, as its difference to the base is not in the adapter; merge the expression instead."
                )
            full[name] = package.full(part.read(f"full:{name}"), tensor.module)
    return full


def _truncated(
    modules: dict[str, Module], package: Package, rank: int, device: torch.device
) -> tuple[dict[str, Module], float]:
    """Each module's terms as one of at most ``rank``; and the relative error over all modules together."""
    result = {}
    lost = whole = 0.0
    for path, module in modules.items():
        if not module.plain or len(module.view) != 2:
            raise Unsupported(
                f"{path!r} is adapted by more than plain LoRA, and has no factors to truncate: merge the expression."
            )
        raws = {name: package.factors.pop(name) for name, _ in module.tensors(path)}
        deltas = [
            LowRank(
                tensor_of(raws[f"{path}.lora_B.{index}"]).to(device),
                tensor_of(raws[f"{path}.lora_A.{index}"]).to(device),
                term.scale,
            )
            for index, term in enumerate(module.terms)
        ]
        combined = svd([(1.0, delta) for delta in deltas], rank=rank)
        lost += (combined.relative_error * combined.norm) ** 2
        whole += combined.norm**2
        (delta,) = combined.low_rank
        A = raw_of(f"{path}.lora_A.0", delta.right.to(torch.float32).cpu())
        B = raw_of(f"{path}.lora_B.0", delta.left.to(torch.float32).cpu())
        term = LowRankTerm(delta.rank, None, delta.scale, reference(A), reference(B))
        result[path] = replace(module, terms=(term,))
        package.factors.update({A.key: A, B.key: B})
        package.factors.update({name: raw for name, raw in raws.items() if ".lora_bias." in name})
    return result, (lost / whole) ** 0.5 if whole else 0.0


def _base(parts: Sequence[_Part]) -> BaseReference:
    first = parts[0].manifest.base
    touched: dict[str, Digest] = {}
    for part in parts:
        touched.update(part.manifest.base.touched)
    return replace(first, touched=touched)


def _ties(parts: Sequence[_Part]) -> dict[str, Tie]:
    """Tied tensors of all parts. One that some untie and others change as one has no form as one adapter."""
    ties: dict[str, Tie] = {}
    for part in parts:
        for name, tie in part.manifest.ties.items():
            if ties.setdefault(name, tie) != tie:
                raise Unsupported(
                    f"{part.version} takes {name!r} as tied to {tie.to!r} and another adapter does not: merge the "
                    "expression instead."
                )
    return ties


def _provenance(parts: Sequence[_Part], method: str, rank: int | None) -> Provenance:
    parameters: dict[str, Any] = {} if rank is None else {"rank": rank}
    terms = [(part.version.digest, part.weight) for part in parts]
    recipe = replace(
        Recipe.of(parts[0].manifest.base.identity.weights_root, terms),
        method=method,
        parameters=parameters,
        arithmetic=EXACT if method == "linear" else LAPACK,
    )
    licenses = {part.manifest.provenance.license for part in parts}
    return Provenance(
        parents=tuple(sorted({part.version.digest for part in parts})),
        recipe=recipe,
        license=licenses.pop() if len(licenses) == 1 else None,
    )
