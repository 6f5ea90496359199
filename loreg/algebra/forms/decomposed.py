"""DoRA [F8]: a form's sum as a change of direction, with the norms stored apart (Liu et al. 2024, arXiv 2402.09353).

Under ``loreg-f64-1``, as it takes norms of the edited weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from loreg.algebra.delta import Dense
from loreg.algebra.densify import dense_delta
from loreg.algebra.edits import WeightedSum
from loreg.algebra.ordered import total
from loreg.algebra.roots import square_root
from loreg.errors import BadInput, Unsupported

_BLOCK_ELEMENTS = 2**20


@torch.no_grad()
def decompose(edit: WeightedSum, W: Tensor, magnitude: Tensor, axis: str, epsilon: float) -> WeightedSum:
    """W' = (m / (‖V‖ + ε))∘V with V = W + D, D the sum of ``edit``: eq. 5 of the paper.

    ``W`` is (out, in), as stored. ``magnitude``, any shape, holds n numbers, one per group of elements:
    ``axis`` "out": n = out, a group is a row; "in": n divides in, a group is the columns j with ⌊j·n/in⌋ = g.
    For n = in that is a column, else a convolution's input channel with all of its kernel.

    ========================================  ======  =============================================
    library                                   axis    ε
    ========================================  ======  =============================================
    PEFT 0.21, lora/dora.py: Linear, Conv1D,  "out"   0
    Conv1d to 3d, Embedding (its d numbers)
    LyCORIS 4.1.3, `weight_decompose` of      "out"   added, `finfo(dtype of dora_scale).eps`
    functional/general.py, wd_on_out
    the same without wd_on_out                "in"    the same; `dora_scale` is (1, in, 1…)
    LyCORIS 2, and `apply_dora_scale`         "in"    0
    ========================================  ======  =============================================

    The paper's norm "of columns" is that of rows here, as it writes the weight (in, out). The bias is left as it
    is: PEFT's forward takes it off the result before it scales, and adds it after.

    *Order.* D as :func:`~loreg.algebra.densify.dense_delta` sums it; V = fl(W + D); the norm is the root
    (:func:`~loreg.algebra.roots.square_root`) of the folded sum (:func:`~loreg.algebra.ordered.total`) of fl(V²)
    over a group's elements in row-major order, to which ε is added; then fl(m / norm), then its product with V.

    The result is (W', -W), W' in float64: at an outer weight of 1 each merged element is W' rounded once. At w it
    is W + w·(W' - W); LyCORIS' multiplier makes V + w·(W' - V) of it. With D = 0, W' is W bit for bit where m is
    the norm as computed here; else it is off by m's own relative error, as of an m that was computed in float32.
    Several of these add up as W + Σ(W'ᵢ - W), in any order. PEFT, with several adapters active, takes them in turn,
    W₂ = f₂∘(f₁∘(W + D₁) + D₂) with f of the unmerged W (peft#3608): that is no sum and hangs on their order.

    Needs one float64 copy of the weight and about 40 MiB. Raises BadInput for another number of magnitudes and
    where a norm is zero, Unsupported for a weight that is not a matrix.
    """
    if W.ndim != 2:
        raise Unsupported(f"DoRA is defined for matrices, found a weight of shape {tuple(W.shape)}.")
    n, (out, into) = magnitude.numel(), W.shape
    if n == 0 or (n != out if axis == "out" else into % n):
        raise BadInput(
            f"DoRA's magnitude along {axis!r} has {n} numbers, which does not fit a weight of shape {tuple(W.shape)}."
        )
    V = torch.zeros(W.shape, dtype=torch.float64, device=W.device) if edit.shape is None else dense_delta(edit)
    rows = max(1, _BLOCK_ELEMENTS // max(1, into))
    for start in range(0, out, rows):
        V[start : start + rows] += W[start : start + rows].double()
    # (n, …, …): a group's elements, in row-major order of the weight
    groups = V[:, None] if axis == "out" else V.view(len(V), n, -1).transpose(0, 1)
    _rescale(groups, magnitude.double().reshape(-1), axis, epsilon)
    return WeightedSum(dense=(Dense(V, 1.0), Dense(W, -1.0)))


def _rescale(groups: Tensor, magnitude: Tensor, axis: str, epsilon: float) -> None:
    """Gives each of ``groups`` its norm, in place."""
    step = max(1, _BLOCK_ELEMENTS // max(1, groups[0].numel()))
    for start in range(0, len(groups), step):
        block = groups[start : start + step]
        norm = square_root(total((block * block).flatten(1), 1)) + epsilon
        if bool((norm == 0).any()):
            group = start + int((norm == 0).nonzero()[0])
            raise BadInput(
                f"group {group} along {axis!r} of W + D is zero, and has no direction: DoRA is not defined for it."
            )
        block *= (magnitude[start : start + step] / norm)[:, None, None]
