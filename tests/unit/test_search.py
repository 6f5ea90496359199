"""Searching weights: what the scoring function is asked, what comes back, and what is refused."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import loreg
from loreg.errors import NotFound, UsageError
from loreg.format.reference import parse_expression
from loreg.search import METHODS, ScoringFailed, Trial, expression, search_weights

NAMES = ("sql", "humor", "poems")
BEST = {"sql": 0.75, "humor": 0.0, "poems": -0.5}


def bowl(weights: Mapping[str, float]) -> float:
    """A loss with its minimum at BEST, in which the weights depend on each other."""
    d = [weights[name] - BEST[name] for name in NAMES]
    return sum(x * x for x in d) + d[0] * d[1] - 0.5 * d[1] * d[2] + 1


@pytest.mark.parametrize("method", METHODS)
def test_every_method_finds_a_minimum_within_its_budget(method: str) -> None:
    budget = 400 if method == "differential_evolution" else 60
    found = search_weights(bowl, NAMES, budget=budget, method=method, regularisation=0, seed=1)
    assert len(found.history) <= budget
    assert dict(found.weights) == pytest.approx(BEST, abs=0.1)
    assert found.score == min(trial.score for trial in found.history) == bowl(found.weights)


def test_few_tries_for_many_weights_still_help() -> None:
    """LoraHub's own setting: 20 adapters and 40 tries, where a quadratic model has not points enough."""
    names = [f"a{index}" for index in range(20)]
    target = dict.fromkeys(names, 0.0) | {"a3": 0.7, "a11": -0.6, "a17": 0.5}

    def loss(weights: Mapping[str, float]) -> float:
        return sum((weights[name] - target[name]) ** 2 for name in names)

    assert search_weights(loss, names).score < 0.35 * loss(dict.fromkeys(names, 0.0))


def test_candidates_are_asked_once_within_bounds_and_in_decimals() -> None:
    asked: list[tuple[float, ...]] = []

    def score(weights: Mapping[str, float]) -> float:
        asked.append(tuple(weights.values()))
        return -sum(weights.values())  # pushes everything against its bound

    for method in METHODS:
        asked.clear()
        found = search_weights(score, NAMES, budget=60, bounds=(-0.25, 0.5), method=method, digits=2, seed=3)
        assert asked == [tuple(trial.weights.values()) for trial in found.history]
        assert len(set(asked)) == len(asked) <= 60
        assert all(-0.25 <= weight <= 0.5 and weight == round(weight, 2) for point in asked for weight in point)
        assert all(math.copysign(1, weight) == 1 for point in asked for weight in point if weight == 0)
    assert set(search_weights(score, NAMES, bounds=(-0.25, 0.5)).weights.values()) == {0.5}


def test_the_first_candidate_is_the_base_or_the_start() -> None:
    first = search_weights(bowl, NAMES, budget=1).history[0]
    assert (first.expression, first.score) == ("0*sql", bowl(dict.fromkeys(NAMES, 0.0)))
    assert search_weights(bowl, NAMES, budget=1, start={"humor": 0.5}).expression == "0.5*humor"
    assert search_weights(bowl, NAMES, budget=1, bounds=(0.25, 1)).expression == "0.25*sql + 0.25*humor + 0.25*poems"


def test_the_highest_can_be_wanted() -> None:
    found = search_weights(lambda weights: -bowl(weights), NAMES, goal="highest", regularisation=0)
    assert dict(found.weights) == pytest.approx(BEST, abs=0.06)
    assert found.score == max(trial.score for trial in found.history) == -found.best.objective


def test_regularisation_is_the_mean_size_of_a_weight() -> None:
    found = search_weights(bowl, NAMES, budget=30, regularisation=0.6)
    for trial in found.history:
        size = sum(map(abs, trial.weights.values())) / 3
        assert trial.objective == pytest.approx(trial.score + 0.6 * size, rel=1e-15)
    assert found.best.objective == min(trial.objective for trial in found.history)
    free = search_weights(bowl, NAMES, budget=30, regularisation=0)
    assert sum(map(abs, found.weights.values())) < sum(map(abs, free.weights.values())) - 0.2


@pytest.mark.parametrize("method", METHODS)
def test_the_same_seed_gives_the_same_history(method: str) -> None:
    def run(seed: int) -> tuple[Trial, ...]:
        return search_weights(bowl, NAMES, budget=150, method=method, digits=2, seed=seed).history

    first = run(5)
    assert run(5) == first
    assert run(6) != first  # the seed says where a search begins again


def test_a_search_that_has_seen_everything_ends() -> None:
    found = search_weights(lambda weights: abs(weights["sql"]), ["sql"], budget=1000, digits=0, bounds=(-2, 2))
    assert {trial.weights["sql"] for trial in found.history} <= {-2, -1, 0, 1, 2} and len(found.history) <= 5
    assert found.expression == "0*sql"


def test_watch_is_told_of_every_trial() -> None:
    seen: list[Trial] = []
    found = search_weights(bowl, NAMES, budget=7, watch=seen.append)
    assert tuple(seen) == found.history and len(seen) == 7


# The scoring function fails.


def _raising(weights: Mapping[str, float]) -> float:
    raise RuntimeError("CUDA out of memory")


FAILURES: list[tuple[Callable[[Mapping[str, float]], Any], str]] = [
    (_raising, "RuntimeError: CUDA out of memory"),
    (lambda weights: math.nan, "it gave nan, expected a finite number"),
    (lambda weights: math.inf, "it gave inf, expected a finite number"),
    (lambda weights: None, "expected|NoneType"),
    (lambda weights: "good", "it gave 'good', expected a number"),
]


@pytest.mark.parametrize(("score", "message"), FAILURES, ids=["raises", "nan", "inf", "none", "text"])
def test_a_scoring_function_that_fails_is_named_with_its_sum(score: Callable[..., Any], message: str) -> None:
    def late(weights: Mapping[str, float]) -> Any:
        return bowl(weights) if not weights["humor"] else score(weights)

    with pytest.raises(ScoringFailed, match=message) as caught:
        search_weights(late, NAMES, budget=9)
    trials = caught.value.history
    assert f"(trial {len(trials) + 1} of 9)" in str(caught.value) and "humor'" in str(caught.value)
    assert len(trials) == 2 and all(trial.score == bowl(trial.weights) for trial in trials)
    assert caught.value.exit_code == 2


def test_an_interrupt_is_no_failure() -> None:
    def interrupted(weights: Mapping[str, float]) -> float:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search_weights(interrupted, NAMES)


def test_a_scoring_function_cannot_change_what_is_recorded() -> None:
    def careless(weights: dict[str, float]) -> float:
        weights.clear()
        return 1.0

    assert set(search_weights(careless, NAMES, budget=3).weights) == set(NAMES)


# Arguments.


@pytest.mark.parametrize(
    ("adapters", "options", "message"),
    [
        ([], {}, "none: expected at least one"),
        (["sql", "sql"], {}, "each once"),
        (["SQL"], {}, "'SQL' is not a name"),
        (NAMES, {"budget": 0}, "budget 0"),
        (NAMES, {"digits": 16}, "digits 16"),
        (NAMES, {"regularisation": -1}, "regularisation -1"),
        (NAMES, {"regularisation": math.nan}, "regularisation nan"),
        (NAMES, {"bounds": (1, 1)}, "bounds"),
        (NAMES, {"bounds": (-math.inf, 1)}, "bounds"),
        (NAMES, {"goal": "best"}, "'best'"),
        (NAMES, {"method": "newton"}, "auto, cobyqa, cobyla"),
        (NAMES, {"start": {"haiku": 1}}, "'haiku'"),
        (NAMES, {"start": {3: 1}}, "weight for 3"),
        (NAMES, {"start": {"sql": "1"}}, "weight '1' for 'sql'"),
        (NAMES, {"start": {"sql": math.nan}}, "weight nan for 'sql'"),
        (NAMES, {"start": [0.5]}, "expected a map"),
        (NAMES, {"budget": 2.5}, r"budget 2\.5.*whole number"),
        (NAMES, {"budget": True}, "budget True"),
        (NAMES, {"budget": None}, "budget None"),
        (NAMES, {"digits": 2.5}, r"digits 2\.5"),
        (NAMES, {"regularisation": "x"}, "regularisation 'x'"),
        (NAMES, {"regularisation": 10**400}, "regularisation 1000"),
        (NAMES, {"seed": None}, "seed is None"),
        (NAMES, {"bounds": 3}, "bounds of the weights are 3"),
        (NAMES, {"bounds": (math.nan, 1)}, "bounds"),
        (NAMES, {"bounds": (-1, math.nan)}, "bounds"),
        (NAMES, {"bounds": (-1, 0, 1)}, "bounds"),
        (NAMES, {"bounds": ("-1", "1")}, "bounds"),
        (NAMES, {"bounds": None}, "bounds"),
        (NAMES, {"goal": ["lowest"]}, "goal"),
        (NAMES, {"method": None}, "method None"),
        (NAMES, {"watch": 3}, "watch is 3: expected a function"),
        (None, {}, "adapters are None"),
        (5, {}, "adapters are 5"),
        ([5], {}, r"adapters are \[5\]"),
    ],
)
def test_what_makes_no_sense_is_refused_unasked(adapters: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        search_weights(lambda weights: pytest.fail("asked"), adapters, **options)


def test_without_scipy_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy", None)
    monkeypatch.delitem(sys.modules, "scipy.optimize", raising=False)
    with pytest.raises(NotFound, match=r"pip install 'loreg\[search\]'"):
        search_weights(bowl, NAMES)


def test_scipy_is_imported_only_by_a_search() -> None:
    probe = "import sys, loreg.search; print('scipy' in sys.modules, 'numpy' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["False", "False"]


# Expressions.

_weight = st.floats(allow_nan=False, allow_infinity=False)


@given(st.dictionaries(st.sampled_from(["sql", "a-b", "x.y", "owner/poems:v2", "sql:prod"]), _weight, min_size=1))
def test_an_expression_is_its_weights(weights: dict[str, float]) -> None:
    terms = {str(term.reference): term.weight for term in parse_expression(expression(weights))}
    expected = {name: weight for name, weight in weights.items() if weight} or {next(iter(weights)): 0.0}
    assert terms == expected and list(terms) == list(expected)


def test_an_expression_reads_well() -> None:
    assert expression({"sql": 0.7, "humor": -0.3, "poems": 1}) == "0.7*sql - 0.3*humor + poems"
    assert expression({"sql": -1, "humor": 0}) == "-sql"
    with pytest.raises(UsageError, match="no adapter"):
        expression({})
    with pytest.raises(UsageError, match="finite"):
        expression({"sql": math.nan})


def test_what_was_found_can_be_merged(pushed: loreg.Registry, tmp_path: Any) -> None:
    """From the scores of merges to a merge: the base's own root for all weights 0, and the best sum's."""
    want = pushed.merge("0.5*sql - 0.25*humor", tmp_path / "want", verify="none").weights_root

    def score(weights: Mapping[str, float]) -> float:
        return abs(weights["sql"] - 0.5) + abs(weights["humor"] + 0.25)

    found = search_weights(score, ["sql", "humor"], budget=120, digits=2, regularisation=0)
    assert pushed.merge(found.expression, tmp_path / "best", verify="none").weights_root == want
    base = pushed.merge(found.history[0].expression, tmp_path / "base0", verify="none")
    assert base.weights_root == pushed.show_base("base").manifest.identity.weights_root


@pytest.mark.parametrize("score", [None, 0.5, "loss", {}])
def test_what_cannot_be_called_is_no_scoring_function(score: Any) -> None:
    with pytest.raises(UsageError, match=r"score is .*: expected a function"):
        search_weights(score, NAMES)


def test_numbers_of_numpy_are_numbers() -> None:
    options: dict[str, Any] = {
        "budget": np.int64(3),
        "bounds": np.array([-1.0, 1.0]),
        "regularisation": np.float32(0),
    }
    assert len(search_weights(bowl, NAMES, start={"sql": np.float64(0.5)}, **options).history) == 3
