"""What undoes an edit on a GPU, in the form in which a kernel writes it and the next one finds it again.

Of a tile there is a bit for each word that has a residual, and for each of these, in their order, an integer of 32
bits: eight residuals of four. So a word's place is the tile's first one and the bits before its own, and taking an
edit back reads no more than these. Flat places, which would be found by sorting them, take as long as the pass.
Where |ΔW| is a hundredth of |W| that is 3.6 % of a bfloat16 weight: one word in ten, at a quarter of its size, those
in doubt, and the bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from loreg.algebra.rounding import from_ordered, ordered

LANES = 8
"""Elements of a word: neighbours of one row, which one thread loads at once."""
COLUMNS = 128
"""Of a tile: fewer than a block's threads, or Triton would move factors through shared memory."""
NIBBLE = 7
"""A residual up to this, either way, is one of eight in an integer."""
CODED = -NIBBLE * 2**28
"""An integer below this has none. It is ELSEWHERE, or that and where, counted from the tile's first integer, two
others have the eight residuals as bytes."""
ELSEWHERE = -(2**31)


@dataclass(frozen=True, slots=True)
class Undo:
    """What taking one edit back misses in a weight of ``columns``, in storage values (``rounding.ordered``).

    ``entries`` (int32); ``starts`` (int32): of each tile the first; ``marks`` (int16, (tiles, rows of a tile)): the
    bits. Of words that are ELSEWHERE ``by`` (int64) at the places ``index`` (int64) of elements in a row.
    """

    columns: int
    entries: Tensor
    starts: Tensor
    marks: Tensor
    index: Tensor
    by: Tensor

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in (self.entries, self.starts, self.marks, self.index, self.by))

    def flat(self) -> tuple[Tensor, Tensor]:
        """Places of elements in a row (int64, in no order) and what has to be added there (int64)."""
        device, height = self.marks.device, self.marks.shape[1]
        word = torch.arange(COLUMNS // LANES, device=device)
        hits = ((self.marks.int()[..., None] >> word) & 1).nonzero()
        tile, row, word = hits.unbind(1)
        counts = tile.bincount(minlength=len(self.starts))
        start = self.starts.long()[tile]
        entry = self.entries[start + torch.arange(len(tile), device=device) - (counts.cumsum(0) - counts)[tile]]
        far = torch.zeros(len(entry), 2, dtype=torch.int32, device=device)
        here = (entry < CODED) & (entry != ELSEWHERE)
        far[here] = self.entries[(start[here] + entry[here] - ELSEWHERE)[:, None] + torch.arange(2, device=device)]
        by = unpacked(entry, far)
        lane = torch.arange(LANES, device=device)
        across = -(-self.columns // COLUMNS)
        row += tile // across * height
        index = (row * self.columns + tile % across * COLUMNS + word * LANES)[:, None] + lane
        here = by != 0
        return torch.cat([index[here], self.index]), torch.cat([by[here], self.by])


def packed(by: Tensor) -> Tensor:
    """int32 (n), entries of words that have the residuals ``by`` (int64, (n, LANES)): ELSEWHERE where one is beyond a
    nibble. Residuals that lead from one sign to the other are of words in doubt when they are taken back, which no
    kernel counts on."""
    entry = ((by & 15) << (4 * torch.arange(LANES, device=by.device))).sum(1)
    return torch.where((by.abs() <= NIBBLE).all(1), (entry << 32) >> 32, ELSEWHERE).int()


def unpacked(entry: Tensor, far: Tensor) -> Tensor:
    """int64 (n, LANES), the residuals that words have by their entries, and by the two integers (n, 2) of those that
    are not within a nibble, which are 0 else; 0 of what is ELSEWHERE."""
    lane = torch.arange(LANES, dtype=torch.int32, device=entry.device)
    near = (torch.where(entry < CODED, 0, entry)[:, None] << (28 - 4 * lane)) >> 28
    return near.long() + far.contiguous().view(torch.int8)


def moved(words: Tensor, by: Tensor) -> Tensor:
    """``words`` (a storage dtype), each as many storage values on as ``by`` says."""
    return from_ordered(ordered(words) + by, words.dtype)
