"""The exact sum of products of doubles, rounded to odd: the judge where float64 cannot decide.

A product of doubles is an exact sum of two doubles (Veltkamp's split, Dekker's product), so that the value
of an element is an exact sum of doubles, and summing is a matter of error-free transformations: a pass of
Knuth's TwoSum leaves the sum as it is, and moves it towards the last term (Ogita, Rump & Oishi, "Accurate
sum and dot product", SIAM J. Sci. Comput. 26(6), 2005). No term is ever dropped, so what bounds the error
is simply what is left. Whatever a few passes do not settle is decided in rational numbers.

All functions work on many elements at once: one column each.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from fractions import Fraction
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Doubles: TypeAlias = NDArray[np.float64]

SAFE = 2.0**250
"""Where each non-zero factor lies in [1/SAFE, SAFE], no product of three and no error term of one over- or
underflows: the smallest, 2^(-3·250 - 2·53), is normal. Every bfloat16, float16 and float32 lies there."""

_PASSES = 8
_SPLITTER = 2.0**27 + 1


def _two_sum(a: Doubles, b: Doubles) -> tuple[Doubles, Doubles]:
    """(s, e) with s = fl(a + b) and s + e = a + b exactly (Knuth), short of overflow."""
    s = a + b
    t = s - a
    return s, (a - (s - t)) + (b - t)


def _split(a: Doubles) -> tuple[Doubles, Doubles]:
    """Two doubles of at most 26 bits each, with the sum ``a`` (Veltkamp)."""
    c = _SPLITTER * a
    high = c - (c - a)
    return high, a - high


def _product(a: Doubles, b: Doubles) -> tuple[Doubles, ...]:
    """(p, e) with p = fl(a·b) and p + e = a·b exactly (Dekker), short of over- and underflow; (p,) where e is 0."""
    p = a * b
    if a.size == 1 and abs(math.frexp(a.item())[0]) == 0.5:  # a scale that is a power of two, as α/r often is
        return (p,)
    (ah, al), (bh, bl) = _split(a), _split(b)
    if not (al.any() or bl.any()):  # 26 bits by 26: what factors of 32 bits or fewer always are
        return (p,)
    return p, al * bl - (((p - ah * bh) - al * bh) - ah * bl)


def _is_safe(x: Doubles) -> NDArray[np.bool_]:
    size: Doubles = np.abs(x)
    safe: NDArray[np.bool_] = (x == 0) | ((size >= 1 / SAFE) & (size <= SAFE))
    return safe


def _to_odd(high: Doubles, low: Doubles) -> Doubles:
    """high + low rounded to odd, where high = fl(high + low): of ``low`` only the sign matters."""
    even = high.view(np.int64) & 1 == 0
    return np.where((low != 0) & even, np.nextafter(high, np.copysign(np.inf, low)), high)


def _pass(terms: Doubles) -> None:
    """One TwoSum pass over the rows, in place: the sum of each column stays exactly what it was. The last row
    becomes its float64 sum, the first the error of the last addition, the others those made before.

    All but the last are added by pairs, log2(m) calls for m rows: one call for each row costs more than its sums.
    """
    count = len(terms) - 1
    while count > 1:
        half = count // 2
        upper = slice(count - half, count)
        terms[:half], terms[upper] = _two_sum(terms[:half], terms[upper])
        count -= half
    terms[-1], terms[0] = _two_sum(terms[0], terms[-1])


def _distil(terms: Doubles) -> tuple[Doubles, NDArray[np.intp]]:
    """The sum of each column of ``terms`` (m ≥ 2, k), rounded to odd, and the columns left undecided (NaN).

    After a pass the sum is high + low + rest, with high and low from the last TwoSum, so high = fl(high +
    low), and |rest| at most the sum of the magnitudes above them (doubled, as that sum is itself rounded).
    If nothing is left, high + low is exact. If |low| exceeds what is left, the sum lies strictly between
    high and its neighbour towards low, as |low| is at most half of that gap. Either way it is decided.
    """
    odd = np.full(terms.shape[1], np.nan)
    undecided = np.arange(terms.shape[1])
    for _ in range(_PASSES):
        _pass(terms)
        rest, low, high = np.abs(terms[1:-1]).sum(axis=0), terms[0], terms[-1]
        settled = (rest == 0) | (np.abs(low) > 2 * rest)
        odd[undecided[settled]] = _to_odd(high[settled], low[settled])
        undecided, terms = undecided[~settled], terms[:, ~settled]
        if undecided.size == 0:
            break
    return odd, undecided


def _odd_fraction(value: Fraction) -> float:
    """``value`` rounded to odd in float64; beyond its range the largest finite double, which is odd."""
    try:
        near = value.numerator / value.denominator  # int / int rounds correctly, subnormals included
    except OverflowError:
        return sys.float_info.max if value > 0 else -sys.float_info.max
    gap = value - Fraction(near)
    return float(_to_odd(np.array([near]), np.array([float((gap > 0) - (gap < 0))]))[0])


def exact_sum(
    weight: Doubles,
    dense: Sequence[tuple[float, Doubles]],
    low_rank: Sequence[tuple[float, Doubles, Doubles]],
) -> Doubles:
    """weight + Σ d·x + Σ c·Σ_t b_t·a_t for k elements, each rounded to odd in float64.

    ``weight`` is (k,); ``dense`` holds pairs of d and x (k,); ``low_rank`` triples of c, b (r, k) and a
    (r, k). All finite. The result is exact where it is a double; where not, it is the one of the two doubles
    around the exact value whose last bit is 1. So it has the sign of the exact sum, is zero (+0 or -0, of
    no meaning) only where that is zero, and rounding it to a format with at least two bits less gives what
    rounding the exact sum gives. It does not depend on the order of the terms.
    """
    parts, safe = [weight[None]], _is_safe(weight)
    with np.errstate(all="ignore"):  # what is not safe may overflow here, and is decided below
        for d, x in dense:
            scale = np.array([d])
            parts += (part[None] for part in _product(scale, x))
            safe &= _is_safe(scale) & _is_safe(x)
        for c, b, a in low_rank:
            scale = np.array([c])
            parts += (part for product in _product(b, a) for part in _product(scale, product))
            safe &= _is_safe(scale) & _is_safe(b).all(axis=0) & _is_safe(a).all(axis=0)
        padding = np.zeros((2, weight.size))
        odd, undecided = _distil(np.concatenate([padding, *parts]))
    for j in np.union1d(undecided, np.flatnonzero(~safe)):
        odd[j] = _odd_fraction(_rational(j, weight, dense, low_rank))
    return odd


def _rational(
    j: int,
    weight: Doubles,
    dense: Sequence[tuple[float, Doubles]],
    low_rank: Sequence[tuple[float, Doubles, Doubles]],
) -> Fraction:
    """The exact value of element ``j``."""
    total = Fraction(float(weight[j])) + sum(Fraction(d) * Fraction(float(x[j])) for d, x in dense)
    for c, b, a in low_rank:
        pairs = zip(b[:, j].tolist(), a[:, j].tolist(), strict=True)
        total += Fraction(c) * sum(Fraction(u) * Fraction(v) for u, v in pairs)
    return total
