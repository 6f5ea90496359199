"""What signs and zeros among weights and scales do to the methods in factor space."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given as of
from hypothesis import settings
from hypothesis import strategies as st
from test_factor_space import CASES, adapters, close, draw, every, run

from loreg.algebra import LowRank

few = settings(max_examples=8, deadline=None)
weights = st.lists(st.floats(0.1, 3) | st.floats(-3, -0.1), min_size=2, max_size=2)
WEIGHTED_FIRST = [case for case in CASES if not case.endswith("-ties")]
"""The methods that weigh before anything that a sign could change; ties elects signs before it weighs."""


@every
@few
@of(seed=st.integers(0, 99), weights=weights, place=st.integers(0, 2))
def test_an_adapter_of_weight_zero_takes_no_room(case: str, seed: int, weights: list[float], place: int) -> None:
    """Ranks of which tsv keeps a share for each adapter: one that is not there has none."""
    (_, one), (_, other) = adapters(seed, (9, 9))
    two = [(weights[0], one), (weights[1], other)]
    absent = (0.0, (LowRank(draw(seed + 1, 24, 2), draw(seed + 2, 2, 17)),))
    assert torch.equal(run(case, [*two[:place], absent, *two[place:]]), run(case, two))


@every
@few
@of(seed=st.integers(0, 99), weights=weights)
def test_the_sign_of_a_scale_is_that_of_a_factor(case: str, seed: int, weights: list[float]) -> None:
    (_, (one,)), (_, other) = adapters(seed, (3, 3))
    negative = LowRank(one.left, one.right, -one.scale)
    moved = LowRank(one.left, -one.right, one.scale)
    plain = run(case, [(weights[0], (one,)), (weights[1], other)])
    found = run(case, [(weights[0], (negative,)), (weights[1], other)])
    close(found, run(case, [(weights[0], (moved,)), (weights[1], other)]), 1e-10)
    assert not torch.allclose(found, plain, rtol=0, atol=1e-6)


@pytest.mark.parametrize("case", WEIGHTED_FIRST)
@few
@of(seed=st.integers(0, 99), weights=weights)
def test_the_sign_of_a_weight_is_that_of_a_scale(case: str, seed: int, weights: list[float]) -> None:
    (_, (one,)), (_, other) = adapters(seed, (3, 3))
    negative = LowRank(one.left, one.right, -one.scale)
    found = run(case, [(weights[0], (negative,)), (weights[1], other)])
    close(found, run(case, [(-weights[0], (one,)), (weights[1], other)]), 1e-10)
