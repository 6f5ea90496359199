"""What an expression or a recipe names, as inputs of a computation: versions with weights, and their tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial

import torch

from loreg.algebra.delta import LowRank, concatenate
from loreg.errors import NotFound, UsageError
from loreg.format.recipe import Recipe
from loreg.format.reference import Reference, parse_expression
from loreg.merge.blobs import MappedBlob, StreamedBlob, content_of
from loreg.merge.inputs import AdapterInput
from loreg.registry.core import Registry
from loreg.registry.versions import Version


def choose_device(name: str) -> torch.device:
    """A torch device that can be computed on. Raises UsageError for another, NotFound for one that is not here."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"{name!r} is not a device: expected 'cpu', 'cuda' or 'cuda:N'.") from error
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"{name!r} is not handled: float64 arithmetic needs 'cpu' or 'cuda'.")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise NotFound(f"{name!r} is not here: torch finds no CUDA device; use --device cpu.")
    return device


def adapter_input(registry: Registry, version: Version, weight: float) -> AdapterInput:
    """A version with local, verified files for all its tensors."""
    wanted = [blob.digest for blob in version.manifest.blobs if blob.role != "source"]
    blobs = {digest: registry.storage.path(digest) for digest in wanted}
    return AdapterInput(str(version), weight, version.digest, version.manifest, blobs)


def resolved(registry: Registry, expression: str) -> list[tuple[Version, float]]:
    """The versions of an expression with their weights, in the order written. Raises NotFound, UsageError."""
    found = []
    for term in parse_expression(expression):
        try:
            version = registry.resolve(term.reference)
        except NotFound as error:
            raise _as_difference(registry, term.reference) or error from None
        found.append((version, term.weight))
    return found


def _as_difference(registry: Registry, reference: Reference) -> NotFound | None:
    """Advice for a name that nothing has and that looks like a difference of two: ``-`` may be part of a name."""
    text = str(reference)
    with suppress(NotFound, UsageError):
        registry.tags(reference.name or "")
        return None
    for place in (index for index, sign in enumerate(text) if sign == "-"):
        with suppress(NotFound, UsageError):
            first, second = (registry.find(part).name for part in (text[:place], text[place + 1 :]))
            return NotFound(
                f"no adapter is called {text!r}, but {first!r} and {second!r} are: to subtract, put spaces around "
                f"the sign, as in '{text[:place]} - {text[place + 1 :]}'."
            )
    return None


def resolve_terms(registry: Registry, expression: str) -> list[AdapterInput]:
    """The adapters of an expression, in the order written."""
    return [adapter_input(registry, version, weight) for version, weight in resolved(registry, expression)]


def recipe_inputs(registry: Registry, recipe: Recipe) -> list[AdapterInput]:
    """The adapters of a recipe, by digest. Raises NotFound if one is not in the store."""
    return [adapter_input(registry, registry.resolve(str(term.adapter)), term.value) for term in recipe.terms]


def verified(adapter: AdapterInput, device: torch.device) -> AdapterInput:
    """The same, its factors brought by ``merge.blobs``: on a CPU as views of a blob, else streamed to ``device``."""
    blob = adapter.manifest.blob("factors")
    if blob is None:
        return adapter
    content = content_of(blob.digest)
    if device.type == "cpu":
        return replace(adapter, open_factors=partial(MappedBlob, content=content))
    return replace(adapter, open_factors=partial(StreamedBlob, content=content, device=device))


def low_rank(
    registry: Registry, version: Version, device: torch.device, paths: Iterable[str]
) -> Iterator[tuple[str, tuple[LowRank, ...]]]:
    """The deltas of the modules at ``paths``, each as the terms that are stored, in the order given; on a CPU as
    views of the factors blob (``merge.blobs.MappedBlob``), verified. Raises NotFound, BadInput; Unsupported for a
    module that is no sum of products of two matrices."""
    from loreg.registry.building import factors

    blob = version.manifest.blob("factors")
    if blob is None:
        return
    blobs = {blob.digest: registry.storage.path(blob.digest)}
    adapter = verified(AdapterInput(str(version), 1.0, version.digest, version.manifest, blobs), device)
    paths = list(paths)
    plain = adapter.plain(paths, device)
    for path in paths:
        yield path, plain[path] if path in plain else factors(adapter, path, device)
    adapter.check_unchanged()


def load(registry: Registry, version: Version, device: str) -> dict[str, LowRank]:
    """See ``Registry.load``."""
    found = low_rank(registry, version, choose_device(device), version.manifest.modules)
    return {path: terms[0] if len(terms) == 1 else concatenate(terms, torch.float64) for path, terms in found}
