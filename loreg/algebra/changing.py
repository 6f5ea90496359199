"""Rows of a weight, changed where they lie: what one edit did is taken out of them, and another one applied.

What is read of W is taken back in the cache to what was there before, and made from that what is to be: W is read
once and written once. Where the edits are compiled ones that is one call for many rows (``native.change``). Else, and
where one rounding leaves an element in doubt, it is a tile, computed beside W and copied onto it when it is right.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from math import prod
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from loreg.algebra import native
from loreg.algebra.corrections import Corrections
from loreg.algebra.edits import Prepared, Stacked
from loreg.algebra.rounding import Workspace

Kept: TypeAlias = Corrections | Tensor
"""What undoes an edit of some rows: what the prediction misses, or the rows themselves."""

_TILE_BYTES = {"cpu": 2 << 20, "cuda": 32 << 20}
"""Of a weight, worked on at once: few steps, and on a CPU what is computed is still in cache when it is copied."""
_CALL_ELEMENTS = 2**24
"""Of a weight, changed by one call: there is to be memory for what undoes them."""


class Space(threading.local):
    """What a thread computes in: ``second``, where an edit goes on from what another has made of a tile."""

    def __init__(self) -> None:
        self.first, self.second = Workspace(), Workspace()


class Step(NamedTuple):
    """How many rows were changed, what undoes that, and what is left of ``kept`` for the rows that follow."""

    rows: int
    fresh: Kept | None
    rest: Kept | None


def step_of(rows: Tensor) -> int:
    """How many of them are a tile."""
    return max(1, _TILE_BYTES[rows.device.type] // max(1, prod(rows.shape[1:]) * rows.itemsize))


class Changing:
    """From what ``back`` takes back to what ``forth`` gives; None: nothing is taken back, or nothing applied.

    Both are of one weight, in ``space`` for one thread; ``forth`` is prepared for residuals.
    """

    def __init__(self, back: Prepared | Stacked | None, forth: Prepared | Stacked | None, space: Space) -> None:
        self._back, self._forth, self._space = back, forth, space

    def rows(self, W: Tensor, first: int, kept: Kept | None) -> Iterator[Step]:
        """Changes ``W``, contiguous, which is the weight's rows (a vector's elements) from the ``first`` on.

        ``kept`` undoes what was done in them before; None: nothing was. Yields each time that rows are changed:
        whatever is raised, those that follow are as they were. Raises what ``Prepared.tile`` does.
        """
        while len(W):
            step = self._called(W, first, kept)
            if step is not None:
                yield step
                self._part_with(step.fresh)
            else:
                step = self._tiled(W, first, kept)
                yield step
            W, first, kept = W[step.rows :], first + step.rows, step.rest

    def _called(self, W: Tensor, first: int, kept: Kept | None) -> Step | None:
        """None where that is not possible for the first of these rows."""
        if W.device.type != "cpu" or W.ndim != 2 or not W.numel() or isinstance(kept, Tensor):
            return None
        W = W[: max(1, _CALL_ELEMENTS // W.shape[1])]
        ends = list[native.End | None]()
        for edit in (None if kept is None else self._back, self._forth):
            end = None if edit is None else edit.compiled(first)
            if end is None and edit is not None:
                return None
            W = W if end is None else W[: end.rows]
            ends.append(end)
        if not W.is_inference():
            torch.autograd.graph.increment_version(W)  # what torch does not do, it does not count
        old, start = ((), 0) if kept is None else (kept.tensors, kept.start)
        found = native.change(W, ends[0], old, start, ends[1], self._space.second)
        if not found.rows:
            return None
        rest = None if kept is None else kept.after(found.rows * W.shape[1], *found.used)
        return Step(found.rows, Corrections(*found.fresh) if self._forth else None, rest)

    def _part_with(self, fresh: Kept | None) -> None:
        """From the workspace, in which it is."""
        try:
            if isinstance(fresh, Corrections):
                fresh.move_out()
        except BaseException:
            self._space.second = Workspace()  # what was there belongs to those now
            raise

    def _tiled(self, W: Tensor, first: int, kept: Kept | None) -> Step:
        W, rest = W[: step_of(W)], None
        if kept is not None:
            kept, rest = _divided(kept, W.numel())
        space, base = self._space, W
        if isinstance(kept, Tensor):
            base = kept.view(W.shape)
        elif kept is not None:
            assert self._back is not None
            base = space.first.take("out", W.numel(), W.dtype, W.device).view(W.shape)
            self._back.tile(W, first, base)
            kept.to(W.device).add_to(base.view(-1))
        if self._forth is None:
            W.copy_(base)
            return Step(len(W), None, rest)
        out = space.second.take("out", W.numel(), W.dtype, W.device).view(W.shape)
        small = space.second.take("residual", W.numel(), torch.int8, W.device)
        fresh: Kept = Corrections.of(small, self._forth.tile(base, first, out, small.view(W.shape)))
        if fresh.nbytes >= W.nbytes:
            fresh = base.clone()
        W.copy_(out)
        return Step(len(W), fresh, rest)


def _divided(kept: Kept, elements: int) -> tuple[Kept, Kept]:
    """Of the first ``elements``, and of the rest."""
    if isinstance(kept, Tensor):
        flat = kept.view(-1)
        return flat[:elements], flat[elements:]
    return kept.before(elements), kept.after(elements)
