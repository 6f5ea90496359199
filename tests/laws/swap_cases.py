"""One edit taken back and another one applied, in one pass of the kernels. Run by ``test_triton.py``, in Triton's
interpreter and on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loreg.algebra import LowRank, WeightedSum, gpu
from loreg.algebra.gpu import groups, kernels
from loreg.algebra.gpu.undo import CODED, ELSEWHERE
from loreg.algebra.launching import Launched, Undone, Work, launch
from loreg.algebra.rounding import bits
from loreg.errors import BadInput
from tests.laws.triton_cases import (  # noqa: F401
    BF16,
    DTYPES,
    F32,
    _dense,
    _nothing_is_zero_by_luck,
    _on_the_cpu,
    _with,
    by_torch,
    every_dtype,
    prepared,
)


def merge(W: torch.Tensor, edit: WeightedSum, name: str = "") -> tuple[Launched, Undone]:
    launched = launch([Work(prepared(edit, W, W.dtype, True), W, W, name)], residual=True)
    (kept,) = launched.done()
    assert kept is not None
    return launched, kept


def swap(
    W: torch.Tensor, old: WeightedSum, kept: Undone, new: WeightedSum | None, name: str = ""
) -> tuple[Launched, Undone | None]:
    back, forth = prepared(old, W, W.dtype, False), None if new is None else prepared(new, W, W.dtype, True)
    launched = launch([Work(forth, W, W, name, back, kept)], residual=True)
    (kept_,) = launched.done()
    return launched, kept_


def applied(edit: WeightedSum, base: torch.Tensor) -> torch.Tensor:
    """By torch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "DEVICES", frozenset())
        return edit.apply(base)


def is_merged(W: torch.Tensor, base: torch.Tensor, edit: WeightedSum, kept: Undone) -> bool:
    expected, small, wide = by_torch(edit, base, base.dtype, True)
    assert small is not None and torch.equal(_dense(kept, base), _with(small, wide))
    return torch.equal(bits(W), bits(expected))


def edit(base: torch.Tensor, seed: int, rank: int, size: float, narrow: bool = True) -> WeightedSum:
    random = torch.Generator().manual_seed(seed)
    shapes, dtype = ((base.shape[0], rank), (rank, base.shape[1])), BF16 if narrow else F32
    left, right = (torch.randn(*shape, generator=random).to(dtype) for shape in shapes)
    return WeightedSum((LowRank(left, right, size / rank**0.5),))


def weight(rows: int, columns: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    W = torch.randn(rows, columns, generator=random)
    for factor in (0.0, -0.0, 2.0**-5, 2.0**-14):
        W[torch.rand(rows, columns, generator=random) < 0.05] *= factor
    return W.to(dtype)


@contextmanager
def little_room(least: int, share: float) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(groups, "_LEAST", least)
        patch.setattr(groups, "SHARE", (share, share))
        yield


edits_ = st.lists(
    st.tuples(
        st.integers(0, 2**32),
        st.sampled_from([1, 3, 16]),
        st.sampled_from([0.01, 0.3, 2.0**-12, 30.0]),
        st.booleans(),
    ),
    min_size=2,
    max_size=3,
)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    dtype=st.sampled_from([BF16, *DTYPES]),
    rows=st.integers(1, 20),
    columns=st.sampled_from([1, 8, 31, 40]),
    edits=edits_,
    room=st.sampled_from([(4096, 0.5), (1, 0.0)]),
    back=st.booleans(),
)
def test_any_swaps(
    dtype: torch.dtype,
    rows: int,
    columns: int,
    edits: list[tuple[int, int, float, bool]],
    room: tuple[int, float],
    back: bool,
) -> None:
    """The bytes of a merge into the base, and what undoes that; with or without a way back before."""
    base = weight(rows, columns, dtype)
    W, made = base.clone(), [edit(base, *given_) for given_ in edits]
    with little_room(*room):
        old, (_, kept) = made[0], merge(W, made[0])
        for new in made[1:]:
            before = W.clone()
            launched, fresh = swap(W, old, kept, new)
            if back:
                launched.back()
                assert torch.equal(bits(W), bits(before))
                launched, fresh = swap(W, old, kept, new)
            assert fresh is not None and is_merged(W, base, new, fresh)
            old, kept = new, fresh
        merged = W.clone()
        launched, none = swap(W, old, kept, None)
        assert none is None and torch.equal(bits(W), bits(base))
        launched.back()
        assert torch.equal(bits(W), bits(merged)) and is_merged(W, base, old, kept)


@pytest.mark.parametrize("way", ["merge", "swap", "unmerge"])
@pytest.mark.parametrize("runs", [1, 2])
def test_a_way_back_when_some_tiles_are_done(way: str, runs: int) -> None:
    """As the lists have no room for the others, and what comes next fails."""
    base = torch.randn(60, 64, generator=torch.Generator().manual_seed(7)).to(BF16)
    base[::7, ::9] *= 2.0**-14
    one, other = edit(base, 1, 3, 0.01), edit(base, 2, 16, 0.01)
    W, kept = base.clone(), None
    if way != "merge":
        _, kept = merge(W, one)
    before = W.clone()
    end = prepared(one, W, BF16, True)
    forth = None if way == "unmerge" else prepared(other, W, BF16, True)
    launched = Launched([Work(forth, W, W, back=None if kept is None else end, kept=kept)], residual=True)
    start, count = groups.Group.start, [0]

    def starts(group: groups.Group, doubts: list[int], entries: list[int]) -> None:
        count[0] += 1
        if count[0] > runs:
            raise MemoryError
        start(group, [9], [50] if group.residual else [0])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(groups.Group, "start", starts)
        with pytest.raises(MemoryError):
            launched.done()
    todo = launched._parts[0].group.todo
    assert 0 < int(todo.sum()) < len(todo) and not torch.equal(bits(W), bits(before))
    launched.back()
    assert torch.equal(bits(W), bits(before))


@every_dtype
def test_what_is_kept_in_each_way(dtype: torch.dtype) -> None:
    """Corrections of a nibble, of a byte, and beyond; one across zero; and a swap finds all of them."""
    base = torch.full((24, 40), 1.0, dtype=dtype)
    base[:, 8:16] = 2.0**-5 * torch.linspace(1, 2, 24 * 8).view(24, 8)
    base[:, 16:24] = 2.0**-14
    base[::2, 25], base[1::2, 25] = -0.0, -(2.0**-14)
    one = WeightedSum((LowRank(torch.linspace(1, 1.3, 24)[:, None], torch.linspace(1, 3, 40)[None], 0.7),))
    W = base.clone()
    _, kept = merge(W, one)
    (part,) = kept.parts
    coded = part.entries[part.entries < CODED]
    assert bool((coded == ELSEWHERE).any()) and bool((coded != ELSEWHERE).any())
    assert len(part.entries) > len(coded) and len(part.index)
    other = edit(base, 5, 3, 0.01)
    _, fresh = swap(W, one, kept, other)
    assert fresh is not None and is_merged(W, base, other, fresh)


@pytest.mark.parametrize(("dtype", "size"), [(BF16, 7 * 2.0**-12), (DTYPES[1], 7 * 2.0**-15)], ids=str)
def test_a_prediction_that_is_the_weight_with_the_other_sign(dtype: torch.dtype, size: float) -> None:
    """It is apart by the least number that there is, which has no negative."""
    base = torch.full((8, 32), size, dtype=dtype)
    one = WeightedSum((LowRank(torch.full((8, 1), 1 + size), torch.ones(1, 32)),))
    W = base.clone()
    _, kept = merge(W, one)
    assert is_merged(W, base, one, kept) and len(kept.corrections().wide) == W.numel()
    swap(W, one, kept, None)
    assert torch.equal(bits(W), bits(base))


@pytest.mark.parametrize("dtype", [DTYPES[1], F32], ids=str)
def test_what_is_taken_back_is_in_doubt_by_its_own_bound(dtype: torch.dtype) -> None:
    """Large products that cancel, but for what they leave of the sum that they come after; and then a small edit."""
    base = torch.randn(8, 40, generator=torch.Generator().manual_seed(3)).to(dtype)
    random = torch.Generator().manual_seed(4)
    y, x = (torch.randn(8, 1, generator=random) for _ in range(2))
    right = torch.randn(2, 40, generator=random)
    right[1] *= 2.0**20
    left = torch.cat([y / 8, x * 2.0**20, -x * 2.0**20], dim=1)
    old = WeightedSum((LowRank(left, right[[0, 1, 1]]),))
    W, new = base.clone(), edit(base, 5, 1, 2.0**-12)
    _, kept = merge(W, old)
    _, fresh = swap(W, old, kept, new)
    assert fresh is not None and is_merged(W, base, new, fresh)


def test_a_swap_is_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    launches = list[tuple[int, int]]()
    change = kernels.change

    class Watched:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., object]:
            def run(*given: object, **named: int) -> object:
                launches.append((named["BACK"], named["FORTH"]))
                return change[grid](*given, **named)

            return run

    base = weight(9, 40, BF16)
    W, one, other = base.clone(), edit(base, 1, 3, 0.01), edit(base, 2, 16, 0.01)
    _, kept = merge(W, one)
    monkeypatch.setattr(kernels, "change", Watched())
    swap(W, one, kept, other)
    assert launches == [(8, 16)]


@every_dtype
@pytest.mark.filterwarnings("ignore:.*:RuntimeWarning")
def test_a_swap_to_what_has_no_number_is_refused_and_goes_back(dtype: torch.dtype) -> None:
    top = torch.finfo(dtype).max
    base = weight(17, 40, dtype)
    base[2, 5] = top
    W, one = base.clone(), edit(base, 1, 3, 0.01)
    large = WeightedSum((LowRank(torch.eye(17)[:, 2:3], torch.eye(40)[5:6], top / 4),))
    for room in ((4096, 0.5), (1, 0.0)):
        with little_room(*room):
            _, kept = merge(W, one)
            before = W.clone()
            back, forth = prepared(one, W, dtype, False), prepared(large, W, dtype, True)
            launched = launch([Work(forth, W, W, "proj", back, kept)], residual=True)
            with pytest.raises(BadInput, match=r"'proj': element \[2, 5\] exceeds"):
                launched.done()
            launched.back()
            assert torch.equal(bits(W), bits(before))
            swap(W, one, kept, None)
            assert torch.equal(bits(W), bits(base))


def test_a_stack_and_several_weights_at_once() -> None:
    """Of which one is only taken out of, one only merged into, and two are swapped; of several kinds."""
    random = torch.Generator().manual_seed(4)
    bases = [torch.randn(*shape, generator=random).to(dtype) for shape, dtype in (
        ((2, 5, 24), BF16), ((20, 40), BF16), ((9, 16), F32), ((17, 40), BF16)
    )]  # fmt: skip

    def low(shape: torch.Size, rank: int) -> WeightedSum:
        left = torch.randn(*shape[:-1], rank, generator=random).to(BF16)
        return WeightedSum(
            (LowRank(left, torch.randn(*shape[:-2], rank, shape[-1], generator=random).to(BF16), 0.01),)
        )

    old, new = ([low(base.shape, rank) for base in bases] for rank in (3, 9))
    live = [base.clone() for base in bases]
    kept = launch([
        Work(prepared(e, W, W.dtype, True), W, W) for e, W in zip(old[:3], live[:3], strict=True)
    ], residual=True).done()  # fmt: skip
    merged = [W.clone() for W in live]
    works = [
        Work(
            None if i == 1 else prepared(new[i], W, W.dtype, True), W, W, str(i),
            None if i == 3 else prepared(old[i], W, W.dtype, False), None if i == 3 else kept[i],
        )
        for i, W in enumerate(live)
    ]  # fmt: skip
    launched = launch(works, residual=True)
    fresh = launched.done()
    assert [one is None for one in fresh] == [False, True, False, False]
    for i, (base, W) in enumerate(zip(bases, live, strict=True)):
        expected = base if i == 1 else applied(new[i], base)
        assert torch.equal(bits(W), bits(expected)), i
    launched.back()
    assert all(torch.equal(bits(W), bits(was)) for W, was in zip(live, merged, strict=True))
