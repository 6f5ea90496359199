"""The undo of an edit in memory: what the prediction of W from W' misses, as places and small integers.

Taking a delta back gives, correctly rounded, W itself but for an element in a hundred or so, which a residual
(``Prepared.tile``) tells. Of those the place within a block of 2¹⁶ elements takes two bytes and the integer one, on
whatever device W is: a copy of W would be as large as W.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from loreg.algebra import native
from loreg.algebra.passes import UNSURE, Outcome
from loreg.algebra.rounding import bits, from_ordered, ordered

_BLOCK = 2**16


@dataclass(frozen=True, slots=True, eq=False)
class Corrections:
    """What has to be added to predicted storage values, in the order of ``rounding.ordered``, to get W.

    ``counts`` (int64): how many there are in each block of 2¹⁶ elements. ``places`` (int16): of each within its
    block, less 2¹⁵; ``by`` (int8); ``wide`` (int64): of those with UNSURE in ``by``, in their order. On W's device.
    """

    counts: Tensor
    places: Tensor
    by: Tensor
    wide: Tensor

    @classmethod
    def of(cls, residual: Tensor, outcome: Outcome) -> Corrections:
        """From the residual of a tile (int8, 1-D, contiguous, any device) and the outcome that belongs to it."""
        if residual.device.type == "cpu":
            counts, offsets, by = native.sparse(residual, _BLOCK)
            places = offsets.view(torch.int16) ^ -(_BLOCK // 2)  # a new tensor, of no more than there is
            return cls(counts, places, by.clone(), outcome.wide)
        index = residual.nonzero()[:, 0]
        counts = torch.bincount(index >> 16, minlength=-(-len(residual) // _BLOCK))
        places = ((index & (_BLOCK - 1)) - _BLOCK // 2).to(torch.int16)
        return cls(counts, places, residual.index_select(0, index), outcome.wide.to(residual.device))

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in (self.counts, self.places, self.by, self.wide))

    def to(self, device: torch.device) -> Corrections:
        """The same on another device."""
        return Corrections(*(x.to(device) for x in (self.counts, self.places, self.by, self.wide)))

    def add_to(self, predicted: Tensor) -> None:
        """W in the place of what was predicted for it (1-D, contiguous, on the device of these)."""
        blocks = torch.arange(len(self.counts), device=self.counts.device) << 16
        index = torch.repeat_interleave(blocks, self.counts, output_size=len(self.places))
        index += self.places.long() + _BLOCK // 2
        by = self.by.long()
        # Not by [index], which takes three times as long.
        if len(self.wide):
            by[by == UNSURE] = self.wide
        words = bits(predicted)
        values = from_ordered(ordered(words.index_select(0, index).view(predicted.dtype)) + by, predicted.dtype)
        words.scatter_(0, index, bits(values))
