"""Correct rounding to a storage dtype, and the arithmetic of neighbouring storage values.

Everything here is bits: no tolerance, no dependence on device or thread count. Subnormals are kept, so a
process must not run with ``torch.set_flush_denormal(True)``.
"""

from __future__ import annotations

import math
import struct
import sys
from dataclasses import dataclass

import torch
from torch import Tensor

from loreg.errors import Unsupported

STORAGE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""Dtypes of weights that loreg writes."""

_BITS = {
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
    torch.float32: torch.int32,
}


def check_storage(dtype: torch.dtype) -> None:
    """Raises Unsupported unless ``dtype`` is in STORAGE_DTYPES."""
    if dtype not in STORAGE_DTYPES:
        raise Unsupported(f"weights cannot be stored as {dtype}: choose one of {STORAGE_DTYPES}.")


def bits(x: Tensor) -> Tensor:
    """The same memory as signed integers of the same width. Raises Unsupported for another dtype."""
    check_storage(x.dtype)
    return x.view(_BITS[x.dtype])


def round_to(acc: Tensor, dtype: torch.dtype) -> Tensor:
    """``acc`` (float64, any shape, any device) rounded once to ``dtype``: to nearest, ties to even.

    Beyond the largest finite value the result is an infinity, as IEEE 754 has it: the caller decides what
    that means. Signs of zeros are kept. For the 16-bit dtypes float64 is first rounded *to odd* in float32:
    an inexact result takes the neighbour with an odd last bit, which can be no midpoint of a narrower format,
    so the second rounding sees on which side the value was (Boldo & Melquiond, "Emulation of FMA and
    correctly rounded sums: proved algorithms using rounding to odd", IEEE TC 57(4), 2008).
    """
    check_storage(dtype)
    if acc.dtype != torch.float64:
        raise Unsupported(f"round_to takes float64, found {acc.dtype}: convert it first, which is exact.")
    near = acc.to(torch.float32)
    if dtype == torch.float32:
        return near
    back, word = near.double(), near.view(torch.int32)
    towards = torch.where(acc.abs() > back.abs(), 1, -1)
    fix = (back != acc) & (word & 1 == 0) & ~acc.isnan()
    return torch.where(fix, word + towards, word).to(torch.int32).view(torch.float32).to(dtype)


def ordered(x: Tensor) -> Tensor:
    """int64, the shape of ``x``: an integer for each storage value, in their order, neighbours one apart.

    +0 is 0 and -0 is -1, so that equal integers are equal bytes.
    """
    word = bits(x).long()
    width = 8 * x.element_size()
    return word.bitwise_xor((word >> (width - 1)) & (2 ** (width - 1) - 1))


def from_ordered(number: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of ``ordered``: int64 to storage values of ``dtype``, same shape."""
    check_storage(dtype)
    mask = 2 ** (8 * dtype.itemsize - 1) - 1
    return number.bitwise_xor((number >> 63) & mask).to(_BITS[dtype]).view(dtype)


def ulp_distance(a: Tensor, b: Tensor) -> Tensor:
    """int64, ≥ 0: how many steps from one storage value to the next lie between ``a`` and ``b``.

    Both of one storage dtype, finite. The two zeros are one step apart. Raises Unsupported for other dtypes.
    """
    if a.dtype != b.dtype:
        raise Unsupported(f"an ulp distance needs one dtype, found {a.dtype} and {b.dtype}.")
    return (ordered(a) - ordered(b)).abs()


def half_ulp(x: Tensor) -> Tensor:
    """float64, the shape of ``x``: how far from a finite storage value ``x`` the real number may have been
    that was rounded to it.

    Half the spacing on the side away from zero, which at a power of two is the wider one. Exact. At the
    largest finite value the spacing below it, by which IEEE 754 sets the threshold of overflow.
    """
    largest = bits(torch.tensor(torch.finfo(x.dtype).max, dtype=x.dtype, device=x.device))
    here = torch.minimum(bits(x.abs()), largest - 1)
    return ((here + 1).view(x.dtype).double() - here.view(x.dtype).double()) / 2


@dataclass(frozen=True, slots=True)
class _Carrier:
    """How a result in float64 travels to a storage dtype, and where its rounding boundaries show.

    ``low`` bits at the end of a word of ``dtype`` lie beyond the storage dtype's last place: a boundary has
    there a one and then zeros. ``floor``: below it that pattern does not hold, as spacing stops shrinking.
    ``reach``: where the error of the accumulation is at most 2^-reach of the result, every doubtful element
    lies within ``slack`` words of a boundary.
    """

    dtype: torch.dtype
    half: torch.dtype
    low: int
    floor: float
    reach: int
    slack: int


_CARRIERS = {
    torch.bfloat16: _Carrier(torch.float32, torch.int16, low=16, floor=2.0**-126, reach=27, slack=0),
    torch.float16: _Carrier(torch.float32, torch.int16, low=13, floor=2.0**-14, reach=27, slack=0),
    torch.float32: _Carrier(torch.float64, torch.int32, low=29, floor=2.0**-126, reach=36, slack=2**17),
}


def _word(carrier: torch.dtype, value: float) -> int:
    """The bits of a positive float of the carrier dtype; the largest finite one if ``value`` is beyond."""
    value = min(value, torch.finfo(carrier).max)
    pair = ("<f", "<I") if carrier == torch.float32 else ("<d", "<Q")
    number: int = struct.unpack(pair[1], struct.pack(pair[0], value))[0]
    return number


class Screen:
    """Finds, in one cheap pass, a small superset of the elements that one conversion may round wrongly.

    Let x be an exact value, a its float64 approximation with |a - x| ≤ δ = η(|a| + 2S), and f = a rounded to
    the carrier (float32, or float64 itself when float32 is stored). If storing f gives another value than
    storing x, then x and f are on two sides of, or f is on, a boundary m: a midpoint of neighbouring storage
    values, or the threshold of overflow. m is a carrier value, and rounding is monotone, so a lies on f's
    side of m.

    *Carrier float32.* If f ≠ m, then |a - m| is at least half the float32 spacing at m, which is over
    2⁻²⁶|a|; so where δ ≤ 2⁻²⁷|a| there is f = m. *Carrier float64.* |a - m| ≤ δ ≤ 2⁻³⁶|a| is at most
    2¹⁷ = slack float64 words, and no power of two lies between. Both bounds are met where η ≤ 2^-(reach+1)
    and |a| ≥ 2^(reach+2)·η·S =: τ. What is below τ, or below ``floor``, or at the largest finite value and
    beyond (NaN included) is doubtful whatever its last bits.

    Comparing every element is the slow way (a boolean pass costs torch more than the conversion itself).
    Instead each word is seen as its two halves, and each half mapped by one wrapping multiply-add to a key,
    such that the doubtful are the smallest keys: the low half by shifting out what is stored, the high half
    by shifting out the sign and turning [overflow … NaN] and [0 … τ], adjacent modulo 2^width, to the
    bottom. A minimum over each of ``WIDTH`` columns then says where to look: about one in a thousand.

    Holds the workspace ``carried`` for ``size`` elements or somewhat more; not for two threads at once.
    """

    WIDTH = 8192

    def __init__(self, dtype: torch.dtype, size: int, eta: float, spread: float, device: torch.device) -> None:
        check_storage(dtype)
        carrier = _CARRIERS[dtype]
        rows = -(-size // self.WIDTH)
        self.carried = torch.zeros(rows * self.WIDTH, dtype=carrier.dtype, device=device)
        self._keys = torch.empty(rows, 2 * self.WIDTH, dtype=carrier.half, device=device)
        width = 8 * carrier.half.itemsize
        bottom, modulus = -(2 ** (width - 1)), 2**width
        # 2^-20 covers the rounding of τ itself, of f against a, and of the norms that S came from.
        tau = max(carrier.floor, 2.0 ** (carrier.reach + 2) * eta * spread * (1 + 2.0**-20))
        if not eta <= 2.0 ** -(carrier.reach + 1) or math.isnan(tau):
            tau = math.inf
        tiny = _word(carrier.dtype, tau) >> width
        top = _word(carrier.dtype, torch.finfo(dtype).max) >> width
        shift = 2 ** (width - carrier.low)
        low = (shift, shift * carrier.slack, bottom + 2 * shift * carrier.slack)
        wrapped = modulus - 2 * top
        high = (2, bottom + wrapped, min(bottom + wrapped + 2 * tiny, -bottom - 1))
        halves = (low, high) if sys.byteorder == "little" else (high, low)

        def per_half(index: int) -> Tensor:
            return torch.tensor([half[index] for half in halves], dtype=carrier.half, device=device)

        self._factor, self._offset, self._limit = (per_half(i).repeat(self.WIDTH) for i in range(3))

    def candidates(self, size: int) -> Tensor:
        """Indices (1-D, int64) of the doubtful among the first ``size`` elements of ``carried``."""
        rows = -(-size // self.WIDTH)
        words = self.carried[: rows * self.WIDTH].view(self._keys.dtype).view(rows, -1)
        keys = self._keys[:rows]
        torch.addcmul(self._offset, words, self._factor, out=keys)
        columns = _either_half(keys.amin(0) <= self._limit).nonzero()[:, 0]
        pairs = keys.view(rows, -1, 2)[:, columns]
        hits = _either_half(pairs <= self._limit[:2]).nonzero()
        index = hits[:, 0] * self.WIDTH + columns[hits[:, 1]]
        return index[index < size]  # beyond it there is what an earlier, larger block left


def _either_half(doubtful: Tensor) -> Tensor:
    """Non-zero where one of two neighbouring booleans is true: the pair seen as one integer, which takes a
    third of the time of a reduction over two."""
    return doubtful.view(torch.int16)
