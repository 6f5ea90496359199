"""Composing: a weighted sum of versions, stored as a version of its own."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from loreg.checkpoint import StoredTensor
from loreg.digest import Digest
from loreg.errors import BadInput, NotFound, Unsupported, UsageError
from loreg.format import methods
from loreg.format.base import BaseReference
from loreg.format.manifest import Provenance, Tie
from loreg.format.module import FullTensor, Module
from loreg.format.recipe import Recipe
from loreg.format.reference import check_name, check_tag, format_weight, parse_expression
from loreg.merge.combining import Combining, arithmetic_of
from loreg.registry.bases import check_files
from loreg.registry.building import Builder, Factored, Part, SideBySide, Truncating
from loreg.registry.core import Registry, Version, silent
from loreg.registry.exporting import tensor_reader
from loreg.registry.merging import adapter_input, choose_device, same_base
from loreg.registry.packing import Package

_SUMS = ("linear", "cat", "svd")
"""Methods for which a replaced tensor is what it is: the others make something else of its difference to the base."""


@dataclass(frozen=True, slots=True)
class Composed:
    """A composed version, the full name of the method, and how far the version is from what that gives.

    ``relative_error``: ‖result - stored‖/‖result‖ over the weights of all modules (Frobenius). 0 for ``linear``,
    which loses nothing; else what truncation to a rank threw away, exactly, to which storing the factors in
    float32 adds at most 2⁻²³.
    """

    version: Version
    method: str
    relative_error: float


def compose(
    registry: Registry,
    expression: str,
    name: str,
    *,
    method: str,
    parameters: Mapping[str, Any],
    device: str,
    tags: Iterable[str] = (),
    note: str | None = None,
) -> Composed:
    """See ``Registry.compose``."""
    check_name(name)
    wanted = [check_tag(tag) for tag in tags]
    full_name, row = methods.method(method)
    dense = row.space == "dense"
    given = methods.parameters(full_name, parameters, truncated=dense)
    target = choose_device(device)
    parts = [part_of(registry, registry.resolve(t.reference), t.weight) for t in parse_expression(expression)]
    parts = sorted((p for p in parts if p.weight != 0), key=lambda p: (p.input.digest, format_weight(p.weight)))
    if not parts:
        raise UsageError(f"{expression!r} has no term of a weight other than 0: there is nothing to compose.")
    methods.check_count(full_name, given, len(parts))
    same_base([(part.input.label, part.manifest) for part in parts])
    package = Package()
    builder: Builder
    if full_name == "linear":
        builder = SideBySide(parts, package)
    elif dense:
        combining = Combining(tuple(part.input for part in parts), full_name, given)
        builder = Truncating(parts, package, combining, target, BaseTensors(registry, parts))
    else:
        builder = Factored(parts, package, full_name, given, target)
    modules = {path: _built(builder, path) for path in _paths(parts)}
    full = _full(parts, package, full_name)
    provenance = _provenance(parts, full_name, given)
    manifest, blobs = package.finish(_base(parts), modules, full, None, provenance, _ties(parts))
    error = math.sqrt(builder.error / builder.total) if builder.total else 0.0
    return Composed(registry.commit_version(name, manifest, blobs, wanted, note), full_name, error)


def _built(builder: Builder, path: str) -> Module:
    try:
        return builder.module(path)
    except (BadInput, UsageError) as error:
        raise type(error)(f"Module {path!r}: {error}") from error


def part_of(registry: Registry, version: Version, weight: float) -> Part:
    """A version as a summand."""
    return Part(adapter_input(registry, version, weight), tensor_reader(registry.storage, version.manifest))


class BaseTensors:
    """Tensors of the base that the parts were trained on; its files are looked for when the first is asked for."""

    def __init__(self, registry: Registry, parts: Sequence[Part]) -> None:
        self._registry, self._parts = registry, parts

    @cached_property
    def _tensors(self) -> Mapping[str, StoredTensor]:
        reference = self._parts[0].manifest.base
        base = self._registry.bases.of_root(reference.identity.weights_root, reference.name)
        if base is None:
            raise NotFound(
                f"{self._parts[0].input.label} changes weights in a way that depends on their values, and base "
                f"{reference.name!r} is not registered here: add it with 'loreg base add'."
            )
        checkpoint = base.open()
        check_files(base, checkpoint, self._registry.bases.cache, silent)
        return checkpoint.tensors

    def __call__(self, name: str) -> StoredTensor:
        if name not in self._tensors:
            raise Unsupported(f"{name!r} is tied in the base and not stored there: merge the expression instead.")
        return self._tensors[name]


def _paths(parts: Sequence[Part]) -> list[str]:
    """Every adapted module. One tensor under two paths would be adapted twice: refused."""
    owner: dict[str, str] = {}
    for part in parts:
        for path, module in part.manifest.modules.items():
            first = owner.setdefault(module.tensor, path)
            if first != path:
                raise Unsupported(
                    f"{module.tensor!r} is called {first!r} by one adapter and {path!r} by {part.input.label}."
                )
    return sorted(owner.values())


def _full(parts: Sequence[Part], package: Package, method: str) -> dict[str, FullTensor]:
    full: dict[str, FullTensor] = {}
    for part in parts:
        for name, tensor in part.manifest.replaced().items():
            if method not in _SUMS:
                raise Unsupported(
                    f"{part.input.label} replaces {name!r}, which {method} cannot make an adapter of: merge the "
                    "expression instead."
                )
            if name in full or part.weight != 1:
                raise Unsupported(
                    f"{part.input.label} replaces {name!r}: a replaced tensor can be composed only at weight 1 and "
                    "from one adapter, as its difference to the base is not in the adapter; merge the expression."
                )
            full[name] = package.full(part.read(f"full:{name}"), tensor.module)
    return full


def _base(parts: Sequence[Part]) -> BaseReference:
    first = parts[0].manifest.base
    touched: dict[str, Digest] = {}
    for part in parts:
        touched.update(part.manifest.base.touched)
    return replace(first, touched=touched)


def _ties(parts: Sequence[Part]) -> dict[str, Tie]:
    """Tied tensors of all parts. One that some untie and others change as one has no form as one adapter."""
    ties: dict[str, Tie] = {}
    for part in parts:
        for name, tie in part.manifest.ties.items():
            if ties.setdefault(name, tie) != tie:
                raise Unsupported(
                    f"{part.input.label} takes {name!r} as tied to {tie.to!r}, and another adapter does not: merge "
                    "the expression instead."
                )
    return ties


def _provenance(parts: Sequence[Part], method: str, parameters: Mapping[str, Any]) -> Provenance:
    dense = methods.METHODS[method].space == "dense"
    recipe = Recipe.of(
        parts[0].manifest.base.identity.weights_root,
        [(part.input.digest, part.weight) for part in parts],
        method=method,
        parameters=parameters,
        arithmetic=methods.LAPACK if dense else arithmetic_of(method, [part.manifest for part in parts]),
    )
    licenses = {part.manifest.provenance.license for part in parts}
    return Provenance(
        parents=tuple(sorted({part.input.digest for part in parts})),
        recipe=recipe,
        license=licenses.pop() if len(licenses) == 1 else None,
    )
