"""The laws of the elementwise methods, to the bit where a law holds to the bit."""

from __future__ import annotations

import hashlib
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from loreg.algebra.elementwise import METHODS, Deltas, deltas, geometry, masks, scalars
from loreg.algebra.elementwise.deltas import combination, in_order
from loreg.algebra.elementwise.sparsify import largest
from loreg.errors import BadInput, UsageError
from loreg.format import methods
from loreg.format.fields import Fields
from loreg.format.methods import check_count, method, parameters, read

DOUBLE = torch.float64

PLAIN: dict[str, list[dict[str, Any]]] = {
    "task_arithmetic": [{}, {"normalize": True, "lambda": 0.5}],
    "magnitude_prune": [{"density": 0.3}],
    "ties:peft": [{"density": 0.3}, {"density": 0.3, "majority_sign": "frequency"}],
    "ties:mergekit": [{"density": 0.3}, {"density": 0.7, "rescale": True, "consensus": "count"}],
    "dare_linear:peft": [{"density": 0.3}],
    "dare_linear:mergekit": [{"density": 0.3, "seed": 5}, {"density": 0.3, "normalize": True}],
    "dare_ties:peft": [{"density": 0.3}],
    "dare_ties:mergekit": [{"density": 0.3}],
    "della": [{"density": 0.3}],
    "della_linear": [{"density": 0.6, "epsilon": 0.3}],
    "breadcrumbs": [{"density": 0.5, "gamma": 0.1}],
    "breadcrumbs_ties": [{"density": 0.5, "gamma": 0.1, "rescale": True}],
    "sce": [{}, {"select_topk": 0.4}],
    "slerp": [{}],
    "nuslerp": [{}, {"flatten": False}, {"flatten": False, "row_wise": True}],
    "karcher": [{}],
    "model_stock": [{}, {"filter_wise": True}],
}
CASES = [(name, given) for name, several in PLAIN.items() for given in several]
IDS = [f"{name} {given}" for name, given in CASES]


def count_for(name: str) -> int:
    return 2 if methods.METHODS[name].adapters == (2, 2) else 3


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed)) * 1e-3


def several(count: int, *shape: int, weights: tuple[float, ...] = (0.7, -0.3, 1.1)) -> Deltas:
    """Deltas that have something in common, as those of one base do."""
    shared = normal(*shape, seed=99)
    values = tuple(shared + normal(*shape, seed=seed) for seed in range(count))
    return Deltas(values, weights[:count], tuple(1000 + seed for seed in range(count)))


def run(name: str, given: dict[str, Any], inputs: Deltas) -> Tensor:
    return METHODS[name](inputs, parameters(name, given))


def same(a: Tensor, b: Tensor) -> bool:
    """The same bits, a zero's sign apart, which adding to a weight does not see."""
    return a.shape == b.shape and bool(torch.equal(a, b))


def test_the_tables_agree() -> None:
    dense = {name for name, row in methods.METHODS.items() if row.space == "dense"}
    assert dense == set(METHODS) == set(PLAIN)


def large(name: str) -> Deltas:
    """Beyond the 32768 elements from where torch shares work among threads."""
    return several(count_for(name), 210, 330)


def result_digest(result: Tensor) -> str:
    return hashlib.sha256((result + 0.0).numpy().tobytes()).hexdigest()  # + 0: a zero's sign does not matter


@pytest.fixture(scope="module")
def on_two_threads() -> list[str]:
    """The digest of each case, from another process: where cores are busy, threads that wait spin for seconds."""
    script = (
        f"import sys; sys.path[:0] = {[str(Path(__file__).parent)]!r}\n"
        "from test_elementwise import *\n"
        "assert torch.get_num_threads() == 2\n"
        "print(*(result_digest(run(name, options, large(name))) for name, options in CASES))"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment)
    return done.stdout.split()


@pytest.mark.parametrize("index", range(len(CASES)), ids=IDS)
def test_neither_threads_nor_blocks_nor_strides_show(
    index: int, on_two_threads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    name, options = CASES[index]
    inputs = large(name)
    before = [value.clone() for value in inputs.values]
    result = run(name, options, inputs)
    assert result.dtype == DOUBLE and result.is_contiguous() and float(result.abs().max()) > 0
    assert result_digest(result) == on_two_threads[index]
    monkeypatch.setattr(deltas, "BLOCK", 2999)
    assert same(result, run(name, options, inputs))
    strided = tuple(value.T.contiguous().T for value in inputs.values)
    assert same(result, run(name, options, Deltas(strided, inputs.weights, inputs.keys)))
    assert all(same(value, old) for value, old in zip(inputs.values, before, strict=True)), "an input was written to"


@pytest.mark.parametrize(("name", "given"), CASES, ids=IDS)
@pytest.mark.parametrize("shape", [(11, 13), (97,)], ids=str)
def test_deltas_of_another_size_give_a_result_of_that_size(
    name: str, given: dict[str, Any], shape: tuple[int, ...]
) -> None:
    inputs = several(count_for(name), *shape)
    small = Deltas(tuple(value * 2.0**-40 for value in inputs.values), inputs.weights, inputs.keys)
    assert same(run(name, given, small), run(name, given, inputs) * 2.0**-40)


@pytest.mark.parametrize(("name", "given"), CASES, ids=IDS)
def test_permutation(name: str, given: dict[str, Any]) -> None:
    """Two: the same bits. Three: the same but for the rounding of sums, which sorting by the caller removes."""
    two = several(2, 11, 13, weights=(0.7, 0.4))
    turned = Deltas(two.values[::-1], two.weights[::-1], two.keys[::-1])
    assert same(run(name, given, two), run(name, given, turned))
    if count_for(name) == 3:
        three = several(3, 11, 13)
        order = (2, 0, 1)
        turned = Deltas(*(tuple(column[i] for i in order) for column in (three.values, three.weights, three.keys)))
        torch.testing.assert_close(run(name, given, turned), run(name, given, three), rtol=1e-11, atol=1e-17)


@pytest.mark.parametrize("name", [name for name in METHODS if methods.METHODS[name].adapters[0] == 1])
def test_one_delta_of_which_all_is_kept_is_itself(name: str) -> None:
    value = normal(7, 9)
    given = {"density": 1} if "density" in methods.METHODS[name].parameters else {}
    assert same(run(name, given, Deltas((value,), (1.0,), (3,))), value)


@pytest.mark.parametrize(
    "name", ["slerp", "nuslerp", "karcher", "model_stock", "ties:mergekit", "ties:peft", "della"]
)
def test_the_mean_of_equal_deltas_is_that_delta(name: str) -> None:
    value = normal(7, 9)
    given = {"density": 1} if "density" in methods.METHODS[name].parameters else {}
    result = run(name, given, Deltas((value, value), (1.0, 1.0), (3, 4)))
    torch.testing.assert_close(result, value, rtol=1e-14, atol=0)


LINEAR_IN_WEIGHTS = [
    "task_arithmetic",
    "magnitude_prune",
    "ties:peft",
    "dare_linear:peft",
    "dare_ties:mergekit",
    "sce",
]


@pytest.mark.parametrize("name", [*LINEAR_IN_WEIGHTS, "breadcrumbs_ties", "della_linear", "model_stock"])
def test_weights_twice_the_size(name: str) -> None:
    inputs = several(3, 11, 13)
    twice = Deltas(inputs.values, tuple(2 * weight for weight in inputs.weights), inputs.keys)
    given = PLAIN[name][0]
    assert same(run(name, given, twice), 2 * run(name, given, inputs))


@pytest.mark.parametrize("name", ["slerp", "nuslerp", "karcher"])
def test_only_the_ratio_of_shares_counts(name: str) -> None:
    inputs = several(2, 11, 13, weights=(0.75, 0.5))
    twice = Deltas(inputs.values, (1.5, 1.0), inputs.keys)
    assert same(run(name, {}, twice), run(name, {}, inputs))


def test_a_delta_of_zeros_takes_part() -> None:
    """An adapter that leaves a weight alone adds zero to it, and enters the methods as that."""
    value = normal(7, 9)
    inputs = Deltas((value, torch.zeros_like(value)), (1.0, 1.0), (1, 2))
    for name, factor in (("slerp", math.sin(math.pi / 4)), ("karcher", 0.5), ("model_stock", 0.0), ("sce", 1.0)):
        torch.testing.assert_close(run(name, {}, inputs), value * factor, rtol=1e-15, atol=0)
    nothing = Deltas((torch.zeros(3, 4, dtype=DOUBLE),) * 2, (1.0, 1.0), (1, 2))
    for name, options in CASES:
        assert not run(name, options, nothing).any()


@pytest.mark.parametrize("name", ["karcher", "slerp", "nuslerp"])
def test_opposite_deltas_give_something_of_their_size(name: str) -> None:
    """mergekit 0.1.5 multiplies such a pair by 10⁸ (nuslerp), or returns noise of their length (karcher)."""
    for seed in range(6):
        value = normal(40, 50, seed=seed)
        result = run(name, {}, Deltas((value, value * -3.0000001), (1.0, 1.0), (1, 2)))
        ratio = result / value
        assert float(ratio.abs().max()) < 3 and float(ratio.max() - ratio.min()) < 1e-12


# The stated order, element by element in Python's doubles


def mergekit_element(xs: list[float], weights: tuple[float, ...], elect: bool) -> float:
    parts = [x * w for x, w in zip(xs, weights, strict=True)]
    sign = 1 if in_order(parts) >= 0 else -1
    chosen = [(y, w) for y, w in zip(parts, weights, strict=True) if not elect or y * sign > 0]
    return in_order(y for y, _ in chosen) / (in_order(w for _, w in chosen) or 1)


def peft_element(xs: list[float], weights: tuple[float, ...]) -> float:
    sign = 1 if in_order(xs) >= 0 else -1
    parts = [x * w for x, w in zip(xs, weights, strict=True) if x * sign > 0]
    return in_order(parts) / max(1, len(parts))


def sce_element(xs: list[float], weights: tuple[float, ...], energies: list[float]) -> float:
    parts = [x * w for x, w in zip(xs, weights, strict=True)]
    sign = 1 if in_order(parts) >= 0 else -1
    shares = [energy / in_order(energies) for energy in energies]
    chosen = [(y * share, share) for y, share in zip(parts, shares, strict=True) if y * sign > 0]
    return in_order(y for y, _ in chosen) / (in_order(share for _, share in chosen) or 1)


def folded(x: list[float]) -> float:
    while len(x) > 1:
        half = (len(x) + 1) // 2
        x = [a + b for a, b in zip(x[:half], [*x[half:], 0.0], strict=False)]
    return x[0]


def test_sums_are_in_the_stated_order() -> None:
    weights = (0.7, -0.3, 1.1, 0.9)
    inputs = Deltas(tuple(normal(9, 11, seed=seed) for seed in range(4)), weights, (0, 1, 2, 3))
    elements = [list(xs) for xs in zip(*(value.flatten().tolist() for value in inputs.values), strict=True)]
    energies = [folded([(xs[i] * weights[i]) ** 2 for xs in elements]) for i in range(4)]
    expected: dict[str, tuple[dict[str, Any], list[float]]] = {
        "task_arithmetic": ({"normalize": True}, [mergekit_element(xs, weights, False) for xs in elements]),
        "ties:mergekit": ({}, [mergekit_element(xs, weights, True) for xs in elements]),
        "ties:peft": ({"density": 1}, [peft_element(xs, weights) for xs in elements]),
        "sce": ({}, [sce_element(xs, weights, energies) for xs in elements]),
    }
    for name, (options, truth) in expected.items():
        assert run(name, options, inputs).flatten().tolist() == truth, name


# Masks


def splitmix64(key: int, index: int) -> int:
    """The published algorithm in whole numbers, and nothing of torch."""
    m = 2**64 - 1
    z = (key + (index + 1) * 0x9E3779B97F4A7C15) & m
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & m
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & m
    return z ^ (z >> 31)


def test_published_vectors() -> None:
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC]
    assert [number % 2**64 for number in masks.bits(0, 0, 4).tolist()] == published


@settings(max_examples=60, deadline=None)
@given(st.integers(-(2**63), 2**64 - 1), st.integers(0, 2**40), st.integers(1, 9))
def test_the_generator_is_splitmix64(key: int, first: int, count: int) -> None:
    expected = [splitmix64(key, first + i) for i in range(count)]
    assert [number % 2**64 for number in masks.bits(key, first, count).tolist()] == expected
    assert masks.uniform(key, first, count).tolist() == [(number >> 11) * 2.0**-53 for number in expected]


def test_uniform_and_independent() -> None:
    """Of 2¹⁶ draws: 256 bins by χ² (standard deviation 22.6); correlation of neighbouring keys and indices."""
    n = 2**16
    draws = [masks.uniform(key, 0, n) for key in (1, 2, 2**63)]
    for draw in draws:
        counts = torch.histc(draw, bins=256, min=0, max=1)
        assert 150 < float(((counts - n / 256).square() / (n / 256)).sum()) < 370
    pairs = [(draws[0], draws[1]), (draws[0], draws[2]), (draws[0][1:], draws[0][:-1])]
    for a, b in pairs:
        assert abs(float(torch.corrcoef(torch.stack([a, b]))[0, 1])) < 5 / math.sqrt(n)


def test_a_mask_belongs_to_its_key_alone() -> None:
    """The same element of the same adapter is kept, whoever is merged beside it."""
    a, b, c = (normal(50, 60, seed=seed) for seed in range(3))
    with_b = run("dare_linear:peft", {"density": 0.5}, Deltas((a, b), (1.0, 2.0**-80), (7, 8)))
    with_c = run("dare_linear:peft", {"density": 0.5}, Deltas((c, a), (2.0**-80, 1.0), (9, 7)))
    alone = run("dare_linear:peft", {"density": 0.5}, Deltas((a,), (1.0,), (7,)))
    kept = alone != 0
    assert 0.45 < float(kept.double().mean()) < 0.55
    assert same(alone[kept], with_b[kept]) and same(alone[kept], with_c[kept])
    assert same(alone[kept], 2 * a[kept])


def test_rescaling_restores_the_sum_of_magnitudes() -> None:
    value = normal(50, 60)
    for name in ("dare_linear:mergekit", "della_linear"):
        thin = run(name, {"density": 0.5}, Deltas((value,), (1.0,), (7,)))
        assert 0.4 < float((thin != 0).double().mean()) < 0.6
        assert float(thin.abs().sum()) == pytest.approx(float(value.abs().sum()), rel=1e-13)


def test_della_keeps_the_large_more_often() -> None:
    value = torch.arange(1.0, 1001.0, dtype=DOUBLE).expand(200, 1000)
    inputs = Deltas((value,), (1.0,), (7,))
    kept = run("della_linear", {"density": 0.5, "epsilon": 0.4, "rescale": False}, inputs) != 0
    tenths = kept.double().mean(0).view(10, 100).mean(1)
    torch.testing.assert_close(tenths, 0.1 + 0.8 * (torch.arange(10) + 0.5).double() / 10, rtol=0, atol=0.02)
    column = Deltas((torch.ones(2000, 1, dtype=DOUBLE),), (1.0,), (7,))
    assert 0.45 < float((run("della_linear", {"density": 0.5}, column) != 0).double().mean()) < 0.55


# Selection


def largest_by_sorting(x: list[float], count: int) -> list[bool]:
    order = sorted(range(len(x)), key=lambda i: (-abs(x[i]), i))
    return [i in order[:count] for i in range(len(x))]


values = st.lists(
    st.sampled_from([0.0, -0.0, 5e-324, -1e-310, 1.0, -1.0, 1.0 + 2**-52, 3.0, -1e308]) | st.floats(allow_nan=False),
    min_size=1,
    max_size=12,
)


@settings(max_examples=150, deadline=None)
@given(values, st.data())
def test_selection_is_exact_and_equals_go_by_index(x: list[float], data: st.DataObject) -> None:
    count = data.draw(st.integers(0, len(x)))
    assert largest(torch.tensor(x, dtype=DOUBLE), count).tolist() == largest_by_sorting(x, count)


def test_selection_does_not_compare_in_float32() -> None:
    """As mergekit 0.1.5 does on a CPU, where these are all equal and any ten of them go."""
    x = torch.linspace(1, 1 + 1e-9, 2000, dtype=DOUBLE)
    kept = run("ties:mergekit", {"density": 0.005}, Deltas((x,), (1.0,), (0,))) != 0
    assert kept.nonzero()[:, 0].tolist() == list(range(1990, 2000))


def test_counts() -> None:
    x = torch.arange(1.0, 11.0, dtype=DOUBLE)
    one = Deltas((x,), (1.0,), (0,))

    def kept(name: str, **given: Any) -> list[int]:
        return [int(number) for number in run(name, given, one).tolist() if number]

    assert kept("ties:mergekit", density=0.01) == [10]
    assert kept("ties:peft", density=0.01) == []
    assert kept("ties:peft", density=0.29) == [9, 10]
    assert kept("breadcrumbs", density=0.5, gamma=0.2) == [4, 5, 6, 7, 8]
    assert kept("breadcrumbs", density=0.9, gamma=0.2) == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert kept("sce", select_topk=0.5) == []


# Scalars and sums


def test_scalars_are_the_doubles_nearest_to_the_truth() -> None:
    """sin and cos by their series in rational numbers; the angle by its cosine."""
    for cos in (0.5, -0.3, 0.9994, -0.99949, 1e-3):
        angle = scalars.real.acos(cos)
        theta, term, total = Fraction(int(angle * 2**180), 2**180), Fraction(1), Fraction(0)
        for n in range(1, 80):
            total += term
            term *= -theta * theta / (2 * n * (2 * n - 1))
        assert abs(total - Fraction(cos)) < Fraction(1, 2**150)
        first, second = scalars.slerp(scalars.real.mpf(cos), (scalars.real.mpf(0.25), scalars.real.mpf(0.75)))
        assert float(first) == pytest.approx(math.sin(0.25 * math.acos(cos)) / math.sin(math.acos(cos)), rel=1e-13)
        assert float(second) == pytest.approx(math.sin(0.75 * math.acos(cos)) / math.sin(math.acos(cos)), rel=1e-13)
    third = scalars.real.mpf(1) / 3
    assert [float(third), float(2 * third)] == [1 / 3, 2 / 3]


def test_scalars_do_not_touch_the_common_context() -> None:
    import mpmath

    assert mpmath.mp.prec == 53 and scalars.real.prec == 200


def test_sums_of_numbers_are_not_compensated() -> None:
    """``sum`` gives another result from Python 3.12 on."""
    assert in_order([1e16, 1.0, -1e16]) == 0.0


def test_a_coefficient_of_zero_removes_its_term() -> None:
    inputs = several(2, 3, 4)
    assert same(combination(inputs, [0.0, 0.5]), inputs.values[1] * 0.5)
    assert not combination(inputs, [0.0, 0.0]).any()


# Refusals


def one(**change: Any) -> dict[str, Any]:
    return {"values": (torch.ones(2, 3, dtype=DOUBLE),), "weights": (1.0,), "keys": (0,)} | change


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"values": ()}, BadInput, "at least one delta, found 0 deltas"),
        ({"weights": (1.0, 2.0)}, BadInput, "1 deltas, 2 weights"),
        ({"values": (torch.ones((), dtype=DOUBLE),)}, BadInput, "at least one dimension"),
        ({"values": (torch.ones(2),)}, BadInput, "dtype torch.float32, expected torch.float64"),
        ({"values": (torch.tensor([1.0, math.nan], dtype=DOUBLE),)}, BadInput, "NaN or infinity"),
        ({"weights": (0.0,)}, UsageError, "weight 0.0"),
        ({"weights": (math.inf,)}, UsageError, "weight inf"),
        (
            {"values": (torch.ones(2, dtype=DOUBLE), torch.ones(3, dtype=DOUBLE)), "weights": (1, 1), "keys": (0, 1)},
            BadInput,
            r"found \(2,\), \(3,\)",
        ),
    ],
)
def test_deltas_that_do_not_make_sense(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Deltas(**one(**change))


def wrong_inputs() -> Iterator[tuple[str, Deltas, type[Exception], str]]:
    x = normal(3, 4)
    yield "slerp", Deltas((x,), (1.0,), (0,)), UsageError, "path between two deltas, found 1"
    yield "nuslerp", Deltas((x,) * 3, (1.0,) * 3, (0,) * 3), UsageError, "path between two deltas, found 3"
    yield "model_stock", Deltas((x,), (1.0,), (0,)), UsageError, "at least two deltas, found 1"
    yield "slerp", Deltas((x, x), (1.0, -1.0), (0, 0)), UsageError, "sum to 0.0: expected more than 0"
    yield "karcher", Deltas((x, x), (0.5, -1.0), (0, 0)), UsageError, "sum to -0.5: expected more than 0"
    for name in ("slerp", "nuslerp", "karcher", "model_stock", "sce"):
        yield name, Deltas((x * 1e300, x * -2e300), (1.0, 1.0), (0, 0)), BadInput, "beyond the range of float64"


@pytest.mark.parametrize(("name", "inputs", "error", "message"), list(wrong_inputs()))
def test_inputs_that_a_method_refuses(name: str, inputs: Deltas, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        run(name, {}, inputs)
    if name == "nuslerp" and error is BadInput:
        with pytest.raises(error, match=message):
            run(name, {"flatten": False}, inputs)


# The table


def test_defaults_are_explicit_and_a_recipe_reads_back() -> None:
    for name, row in methods.METHODS.items():
        must = {"density": 0.5} if name.endswith(":peft") or name == "magnitude_prune" else {}
        values = parameters(name, must | ({"rank": 4} if name == "svd" else {}))
        assert set(row.parameters) <= set(values)
        assert read(name, Fields(dict(values), "recipe.parameters")) == values
        assert row.summary.endswith(".") and row.source


def test_names() -> None:
    assert method("ties")[0] == "ties:mergekit" and method("ties:peft")[0] == "ties:peft"
    assert method("dare_linear")[0] == "dare_linear:mergekit"
    assert parameters("ties", {"density": 1}) == parameters("ties:mergekit", {})
    assert parameters("knots", {"inner": "dare_ties", "seed": 3})["inner"] == "dare_ties:mergekit"


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("tiess", {}, "no method 'tiess': choose one of linear, .*ties:peft, ties:mergekit.*iso_c"),
        ("slerp:mergekit", {}, "no method"),
        ("ties", {"seed": 1}, "no parameter 'seed': its parameters are density, normalize, lambda"),
        ("slerp", {"t": 0.5}, "its parameters are none"),
        ("ties:peft", {}, "needs the parameter 'density'"),
        ("ties", {"density": 0}, "density: expected a number above 0 and at most 1, found 0"),
        ("ties", {"density": 1.5}, "above 0 and at most 1, found 1.5"),
        ("ties", {"density": math.nan}, "finite number"),
        ("ties", {"density": "0.5"}, "finite number, found '0.5'"),
        ("ties", {"normalize": 1}, "true or false"),
        ("ties", {"consensus": "total"}, "one of sum, count"),
        ("dare_ties", {"seed": -1}, "whole number"),
        ("dare_ties", {"seed": 2**53}, "below 2"),
        ("della", {"density": 0.9}, "density 0.9 with epsilon 0.15"),
        ("breadcrumbs", {"gamma": 1}, "below 1"),
        ("svd", {}, "give one of them"),
        ("svd", {"rank": 0}, "at least 1"),
        ("iso_c", {"energy": 2}, "at most 1"),
        ("knots", {"inner": "svd"}, "has no inner"),
        ("knots", {"inner": "della", "density": 0.9}, "density 0.9 with epsilon"),
        ("knots", {"seed": 1}, "no parameter 'seed'"),
        ("karcher", {"tol": 0}, "above 0"),
    ],
)
def test_parameters_that_do_not_make_sense(name: str, given: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parameters(name, given)


def test_a_recipe_says_everything() -> None:
    with pytest.raises(BadInput, match="'seed' is missing"):
        read("dare_linear:peft", Fields({"density": 0.5}, "recipe.parameters"))
    with pytest.raises(BadInput, match="inner: expected one of"):
        read("knots", Fields({**parameters("knots", {}), "inner": "ties"}, "recipe.parameters"))


def test_the_number_of_adapters() -> None:
    check_count("slerp", {}, 2)
    check_count("ties:mergekit", {}, 1)
    with pytest.raises(UsageError, match="slerp takes exactly 2 adapters of weight other than 0, found 3"):
        check_count("slerp", {}, 3)
    with pytest.raises(UsageError, match="model_stock takes at least 2"):
        check_count("knots", {"inner": "model_stock"}, 1)


def test_the_angle_of_small_rows_counts() -> None:
    """geometry's norms have no absolute floor: rows of length 1e-5 that are equal have t = 1."""
    rows = normal(6, 5) * 1e-3
    inputs = Deltas((rows, rows), (1.0, 1.0), (0, 1))
    torch.testing.assert_close(geometry.model_stock(inputs, {"filter_wise": True}), rows, rtol=1e-13, atol=0)
