"""Weights stored in 8 bits: every value, every midpoint, and sums, against rational arithmetic."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest
import torch
from test_rounding import FLOAT8, every_value, nearest, same
from torch import Tensor

from loreg.algebra import Dense, LowRank, WeightedSum, apply
from loreg.algebra.rounding import bits, finite, round_to, widen
from loreg.errors import BadInput
from loreg.tensors import from_buffer, to_memory, torch_dtype

DOUBLE = torch.float64
# (bits of the exponent, bits of the mantissa, bias), and the largest word of a number (OCP 8-bit Floating Point
# Specification, rev. 1.0, table 1).
FIELDS = {torch.float8_e4m3fn: (4, 3, 7, 0x7E), torch.float8_e5m2: (5, 2, 15, 0x7B)}

float8 = pytest.mark.parametrize("dtype", FLOAT8, ids=str)


def decoded(byte: int, dtype: torch.dtype) -> float:
    """The value of one byte, read from its fields."""
    _, mantissa, bias, largest = FIELDS[dtype]
    word = byte & 0x7F
    if word > largest:
        return math.inf * (-1 if byte > 127 else 1) if word == 0x7C and dtype == torch.float8_e5m2 else math.nan
    exponent, fraction = divmod(word, 2**mantissa)
    significand = fraction if exponent == 0 else fraction + 2**mantissa
    value = significand * 2.0 ** (max(exponent, 1) - bias - mantissa)
    return -value if byte > 127 else value


def rational(W: Tensor, edit: WeightedSum) -> list[Fraction]:
    """W + Σ d·X + Σ c·B·A, element by element."""
    sums = [Fraction(w) for w in W.double().flatten().tolist()]
    for dense in edit.dense:
        for e, x in enumerate(dense.value.double().flatten().tolist()):
            sums[e] += Fraction(dense.scale) * Fraction(x)
    for term in edit.low_rank:
        left, right = term.left.double().tolist(), term.right.double().T.tolist()
        for e, (row, column) in enumerate(itertools.product(left, right)):
            products = (Fraction(b) * Fraction(a) for b, a in zip(row, column, strict=True))
            sums[e] += Fraction(term.scale) * sum(products)
    return sums


def check(W: Tensor, edit: WeightedSum, dtype: torch.dtype) -> None:
    """Every element of the merge is the nearest value; a zero W that nothing is added to keeps its sign."""
    pairs = zip(rational(W, edit), W.double().flatten().tolist(), strict=True)
    truth = [w if q == 0 and w == 0 else nearest(q, dtype) for q, w in pairs]
    assert all(math.isfinite(x) for x in truth)
    assert same(apply(W, edit, dtype), truth)


def pairs(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """All values but the largest, from -0 outwards on both sides, and the next one away from zero."""
    half = torch.arange(0, FIELDS[dtype][3])
    words = torch.cat([half, half + 128])
    return tuple(x.to(torch.uint8).view(dtype) for x in (words, words + 1))  # type: ignore[return-value]


@float8
def test_all_values(dtype: torch.dtype) -> None:
    raw = bytearray(range(256))
    stored = from_buffer(raw, dtype, (256,))
    truth = [decoded(byte, dtype) for byte in raw]
    assert bytes(to_memory(stored)) == bytes(raw)
    assert finite(stored).tolist() == [math.isfinite(x) for x in truth]
    wide = torch.empty(256, dtype=DOUBLE)
    widen(stored, wide)  # with NaN among them
    assert same(wide, truth)
    numbers = stored[finite(stored)]
    wide = torch.empty(numbers.shape, dtype=DOUBLE)
    widen(numbers, wide)
    assert same(wide, [x for x in truth if math.isfinite(x)])
    assert torch.equal(bits(round_to(wide, dtype)), bits(numbers))


def test_names() -> None:
    assert [torch_dtype(name, "W") for name in ("F8_E4M3", "F8_E5M2")] == list(FLOAT8)


@float8
@pytest.mark.parametrize("nudge", [0.0, 2.0**-60, -(2.0**-60), 2.0**-300, -(2.0**-300)])
def test_every_midpoint(dtype: torch.dtype, nudge: float) -> None:
    """From each value halfway to the next, and past that or short of it by next to nothing."""
    low, high = pairs(dtype)
    half = (high.double() - low.double()) / 2
    far = 1.0 if nudge >= 0 else -1.0
    added = (Dense(half, 1.0), Dense(half.sign() * far, abs(nudge)))
    check(low, WeightedSum((), added), dtype)
    check(low, WeightedSum((), (Dense(half, -1.0), Dense(half.sign() * far, abs(nudge)))), dtype)


@float8
def test_nothing_added_changes_nothing(dtype: torch.dtype) -> None:
    W = every_value(dtype)
    assert torch.equal(bits(apply(W, WeightedSum())), bits(W))
    delta = Dense(torch.ones(W.shape, dtype=DOUBLE))
    assert torch.equal(bits(apply(W, WeightedSum((), (delta, -delta)))), bits(W))


@float8
@pytest.mark.parametrize("size", [1.0, 2.0**-7, 2.0**-15])
@pytest.mark.parametrize("seed", range(3))
def test_sums_at_random(dtype: torch.dtype, size: float, seed: int) -> None:
    """Normal and subnormal results; factors of float64 and of float8, dense terms of float8."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=DOUBLE, generator=random)

    W = round_to(normal(40, 37) * size, dtype)
    deltas = (
        LowRank(normal(40, 3) * size / 8, normal(3, 37), 0.3),
        LowRank(round_to(normal(40, 2), dtype), round_to(normal(2, 37), dtype), size / 3),
    )
    for edit in (WeightedSum(deltas), WeightedSum(deltas, (Dense(round_to(normal(40, 37) * size, dtype), -0.7),))):
        check(W, edit, dtype)


@float8
@pytest.mark.parametrize("size", [8.0, 2.0**-7])
def test_small_steps_land_on_ties(dtype: torch.dtype, size: float) -> None:
    """Deltas of few bits, as of quantised adapters: most sums are midpoints or values, and decided exactly."""
    random = torch.Generator().manual_seed(7)
    unit = size * torch.finfo(dtype).eps / 4
    W = round_to(torch.randn(40, 37, dtype=DOUBLE, generator=random) * size, dtype)
    left, right = (torch.randint(-3, 4, shape, generator=random).double() for shape in ((40, 2), (2, 37)))
    delta = LowRank(left * unit, right, 1.0)
    edit = WeightedSum((delta,))
    assert edit.prepare(W.shape, dtype, dtype).tile(W, 0, torch.empty_like(W)).doubt > 100
    check(W, edit, dtype)


@pytest.mark.parametrize(
    ("dtype", "last", "first"),
    [
        (torch.float8_e4m3fn, 464.0, math.nextafter(464.0, math.inf)),
        (torch.float8_e5m2, math.nextafter(61440.0, 0.0), 61440.0),
    ],
    ids=str,
)
@pytest.mark.parametrize("sign", [1, -1])
def test_overflow_is_refused(dtype: torch.dtype, last: float, first: float, sign: int) -> None:
    """One half step beyond the largest value, which is even in e4m3fn, and odd in e5m2; torch saturates at 448."""
    top = torch.finfo(dtype).max
    W = torch.tensor([1.0, sign * top, 0.0, 1.0], dtype=dtype)

    def towards(goal: float) -> WeightedSum:
        return WeightedSum((), (Dense(torch.tensor([0.0, sign * (goal - top), 0.0, 0.0], dtype=DOUBLE)),))

    assert same(apply(W, towards(last)), [1.0, sign * top, 0.0, 1.0])
    for goal in (first, 480.0 if top == 448 else 65536.0, 1e6, 1e300):
        with pytest.raises(BadInput, match=r"element \[1\] exceeds the largest finite torch.float8"):
            apply(W, towards(goal))


@float8
def test_what_is_no_number_is_refused(dtype: torch.dtype) -> None:
    W = torch.tensor([1.0, math.nan], dtype=dtype)
    for out in (dtype, torch.bfloat16):
        with pytest.raises(BadInput, match=r"element \[1\] is NaN or infinite in W"):
            apply(W, WeightedSum(), out)
    with pytest.raises(BadInput, match="NaN or infinity"):
        Dense(W)


@float8
@pytest.mark.parametrize("other", [torch.float32, torch.bfloat16, torch.float16])
def test_to_and_from_other_dtypes(dtype: torch.dtype, other: torch.dtype) -> None:
    values = every_value(dtype)
    if other != torch.float16 or dtype != torch.float8_e5m2:
        assert same(apply(values, WeightedSum(), other), values.double().tolist())
    random = torch.Generator().manual_seed(3)
    wide = torch.randn(20, 30, generator=random) * 2.0 ** torch.randint(-12, 3, (20, 30), generator=random)
    check(wide.to(other), WeightedSum(), dtype)
    with pytest.raises(BadInput, match="exceeds"):
        apply(torch.tensor([62000.0], dtype=other), WeightedSum(), dtype)


@float8
def test_tiles_and_places_make_no_difference(dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(5)
    W = round_to(torch.randn(50, 700, dtype=DOUBLE, generator=random), dtype)
    left, right = (torch.randn(*shape, generator=random, dtype=DOUBLE) for shape in ((50, 4), (4, 700)))
    edit = WeightedSum((LowRank(left, right, 0.1),))
    whole = apply(W, edit)
    for height in (1, 7, 50):
        prepared = edit.prepare(W.shape, dtype, dtype, tile_rows_hint=3)
        pieces = W.clone()
        doubts = sum(
            prepared.tile(pieces[k : k + height], k, pieces[k : k + height]).doubt for k in range(0, 50, height)
        )
        assert doubts == edit.prepare(W.shape, dtype, dtype).tile(W, 0, torch.empty_like(W)).doubt
        assert torch.equal(bits(pieces), bits(whole))
