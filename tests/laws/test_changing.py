"""Rows that are changed where they lie: from one edit to another, and back, whichever way it is computed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loreg.algebra import LowRank, WeightedSum, changing, native
from loreg.algebra.changing import Changing, Kept, Space
from loreg.algebra.corrections import Corrections
from loreg.algebra.passes import UNSURE
from loreg.algebra.rounding import bits
from loreg.errors import BadInput

pytestmark = pytest.mark.usefixtures("engine")
Piece = tuple[int, int, Kept | None]
Pieces = list[Piece]
WIDTHS = [width for width in (16, 32, 64) if width <= native.vector_bytes] or [0]
"""Of vectors that this processor has."""


@contextmanager
def at_once(elements: int, width: int = WIDTHS[-1]) -> Iterator[None]:
    """In the cache, and 64 times as many in a call."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "vector_bytes", width)
        patch.setattr(native, "_AT_ONCE", elements)
        patch.setattr(changing, "_CALL_ELEMENTS", 64 * elements)
        patch.setattr(changing, "_TILE_BYTES", {"cpu": 32 * elements})
        yield


def stepped(
    changing: Changing, W: torch.Tensor, first: int, kept: Kept | None
) -> Iterator[tuple[int, int, Kept | None]]:
    """All rows; what undoes them is never more than they are."""
    row = W[0].nbytes
    while len(W):
        step = changing.step(W, first, kept)
        assert changing.torn
        yield first, step.rows, step.fresh
        changing.recorded(step)
        assert not changing.torn and (step.fresh is None or step.fresh.nbytes <= step.rows * row)
        W, first, kept = W[step.rows :], first + step.rows, step.rest


def change(W: torch.Tensor, pieces: Pieces, back: WeightedSum | None, forth: WeightedSum | None) -> Pieces:
    """What undoes it; of a stack, rows are counted through all of it."""
    space, done = Space(), Pieces()
    rows = W.view(-1, W.shape[-1])
    ends = [
        edit and edit.prepare(W.shape, W.dtype, W.dtype, "cpu", residual=residual)
        for edit, residual in ((back, False), (forth, True))
    ]
    changed = Changing(*ends, space)
    for first, height, kept in reversed(pieces):
        done += stepped(changed, rows[first : first + height], first, kept)
    assert sum(height for _, height, _ in done) == len(rows)
    return done


def corrections(W: torch.Tensor, pieces: Pieces) -> torch.Tensor:
    """Of all elements, 0 where nothing is to be corrected."""
    found, columns = torch.zeros(W.numel(), dtype=torch.int64), W.shape[-1]
    for first, _, kept in pieces:
        assert isinstance(kept, Corrections)
        for index, by in ((kept.index, kept.by), (kept.wide_index, kept.wide)):
            assert bool((index.diff() > 0).all()), "in no order"
            found[index.long() - kept.start + first * columns] = by.long()
    return found.view(W.shape)


def residual(W: torch.Tensor, edit: WeightedSum) -> torch.Tensor:
    """The same by the tiles of a whole weight."""
    small, out = torch.empty(W.shape, dtype=torch.int8), torch.empty_like(W)
    rows = [x.view(-1, W.shape[-1]) for x in (W, out, small)]
    outcome = edit.prepare(W.shape, W.dtype, W.dtype, "cpu", residual=True).tile(rows[0], 0, *rows[1:])
    found = small.long().view(-1)
    assert torch.equal((found == UNSURE).nonzero()[:, 0], outcome.index)
    found[outcome.index] = outcome.wide
    return found.view(W.shape)


def _edit(shape: tuple[int, ...], rank: int, scale: float, random: torch.Generator) -> WeightedSum:
    *stack, rows, columns = shape
    left, right = (torch.randn(*stack, *size, generator=random) for size in ((rows, rank), (rank, columns)))
    return WeightedSum((LowRank(left, right, scale),))


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from([torch.bfloat16, torch.float32, torch.float16]),
    shape=st.one_of(
        st.tuples(st.integers(1, 70), st.integers(1, 70)),
        st.tuples(st.integers(1, 9), st.integers(500, 540)),
        st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 40)),
    ),
    ranks=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    scales=st.tuples(*[st.sampled_from([2.0**-9, 0.1, 1.0])] * 2),
    ways=st.lists(st.tuples(st.sampled_from([8, 64, 2**16]), st.sampled_from(WIDTHS)), min_size=4, max_size=4),
    seed=st.integers(0, 2**32),
)
def test_from_one_edit_to_another_and_back(
    dtype: torch.dtype,
    shape: tuple[int, ...],
    ranks: tuple[int, int],
    scales: tuple[float, float],
    ways: list[tuple[int, int]],
    seed: int,
) -> None:
    """Each time what a fresh edit of the base gives, with what its residual says, and the base at the end; however
    much is changed at once."""
    random = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=random)
    for factor in (0.0, -0.0, 2.0**-5, 2.0**-12):  # some small ones, which are corrected by much
        values[torch.rand(shape, generator=random) < 0.05] *= factor
    base = values.to(dtype)
    one, two = (_edit(shape, rank, scale / rank, random) for rank, scale in zip(ranks, scales, strict=True))
    W, height = base.clone(), base[..., 0].numel()
    with at_once(*ways[0]):
        pieces = change(W, [(0, height, None)], None, one)
    for now, then, way in ((two, one, ways[1]), (one, two, ways[2])):
        assert torch.equal(bits(W), bits(then.apply(base)))
        if all(isinstance(kept, Corrections) for _, _, kept in pieces):
            assert torch.equal(corrections(W, pieces), residual(base, then))
        with at_once(*way):
            pieces = change(W, pieces, -then, now)
    with at_once(*ways[3]):
        change(W, pieces, -one, None)
    assert torch.equal(bits(W), bits(base))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3.38e38])
@pytest.mark.parametrize("row", [0, 37, 99])
@pytest.mark.parametrize("size", [8, 2**16])
def test_what_is_refused_is_as_it_was(dtype: torch.dtype, value: float, row: int, size: int) -> None:
    """And what goes before it is edited, and taken back."""
    random = torch.Generator().manual_seed(0)
    base = torch.randn(100, 7, generator=random).to(dtype)
    base[row, 3] = value
    edit = WeightedSum((LowRank(torch.full((100, 1), 1e30), torch.full((1, 7), 1e8), 1.0),))
    plain = _edit((100, 7), 2, 0.1, random)
    W, pieces, first = base.clone(), Pieces(), 0
    prepared = (edit if value > 1e38 and value != float("inf") else plain).prepare(
        W.shape, dtype, dtype, "cpu", residual=True
    )
    changed = Changing(None, prepared, Space())
    with at_once(size), pytest.raises(BadInput, match="element"):
        for piece in stepped(changed, W, 0, None):
            pieces.append(piece)
            first += piece[1]
    assert not changed.torn
    assert torch.equal(bits(W[first:]), bits(base[first:])) and first <= row


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(64, 4096), (3, 2**17 + 8), (300, 33)])
def test_far_corrections_of_nearly_every_element(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """The originals are kept where they take less."""
    random = torch.Generator().manual_seed(1)
    base = torch.randn(shape, generator=random).mul(1e-6).to(dtype)
    base[: shape[0] // 2] = 0
    one, two = (_edit(shape, 3, 1.0, random) for _ in range(2))
    W = base.clone()
    pieces = change(W, [(0, len(W), None)], None, one)
    pieces = change(W, pieces, -one, two)
    assert torch.equal(bits(W), bits(two.apply(base)))
    change(W, pieces, -two, None)
    assert torch.equal(bits(W), bits(base))


def test_places_in_more_than_32_bits() -> None:
    """Of which a part is on the CPU."""
    none = torch.empty(0, dtype=torch.int64)
    places, by = torch.tensor([3, 10, 500]), torch.tensor([1, 2, 3], dtype=torch.int8)
    found = torch.ones(1000, dtype=torch.bfloat16)
    Corrections.at(places, by, none, none, 2**31).before(400).add_to(found)
    assert (bits(found) - bits(torch.ones(1000).bfloat16())).nonzero()[:, 0].tolist() == [3, 10]


def test_what_undoes_it_comes_to_where_the_weight_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a model that was on another device when it was merged into; here one without memory."""
    random = torch.Generator().manual_seed(1)
    base, edit = torch.randn(30, 20, generator=random).bfloat16(), _edit((30, 20), 2, 0.1, random)
    W = base.clone()
    ((first, height, kept),) = change(W, [(0, 30, None)], None, edit)
    assert isinstance(kept, Corrections)
    there = Corrections(*(x.to("meta") for x in kept.tensors))
    brought = {there: kept, kept: kept}
    monkeypatch.setattr(Corrections, "to", lambda self, device: brought[self] if device == W.device else None)
    change(W, [(first, height, there)], -edit, None)
    assert torch.equal(bits(W), bits(base))
