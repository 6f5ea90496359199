"""The undo of an edit in memory: what the prediction of W from W' misses, as places and small integers.

Taking a delta back gives, correctly rounded, W itself but for an element in a hundred or so, which a residual
(``Prepared.tile``) tells. Of those the place takes four bytes and the integer one, on whatever device W is: a copy of
W would be as large as W.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from loreg.algebra import native
from loreg.algebra.passes import Outcome
from loreg.algebra.rounding import bits, from_ordered, ordered


@dataclass(slots=True, eq=False)
class Corrections:
    """What has to be added, in storage values (``rounding.ordered``), to W' less the delta, correctly rounded, to get
    W, where it is not 0. On W's device.

    ``by`` (int8) at the places ``index`` of W's elements in a row, each once (int32 where W has fewer than 2³¹, else
    int64); and beyond a byte ``wide`` (int64) at ``wide_index`` (int64). Places are counted from ``start``, and
    ascend.
    """

    index: Tensor
    by: Tensor
    wide_index: Tensor
    wide: Tensor
    start: int = 0

    @classmethod
    def of(cls, residual: Tensor, outcome: Outcome) -> Corrections:
        """From the residual of a tile (int8, 1-D, contiguous, any device), which is used up, and the outcome that
        belongs to it."""
        wide_index, wide = outcome.index.to(residual.device), outcome.wide.to(residual.device)
        residual[wide_index] = 0
        if _is_compiled(residual):
            return cls(*native.places(residual), wide_index, wide)
        index = residual.nonzero()[:, 0]
        return cls.at(index, residual.index_select(0, index), wide_index, wide, len(residual))

    @classmethod
    def at(cls, index: Tensor, by: Tensor, wide_index: Tensor, wide: Tensor, size: int) -> Corrections:
        """``index`` of any dtype, of a W of ``size`` elements."""
        return cls(index.int() if size < 2**31 else index.long(), by, wide_index, wide)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.index, self.by, self.wide_index, self.wide

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self.tensors)

    def to(self, device: torch.device) -> Corrections:
        """The same on another device."""
        if self.index.device == device:
            return self
        index, by, wide_index, wide = (x.to(device) for x in self.tensors)
        return Corrections(index, by, wide_index, wide, self.start)

    def before(self, elements: int) -> Corrections:
        """Of the first ``elements`` of these. Shares their memory."""
        near, far = self._below(elements)
        return Corrections(self.index[:near], self.by[:near], self.wide_index[:far], self.wide[:far], self.start)

    def after(self, elements: int, near: int | None = None, far: int | None = None) -> Corrections:
        """Of all but the first ``elements``, to which ``near`` and ``far`` belong. Shares their memory."""
        if near is None or far is None:
            near, far = self._below(elements)
        rest = self.index[near:], self.by[near:], self.wide_index[far:], self.wide[far:]
        return Corrections(*rest, self.start + elements)

    def move_out(self) -> None:
        """Has memory of its own from now on: all of them, or none."""
        self.index, self.by, self.wide_index, self.wide = [x.clone() for x in self.tensors]

    def _below(self, elements: int) -> tuple[int, int]:
        end = self.start + elements
        return int(torch.searchsorted(self.index, end)), int(torch.searchsorted(self.wide_index, end))

    @torch.no_grad()
    def add_to(self, predicted: Tensor) -> None:
        """W in the place of what was predicted for it (1-D, contiguous, on the device of these), all or nothing.
        Waits for no device."""
        words, both = bits(predicted), ((self.index, self.by), (self.wide_index, self.wide))
        if predicted.itemsize in (2, 4) and self.index.dtype == torch.int32 and _is_compiled(words):
            for index, by in both:
                native.move(words, index, by, self.start)
            return
        found = list[tuple[Tensor, Tensor]]()
        # Not by [index], which takes three times as long. And nothing is written before all that allocates.
        for index, by in both:
            if len(index):
                index = index - self.start if self.start else index
                values = ordered(words.index_select(0, index).view(predicted.dtype)).add_(by)
                found.append((index.long(), bits(from_ordered(values, predicted.dtype))))
        for index, word in found:
            words.scatter_(0, index, word)


def _is_compiled(x: Tensor) -> bool:
    return native.library is not None and x.device.type == "cpu" and len(x) < 2**31
