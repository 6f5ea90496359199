"""``load``: the factors of a version as tensors on a device, for engines that batch unmerged adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

import torch

from loreg.adapters.peft import patterns
from loreg.algebra.delta import LowRank, concatenate
from loreg.algebra.rounding import finite, round_to
from loreg.errors import BadInput, NotFound, Unsupported, UsageError
from loreg.format.manifest import AdapterManifest
from loreg.format.module import IN_OUT
from loreg.format.terms import FormTerm
from loreg.registry import Registry, Version
from loreg.registry.inputs import choose_device, low_rank
from loreg.serving import signals
from loreg.serving.defaults import default_registry
from loreg.serving.resolving import Resolver
from loreg.serving.twins import in_thread
from loreg.tensors import TORCH

_ROUNDED_ONCE = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""What torch converts to correctly from float32 or less: from float64 it would round twice, by way of float32."""


def load(
    reference: str,
    registry: Registry | None = None,
    *,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    modules: str | Sequence[str] | None = None,
) -> dict[str, tuple[torch.Tensor, torch.Tensor, float]]:
    """Module path → (A, B, scale): A (rank, in), B (out, rank), so that y += scale·B(Ax), whatever the layer.

    ``modules``: which, as PEFT's ``target_modules`` has them: a list of whole paths or of what paths end with after a
    dot (``q_proj``), or one regular expression for whole paths. None is all of the adapter, and refuses what three
    numbers cannot say; with names, only those are looked at.

    ``dtype`` None keeps the stored dtype, and the values are the stored ones; another has each value rounded once, to
    nearest even. On the CPU, with the stored dtype, the tensors are views of a private mapping of the verified blob:
    nothing is copied, what is written into one stays in this process, and they outlive the version's removal. (A blob
    file that is cut in place while they are in use ends the process; no store does that.) On a CUDA device they are
    read straight into it, by way of pinned memory. A composed module's terms come as one pair with scale 1, folded in
    float32 (see ``algebra.delta.concatenate`` for the bound).

    Raises NotFound, also for a module that the adapter does not have; UsageError for a device or an expression;
    Unsupported, naming it, for a module whose delta is no such product (DoRA, LoHa, convolutions, experts), a trained
    bias, a module whose weight another one follows (tied), and without ``modules`` for tensors that the adapter
    replaces; BadInput for a corrupt blob, or for a value that ``dtype`` does not hold.
    """
    registry = registry or default_registry()
    target = choose_device(device)
    loaded = {}
    with signals.default().time("load", device=target.type):
        version = Resolver.of(registry).version(reference)
        for path, terms in factors_of(registry, version, target, modules).items():
            delta = terms[0] if len(terms) == 1 else concatenate(terms, torch.float32)
            label = reference, path
            loaded[path] = _converted(delta.right, dtype, label), _converted(delta.left, dtype, label), delta.scale
    return loaded


load_async = in_thread(load)


def factors_of(
    registry: Registry, version: Version, device: torch.device, modules: str | Sequence[str] | None = None
) -> Mapping[str, tuple[LowRank, ...]]:
    """Module path → its deltas, ``left`` (out, rank) and ``right`` (rank, in) whatever the layer, as they are stored.

    Raises what ``load`` does.
    """
    manifest = version.manifest
    paths = _chosen(version, modules)
    tensors = {manifest.modules[path].tensor for path in paths}
    if replaced := sorted(name for name in manifest.replaced() if modules is None or name in tensors):
        raise _replaced(version, replaced)
    if strange := [path for path in paths if manifest.modules[path].stored is not None]:
        module = manifest.modules[strange[0]]
        raise Unsupported(
            f"{version} adapts {strange[0]!r}{_more(strange)}, {module.kind} of shape {list(module.shape)}, which is "
            "no matrix of a layer y = Wx: merge it, or name other modules (modules=[…])."
        )
    if biased := [path for path in paths if manifest.modules[path].bias_terms]:
        raise Unsupported(
            f"{version} has a trained bias at {biased[0]!r}{_more(biased)}, which is no product of two factors: "
            "merge it, serve it unmerged (serving.unmerged), or name other modules (modules=[…])."
        )
    for name, tie in manifest.ties.items():
        if not tie.untied and tie.to in tensors:
            path = next(path for path in paths if manifest.modules[path].tensor == tie.to)
            raise Unsupported(
                f"{version} adapts {path!r}, and with it {name!r}, which the model has tied to it: merge it, or "
                "serve it unmerged (serving.unmerged), which do both."
            )
    turned = {path for path in paths if manifest.modules[path].orientation == IN_OUT}
    return {
        # The algebra's orientation is the checkpoint's; an engine wants the layer's.
        path: tuple(delta.mT for delta in terms) if path in turned else terms
        for path, terms in low_rank(registry, version, device, paths)
    }


def nbytes_of(manifest: AdapterManifest, dtype: torch.dtype | None) -> int:
    """Of what ``load`` gives of all of it, before any of it is loaded."""
    total = 0
    for module in manifest.modules.values():
        for term in module.terms:
            for ref in term.tensors.values() if isinstance(term, FormTerm) else (term.A, term.B):
                stored = torch.float32 if len(module.terms) > 1 else TORCH[ref.dtype]
                total += prod(ref.shape) * (dtype or stored).itemsize
    return total


def _chosen(version: Version, modules: str | Sequence[str] | None) -> list[str]:
    """The paths of the modules that are asked for, in the manifest's order."""
    known = version.manifest.modules
    if modules is None:
        return list(known)
    if isinstance(modules, str):
        try:
            found = {path for path in known if patterns.fits(modules, path)}
        except BadInput as error:
            raise UsageError(f"modules: {error}") from error
        if not found:
            raise _no_module(version, f"that the expression {modules!r} matches as a whole")
        return [path for path in known if path in found]
    wanted: set[str] = set()
    for name in modules:
        found = {path for path in known if _is_called(path, name)}
        if not found:
            for tensor, full in version.manifest.full.items():
                if _is_called(full.module, name) or _is_called(full.module.rpartition(".")[0], name):
                    raise _replaced(version, [tensor])
            raise _no_module(version, f"{name!r}")
        wanted |= found
    return [path for path in known if path in wanted]


def _is_called(path: str, name: str) -> bool:
    return path == name or path.endswith(f".{name}")


def _replaced(version: Version, names: Sequence[str]) -> Unsupported:
    return Unsupported(
        f"{version} replaces {names[0]!r}{_more(names)} outright, which is no product of two factors: merge it, or "
        "name the modules that you want (modules=[…])."
    )


def _no_module(version: Version, what: str) -> NotFound:
    ends = version.manifest.targets
    there = ", ".join(ends[:12]) + (", …" if len(ends) > 12 else "")
    return NotFound(f"{version} has no module {what}: it has {len(version.manifest.modules)}, called {there or '-'}.")


def _more(names: Sequence[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def _converted(factor: torch.Tensor, dtype: torch.dtype | None, label: tuple[str, str]) -> torch.Tensor:
    """Contiguous, of ``dtype``, each value rounded once. ``label``: whose it is, and of which module."""
    if dtype is None or dtype == factor.dtype:
        return factor.contiguous()
    once = dtype in _ROUNDED_ONCE and (factor.dtype != torch.float64 or dtype == torch.float32)
    made = factor.to(dtype) if once else round_to(factor.double(), dtype)
    if dtype.itemsize <= factor.dtype.itemsize and not bool(finite(made).all()):
        reference, path = label
        raise BadInput(
            f"{reference}: {path!r} has a value that {dtype} cannot hold: load it with the dtype that is stored."
        )
    return made.contiguous()
