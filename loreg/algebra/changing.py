"""Rows of a weight, changed where they lie: what one edit did is taken out of them, and another one applied.

What is read of W is taken back in the cache to what was there before, and made from that what is to be: W is read
once and written once. Where the edits are compiled ones that is one call for many rows (``native.Change``). Else, and
where one rounding leaves an element in doubt, it is a tile, computed beside W and copied onto it when it is right.
"""

from __future__ import annotations

import threading
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
    """How many rows were changed, what undoes that, and what is left of ``kept`` for the rows that follow.
    ``borrowed``: what undoes it is in the workspace."""

    rows: int
    fresh: Kept | None
    rest: Kept | None
    borrowed: bool = False


def step_of(rows: Tensor) -> int:
    """How many of them are a tile."""
    return max(1, _TILE_BYTES[rows.device.type] // max(1, prod(rows.shape[1:]) * rows.itemsize))


class Changing:
    """From what ``back`` takes back to what ``forth`` gives; None: nothing is taken back, or nothing applied.

    Both are of one weight, in ``space`` for one thread; ``forth`` is prepared for residuals. ``torn``: rows were
    changed, and what undoes that may be recorded nowhere.
    """

    def __init__(self, back: Prepared | Stacked | None, forth: Prepared | Stacked | None, space: Space) -> None:
        self._back, self._forth, self._space = back, forth, space
        self.torn = False

    def step(self, W: Tensor, first: int, kept: Kept | None) -> Step:
        """Changes the first rows of ``W``, which is the weight's rows (a vector's elements) from the ``first`` on, at
        least one; ``kept`` undoes what was done in them before; None: nothing was.

        ``recorded`` is to be called once what this returns is. Whatever is raised, W is as it was, unless ``torn``.
        Raises what ``Prepared.tile`` does.
        """
        if isinstance(kept, Corrections):
            kept = kept.to(W.device)
        return self._called(W, first, kept) or self._tiled(W, first, kept)

    def recorded(self, step: Step) -> None:
        """What undoes it leaves the workspace, where the next step computes."""
        self.torn = False
        try:
            if step.borrowed and isinstance(step.fresh, Corrections):
                step.fresh.move_out()
        except BaseException:
            self._space.second = Workspace()  # what was there belongs to those now
            raise

    def _called(self, W: Tensor, first: int, kept: Kept | None) -> Step | None:
        """None where that is not possible for the first of these rows."""
        if isinstance(kept, Tensor) or not _is_callable(W, kept):
            return None
        W = W[: max(1, _CALL_ELEMENTS // W.shape[1])]
        ends = list[native.End | None]()
        for edit in (None if kept is None else self._back, self._forth):
            end = None if edit is None else edit.compiled(first)
            if end is None and edit is not None:
                return None
            W = W if end is None else W[: end.rows]
            ends.append(end)
        old, start = ((), 0) if kept is None else (kept.tensors, kept.start)
        change = native.Change(W, ends[0], old, start, ends[1], self._space.second)
        if not W.is_inference():
            torch.autograd.graph.increment_version(W)  # what torch does not do, it does not count
        self.torn = True
        rows = change.run()
        if not rows:
            self.torn = False
            return None
        rest = None if kept is None else kept.after(rows * W.shape[1], *change.used)
        return Step(rows, Corrections(*change.fresh) if self._forth else None, rest, borrowed=True)

    def _tiled(self, W: Tensor, first: int, kept: Kept | None) -> Step:
        height, W, rest = len(W), W[: step_of(W)], None
        if kept is not None and len(W) < height:
            kept, rest = _divided(kept, W.numel())
        space, base = self._space, W
        if isinstance(kept, Tensor):
            base = kept.view(W.shape)
        elif kept is not None:
            assert self._back is not None
            base = space.first.take("out", W.numel(), W.dtype, W.device).view(W.shape)
            self._back.tile(W, first, base)
            kept.add_to(base.view(-1))
        if self._forth is None:
            self.torn = True
            W.copy_(base)
            return Step(len(W), None, rest)
        out = space.second.take("out", W.numel(), W.dtype, W.device).view(W.shape)
        small = space.second.take("residual", W.numel(), torch.int8, W.device)
        fresh: Kept = Corrections.of(small, self._forth.tile(base, first, out, small.view(W.shape)))
        if fresh.nbytes >= W.nbytes:
            fresh = base.clone()
        self.torn = True
        W.copy_(out)
        return Step(len(W), fresh, rest)


def _is_callable(W: Tensor, kept: Corrections | None) -> bool:
    plain = W.device.type == "cpu" and W.ndim == 2 and W.is_contiguous() and 0 < W.shape[1] < 2**31 - 1
    return plain and (kept is None or kept.index.dtype == torch.int32)


def _divided(kept: Kept, elements: int) -> tuple[Kept, Kept]:
    """Of the first ``elements``, and of the rest."""
    if isinstance(kept, Tensor):
        flat = kept.view(-1)
        return flat[:elements], flat[elements:]
    return kept.before(elements), kept.after(elements)
