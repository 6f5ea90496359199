"""Composing: a weighted sum of versions, stored as a version of its own."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from threading import Lock
from typing import Any

import torch

from loreg.checkpoint import StoredTensor
from loreg.digest import Digest
from loreg.errors import BadInput, BaseMismatch, NotFound, Unsupported, UsageError
from loreg.format import methods
from loreg.format.base import BaseReference
from loreg.format.fingerprint import BaseTensor
from loreg.format.manifest import AdapterManifest, Provenance, Tie
from loreg.format.module import IN_OUT, OUT_IN, FullTensor, Module
from loreg.format.recipe import DTYPES, Recipe
from loreg.format.reference import check_name, check_tag, format_weight
from loreg.format.terms import FormTerm
from loreg.merge.combining import Combining, arithmetic_of
from loreg.merge.workers import results, workers
from loreg.registry.bases import check_files
from loreg.registry.building import MERGE, Builder, Built, Factored, Part, SideBySide, Truncating
from loreg.registry.core import Registry, silent
from loreg.registry.exporting import tensor_reader
from loreg.registry.inputs import adapter_input, choose_device, resolved
from loreg.registry.packing import Package, reference
from loreg.registry.room import Room
from loreg.registry.spill import spilling
from loreg.registry.storage import PendingBlob
from loreg.registry.versions import Version


@dataclass(frozen=True, slots=True)
class Composed:
    """A composed version, the full name of the method, and how far the version is from what that gives.

    ``relative_error``: ‖result - stored‖/‖result‖ over the weights of all modules (Frobenius), result being what the
    method gives without truncation, in float64. 0 for ``linear``, which loses nothing; else what was cut off, of
    singular values or of dense deltas, and what rounding to float32 changes, measured on the factors as they are
    stored: where terms cancel, that is much. ``modules``: the same of each module, by path.
    """

    version: Version
    method: str
    relative_error: float
    modules: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Combination:
    """A composition that is not stored yet. ``blobs``: all that it needs, its manifest last; good within
    :func:`combination` only."""

    name: str
    method: str
    manifest: AdapterManifest
    blobs: Sequence[PendingBlob]
    built: Mapping[str, Built]

    @property
    def relative_error(self) -> float:
        """See :class:`Composed`."""
        norm, lost = (math.hypot(*sizes) for sizes in ([b.norm for b in self._built], [b.lost for b in self._built]))
        return lost / norm if norm else 0.0

    @property
    def _built(self) -> list[Built]:
        return list(self.built.values())

    def store(self, registry: Registry, tags: Iterable[str] = (), note: str | None = None) -> Composed:
        """As a version."""
        version = registry.commit_version(self.name, self.manifest, list(self.blobs), tags, note)
        errors = {path: built.lost / built.norm if built.norm else 0.0 for path, built in self.built.items()}
        return Composed(version, self.method, self.relative_error, errors)


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
    wanted = [check_tag(tag) for tag in tags]
    with combination(registry, expression, name, method=method, parameters=parameters, device=device) as made:
        return made.store(registry, wanted, note)


@contextmanager
def combination(
    registry: Registry, expression: str, name: str, *, method: str, parameters: Mapping[str, Any], device: str
) -> Iterator[Combination]:
    """What ``compose`` stores. Raises what that raises.

    As many threads as torch has, one module each and no torch threads inside, so that the last bits do not depend on
    their number. At any time they hold no more than twice the elements of the largest module, and factors that are
    made are on disk until the block ends.
    """
    check_name(name)
    full_name, row = methods.method(method)
    given = methods.parameters(full_name, parameters, truncated=row.space == "dense")
    target = choose_device(device)
    parts = [part_of(registry, version, weight) for version, weight in resolved(registry, expression)]
    parts = sorted((p for p in parts if p.weight != 0), key=lambda p: (p.input.digest, format_weight(p.weight)))
    if not parts:
        raise UsageError(f"{expression!r} has no term of a weight other than 0: there is nothing to compose.")
    methods.check_count(full_name, given, len(parts))
    base = common_base(registry, parts)
    with spilling(registry.home / "tmp") as spill:
        package = Package(spill=spill)
        builder = _builder(registry, base, parts, package, full_name, given, target)
        built = _build(builder, parts, target)
        modules = {path: each.module for path, each in built.items()}
        known = registry.bases.of_root(base.identity.weights_root, base.name)
        full = _replaced(parts, package, modules, full_name, known.manifest.by_name() if known else {})
        provenance = _provenance(base, parts, full_name, given)
        manifest, blobs = package.finish(base, modules, full, None, provenance, _ties(parts))
        yield Combination(name, full_name, manifest, blobs, built)


def _builder(
    registry: Registry,
    base: BaseReference,
    parts: Sequence[Part],
    package: Package,
    method: str,
    parameters: Mapping[str, Any],
    device: torch.device,
) -> Builder:
    row = methods.METHODS[method]
    if row.keeps_terms:
        return SideBySide(parts, package)
    if row.composes_only:
        return Factored(parts, package, method, parameters, device)
    combining = Combining(tuple(part.input for part in parts), method, parameters)
    return Truncating(parts, package, combining, device, BaseTensors(registry, base))


def _build(builder: Builder, parts: Sequence[Part], device: torch.device) -> dict[str, Built]:
    """Every adapted module, in the order of paths."""
    sizes = {path: size for part in parts for path, size in _sizes(part.manifest)}
    room = Room(2 * max(sizes.values(), default=0))
    paths = _paths(parts)
    with workers(device) as pool:
        jobs = [partial(_built, builder, path, room, sizes[path]) for path in paths]
        return dict(zip(paths, results(pool, jobs), strict=True))


def _sizes(manifest: AdapterManifest) -> Iterator[tuple[str, int]]:
    """The number of elements of each adapted weight."""
    return ((path, math.prod(module.shape)) for path, module in manifest.modules.items())


@torch.no_grad()
def _built(builder: Builder, path: str, room: Room, size: int) -> Built:
    try:
        with room.of(size):
            return builder.module(path)
    except (BadInput, UsageError) as error:
        if repr(path) in str(error):
            raise
        raise type(error)(f"Module {path!r}: {error}") from error


def part_of(registry: Registry, version: Version, weight: float) -> Part:
    """A version as a summand."""
    return Part(adapter_input(registry, version, weight), tensor_reader(registry.storage, version.manifest))


class BaseTensors:
    """Tensors of the base that the parts were trained on; its files are looked for when the first is asked for."""

    def __init__(self, registry: Registry, reference: BaseReference) -> None:
        self._registry, self._reference, self._lock = registry, reference, Lock()

    @cached_property
    def _tensors(self) -> Mapping[str, StoredTensor]:
        reference = self._reference
        base = self._registry.bases.of_root(reference.identity.weights_root, reference.name)
        if base is None:
            raise NotFound(
                f"An adapter changes weights in a way that depends on their values, and base {reference.name!r} is "
                "not registered here: add it with 'loreg base add'."
            )
        checkpoint = base.open()
        check_files(base, checkpoint, self._registry.bases.cache, silent)
        return checkpoint.tensors

    def __call__(self, name: str) -> StoredTensor:
        with self._lock:
            tensors = self._tensors
        if name not in tensors:
            raise Unsupported(
                f"{name!r} is tied in the base and not stored there, and an adapter changes it in a way that depends "
                "on its values: merge the expression by the same method, or compose it by linear."
            )
        return tensors[name]


def _paths(parts: Sequence[Part]) -> list[str]:
    """Every adapted module. One tensor under two paths would be adapted twice: refused."""
    owner: dict[str, str] = {}
    for part in parts:
        for path, module in part.manifest.modules.items():
            first = owner.setdefault(module.tensor, path)
            if first != path:
                raise Unsupported(
                    f"{module.tensor!r} is called {first!r} by one adapter and {path!r} by {part.input.label}: "
                    f"expected one name, as it would be adapted twice; {MERGE}."
                )
    return sorted(owner.values())


def _replaced(
    parts: Sequence[Part],
    package: Package,
    modules: dict[str, Module],
    method: str,
    known: Mapping[str, BaseTensor],
) -> dict[str, FullTensor]:
    """What of the parts replaces a tensor: as it is, where one alone does, at weight 1, and nothing else happens to
    the tensor; else a term of a module, which at weight w adds w·(R - W). ``modules`` gets these.

    ``known``: the base's tensors, if the base is registered here.
    """
    full: dict[str, FullTensor] = {}
    for part in parts:
        for name, tensor in part.manifest.replaced().items():
            if not methods.METHODS[method].sums:
                raise Unsupported(
                    f"{part.input.label} replaces {name!r}, and what {method} makes of that is no adapter: expected "
                    f"{', '.join(methods.SUMS)}; use one of these, or {MERGE}."
                )
            others = [p for p in parts if p is not part and name in changed(p.manifest)]
            if part.weight == 1 and not others:
                full[name] = package.full(part.read(f"full:{name}"), tensor.module)
                continue
            _check_mixable(part, name, known.get(name))
            path, module = _module_of(name, tensor, modules)
            modules[path] = _with_replacement(module, name, part, package)
    return full


def changed(manifest: AdapterManifest) -> set[str]:
    """The tensors of the checkpoint that an adapter changes."""
    weights = {module.tensor for module in manifest.modules.values()}
    return weights | {m.bias_tensor for m in manifest.modules.values() if m.bias_tensor} | set(manifest.replaced())


def _check_mixable(part: Part, name: str, stored: BaseTensor | None) -> None:
    if stored is not None and stored.shape != part.manifest.full[name].value.shape:
        raise Unsupported(f"{part.input.label} resizes {name!r}: only one adapter can, at weight 1.")
    if name not in part.manifest.base.touched:
        raise Unsupported(
            f"{part.input.label} adds {name!r}, which its base does not have: only one can, at weight 1."
        )
    dtype = part.manifest.full[name].value.dtype
    if dtype not in (*DTYPES, "F64"):
        raise Unsupported(
            f"{part.input.label} replaces {name!r}, which is {dtype}, and has no fractions: only one adapter "
            "can, at weight 1."
        )
    own = (module for module in part.manifest.modules.values() if name in (module.tensor, module.bias_tensor))
    if any(not module.plain for module in own):
        raise Unsupported(
            f"{part.input.label} replaces {name!r} and adapts what it put there, which at another weight, or beside "
            f"another adapter, is no sum: {MERGE}."
        )


def _module_of(name: str, tensor: FullTensor, modules: Mapping[str, Module]) -> tuple[str, Module]:
    """The composed module that has the tensor as its weight or bias; a new one without terms if there is none."""
    for path, module in modules.items():
        if name in (module.tensor, module.bias_tensor):
            return path, module
    shape = tensor.value.shape
    kind = {1: "vector", 2: "linear"}.get(len(shape), "conv")
    path = name.removesuffix(".weight") if name.removesuffix(".weight") not in modules else name
    stored = None if kind == "linear" else shape
    return path, Module(name, kind, OUT_IN, math.prod(shape[1:]), shape[0], (), stored=stored)


def _with_replacement(module: Module, name: str, part: Part, package: Package) -> Module:
    raw = part.read(f"full:{name}")
    value, bias = reference(raw), name == module.bias_tensor
    turned = not bias and module.orientation == IN_OUT
    term = FormTerm("replaced", 0, None, 1.0, part.weight, {"value": value}, {"turned": turned})
    package.put(value.content_name, raw)
    if bias:
        return replace(module, bias_terms=(*module.bias_terms, term))
    return replace(module, terms=(*module.terms, term))


def common_base(registry: Registry, parts: Sequence[Part]) -> BaseReference:
    """The base of a composition, with all tensors that the parts touch: theirs, if they have one root; else one of
    theirs that is registered here and has every tensor as each of them names it. Raises BaseMismatch."""
    touched: dict[str, Digest] = {}
    for part in parts:
        for name, leaf in part.manifest.base.touched.items():
            if touched.setdefault(name, leaf) != leaf:
                raise BaseMismatch(
                    f"{part.input.label} was trained on another base than the other adapters: they differ in "
                    f"{name!r}; compose adapters of one base."
                )
    references = {part.manifest.base.identity.weights_root: part.manifest.base for part in parts}
    if len(references) == 1:
        return replace(parts[0].manifest.base, touched=touched)
    for root, found in sorted(references.items()):
        known = registry.bases.of_root(root, found.name)
        leaves = {tensor.name: tensor.leaf for tensor in known.manifest.tensors} if known else {}
        if all(leaves.get(name) == leaf for name, leaf in touched.items()):
            return replace(found, touched=touched)
    named = ", ".join(sorted(f"{found.name!r} ({root})" for root, found in references.items()))
    raise BaseMismatch(
        f"The adapters were trained on {named}, and none of these has the tensors of all of them, as far as they are "
        "registered here: compose adapters of one base."
    )


def _ties(parts: Sequence[Part]) -> dict[str, Tie]:
    """Tied tensors of all parts. One that some untie and others change as one has no form as one adapter."""
    ties: dict[str, Tie] = {}
    for part in parts:
        for name, tie in part.manifest.ties.items():
            if ties.setdefault(name, tie) != tie:
                raise Unsupported(
                    f"{part.input.label} takes {name!r} as {_tied(tie)}, and another adapter as {_tied(ties[name])}: "
                    f"expected one of these of all; {MERGE}."
                )
    return ties


def _tied(tie: Tie) -> str:
    return f"{'untied from' if tie.untied else 'tied to'} {tie.to!r}"


def _provenance(base: BaseReference, parts: Sequence[Part], method: str, parameters: Mapping[str, Any]) -> Provenance:
    dense = methods.METHODS[method].space == "dense"
    recipe = Recipe.of(
        base.identity.weights_root,
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
