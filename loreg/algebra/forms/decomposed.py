"""DoRA [F8]: a form's sum as a change of direction, with the norms stored apart (Liu et al. 2024, arXiv 2402.09353).

Under ``loreg-f64-1``, as it takes norms of the edited weight.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from loreg.algebra.beside import Beside
from loreg.algebra.delta import Dense, LowRank
from loreg.algebra.densify import dense_delta
from loreg.algebra.edits import WeightedSum
from loreg.algebra.ordered import total
from loreg.algebra.roots import square_root
from loreg.errors import BadInput, Unsupported

_BLOCK_ELEMENTS = 2**20
_NORM_ELEMENTS = {"cpu": 2**18, "cuda": 2**22}
"""Of W, whose norms are taken together: 2 MiB of float64, in cache; with 8 it took 8 times as long."""


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
    _check_count(magnitude, W, axis)
    n, (out, into) = magnitude.numel(), W.shape
    V = torch.zeros(W.shape, dtype=torch.float64, device=W.device) if edit.shape is None else dense_delta(edit)
    rows = max(1, _BLOCK_ELEMENTS // max(1, into))
    for start in range(0, out, rows):
        V[start : start + rows] += W[start : start + rows].double()
    # (n, …, …): a group's elements, in row-major order of the weight
    groups = V[:, None] if axis == "out" else V.view(len(V), n, -1).transpose(0, 1)
    _rescale(groups, magnitude.double().reshape(-1), axis, epsilon)
    return WeightedSum(dense=(Dense(V, 1.0), Dense(W, -1.0)))


@torch.no_grad()
def beside(edit: WeightedSum, W: Tensor, magnitude: Tensor, epsilon: float) -> Beside:
    """What :func:`decompose` along "out" makes of W, as what it adds to the outputs Wx of a layer, with D = Σ c·BA:
    W' - W = diag(g - 1)·W + Σ c·(g∘B)A, g = m / (‖V‖ + ε).

    Not in a stated order: in float64, as a library's product and sum have it, so that g is off by at most about
    (in + 2r)·2⁻⁵³·(‖|W| + Σ|c||B||A|‖ / ‖V‖)², of itself. By blocks of W, of which no copy is made: about 5 MiB on a
    CPU, 80 on a CUDA device. Raises what ``decompose`` does.
    """
    _check_count(magnitude, W, "out")
    m = magnitude.double().reshape(-1)
    g = m / _nonzero(square_root(_squares(edit.low_rank, W)) + epsilon, 0, "out")
    scaled = (LowRank(g[:, None] * delta.left.double(), delta.right, delta.scale) for delta in edit.low_rank)
    return Beside(tuple(scaled), g - 1)


def _squares(low_rank: Sequence[LowRank], W: Tensor) -> Tensor:
    """Of the norms of the rows of W + D: (out,), float64."""
    factors = [(delta.scale * delta.left.double(), delta.right.double()) for delta in low_rank]
    found = torch.zeros(len(W), dtype=torch.float64, device=W.device)
    whole, along = slice(None), int(W.stride(0) < W.stride(1))  # blocks of what lies together
    step = max(1, _NORM_ELEMENTS[W.device.type] // W.shape[1 - along])
    for start in range(0, W.shape[along], step):
        rows, columns = (whole, slice(start, start + step)) if along else (slice(start, start + step), whole)
        V = W[rows, columns].to(torch.float64, copy=True)
        for left, right in factors:
            V.addmm_(left[rows], right[:, columns])
        found[rows] += V.square_().sum(1)
    return found


def _check_count(magnitude: Tensor, W: Tensor, axis: str) -> None:
    n, (out, into) = magnitude.numel(), W.shape
    if n == 0 or (n != out if axis == "out" else into % n):
        raise BadInput(
            f"DoRA's magnitude along {axis!r} has {n} numbers, which does not fit a weight of shape {tuple(W.shape)}."
        )


def _nonzero(norm: Tensor, first: int, axis: str) -> Tensor:
    """The norms of groups from the ``first``. Raises BadInput for a zero."""
    if bool((norm == 0).any()):
        group = first + int((norm == 0).nonzero()[0])
        raise BadInput(
            f"group {group} along {axis!r} of W + D is zero, and has no direction: DoRA is not defined for it."
        )
    return norm


def _rescale(groups: Tensor, magnitude: Tensor, axis: str, epsilon: float) -> None:
    """Gives each of ``groups`` its norm, in place."""
    step = max(1, _BLOCK_ELEMENTS // max(1, groups[0].numel()))
    for start in range(0, len(groups), step):
        block = groups[start : start + step]
        norm = _nonzero(square_root(total((block * block).flatten(1), 1)) + epsilon, start, axis)
        block *= (magnitude[start : start + step] / norm)[:, None, None]
