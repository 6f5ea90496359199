"""The laws of the algebra: merges against rational arithmetic, combinations against the dense truth."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_rounding import dtypes, nearest, same
from torch import Tensor

from loreg.algebra import (
    Dense,
    LowRank,
    WeightedSum,
    apply,
    concatenate,
    half_ulp,
    round_to,
    truncate,
)
from loreg.algebra.factor_space import cat
from loreg.algebra.rounding import bits
from loreg.errors import BadInput, Unsupported, UsageError

pytestmark = pytest.mark.usefixtures("engine")

ROWS, COLUMNS = 5, 6
DOUBLE = torch.float64


def rational(W: Tensor, edit: WeightedSum) -> list[Fraction]:
    """W + Σ d·X + Σ c·B·A, element by element, in rational numbers: the definition, spelled out."""
    result = [Fraction(w) for w in W.double().flatten().tolist()]
    for dense in edit.dense:
        for e, x in enumerate(dense.value.double().flatten().tolist()):
            result[e] += Fraction(dense.scale) * Fraction(x)
    for term in edit.low_rank:
        left, right = term.left.double().tolist(), term.right.double().T.tolist()
        for e, (row, column) in enumerate(itertools.product(left, right)):
            products = (Fraction(b) * Fraction(a) for b, a in zip(row, column, strict=True))
            result[e] += Fraction(term.scale) * sum(products, Fraction(0))
    return result


def expected(W: Tensor, edit: WeightedSum, dtype: torch.dtype) -> list[float]:
    pairs = zip(rational(W, edit), W.double().flatten().tolist(), strict=True)
    return [w if q == 0 and w == 0 else nearest(q, dtype) for q, w in pairs]


def check(W: Tensor, edit: WeightedSum, dtype: torch.dtype) -> None:
    truth = expected(W, edit, dtype)
    if any(math.isinf(x) for x in truth):
        with pytest.raises(BadInput, match="exceeds the largest finite"):
            apply(W, edit, dtype)
    else:
        assert same(apply(W, edit, dtype), truth)


class Cases:
    """Inputs made to hurt, each (W, edit) for a storage dtype, from one seed."""

    def __init__(self, dtype: torch.dtype, seed: int) -> None:
        self.dtype = dtype
        self.random = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, dtype=DOUBLE, generator=self.random)

    def whole(self, limit: int, *shape: int) -> Tensor:
        return torch.randint(-limit, limit + 1, shape, generator=self.random).double()

    def weight(self, scale: float = 1.0) -> Tensor:
        return round_to(self.normal(ROWS, COLUMNS) * scale, self.dtype)

    def ordinary(self) -> tuple[Tensor, WeightedSum]:
        factor = [torch.bfloat16, torch.float16, torch.float32, DOUBLE][int(self.whole(1, 1).item()) + 1]
        terms = [
            LowRank(self.normal(ROWS, r).to(factor), self.normal(r, COLUMNS).to(factor), 0.3 * r) for r in (1, 3)
        ]
        return self.weight(), WeightedSum(tuple(terms), (Dense(self.weight(), 0.1),))

    def ties(self) -> tuple[Tensor, WeightedSum]:
        unit = torch.finfo(self.dtype).eps
        W = (256 + self.whole(2, ROWS, COLUMNS)).to(self.dtype)
        step = LowRank(self.whole(3, ROWS, 2), self.whole(3, 2, COLUMNS), 64 * unit)
        return W, WeightedSum((step,), (Dense(W, 0.5), Dense(W, -0.5)))

    def broken_ties(self) -> tuple[Tensor, WeightedSum]:
        W = self.weight()
        break_by = LowRank(self.whole(1, ROWS, 1) * 1e-40, self.whole(1, 1, COLUMNS), 1.0)
        return W, WeightedSum((break_by,), (Dense(half_ulp(W), 1.0),))

    def one_ulp_from_midpoints(self) -> tuple[Tensor, WeightedSum]:
        W = self.weight()
        near = half_ulp(W) * (1 + self.whole(2, ROWS, COLUMNS) * 2.0**-52)
        return W, WeightedSum((), (Dense(near, -1.0),))

    def cancellation(self) -> tuple[Tensor, WeightedSum]:
        delta = LowRank(self.normal(ROWS, 3), self.normal(3, COLUMNS), 0.7)
        return round_to(-delta.dense(), self.dtype), WeightedSum((delta,))

    def complete_cancellation(self) -> tuple[Tensor, WeightedSum]:
        W = self.weight() * self.whole(1, ROWS, COLUMNS).to(self.dtype)
        delta = LowRank(self.normal(ROWS, 2), self.normal(2, COLUMNS), 1 / 3)
        return W, WeightedSum((delta, -delta), (Dense(W, -1.0),))

    def subnormals(self) -> tuple[Tensor, WeightedSum]:
        least = torch.finfo(self.dtype).smallest_normal * torch.finfo(self.dtype).eps
        W = (self.whole(6, ROWS, COLUMNS) * least).to(self.dtype)
        return W, WeightedSum((LowRank(self.whole(7, ROWS, 1) / 4, self.whole(2, 1, COLUMNS) * least, 0.5),))

    def around_the_smallest_normal(self) -> tuple[Tensor, WeightedSum]:
        info = torch.finfo(self.dtype)
        W = (info.smallest_normal * (1 + self.whole(4, ROWS, COLUMNS) * info.eps)).to(self.dtype)
        step = LowRank(self.whole(9, ROWS, 1) / 4, self.whole(2, 1, COLUMNS) * info.smallest_normal, info.eps)
        return W, WeightedSum((step,))

    def overflow(self) -> tuple[Tensor, WeightedSum]:
        top = torch.full((ROWS, COLUMNS), torch.finfo(self.dtype).max, dtype=self.dtype)
        signs = self.whole(1, ROWS, COLUMNS).sign().to(self.dtype)
        over = 1 if self.whole(1, 1).item() > 0 else 0
        below = half_ulp(top) * (1 - 2.0**-50 if not over else 1.0)
        return top * signs, WeightedSum((), (Dense(below * signs.double()),))

    def powers_of_two(self) -> tuple[Tensor, WeightedSum]:
        W = (2.0 ** self.whole(12, ROWS, COLUMNS)).to(self.dtype)
        quarter = half_ulp(W) / 2 * (1 + self.whole(1, ROWS, COLUMNS) * 2.0**-52)
        return W, WeightedSum((), (Dense(quarter, -1.0),))

    def zeros(self) -> tuple[Tensor, WeightedSum]:
        W = self.weight() * torch.where(self.normal(ROWS, COLUMNS) > 0.5, 1.0, 0.0).to(self.dtype)
        return W, WeightedSum((LowRank(self.whole(1, ROWS, 1), self.whole(1, 1, COLUMNS) * 1e-60),))

    def wide_range(self) -> tuple[Tensor, WeightedSum]:
        large = LowRank(
            self.normal(ROWS, 3) * 10.0 ** self.whole(30, ROWS, 3),
            self.normal(3, COLUMNS) * 10.0 ** self.whole(30, 3, COLUMNS),
            1e-29,
        )
        almost = LowRank(large.left * (1 + 2.0**-48), large.right, -1e-29)
        return self.weight(), WeightedSum((large, almost))

    def beyond_the_safe_range(self) -> tuple[Tensor, WeightedSum]:
        """Where the product of scale and left factor is subnormal, and then the right factor huge."""
        delta = LowRank(self.normal(ROWS, 2) * 1e-200, self.normal(2, COLUMNS) * 1e307, 1e-121)
        return self.weight(1e-13), WeightedSum((delta,))

    def from_double(self) -> tuple[Tensor, WeightedSum]:
        W = self.normal(ROWS, COLUMNS)
        return W, WeightedSum((LowRank(self.normal(ROWS, 1), self.normal(1, COLUMNS), 1e-20),))

    def conversion(self) -> tuple[Tensor, WeightedSum]:
        return self.weight().double() + half_ulp(self.weight()), WeightedSum()


KINDS = [name for name, kind in vars(Cases).items() if callable(kind) and name not in vars(object)]
KINDS = [name for name in KINDS if name not in ("normal", "whole", "weight")]


@dtypes
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_merge_is_the_nearest_value(dtype: torch.dtype, kind: str, seed: int) -> None:
    W, edit = getattr(Cases(dtype, seed), kind)()
    check(W, edit, dtype)


@pytest.mark.parametrize("source", [torch.bfloat16, torch.float16, torch.float32, DOUBLE], ids=str)
@dtypes
def test_merge_converts_in_the_same_rounding(source: torch.dtype, dtype: torch.dtype) -> None:
    W = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(7)).to(source)
    check(W, WeightedSum((LowRank(torch.randn(ROWS, 2), torch.randn(2, COLUMNS), 0.1),)), dtype)


def realistic(dtype: torch.dtype, rows: int = 300, columns: int = 200) -> tuple[Tensor, WeightedSum]:
    random = torch.Generator().manual_seed(11)
    draw = lambda *shape: torch.randn(*shape, generator=random) * 0.05  # noqa: E731
    terms = [LowRank(draw(rows, r).bfloat16(), draw(r, columns).bfloat16(), 2.0 / r) for r in (4, 8, 3)]
    return draw(rows, columns).to(dtype), WeightedSum(tuple(terms), (Dense(draw(rows, columns).to(dtype), 0.5),))


@dtypes
def test_realistic_merge_is_the_nearest_value(dtype: torch.dtype) -> None:
    """Enough elements that float64 rounded twice would get some wrong."""
    W, edit = realistic(dtype, 60, 50)
    check(W, edit, dtype)


@dtypes
def test_order_of_terms_and_tiles_change_no_byte(dtype: torch.dtype) -> None:
    W, edit = realistic(dtype)
    whole = apply(W, edit)
    for terms in itertools.permutations(edit.low_rank):
        assert torch.equal(bits(apply(W, WeightedSum(terms, edit.dense))), bits(whole))
    counts = set()
    for hint, tile in ((9, 300), (40, 64), (None, 130)):
        prepared, out = edit.prepare(W.shape, dtype, dtype, "cpu", hint), torch.empty_like(W)
        starts = range(0, 300, tile)
        counts.add(sum(prepared.tile(W[s : s + tile], s, out[s : s + tile]).doubt for s in starts))
        assert torch.equal(bits(out), bits(whole))
    assert len(counts) == 1


def test_threads_change_no_byte() -> None:
    W, edit = realistic(torch.bfloat16)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(bits(apply(W, edit)))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)


@dtypes
def test_in_place_and_strided(dtype: torch.dtype) -> None:
    W, edit = realistic(dtype)
    whole, place = apply(W, edit), W.clone()
    edit.prepare(W.shape, dtype, dtype).tile(place, 0, place)
    assert torch.equal(bits(place), bits(whole))
    assert torch.equal(bits(apply(W.T.contiguous().T, edit)), bits(whole))
    sliced = torch.zeros(300, 400, dtype=dtype)
    edit.prepare(W.shape, dtype, dtype).tile(W, 0, sliced[:, ::2])
    assert torch.equal(bits(sliced[:, ::2].contiguous()), bits(whole))


@dtypes
def test_nothing_added_changes_no_bit(dtype: torch.dtype) -> None:
    W, _ = realistic(dtype)
    W[:40] *= 0.0  # both signs
    assert bool((bits(W) == bits(torch.tensor(-0.0, dtype=dtype))).any())
    nothing = LowRank(torch.zeros(300, 2), torch.randn(2, 200), 0.3)
    for edit in (WeightedSum(), WeightedSum((nothing,)), WeightedSum((-nothing,), (Dense(W, 0.0),))):
        assert torch.equal(bits(apply(W, edit)), bits(W))


def test_signs_of_zero() -> None:
    least = 2.0**-133
    W = torch.tensor([[least, 0.0, -0.0, -0.0, 1.0]], dtype=torch.bfloat16)
    delta = torch.tensor([[-least * (1 + 2.0**-40), -1e-60, 1e-60, 0.0, -1.0]], dtype=DOUBLE)
    found = apply(W, WeightedSum((), (Dense(delta),)))
    assert same(found, [-0.0, -0.0, 0.0, -0.0, 0.0])


def test_average_of_two_models() -> None:
    """A quarter of the elements are exact ties: the case that needs the exact stage to be vectorised."""
    random = torch.Generator().manual_seed(3)
    a, b = (torch.randn(1000, 1000, generator=random).bfloat16() for _ in range(2))
    edit = WeightedSum((), (Dense(a, -0.5), Dense(b, 0.5)))
    out = torch.empty_like(a)
    assert edit.prepare(a.shape, a.dtype, a.dtype).tile(a, 0, out).doubt > 100_000
    assert torch.equal(bits(out), bits(round_to((a.double() + b.double()) / 2, torch.bfloat16)))


def test_vectors_and_narrow_weights() -> None:
    random = torch.Generator().manual_seed(5)
    W, x = (torch.randn(5001, generator=random).bfloat16() for _ in range(2))
    edit = WeightedSum((), (Dense(x, 0.5),))
    found = apply(W, edit)
    assert found.shape == W.shape
    assert same(found[::50], expected(W[::50], WeightedSum((), (Dense(x[::50], 0.5),)), torch.bfloat16))
    assert torch.equal(bits(apply(W[:, None], WeightedSum((), (Dense(x[:, None], 0.5),)))[:, 0]), bits(found))
    assert torch.equal(bits(apply(W[None], WeightedSum((), (Dense(x[None], 0.5),)))[0]), bits(found))
    assert apply(W[:0], WeightedSum()).shape == (0,)
    assert apply(W[:, None][:, :0], WeightedSum()).shape == (5001, 0)


def test_live_parameters_are_values_like_others() -> None:
    W, edit = realistic(torch.float32, 30, 20)
    truth = apply(W, edit)
    live = [
        LowRank(torch.nn.Parameter(t.left.double()), torch.nn.Parameter(t.right.double()), t.scale)
        for t in edit.low_rank
    ]
    found = apply(torch.nn.Parameter(W), WeightedSum(tuple(live), edit.dense))
    assert torch.equal(bits(found), bits(truth)) and not found.requires_grad


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@dtypes
def test_a_weight_that_is_not_finite_is_refused(dtype: torch.dtype, bad: float) -> None:
    W, edit = realistic(dtype)
    W[123, 45] = bad
    with pytest.raises(BadInput, match=r"\[123, 45\] is NaN or infinite"):
        apply(W, edit)
    with pytest.raises(BadInput, match=r"\[7\] is NaN or infinite"):
        apply(W[:8, 45].clone().index_fill_(0, torch.tensor([7]), bad), WeightedSum())


@dtypes
def test_overflow_is_refused(dtype: torch.dtype) -> None:
    W, edit = realistic(dtype, 60, 50)
    W[20, 7] = torch.finfo(dtype).max
    jump = Dense(W.double().clamp(min=1e4) - 1e4, 0.5)
    with pytest.raises(BadInput, match=r"\[20, 7\] exceeds the largest finite"):
        apply(W, WeightedSum(edit.low_rank, (jump,)))
    with pytest.raises(BadInput, match=r"\[0, 0\] exceeds the largest finite"):
        apply(torch.full((2, 2), 1e300, dtype=DOUBLE), WeightedSum(), dtype)


def test_merge_then_unmerge_by_ordered_residual() -> None:
    """W from W' needs only the steps between W and round(W' - ΔW), and few of those are not zero."""
    W, edit = realistic(torch.bfloat16)
    low_rank = WeightedSum(tuple(term.scaled(0.1) for term in edit.low_rank))
    back = apply(apply(W, low_rank), -low_rank)
    residual = (bits(W).int() - bits(back).int()).abs()
    assert residual.float().count_nonzero() < 0.5 * W.numel()


def test_scale_is_one_double_product() -> None:
    delta = LowRank(torch.ones(1, 1), torch.ones(1, 1), 0.1)
    assert delta.scaled(0.7).scale == 0.7 * 0.1 and (-delta).scale == -0.1
    (term,) = linear([(0.7, delta)])
    zero = torch.zeros(1, 1, dtype=torch.float32)
    assert apply(zero, WeightedSum((term,))).item() == nearest(Fraction(0.7 * 0.1), torch.float32)
    edit = WeightedSum((delta,), (Dense(zero, 3.0),)).scaled(0.3)
    assert (edit.low_rank[0].scale, edit.dense[0].scale) == (0.3 * 0.1, 0.3 * 3.0)
    assert len((edit + edit).low_rank) == 2 and edit.shape == (1, 1) and WeightedSum().shape is None


def test_what_does_not_fit_is_refused() -> None:
    ok = LowRank(torch.ones(3, 1), torch.ones(1, 4))
    for left, right in ((torch.ones(3, 2), torch.ones(1, 4)), (torch.ones(3, 0), torch.ones(0, 4))):
        with pytest.raises(BadInput, match="shapes"):
            LowRank(left, right)
    with pytest.raises(BadInput, match="NaN"):
        LowRank(torch.full((3, 1), math.nan), torch.ones(1, 4))
    with pytest.raises(BadInput, match="infinity"):
        Dense(torch.tensor([math.inf]))
    with pytest.raises(BadInput, match="finite"):
        ok.scaled(math.inf)
    with pytest.raises(Unsupported, match="int64"):
        Dense(torch.ones(3, dtype=torch.int64))
    with pytest.raises(BadInput, match="one shape"):
        WeightedSum((ok,), (Dense(torch.ones(4, 3)),))
    with pytest.raises(BadInput, match="does not fit"):
        apply(torch.ones(4, 3), WeightedSum((ok,)))
    with pytest.raises(Unsupported, match="dimensions"):
        apply(torch.ones(1, 1, 1, 1), WeightedSum())
    with pytest.raises(Unsupported, match="float64"):
        apply(torch.ones(3, 4), WeightedSum((ok,)), DOUBLE)
    with pytest.raises(Unsupported, match="int32"):
        apply(torch.ones(3, 4, dtype=torch.int32), WeightedSum((ok,)), torch.float32)
    prepared = WeightedSum((ok,)).prepare((3, 4), torch.float32, torch.float32)
    for W, start in ((torch.ones(2, 4), 2), (torch.ones(2, 3), 0), (torch.ones(2, 4).half(), 0)):
        with pytest.raises(BadInput):
            prepared.tile(W, start, torch.empty(2, 4))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e5m2])
@pytest.mark.parametrize("turned", [False, True])
def test_one_value_that_is_not_finite_is_found_wherever_it_is(dtype: torch.dtype, turned: bool) -> None:
    """More of them than are looked at together; also the largest finite value, beside which infinity lies."""
    top = torch.finfo(dtype).max
    for place in (0, 1, 32767, 32768, 40_000 - 1):
        for value, fine in ((math.nan, False), (-math.inf, False), (math.inf, False), (top, True), (-top, True)):
            factor = torch.zeros(40_000, dtype=torch.float64)
            factor[place] = value
            factor = factor.to(dtype).view(200, 200)
            factor = factor.mT if turned else factor
            if fine:
                LowRank(factor, torch.ones(200, 1, dtype=dtype))
            else:
                with pytest.raises(BadInput, match="left factor of a delta holds NaN or infinity"):
                    LowRank(factor, torch.ones(200, 1, dtype=dtype))


# --- combining -----------------------------------------------------------------------------------------


def terms_of(seed: int, rows: int = 40, columns: int = 30) -> list[tuple[float, LowRank]]:
    random = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=random)  # noqa: E731
    return [(w, LowRank(draw(rows, r), draw(r, columns), 2.0 / r)) for w, r in ((0.7, 4), (-0.3, 2), (1.5, 5))]


def linear(terms: list[tuple[float, LowRank]]) -> tuple[LowRank, ...]:
    """Σ w·Δ as its terms."""
    return cat([(weight, (delta,)) for weight, delta in terms], {}).terms


def dense_of(terms: list[tuple[float, LowRank]]) -> Tensor:
    return sum((w * delta.dense() for w, delta in terms), torch.zeros((), dtype=DOUBLE))


def test_linear_is_exact_and_keeps_factors() -> None:
    terms = terms_of(1)
    result = linear(terms)
    assert [delta.scale for delta in result] == [w * delta.scale for w, delta in terms]
    assert all(found.left is delta.left for found, (_, delta) in zip(result, terms, strict=True))
    torch.testing.assert_close(sum(d.dense() for d in linear(terms)), dense_of(terms), rtol=1e-13, atol=1e-13)
    with pytest.raises(BadInput, match="no delta"):
        linear([])
    with pytest.raises(BadInput, match="one shape"):
        linear([*terms, (1.0, LowRank(torch.ones(3, 1), torch.ones(1, 4)))])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, DOUBLE], ids=str)
def test_concatenate_keeps_its_bound(dtype: torch.dtype) -> None:
    deltas = linear(terms_of(2))
    folded = concatenate(deltas, dtype)
    assert (folded.scale, folded.rank, folded.left.dtype, folded.right.dtype) == (1.0, 11, dtype, dtype)
    u = torch.finfo(dtype).eps / 2
    size = sum(abs(d.scale) * (d.left.double().abs() @ d.right.double().abs()) for d in deltas)
    error = (folded.dense() - sum(d.dense() for d in deltas)).abs()
    assert bool((error <= (2 * u + u * u + 2.0**-48) * size).all())
    with pytest.raises(BadInput, match="infinity"):
        concatenate([LowRank(torch.full((1, 1), 3e38), torch.ones(1, 1), 2.0)], torch.float32)
    with pytest.raises(Unsupported):
        concatenate(deltas, torch.int8)


@pytest.mark.parametrize("rank", [1, 3, 10, 11, 30])
def test_svd_is_the_svd_of_the_dense_matrix(rank: int) -> None:
    terms = terms_of(3)
    dense = dense_of(terms)
    u, sigma, vt = torch.linalg.svd(dense, full_matrices=False)
    best = (u[:, :rank] * sigma[:rank]) @ vt[:rank]
    result = truncate(linear(terms), rank=rank)
    delta = result.delta
    assert delta.rank == min(rank, 11) and delta.scale == 1.0
    torch.testing.assert_close(delta.dense(), best, rtol=0, atol=1e-12 * float(sigma[0]))
    norm = torch.linalg.matrix_norm
    truth = float(norm(dense - delta.dense()) / norm(dense))
    assert abs(result.relative_error - truth) < 1e-12
    discarded = float(torch.linalg.vector_norm(sigma[rank:]) / torch.linalg.vector_norm(sigma))
    assert abs(result.relative_error - discarded) < 1e-12  # Eckart-Young: nothing of this rank is closer
    torch.testing.assert_close(delta.left.norm(dim=0), delta.right.norm(dim=1))


def test_svd_by_energy() -> None:
    terms = terms_of(4)
    previous = 0
    for energy in (0.3, 0.9, 0.999, 1.0):
        result = truncate(linear(terms), energy=energy)
        rank = result.delta.rank
        assert result.relative_error**2 <= 1 - energy + 1e-14 and rank >= previous
        if rank > 1:
            assert truncate(linear(terms), rank=rank - 1).relative_error ** 2 > 1 - energy
        previous = rank
    assert truncate(linear(terms), rank=2, energy=0.999).delta.rank == 2


def test_truncation_is_deterministic_and_signs_are_fixed() -> None:
    deltas = linear(terms_of(5))
    once, again = truncate(deltas, rank=4), truncate(deltas, rank=4)
    assert torch.equal(once.delta.left, again.delta.left) and torch.equal(once.delta.right, again.delta.right)
    flipped = truncate([LowRank(-d.left, -d.right, d.scale) for d in deltas], rank=4).delta
    torch.testing.assert_close(flipped.left, once.delta.left)
    peaks = once.delta.left.gather(0, once.delta.left.abs().argmax(0, keepdim=True))
    assert bool((peaks > 0).all())
    assert bool((once.singular_values.diff() <= 0).all())


def test_truncation_at_the_edges() -> None:
    zero = truncate([LowRank(torch.zeros(6, 2), torch.ones(2, 5))], rank=2)
    assert zero.relative_error == 0.0 and not bool(zero.delta.dense().any())
    assert truncate([LowRank(torch.zeros(6, 2), torch.ones(2, 5))], energy=0.9).delta.rank == 1
    random = torch.Generator().manual_seed(6)
    left, right = (torch.randn(shape, dtype=DOUBLE, generator=random) for shape in ((4, 9), (9, 5)))
    wide = LowRank(left, right, 1e200)  # rank above min(m, n)
    sigma = torch.linalg.svdvals(wide.dense() / 1e200)
    lost = float(sigma[3:].norm() / sigma.norm())
    assert abs(truncate([wide], rank=3).relative_error - lost) < 1e-12
    full = truncate([wide], rank=4)
    assert full.relative_error == 0.0
    torch.testing.assert_close(full.delta.dense() / 1e200, wide.dense() / 1e200)
    for arguments in ({"rank": 5}, {"rank": 0}, {"energy": 0.0}, {"energy": 1.1}, {}):
        with pytest.raises(UsageError):
            truncate([wide], **arguments)
