"""What holds of every extraction: how near it is, and that it undoes a merge as far as rounding lets it.

For a base W and a tuned model T of the same dtype, D = T - W. Extraction stores D' = BA, with B and A in float32; a
merge gives M = round(W + D'). Guaranteed, and tested here:

- A tensor without factors has its bytes in M.
- ‖D - D'‖ is within 2⁻²²‖D‖ of the least that any matrix of its rank reaches (Eckart & Young 1936), where D's
  singular values are no smaller than 2⁻²⁰ of the largest, and it is what is reported.
- An element of M has the bytes of T where |D - D'| there is less than half the spacing of the dtype.
- For T = round(W + Δ), Δ of rank r, extraction at rank r is off by no more than the rounding was: ‖D - D'‖ ≤ ‖D - Δ‖,
  as Δ itself would be; so ‖D' - Δ‖ ≤ 2‖D - Δ‖.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny

import loreg
from loreg.registry.extracting import Extracted

NAME = f"{tiny.Q}.weight"
SINGLE = 2.0**-22
DTYPES = ("BF16", "F16", "F32")
SIGNIFICAND = {"BF16": 8, "F16": 11, "F32": 24}


class Bench:
    """A model of one matrix, extracted and merged again, as often as wanted."""

    def __init__(self, registry: loreg.Registry, folder: Path) -> None:
        self.registry, self.folder, self.count = registry, folder, 0

    def extract(self, before: tiny.Tensor, after: tiny.Tensor, **limits: float) -> tuple[Extracted, np.ndarray]:
        """The extraction, and D' as a float64 product of what is stored; zeros where the tensor is replaced."""
        self.count += 1
        folder = self.folder / str(self.count)
        tiny.write_model(folder / "base", {NAME: before})
        tiny.write_model(folder / "tuned", {NAME: after})
        found = self.registry.extract(folder / "base", folder / "tuned", "found", **limits)
        deltas = self.registry.load("found")
        return found, deltas[tiny.Q].dense().numpy() if deltas else np.zeros(before.shape)

    def merged(self) -> tiny.Tensor:
        folder = self.folder / str(self.count)
        self.registry.merge("found", folder / "merged", verify="none")
        return tiny.tensors_in(folder / "merged")[NAME]


@pytest.fixture
def bench(registry: loreg.Registry, tmp_path: Path) -> Bench:
    return Bench(registry, tmp_path)


def wide(tensor: tiny.Tensor) -> np.ndarray:
    return tensor.values.astype(np.float64)


def spacing(values: np.ndarray, dtype: str) -> np.ndarray:
    """The distance from each value to its neighbour nearer to zero, in ``dtype``."""
    _, exponent = np.frexp(values)
    step = np.ldexp(1.0, exponent - SIGNIFICAND[dtype])
    return np.where(np.frexp(values)[0] == np.copysign(0.5, values), step / 2, step)


def tuned(seed: int, dtype: str, rank: int, size: float) -> tuple[tiny.Tensor, tiny.Tensor, np.ndarray]:
    """W, round(W + Δ) and Δ: of rank ``rank`` and elements of about ``size``, where W's are of about 1."""
    rng = np.random.default_rng(seed)
    W = tiny.normal(rng, dtype, 40, 32)
    delta = rng.normal(0, 1, (40, rank)) @ rng.normal(0, size / np.sqrt(rank), (rank, 32))
    return W, tiny.tensor(dtype, wide(W) + delta), delta


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("limits", "seed"), [({"rank": 1}, 0), ({"rank": 5}, 1), ({"energy": 0.7}, 2)], ids=str)
def test_it_is_the_nearest_of_its_rank_and_says_how_near(bench: Bench, dtype: str, limits: dict, seed: int) -> None:
    W, T, _ = tuned(seed, dtype, rank=20, size=0.3)
    found, stored = bench.extract(W, T, **limits)
    D = wide(T) - wide(W)
    sigma = np.linalg.svd(D, compute_uv=False)
    (tensor,) = found.tensors
    best = np.linalg.norm(sigma[tensor.rank :]) / np.linalg.norm(sigma)
    error = np.linalg.norm(D - stored) / np.linalg.norm(sigma)
    assert np.linalg.matrix_rank(stored, tol=1e-9) == tensor.rank
    assert best - 1e-12 <= error <= best + SINGLE
    assert tensor.relative_error == found.relative_error == pytest.approx(error, rel=1e-9)
    if "energy" in limits:  # the least rank that holds it
        share = np.cumsum(sigma**2) / np.sum(sigma**2)
        assert tensor.rank == 1 + np.searchsorted(share, limits["energy"])
    else:
        assert tensor.rank == limits["rank"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1.0, 2.0**-7])
def test_it_undoes_a_merge_as_far_as_its_rounding_lets_it(bench: Bench, dtype: str, size: float) -> None:
    for seed, rank in enumerate((1, 4)):
        W, T, delta = tuned(seed, dtype, rank, size)
        found, stored = bench.extract(W, T, rank=rank)
        D = wide(T) - wide(W)
        noise = np.linalg.norm(D - delta)
        slack = SINGLE * np.linalg.norm(D)
        assert 0 < noise < 0.6 * np.linalg.norm(D)
        assert np.linalg.norm(D - stored) <= noise + slack
        assert np.linalg.norm(stored - delta) <= 2 * noise + slack
        assert found.relative_error <= (noise + slack) / np.linalg.norm(D)
        # Of the noise, extraction takes away what is not of the rank: the merge is nearer to W + Δ than T is.
        assert np.linalg.norm(stored - delta) < 0.8 * noise or dtype == "F32"


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_element_has_its_bytes_again_where_the_factors_are_near_enough(bench: Bench, dtype: str) -> None:
    for seed, (rank, size) in enumerate([(2, 1.0), (3, 2.0**-5), (16, 0.1)]):
        W, T, _ = tuned(seed, dtype, rank, size)
        found, stored = bench.extract(W, T, rank=rank)
        M = bench.merged()
        assert found.tensors[0].rank == rank
        off = np.abs(wide(T) - wide(W) - stored)
        near = off < spacing(wide(T), dtype) / 2
        equal = wide(M) == wide(T)
        assert np.all(equal[near])
        assert 0.6 < near.mean() <= equal.mean()
        # And no element is further off than the factors are, and one rounding.
        assert np.all(np.abs(wide(M) - wide(T)) <= off * (1 + 2.0**-50) + spacing(wide(M), dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_exact_difference_of_low_rank_is_given_back_byte_for_byte(bench: Bench, dtype: str) -> None:
    """Integers that add without rounding, at full energy: the rank is the true one, and T has no zero to miss."""
    for seed, rank in enumerate((1, 2, 5)):
        rng = np.random.default_rng(seed)
        W = tiny.tensor(dtype, rng.integers(40, 80, (24, 20)))
        delta = rng.integers(-1, 2, (24, rank)) @ rng.integers(-2, 3, (rank, 20))
        T = tiny.tensor(dtype, wide(W) + delta)
        assert np.array_equal(wide(T), wide(W) + delta)
        found, stored = bench.extract(W, T, energy=1.0)
        assert found.tensors[0].rank == np.linalg.matrix_rank(delta)
        assert np.linalg.norm(stored - delta) <= SINGLE * np.linalg.norm(delta)
        assert bench.merged() == T


@pytest.mark.parametrize("dtype", DTYPES)
def test_at_full_energy_whatever_was_trained_comes_back(bench: Bench, dtype: str) -> None:
    """A difference of full rank has no smaller factors: the tensor is replaced, and the models are the same."""
    rng = np.random.default_rng(0)
    before, after = ({name: tiny.normal(rng, dtype, *t.shape) for name, t in tiny.model().items()} for _ in "ab")
    base = tiny.write_model(bench.folder / "base", before)
    other = tiny.write_model(bench.folder / "tuned", after)
    found = bench.registry.extract(base, other, "found", energy=1.0)
    assert found.relative_error == 0 and {tensor.rank for tensor in found.tensors} == {None}
    result = bench.registry.merge("found", bench.folder / "merged")
    assert tiny.tensors_in(bench.folder / "merged") == after
    assert str(result.weights_root) == found.version.manifest.provenance.training["tuned"]


def test_the_rank_grows_with_the_energy_and_the_error_falls(bench: Bench) -> None:
    W, T, _ = tuned(0, "F32", rank=12, size=0.1)
    before: tuple[int, float] = (0, 1.0)
    for energy in (0.1, 0.5, 0.9, 0.99):
        (tensor,) = bench.extract(W, T, energy=energy)[0].tensors
        assert tensor.rank is not None and tensor.rank > before[0] and tensor.relative_error < before[1]
        assert tensor.relative_error**2 <= (1 - energy) * (1 + 1e-9)
        before = tensor.rank, tensor.relative_error
        (both,) = bench.extract(W, T, energy=energy, rank=2)[0].tensors
        assert both.rank == min(2, tensor.rank)


def test_a_merged_sum_is_extracted_as_the_sum(pushed: loreg.Registry, tmp_path: Path) -> None:
    """Of two adapters and in float32: what is extracted is their exact sum, but for the rounding of the merge."""
    single = {
        n: t if t.dtype == "I64" else tiny.tensor("F32", t.values) for n, t in tiny.model(rows=40, cols=32).items()
    }
    base = tiny.write_model(tmp_path / "single", single)
    expected: dict[str, np.ndarray] = {}
    for seed, (name, weight) in enumerate((("one", 0.7), ("two", -0.4))):
        factors = tiny.adapter(seed=seed, rank=2, rows=40, cols=32)
        pushed.push(tiny.write_adapter(tmp_path / name, factors), base=base, name=name)
        for path, each in factors.items():
            product = tiny.scale(each) * wide(each.B) @ wide(each.A)
            expected[path] = expected.get(path, 0) + weight * product
    pushed.merge("0.7*one - 0.4*two", tmp_path / "merged", verify="none")
    found = pushed.extract(base, tmp_path / "merged", "found", rank=4)
    assert {tensor.rank for tensor in found.tensors} == {4}
    for path, delta in pushed.load("found").items():
        scale = np.linalg.norm(expected[path])
        noise = np.linalg.norm(wide(tiny.tensors_in(tmp_path / "merged")[f"{path}.weight"])
                               - wide(single[f"{path}.weight"]) - expected[path])  # fmt: skip
        assert np.linalg.norm(delta.dense().numpy() - expected[path]) <= 2 * noise + SINGLE * scale < 1e-5 * scale
