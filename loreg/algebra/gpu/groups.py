"""Many weights in one launch: ``Group``, which knows what its kernels listed and goes on from there.

A group says what is open, is told what it is, and writes that; nothing of it is decided here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from loreg.algebra.gpu import undo
from loreg.algebra.gpu.lists import Lists, Open, Words, numbers, owners
from loreg.algebra.gpu.undo import ELSEWHERE, LANES, Undo, moved, packed, unpacked
from loreg.algebra.rounding import bits

if TYPE_CHECKING:
    from loreg.algebra.gpu.fused import Fused

CODES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
_ROWS = {True: 64, False: 32}
"""Of a tile, where little is kept of each weight, and else: 32 or 16 weights a thread."""
_WARPS = 8
_REGISTERS = {False: 128, True: 255}
"""Of a thread: two blocks to a multiprocessor of sm_90, with next to no spills; one of a swap in double precision."""
_SETTLED = 16  # words of one block that settles them, and of one that puts them where they belong
_PUT = 64
_LEAST = 4096  # words for which there is room
SHARE = 2.0**-4, 2.0**-2
"""For which part of all words there is room at first, of those in doubt and of integers that undo the others. In
bfloat16 one in a hundred is in doubt, in float16 one in thirty, as some weights are subnormal; and one in ten has a
residual where |ΔW| is a hundredth of |W|. Where there are more, a second launch does what the first has left."""


def _kernels() -> ModuleType:
    from loreg.algebra.gpu import kernels  # here, since to import triton takes as long as torch

    return kernels


@dataclass(frozen=True, slots=True)
class Job:
    """Rows of a weight from ``first`` on, (n, columns), each row without gaps, into ``out``, which may be ``W``.

    ``back``: what is taken back, as ``kept`` says, of all rows that there are; ``forth``: what is then applied. One
    of them, or both of one precision. ``residual``: what undoes that is asked for. ``low``: tiles are to be as low as
    they are for either of these.
    """

    W: Tensor
    out: Tensor
    forth: Fused | None
    back: Fused | None = None
    kept: Undo | None = None
    first: int = 0
    residual: bool = False
    low: bool = False

    @property
    def fused(self) -> Fused:
        """Either."""
        found = self.forth or self.back
        assert found is not None
        return found

    @property
    def height(self) -> int:
        """Rows of a tile."""
        return _ROWS[self.fused.single and self.back is None and not self.residual and not self.low]

    @property
    def tiles(self) -> int:
        return -(-self.W.shape[0] // self.height) * -(-self.W.shape[1] // undo.COLUMNS)

    @property
    def across(self) -> int:
        """Words of a row."""
        return -(-self.W.shape[1] // LANES)

    @property
    def words(self) -> int:
        return self.W.shape[0] * self.across

    @property
    def kind(self) -> tuple[object, ...]:
        """Jobs of one kind are one launch."""
        sizes = (self.W.shape[1], self.W.stride(0), self.out.stride(0))
        aligned = not any(size % LANES for size in sizes) and not any(x.data_ptr() % 16 for x in (self.W, self.out))
        ranks = [edit.rank if edit is not None else 0 for edit in (self.back, self.forth)]
        return self.W.dtype, self.out.dtype, self.W.device, self.fused.single, *ranks, self.residual, aligned

    def row(self, tile: int, rooms: Sequence[int]) -> list[int]:
        """Of the kernels' table."""
        forth, back = ([0] * 4 if x is None else x.pointers(self.first) for x in (self.forth, self.back))
        kept = () if self.kept is None else (self.kept.entries, self.kept.starts, self.kept.marks)
        return [
            self.W.data_ptr(), self.out.data_ptr(), *self.W.shape, self.W.stride(0), self.out.stride(0), tile, *rooms,
            *forth, *back, *([x.data_ptr() for x in kept] or [0] * 3),
        ]  # fmt: skip

    def reversed(self, kept: Undo | None) -> Job:
        """What makes of ``out`` again what W was, if it is W."""
        return replace(self, W=self.out, forth=self.back, back=self.forth, kept=kept, residual=False, low=True)


class _Settled(NamedTuple):
    """Of each listed word what ``settle`` makes of it."""

    values: Tensor
    sums: Tensor
    late: Tensor
    state: Tensor


class Group:
    """Jobs of one kind. ``share``: as SHARE; ``todo``: which tiles are wanted (int8), default all; ``but``: of words
    that this one has listed nothing is said.

    ``begin`` waits for nothing. Whatever is raised, the same may be called again and goes on: a tile that is done is
    marked as such, and each other step writes what it wrote.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        share: tuple[float, float] | None = None,
        todo: Tensor | None = None,
        but: Group | None = None,
    ) -> None:
        self.jobs, self._but = jobs, but
        first = jobs[0]
        self.residual, self.back, self.forth = first.residual, first.back is not None, first.forth is not None
        self._device = device = first.W.device
        self._tiles = [job.tiles for job in jobs]
        tiles = sum(self._tiles)
        self.todo = torch.ones(tiles, dtype=torch.int8, device=device) if todo is None else todo
        self._owners = owners(self._tiles, device).int()
        none = torch.zeros(4, dtype=torch.float64, device=device)
        edits = [edit for job in jobs for edit in (job.forth, job.back)]
        self._reals = torch.cat([none if edit is None else edit.reals for edit in edits])
        kept = tiles if self.residual else 0
        self._starts = torch.zeros(kept, dtype=torch.int32, device=device)
        self._marks = torch.zeros(kept, first.height, dtype=torch.int16, device=device)
        doubts, entries = (
            [min(job.words, max(_LEAST, int(job.words * part))) for job in jobs] for part in share or SHARE
        )
        self._rooms = doubts, entries if self.residual else [0] * len(jobs)
        self._runs = list[Lists]()
        self._table = torch.empty(0)

    # ---- the launch ----

    def begin(self) -> None:
        if not self._runs:
            self.start(*self._rooms)
        self._launch()

    def start(self, doubts: Sequence[int], entries: Sequence[int]) -> None:
        """All tiles that are still to be done, with these rooms."""
        word = torch.int32 if self.jobs[0].W.dtype == torch.float32 else torch.int16
        self._runs.append(Lists(doubts, entries, word, self._device, self.back))
        self._launch()

    def _launch(self) -> None:
        """The last run, if it was not launched."""
        lists, kernels = self._runs[-1], _kernels()
        if lists.launched:
            return
        firsts, before = [0, *accumulate(self._tiles)], [0] * len(self.jobs)
        for run in self._runs[:-1]:
            before = [sum(pair) for pair in zip(before, run.used[1], strict=True)]
        (doubts, entries), (doubt_rooms, entry_rooms) = lists.bases, lists.rooms
        rooms = zip(doubts, doubt_rooms, entries, entry_rooms, before, strict=False)
        rows = [job.row(first, given) for job, first, given in zip(self.jobs, firsts, rooms, strict=False)]
        self._table = numbers(rows, self._device)
        job = self.jobs[0]
        with self._on():
            kernels.change[(len(self._owners),)](
                self._table, self._reals, self._owners, self.todo, lists.counters, self._starts, self._marks,
                lists.entries, lists.at, lists.was, lists.missed, lists.entry,
                **self._dtypes(), SINGLE=job.fused.single, ALIGNED=job.kind[-1],
                BACK=0 if job.back is None else job.back.rank, FORTH=0 if job.forth is None else job.forth.rank,
                RESIDUAL=self.residual, ROWS=job.height, COLUMNS=undo.COLUMNS, num_warps=_WARPS,
                maxnreg=_REGISTERS[not job.fused.single and self.back and self.forth],
            )  # fmt: skip
        lists.launched = True

    def _dtypes(self) -> dict[str, object]:
        job = self.jobs[0]
        return {"IN": CODES[job.W.dtype], "OUT": CODES[job.out.dtype], "CONVERTS": _kernels().COMPILED}

    def _on(self) -> AbstractContextManager[object]:
        return torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext()

    @property
    def began(self) -> bool:
        return bool(self._runs)

    @cached_property
    def words(self) -> Words:
        """What was listed. Waits for the device, and begins again where there was no room."""
        self.begin()
        while (last := self._runs[-1]).overflowed:
            self.start(*last.wanted)
        return self._listed()

    def _listed(self) -> Words:
        """So far."""
        found = Words.joined([lists.words() for lists in self._runs])
        return found if self._but is None else found.without(self._but._listed())

    # ---- what was in doubt ----

    def taken(self) -> Open:
        """What is open of what was taken back."""
        return self._opened(self._taken, self.words.was)

    def take(self, open_: Open, values: Tensor) -> None:
        """That, but for what it misses, is ``values`` (any float dtype)."""
        words = self.words
        _write(self._taken.values, open_, values, self.jobs[0].W.dtype)
        by = unpacked(words.missed[:, 0], words.missed[:, 1:])
        word, lane, missed = self._elsewhere()
        by[word, lane] = missed
        self._base = bits(moved(self._taken.values.view(self.jobs[0].W.dtype), by))

    def opened(self) -> Open:
        """What is open of what was applied, and of its residual."""
        return self._opened(self._applied, self._given)

    def decide(self, open_: Open, values: Tensor) -> None:
        """Those elements are ``values`` (any float dtype)."""
        _write(self._applied.values, open_, values, self.jobs[0].out.dtype)

    def after(self, open_: Open) -> Tensor:
        """What those elements are by now, in float32."""
        return self._applied.values.view(self.jobs[0].out.dtype).view(-1)[open_.slot.to(self._device)].float()

    def put(self) -> None:
        """Writes what the listed words are."""
        self._put(self.words, self._applied.values if self.forth else self._given)

    def put_back(self) -> None:
        """Writes what they were."""
        words = self._listed()
        self._put(words, words.was)

    @property
    def _given(self) -> Tensor:
        """What words are that nothing is applied to."""
        return self._base if self.back else self.words.was

    @cached_property
    def _taken(self) -> _Settled:
        return self._settle(self.words.was, back=True)

    @cached_property
    def _applied(self) -> _Settled:
        return self._settle(self._given, back=False)

    def _settle(self, given: Tensor, *, back: bool) -> _Settled:
        words, job, kernels = self.words, self.jobs[0], _kernels()
        residual = self.residual and not back
        late, state = (torch.zeros(given.shape, dtype=torch.int8, device=self._device) for _ in range(2))
        values = torch.zeros_like(given, dtype=_word(job.W if back else job.out))
        found = _Settled(values, torch.empty_like(given, dtype=torch.float64), late, state)
        if not len(words):
            return found
        edit = job.back if back else job.forth
        assert edit is not None
        dtypes = self._dtypes()
        with self._on():
            kernels.settle[(-(-len(words) // _SETTLED),)](
                self._table, self._reals, words.job, words.at, given, *found, len(words),
                **dtypes | ({"OUT": dtypes["IN"]} if back else {}), SINGLE=edit.single, RANK=edit.rank, BACK=back,
                RESIDUAL=residual, PANEL=undo.COLUMNS, BLOCK=_SETTLED, num_warps=4,
            )  # fmt: skip
        return found

    def _put(self, words: Words, values: Tensor) -> None:
        if not len(words):
            return
        with self._on():
            _kernels().put[(-(-len(words) // _PUT),)](
                self._table, words.job, words.at, values, len(words), OUT=self._dtypes()["OUT"], BLOCK=_PUT,
                num_warps=4,
            )  # fmt: skip

    def _opened(self, settled: _Settled, given: Tensor) -> Open:
        words = self.words
        hits = settled.state.nonzero()
        word, lane = hits.unbind(1)
        job, at = words.job[word].long(), words.at[word].long()
        across, first = self._of(job, lambda one: one.across), self._of(job, lambda one: one.first)
        W = given.view(self.jobs[0].W.dtype)[word, lane]
        columns = at % across * LANES + lane
        sums, state = settled.sums[word, lane], settled.state[word, lane]
        return Open(job, word * LANES + lane, at // across + first, columns, sums, W, state)

    def _of(self, job: Tensor, what: Callable[[Job], int]) -> Tensor:
        """int64, the shape of ``job``: of each what there is of it."""
        return numbers([what(one) for one in self.jobs], self._device)[job]

    def _elsewhere(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of words that say so: which, in which of their elements, what is missed."""
        kept = [job.kept for job in self.jobs if job.kept is not None]
        job = owners([len(one.index) for one in kept], self._device)
        columns, across = self._of(job, lambda one: one.W.shape[1]), self._of(job, lambda one: one.across)
        index, by = (torch.cat(parts) for parts in zip(*((one.index, one.by) for one in kept), strict=True))
        row, column = index // columns, index % columns
        words = self.words
        here = (words.missed[:, 0] == ELSEWHERE).nonzero()[:, 0]
        key, order = words.key[here].sort()
        wanted = (job << 32) + row * across + column // LANES
        place = torch.searchsorted(key, wanted).clamp(max=max(0, len(key) - 1))
        # Of other words, as of tiles that are not to be done, nothing is wanted.
        known = key[place] == wanted if len(key) else torch.zeros_like(wanted, dtype=torch.bool)
        return here[order[place[known]]], column[known] % LANES, by[known]

    # ---- what undoes it ----

    def undo(self, open_: Open, by: Tensor) -> list[Undo]:
        """Of each job, when all is decided; the residual of these unsure elements is ``by`` (int64)."""
        words = self.words
        late = self._applied.late.long()
        late.view(-1)[open_.slot.to(self._device)] = by.to(self._device)
        entry = packed(late)
        entries, bases = self._entries()
        entries[numbers(bases, self._device)[words.job.long()] + words.entry] = entry
        word, lane = ((entry == ELSEWHERE)[:, None] & (late != 0)).nonzero().unbind(1)
        job, at = words.job[word].long(), words.at[word].long()
        across, columns = self._of(job, lambda one: one.across), self._of(job, lambda one: one.W.shape[1])
        index = at // across * columns + at % across * LANES + lane
        sizes: list[int] = job.bincount(minlength=len(self.jobs)).tolist()
        return list(self._undos(entries, bases, torch.split(index, sizes), torch.split(late[word, lane], sizes)))

    def _entries(self) -> tuple[Tensor, list[int]]:
        """All that the runs have, job after job, and where each begins."""
        used = [lists.used[1] for lists in self._runs]
        parts = [
            lists.entries[lists.bases[1][i] : lists.bases[1][i] + sizes[i]]
            for i in range(len(self.jobs))
            for lists, sizes in zip(self._runs, used, strict=True)
        ]
        return torch.cat(parts), [0, *accumulate(map(sum, zip(*used, strict=True)))]

    def _undos(
        self, entries: Tensor, bases: Sequence[int], index: Sequence[Tensor], by: Sequence[Tensor]
    ) -> Iterator[Undo]:
        firsts = [0, *accumulate(self._tiles)]
        for i, job in enumerate(self.jobs):
            tiles, mine = slice(firsts[i], firsts[i + 1]), entries[bases[i] : bases[i + 1]]
            yield Undo(job.W.shape[1], mine, self._starts[tiles], self._marks[tiles], index[i], by[i])

    def reversed(self) -> Group:
        """What brings all tiles back that were done by now, but for what was listed: not begun yet. Of jobs in
        place, with residuals or nothing applied."""
        kept: list[Undo | None] = [None] * len(self.jobs)
        if self.forth:
            none = [self._marks.new_empty(0, dtype=torch.int64)] * len(self.jobs)
            kept = list(self._undos(*self._entries(), none, none))
        jobs = [job.reversed(one) for job, one in zip(self.jobs, kept, strict=True)]
        return Group(jobs, todo=1 - self.todo, but=self)


def grouped(jobs: Sequence[Job]) -> list[tuple[Group, list[int]]]:
    """Groups of jobs that have elements, and which jobs these are."""
    kinds = dict[tuple[object, ...], list[int]]()
    for index, job in enumerate(jobs):
        if job.W.numel():
            kinds.setdefault(job.kind, []).append(index)
    return [(Group([jobs[i] for i in members]), members) for members in kinds.values()]


def _word(x: Tensor) -> torch.dtype:
    return torch.int32 if x.dtype == torch.float32 else torch.int16


def _write(words: Tensor, open_: Open, values: Tensor, dtype: torch.dtype) -> None:
    words.view(-1)[open_.slot.to(words.device)] = bits(values.to(words.device).to(dtype))
