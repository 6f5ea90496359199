"""The ledger loses nothing that was acknowledged, in any order of its steps; with a rule less it does."""

from __future__ import annotations

import pytest
from ledger_model import Limits, Rules, explore, lost, mixed, refused, wrong


@pytest.mark.parametrize(
    ("processes", "limits", "least"),
    [
        (2, Limits(changes=3), 2_000),
        (2, Limits(changes=1, snapshots=2), 10_000),
        (2, Limits(changes=2, losses=1, copies=1), 6_000),
        (2, Limits(changes=2, snapshots=1, losses=1), 70_000),
        (2, Limits(changes=2, snapshots=1, copies=1), 80_000),
        (1, Limits(changes=3, snapshots=1, losses=1, copies=1), 80_000),
        pytest.param(2, Limits(changes=2, snapshots=2), 200_000, marks=pytest.mark.slow),
        pytest.param(2, Limits(changes=2, snapshots=1, losses=1, copies=1), 500_000, marks=pytest.mark.slow),
    ],
)
def test_every_state_is_safe(processes: int, limits: Limits, least: int) -> None:
    states, way = explore(processes, limits)
    print(f"{states:,} states")
    assert not way, wrong(way[-1], Rules())
    assert states > least  # it did walk


LACKS = "somebody committed who lacks"
MISSING = "a record is missing"


@pytest.mark.parametrize(
    ("rule", "processes", "limits", "what"),
    [
        ("record_before_acknowledging", 1, Limits(changes=1), "acknowledged is lost"),
        ("commit_before_record", 1, Limits(changes=1), "never committed"),
        ("catch_up", 2, Limits(changes=2), MISSING),
        ("settle_before_commit", 1, Limits(changes=3, losses=1, copies=1), LACKS),
        ("refuse_another_record", 1, Limits(changes=2, losses=1, copies=1), LACKS),
        ("look_at_opening", 1, Limits(changes=2, copies=1), LACKS),
        ("look_at_all_numbers", 1, Limits(changes=3, snapshots=1, copies=1), LACKS),
        ("list_before_snapshot", 2, Limits(changes=1, snapshots=2), MISSING),
        ("snapshot_in_transaction", 2, Limits(changes=1, snapshots=1), "never a catalog"),
        ("snapshot_before_delete", 1, Limits(changes=1, snapshots=1), "acknowledged is lost"),
    ],
)
def test_no_rule_can_be_left_out(rule: str, processes: int, limits: Limits, what: str) -> None:
    assert not explore(processes, limits)[1]
    rules = Rules()._replace(**{rule: False})
    _, way = explore(processes, limits, rules)
    assert way and what in wrong(way[-1], rules), f"nothing is lost without {rule}"


def test_the_chain_tells_two_ledgers_apart() -> None:
    """Where nothing keeps an older catalog from writing, what two have written together is not taken for whole."""
    limits = Limits(changes=3, snapshots=1, copies=1)
    both = Rules(look_at_opening=False, refuse_another_record=False)
    assert not explore(1, limits, both, mixed)[1]
    assert explore(1, limits, both._replace(chain=False), mixed)[1]


def test_only_an_older_copy_is_refused() -> None:
    assert not explore(2, Limits(changes=2, snapshots=1), bad=refused)[1]
    assert explore(2, Limits(changes=2, copies=1), bad=refused)[1]


def test_who_makes_a_catalog_again_ends_all_processes_before() -> None:
    """One that is left with a record in hand is refused, as its number is taken; but not where shortening has deleted
    that: it would write what nobody reads, and say that it has succeeded."""
    left = Limits(changes=2, losses=1, copies=1, outlive=True)
    assert not explore(2, left, bad=lost)[1]
    _, way = explore(2, Limits(changes=1, snapshots=1, losses=1, outlive=True), bad=lost)
    assert way and "acknowledged is lost" in lost(way[-1], Rules())
