"""The first stage of an edit: float64 sums of some rows, each rounded once, and which of them are in doubt.

Here by torch's operations, on any device; ``native`` does the same in one pass where it was compiled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from loreg.algebra.delta import LowRank
from loreg.algebra.rounding import Screen, Workspace, ordered, widen

UNSURE = -128
"""In a residual: to be decided exactly, or beyond a byte."""


def _none() -> Tensor:
    return torch.empty(0, dtype=torch.int64)


class Candidates(NamedTuple):
    """Elements in doubt: where they are in the weight, their float64 approximations, and W's values there.

    Of those in doubt of a residual the approximation is that of the delta, W' - W before rounding.
    """

    rows: Tensor
    columns: Tensor
    near: Tensor
    W: Tensor

    @classmethod
    def all(cls, found: Sequence[Candidates]) -> Candidates:
        return cls(*map(torch.cat, zip(*found, strict=True))) if len(found) > 1 else found[0]


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of a tile: how many elements one rounding left in ``doubt``; and corrections (int64) that do not fit into the
    residual's bytes, at the places ``index`` (int64) of the tile's elements in a row, ascending once ``in_order``."""

    doubt: int = 0
    index: Tensor = field(default_factory=_none)
    wide: Tensor = field(default_factory=_none)

    def __add__(self, other: Outcome) -> Outcome:
        """Of this and other elements, whose places are counted from the same one."""
        if not len(other.index):
            return Outcome(self.doubt + other.doubt, self.index, self.wide)
        both = ((self.index, other.index), (self.wide, other.wide))
        return Outcome(self.doubt + other.doubt, *(torch.cat([x.to(y.device), y]) for x, y in both))

    def moved(self, by: int) -> Outcome:
        """As it is for a tile that begins ``by`` elements earlier."""
        return Outcome(self.doubt, self.index + by, self.wide) if by else self

    def in_order(self) -> Outcome:
        if len(self.index) < 2:
            return self
        order = self.index.argsort()
        return Outcome(self.doubt, self.index[order], self.wide[order])


class Done(NamedTuple):
    """What a pass did: how many rows, what of them is in doubt, and what of their residual; that is None without.

    ``known``: corrections that a byte has no room for, from the first of these rows on; its ``doubt`` says nothing.
    """

    rows: int
    found: Candidates
    unsure: Candidates | None
    known: Outcome = Outcome()


class Blocks:
    """W + left·right + Σ d·X, ``block`` rows at a time; ``left`` (m, R), ``right`` (R, n): float64; X (m, n).

    ``screens``: for what is rounded, and for what taking back the delta gives, if residuals will be asked for. For
    one thread, with the workspaces of the screens and ``workspace``.
    """

    def __init__(
        self,
        left: Tensor,
        right: Tensor,
        dense: Sequence[tuple[float, Tensor]],
        block: int,
        screens: Sequence[Screen],
        workspace: Workspace,
    ) -> None:
        self._left, self._right, self._dense, self._block = left, right, dense, block
        self._screen, self._back = screens[0], screens[-1]
        size = block * right.shape[1]
        carried = self._screen.carried
        is_wide = carried.dtype == torch.float64
        self._acc = carried if is_wide else workspace.take("sum", size, torch.float64, carried.device)

    def rows(self, W: Tensor, first: int, out: Tensor, residual: Tensor | None = None) -> Done:
        """Rows of the weight from ``first`` on into ``out``, which may be ``W``.

        ``residual`` (int8, as W): takes ``ordered(W) - ordered(P)``, P being W' less the delta, rounded to W's dtype;
        UNSURE where that is beyond a byte or in doubt.
        """
        W, out = W[: self._block], out[: self._block]
        span = slice(first, first + len(W))
        acc = self._acc[: W.numel()].view(W.shape)
        widen(W, acc)
        if len(self._right):
            acc.addmm_(self._left[span], self._right)
        for scale, value in self._dense:
            acc.add_(addable(value[span]), alpha=scale)
        self._screen.carry(acc)
        index = self._screen.candidates(W.numel())
        found = self._candidates(index, first, acc, W)  # W's own values are taken here, as out may be W
        were = W.clone() if residual is not None else W
        self._screen.store(acc, out)
        if residual is None:
            return Done(len(W), found, None)
        return Done(len(W), found, self._look_back(acc, were, out, first, index, residual[: len(W)]))

    def _look_back(
        self, acc: Tensor, were: Tensor, out: Tensor, first: int, in_doubt: Tensor, residual: Tensor
    ) -> Candidates:
        """Fills ``residual``; what of it is unsure. ``acc`` may be the screen's own, so its delta is taken first."""
        delta = acc.sub(were.double())
        near = out.double().sub_(delta)
        self._back.carry(near)
        index = self._back.candidates(were.numel())
        predicted = torch.empty_like(were)
        self._back.store(near, predicted)
        by = ordered(were).sub_(ordered(predicted))
        by[(by > 127) | (by < -127)] = UNSURE
        residual.copy_(by)
        flat = residual.view(-1)
        flat[index] = flat[in_doubt] = UNSURE
        return self._candidates((flat == UNSURE).nonzero()[:, 0], first, delta, were)

    def _candidates(self, index: Tensor, first: int, near: Tensor, W: Tensor) -> Candidates:
        rows, columns = index // W.shape[1], index % W.shape[1]
        return Candidates(rows + first, columns, near[rows, columns], W[rows, columns])


def as_rows(x: Tensor) -> Tensor:
    """A vector as a matrix of one column, so that both are cut by rows."""
    return x[:, None] if x.ndim == 1 else x


def addable(x: Tensor) -> Tensor:
    """The same values in a dtype that torch can add and compare, which it cannot in float8."""
    return x.float() if x.dtype.itemsize == 1 else x


def lefts(terms: Sequence[LowRank], rows: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """The lefts times their scales side by side, (rows, R), rounded to float64; and what that lost, None for nothing.

    A scale in two parts of 24 and 29 bits gives products with float32 that are exact, and their sum is a two-sum. Of
    a left that is float64 itself what is lost is not known here.
    """
    lefts = [torch.empty(rows, 0, dtype=torch.float64, device=device)]
    lost = list(lefts)
    for term in terms:
        left = term.left.double()
        lefts.append(term.scale * left)
        high = float(torch.tensor(term.scale, dtype=torch.float32))
        low = term.scale - high
        lost.append(low * left - (lefts[-1] - high * left) if low else torch.zeros(()).expand_as(left))
    exact = all(not part.any() for part in lost if part.stride() != (0, 0))
    return torch.cat(lefts, dim=1), None if exact else torch.cat(lost, dim=1).double()


def rights(terms: Sequence[LowRank], columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The rights one below the other, (R, columns), exactly, in ``dtype``."""
    return torch.cat([torch.empty(0, columns, dtype=dtype, device=device), *(term.right.to(dtype) for term in terms)])
