"""``load``: the factors of a version as tensors on a device, for engines that batch unmerged adapters."""

from __future__ import annotations

import torch

from loreg.algebra.delta import concatenate
from loreg.format.module import IN_OUT
from loreg.registry import Registry
from loreg.registry import open as open_registry
from loreg.registry.building import factors
from loreg.registry.inputs import adapter_input, choose_device


def load(
    reference: str,
    registry: Registry | None = None,
    *,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
) -> dict[str, tuple[torch.Tensor, torch.Tensor, float]]:
    """Module path → (A, B, scale): A (rank, in), B (out, rank), so that y += scale·B(Ax), whatever the layer.

    ``dtype`` None keeps the stored dtype, and the values are the stored ones. A composed module's terms come as
    one pair with scale 1, folded in float32 (see ``algebra.delta.concatenate`` for the bound). Raises NotFound,
    UsageError for a device, BadInput for a corrupt blob.
    """
    if registry is None:
        with open_registry() as opened:
            return load(reference, opened, device=device, dtype=dtype)
    target = choose_device(device)
    version = registry.resolve(reference)
    adapter = adapter_input(registry, version, 1.0)
    loaded = {}
    for path, module in version.manifest.modules.items():
        terms = factors(adapter, path, target)
        delta = terms[0] if len(terms) == 1 else concatenate(terms, torch.float32)
        # The algebra's orientation is the checkpoint's; an engine wants the layer's.
        A, B = (delta.left.mT, delta.right.mT) if module.orientation == IN_OUT else (delta.right, delta.left)
        loaded[path] = (
            A.to(target, dtype or A.dtype, copy=True).contiguous(),
            B.to(target, dtype or B.dtype, copy=True).contiguous(),
            delta.scale,
        )
    return loaded
