"""Edits of many weights that are in memory, such as those of a model that runs, started at once and settled later.

On a GPU with Triton, ``gpu`` computes: nothing waits until :meth:`Launched.done`. Elsewhere the same is computed at
once, by the passes of ``edits``. Either gives the bytes that the definition has.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loreg.algebra import gpu
from loreg.algebra.edits import Prepared, Stacked
from loreg.algebra.passes import UNSURE, Outcome, as_rows
from loreg.algebra.rounding import from_ordered, ordered


@dataclass(frozen=True, slots=True, eq=False)
class Undo:
    """What has to be added, in storage values, to W' less the delta, correctly rounded, to get W, where it is not 0.
    On the weight's device.

    ``value`` (int8) at the places ``index`` of the weight's elements in a row, each once and in no order (int32 where
    the weight has fewer than 2³¹, else int64); and beyond a byte ``wide`` (int64) at ``wide_index`` (int64).
    """

    index: Tensor
    value: Tensor
    wide_index: Tensor
    wide: Tensor

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in (self.index, self.value, self.wide_index, self.wide))

    @torch.no_grad()
    def restore(self, weight: Tensor) -> None:
        """Makes W of W' less the delta, correctly rounded: ``weight`` (contiguous), in place. Waits for nothing."""
        flat = weight.view(-1)
        for index, value in ((self.index, self.value), (self.wide_index, self.wide)):
            if len(index):
                flat[index] = from_ordered(ordered(flat[index]) + value, weight.dtype)


@dataclass(frozen=True, slots=True, eq=False)
class Work:
    """``W`` of the shape, dtype and device that ``prepared`` is for, into ``out``, which may be ``W`` itself."""

    prepared: Prepared | Stacked
    W: Tensor
    out: Tensor


@dataclass(frozen=True, slots=True)
class _Piece:
    """One matrix of some work, whose first element is the ``start``-th there."""

    prepared: Prepared
    W: Tensor
    out: Tensor
    start: int


class Launched:
    """What :func:`launch` has started. Keeps the tensors alive until it is done."""

    def __init__(self, works: Sequence[Work], residual: bool) -> None:
        self._works, self._residual = works, residual
        self._here = [_at_once(work, residual) for work in works if not _launchable(work)]
        self._pieces = [list(_pieces(work)) if _launchable(work) else None for work in works]
        jobs = [
            gpu.Job(fused, piece.W, piece.out)
            for pieces in self._pieces
            for piece in pieces or ()
            if (fused := piece.prepared.on_gpu) is not None
        ]
        self._there = gpu.Launched(jobs, residual)

    @torch.no_grad()
    def done(self) -> list[Undo | None]:
        """Waits for the device, decides what is in doubt, and returns for each work what undoes it, or None.

        Only then are the outputs what they are to be. Raises BadInput, naming the element, if W holds NaN or infinity
        or a result exceeds the largest finite value; outputs are then partly written.
        """
        opened = iter(self._there.opened())
        undone = iter(self._there.undone() if self._residual else ())
        here, found = iter(self._here), list[Undo | None]()
        for work, pieces in zip(self._works, self._pieces, strict=True):
            if pieces is None:
                found.append(next(here))
                continue
            parts = list[tuple[Tensor, Tensor, Tensor, Tensor]]()
            for piece in pieces:
                open_ = next(opened)
                if not self._residual:
                    piece.prepared.decide(open_.found, None, 0, piece.out)
                    continue
                known, unsure = next(undone), open_.unsure
                by = piece.prepared.decide(open_.found, unsure, 0, piece.out)
                places = unsure.rows * piece.W.shape[1] + unsure.columns
                fits = by.abs() < -UNSURE
                late = fits & (by != 0)
                index = torch.cat([known.places, places[late]]) + piece.start
                value = torch.cat([known.value, by[late].to(torch.int8)])
                parts.append((index, value, places[~fits] + piece.start, by[~fits]))
            found.append(_undo(work.W, *map(torch.cat, zip(*parts, strict=True))) if self._residual else None)
        return found


def launch(works: Sequence[Work], *, residual: bool = False) -> Launched:
    """Starts all ``works``, each prepared with that ``residual``; on a GPU without waiting for it.

    No two of them may share memory. Until :meth:`Launched.done` has returned, outputs are not to be read, nor W
    changed.
    """
    return Launched(works, residual)


def _launchable(work: Work) -> bool:
    """Whether the kernels can do it."""
    rows = _is_by_rows(work.W) and _is_by_rows(work.out)
    if isinstance(work.prepared, Stacked):
        return rows and bool(work.W.numel()) and work.prepared.on_gpu
    return rows and work.prepared.on_gpu is not None


def _is_by_rows(x: Tensor) -> bool:
    return x.stride(-1) == 1 or x.shape[-1] == 1


def _pieces(work: Work) -> Iterator[_Piece]:
    if isinstance(work.prepared, Stacked):
        size = work.W[0].numel()
        for index, prepared in enumerate(work.prepared.matrices()):
            yield _Piece(prepared, work.W[index], work.out[index], index * size)
    else:
        work.prepared.check(work.W, 0, work.out)
        yield _Piece(work.prepared, as_rows(work.W), as_rows(work.out), 0)


def _at_once(work: Work, residual: bool) -> Undo | None:
    rows = (-1, work.W.shape[-1]) if work.W.ndim == 3 else work.W.shape
    out = work.out if work.out.is_contiguous() else torch.empty_like(work.out, memory_format=torch.contiguous_format)
    small = torch.empty(work.W.shape, dtype=torch.int8, device=work.W.device) if residual else None
    outcome: Outcome = work.prepared.tile(
        work.W.reshape(rows), 0, out.view(rows), None if small is None else small.view(rows)
    )
    if out is not work.out:
        work.out.copy_(out)
    if small is None:
        return None
    flat = small.view(-1)
    flat[outcome.index] = 0
    index = flat.nonzero()[:, 0]
    return _undo(work.W, index, flat[index], outcome.index, outcome.wide)


def _undo(W: Tensor, index: Tensor, value: Tensor, wide_index: Tensor, wide: Tensor) -> Undo:
    return Undo(index.int() if W.numel() < 2**31 else index, value, wide_index, wide)
