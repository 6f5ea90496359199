"""Methods in factor space against dense float64 implementations of the papers' formulas, and their laws."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from loreg.algebra import LowRank, WeightedSum, apply, truncate
from loreg.algebra.elementwise import METHODS as ELEMENTWISE
from loreg.algebra.elementwise import Deltas
from loreg.algebra.factor_space import METHODS, Adapters, Combined
from loreg.algebra.truncate import triangle, truncate_dense
from loreg.errors import BadInput, Unsupported, UsageError

DOUBLE = torch.float64
svd = torch.linalg.svd
TIES = {"inner": "ties:peft", "density": 0.4, "majority_sign": "total"}
# Every method, with parameters by which scaling the weights scales the result.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "cat": ("cat", {}),
    "svd": ("svd", {"rank": 5}),
    "peft_linear": ("peft_linear", {}),
    "knots": ("knots", {"inner": "linear"}),
    "knots-ties": ("knots", TIES),
    "core_space": ("core_space", {}),
    "core_space-ties": ("core_space", TIES),
    "tsv": ("tsv", {}),
    "tsv-rank": ("tsv", {"rank": 4}),
    "iso_c": ("iso_c", {}),
    "iso_c-energy": ("iso_c", {"energy": 0.8}),
}
every = pytest.mark.parametrize("case", CASES)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))


def adapters(seed: int, ranks: Sequence[int] = (3, 3, 3), rows: int = 24, columns: int = 17) -> list[Any]:
    weights = (0.7, -0.4, 1.5, 0.2)
    made = []
    for index, rank in enumerate(ranks):
        left, right = draw(seed + 10 * index, rows, rank), draw(seed + 10 * index + 1, rank, columns)
        made.append((weights[index], (LowRank(left, right, 0.5 + index),)))
    return made


def dense(found: Combined | Sequence[LowRank]) -> Tensor:
    terms = found.terms if isinstance(found, Combined) else found
    return torch.stack([term.dense() for term in terms]).sum(0)


def run(case: str, given: Adapters) -> Tensor:
    name, parameters = CASES[case]
    return dense(METHODS[name](given, parameters))


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-11) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * float(expected.abs().max()))


def total(given: Adapters) -> Tensor:
    return torch.stack([weight * dense(terms) for weight, terms in given]).sum(0)


# --- against the papers --------------------------------------------------------------------------------


def ties(parts: Sequence[Tensor], weights: Sequence[float], density: float) -> Tensor:
    """As KnOTS has it: largest, signs of the sum, mean of the weighted that agree (gstoica27/KnOTS)."""
    kept = []
    for part in parts:
        size = part.abs().flatten()
        count = int(density * size.numel())
        kept.append(torch.where(part.abs() >= size.sort(descending=True).values[count - 1], part, 0.0))
    sign = torch.stack(kept).sum(0).sign()
    agree = [torch.where(part * sign > 0, part, 0.0) for part in kept]
    count = torch.stack([part != 0 for part in agree]).sum(0).clamp(min=1)
    return torch.stack([w * part for w, part in zip(weights, agree, strict=True)]).sum(0) / count


def test_knots_is_ties_in_the_basis_of_all_deltas() -> None:
    given = adapters(1, (3, 2, 4))
    deltas = [dense(terms) for _, terms in given]
    u, s, vt = svd(torch.cat(deltas, dim=1), full_matrices=False)
    u, s, vt = u[:, :9], s[:9], vt[:9]  # the rest is noise
    parts = torch.split(s[:, None] * vt, 17, dim=1)
    expected = u @ ties(parts, [weight for weight, _ in given], 0.4)
    close(dense(METHODS["knots"](given, TIES)), expected)
    assert float((expected - total(given)).norm() / total(given).norm()) > 0.1  # ties did something


def test_core_space_is_ties_on_the_cores() -> None:
    given = adapters(2, (3, 2, 4))
    terms = [term for _, (term,) in given]
    u = svd(torch.cat([term.left for term in terms], dim=1), full_matrices=False).U
    vt = svd(torch.cat([term.right for term in terms], dim=0), full_matrices=False).Vh
    cores = [u.T @ term.dense() @ vt.T for term in terms]
    expected = u @ ties(cores, [weight for weight, _ in given], 0.4) @ vt
    close(dense(METHODS["core_space"](given, TIES)), expected)


@pytest.mark.parametrize("name", ["knots", "core_space"])
def test_masks_come_from_keys(name: str) -> None:
    given = adapters(3)
    dare = {"inner": "dare_linear:peft", "density": 0.5}
    found = [dense(METHODS[name](given, dare, keys)) for keys in ((5, 6, 7), (5, 6, 7), (5, 6, 8))]
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    moved = [given[2], (0.0, given[0][1]), given[0], given[1]]
    close(dense(METHODS[name](moved, dare, (7, 9, 5, 6))), found[0])
    with pytest.raises(BadInput, match="one key for each of 3 adapters, found 2"):
        METHODS[name](given, dare, (5, 6))


def test_inner_works_on_what_the_paper_gives_it() -> None:
    given = adapters(4)
    parameters = {"inner": "ties:mergekit", "density": 0.5, "normalize": True, "lambda": 1.0, "rescale": False}
    parameters["consensus"] = "sum"
    u, s, vt = svd(torch.cat([dense(terms) for _, terms in given], dim=1), full_matrices=False)
    parts = torch.split((s[:, None] * vt)[:9], 17, dim=1)
    deltas = Deltas(tuple(parts), tuple(weight for weight, _ in given), (0, 1, 2))
    expected = u[:, :9] @ ELEMENTWISE["ties:mergekit"](deltas, parameters)
    close(dense(METHODS["knots"](given, parameters)), expected)
    del parameters["inner"]
    close(dense(METHODS["knots"](given, parameters)), expected)  # the default


def tsv_reference(given: Adapters, count: int) -> Tensor:
    """The paper's: the ``count`` leading singular vectors of each, and PQᵀ of them side by side."""
    parts = [(weight, svd(dense(terms), full_matrices=False)) for weight, terms in given]
    left = torch.cat([part.U[:, :count] for _, part in parts], dim=1)
    right = torch.cat([part.Vh[:count] for _, part in parts], dim=0)
    values = torch.cat([weight * part.S[:count] for weight, part in parts])
    p, _, qt = svd(left, full_matrices=False)
    x, _, yt = svd(right, full_matrices=False)
    return p @ qt @ torch.diag(values) @ x @ yt


def test_tsv_of_full_rank_is_the_papers() -> None:
    given = adapters(5, (17, 17, 17))
    close(dense(METHODS["tsv"](given, {})), tsv_reference(given, 17 // 3))
    wide = [(weight, (LowRank(t.right.T, t.left.T, t.scale),)) for weight, (t,) in given]
    close(dense(METHODS["tsv"](wide, {})), tsv_reference(given, 17 // 3).T)


def test_tsv_of_low_rank_cuts_nothing_and_truncates_afterwards() -> None:
    given = adapters(6)
    expected = tsv_reference(given, 3)
    close(dense(METHODS["tsv"](given, {})), expected)
    u, s, vt = svd(expected)
    (delta,) = METHODS["tsv"](given, {"rank": 4}).terms
    assert delta.rank == 4
    close(delta.dense(), (u[:, :4] * s[:4]) @ vt[:4])


def test_tsv_shares_out_a_direction_that_adapters_share() -> None:
    (_, one), (_, other), _ = adapters(7)
    close(dense(METHODS["tsv"]([(0.7, one), (0.5, one)], {})), 0.6 * dense(one))
    refactored = (LowRank(one[0].left * 8, one[0].right / 4, one[0].scale / 2),)
    close(dense(METHODS["tsv"]([(0.7, one), (0.5, refactored)], {})), 0.6 * dense(one))
    several = [(0.7, one), (0.5, one), (1.0, other)]
    assert int((svd(dense(METHODS["tsv"](several, {}))).S > 1e-9).sum()) == 6


def iso_reference(summed: Tensor, rank: int) -> Tensor:
    u, s, vt = svd(summed, full_matrices=False)
    return s[:rank].mean() * u[:, :rank] @ vt[:rank]


def test_iso_c() -> None:
    full = adapters(8, (17, 9))
    close(dense(METHODS["iso_c"](full, {})), iso_reference(total(full), 17))  # the paper's
    given = adapters(9)
    close(dense(METHODS["iso_c"](given, {})), iso_reference(total(given), 9))
    close(dense(METHODS["iso_c"](given, {"rank": 4})), iso_reference(total(given), 4))
    rank = truncate([term for w, terms in given for term in (terms[0].scaled(w),)], energy=0.8).delta.rank
    assert 1 < rank < 9
    close(dense(METHODS["iso_c"](given, {"energy": 0.8})), iso_reference(total(given), rank))
    nuclear = [float(svd(x).S.sum()) for x in (dense(METHODS["iso_c"](given, {})), total(given))]
    assert math.isclose(*nuclear, rel_tol=1e-12)


def test_svd_is_the_svd_of_the_sum() -> None:
    given = adapters(10, (3, 2, 4))
    u, s, vt = svd(total(given), full_matrices=False)
    close(dense(METHODS["svd"](given, {"rank": 5})), (u[:, :5] * s[:5]) @ vt[:5])
    share = float(s[:6].square().sum() / s.square().sum())
    (delta,) = METHODS["svd"](given, {"energy": share * (1 - 1e-12)}).terms
    assert delta.rank == 6
    close(delta.dense(), (u[:, :6] * s[:6]) @ vt[:6])


def test_peft_linear_is_no_sum() -> None:
    given = adapters(11)
    found = dense(METHODS["peft_linear"](given, {}))
    assert float((found - total(given)).norm() / total(given).norm()) > 0.5
    crossed = torch.zeros(24, 17, dtype=DOUBLE)
    for w, (b,) in given:
        for v, (a,) in given:
            size = math.sqrt(abs(w * b.scale * v * a.scale))
            crossed += math.copysign(size, v) * b.left @ a.right
    close(found, crossed)


# --- laws ----------------------------------------------------------------------------------------------


@every
def test_order_is_all_one(case: str) -> None:
    given = adapters(20)
    close(run(case, [given[2], given[0], given[1]]), run(case, given))


@every
def test_weight_zero_removes_an_adapter(case: str) -> None:
    given = adapters(21)
    absent = (0.0, (LowRank(draw(1, 24, 2), draw(2, 2, 17)),))
    assert torch.equal(run(case, [given[0], absent, *given[1:]]), run(case, given))


@every
@pytest.mark.parametrize("factor", [2.5, -0.3, 1e-150, 1e150])
def test_scaling_all_weights_scales_the_result(case: str, factor: float) -> None:
    given = adapters(22)
    found = run(case, [(factor * weight, terms) for weight, terms in given])
    close(found / factor, run(case, given))


@pytest.mark.parametrize("size", [1e-150, 1e150])
@every
def test_scaling_all_adapters_scales_the_result(case: str, size: float) -> None:
    given = adapters(23)
    scaled = [(weight, tuple(term.scaled(size) for term in terms)) for weight, terms in given]
    close(run(case, scaled) / size, run(case, given))


IDENTITIES = ["cat", "peft_linear", "knots", "core_space", "tsv"]


@pytest.mark.parametrize("case", IDENTITIES)
@pytest.mark.parametrize("weight", [1.0, -2.0])
def test_one_adapter_is_itself(case: str, weight: float) -> None:
    ((_, terms),) = adapters(24, (3,))
    close(run(case, [(weight, terms)]), weight * dense(terms))


def test_one_adapter_is_itself_at_full_rank_and_density() -> None:
    ((_, terms),) = adapters(25, (3,))
    for name, parameters in (("svd", {"rank": 3}), ("svd", {"energy": 1.0}), ("knots", {**TIES, "density": 1.0})):
        close(dense(METHODS[name]([(1.0, terms)], parameters)), dense(terms))


@pytest.mark.parametrize("case", ["cat", "knots", "core_space"])
def test_the_sum_is_the_sum(case: str) -> None:
    given = adapters(26, (3, 20, 1))
    close(run(case, given), total(given))


@every
def test_several_terms_are_one_delta(case: str) -> None:
    given = adapters(27)
    split = [(w, (LowRank(t.left[:, :1], t.right[:1], t.scale), LowRank(t.left[:, 1:] * 2, t.right[1:], t.scale / 2)))
             for w, (t,) in given]  # fmt: skip
    if case == "peft_linear":
        with pytest.raises(Unsupported, match="several"):
            run(case, split)
    elif case != "core_space-ties":  # which depends on how a delta is factored, see its docstring
        close(run(case, split), run(case, given))


@every
def test_only_the_delta_counts(case: str) -> None:
    given = adapters(28)
    mixed = []
    for index, (w, (t,)) in enumerate(given):
        g = draw(index, 3, 3)
        mixed.append((w, (LowRank(t.left @ g, torch.linalg.inv(g) @ t.right, t.scale),)))
    if case in ("peft_linear", "core_space-ties"):
        assert not torch.allclose(run(case, mixed), run(case, given), rtol=0, atol=1e-3)
    else:
        close(run(case, mixed), run(case, given), 1e-10)


@every
def test_transposes(case: str) -> None:
    given = adapters(29)
    turned = [(weight, tuple(term.mT for term in terms)) for weight, terms in given]
    if case in ("knots-ties", "peft_linear"):
        assert not torch.allclose(run(case, turned).T, run(case, given), rtol=0, atol=1e-3)
    else:
        close(run(case, turned).T, run(case, given))


@every
def test_an_adapter_that_leaves_the_weight_alone_is_zeros(case: str) -> None:
    given = adapters(30)
    zeros = (LowRank(torch.zeros(24, 3), torch.zeros(3, 17)),)
    found = run(case, [given[0], (0.9, ()), *given[1:]])
    close(found, run(case, [given[0], (0.9, zeros), *given[1:]]))


@every
def test_zeros_give_zeros(case: str) -> None:
    zeros = (LowRank(torch.zeros(24, 3), draw(0, 3, 17)),)
    found = run(case, [(1.0, zeros), (0.5, zeros)])
    assert found.shape == (24, 17) and not bool(found.any())
    if case not in ("peft_linear", "knots-ties", "core_space-ties"):
        (_, (one,)), *_ = adapters(31)
        cancelled = run(case, [(1.0, (one,)), (-1.0, (one,))])
        assert float(cancelled.norm()) < 1e-13 * float(one.dense().norm())


@every
def test_dtypes_of_factors(case: str) -> None:
    """Every value of a narrower dtype is a float64 value, also where adapters' dtypes differ."""
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    parts = [(w, t.left.to(d), t.right.to(d), t.scale) for (w, (t,)), d in zip(adapters(35), dtypes, strict=True)]
    for chosen in (parts, parts[:1]):
        narrow = [(w, (LowRank(left, right, scale),)) for w, left, right, scale in chosen]
        wide = [(w, (LowRank(left.double(), right.double(), scale),)) for w, left, right, scale in chosen]
        assert torch.equal(run(case, narrow), run(case, wide))


@every
@pytest.mark.parametrize("ranks", [(3, 3, 3), (3,)], ids=len)
def test_the_same_again_from_what_is_not_written_to(case: str, ranks: tuple[int, ...]) -> None:
    given = adapters(32, ranks)
    before = [[(t.left.clone(), t.right.clone()) for t in terms] for _, terms in given]
    name, parameters = CASES[case]
    first, second = METHODS[name](given, parameters).terms, METHODS[name](given, parameters).terms
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one.left, other.left) and torch.equal(one.right, other.right)
    for (_, terms), kept in zip(given, before, strict=True):
        for term, (left, right) in zip(terms, kept, strict=True):
            assert torch.equal(term.left, left) and torch.equal(term.right, right)


@every
def test_ranks_above_the_weights(case: str) -> None:
    """More columns of factors than the weight has: triangles are then wide."""
    given = adapters(33, (7, 7, 7), rows=9, columns=6)
    for weight, terms in ((1.0, given[0][1]),):
        if case in IDENTITIES:
            close(run(case, [(weight, terms)]), dense(terms))
    if case != "peft_linear":
        turned = [(weight, tuple(term.mT for term in terms)) for weight, terms in given]
        assert run(case, given).shape == (9, 6) and run(case, turned).shape == (6, 9)


class _Sizes(TorchDispatchMode):
    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
        return result


@contextmanager
def largest_tensor() -> Iterator[Callable[[], int]]:
    with _Sizes() as sizes:
        yield lambda: sizes.largest


@every
def test_no_matrix_of_the_weights_size_is_formed(case: str) -> None:
    given = adapters(34, (2, 2, 2), rows=600, columns=500)
    with largest_tensor() as largest:
        METHODS[CASES[case][0]](given, CASES[case][1])
        assert largest() <= 2**16  # the histogram of a selection; factors are smaller
        assert largest() > 0 or case == "cat", "which only puts terms side by side"
    with largest_tensor() as largest:
        given[0][1][0].dense()
        assert largest() == 600 * 500  # one would be seen


# --- numerics ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [200, 40, 7])
def test_triangle_keeps_small_singular_values(rows: int) -> None:
    """Of columns of any size and nearly dependent, where one Cholesky would lose all below 1e-8."""
    x = draw(40, rows, 12)
    for name, matrix in {
        "well": x,
        "sizes": x * 10.0 ** torch.arange(-150, 150, 25, dtype=DOUBLE),
        "less dependent": torch.cat([x[:, :6], x[:, :6] + 1e-6 * x[:, 6:]], dim=1),
        "dependent": torch.cat([x[:, :6], x[:, :6] + 1e-10 * x[:, 6:]], dim=1),
        "equal": torch.cat([x[:, :6], x[:, :6]], dim=1),
        "zeros": x * (torch.arange(12) % 3 > 0),
    }.items():
        r = triangle(matrix)
        assert r.shape == (min(rows, 12), 12), name
        sizes = torch.linalg.vector_norm(matrix / matrix.abs().max(), dim=0) * matrix.abs().max()
        safe = torch.where(sizes > 0, sizes, 1.0)  # backward stable column by column
        found, truth = svd(r / safe).S, svd(matrix / safe).S
        assert float((found - truth).abs().max()) < 1e-14 * 12, name


def test_what_cancels_leaves_the_difference() -> None:
    """B·A - (B + P)·A = -P·A, all exact in float64, a 2⁻²⁵ of what cancels."""
    integers = torch.Generator().manual_seed(41)
    whole = lambda *shape: torch.randint(-(2**10), 2**10, shape, generator=integers).double()  # noqa: E731
    b, p, a = whole(50, 4), whole(50, 4) * 2.0**-25, whole(4, 30)
    expected = -p @ a
    noise = float(b.norm() * a.norm()) * 2.0**-50
    result = truncate([LowRank(b, a), LowRank(-(b + p), a)], rank=4)
    assert float((result.delta.dense() - expected).norm()) < noise
    best = svd(expected).S
    assert float((result.singular_values[:4] - best[:4]).abs().max()) < noise
    given = [(1.0, (LowRank(b, a),)), (-1.0, (LowRank(b + p, a),))]
    found = dense(METHODS["iso_c"](given, {}))
    close(found, iso_reference(expected, 4), 1e-5)


def matrix_of(seed: int, sigma: Tensor, rows: int, columns: int) -> Tensor:
    u = torch.linalg.qr(draw(seed, rows, sigma.numel())).Q
    v = torch.linalg.qr(draw(seed + 1, columns, sigma.numel())).Q
    return (u * sigma) @ v.T


SPECTRA = {
    "flat": torch.linspace(1.5, 0.5, 30, dtype=DOUBLE),
    "geometric": 10.0 ** -torch.linspace(0, 16, 30, dtype=DOUBLE),
    "low rank": torch.tensor([3.0, 2, 1.5, 1e-3, 1e-6, 1e-9], dtype=DOUBLE),
    "noise": torch.cat([torch.tensor([3.0, 2, 1.5]), 1e-7 * torch.linspace(1, 0.5, 27)]).double(),
}


@pytest.mark.parametrize("shape", [(60, 31), (31, 60), (30, 30)])
@pytest.mark.parametrize("name", SPECTRA)
def test_dense_truncation_is_the_best_and_knows_its_error(name: str, shape: tuple[int, int]) -> None:
    sigma = SPECTRA[name]
    x = matrix_of(50, sigma, *shape)
    for rank in (1, 3, 6, min(shape)):
        result = truncate_dense(x, rank=rank)
        lost = float(torch.linalg.matrix_norm(x - result.delta.dense()) / torch.linalg.matrix_norm(x))
        best = float(sigma[rank:].norm() / sigma.norm())
        assert abs(result.relative_error - lost) < 1e-14
        assert lost**2 <= best**2 + 30 * 2.0**-52 and lost <= best + 1e-9
        assert result.delta.rank <= rank and result.delta.scale == 1.0
        torch.testing.assert_close(result.delta.left.norm(dim=0), result.delta.right.norm(dim=1))
        peaks = result.delta.left.gather(0, result.delta.left.abs().argmax(0, keepdim=True))
        assert bool((peaks > 0).all())
        assert result.singular_values.shape == (min(shape),)
        worst = (result.singular_values[: sigma.numel()] - sigma).abs().max()
        assert float(worst) < math.sqrt(30 * 2.0**-50) * float(sigma[0])


def test_dense_truncation_by_energy_and_size() -> None:
    x = matrix_of(51, SPECTRA["flat"], 40, 35)
    previous = 0
    for energy in (0.2, 0.7, 0.99):
        result = truncate_dense(x, energy=energy)
        assert result.relative_error**2 <= 1 - energy + 1e-13
        assert truncate_dense(x, rank=result.delta.rank - 1).relative_error ** 2 > 1 - energy
        assert previous < result.delta.rank
        previous = result.delta.rank
    assert truncate_dense(x, energy=1.0).delta.rank == 30
    assert truncate_dense(x, rank=3, energy=0.99).delta.rank == 3
    low = matrix_of(52, torch.tensor([2.0, 1.0], dtype=DOUBLE), 40, 35)
    assert truncate_dense(low, rank=20).delta.rank == 2  # no columns of noise
    once = truncate_dense(x, rank=4)
    assert torch.equal(once.delta.left, truncate_dense(x, rank=4).delta.left)
    for size in (1e-200, 1e200):
        found = truncate_dense(x * size, rank=4)
        close(found.delta.dense() / size, once.delta.dense())
        assert abs(found.relative_error - once.relative_error) < 1e-13
        torch.testing.assert_close(found.singular_values / size, once.singular_values, rtol=0, atol=1e-7)
    zero = truncate_dense(torch.zeros(4, 3, dtype=DOUBLE), energy=0.5)
    assert zero.relative_error == 0 and zero.delta.shape == (4, 3) and not bool(zero.delta.dense().any())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_extract_undoes_merge(dtype: torch.dtype) -> None:
    W = (draw(60, 50, 40) * 0.05).to(dtype)
    delta = LowRank(draw(61, 50, 4).float(), draw(62, 4, 40).float(), 0.02)
    merged = apply(W, WeightedSum((delta,)))
    difference = merged.double() - W.double()
    result = truncate_dense(difference, rank=4)
    truth = delta.dense()
    rounding = float(torch.linalg.matrix_norm(difference - truth))
    assert 0 < float(torch.linalg.matrix_norm(result.delta.dense() - truth)) < 2 * rounding
    assert result.relative_error * float(difference.norm()) <= rounding
    # All of it, and merged again: what was merged, to the bit.
    everything = truncate_dense(difference, rank=40)
    assert torch.equal(apply(W, WeightedSum((everything.delta,))), merged)


def test_truncating_again_changes_nothing() -> None:
    once = truncate_dense(matrix_of(63, SPECTRA["flat"], 40, 35), rank=6).delta
    again = truncate([once], rank=6)
    assert again.relative_error < 1e-14
    close(again.delta.dense(), once.dense())


# --- bad input -----------------------------------------------------------------------------------------


@every
def test_what_makes_no_sense_is_refused(case: str) -> None:
    given = adapters(70)
    with pytest.raises(BadInput, match="no delta"):
        run(case, [])
    with pytest.raises(BadInput, match="no delta"):
        run(case, [(0.0, given[0][1]), (1.0, ())])
    with pytest.raises(BadInput, match="one shape"):
        run(case, [*given, (1.0, (LowRank(draw(0, 24, 3), draw(1, 3, 18)),))])
    for weight in (math.nan, math.inf):
        with pytest.raises(UsageError, match="finite"):
            run(case, [(weight, given[0][1]), *given])
    if case != "cat":
        with pytest.raises(Unsupported, match="one by one"):
            run(case, [(1.0, (LowRank(draw(0, 2, 5, 3), draw(1, 2, 3, 4)),))])
    if case not in ("cat", "peft_linear"):
        for wrong, words in (({"rank": 18}, "1 to 17"), ({"rank": 0}, "1 to 17"), ({"energy": 1.5}, "at most 1")):
            with pytest.raises(UsageError, match=words):
                METHODS[CASES[case][0]](given, {**CASES[case][1], "rank": None, "energy": None, **wrong})
        huge = [(1.0, (LowRank(draw(0, 24, 1) * 1e200, draw(1, 1, 17) * 1e200),))]
        with pytest.raises(BadInput, match="damaged or diverged"):
            run(case, huge)


def test_what_a_method_cannot_do_is_refused() -> None:
    given = adapters(71, (3, 2))
    with pytest.raises(UsageError, match="one rank, found 2, 3"):
        METHODS["peft_linear"](given, {})
    with pytest.raises(UsageError, match="neither"):
        METHODS["svd"](given, {})
    for name in ("knots", "core_space"):
        with pytest.raises(UsageError, match=r"no inner method 'tsv'.*ties:mergekit"):
            METHODS[name](given, {"inner": "tsv"})
    with pytest.raises(UsageError, match="at most 2"):
        METHODS["tsv"](adapters(72, (1, 1, 1), rows=9, columns=2), {})


def test_a_dense_delta_that_makes_no_sense_is_refused() -> None:
    x = draw(73, 6, 5)
    for arguments in ({}, {"rank": 6}, {"rank": 0}, {"energy": 0.0}, {"energy": math.nan}):
        with pytest.raises(UsageError):
            truncate_dense(x, **arguments)
    for bad in (math.nan, math.inf):
        with pytest.raises(BadInput, match="NaN or infinity"):
            truncate_dense(x.clone().index_fill_(0, torch.tensor([2]), bad), rank=1)
    with pytest.raises(Unsupported, match="float32"):
        truncate_dense(x.float(), rank=1)
    with pytest.raises(Unsupported, match="one by one"):
        truncate_dense(draw(1, 2, 3, 4), rank=1)
    with pytest.raises(BadInput, match="no elements"):
        truncate_dense(x[:, :0], energy=0.5)
