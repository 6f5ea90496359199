"""Methods that are a sum Σ cᵢ·Δᵢ whose coefficients follow from lengths and angles [C7]: whole deltas or rows.

mergekit applies slerp and karcher to whole weights; here, as in its nuslerp with a base, they act on the deltas: the
base, common to all, would hide the angles between what was trained. Inner products are folded
(``ordered.total``), what follows from them is computed by :mod:`~loreg.algebra.elementwise.scalars`, rounded once.

mergekit's absolute thresholds on lengths (1e-8, 1e-7, tol, 1e-6 for a product of two) are tests for zero here.
Deltas of adapters are small: such a threshold turns the angle between two rows of length 1e-4 into a right one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from loreg.algebra.elementwise import scalars
from loreg.algebra.elementwise.deltas import Deltas, added, blocks, combination, divided, in_order
from loreg.algebra.elementwise.scalars import Real, real
from loreg.algebra.ordered import dot, total
from loreg.algebra.roots import square_root
from loreg.errors import BadInput, UsageError

_NEARLY_PARALLEL = 0.9995  # mergekit's dot_threshold
_COLLINEAR = 1e-14  # for 1 - cos²; mergekit's 1e-16 is less than what rounding leaves of it
_NO_WEIGHT = 1e-6
_SINGULAR = 1e-6


def _inner(x: Tensor, y: Tensor) -> float:
    """⟨x, y⟩ of two flat deltas."""
    result = dot(x, y)
    if not math.isfinite(result):
        raise BadInput("the norm of a delta is beyond the range of float64: the adapter is damaged or diverged.")
    return result


def _two(deltas: Deltas, method: str) -> None:
    if len(deltas.values) != 2:
        raise UsageError(f"{method} is a path between two deltas, found {len(deltas.values)}: name two adapters.")


def _shares(deltas: Deltas, method: str) -> list[Real]:
    """Each weight over the sum of all."""
    weights = [real.mpf(weight) for weight in deltas.weights]
    whole = sum(weights, real.zero)
    if whole <= 0:
        raise UsageError(
            f"{method} reads weights as shares of a mean, and theirs sum to {float(whole)}: expected more than 0."
        )
    return [weight / whole for weight in weights]


def slerp(deltas: Deltas, parameters: Mapping[str, Any]) -> Tensor:
    """Spherical interpolation of two deltas, p₁ = w₁/(w₁ + w₂) and p₂ = w₂/(w₁ + w₂) of the way from each other.

    Σ sin(pᵢθ)/sin θ · Δᵢ, θ the angle between the whole deltas; Σ pᵢ·Δᵢ where |cos θ| > 0.9995; θ = π/2 if one is
    zero. mergekit's slerp (merge_methods/slerp.py) with t = p₂; written so that the order of the two, each with its
    weight, does not matter, to the bit. Only the ratio of the weights counts. No parameters.
    """
    _two(deltas, "slerp")
    x, y = deltas.flat()
    shares = _shares(deltas, "slerp")
    cos = scalars.cosine(_inner(x, y), _inner(x, x), _inner(y, y))
    if abs(cos) <= _NEARLY_PARALLEL:
        shares = list(scalars.slerp(cos, (shares[0], shares[1])))
    return combination(deltas, [float(share) for share in shares])


def nuslerp(deltas: Deltas, parameters: Mapping[str, Any]) -> Tensor:
    """mergekit's nuslerp (merge_methods/nuslerp.py): as ``slerp``, also row by row.

    ``flatten``: one angle for the whole deltas; else one for each row, or, with ``row_wise``, for each column (sic:
    mergekit's ``nuslerp_row_wise`` selects dimension 0). Linear only where 1 - cos² ≤ 1e-14. Weights that sum to
    less than 1e-6 in magnitude mean equal shares.
    """
    _two(deltas, "nuslerp")
    weights = deltas.weights
    whole = in_order(weights)
    one, half = real.one, real.one / 2
    share = half if abs(whole) < _NO_WEIGHT else real.mpf(weights[1]) / (real.mpf(weights[0]) + real.mpf(weights[1]))
    shares = (one - share, share)

    def coefficients(product: float, square: float, other: float) -> tuple[float, float]:
        cos = scalars.cosine(product, square, other)
        first, second = shares if 1 - cos * cos <= _COLLINEAR else scalars.slerp(cos, shares)
        return float(first), float(second)

    if parameters["flatten"]:
        x, y = deltas.flat()
        return combination(deltas, coefficients(_inner(x, y), _inner(x, x), _inner(y, y)))
    x, y = deltas.rows()
    along = 0 if parameters["row_wise"] and len(deltas.shape) > 1 else 1
    inner = [total(a * b, along).tolist() for a, b in ((x, y), (x, x), (y, y))]
    if not all(map(math.isfinite, (number for numbers in inner for number in numbers))):
        raise BadInput("the norm of a delta is beyond the range of float64: the adapter is damaged or diverged.")
    pairs = [coefficients(*three) for three in zip(*inner, strict=True)]
    c = torch.tensor(pairs, dtype=torch.float64, device=x.device).reshape(-1, 2).unsqueeze(along)
    first, second = (c.select(-1, i) for i in range(2))
    return (x * first).add_(y * second).view(deltas.shape)


def karcher(deltas: Deltas, parameters: Mapping[str, Any]) -> Tensor:
    """The Karcher mean of the directions of the deltas, wᵢ/Σw their weights, times the weighted mean of their
    lengths: mergekit's karcher (merge_methods/karcher.py), whose weights are all equal. ``max_iter`` and ``tol`` as
    in :func:`~loreg.algebra.elementwise.scalars.karcher`. A delta of zeros has a length and no direction."""
    flat = deltas.flat()
    shares = _shares(deltas, "karcher")
    squares = [_inner(x, x) for x in flat]
    lengths = [real.sqrt(square) for square in squares]
    scale = sum((share * length for share, length in zip(shares, lengths, strict=True)), real.zero)
    valid = [i for i, square in enumerate(squares) if square > 0]
    whole = sum((shares[i] for i in valid), real.zero)
    coefficients = [0.0] * len(flat)
    if len(flat) == 1:
        coefficients = [1.0]
    elif valid and whole <= 0:
        raise UsageError(
            "karcher reads weights as shares of a mean: expected those of non-zero deltas to sum above 0."
        )
    elif valid:
        gram = [[real.one for _ in valid] for _ in valid]
        for a, i in enumerate(valid):
            for b, j in enumerate(valid[:a]):
                gram[a][b] = gram[b][a] = scalars.cosine(_inner(flat[i], flat[j]), squares[i], squares[j])
        parts = [shares[i] / whole for i in valid]
        mean = scalars.karcher(gram, parts, parameters["max_iter"], parameters["tol"])
        for i, c in zip(valid, mean, strict=True):
            coefficients[i] = float(scale * c / lengths[i])
    return combination(deltas, coefficients)


def model_stock(deltas: Deltas, parameters: Mapping[str, Any]) -> Tensor:
    """t·mean(w·Δ) of at least two deltas, t = k·c/(1 + (k - 1)·c), c the mean cosine between two of them.

    Jang et al., "Model Stock", 2024; mergekit/merge_methods/model_stock.py, which has no weights. ``filter_wise``:
    one t for each row, else one for all. t = 0 where |1 + (k - 1)·c| < 1e-6. Mind that c < 0 makes t negative.
    Order: norms √Σx²; cosines fl(⟨x, y⟩ / fl(‖x‖·‖y‖)) within [-1, 1], 0 for a zero, negated where weights differ
    in sign; their mean in the order (0, 1), (0, 2) …; then fl(fl(t / k)·Σ fl(w·Δ)).
    """
    k = len(deltas.values)
    if k < 2:
        raise UsageError("model_stock needs the angle between at least two deltas, found 1: name more adapters.")
    matrices = deltas.rows() if parameters["filter_wise"] else tuple(x.view(1, -1) for x in deltas.flat())
    norms = [square_root(total(x * x, 1)) for x in matrices]
    cosines = []
    for i in range(k):
        for j in range(i + 1, k):
            lengths = norms[i] * norms[j]
            cos = (total(matrices[i] * matrices[j], 1) / torch.where(lengths > 0, lengths, 1.0)).clamp_(-1, 1)
            cosines.append(-cos if (deltas.weights[i] < 0) != (deltas.weights[j] < 0) else cos)
    cos = divided(added(cosines), len(cosines))
    denominator = cos * (k - 1) + 1
    singular = denominator.abs() < _SINGULAR
    t = torch.where(singular, 0.0, cos * k / torch.where(singular, 1.0, denominator))
    if not bool(torch.isfinite(t).all()):
        raise BadInput("the norm of a delta is beyond the range of float64: the adapter is damaged or diverged.")
    factor = divided(t, k).unsqueeze(1)
    out = torch.empty_like(matrices[0])
    if parameters["filter_wise"]:
        for block in blocks(out.shape[0], out.device, out.shape[1]):
            parts = [x[block] * w for x, w in zip(matrices, deltas.weights, strict=True)]
            torch.mul(added(parts), factor[block], out=out[block])
        return out.view(deltas.shape)
    for block in blocks(out.shape[1], out.device):
        parts = [x[:, block] * w for x, w in zip(matrices, deltas.weights, strict=True)]
        torch.mul(added(parts), factor, out=out[:, block])
    return out.view(deltas.shape)
