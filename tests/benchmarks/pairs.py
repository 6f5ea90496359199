"""Running things alternately, and what they took; rows of a table of that."""

from __future__ import annotations

import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


class Unmeasured(Exception):
    """Says why there is no figure: no room, no such device, a command that fails."""


@dataclass(frozen=True)
class Timing:
    """Seconds of wall time of several runs."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def __str__(self) -> str:
        low, high = min(self.seconds), max(self.seconds)
        return f"{low:.3g} / **{self.median:.3g}** / {high:.3g} s"


@dataclass(frozen=True)
class Run:
    """One run of a process: seconds of the work itself, by its own clock after its imports; ``whole``, of the process
    from start to end; ``told``, what it printed as JSON."""

    seconds: float
    whole: float
    told: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Runs:
    """All runs of one work, or ``reason``, why there are none."""

    runs: tuple[Run, ...]
    reason: str | None = None

    @property
    def work(self) -> Timing:
        return Timing(tuple(run.seconds for run in self.runs))

    @property
    def whole(self) -> Timing:
        return Timing(tuple(run.whole for run in self.runs))

    def told(self, key: str) -> tuple[int, ...]:
        return tuple(run.told[key] for run in self.runs)


@dataclass(frozen=True)
class Row:
    """A line of a table; ``failed`` where it says why there is no figure."""

    cells: tuple[str, ...]
    failed: bool = False

    def __str__(self) -> str:
        return f"| {' | '.join(self.cells)} |"


@dataclass(frozen=True)
class Goal:
    """What a figure is to be at most, or with ``least`` at least."""

    limit: float
    text: str
    least: bool = False

    def judged(self, figure: float, text: str) -> str:
        met = figure >= self.limit if self.least else figure <= self.limit
        return text if met else f"{text} (missed)"


def at_most(limit: float) -> Goal:
    return Goal(limit, f"≤ {limit:.2f} ×")


def faster(limit: float) -> Goal:
    return Goal(limit, f"≥ {limit:g} times faster", least=True)


HEADER = ("| work | ours | against | ratio | goal |", "| --- | --- | --- | --- | --- |")


def compared(
    name: str, ours: Runs, other: str, theirs: Runs, goal: Goal | None = None, *, whole: bool = False
) -> Row:
    """Medians of the work itself, or of ``whole`` processes."""
    text = goal.text if goal else ""
    for runs, what in ((ours, "ours"), (theirs, other)):
        if runs.reason is not None:
            return unmeasured(name, f"{what}: {runs.reason}", text)
    a, b = (ours.whole, theirs.whole) if whole else (ours.work, theirs.work)
    if goal is not None and goal.least:
        ratio = b.median / a.median
        found = goal.judged(ratio, f"{ratio:.3g} times faster")
    else:
        ratio = a.median / b.median
        found = goal.judged(ratio, f"{ratio:.2f} ×") if goal else f"{ratio:.2f} ×"
    return Row((name, str(a), f"{other} {b}", found, text))


def unmeasured(name: str, reason: str, goal: str = "") -> Row:
    plain = " ".join(reason.split()).replace("|", "\\|")
    return Row((name, f"not measured: {plain}", "", "", goal), failed=True)


def row(name: str, ours: Timing, theirs: Timing | None, other: str, goal: str) -> Row:
    ratio = f"{ours.median / theirs.median:.2f} ×" if theirs else ""
    return Row((name, str(ours), f"{other} {theirs or ''}", ratio, goal))


def seconds_of(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def alternately(runs: int, works: Sequence[Callable[[], float]]) -> list[Timing]:
    """Each of ``works`` (which time themselves) ``runs`` times, in turn, so that noise hits all alike."""
    results: list[list[float]] = [[] for _ in works]
    for _ in range(runs):
        for work, result in zip(works, results, strict=True):
            result.append(work())
    return [Timing(tuple(result)) for result in results]


def in_turn(runs: int, works: Sequence[Callable[[], Run]]) -> list[Runs]:
    """``alternately``, of processes: one that fails is not run again, and the others go on."""
    results: list[list[Run]] = [[] for _ in works]
    reasons: dict[int, str] = {}
    for _ in range(runs):
        for index, work in enumerate(works):
            if index in reasons:
                continue
            try:
                results[index].append(work())
            except (Unmeasured, OSError) as error:
                reasons[index] = str(error)
    return [Runs(tuple(result), reasons.get(index)) for index, result in enumerate(results)]


def process(arguments: Sequence[str], **options: Any) -> tuple[float, str]:
    """Seconds of a process from start to end, and what it printed. Raises Unmeasured with the end of what it said."""
    began = time.perf_counter()
    done = subprocess.run(arguments, capture_output=True, text=True, check=False, **options)
    taken = time.perf_counter() - began
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:] or ["nothing"]
        raise Unmeasured(f"{arguments[0].rpartition('/')[2]} ended with {done.returncode} and said: {said[0][:300]}")
    return taken, done.stdout


def command(arguments: list[str], **options: Any) -> Callable[[], float]:
    """Times a command from start to end."""
    return lambda: process(arguments, **options)[0]
