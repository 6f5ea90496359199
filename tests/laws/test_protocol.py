"""Pushes, collections and repairs lose nothing, in any order of their steps; with a rule less they do."""

from __future__ import annotations

import pytest
from protocol_model import Rules, damaged, explore, start


@pytest.mark.parametrize(
    ("pushes", "collections"),
    [(1, 1), (2, 1), (1, 2), (2, 2), pytest.param(3, 1, marks=pytest.mark.slow)],
)
def test_every_state_is_safe(pushes: int, collections: int) -> None:
    states, way = explore(start(pushes, collections), Rules())
    assert not way
    assert states > 100  # it did walk


@pytest.mark.parametrize(("pushes", "collections"), [(0, 1), (1, 1), (0, 2)])
def test_every_state_beside_a_repair_is_safe(pushes: int, collections: int) -> None:
    states, way = explore(damaged(pushes, collections), Rules())
    assert not way
    assert states > 100


@pytest.mark.parametrize("rule", ["pin_before_look", "list_before_catalog", "fresh_generation", "fence"])
def test_no_rule_can_be_left_out(rule: str) -> None:
    _, way = explore(start(2, 2), Rules(**{rule: False}))
    assert way and not way[-1].safe, f"nothing is lost without {rule}"


@pytest.mark.parametrize("rule", ["pin_a_repair", "repair_by_a_fresh_copy", "commit_what_the_row_says_now"])
def test_no_rule_of_a_repair_can_be_left_out(rule: str) -> None:
    _, way = explore(damaged(1, 1), Rules(**{rule: False}))
    assert way and not way[-1].safe, f"nothing is lost without {rule}"
