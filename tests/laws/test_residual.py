"""The residual of a tile is what has to be added to W' less the delta, correctly rounded, to get W."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loreg.algebra import Dense, LowRank, WeightedSum
from loreg.algebra.passes import UNSURE
from loreg.algebra.rounding import Workspace, bits, from_ordered, ordered

DTYPES = [torch.bfloat16, torch.float32, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2]
pytestmark = pytest.mark.usefixtures("engine")


def _residual(W: torch.Tensor, edit: WeightedSum, cuts: int, place: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """W' and all corrections, from tiles; with ``place`` W' is written over a copy of W."""
    prepared = edit.prepare(W.shape, W.dtype, W.dtype, residual=True, workspace=Workspace())
    rows = W.reshape(-1, W.shape[-1]) if W.ndim == 3 else W
    source = rows.clone()
    out = source if place else torch.empty_like(rows)
    small = torch.full(rows.shape, 77, dtype=torch.int8)
    corrections, height = [], -(-len(rows) // cuts)
    for first in range(0, len(rows), height):
        here = slice(first, first + height)
        outcome = prepared.tile(source[here], first, out[here], small[here])
        found = small[here].reshape(-1).long()
        assert torch.equal((found == UNSURE).nonzero()[:, 0], outcome.index)
        assert bool((outcome.wide.abs() > 127).all())
        found[outcome.index] = outcome.wide
        corrections.append(found)
    return out.view(W.shape), torch.cat(corrections).view(W.shape)


def _check(W: torch.Tensor, edit: WeightedSum, cuts: int = 1, *, place: bool = False) -> torch.Tensor:
    after, corrections = _residual(W, edit, cuts, place)
    assert torch.equal(bits(after), bits(edit.apply(W)))
    predicted = (-edit).apply(after)
    assert torch.equal(corrections, ordered(W) - ordered(predicted))
    assert torch.equal(bits(from_ordered(ordered(predicted) + corrections, W.dtype)), bits(W))
    return corrections


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    rows=st.integers(1, 41),
    columns=st.one_of(st.integers(1, 70), st.integers(500, 540)),
    rank=st.integers(1, 20),
    scale=st.sampled_from([1.0, 0.3, 2.0**-20, 2.0**-140, 8.0]),
    size=st.sampled_from([1.0, 2.0**-10, 2.0**-130]),
    seed=st.integers(0, 2**32),
    cuts=st.integers(1, 3),
    place=st.booleans(),
)
def test_any_weight(
    dtype: torch.dtype,
    rows: int,
    columns: int,
    rank: int,
    scale: float,
    size: float,
    seed: int,
    cuts: int,
    place: bool,
) -> None:
    random = torch.Generator().manual_seed(seed)
    values = size * torch.randn(rows, columns, generator=random)
    for factor in (0.0, -0.0, 2.0**-5, 2.0**-12):
        values[torch.rand(rows, columns, generator=random) < 0.05] *= factor
    W = values.to(dtype)
    left, right = torch.randn(rows, rank, generator=random), torch.randn(rank, columns, generator=random)
    _check(W, WeightedSum((LowRank(left, right, scale * size / rank),)), cuts, place=place)


@pytest.mark.parametrize("dtype", DTYPES)
def test_midpoints_and_powers_of_two(dtype: torch.dtype) -> None:
    """Ties in both directions, and W at the edge of a binade, where the spacing below is half."""
    step = torch.finfo(dtype).eps
    W = (1 + step * torch.arange(-8, 24).double() / 2).to(dtype).repeat(64, 1)
    left = torch.arange(-32, 32).double()[:, None] * step / 4
    corrections = _check(W, WeightedSum((LowRank(left, torch.ones(1, 32).double()),)))
    assert corrections.count_nonzero() > 100


def test_a_small_weight_under_a_large_delta() -> None:
    """Corrections beyond a byte, some of them more than is kept at once."""
    W = torch.randn(300, 400, generator=torch.Generator().manual_seed(1)).mul(1e-6).to(torch.bfloat16)
    random = torch.Generator().manual_seed(2)
    edit = WeightedSum((LowRank(torch.randn(300, 4, generator=random), torch.randn(4, 400, generator=random)),))
    assert _check(W, edit, 2).abs().gt(127).sum() > 100_000


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dense_terms_vectors_and_stacks(dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(3)
    W = torch.randn(4, 9, 33, generator=random).to(dtype)
    low = LowRank(torch.randn(4, 9, 2, generator=random), torch.randn(4, 2, 33, generator=random), 0.3)
    _check(W, WeightedSum((low,)), 5)
    _check(W[0], WeightedSum(dense=(Dense(torch.randn(9, 33, generator=random), 0.1),)), 2)
    _check(W[0, 0], WeightedSum(dense=(Dense(torch.randn(33, generator=random), 3.0),)), 2, place=True)
    _check(W[0], WeightedSum())
