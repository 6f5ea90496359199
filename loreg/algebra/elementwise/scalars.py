"""Functions of a few numbers that IEEE 754 does not define: the C library's ``sin`` is not every C library's.

They run in mpmath with 200 bits on doubles that are exact inputs, and only what comes out is rounded to a double, to
nearest: an error of the library would have to be 2¹⁴⁰ times its unit to change a result. mpmath is what torch itself
brings along (through sympy).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mpmath  # type: ignore[import-untyped]

Real = Any  # mpmath is not typed

real: Any = mpmath.mp.clone()
"""A context of its own, so that nobody else's precision enters and ours leaves no trace."""
real.prec = 200


def cosine(product: float, square: float, other: float) -> Real:
    """⟨x, y⟩ / (‖x‖·‖y‖) of ⟨x, y⟩, ‖x‖² and ‖y‖², within [-1, 1]; 0 if one of the vectors is zero."""
    if square == 0 or other == 0:
        return real.zero
    return max(-real.one, min(real.one, real.mpf(product) / (real.sqrt(square) * real.sqrt(other))))


def slerp(cos: Real, shares: tuple[Real, Real]) -> tuple[Real, Real]:
    """sin(share·θ) / sin θ for both ends of an arc of angle θ, 0 < θ < π."""
    angle = real.acos(cos)
    first, second = (real.sin(share * angle) / real.sin(angle) for share in shares)
    return first, second


def karcher(gram: Sequence[Sequence[Real]], shares: Sequence[Real], max_iter: int, tol: float) -> list[Real]:
    """The weighted Karcher mean of unit vectors uᵢ on their sphere, as its coefficients cᵢ: mean = Σ cᵢ·uᵢ.

    ``gram`` holds ⟨uᵢ, uⱼ⟩. A mean of unit vectors, its tangents included, stays in their span, so the vectors
    themselves are not needed: each step of the fixed-point iteration is one in k coefficients. Starts at the
    weighted mean, or at the first vector where that is shorter than ``tol``; ends after ``max_iter`` steps or where
    the mean tangent is shorter than ``tol``. Vectors within ``tol`` of the mean, or of its antipode, where no
    direction is nearest, have no part in a step.
    """
    k = len(shares)

    def norm(c: Sequence[Real]) -> Real:
        square = sum(c[i] * c[j] * gram[i][j] for i in range(k) for j in range(k))
        return real.sqrt(max(square, real.zero))

    length = norm(shares)
    mean = [real.mpf(i == 0) for i in range(k)] if length < tol else [share / length for share in shares]
    for _ in range(max_iter):
        tangent = [real.zero] * k
        for i in range(k):
            cos = max(-real.one, min(real.one, sum(mean[j] * gram[i][j] for j in range(k))))
            angle = real.acos(cos)
            if angle < tol or real.pi - angle < tol:
                continue
            pull = shares[i] * angle / real.sin(angle)
            tangent = [t - pull * cos * c for t, c in zip(tangent, mean, strict=True)]
            tangent[i] += pull
        step = norm(tangent)
        if step < tol:
            break
        along, aside = real.cos(step), real.sin(step) / step
        mean = [along * c + aside * t for c, t in zip(mean, tangent, strict=True)]
        length = norm(mean)
        if length > tol:
            mean = [c / length for c in mean]
    return mean
