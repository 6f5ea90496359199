"""What a launch lists: words that one rounding leaves in doubt, and what undoes the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from loreg.algebra.gpu.undo import LANES
from loreg.algebra.passes import Candidates

HOST = torch.device("cpu")


class Open(NamedTuple):
    """Elements of words that are open: of which job, where in the list, and where in the weight; float64 sums, what
    was summed up with the edit, and what ``settle`` says of each. Job after job."""

    job: Tensor
    slot: Tensor
    rows: Tensor
    columns: Tensor
    near: Tensor
    W: Tensor
    state: Tensor

    def to(self, device: torch.device) -> Open:
        """W in float32, which has all values of the dtypes that there are."""
        return Open(*(x.to(device) for x in self._replace(W=self.W.float())))

    def only(self, here: Tensor) -> Open:
        return Open(*(x[here] for x in self))

    @property
    def found(self) -> Open:
        """Of which the value is open."""
        return self.only(self.state % 2 == 1)

    @property
    def unsure(self) -> Open:
        """Of which the residual is."""
        return self.only(self.state >= 2)

    @property
    def candidates(self) -> Candidates:
        return Candidates(self.rows, self.columns, self.near, self.W)

    @property
    def deltas(self) -> Candidates:
        """As those in doubt of a residual are given."""
        return Candidates(self.rows, self.columns, self.near - self.W.double(), self.W)

    def by_job(self, jobs: int) -> list[Open]:
        """For each job; on the host."""
        sizes: list[int] = self.job.bincount(minlength=jobs).tolist()
        return [Open(*parts) for parts in zip(*(torch.split(x, sizes) for x in self), strict=True)]


@dataclass(slots=True)
class Words:
    """Words in doubt, job after job, on the device: (n), and of their elements (n, LANES).

    ``at``: which of the job's, counted row by row; ``was``: what W was; ``missed`` (n, 3): the integers
    that say what taking that back misses. ``entry``: where what undoes it is to be.
    """

    job: Tensor
    at: Tensor
    was: Tensor
    missed: Tensor
    entry: Tensor

    def __len__(self) -> int:
        return len(self.at)

    def only(self, here: Tensor) -> Words:
        return Words(*(x[here] if len(x) else x for x in self._all))

    @property
    def _all(self) -> tuple[Tensor, ...]:
        return self.job, self.at, self.was, self.missed, self.entry

    @classmethod
    def joined(cls, runs: Sequence[Words]) -> Words:
        if len(runs) == 1:
            return runs[0]
        found = cls(*map(torch.cat, zip(*(words._all for words in runs), strict=True)))
        return found.only(found.job.argsort(stable=True))

    @property
    def key(self) -> Tensor:
        return (self.job.long() << 32) + self.at

    def without(self, other: Words) -> Words:
        return self.only(~torch.isin(self.key, other.key))


class Lists:
    """Room for so many words in doubt, and for so many integers of what undoes the others, of each job.

    ``word``: the dtype of a storage value as an integer. ``back``: whether something is taken back."""

    def __init__(
        self, doubts: Sequence[int], entries: Sequence[int], word: torch.dtype, device: torch.device, back: bool
    ) -> None:
        self.rooms = list(doubts), list(entries)
        self.bases = tuple([0, *accumulate(rooms)] for rooms in self.rooms)
        doubt, entry = (bases[-1] for bases in self.bases)

        def empty(dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        self.counters = torch.zeros(len(self.rooms[0]), dtype=torch.int64, device=device)
        self.at, self.was = empty(torch.int32, doubt), empty(word, doubt, LANES)
        self.missed = empty(torch.int32, doubt if back else 0, 3)
        self.entry = empty(torch.int32, doubt if entry else 0)
        self.entries = empty(torch.int32, entry)
        self.launched = False

    @cached_property
    def wanted(self) -> tuple[list[int], list[int]]:
        """Words in doubt, and integers, that all jobs have. Waits for the device."""
        counts: list[int] = self.counters.tolist()
        return [count >> 32 for count in counts], [count & 0xFFFFFFFF for count in counts]

    @property
    def overflowed(self) -> bool:
        pairs = zip(self.wanted, self.rooms, strict=True)
        return any(count > room for counts, rooms in pairs for count, room in zip(counts, rooms, strict=True))

    @property
    def used(self) -> tuple[list[int], list[int]]:
        """Of the rooms."""
        doubts, entries = (
            [min(pair) for pair in zip(counts, rooms, strict=True)]
            for counts, rooms in zip(self.wanted, self.rooms, strict=True)
        )
        return doubts, entries

    def words(self) -> Words:
        device, sizes = self.at.device, self.used[0]
        job = owners(sizes, device)
        gaps = [base - before for base, before in zip(self.bases[0], accumulate([0, *sizes]), strict=False)]
        slot = torch.arange(len(job), device=device) + numbers(gaps, device)[job]
        slot, job = (x[self.at[slot] >= 0] for x in (slot, job))  # else of a tile that had no room
        lists = self.at, self.was, self.missed, self.entry
        return Words(job.int(), *(x[slot] if len(x) else x for x in lists))


def owners(sizes: Sequence[int], device: torch.device) -> Tensor:
    """int64: 0 as often as the first of ``sizes`` says, and so on."""
    return torch.arange(len(sizes), device=device).repeat_interleave(numbers(sizes, device), output_size=sum(sizes))


def numbers(values: Sequence[int] | Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """int64 on the device, without waiting for it."""
    here = torch.tensor(values, dtype=torch.int64)
    return here.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else here
