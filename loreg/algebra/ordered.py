"""Float64 arithmetic in a stated order, ``loreg-f64-1``: the same bits on every device, thread count and tiling.

A matrix product of a library sums in whatever order its blocking likes, and fuses where it can. Where a norm, a
threshold or a sign is taken of the result, another last bit is another model. So here each operation is an IEEE
operation on doubles, rounded on its own, and each sum has one order [A6]: a product's runs over the inner index
upwards, any other is folded in halves.
"""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK_ELEMENTS = 2**16  # 512 KiB of float64: accumulator and product stay in a core's cache
_DEVICE_BLOCK_ELEMENTS = 2**24


def product(left: Tensor, right: Tensor, scale: float = 1.0) -> Tensor:
    """Σ_k fl(fl(scale·left[…, k])·right[k, …]), from +0 on, k ascending, each addition rounded: float64.

    ``left`` is (…, m, r) and ``right`` (…, r, n), any floating dtypes, their leading dimensions equal. No
    multiplication is fused with an addition, so that CPU and CUDA agree.
    """
    left, right = scale * left.double(), right.double()
    out = torch.zeros(*left.shape[:-1], right.shape[-1], dtype=torch.float64, device=left.device)
    limit = _BLOCK_ELEMENTS if left.device.type == "cpu" else _DEVICE_BLOCK_ELEMENTS
    leading = out.shape[:-2].numel()
    rows = max(1, limit // max(1, leading * out.shape[-1]))
    for first in range(0, out.shape[-2], rows):
        block = out[..., first : first + rows, :]
        term = torch.empty_like(block)
        for k in range(left.shape[-1]):
            torch.mul(left[..., first : first + rows, k : k + 1], right[..., k : k + 1, :], out=term)
            block.add_(term)
    return out


def total(x: Tensor, dim: int) -> Tensor:
    """The sum of ``x`` (float64) over ``dim``, folded: element i takes in element i + ⌈n/2⌉, then n becomes ⌈n/2⌉.

    0 where there is no element. The error is at most ⌈log₂ n⌉·2⁻⁵³ of the sum of magnitudes.
    """
    n = x.shape[dim]
    if n == 0:
        return x.sum(dim)
    while n > 1:
        half = (n + 1) // 2
        kept, rest = x.narrow(dim, 0, half), x.narrow(dim, half, n - half)
        folded = kept.clone()
        folded.narrow(dim, 0, n - half).add_(rest)
        x, n = folded, half
    return x.select(dim, 0)


def dot(x: Tensor, y: Tensor) -> float:
    """The folded sum over all elements, row-major, of fl(x·y), both float64 of one shape."""
    return float(total(x.reshape(-1) * y.reshape(-1), 0))
