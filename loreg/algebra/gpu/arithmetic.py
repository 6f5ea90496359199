"""Arithmetic on storage values for ``kernels``: rounding, and whether that is in doubt."""

from __future__ import annotations

import triton
import triton.language as tl

BF16 = tl.constexpr(0)
F16 = tl.constexpr(1)
F32 = tl.constexpr(2)


@triton.jit
def lift(raw, DTYPE: tl.constexpr):
    """Storage values as the kernels compute with them: in the upper bits of int32, which bfloat16 has as float32."""
    return raw if DTYPE == F32 else raw.to(tl.int32) << 16


@triton.jit
def stored(lifted, DTYPE: tl.constexpr):
    return lifted if DTYPE == F32 else (lifted >> 16).to(tl.int16)


@triton.jit
def as_float(lifted, DTYPE: tl.constexpr):
    """float32, exactly."""
    if DTYPE == F16:
        x = (lifted >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        x = lifted.to(tl.float32, bitcast=True)
    return x


@triton.jit
def rounded(x, DTYPE: tl.constexpr, CONVERTS: tl.constexpr):
    """A float32 rounded to nearest, ties to even, lifted. ``CONVERTS``: whether there is an instruction of that for
    bfloat16, which Triton's interpreter rounds otherwise: half of one in place of four."""
    if DTYPE == BF16 and not CONVERTS:
        u = x.to(tl.int32, bitcast=True)
        lifted = (u + 0x7FFF + ((u >> 16) & 1)) & -65536
    elif DTYPE == BF16:
        lifted = lift(x.to(tl.bfloat16).to(tl.int16, bitcast=True), DTYPE)
    elif DTYPE == F16:
        lifted = lift(x.to(tl.float16).to(tl.int16, bitcast=True), DTYPE)
    else:
        lifted = x.to(tl.int32, bitcast=True)
    return lifted


@triton.jit
def distance(one, other, DTYPE: tl.constexpr):
    """By how many bit patterns two lifted values are apart, times 2^16 if they have 16 bits. Those of two signs are
    apart by more than a byte, also modulo 2^16, if they are finite."""
    return one.to(tl.int64) - other.to(tl.int64) if DTYPE == F32 else one - other


@triton.jit
def in_steps(apart, one, DTYPE: tl.constexpr):
    """Of values of one sign that are not far apart, by how many they are: algebra/rounding.py, ordered()."""
    steps = tl.where(one < 0, -apart, apart)
    return steps.to(tl.int32) if DTYPE == F32 else steps >> 16


@triton.jit
def moved_by(lifted, by, high, DTYPE: tl.constexpr):
    """The lifted value that is ``by`` values on, and of the same sign. ``high``: as for ``near_midpoint``."""
    if DTYPE == F32:
        found = lifted + by * ((lifted >> 31) | 1)
    else:
        found = lifted + by * (((lifted >> 15) & high) | 65536)
    return found


@triton.jit
def _larger(one, other):
    return tl.maximum(one, other, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def near_midpoint(x, margin, high):
    """Words of float32 that are off by ``margin`` and their own rounding at most: whether in one there is any that
    may lie on the other side of the midpoint of its neighbours in bfloat16, or is beyond the largest, or no number.

    It asks for the midpoint above alone. Above a power of two the one below is a quarter of a step away, which is
    2^-10 of the number at least: what may be off by so much is in doubt. By minima and maxima, since a comparison for
    each element takes more instructions. ``high``: -65536, which is not to be known when this is compiled: two
    constants in one expression are two instructions."""
    u, size = x.to(tl.int32, bitcast=True), tl.abs(x)
    middle = ((u & high) | 0x8000).to(tl.float32, bitcast=True)
    least, largest = tl.min(size, 2), tl.reduce(size, 2, _larger)
    error = margin + largest * 5.960464477539063e-08  # 2^-24
    near = (tl.min(tl.abs(x - middle), 2) <= error) | (least <= 1025 * margin)
    return near | ((largest < 3.3895313892515355e38) == 0)


@triton.jit
def screened(x, eta, spread, DTYPE: tl.constexpr):
    """Of float64 sums: whether rounding them by way of float32 is in doubt, and whether they are where one midpoint
    decides. algebra/rounding.py, Screen and thresholds()."""
    size = tl.abs(x)
    tau = (274877906944.0 if DTYPE == F32 else 536870912.0) * 1.00000095367431640625 * eta * spread  # 2^(reach + 2)
    if DTYPE == F32:
        u = x.to(tl.int64, bitcast=True)
        middle = ((u + (131072 - 268435456)) & 0x1FFFFFFF) <= 262144
        inside = (size >= tl.maximum(tau, 1.1754943508222875e-38)) & (size < 3.4028234663852886e38)
    elif DTYPE == BF16:
        middle = (x.to(tl.float32).to(tl.int32, bitcast=True) & 0xFFFF) == 0x8000
        inside = (size >= tl.maximum(tau, 1.1754943508222875e-38)) & (size < 3.3895313892515355e38)
    else:
        middle = (x.to(tl.float32).to(tl.int32, bitcast=True) & 0x1FFF) == 0x1000
        inside = (size >= tl.maximum(tau, 6.103515625e-05)) & (size < 65504.0)
    return middle | (inside == 0), inside


@triton.jit
def decided(x, eta, spread, DTYPE: tl.constexpr, CONVERTS: tl.constexpr):
    """Float64 sums correctly rounded, lifted, and where that is still open.

    Within its range a doubtful sum is less than half a step from one midpoint and farther from all others than its
    error, so the side on which it lies decides, if it lies farther from that than its error (2^-23 more pays for the
    bound's own roundings). The difference is exact.
    """
    doubtful, inside = screened(x, eta, spread, DTYPE)
    value = rounded(x.to(tl.float32), DTYPE, CONVERTS)
    if DTYPE == F32:
        u = x.to(tl.int64, bitcast=True) & -536870912
        lower = u.to(tl.float64, bitcast=True).to(tl.float32).to(tl.int32, bitcast=True)
        middle = (u | 0x10000000).to(tl.float64, bitcast=True)
    elif DTYPE == BF16:
        u = x.to(tl.float32).to(tl.int32, bitcast=True)
        lower = u & -65536
        middle = ((u & -65536) | 0x8000).to(tl.float32, bitcast=True).to(tl.float64)
    else:
        u = x.to(tl.float32).to(tl.int32, bitcast=True)
        cut = (u & -8192).to(tl.float32, bitcast=True)
        lower = lift(cut.to(tl.float16).to(tl.int16, bitcast=True), DTYPE)
        middle = ((u & -8192) | 0x1000).to(tl.float32, bitcast=True).to(tl.float64)
    by = x - middle
    known = inside & (tl.abs(by) > eta * (tl.abs(x) + 2 * spread) * 1.0000001192092896)
    above = lower + ((by > 0) == (x > 0)).to(tl.int32) * (1 if DTYPE == F32 else 65536)
    return tl.where(doubtful & known, above, value), doubtful & (known == 0)
