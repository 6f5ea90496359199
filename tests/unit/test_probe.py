"""The arithmetic of the probe: right merges pass whatever their numbers, wrong ones do not."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from loreg.algebra import Dense, LowRank, WeightedSum, apply
from loreg.algebra.rounding import Workspace, bits
from loreg.errors import BadInput
from loreg.merge.probe import Again, Judge, Probe

STORED = (torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn, torch.float8_e5m2)
every_dtype = pytest.mark.parametrize("dtype", STORED, ids=str)
SPACE = Workspace()


def judged(judge: Judge, W: Tensor, written: Tensor, edit: WeightedSum, tile: int = 7) -> str:
    judge.begin(edit, (W.shape[0], W.shape[1]))
    for first in range(0, len(W), tile):
        judge.rows(first, W[first : first + tile].clone(), written[first : first + tile].clone())
    return judge.wrong


def probed(W: Tensor, written: Tensor, edit: WeightedSum, seed: int = 1, tile: int = 7) -> str:
    return judged(Probe((W.dtype, written.dtype), seed, SPACE), W, written, edit, tile)


def drawn(seed: int, *shape: int, std: float, dtype: torch.dtype) -> Tensor:
    numbers = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * std
    largest = torch.finfo(dtype).max
    return numbers.clamp(-largest, largest).to(dtype)


def low_rank(rows: int, columns: int, rank: int = 3, std: float = 0.05, scale: float = 2.0) -> WeightedSum:
    B, A = (drawn(n, *shape, std=std, dtype=torch.bfloat16) for n, shape in ((8, (rows, rank)), (9, (rank, columns))))
    return WeightedSum((LowRank(B, A, scale),))


@st.composite
def merges(draw: st.DrawFn) -> tuple[Tensor, Tensor, WeightedSum]:
    """A weight, its right merge and the edit: of any dtypes, of numbers that nearly vanish or nearly overflow."""
    before, after, of_factors = (draw(st.sampled_from(STORED)) for _ in range(3))
    rows, columns = draw(st.integers(1, 30)), draw(st.sampled_from((1, 2, 7, 64, 600, 1100)))
    seed = draw(st.integers(0, 2**31))
    least, most = (int(torch.tensor(end).log2()) for end in (torch.finfo(before).tiny, torch.finfo(before).max))
    W = drawn(seed, rows, columns, std=2.0 ** draw(st.integers(least - 12, most - 2)), dtype=before)
    zeros = drawn(seed + 1, rows, columns, std=1, dtype=torch.float32) > draw(st.integers(0, 3))
    zeros[:, : draw(st.integers(0, columns))] |= draw(st.booleans())
    W = W.double().masked_fill(zeros, 0).to(before)
    # About as large as W, in any share of the three factors of its product.
    size, one, other = draw(st.integers(-12, 1)), draw(st.integers(-20, 20)), draw(st.integers(-20, 20))
    scale = float(W.double().abs().mean()) * 2.0 ** (size - one - other)
    terms: list[LowRank] = []
    for number in range(draw(st.integers(0, 2))):
        rank = draw(st.integers(1, 4))
        B = drawn(seed + number, rows, rank, std=2.0**one, dtype=of_factors)
        terms.append(LowRank(B, drawn(seed + number, rank, columns, std=2.0**other, dtype=of_factors), scale))
    dense: tuple[Dense, ...] = ()
    if draw(st.booleans()):
        dense = (Dense(drawn(seed + 9, rows, columns, std=2.0**one, dtype=torch.float64), scale * 2.0**other),)
    edit = WeightedSum(tuple(terms), dense)
    try:
        return W, apply(W, edit, after), edit
    except BadInput:  # beyond the largest number
        assume(False)
        raise


@settings(max_examples=200, deadline=None)
@given(merges(), st.integers(0, 2**40), st.sampled_from((1, 4, 30)))
def test_a_right_merge_passes(merge: tuple[Tensor, Tensor, WeightedSum], seed: int, tile: int) -> None:
    W, written, edit = merge
    assert probed(W, written, edit, seed, tile) == ""
    assert judged(Again((W.dtype, written.dtype), SPACE), W, written, edit, tile) == ""


def _swapped(W: Tensor, edit: WeightedSum, dtype: torch.dtype) -> Tensor:
    (term,) = edit.low_rank
    return apply(W, WeightedSum((LowRank(term.left.flip(0), term.right, term.scale),)), dtype)


def _one_row(W: Tensor, edit: WeightedSum, dtype: torch.dtype) -> Tensor:
    written = apply(W, edit, dtype)
    written[5] = W[5].to(dtype)
    return written


def _row_of_another(W: Tensor, edit: WeightedSum, dtype: torch.dtype) -> Tensor:
    written = apply(W, edit, dtype)
    written[5] = written[6]
    return written


WRONG: dict[str, Callable[[Tensor, WeightedSum, torch.dtype], Tensor]] = {
    "no delta": lambda W, edit, dtype: apply(W, WeightedSum(), dtype),
    "half of it": lambda W, edit, dtype: apply(W, edit.scaled(0.5), dtype),
    "five times": lambda W, edit, dtype: apply(W, edit.scaled(5.0), dtype),
    "its opposite": lambda W, edit, dtype: apply(W, -edit, dtype),
    "transposed": lambda W, edit, dtype: apply(W, edit.mT, dtype),
    "another's": lambda W, edit, dtype: apply(W, low_rank(*W.shape, rank=2), dtype),
    "rows of B the other way round": _swapped,
    "a row without its delta": _one_row,
    "a row twice": _row_of_another,
}


@every_dtype
@pytest.mark.parametrize("size", [48, 900])
@pytest.mark.parametrize("mistake", WRONG)
def test_a_wrong_merge_is_found(dtype: torch.dtype, size: int, mistake: str) -> None:
    W, edit = drawn(3, size, size, std=0.02, dtype=dtype), low_rank(size, size, std=0.09)
    assert probed(W, apply(W, edit, dtype), edit, tile=50) == ""
    for seed in range(3):
        assert "fails a probe" in probed(W, WRONG[mistake](W, edit, dtype), edit, seed, tile=50)


@every_dtype
def test_one_unit_in_the_last_place_of_a_sampled_row_is_found(dtype: torch.dtype) -> None:
    W, edit = drawn(3, 60, 300, std=0.02, dtype=dtype), low_rank(60, 300)
    written = apply(W, edit, dtype)
    for row, column in ((0, 0), (17, 299), (59, 150)):  # of 60 rows every one is sampled
        nudged = written.clone()
        bits(nudged)[row, column] += 1
        assert "has an element in rows" in probed(W, nudged, edit)


@every_dtype
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_is_found_in_any_row(dtype: torch.dtype, value: float) -> None:
    W, edit = drawn(3, 500, 40, std=0.02, dtype=dtype), low_rank(500, 40)
    for row in range(0, 500, 37):
        written = apply(W, edit, dtype)
        written[row, 7] = value
        assert probed(W, written, edit, tile=100), row


@pytest.mark.parametrize(("before", "after"), itertools.product(STORED, STORED), ids=str)
def test_conversions(before: torch.dtype, after: torch.dtype) -> None:
    W = drawn(3, 80, 70, std=0.5, dtype=before)
    written = apply(W, WeightedSum(), after)
    assert probed(W, written, WeightedSum()) == ""
    assert probed(W, apply(W, WeightedSum(dense=(Dense(W, 0.5),)), after), WeightedSum())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("large", [1e-3, 0.1, 1.0, 30.0])
@pytest.mark.parametrize("columns", [64, 3000, 9000])
def test_nothing_passes_at_first_sight_that_the_bound_refuses(dtype: torch.dtype, large: float, columns: int) -> None:
    """Rows that are wrong by about what is allowed, in single precision and then in double."""
    rows = 200
    W, edit = drawn(1, rows, columns, std=0.02, dtype=dtype), low_rank(rows, columns, std=(large * 0.02 / 4) ** 0.5)
    written = apply(W, edit, dtype)
    probe = Probe((dtype, dtype), 5, SPACE)
    probe.begin(edit, (rows, columns))
    off = torch.logspace(-4, 1, rows, dtype=torch.float64)[:, None] * (torch.finfo(dtype).eps / 2)
    refused = 0
    for signs in (torch.ones(columns), probe._x[0], probe._x[2].sign(), probe._x[3]):
        moved = (written.double() * (1 + off * signs * written.double().sign())).to(dtype)
        doubtful = set(probe._doubtful(0, W, moved).tolist())
        passed = [row for row in range(rows) if row not in doubtful]
        assert not any(probe._fails(0, torch.tensor([row]), W, moved) for row in passed)
        refused += sum(probe._fails(0, torch.tensor([row]), W, moved) for row in doubtful)
    assert 0 < refused < 4 * rows


def test_most_rows_pass_at_first_sight() -> None:
    """What the probe costs rests on it: a second look takes five times as long."""
    for columns in (256, 2048, 5632):
        W, edit = drawn(1, 500, columns, std=0.02, dtype=torch.bfloat16), low_rank(500, columns, 16, std=0.007)
        probe = Probe((W.dtype, W.dtype), 5, SPACE)
        probe.begin(edit, (500, columns))
        assert len(probe._doubtful(0, W, apply(W, edit, W.dtype))) < 5


def test_again_counts_what_differs() -> None:
    W, edit = drawn(3, 60, 300, std=0.02, dtype=torch.bfloat16), low_rank(60, 300)
    written = apply(W, edit, torch.bfloat16)
    bits(written)[[0, 30, 59], [0, 7, 299]] ^= 1
    found = judged(Again((W.dtype, W.dtype), SPACE), W, written, edit)
    assert found == "has 3 elements that are not the correctly rounded sums"


def test_where_single_precision_cannot_tell_the_second_look_decides() -> None:
    """A delta that takes nearly all of W away: its sums in float32 may be off by more than a rounding of the rest."""
    edit = low_rank(40, 9000, std=0.5, scale=1.0)
    (term,) = edit.low_rank
    W = (-term.dense() * (1 + 2.0**-6)).to(torch.bfloat16)
    written = apply(W, edit, torch.bfloat16)
    assert written.abs().mean() < 0.1 * W.abs().mean()
    probe = Probe((W.dtype, W.dtype), 5, SPACE)
    probe.begin(edit, (40, 9000))
    assert len(probe._doubtful(0, W, written)) == 40
    assert probed(W, written, edit) == ""
