"""What weights, factors and parameters do to what a method makes of dense deltas: for any of them, to the bit.

Deltas are small whole numbers of either sign, so that sums are exact and many of them are zero, and no two elements
of a delta have one magnitude, so that every selection is one.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, settings
from hypothesis import given as of
from hypothesis import strategies as st
from torch import Tensor

from loreg.algebra.elementwise import METHODS, Deltas
from loreg.errors import UsageError
from loreg.format import methods
from loreg.format.methods import parameters

DOUBLE = torch.float64
TAKES = {name: methods.known(name) for name in METHODS}
SCALED = [name for name in METHODS if "lambda" in TAKES[name]]
ELECTING = [name for name in METHODS if {"consensus", "majority_sign"} & set(TAKES[name])]
DENSITIES = (0.4, 0.6, 1.0)

few = settings(max_examples=25, deadline=None)
powers = st.sampled_from([-4.0, -2.0, -1.0, -0.5, 0.25, 0.5, 1.0, 2.0])
dyadic = st.sampled_from([-2.0, -1.5, -1.0, -0.75, -0.5, 0.25, 0.5, 1.0, 1.5, 3.0])


def whole_numbers(seed: int, count: int, shape: tuple[int, ...] = (6, 7)) -> tuple[Tensor, ...]:
    """``count`` deltas, of which elements in one place differ by a sign or a factor of 2."""
    random = torch.Generator().manual_seed(seed)
    size = torch.Size(shape).numel()
    magnitudes = torch.randperm(size, generator=random).double() + 1
    made = []
    for _ in range(count):
        signs = torch.randint(0, 2, (size,), generator=random).double() * 2 - 1
        twice = 2.0 ** torch.randint(0, 2, (), generator=random)
        made.append((magnitudes * signs * twice).view(shape))
    return tuple(made)


@st.composite
def deltas(draw: st.DrawFn, weights: st.SearchStrategy[float], least: int = 1) -> Deltas:
    count = draw(st.integers(least, 3))
    chosen = tuple(draw(st.lists(weights, min_size=count, max_size=count)))
    return Deltas(whole_numbers(draw(st.integers(0, 2**20)), count), chosen, tuple(range(7, 7 + count)))


def options(data: st.DataObject, name: str, **fixed: Any) -> dict[str, Any]:
    """Parameters for the method, drawn, but for those that are fixed."""
    choices: dict[str, st.SearchStrategy[Any]] = {
        "density": st.sampled_from(DENSITIES),
        "gamma": st.sampled_from([0.0, 0.2]),
        "seed": st.integers(0, 9),
        "normalize": st.booleans(),
        "rescale": st.booleans(),
        "consensus": st.sampled_from(["sum", "count"]),
        "majority_sign": st.sampled_from(["total", "frequency"]),
        "filter_wise": st.booleans(),
    }
    return {key: fixed[key] if key in fixed else data.draw(choices[key]) for key in choices if key in TAKES[name]}


def run(name: str, inputs: Deltas, options: dict[str, Any]) -> Tensor:
    return METHODS[name](inputs, parameters(name, options))


@pytest.mark.parametrize("name", SCALED)
@few
@of(inputs=deltas(dyadic), factor=st.floats(-8, 8) | dyadic, data=st.data())
def test_lambda_is_a_factor_of_the_result(name: str, inputs: Deltas, factor: float, data: st.DataObject) -> None:
    chosen = options(data, name)
    assert torch.equal(run(name, inputs, {**chosen, "lambda": factor}), run(name, inputs, chosen) * factor)


# All that weigh before they look at signs, and do not divide by weights.
FOLDING = [*SCALED, "magnitude_prune", "dare_linear:peft", "sce", "model_stock"]


@pytest.mark.parametrize("name", FOLDING)
@few
@of(inputs=deltas(powers, least=2), data=st.data())
def test_a_weight_is_a_factor_of_its_delta(name: str, inputs: Deltas, data: st.DataObject) -> None:
    """Its sign too."""
    chosen = options(data, name, normalize=False)
    if name == "sce":
        random = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))  # variances that are never equal
        several = tuple(torch.randn(6, 7, dtype=DOUBLE, generator=random) for _ in inputs.weights)
        inputs = Deltas(several, inputs.weights, inputs.keys)
        chosen = {"select_topk": data.draw(st.sampled_from([0.3, 0.6, 1.0]))}
    values = tuple(value * weight for value, weight in zip(inputs.values, inputs.weights, strict=True))
    folded = Deltas(values, (1.0,) * len(values), inputs.keys)
    assert torch.equal(run(name, inputs, chosen), run(name, folded, chosen))


@pytest.mark.parametrize("name", ["magnitude_prune", "ties:peft", "dare_linear:peft", "dare_ties:peft"])
@few
@of(inputs=deltas(dyadic), factor=powers, data=st.data())
def test_a_factor_of_all_weights_is_one_of_a_sum_in_peft_s_order(
    name: str, inputs: Deltas, factor: float, data: st.DataObject
) -> None:
    """Below zero too: signs are elected before anything is weighed."""
    chosen = options(data, name)
    scaled = Deltas(inputs.values, tuple(weight * factor for weight in inputs.weights), inputs.keys)
    assert torch.equal(run(name, scaled, chosen), run(name, inputs, chosen) * factor)


@pytest.mark.parametrize("name", SCALED)
@few
@of(weights=st.lists(dyadic, min_size=1, max_size=3), seed=st.integers(0, 99), data=st.data())
def test_a_normalised_sum_of_one_delta_is_that_delta(
    name: str, weights: list[float], seed: int, data: st.DataObject
) -> None:
    """Whatever the weights, as long as they do not cancel."""
    assume(sum(weights) != 0)
    (value,) = whole_numbers(seed, 1)
    inputs = Deltas((value,) * len(weights), tuple(weights), tuple(range(len(weights))))
    found = run(name, inputs, options(data, name, normalize=True, density=1.0, consensus="sum"))
    torch.testing.assert_close(found, value, rtol=1e-15, atol=0)


@pytest.mark.parametrize("name", [*ELECTING, "sce"])
@few
@of(weight=st.sampled_from([0.25, 0.5, 1.0, 3.0]), seed=st.integers(0, 99), data=st.data())
def test_where_no_sign_prevails_it_is_plus(name: str, weight: float, seed: int, data: st.DataObject) -> None:
    value, zeros = *whole_numbers(seed, 1), torch.zeros(6, 7, dtype=DOUBLE)
    inputs = Deltas((value, zeros, -value), (weight, 2.0, weight), (0, 1, 2))
    chosen = options(data, name, normalize=False, density=1.0)
    assert torch.equal(run(name, inputs, chosen), value.abs() * weight)
    if "consensus" in chosen or "majority_sign" in chosen:
        by_count = {**chosen, **({"consensus": "count"} if "consensus" in chosen else {"majority_sign": "frequency"})}
        unequal = Deltas((value, value * -3), (weight, weight), (0, 1))
        assert torch.equal(run(name, unequal, by_count), torch.where(value > 0, value, -3 * value) * weight)


@few
@of(exponent=st.integers(3, 24))
def test_sce_lets_a_delta_with_hardly_any_share_fade(exponent: int) -> None:
    """A sum of shares below 1e-6 divides as 1e-6, and any other as it is."""
    loud, quiet = torch.ones(64, dtype=DOUBLE), torch.zeros(64, dtype=DOUBLE)
    loud[0], quiet[0] = 0, 2.0**-exponent
    found = run("sce", Deltas((loud, quiet), (1.0, 1.0), (0, 1)), {})
    share = 4.0**-exponent / (63 + 4.0**-exponent)
    assert float(found[0]) == pytest.approx(2.0**-exponent * min(1, share / 1e-6), rel=1e-12)
    assert torch.equal(found[1:], loud[1:])


@few
@of(
    inputs=deltas(st.sampled_from([0.25, 0.5, 1.0, 3.0]), least=2),
    weight=st.sampled_from([0.5, 1.0, 5.0]),
    steps=st.integers(1, 3),
)
def test_karcher_gives_a_delta_of_zeros_a_length_and_no_direction(inputs: Deltas, weight: float, steps: int) -> None:
    """Also where it is stopped before it has arrived, and the shares of the others decide how far it is."""
    chosen = {"max_iter": steps, "tol": 1e-9}
    zeros = torch.zeros_like(inputs.values[0])
    more = Deltas((zeros, *inputs.values), (weight, *inputs.weights), (9, *inputs.keys))
    shorter = sum(inputs.weights) / sum(more.weights)
    expected = run("karcher", inputs, chosen) * shorter
    torch.testing.assert_close(run("karcher", more, chosen), expected, rtol=1e-13, atol=1e-13)


@few
@of(inputs=deltas(dyadic, least=2), data=st.data())
def test_a_stock_of_two_is_the_projection(inputs: Deltas, data: st.DataObject) -> None:
    """Where two are of one length, t·mean is what a·x + a·y says of cos = ⟨x, y⟩/‖x‖‖y‖ with the signs of weights."""
    x, y = inputs.values[:2]
    y = y * (x.norm() / y.norm())
    signs = [data.draw(st.sampled_from([-1.0, 1.0])) for _ in range(2)]
    cos = float((x * y).sum() / (x.norm() * y.norm())) * signs[0] * signs[1]
    assume(1 + cos > 0.01)
    expected = (x * signs[0] + y * signs[1]) * cos / (1 + cos)
    found = run("model_stock", Deltas((x, y), (signs[0], signs[1]), (0, 1)), {})
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-9)


def test_no_merge_is_without_end() -> None:
    """A tolerance that is never met, and as many steps as an integer holds."""
    assert parameters("karcher", {"max_iter": 10_000, "tol": 1e-300})["max_iter"] == 10_000
    for steps in (10_001, 2**53 - 1, 10**30):
        for name, chosen in (("karcher", {}), ("knots", {"inner": "karcher"})):
            with pytest.raises(UsageError, match=r"max_iter: expected a whole number of at most 10000, found"):
                parameters(name, {**chosen, "max_iter": steps})


def test_what_is_known_is_what_is_read() -> None:
    """Own parameters first, then those of truncation, then the inner method's."""
    assert list(methods.known("ties:mergekit", truncated=True))[-2:] == ["rank", "energy"]
    assert list(methods.known("knots", "karcher")) == ["inner", "rank", "energy", "max_iter", "tol"]
    for name in ("knots", "core_space"):
        for inner in METHODS:
            must = {"density": 0.5} if "density" in TAKES[inner] else {}
            found = parameters(name, {"inner": inner, **must})
            assert list(found) == list(methods.known(name, inner))
