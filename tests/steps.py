"""The steps by which the weights of a live model are changed: small ones, and errors at them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from loreg.algebra import changing, native
from loreg.algebra.edits import Prepared


def make_small(patch: pytest.MonkeyPatch) -> None:
    """Several of each tensor, whichever way they are computed, so that a change can fail in the middle of one."""
    patch.setattr(changing, "_TILE_BYTES", {"cpu": 48, "cuda": 48})
    patch.setattr(changing, "_CALL_ELEMENTS", 24)
    patch.setattr(native, "_AT_ONCE", 8)


@contextmanager
def watched(before: Callable[[int], None]) -> Iterator[list[int]]:
    """``before`` is called with the number of each step, which has changed nothing yet. How many there were."""
    tile, change, steps = Prepared.tile, native.Change, [0]

    def of(real: Callable[..., Any]) -> Callable[..., Any]:
        def step(*given: Any) -> Any:
            steps[0] += 1
            before(steps[0])
            return real(*given)

        return step

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Prepared, "tile", of(tile))
        patch.setattr(native, "Change", of(change))
        yield steps


@contextmanager
def failing(error: BaseException, at: Callable[[int], bool]) -> Iterator[list[int]]:
    """At those steps."""

    def before(step: int) -> None:
        if at(step):
            raise error

    with watched(before) as steps:
        yield steps
