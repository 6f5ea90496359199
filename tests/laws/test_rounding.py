"""Rounding to storage dtypes, against rational arithmetic."""

from __future__ import annotations

import math
import struct
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loreg.algebra import exact
from loreg.algebra.rounding import (
    STORAGE_DTYPES,
    Screen,
    bits,
    finite,
    from_ordered,
    half_ulp,
    ordered,
    round_to,
    ulp_distance,
)
from loreg.errors import Unsupported

PRECISION = {
    torch.bfloat16: (8, -126, 2 - 2.0**-7, 127),
    torch.float16: (11, -14, 2 - 2.0**-10, 15),
    torch.float32: (24, -126, 2 - 2.0**-23, 127),
    torch.float8_e4m3fn: (4, -6, 1.75, 8),
    torch.float8_e5m2: (3, -14, 1.75, 15),
}
"""Bits of precision, least exponent of a normal number, significand and exponent of the largest."""

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
every_dtype = pytest.mark.parametrize("dtype", STORAGE_DTYPES, ids=str)
dtypes = pytest.mark.parametrize("dtype", [dtype for dtype in STORAGE_DTYPES if dtype not in FLOAT8], ids=str)


def nearest(q: Fraction, dtype: torch.dtype) -> float:
    """``q`` rounded to nearest, ties to even, by integers alone; ±inf, or NaN, if that overflows; +0 for 0."""
    if q == 0:
        return 0.0
    precision, least, significand, largest = PRECISION[dtype]
    size = abs(q)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    exponent -= size < Fraction(2) ** exponent
    unit = Fraction(2) ** (max(exponent, least) - precision + 1)
    rounded = round(size / unit) * unit  # round() of a Fraction ties to even
    if rounded > Fraction(significand) * Fraction(2) ** largest:
        return math.nan if dtype == torch.float8_e4m3fn else math.copysign(math.inf, q)
    return math.copysign(float(rounded), q)


def same(found: torch.Tensor, expected: list[float]) -> bool:
    """Equal values and equal signs of zeros; NaN, whatever its sign, where NaN is expected."""
    pairs = zip(found.double().flatten().tolist(), expected, strict=True)
    return all(math.isnan(y) if math.isnan(x) else struct.pack("<d", x) == struct.pack("<d", y) for x, y in pairs)


def every_value(dtype: torch.dtype) -> torch.Tensor:
    """Every finite value of a dtype of 16 or 8 bits."""
    half = 2 ** (8 * dtype.itemsize - 1)
    values = torch.arange(-half, half).to(torch.int16 if dtype.itemsize == 2 else torch.int8).view(dtype)
    return values[finite(values)]


def boundaries(dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Doubles on, just below and just above midpoints of ``dtype``, thresholds and zeros included."""
    if dtype == torch.float32:
        words = torch.randint(0, 0x7F7FFFFF, (3000,), generator=torch.Generator().manual_seed(seed))
        edges = torch.tensor([0, 1, 2, 0x7FFFFF, 0x800000, 0x7F7FFFFE, 0x3F800000])
        low = torch.cat([words, edges]).to(torch.int32).view(dtype)
    else:
        low = every_value(dtype)
        low = low[(low.double() >= 0) & (low.double() < torch.finfo(dtype).max)]
    high = from_ordered(ordered(low) + 1, dtype)
    middle = (low.double() + high.double()) / 2
    top = torch.tensor([torch.finfo(dtype).max], dtype=torch.float64)
    threshold = top + half_ulp(top.to(dtype))
    points = torch.cat([middle, low.double(), threshold, torch.zeros(1, dtype=torch.float64)]).numpy()
    near = [np.nextafter(points, np.inf), points, np.nextafter(points, -np.inf)]
    signed = np.concatenate([*near, *(-x for x in near), [-0.0, 1e308, -1e308, 5e-324, -5e-324]])
    return torch.from_numpy(signed)


@every_dtype
def test_round_to_is_the_nearest_value(dtype: torch.dtype) -> None:
    x = boundaries(dtype, seed=1)[:: 17 if dtype.itemsize == 2 else 1]
    expected = [math.copysign(nearest(Fraction(v), dtype), v) for v in x.tolist()]
    assert same(round_to(x, dtype), expected)


@every_dtype
@settings(max_examples=200, deadline=None)
@given(st.floats(allow_nan=False, allow_infinity=False))
def test_round_to_any_double(dtype: torch.dtype, x: float) -> None:
    found = round_to(torch.tensor([x], dtype=torch.float64), dtype)
    assert same(found, [math.copysign(nearest(Fraction(x), dtype), x)])


@every_dtype
def test_round_to_passes_nan_and_infinity(dtype: torch.dtype) -> None:
    found = round_to(torch.tensor([math.nan, math.inf, -math.inf, 1.0], dtype=torch.float64), dtype)
    infinity = math.nan if dtype == torch.float8_e4m3fn else math.inf
    assert same(found, [math.nan, infinity, -infinity, 1.0])
    assert finite(found).tolist() == [False, False, False, True]


def test_rounding_twice_would_be_wrong() -> None:
    """The reason why round_to exists: through float32, a value just above a midpoint becomes the midpoint."""
    x = torch.tensor([1 + 2.0**-8 + 2.0**-40], dtype=torch.float64)
    assert x.to(torch.float32).to(torch.bfloat16).item() == 1.0
    assert round_to(x, torch.bfloat16).item() == 1 + 2.0**-7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, *FLOAT8], ids=str)
def test_ordered_numbers_neighbours(dtype: torch.dtype) -> None:
    values = every_value(dtype)
    numbers = ordered(values)
    assert torch.equal(bits(from_ordered(numbers, dtype)), bits(values))
    by_number = values[numbers.argsort()].double()
    assert torch.equal(numbers.sort().values.diff(), torch.ones(len(values) - 1, dtype=torch.int64))
    assert bool((by_number.diff() > 0).logical_or((by_number[1:] == 0) & (by_number[:-1] == 0)).all())


def test_ulp_distance() -> None:
    for dtype in STORAGE_DTYPES:
        one = torch.ones(1, dtype=dtype)
        above = (one.double() + torch.finfo(dtype).eps).to(dtype)
        zeros = torch.tensor([0.0, -0.0], dtype=dtype)
        assert ulp_distance(one, above).tolist() == [1] == ulp_distance(above, one).tolist()
        assert ordered(zeros).tolist() == [0, -1] and ulp_distance(zeros[:1], zeros[1:]).tolist() == [1]
        top, bottom = (torch.tensor([x], dtype=dtype) for x in (torch.finfo(dtype).max, torch.finfo(dtype).min))
        assert ulp_distance(top, bottom).item() == 2 * ordered(top).item() + 1
    with pytest.raises(Unsupported):
        ulp_distance(torch.ones(1), torch.ones(1, dtype=torch.float16))


@every_dtype
def test_half_ulp_bounds_one_rounding_and_is_reached(dtype: torch.dtype) -> None:
    x = boundaries(dtype, seed=2)
    stored = round_to(x, dtype)
    x, stored = x[finite(stored)], stored[finite(stored)]
    error = (stored.double() - x).abs()
    assert bool((error <= half_ulp(stored)).all())
    reached = error == half_ulp(stored)
    assert reached.double().mean() > 0.1
    one = torch.tensor([1.0, -1.0, 0.0, 1.5], dtype=dtype)
    eps, tiny = torch.finfo(dtype).eps, torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    assert half_ulp(one).tolist() == [eps / 2, eps / 2, tiny / 2, eps / 2]


@every_dtype
def test_other_dtypes_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(Unsupported, match="float64"):
        round_to(torch.ones(1, dtype=dtype), dtype)
    with pytest.raises(Unsupported, match="float8_e4m3fnuz"):
        round_to(torch.ones(1, dtype=torch.float64), torch.float8_e4m3fnuz)


@every_dtype
@pytest.mark.parametrize("count", [1, 8192, 20_000])
def test_screen_finds_every_boundary(dtype: torch.dtype, count: int) -> None:
    """Every double within the error bound of a boundary must be a candidate, whatever its place in a block."""
    eta, spread = 24 * 2.0**-53, 2.0**-20
    x = boundaries(dtype, seed=3)
    x = x[torch.randperm(max(count, len(x)), generator=torch.Generator().manual_seed(4)) % len(x)][:count]
    margin = eta * (x.abs() + 2 * spread)
    low, high = round_to(x - margin, dtype), round_to(x + margin, dtype)
    doubtful = ((ordered(low) != ordered(high)) | (x == 0) | ~finite(high) | ~finite(low)).nonzero()
    screen = Screen(dtype, eta, spread, count + 5, torch.device("cpu"))
    screen.carried.fill_(1.0)
    screen.carry(x)
    found = screen.candidates(count)
    assert set(doubtful.flatten().tolist()) <= set(found.tolist())
    assert found.numel() == 0 or int(found.max()) < count


@pytest.mark.parametrize(
    ("dtype", "size"),
    [*((dtype, 1.0) for dtype in STORAGE_DTYPES), (torch.float8_e4m3fn, 2.0**-8), (torch.float8_e5m2, 2.0**-16)],
    ids=str,
)
def test_screen_is_selective(dtype: torch.dtype, size: float) -> None:
    """Where most values are subnormal in float8, too."""
    x = torch.randn(2**18, dtype=torch.float64, generator=torch.Generator().manual_seed(5)) * size
    screen = Screen(dtype, 24 * 2.0**-53, size, x.numel(), torch.device("cpu"))
    screen.carry(x)
    assert screen.candidates(x.numel()).numel() < 2**18 / 500


@every_dtype
def test_what_the_screen_passes_is_stored_correctly(dtype: torch.dtype) -> None:
    eta, spread = 24 * 2.0**-53, 2.0**-20
    x = boundaries(dtype, seed=6)[:: 5 if dtype.itemsize == 2 else 1]
    screen = Screen(dtype, eta, spread, x.numel(), torch.device("cpu"))
    screen.carry(x)
    out = torch.empty(x.shape, dtype=dtype)
    screen.store(x, out)
    sure = torch.ones(len(x), dtype=torch.bool)
    sure[screen.candidates(x.numel())] = False
    assert sure.double().mean() > 0.3
    assert torch.equal(bits(out)[sure], bits(round_to(x, dtype))[sure])


@every_dtype
def test_screen_flags_what_is_not_finite(dtype: torch.dtype) -> None:
    screen = Screen(dtype, 2.0**-50, 1e-30, 5, torch.device("cpu"))
    top = torch.finfo(dtype).max
    screen.carry(torch.tensor([1.0, math.nan, math.inf, -math.inf, top], dtype=torch.float64))
    assert screen.candidates(5).tolist() == [1, 2, 3, 4]
    hopeless = Screen(dtype, 2.0**-20, 1.0, 5, torch.device("cpu"))
    hopeless.carry(torch.ones(5, dtype=torch.float64))
    assert hopeless.candidates(5).tolist() == [0, 1, 2, 3, 4]


def odd_of(q: Fraction) -> float:
    """``q`` rounded to odd in float64, by integers: truncate to 53 bits, set the last if anything is lost."""
    if q == 0:
        return 0.0
    size = abs(q)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    exponent -= size < Fraction(2) ** exponent
    unit = Fraction(2) ** (max(exponent, -1022) - 52)
    whole, lost = divmod(size / unit, 1)
    return math.copysign(float((int(whole) | (lost != 0)) * unit), q)


moderate = st.floats(min_value=1e-70, max_value=1e70).flatmap(lambda x: st.sampled_from([x, -x, 0.0]))
extreme = st.floats(min_value=-1e100, max_value=1e100)


@settings(max_examples=300, deadline=None)
@given(st.data(), st.sampled_from([moderate, extreme]), st.integers(0, 3), st.integers(0, 2))
def test_exact_sum_is_the_sum_rounded_to_odd(
    data: st.DataObject, numbers: st.SearchStrategy[float], rank: int, dense: int
) -> None:
    draw = lambda: data.draw(numbers)  # noqa: E731
    w, d, x, c = draw(), [draw() for _ in range(dense)], [draw() for _ in range(dense)], draw()
    b, a = [draw() for _ in range(rank)], [draw() for _ in range(rank)]
    cancel = data.draw(st.booleans()) and rank > 0
    if cancel:  # the first product comes twice, with opposite signs
        b, a = [*b, -b[0]], [*a, a[0]]
    q = Fraction(w) + sum((Fraction(p) * Fraction(y) for p, y in zip(d, x, strict=True)), Fraction(0))
    q += Fraction(c) * sum((Fraction(u) * Fraction(v) for u, v in zip(b, a, strict=True)), Fraction(0))
    found = exact.exact_sum(
        np.array([w]),
        [(p, np.array([y])) for p, y in zip(d, x, strict=True)],
        [(c, np.array(b)[:, None], np.array(a)[:, None])] if rank else [],
    )
    assert found[0] == odd_of(q)


def test_exact_sum_sees_what_lies_far_below() -> None:
    """A tie in bfloat16 is broken by a term 2^-400 of its size, on either side."""
    for sign in (1.0, -1.0):
        w = np.array([1.0])
        found = exact.exact_sum(w, [(2.0**-8, w), (sign, np.array([2.0**-200])), (-sign, np.array([2.0**-201]))], [])
        rounded = round_to(torch.from_numpy(found), torch.bfloat16).item()
        assert rounded == (1 + 2.0**-7 if sign > 0 else 1.0)


def test_exact_sum_beyond_the_range_is_the_largest_double() -> None:
    """Which is odd, and so rounds to nothing that is finite; what cancels there is no less exact."""
    w, big = np.array([1.0]), np.array([[1e300]])
    for sign in (1.0, -1.0):
        assert exact.exact_sum(w, [], [(sign, big, big)])[0] == sign * sys.float_info.max
        assert exact.exact_sum(w, [(sign * 1e300, big[0])], [])[0] == sign * sys.float_info.max
    assert exact.exact_sum(w, [(-1e300, big[0])], [(1.0, big, big)])[0] == 1.0
