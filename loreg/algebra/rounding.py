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

STORAGE_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn, torch.float8_e5m2)
"""Dtypes of weights that loreg writes."""

_BITS = {
    torch.float8_e4m3fn: torch.int8,
    torch.float8_e5m2: torch.int8,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
    torch.float32: torch.int32,
}

_E4M3_THRESHOLD = 464.0  # halfway from the largest value, 448, to the next step, which is NaN


def check_storage(dtype: torch.dtype) -> None:
    """Raises Unsupported unless ``dtype`` is in STORAGE_DTYPES."""
    if dtype not in STORAGE_DTYPES:
        raise Unsupported(f"weights cannot be stored as {dtype}: choose one of {STORAGE_DTYPES}.")


def bits(x: Tensor) -> Tensor:
    """The same memory as signed integers of the same width. Raises Unsupported for another dtype."""
    check_storage(x.dtype)
    return x.view(_BITS[x.dtype])


def finite(x: Tensor) -> Tensor:
    """bool, the shape of ``x``, of any floating dtype: neither NaN nor infinite. float8_e4m3fn has no infinity."""
    if x.dtype == torch.float8_e4m3fn:  # for which torch has no isfinite
        return bits(x).bitwise_and(127) != 127
    return x.isfinite()


def widen(x: Tensor, out: Tensor) -> None:
    """The values of ``x``, exactly, into ``out``: float64, of the same shape and device.

    float8_e4m3fn goes by way of float16, where its bits shifted by seven places are 2⁻⁸ of the value, subnormals
    included: a third of the time of torch's own conversion. Only NaN is no number there.
    """
    if x.dtype != torch.float8_e4m3fn or not x.numel() or int(x.view(torch.uint8).bitwise_and(127).amax()) == 127:
        out.copy_(x)
        return
    word = bits(x).to(torch.int16).mul_(2**7).bitwise_and_(~(1 << 14))
    out.copy_(word.view(torch.float16)).mul_(2.0**8)


def round_to(acc: Tensor, dtype: torch.dtype) -> Tensor:
    """``acc`` (float64, any shape, any device) rounded once to ``dtype``: to nearest, ties to even.

    Beyond the largest finite value the result is an infinity, as IEEE 754 has it: the caller decides what
    that means. float8_e4m3fn has none: there it is NaN, from the next step on: 464, halfway to it, is 448, whose
    last bit is even (OCP 8-bit Floating Point Specification, rev. 1.0, 5.2.1). torch's own conversion makes
    448 of it and of anything larger, silently. Signs of zeros are kept.

    For dtypes of fewer than 32 bits float64 is first rounded *to odd* in float32:
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
    odd = torch.where(fix, word + towards, word).to(torch.int32).view(torch.float32)
    if dtype == torch.float8_e4m3fn:
        odd = torch.where(odd.abs() > _E4M3_THRESHOLD, math.nan, odd)
    return odd.to(dtype)


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
    # Not x.abs(): of a float8 -0.0 torch makes -0.0.
    magnitude = bits(x).bitwise_and(2 ** (8 * x.element_size() - 1) - 1)
    here = torch.minimum(magnitude, largest - 1)
    return ((here + 1).view(x.dtype).double() - here.view(x.dtype).double()) / 2


@dataclass(frozen=True, slots=True)
class _Carrier:
    """How a result in float64 travels to a storage dtype, and where its rounding boundaries show.

    ``low`` bits at the end of a word of ``dtype`` lie beyond the storage dtype's last place: a boundary has
    there a one and then zeros. ``view``: the integer dtype in which words are tested, half as wide as a word if
    ``low`` bits fit into it. ``floor``: below it that pattern does not hold, as spacing stops shrinking.
    ``reach``: where the error of the accumulation is at most 2^-reach of the result, every doubtful element
    lies within ``slack`` words of a boundary. ``scale``: a power of two by which results are multiplied on the
    way. It takes the smallest normal float8 to the smallest normal float32, so that both run out of exponents
    at one place, and the pattern holds down to zero: half the weights of a model are subnormal in float8.
    """

    dtype: torch.dtype
    view: torch.dtype
    low: int
    floor: float
    reach: int
    slack: int
    scale: float = 1.0


_CARRIERS = {
    torch.float8_e4m3fn: _Carrier(torch.float32, torch.int32, 20, floor=0.0, reach=27, slack=0, scale=2.0**-120),
    torch.float8_e5m2: _Carrier(torch.float32, torch.int32, 21, floor=0.0, reach=27, slack=0, scale=2.0**-112),
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


def thresholds(dtype: torch.dtype, eta: float, spread: float) -> tuple[int, int, int]:
    """What a ``Screen`` compares with, as whole words of the carrier: magnitudes below the first and from the second
    on are doubtful, and last bits that are within the third of a one and zeros. See there."""
    carrier = _CARRIERS[dtype]
    top = _word(carrier.dtype, torch.finfo(dtype).max * carrier.scale)
    return min(_word(carrier.dtype, _tau(carrier, eta, spread) * carrier.scale), top), top, carrier.slack


def _tau(carrier: _Carrier, eta: float, spread: float) -> float:
    # 2^-20 covers the rounding of τ itself, of f against a, and of the norms that S came from.
    tau = max(carrier.floor, 2.0 ** (carrier.reach + 2) * eta * spread * (1 + 2.0**-20))
    return tau if eta <= 2.0 ** -(carrier.reach + 1) and not math.isnan(tau) else math.inf


class Workspace:
    """Memory that edits use one after the other: fresh pages for each cost more than what is computed in them.

    What is taken from it holds until the same is taken again, and belongs to one thread.
    """

    def __init__(self) -> None:
        self._memory: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def take(self, use: str, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """``size`` elements (1-D), of whatever values are there."""
        key = use, dtype, device
        found = self._memory.get(key)
        if found is None or found.numel() < size:
            found = self._memory[key] = torch.empty(size, dtype=dtype, device=device)
        return found[:size]


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
    beyond (NaN included) is doubtful whatever its last bits. *Scaled float32.* The same, where f is normal; a
    subnormal f has the spacing of the smallest normal, which is more, and more than 2⁻²⁷|a| all the more. What
    is stored is a rounded to float32 unscaled: on m only if f is, as that spacing is no wider.

    Comparing every element is the slow way (a boolean pass costs torch more than the conversion itself).
    Instead each word is seen as its two halves, and each half mapped by one wrapping multiply-add to a key,
    such that the doubtful are the smallest keys: the low half by shifting out what is stored, the high half
    by shifting out the sign and turning [overflow … NaN] and [0 … τ], adjacent modulo 2^width, to the
    bottom. A minimum over each of ``WIDTH`` columns then says where to look: about one in a thousand. Where
    the last bits do not fit into half a word (float8) both keys are made from the whole of it.

    Holds a workspace for ``size`` elements or somewhat more, ``carried``; not for two threads at once.
    """

    WIDTH = 8192

    def __init__(
        self,
        dtype: torch.dtype,
        eta: float,
        spread: float,
        size: int,
        device: torch.device,
        workspace: Workspace | None = None,
    ) -> None:
        check_storage(dtype)
        workspace = workspace or Workspace()
        carrier = _CARRIERS[dtype]
        rows = -(-size // self.WIDTH)
        self._scale = carrier.scale
        self._whole = carrier.view.itemsize == carrier.dtype.itemsize
        self.carried = workspace.take("carried", rows * self.WIDTH, carrier.dtype, device)
        self._keys = workspace.take("keys", rows * 2 * self.WIDTH, carrier.view, device).view(rows, 2 * self.WIDTH)
        width = 8 * carrier.view.itemsize
        bottom, modulus = -(2 ** (width - 1)), 2**width
        cut = 8 * carrier.dtype.itemsize - width
        tiny, top = (word >> cut for word in thresholds(dtype, eta, spread)[:2])
        shift = 2 ** (width - carrier.low)
        low = (shift, shift * carrier.slack, bottom + 2 * shift * carrier.slack)
        wrapped = modulus - 2 * top
        high = (2, bottom + wrapped, min(bottom + wrapped + 2 * tiny, -bottom - 1))
        tests = (low, high) if sys.byteorder == "little" else (high, low)

        def per_key(index: int) -> Tensor:
            pair = torch.tensor([test[index] for test in tests], dtype=carrier.view, device=device)
            return pair[:, None].repeat(1, self.WIDTH) if self._whole else pair.repeat(self.WIDTH)

        self._factor, self._offset, self._limit = (per_key(i) for i in range(3))

    def carry(self, acc: Tensor) -> None:
        """Take up float64 results, from the first place on. ``acc`` may be ``carried`` itself, if that is float64."""
        target = self.carried[: acc.numel()].view(acc.shape)
        if self._scale != 1.0:
            torch.mul(acc, self._scale, out=target)
        elif target.data_ptr() != acc.data_ptr():
            target.copy_(acc)

    def store(self, acc: Tensor, out: Tensor) -> None:
        """What was carried, of which ``acc`` is the float64, converted once into ``out``, of the screen's dtype.

        Elements that are candidates may be wrong, and some of them beyond the largest finite value, silently.
        """
        out.copy_(acc if self._scale != 1.0 else self.carried[: acc.numel()].view(acc.shape))

    def candidates(self, size: int) -> Tensor:
        """Indices (1-D, int64) of the doubtful among the first ``size`` elements of ``carried``."""
        rows = -(-size // self.WIDTH)
        words = self.carried[: rows * self.WIDTH].view(self._keys.dtype)
        if self._whole:
            keys = self._keys[:rows].view(rows, 2, self.WIDTH)
            torch.addcmul(self._offset, words.view(rows, 1, self.WIDTH), self._factor, out=keys)
            columns = (keys.amin(0) <= self._limit).any(0).nonzero()[:, 0]
            hits = (keys[:, :, columns] <= self._limit[:, :1]).any(1).nonzero()
        else:
            keys = self._keys[:rows]
            torch.addcmul(self._offset, words.view(rows, -1), self._factor, out=keys)
            columns = _either_half(keys.amin(0) <= self._limit).nonzero()[:, 0]
            pairs = keys.view(rows, -1, 2)[:, columns]
            hits = _either_half(pairs <= self._limit[:2]).nonzero()
        index = hits[:, 0] * self.WIDTH + columns[hits[:, 1]]
        return index[index < size]  # beyond it there is what an earlier, larger block left


def _either_half(doubtful: Tensor) -> Tensor:
    """Non-zero where one of two neighbouring booleans is true: the pair seen as one integer, which takes a
    third of the time of a reduction over two."""
    return doubtful.view(torch.int16)
