"""The kernels give the bytes of torch's passes. Run by ``test_triton.py``, in Triton's interpreter and on the CPU."""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loreg.algebra import LowRank, WeightedSum, gpu, native
from loreg.algebra.edits import Prepared, Stacked
from loreg.algebra.gpu import groups, kernels, undo
from loreg.algebra.launching import Undone, Work, launch
from loreg.algebra.passes import UNSURE, Outcome
from loreg.algebra.rounding import bits, from_ordered, ordered
from loreg.errors import BadInput
from tests.laws.test_rounding import PRECISION, nearest

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
BF16, F32 = torch.bfloat16, torch.float32
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(autouse=True, scope="module")
def _on_the_cpu() -> Iterator[None]:
    """Small tiles, of which the interpreter takes as long as of large ones; several of them, of several jobs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "DEVICES", frozenset({"cpu"}))
        patch.setattr(groups, "_ROWS", {True: 16, False: 8})
        patch.setattr(undo, "COLUMNS", 32)
        yield


@pytest.fixture(autouse=True)
def _nothing_is_zero_by_luck() -> Iterator[None]:
    """Memory that nobody wrote has the largest number in it, as that of an earlier merge has any."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def test_it_is_interpreted() -> None:
    assert not kernels.COMPILED


def prepared(edit: WeightedSum, W: torch.Tensor, dtype: torch.dtype, residual: bool) -> Prepared | Stacked:
    found = edit.prepare(W.shape, W.dtype, dtype, residual=residual)
    assert found.on_gpu
    return found


def by_torch(
    edit: WeightedSum, W: torch.Tensor, dtype: torch.dtype, residual: bool
) -> tuple[torch.Tensor, torch.Tensor | None, Outcome]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "DEVICES", frozenset())
        patch.setattr(native, "library", None)
        return _tile(edit.prepare(W.shape, W.dtype, dtype, residual=residual), W, dtype, residual)


def _tile(
    pass_: Prepared | Stacked, W: torch.Tensor, dtype: torch.dtype, residual: bool
) -> tuple[torch.Tensor, torch.Tensor | None, Outcome]:
    out = torch.full(W.shape, 3.0, dtype=dtype)
    small = torch.full(W.shape, 77, dtype=torch.int8) if residual else None
    return out, small, pass_.tile(W, 0, out, small)


def check(W: torch.Tensor, edit: WeightedSum, dtype: torch.dtype, *, residual: bool = True) -> torch.Tensor:
    """By tiles and by a launch in place; returns W'."""
    expected, small, wide = by_torch(edit, W, dtype, residual)
    found, residuals, outcome = _tile(prepared(edit, W, dtype, residual), W, dtype, residual)
    assert torch.equal(bits(found), bits(expected))
    if small is not None and residuals is not None:
        assert torch.equal(residuals, small)
        assert torch.equal(outcome.index, wide.index) and torch.equal(outcome.wide, wide.wide)
    place = W.clone() if dtype == W.dtype else torch.full(W.shape, 3.0, dtype=dtype)
    source = place if dtype == W.dtype else W
    (kept,) = launch([Work(prepared(edit, W, dtype, residual), source, place)], residual=residual).done()
    assert torch.equal(bits(place), bits(expected))
    if small is None:
        assert kept is None
    elif kept is not None:
        assert torch.equal(_dense(kept, W), _with(small, wide))
        if dtype == W.dtype:
            _restored(edit, W, place, kept)
    return expected


def _dense(kept: Undone, W: torch.Tensor) -> torch.Tensor:
    found = kept.corrections()
    assert found.index.dtype == torch.int32 and found.by.dtype == torch.int8
    assert not bool((found.by == 0).any()) and bool((found.index.diff() > 0).all())
    assert bool((found.wide.abs() > 127).all()) and bool((found.wide_index.diff() > 0).all())
    flat = torch.zeros(W.numel(), dtype=torch.int64)
    flat[found.index], flat[found.wide_index] = found.by.long(), found.wide
    return flat.view(W.shape)


def _with(small: torch.Tensor, wide: Outcome) -> torch.Tensor:
    flat = small.long().view(-1)
    assert torch.equal((flat == UNSURE).nonzero()[:, 0], wide.index)
    flat[wide.index] = wide.wide
    return flat.view(small.shape)


def _restored(edit: WeightedSum, W: torch.Tensor, merged: torch.Tensor, kept: Undone) -> None:
    back = prepared(edit, merged, W.dtype, False)
    launch([Work(None, merged, merged, back=back, kept=kept)]).done()
    assert torch.equal(bits(merged), bits(W))


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    pair=st.sampled_from([(BF16, BF16), (BF16, BF16), *((x, y) for x in DTYPES for y in DTYPES)]),
    rows=st.integers(1, 20),
    columns=st.sampled_from([1, 7, 8, 31, 40]),
    rank=st.sampled_from([0, 1, 3, 16]),
    scale=st.sampled_from([1.0, 0.3, 2.0**-20, 8.0]),
    size=st.sampled_from([1.0, 2.0**-10, 2.0**-130]),
    narrow=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_any_weight(
    pair: tuple[torch.dtype, torch.dtype],
    rows: int,
    columns: int,
    rank: int,
    scale: float,
    size: float,
    narrow: bool,
    seed: int,
) -> None:
    random = torch.Generator().manual_seed(seed)
    values = size * torch.randn(rows, columns, generator=random)
    for factor in (0.0, -0.0, 2.0**-5, 2.0**-12):
        values[torch.rand(rows, columns, generator=random) < 0.05] *= factor
    dtype = BF16 if narrow else F32
    left, right = (torch.randn(*shape, generator=random).to(dtype) for shape in ((rows, rank), (rank, columns)))
    terms = (LowRank(left, right, scale * size / rank / 16),) if rank else ()
    check(values.to(pair[0]), WeightedSum(terms), pair[1], residual=pair[0] == pair[1])


def test_a_rank_that_is_a_loop_and_several_terms(rank: int = 64) -> None:
    random = torch.Generator().manual_seed(1)
    W = (0.02 * torch.randn(9, 16, generator=random)).to(BF16)
    terms = [
        LowRank(torch.randn(9, r, generator=random).to(BF16), torch.randn(r, 16, generator=random), scale)
        for r, scale in ((rank - 1, 2.0**-12), (1, -0.01))
    ]
    check(W, WeightedSum(tuple(terms)), BF16)


@every_dtype
def test_midpoints_and_powers_of_two(dtype: torch.dtype) -> None:
    """Ties in both directions, and W at the edge of a binade, where the spacing below is half; by fractions."""
    step = torch.finfo(dtype).eps
    W = (1 + step * torch.arange(-8, 24).double() / 2).to(dtype).repeat(32, 1)
    W[::2] *= -1
    left, right = torch.arange(-16, 16)[:, None] * step / 4, torch.ones(1, 32)
    right[0, ::3] += 2.0**-20
    merged = check(W, WeightedSum((LowRank(left, right),)), dtype)
    for i, j in ((0, 1), (5, 4), (18, 7), (31, 30), (17, 11), (10, 8)):
        exact = Fraction(float(W[i, j])) + Fraction(float(left[i, 0])) * Fraction(float(right[0, j]))
        assert merged[i, j].item() == nearest(exact, dtype)


def test_midpoints_of_bfloat16_missed_by_less_than_float32_can_tell() -> None:
    W = torch.full((16, 32), 1.0, dtype=BF16)
    left = torch.tensor([[2.0**-8, 2.0**-40]]).repeat(16, 1)
    right = torch.ones(2, 32)
    right[1] = torch.tensor([1.0, -1.0]).repeat(16)
    merged = check(W, WeightedSum((LowRank(left, right),)), BF16)
    assert merged[0, :2].tolist() == [1 + 2.0**-7, 1.0]


def test_midpoints_of_bfloat16_on_the_other_side_of_what_float32_sums_to() -> None:
    """Large products that cancel, but for what rounding one of them loses."""
    factors = torch.tensor([3001.7, 1.2345678])
    lost = float(factors.double().prod() - factors.prod().double())
    assert abs(lost) > 2.0**-20
    left = torch.tensor([[float(factors[0]), -float(factors.prod()), 2.0**-8 - lost / 2]]).repeat(16, 1)
    right = torch.tensor([float(factors[1]), 1.0, 1.0])[:, None].repeat(1, 32)
    merged = check(torch.ones(16, 32, dtype=BF16), WeightedSum((LowRank(left, right),)), BF16)
    assert merged[0, 0].item() == (1 + 2.0**-7 if lost > 0 else 1.0)


@pytest.mark.parametrize("sign", [1, -1])
def test_midpoints_below_a_power_of_two(sign: int) -> None:
    """They are a quarter of a step away, and float32 off by more than that, as large numbers cancel."""
    left, right = torch.full((8, 20), -sign * (1 - 2.0**-10) * 2.0**-7), torch.full((20, 32), 2.0**-6)
    left[:, 0], right[0] = sign * 2049.0, 1.0
    edit = WeightedSum((LowRank(left, right),))
    merged = check(torch.full((8, 32), -sign * 2048.0, dtype=BF16), edit, BF16)
    assert merged[0, 0].item() == sign * 0.99609375


@every_dtype
def test_signs_of_zeros(dtype: torch.dtype) -> None:
    W = torch.tensor([0.0, -0.0, 1.0, -1.0], dtype=dtype).repeat(4, 2)
    left = torch.tensor([[0.0], [1.0], [-1.0], [2.0**-149]])
    merged = check(W, WeightedSum((LowRank(left, torch.ones(1, 8)),)), dtype)
    assert torch.equal(bits(merged[0]), bits(W[0]))
    assert not torch.signbit(merged[1, 3]) and not torch.signbit(merged[2, 2])


@every_dtype
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_refused(dtype: torch.dtype, value: float) -> None:
    W = torch.ones(9, 40, dtype=dtype)
    W[7, 33] = value
    edit = WeightedSum((LowRank(torch.ones(9, 2), torch.ones(2, 40)),))
    with pytest.raises(BadInput, match=r"element \[7, 33\] is NaN or infinite"):
        edit.apply(W)
    with pytest.raises(BadInput, match=r"element \[7, 33\] is NaN or infinite"):
        launch([Work(prepared(edit, W, dtype, True), W, W)], residual=True).done()


@every_dtype
def test_a_result_beyond_the_largest_value_is_refused(dtype: torch.dtype) -> None:
    top = torch.finfo(dtype).max
    W = torch.full((9, 40), top, dtype=dtype)
    edit = WeightedSum((LowRank(torch.eye(9)[:, 2:3], torch.eye(40)[5:6], top / 4),))
    with pytest.raises(BadInput, match=r"element \[2, 5\] exceeds"):
        edit.apply(W)
    small = WeightedSum((LowRank(torch.eye(9)[:, 2:3], torch.eye(40)[5:6], top * 2.0**-40),))
    assert torch.equal(check(W, small, dtype, residual=False), W)


@pytest.mark.parametrize("factor", [1e30, 1e-300, 1e200])
def test_factors_that_no_bound_holds_for(factor: float) -> None:
    """Beyond float32, or what a product may be: all is decided exactly."""
    left = torch.tensor([[factor, -factor]], dtype=torch.float64).repeat(5, 1)
    right = torch.tensor([[1.0], [1.0]]).repeat(1, 16)
    right[0, 3:] += 2.0**-20
    W = torch.linspace(-1, 1, 80).view(5, 16).to(BF16)
    check(W, WeightedSum((LowRank(left, right.double(), 1 / factor / 64),)), BF16)
    check(W, WeightedSum((LowRank(left.clamp(-1e38, 1e38).float(), right, 2.0**-120),)), BF16)


@every_dtype
def test_a_small_weight_under_a_large_delta(dtype: torch.dtype) -> None:
    """Corrections beyond a byte, everywhere."""
    random = torch.Generator().manual_seed(2)
    W = torch.randn(20, 32, generator=random).mul(2.0**-12).to(dtype)
    edit = WeightedSum((LowRank(torch.randn(20, 4, generator=random), torch.randn(4, 32, generator=random)),))
    check(W, edit, dtype)


@pytest.mark.parametrize(("dtype", "share"), [(BF16, (0.0, 0.0)), (BF16, (0.3, 0.02)), (F32, (0.0, 0.0))], ids=str)
def test_more_than_lists_have_room_for(dtype: torch.dtype, share: tuple[float, float]) -> None:
    """Sums that are midpoints, one and a half steps away: in place, where what is done twice shows."""
    random = torch.Generator().manual_seed(3)
    W, step = torch.randint(128, 256, (30, 40), generator=random).to(dtype), 192 * torch.finfo(dtype).eps
    edit = WeightedSum((LowRank(torch.randint(0, 2, (30, 1), generator=random).double(), torch.ones(1, 40), step),))
    runs = []
    start = groups.Group.start
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(groups, "_LEAST", 1)
        patch.setattr(groups, "SHARE", share)
        patch.setattr(groups.Group, "start", lambda group, *rooms: (runs.append(rooms), start(group, *rooms))[1])
        check(W, edit, dtype)
    assert len(runs) == 6  # of a tile, of a launch and of one that takes back


def test_more_residuals_than_there_is_room_for() -> None:
    random = torch.Generator().manual_seed(6)
    W = (0.02 * torch.randn(40, 40, generator=random)).to(BF16)
    edit = WeightedSum((LowRank(torch.randn(40, 2, generator=random), torch.randn(2, 40, generator=random), 0.01),))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(groups, "_LEAST", 3)
        patch.setattr(groups, "SHARE", (1.0, 0.0))
        check(W, edit, BF16)


def test_many_weights_of_several_kinds_are_launched_together() -> None:
    random = torch.Generator().manual_seed(4)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random)

    def low(*shape: int) -> LowRank:
        return LowRank(normal(*shape[:-1], 3).to(BF16), normal(*shape[:-2], 3, shape[-1]).to(BF16), 0.01)

    weights = [
        (0.02 * normal(*shape)).to(dtype)
        for shape, dtype in (
            ((20, 40), BF16), ((33, 72), BF16), ((5, 9), BF16), ((12, 16), F32), ((3, 10, 24), BF16), ((18, 48), BF16)
        )
    ]  # fmt: skip
    edits = [WeightedSum((low(*W.shape),)) for W in weights]
    outs = [W.clone() for W in weights]
    works = [
        Work(edit.prepare(W.shape, W.dtype, W.dtype, residual=True), W, W)
        for edit, W in zip(edits, outs, strict=True)
    ]
    keeps = launch(works, residual=True).done()
    for W, edit, out, kept in zip(weights, edits, outs, keeps, strict=True):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(gpu, "DEVICES", frozenset())
            assert torch.equal(bits(out), bits(edit.apply(W)))
            predicted = (-edit).apply(out)
        assert kept is not None
        assert torch.equal(_dense(kept, W), ordered(W) - ordered(predicted))
        assert torch.equal(bits(from_ordered(ordered(predicted) + _dense(kept, W), W.dtype)), bits(W))


def test_rows_from_any_on_with_gaps_between_them() -> None:
    random = torch.Generator().manual_seed(5)
    wide = (0.02 * torch.randn(40, 96, generator=random)).to(BF16)
    W, edit = wide[:, 9:73], WeightedSum((LowRank(torch.randn(40, 5), torch.randn(5, 64), 0.003),))
    expected, small, _ = by_torch(edit, W, BF16, True)
    pass_, residual = prepared(edit, W, BF16, True), torch.empty(40, 64, dtype=torch.int8)
    for first in (0, 13, 26):
        here = slice(first, first + 13 if first < 26 else 40)
        pass_.tile(W[here], first, W[here], residual[here])
    assert torch.equal(bits(W), bits(expected)) and small is not None and torch.equal(residual, small)


def test_the_exact_dtypes_of_the_oracle_are_those_of_the_kernels() -> None:
    assert set(DTYPES) == set(groups.CODES) <= set(PRECISION)
