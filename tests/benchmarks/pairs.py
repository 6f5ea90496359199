"""Running two things alternately, and what it took."""

from __future__ import annotations

import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass


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


def command(arguments: list[str], **options: object) -> Callable[[], float]:
    """Times a command from start to end."""

    def work() -> float:
        return seconds_of(
            lambda: subprocess.run(
                arguments, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **options
            )  # type: ignore[call-overload]
        )

    return work


def row(name: str, ours: Timing, theirs: Timing | None, other: str, goal: str) -> str:
    ratio = f"{ours.median / theirs.median:.2f} ×" if theirs else ""
    return f"| {name} | {ours} | {other} {theirs or ''} | {ratio} | {goal} |"
