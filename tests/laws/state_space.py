"""Every state that a machine can come to, nearest first."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

S = TypeVar("S")


def explore(begin: S, steps: Callable[[S], Iterable[S]], safe: Callable[[S], bool]) -> tuple[int, list[S]]:
    """How many states there are, and the way to the first that is not safe, empty where all are."""
    came = {begin: begin}
    edge = [begin]
    while edge:
        following = []
        for state in edge:
            for after in steps(state):
                if after in came:
                    continue
                came[after] = state
                if not safe(after):
                    way = [after]
                    while way[-1] != begin:
                        way.append(came[way[-1]])
                    return len(came), way[::-1]
                following.append(after)
        edge = following
    return len(came), []
