"""Low-rank edits on a GPU, in one pass over the weights: ``kernels``, by Triton.

*Why single precision first.* A 7 B model in bfloat16 has 6.5·10⁹ weights in its linear layers: 26 GB to read and
write, 8.6 ms at the 3.0 TB/s that an H100 copies. At rank 16 that is 2.1·10¹¹ floating-point operations: 6.1 ms of
its 34 TFLOPS in float64, with twice the registers, and 3.5 ms of the unit that converts to and from float64; but
160 ms on a card for games, of 1.3 TFLOPS. In float32 they are less than half the instructions that a weight takes,
which are issued in about the time that the bytes take. (Tensor cores would have to compute in float64, as how they
round sums of anything narrower is nowhere stated.) So bfloat16 is summed in float32, with the margin of ``native``,
and the words of 8 weights that this leaves in doubt, one in some thousands, are listed. A second kernel sums those in
float64 and leaves only ties, and what is as close to one, to the exact stage. For float16 and float32 all is float64,
as float32 would leave too much in doubt.

*Many weights, one launch.* To start a kernel takes as long as it needs for one layer, so there is one for all of a
kind. Lists have bounded room. A tile makes room for itself before it stores anything, also in place: one that finds
none leaves W as it is and only says what it needs, and is done by a launch that follows.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import accumulate
from types import ModuleType
from typing import TypeVar

import torch
from torch import Tensor

from loreg.algebra.delta import LowRank
from loreg.algebra.exact import SAFE
from loreg.algebra.gpu.lists import LANES, Listed, Lists, Open, Place, Undone, joined, numbers, owners
from loreg.algebra.passes import UNSURE, Done

DEVICES = frozenset({"cuda"})
_CODES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
_MOST_RANK = 1024  # beyond it float64 products by torch are as fast

COLUMNS = 128
"""Of a tile: fewer than a block's threads, or Triton would move factors through shared memory."""
_ROWS = {True: 64, False: 32}  # of a tile, in single precision and in double: 32 and 16 weights a thread
_WARPS = 8
# So that there are three blocks to a multiprocessor, or two, of sm_90 with next to no spills.
_REGISTERS = {True: 96, False: 128}
_SETTLERS = 8  # blocks for the list of each job
_LEAST = 4096  # words for which there is room
SHARE = 2.0**-7, 2.0**-2
"""For which part of all words there is room at first, of those in doubt and of those with a residual. About one in a
thousand is in doubt, and one in ten has a residual where |ΔW| is a hundredth of |W|. Where there are more, a second
launch does what the first has left."""

_T = TypeVar("_T")


def computes(edit: Sequence[LowRank], dtype_in: torch.dtype, dtype_out: torch.dtype, device: torch.device) -> bool:
    """Whether there is a ``Fused`` for these."""
    small = sum(term.rank for term in edit) <= _MOST_RANK
    return small and device.type in DEVICES and {dtype_in, dtype_out} <= _CODES.keys() and is_there()


@functools.cache
def is_there() -> bool:
    return torch.version.hip is None and find_spec("triton") is not None


@functools.cache
def _kernels() -> ModuleType:
    from loreg.algebra.gpu import kernels  # here, since to import triton takes as long as torch

    return kernels


class Fused:
    """W + Σ c·B·A of one weight on a device, prepared without waiting for it.

    ``shape``: (rows, columns); ``dtypes``: W's and the output's. The factors take up to 16·R·(rows + columns) bytes.
    """

    def __init__(
        self,
        terms: Sequence[LowRank],
        shape: tuple[int, int],
        dtypes: tuple[torch.dtype, torch.dtype],
        device: torch.device,
    ) -> None:
        rows, columns = shape
        rank = sum(term.rank for term in terms)
        wide = any(term.right.dtype == torch.float64 for term in terms)
        self.single = dtypes == (torch.bfloat16, torch.bfloat16) and not wide
        self.rank = max(8, -(-rank // 8) * 8)
        self.shape, self.dtypes, self.device = shape, dtypes, device
        double = torch.float64
        self.left = torch.zeros(rows + self.height, self.rank, dtype=double, device=device)
        panels = -(-columns // COLUMNS)
        whole = torch.zeros(
            self.rank, panels * COLUMNS, dtype=torch.float32 if self.single else double, device=device
        )
        at = 0
        for term in terms:
            span = slice(at, at := at + term.rank)
            torch.mul(term.left.to(device).double(), term.scale, out=self.left[:rows, span])
            whole[span, :columns] = term.right.to(device)
        self.right = whole.view(self.rank, panels, COLUMNS).transpose(0, 1).contiguous()
        norms, largest = (
            torch.linalg.vector_norm(self.left, dim=1),
            torch.linalg.vector_norm(whole, dim=0, dtype=double),
        )
        self.eta = (9 + rank) * 2.0**-53
        self.spread = _largest(norms) * _largest(largest)
        for safe in (_in_range(x, device) for term in terms for x in (term.left, term.right, term.scale)):
            self.spread = torch.where(safe, self.spread, math.inf)
        self.spread = torch.where(self.spread.isfinite(), self.spread, math.inf)  # NaN too
        eta = torch.full_like(self.spread, self.eta)
        self.reals = torch.stack([eta, self.spread, 3 * eta, 2 * self.spread])
        self.left_single, self.margin = self.left, norms
        if self.single:
            self.left_single, self.margin = self.left.float(), _margin(norms, _largest(largest), self.spread, rank)

    def __neg__(self) -> Fused:
        """W - Σ c·B·A: the same bounds, and for the rest the same memory."""
        other = copy(self)
        other.left = -self.left
        other.left_single = -self.left_single if self.single else other.left
        return other

    @property
    def height(self) -> int:
        """Rows of a tile."""
        return _ROWS[self.single]

    def rows(self, W: Tensor, first: int, out: Tensor, residual: Tensor | None = None) -> Done:
        """As ``Blocks.rows``, with all rows done."""
        to = out if out.is_contiguous() else torch.empty_like(out, memory_format=torch.contiguous_format)
        launched = Launched([Job(self, W.contiguous(), to, first)], residual is not None)
        launched.start()
        (open_,) = launched.opened()
        if to is not out:
            out.copy_(to)
        if residual is None:
            return Done(len(W), open_.found, None)
        (undone,) = launched.undone()
        unsure = open_.unsure
        residual.zero_().view(-1)[undone.places] = undone.value
        residual[unsure.rows - first, unsure.columns] = UNSURE
        return Done(len(W), open_.found, unsure)


def _largest(x: Tensor) -> Tensor:
    return x.max() if x.numel() else x.new_zeros(())


def _in_range(x: Tensor | float, device: torch.device) -> Tensor:
    """Whether nothing in it may make a product over- or underflow."""
    if isinstance(x, Tensor) and x.dtype != torch.float64:
        return torch.ones((), dtype=torch.bool, device=device)
    size = x.to(device).abs() if isinstance(x, Tensor) else torch.full((), abs(x), dtype=torch.float64, device=device)
    return ((size == 0) | ((size >= 1 / SAFE) & (size <= SAFE))).all()


def _margin(norms: Tensor, largest: Tensor, spread: Tensor, rank: int) -> Tensor:
    """For each row how far its sums in float32 may be off: ``native.Factors.margin``, infinite where that is None."""
    margin = (rank + 4) * 2.0**-24 * largest * norms + (rank * 2.0**-149 * (1 + largest) + 2.0**-132)
    sure = torch.maximum(torch.maximum(_largest(norms), largest), spread) < 2.0**100
    return torch.where(sure, margin * (1 + 2.0**-20), math.inf).float()


def _on(device: torch.device) -> AbstractContextManager[object]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@dataclass(frozen=True, slots=True)
class Job:
    """Rows of a weight from ``first`` on, (n, columns), each row without gaps, into ``out``, which may be ``W``."""

    fused: Fused
    W: Tensor
    out: Tensor
    first: int = 0

    @property
    def place(self) -> Place:
        return Place(self.first, self.W.shape[1])

    @property
    def tiles(self) -> int:
        return -(-self.W.shape[0] // self.fused.height) * -(-self.W.shape[1] // COLUMNS)

    @property
    def words(self) -> int:
        return self.W.shape[0] * self.place.words

    @property
    def kind(self) -> tuple[object, ...]:
        """Jobs of one kind are one launch."""
        sizes = (self.W.shape[1], self.W.stride(0), self.out.stride(0))
        aligned = not any(size % LANES for size in sizes) and not any(x.data_ptr() % 16 for x in (self.W, self.out))
        fused = self.fused
        return fused.dtypes, fused.device, fused.single, fused.rank, aligned

    def row(self, tile: int, rooms: Sequence[int]) -> list[int]:
        """Of the kernels' table."""
        fused, first = self.fused, self.first
        return [
            self.W.data_ptr(), self.out.data_ptr(),
            fused.left_single[first:].data_ptr(), fused.left[first:].data_ptr(), fused.right.data_ptr(),
            fused.margin[first:].data_ptr(), *self.W.shape, self.W.stride(0), self.out.stride(0), tile, *rooms,
        ]  # fmt: skip


class _Group:
    """Jobs of one kind. ``share``: as SHARE; ``todo``: which tiles are wanted (int8), default all.

    Whatever is raised on the way, it goes on where it is asked again: a tile that is done is marked as such.
    """

    def __init__(
        self, jobs: Sequence[Job], residual: bool, share: tuple[float, float], todo: Tensor | None = None
    ) -> None:
        self.jobs, self.residual = jobs, residual
        self._device = jobs[0].fused.device
        self._tiles = [job.tiles for job in jobs]
        self.todo = torch.ones(sum(self._tiles), dtype=torch.int8, device=self._device) if todo is None else todo
        self._owners = owners(self._tiles, self._device).int()
        self._reals = torch.stack([job.fused.reals for job in jobs])
        rooms = [[min(job.words, max(_LEAST, int(job.words * part))) for job in jobs] for part in share]
        self._rooms = rooms[0], rooms[1] if residual else [0] * len(jobs)
        self.runs = list[Lists]()

    def begin(self) -> None:
        if not self.runs:
            self.start(*self._rooms)
        self._go_on()

    def start(self, doubts: Sequence[int], undos: Sequence[int]) -> None:
        """All tiles that are still to be done, with these rooms."""
        word = torch.int32 if self.jobs[0].fused.dtypes[0] == torch.float32 else torch.int16
        self.runs.append(Lists(doubts, undos, word, self._device))
        self._go_on()

    def _go_on(self) -> None:
        """What of the last run has not been started."""
        lists, fused = self.runs[-1], self.jobs[0].fused
        if lists.started == len(steps := (self._merge, self._settle)):
            return
        firsts = [0, *accumulate(self._tiles)]
        rooms = zip(lists.doubt_bases, lists.doubts, lists.undo_bases, lists.undos, strict=False)
        rows = [job.row(first, given) for job, first, given in zip(self.jobs, firsts, rooms, strict=False)]
        table = numbers(rows, self._device)
        kind = {
            "IN": _CODES[fused.dtypes[0]], "OUT": _CODES[fused.dtypes[1]], "SINGLE": fused.single, "RANK": fused.rank,
            "CONVERTS": _kernels().COMPILED, "RESIDUAL": self.residual,
        }  # fmt: skip
        with _on(self._device):
            for step in steps[lists.started :]:
                step(lists, table, kind)
                lists.started += 1

    def _merge(self, lists: Lists, table: Tensor, kind: dict[str, object]) -> None:
        fused = self.jobs[0].fused
        _kernels().merge[(len(self._owners),)](
            table, self._reals, self._owners, self.todo, lists.counters,
            lists.doubt_at, lists.doubt_were, lists.undo_at, lists.undo_by, **kind,
            ALIGNED=self.jobs[0].kind[-1], ROWS=fused.height, COLUMNS=COLUMNS,
            num_warps=_WARPS, maxnreg=_REGISTERS[fused.single and not self.residual],
        )  # fmt: skip

    def _settle(self, lists: Lists, table: Tensor, kind: dict[str, object]) -> None:
        _kernels().settle[(len(self.jobs), _SETTLERS)](
            table, self._reals, lists.counters, lists.doubt_at, lists.doubt_were, lists.sums, lists.late,
            lists.state, **kind, PANEL=COLUMNS, BLOCK=16, num_warps=4,
        )  # fmt: skip

    def _finished(self) -> list[tuple[Lists, list[int]]]:
        """All runs with what their counters came to. One without room is followed by another for what it left."""
        self.begin()
        while (last := self.runs[-1]).overflowed(counts := last.counters.tolist()):
            self.start(*last.wanted(counts))
        return self._so_far()

    def opened(self) -> list[Open]:
        places, dtype = [job.place for job in self.jobs], self.jobs[0].fused.dtypes[0]
        return joined([lists.opened(counts, places, dtype) for lists, counts in self._finished()])

    def undone(self, *, so_far: bool = False) -> list[Undone]:
        places = [job.place for job in self.jobs]
        runs = self._so_far() if so_far else self._finished()
        return joined([lists.undone(counts, places) for lists, counts in runs])

    def listed(self) -> list[Listed]:
        places, dtype = [job.place for job in self.jobs], self.jobs[0].fused.dtypes[0]
        return joined([lists.listed(counts, places, dtype) for lists, counts in self._so_far()])

    def _so_far(self) -> list[tuple[Lists, list[int]]]:
        """Runs without what would follow them."""
        return [(lists, lists.counters.tolist()) for lists in self.runs]

    @property
    def began(self) -> bool:
        return any(lists.started for lists in self.runs)

    def taken_back(self) -> _Group:
        """Of the tiles that are done by now, the way back but for what the lists say: not begun yet."""
        jobs = [Job(-job.fused, job.out, job.out, job.first) for job in self.jobs]
        return _Group(jobs, False, SHARE, 1 - self.todo)


class Launched:
    """Jobs for a device, of any kinds. Nothing here waits for it but what says so. ``share``: as SHARE.

    Where anything is raised, the same may be called again and goes on.
    """

    def __init__(self, jobs: Sequence[Job], residual: bool, share: tuple[float, float] | None = None) -> None:
        self._jobs, self._kinds = jobs, dict[tuple[object, ...], list[int]]()
        for index, job in enumerate(jobs):
            if job.W.numel():
                self._kinds.setdefault(job.kind, []).append(index)
        self._groups = [
            _Group([jobs[i] for i in members], residual, share or SHARE) for members in self._kinds.values()
        ]

    def start(self) -> None:
        for group in self._groups:
            group.begin()

    def opened(self) -> list[Open]:
        """For each job, what is still to be decided. Waits for the device."""
        return self._gather(_Group.opened, [Open.none(job.W) for job in self._jobs])

    def undone(self, *, so_far: bool = False) -> list[Undone]:
        """For each job, its residual as far as it is known. Waits for the device. ``so_far``: of the tiles that were
        done, those that found no room are not started again."""
        return self._gather(lambda group: group.undone(so_far=so_far), [Undone.none(job.W) for job in self._jobs])

    def listed(self) -> list[Listed]:
        """For each job, what W was wherever a kernel was in doubt, so far. Waits for the device."""
        return self._gather(_Group.listed, [Listed.none(job.W) for job in self._jobs])

    def taken_back(self) -> Launched:
        """Of jobs in place: the edits' negation, not started, for all tiles that were done by now.

        But for the residuals, and for elements that are ``listed``, of which it says nothing, it gives back W."""
        other = copy(self)
        begun = [(kind, group) for kind, group in zip(self._kinds, self._groups, strict=True) if group.began]
        other._kinds = {kind: self._kinds[kind] for kind, _ in begun}
        other._groups = [group.taken_back() for _, group in begun]
        return other

    def _gather(self, each: Callable[[_Group], list[_T]], found: list[_T]) -> list[_T]:
        for members, group in zip(self._kinds.values(), self._groups, strict=True):
            ones = each(group)  # none of one that has not begun
            for index, one in zip(members, ones, strict=bool(ones)):
                found[index] = one
        return found
