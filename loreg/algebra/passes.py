"""The first stage of an edit: float64 sums of some rows, each rounded once, and which of them are in doubt.

Here by torch's operations, on any device; ``native`` does the same in one pass where it was compiled.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from loreg.algebra.rounding import Screen, Workspace, widen


class Candidates(NamedTuple):
    """Elements in doubt: where they are in the weight, their float64 approximations, and W's values there."""

    rows: Tensor
    columns: Tensor
    near: Tensor
    W: Tensor


class Blocks:
    """W + left·right + Σ d·X, ``block`` rows at a time; ``left`` (m, R), ``right`` (R, n): float64; X (m, n).

    For one thread, with the workspaces of ``screen`` and ``workspace``.
    """

    def __init__(
        self,
        left: Tensor,
        right: Tensor,
        dense: Sequence[tuple[float, Tensor]],
        block: int,
        screen: Screen,
        workspace: Workspace,
    ) -> None:
        self._left, self._right, self._dense, self._block, self._screen = left, right, dense, block, screen
        size = block * right.shape[1]
        carried = screen.carried
        is_wide = carried.dtype == torch.float64
        self._acc = carried if is_wide else workspace.take("sum", size, torch.float64, carried.device)

    def rows(self, W: Tensor, first: int, out: Tensor) -> tuple[int, Candidates]:
        """Rows of the weight from ``first`` on into ``out``, which may be ``W``: how many were done, and what of them
        is in doubt."""
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
        rows, columns = index // W.shape[1], index % W.shape[1]
        # W's own values are taken here, as out may be W.
        found = Candidates(rows + first, columns, acc[rows, columns], W[rows, columns])
        self._screen.store(acc, out)
        return len(W), found


def addable(x: Tensor) -> Tensor:
    """The same values in a dtype that torch can add and compare, which it cannot in float8."""
    return x.float() if x.dtype.itemsize == 1 else x
