"""Resizing: a version truncated to another rank, and what that cost each of its modules."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from loreg.algebra.delta import LowRank
from loreg.algebra.truncate import spectrum, stacked, triangle
from loreg.errors import UsageError
from loreg.format import methods
from loreg.registry.building import factors
from loreg.registry.composing import compose
from loreg.registry.core import Registry
from loreg.registry.merging import adapter_input, choose_device
from loreg.registry.versions import Version


@dataclass(frozen=True, slots=True)
class ResizedModule:
    """A module's rank before and after, and ‖ΔW - ΔW'‖/‖ΔW‖ in the Frobenius norm, of what is stored."""

    path: str
    before: int
    after: int
    relative_error: float


@dataclass(frozen=True, slots=True)
class Resized:
    """A resized version. ``relative_error``: as of a module, over all of them."""

    version: Version
    relative_error: float
    modules: tuple[ResizedModule, ...]


def resize(
    registry: Registry,
    reference: str,
    name: str | None,
    *,
    rank: int | None = None,
    energy: float | None = None,
    device: str = "cpu",
    tags: Iterable[str] = (),
    note: str | None = None,
) -> Resized:
    """Store what ``compose`` with ``svd`` makes of one version as a version of ``name``, by default of its own.

    ``rank`` bounds the rank of every module; ``energy`` in (0, 1] asks for the least that keeps that share of its
    square norm; with both, the smaller rank holds. A rank above a module's own changes the factors, not the product.
    Raises UsageError without either, or for a version without modules; Unsupported for a module that is no product
    of factors, such as DoRA; NotFound.
    """
    given = {key: value for key, value in (("rank", rank), ("energy", energy)) if value is not None}
    methods.parameters("svd", given)
    before = registry.resolve(reference)
    if not before.manifest.modules:
        raise UsageError(f"{before} only replaces tensors, and has no factors to resize: expected one with modules.")
    expression = f"{before.name}@{before.digest}"
    composed = compose(
        registry,
        expression,
        name or before.name,
        method="svd",
        parameters=given,
        device=device,
        tags=tags,
        note=note,
    )
    old, new = (adapter_input(registry, version, 1.0) for version in (before, composed.version))
    target = choose_device(device)
    modules, lost, total = [], 0.0, 0.0
    for path, module in old.manifest.modules.items():
        was, made = factors(old, path, target), factors(new, path, target)
        size, rest = _norm(was), _norm([*was, *(-delta for delta in made)])
        lost, total = math.hypot(lost, rest), math.hypot(total, size)
        after = new.manifest.modules[path].rank
        modules.append(ResizedModule(path, module.rank, after, rest / size if size else 0.0))
    return Resized(composed.version, lost / total if total else 0.0, tuple(modules))


def _norm(deltas: Sequence[LowRank]) -> float:
    """‖Σ c·B·A‖ in the Frobenius norm; where terms cancel, to 2⁻⁵² of their sizes."""
    left, right = stacked(deltas)
    return float(torch.linalg.vector_norm(spectrum(triangle(left), triangle(right.T)).sigma))
