"""What a launch lists, word by word of LANES neighbours of a row, and what is read of it once it is done."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from loreg.algebra.passes import Candidates

LANES = 8
_AT_ONCE = 2**24
"""Words of which elements are taken out together: a pass for each weight would wait for the device each time."""


class Place(NamedTuple):
    """Of a job: its first row within the weight, and its columns."""

    first: int
    columns: int

    @property
    def words(self) -> int:
        """Of a row."""
        return -(-self.columns // LANES)


class Open(NamedTuple):
    """Elements of one job that are open: where in the weight, float64 sums, W; and what ``settle`` says of each."""

    rows: Tensor
    columns: Tensor
    near: Tensor
    W: Tensor
    state: Tensor

    @classmethod
    def none(cls, W: Tensor) -> Open:
        places, values = W.new_empty(0, dtype=torch.int64), W.new_empty(0, dtype=torch.float64)
        return cls(places, places, values, W.new_empty(0), W.new_empty(0, dtype=torch.int8))

    @property
    def found(self) -> Candidates:
        """Of which W' is open."""
        here = self.state % 2 == 1
        return Candidates(*(x[here] for x in self[:4]))

    @property
    def unsure(self) -> Candidates:
        """Of which the residual is."""
        here = self.state >= 2
        W = self.W[here]
        return Candidates(self.rows[here], self.columns[here], self.near[here] - W.double(), W)


class Undone(NamedTuple):
    """The residual of one job where it is not 0: int8, at ``places`` (int64, no order) of its elements in a row."""

    places: Tensor
    value: Tensor

    @classmethod
    def none(cls, W: Tensor) -> Undone:
        return cls(W.new_empty(0, dtype=torch.int64), W.new_empty(0, dtype=torch.int8))


class Listed(NamedTuple):
    """Elements of one job in words that were in doubt, and what W was there."""

    rows: Tensor
    columns: Tensor
    were: Tensor

    @classmethod
    def none(cls, W: Tensor) -> Listed:
        places = W.new_empty(0, dtype=torch.int64)
        return cls(places, places, W.new_empty(0))


class Lists:
    """For each job room for so many words in doubt, and for so many words of the residual."""

    def __init__(self, doubts: Sequence[int], undos: Sequence[int], word: torch.dtype, device: torch.device) -> None:
        self.doubts, self.undos = list(doubts), list(undos)
        self.doubt_bases, self.undo_bases = ([0, *accumulate(rooms)] for rooms in (doubts, undos))
        doubt, undo = self.doubt_bases[-1], self.undo_bases[-1]
        self.counters = torch.zeros(len(self.doubts), dtype=torch.int64, device=device)
        self.doubt_at = torch.empty(doubt, dtype=torch.int32, device=device)
        self.doubt_were = torch.empty(doubt, LANES, dtype=word, device=device)
        self.sums = torch.empty(doubt, LANES, dtype=torch.float64, device=device)
        # It is read also where an error came before ``settle``: of lanes beyond the last column it then says nothing.
        self.late = torch.zeros(doubt, LANES, dtype=torch.int8, device=device)
        self.state = torch.empty(doubt, LANES, dtype=torch.int8, device=device)
        self.undo_at = torch.empty(undo, dtype=torch.int32, device=device)
        self.undo_by = torch.empty(undo, LANES, dtype=torch.int8, device=device)
        self.started = 0  # of the kernels

    def wanted(self, counts: Sequence[int]) -> tuple[list[int], list[int]]:
        """Of what ``counters`` were: words in doubt, and of the residual, that all jobs have."""
        return [count >> 32 for count in counts], [count & 0xFFFFFFFF for count in counts]

    def overflowed(self, counts: Sequence[int]) -> bool:
        wanted = self.wanted(counts)
        pairs = (*zip(wanted[0], self.doubts, strict=True), *zip(wanted[1], self.undos, strict=True))
        return any(count > room for count, room in pairs)

    def opened(self, counts: Sequence[int], places: Sequence[Place], dtype: torch.dtype) -> list[Open]:
        """For each job; ``dtype``: W's."""
        device = self.doubt_at.device
        spans = list(_spans(self.doubt_bases, self.doubts, self.wanted(counts)[0]))
        slots = torch.cat([torch.arange(start, end, device=device) for start, end in spans])
        hits = self.state[slots].nonzero()
        slot, lane = slots[hits[:, 0]], hits[:, 1]
        job = owners([end - start for start, end in spans], device)[hits[:, 0]]
        number, near = self.doubt_at[slot].long(), self.sums[slot, lane]
        were, state = self.doubt_were.view(dtype)[slot, lane], self.state[slot, lane]
        found = []
        parts = zip(*(_split(x, job, len(places)) for x in (number, lane, near, were, state)), strict=True)
        for place, (number_, lane_, near_, were_, state_) in zip(places, parts, strict=True):
            columns = number_ % place.words * LANES + lane_
            found.append(Open(number_ // place.words + place.first, columns, near_, were_, state_))
        return found

    def listed(self, counts: Sequence[int], places: Sequence[Place], dtype: torch.dtype) -> list[Listed]:
        """For each job, all elements of the words in doubt."""
        found, lanes = [], torch.arange(LANES, device=self.doubt_at.device)
        for place, (start, end) in zip(
            places, _spans(self.doubt_bases, self.doubts, self.wanted(counts)[0]), strict=True
        ):
            number = self.doubt_at[start:end].long()[:, None]
            columns = number % place.words * LANES + lanes
            here = (number >= 0) & (columns < place.columns)
            rows = (number // place.words + place.first).expand_as(columns)
            found.append(Listed(rows[here], columns[here], self.doubt_were[start:end].view(dtype)[here]))
        return found

    def undone(self, counts: Sequence[int], places: Sequence[Place]) -> list[Undone]:
        """For each job what is known of its residual."""
        doubts, undos = self.wanted(counts)
        given = zip(
            _spans(self.doubt_bases, self.doubts, doubts), _spans(self.undo_bases, self.undos, undos),
            places, strict=True,
        )  # fmt: skip
        found: list[Undone] = []
        for batch in _batches(list(given)):
            at = [x for doubt, undo, _ in batch for x in (self.doubt_at[slice(*doubt)], self.undo_at[slice(*undo)])]
            by = [x for doubt, undo, _ in batch for x in (self.late[slice(*doubt)], self.undo_by[slice(*undo)])]
            numbers_, values = torch.cat(at), torch.cat(by)
            values[numbers_ < 0] = 0  # where a tile had no room
            hits = values.nonzero()
            owner = owners([doubt[1] - doubt[0] + undo[1] - undo[0] for doubt, undo, _ in batch], values.device)
            job = owner[hits[:, 0]]
            number, value = numbers_[hits[:, 0]].long(), values[hits[:, 0], hits[:, 1]]
            parts = (_split(x, job, len(batch)) for x in (number, hits[:, 1], value))
            for (_, _, place), number_, lane, value_ in zip(batch, *parts, strict=True):
                index = number_ // place.words * place.columns + number_ % place.words * LANES + lane
                found.append(Undone(index, value_))
        return found


_Span = tuple[int, int]
_T = TypeVar("_T", bound=Open | Undone | Listed)


def _spans(bases: Sequence[int], rooms: Sequence[int], counts: Sequence[int]) -> Iterator[_Span]:
    for base, room, count in zip(bases, rooms, counts, strict=False):
        yield base, base + min(count, room)


def _batches(given: Sequence[tuple[_Span, _Span, Place]]) -> Iterator[list[tuple[_Span, _Span, Place]]]:
    batch, words = list[tuple[_Span, _Span, Place]](), 0
    for job in given:
        here = sum(end - start for start, end in job[:2])
        if batch and words + here > _AT_ONCE:
            yield batch
            batch, words = [], 0
        batch.append(job)
        words += here
    if batch:
        yield batch


def owners(sizes: Sequence[int], device: torch.device) -> Tensor:
    """0 as often as the first of ``sizes`` says, and so on."""
    return torch.arange(len(sizes), device=device).repeat_interleave(numbers(sizes, device), output_size=sum(sizes))


def _split(x: Tensor, job: Tensor, jobs: int) -> list[Tensor]:
    """``x`` by ``job``, which ascends."""
    sizes: list[int] = job.bincount(minlength=jobs).tolist()
    return list(torch.split(x, sizes))


def joined(runs: Sequence[list[_T]]) -> list[_T]:
    """What several runs have of each job; nothing of none."""
    if len(runs) == 1:
        return runs[0]
    return [type(parts[0])(*map(torch.cat, zip(*parts, strict=True))) for parts in zip(*runs, strict=True)]


def numbers(values: Sequence[int] | Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """int64 on the device, without waiting for it."""
    here = torch.tensor(values, dtype=torch.int64)
    return here.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else here
