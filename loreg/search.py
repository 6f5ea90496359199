"""Searching the weights of a sum of adapters by somebody's own measure, without gradients, as LoraHub does.

    found = search_weights(loss, ["sql", "humor", "poems"], budget=40)
    registry.merge(found.expression, "model/")

Huang et al. 2023, "LoraHub: Efficient Cross-Task Generalization via Dynamic LoRA Composition", arXiv:2307.13269:
weights in [-1.5, 1.5] that minimise a loss on a few examples plus an L1 term, from the base on. There nevergrad
searches; here scipy does (``pip install 'loreg[search]'``).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, Literal

from loreg.errors import NotFound, UsageError
from loreg.format.reference import Reference, format_weight

METHODS = ("auto", "cobyqa", "cobyla", "powell", "differential_evolution")
"""The ways to search; see ``search_weights``."""

_ROUNDS = 100  # a method that settles is started again, but not for ever: all that it tries may be known already

Point = tuple[float, ...]
Score = Callable[[Mapping[str, float]], float]


@dataclass(frozen=True, slots=True)
class Trial:
    """Weights that were tried. ``score``: what the scoring function said. ``objective``: what was minimised: the
    score, or its negative if the highest is wanted, plus the L1 term."""

    weights: Mapping[str, float]
    score: float
    objective: float

    @property
    def expression(self) -> str:
        """The weighted sum, as ``merge`` and ``compose`` take it."""
        return expression(self.weights)


@dataclass(frozen=True, slots=True)
class Found:
    """The outcome of a search: the trial of the lowest objective, the first of several; and all, in their order."""

    best: Trial
    history: tuple[Trial, ...]

    @property
    def weights(self) -> Mapping[str, float]:
        return self.best.weights

    @property
    def score(self) -> float:
        return self.best.score

    @property
    def expression(self) -> str:
        """The best weighted sum, as ``merge`` and ``compose`` take it."""
        return self.best.expression


class ScoringFailed(UsageError):
    """The scoring function raised an error, or gave no finite number. ``history``: the trials before it."""

    history: tuple[Trial, ...] = ()


def expression(weights: Mapping[str, float]) -> str:
    """``{"sql": 0.7, "humor": -0.3}`` as ``0.7*sql - 0.3*humor``: each weight to the bit, in the order given.

    Adapters of weight 0 are left out. If all are, the first stands with it: a merge of that is the base. Raises
    UsageError for no adapter, a name that is no reference, or a weight that is not finite.
    """
    text = ""
    for name, weight in weights.items():
        reference, size = Reference.parse(name), format_weight(abs(weight))
        if weight != 0:
            sign = ("-" if weight < 0 else "") if not text else (" - " if weight < 0 else " + ")
            text += f"{sign}{reference}" if size == "1" else f"{sign}{size}*{reference}"
    if not weights:
        raise UsageError("There is no adapter to make an expression of: expected one at least.")
    return text or f"0*{next(iter(weights))}"


def search_weights(
    score: Score,
    adapters: Sequence[str],
    *,
    budget: int = 40,
    bounds: tuple[float, float] = (-1.5, 1.5),
    goal: Literal["lowest", "highest"] = "lowest",
    method: str = "auto",
    regularisation: float = 0.05,
    start: Mapping[str, float] | None = None,
    digits: int = 4,
    seed: int = 0,
    watch: Callable[[Trial], None] | None = None,
) -> Found:
    """The weights of ``adapters`` with the best score among at most ``budget`` that are tried.

    ``score(weights)``, a function of adapter → weight, tells how good a sum is: a loss, of which the ``lowest`` is
    best, unless ``goal`` is ``highest``. It is asked once for each candidate: weights within ``bounds``, rounded to
    ``digits`` decimals. What is minimised is the loss + ``regularisation``·mean|w|, as in LoraHub (algorithm.py,
    `default_l1_regularization`: 0.05). The first candidate is ``start``: by default all weights 0, which is the base.
    ``watch`` is told of each trial.

    ``method``: ``cobyqa`` and ``cobyla`` (Ragonneau 2022; Powell 1994) follow a quadratic or a linear model of the
    objective, ``powell`` goes along lines, ``differential_evolution`` breeds a population, for objectives of many
    valleys and budgets of many hundreds. What settles early begins again, elsewhere or near the best. ``auto`` is
    ``cobyqa`` with a budget of four per adapter or more, else ``cobyla``, whose model needs half as many points.
    Measured on synthetic losses with interactions, by the part of the base's objective that is left, means over 8:
    100 tries for 4, 8 and 20 weights leave 0.02, 0.01 and 0.06 with cobyqa, 0.02, 0.02 and 0.4 with powell, 0.2, 0.6
    and 1 with differential evolution; 40 tries for 20 weights 0.2 with cobyla and 0.9 with cobyqa. With losses in
    steps of 0.05, as accuracies are, 100 tries for 8 and 20 weights: cobyqa 0.08 and 0.08, cobyla 0.09 and 0.16.

    The same arguments and scores give the same history, on one build of scipy. Raises ScoringFailed where ``score``
    raises an error or gives no finite number; UsageError for arguments that make no sense; NotFound without scipy.
    """
    names = _checked_names(adapters)
    low, high = _checked_bounds(bounds)
    begin = _checked_start(start, names)
    _check_functions(score, watch)
    _check_options(budget, digits, regularisation, seed, goal, method)
    if method == "auto":
        method = "cobyqa" if budget >= 4 * len(names) else "cobyla"
    optimize = _scipy()
    trials = _Trials(score, names, budget, (low, high), goal == "highest", regularisation, digits, watch)
    rng = random.Random(seed)
    first = tuple(min(max(weight, low), high) for weight in begin)
    try:
        trials(first)
        point = first
        for number in range(_ROUNDS):
            _run(optimize, method, trials, point, rng)
            if number % 2 == 0:
                point = tuple(rng.uniform(low, high) for _ in names)
            else:
                point = tuple(rng.gauss(weight, (high - low) / 10) for weight in trials.best)
            point = tuple(min(max(weight, low), high) for weight in point)
    except _Spent:
        pass
    best = min(trials.history, key=lambda trial: trial.objective)
    return Found(best, tuple(trials.history))


class _Spent(Exception):
    """The budget is spent. It leaves through scipy, which knows no other way to stop at once."""


@dataclass
class _Trials:
    """The objective, as scipy calls it: for each candidate that is new, the scoring function is asked once."""

    score: Score
    names: Sequence[str]
    budget: int
    bounds: tuple[float, float]
    highest: bool
    regularisation: float
    digits: int
    watch: Callable[[Trial], None] | None
    history: list[Trial] = field(default_factory=list)
    _known: dict[Point, float] = field(default_factory=dict)

    def __call__(self, candidate: Sequence[float]) -> float:
        low, high = self.bounds
        # Some methods step over the bounds. Adding 0 makes -0 the same candidate as 0.
        point = tuple(min(max(round(float(x), self.digits), low), high) + 0.0 for x in candidate)
        if point not in self._known:
            if len(self.history) >= self.budget:
                raise _Spent
            self._known[point] = self._try(point)
        return self._known[point]

    @property
    def best(self) -> Point:
        return min(self._known, key=self._known.__getitem__)

    def _try(self, point: Point) -> float:
        weights = dict(zip(self.names, point, strict=True))
        told: Any = None
        try:
            told = self.score(dict(weights))
            value = float(told)
        except Exception as error:
            what = f"{type(error).__name__}: {error}" if told is None else f"it gave {told!r}, expected a number"
            raise self._failed(weights, what) from error
        if not math.isfinite(value):
            raise self._failed(weights, f"it gave {value}, expected a finite number; give a large one for a bad sum")
        penalty = self.regularisation * sum(map(abs, point)) / len(point)
        trial = Trial(weights, value, (-value if self.highest else value) + penalty)
        self.history.append(trial)
        if self.watch is not None:
            self.watch(trial)
        return trial.objective

    def _failed(self, weights: Mapping[str, float], what: str) -> ScoringFailed:
        place = f"{expression(weights)!r} (trial {len(self.history) + 1} of {self.budget})"
        failed = ScoringFailed(f"The scoring function failed at {place}: {what}.")
        failed.history = tuple(self.history)
        return failed


def _run(optimize: Any, method: str, trials: _Trials, start: Point, rng: random.Random) -> None:
    """One search from ``start`` until the method settles. Raises _Spent when the budget is."""
    bounds, reach = [trials.bounds] * len(start), trials.bounds[1] - trials.bounds[0]
    most = 4 * (trials.budget + len(start))  # candidates that are known cost nothing, but must not go on for ever
    if method == "differential_evolution":
        size = max(1, min(5, trials.budget // (4 * len(start))))
        breeding = {"popsize": size, "maxiter": most, "polish": False, "x0": start, "rng": rng.getrandbits(32)}
        optimize.differential_evolution(trials, bounds, **breeding)
        return
    precision = max(reach / 300, 10.0**-trials.digits)
    radius = max(reach / 6, precision)
    options: dict[str, Any] = {
        "cobyqa": {"initial_tr_radius": radius, "final_tr_radius": precision, "maxfev": most},
        "cobyla": {"rhobeg": radius, "tol": precision, "maxiter": most},
        "powell": {"xtol": 10 * precision, "ftol": 1e-3, "maxfev": most},
    }[method]
    optimize.minimize(trials, start, method=method, bounds=bounds, options=options)


def _scipy() -> Any:
    try:
        from scipy import optimize
    except ImportError as error:
        raise NotFound("Searching weights needs scipy, which is not here: pip install 'loreg[search]'.") from error
    return optimize


def _checked_names(adapters: Sequence[str]) -> tuple[str, ...]:
    names = (adapters,) if isinstance(adapters, str) else tuple(adapters) if isinstance(adapters, Iterable) else ()
    if not isinstance(adapters, Iterable) or not all(isinstance(name, str) for name in names):
        raise UsageError(f"The adapters are {adapters!r}: expected a list of names.")
    for name in names:
        Reference.parse(name)
    if not names or len(set(names)) != len(names):
        raise UsageError(f"The adapters are {', '.join(names) or 'none'}: expected at least one, each once.")
    return names


def _checked_bounds(bounds: tuple[float, float]) -> tuple[float, float]:
    ends = [_finite(end) for end in bounds] if isinstance(bounds, Iterable) else []
    low, high = ends if len(ends) == 2 else (None, None)
    if low is None or high is None or low >= high:
        raise UsageError(f"The bounds of the weights are {bounds}: expected two finite numbers, the lower first.")
    return low, high


def _checked_start(start: Mapping[str, float] | None, names: Sequence[str]) -> list[float]:
    """The weights to begin with, in the order of ``names``."""
    if start is not None and not isinstance(start, Mapping):
        raise UsageError(f"start is {start!r}: expected a map from adapters to weights.")
    if strangers := [name for name in start or () if name not in names]:
        raise UsageError(f"start has a weight for {strangers[0]!r}, which is not one of the adapters.")
    weights = {name: _finite((start or {}).get(name, 0.0)) for name in names}
    for name, weight in weights.items():
        if weight is None:
            raise UsageError(f"start has the weight {(start or {})[name]!r} for {name!r}: expected a finite number.")
    return [weight for weight in weights.values() if weight is not None]


def _check_functions(score: object, watch: object) -> None:
    for what, function in (("score", score), ("watch", watch)):
        if not callable(function) and (function is not None or what == "score"):
            raise UsageError(f"{what} is {function!r}: expected a function that can be called.")


def _check_options(budget: int, digits: int, regularisation: float, seed: int, goal: str, method: str) -> None:
    penalty = _finite(regularisation)
    if not (_is_whole(budget) and budget >= 1 and _is_whole(digits) and 0 <= digits <= 15) or (
        penalty is None or penalty < 0
    ):
        raise UsageError(
            f"budget {budget!r}, digits {digits!r} or regularisation {regularisation!r} is out of range: expected a "
            "whole number of at least 1, one from 0 to 15, and a finite number of at least 0."
        )
    if not _is_whole(seed):
        raise UsageError(f"seed is {seed!r}: expected a whole number.")
    if goal not in ("lowest", "highest") or method not in METHODS:
        raise UsageError(
            f"goal {goal!r} or method {method!r} is unknown: expected 'lowest' or 'highest', and one of "
            f"{', '.join(METHODS)}."
        )


def _is_whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)  # NumPy's integers too


def _finite(value: object) -> float | None:
    """A number as a double, NumPy's too; None for anything else, and for what no double can be."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    try:
        number = float(value)
    except OverflowError:  # an integer of hundreds of digits
        return None
    return number if math.isfinite(number) else None
