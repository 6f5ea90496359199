"""Resizing: a version truncated to another rank, and what that cost each of its modules."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from loreg.errors import UsageError
from loreg.format import methods
from loreg.registry.composing import compose
from loreg.registry.core import Registry
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
    """See ``Registry.resize``."""
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
    old, new = before.manifest.modules, composed.version.manifest.modules
    modules = tuple(ResizedModule(path, old[path].rank, new[path].rank, composed.modules[path]) for path in old)
    return Resized(composed.version, composed.relative_error, modules)
