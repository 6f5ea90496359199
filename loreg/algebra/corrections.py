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

_BLOCK = 2**16


@dataclass(frozen=True, slots=True, eq=False)
class Corrections:
    """What has to be added, in storage values (``rounding.ordered``), to W' less the delta, correctly rounded, to get
    W, where it is not 0. On W's device.

    ``by`` (int8) at the places ``index`` of W's elements in a row, each once and in no order (int32 where W has fewer
    than 2³¹, else int64); and beyond a byte ``wide`` (int64) at ``wide_index`` (int64).
    """

    index: Tensor
    by: Tensor
    wide_index: Tensor
    wide: Tensor

    @classmethod
    def of(cls, residual: Tensor, outcome: Outcome) -> Corrections:
        """From the residual of a tile (int8, 1-D, contiguous, any device), which is used up, and the outcome that
        belongs to it."""
        wide_index, wide = outcome.index.to(residual.device), outcome.wide.to(residual.device)
        residual[wide_index] = 0
        if residual.device.type != "cpu":
            index = residual.nonzero()[:, 0]
            return cls.at(index, residual.index_select(0, index), wide_index, wide, len(residual))
        counts, offsets, by = native.sparse(residual, _BLOCK)
        kind = torch.int32 if len(residual) < 2**31 else torch.int64
        blocks = torch.arange(0, len(residual), _BLOCK, dtype=kind)
        index = torch.repeat_interleave(blocks, counts, output_size=len(offsets)).add_(offsets.to(kind))
        return cls(index, by.clone(), wide_index, wide)  # a new tensor, of no more than there is

    @classmethod
    def at(cls, index: Tensor, by: Tensor, wide_index: Tensor, wide: Tensor, size: int) -> Corrections:
        """``index`` of any dtype, of a W of ``size`` elements."""
        return cls(index.int() if size < 2**31 else index.long(), by, wide_index, wide)

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in (self.index, self.by, self.wide_index, self.wide))

    def to(self, device: torch.device) -> Corrections:
        """The same on another device."""
        return Corrections(*(x.to(device) for x in (self.index, self.by, self.wide_index, self.wide)))

    @torch.no_grad()
    def add_to(self, predicted: Tensor) -> None:
        """W in the place of what was predicted for it (1-D, contiguous, on the device of these), all or nothing.
        Waits for no device."""
        words, found = bits(predicted), list[tuple[Tensor, Tensor]]()
        # Not by [index], which takes three times as long. And nothing is written before all that allocates.
        for index, by in ((self.index, self.by), (self.wide_index, self.wide)):
            if len(index):
                values = ordered(words.index_select(0, index).view(predicted.dtype)).add_(by)
                found.append((index.long(), bits(from_ordered(values, predicted.dtype))))
        for index, word in found:
            words.scatter_(0, index, word)
