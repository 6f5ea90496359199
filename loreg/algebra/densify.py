"""A weighted sum as one dense matrix, under ``loreg-f64-1``: for what needs the sum itself before it is rounded.

A norm, a sign or a threshold is taken of these numbers, so each has one order of operations [A6].
"""

from __future__ import annotations

import torch
from torch import Tensor

from loreg.algebra.edits import WeightedSum
from loreg.algebra.ordered import product
from loreg.errors import UsageError

_BLOCK_ELEMENTS = 2**20  # 8 MiB of float64: what is needed beside the result


@torch.no_grad()
def dense_delta(edit: WeightedSum) -> Tensor:
    """The sum of the terms of ``edit``, of its shape, float64, on its device.

    Each element starts at +0. Then each low-rank term in the order of ``edit.low_rank`` adds its element of
    ``ordered.product(left, right, scale)``, itself summed from +0 over the inner index upwards; then each dense
    term in its order adds fl(scale·value). Each operation is rounded on its own. For shapes (n,), (out, in) and
    (E, out, in); one copy of the result and about 30 MiB.

    Raises UsageError for an edit that has no term and so no shape.
    """
    if edit.shape is None:
        raise UsageError("an edit without terms has no shape: there is no matrix to make of it.")
    first = edit.low_rank[0].left if edit.low_rank else edit.dense[0].value
    out = torch.zeros(edit.shape, dtype=torch.float64, device=first.device)
    for low_rank in edit.low_rank:
        rows = max(1, _BLOCK_ELEMENTS * out.shape[-2] // max(1, out.numel()))
        for start in range(0, out.shape[-2], rows):
            left = low_rank.left[..., start : start + rows, :]
            out[..., start : start + rows, :] += product(left, low_rank.right, low_rank.scale)
    for dense in edit.dense:
        rows = max(1, _BLOCK_ELEMENTS * len(out) // max(1, out.numel()))
        for start in range(0, len(out), rows):
            out[start : start + rows] += dense.scale * dense.value[start : start + rows].double()
    return out
