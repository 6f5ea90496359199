"""The compiled form of one weight's low-rank edit, where it was built: ``merge.c``.

It gives what the passes of ``edits.py`` give, in one: sums in float64 within the same bound, each rounded once, and
those in doubt for the exact stage. Which of the two computed is of no meaning to a digest. Where no compiler was at
hand at installation there is no library, and torch computes.
"""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, cast

import torch
from torch import Tensor

from loreg.algebra.passes import Candidates, Done, Outcome
from loreg.algebra.rounding import Workspace

_CPU = torch.device("cpu")
_NONE = Candidates(*(torch.empty(0, dtype=dtype) for dtype in (*[torch.int64] * 2, *[torch.float64] * 2)))
_PANEL = 32
_ROWS = _FEW = 4
"""ROWS and FEW of merge.c."""
_ROOM = 2**18
"""Doubtful elements that there is memory for: 6 MiB, of which only pages that are written count."""
_AT_ONCE = 2**16
"""Elements that are changed at once: what is read and made of them stays in the second-level cache."""

_NAMES = {torch.bfloat16: "bf16", torch.float32: "f32"}


class _Doubtful(ctypes.Structure):
    _fields_ = (
        ("index", ctypes.c_void_p),
        ("near", ctypes.c_void_p),
        ("weight", ctypes.c_void_p),
        ("count", ctypes.c_int64),
    )


class _Wide(ctypes.Structure):
    _fields_ = (("index", ctypes.c_void_p), ("by", ctypes.c_void_p), ("count", ctypes.c_int64))


class _Screen(ctypes.Structure):
    _fields_ = (("tau", ctypes.c_uint64), ("top", ctypes.c_uint64), ("slack", ctypes.c_uint64))


class _Task(ctypes.Structure):
    """``struct task`` of merge.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("W", "to", "L", "Lrest", "R", "Lsingle", "Rsingle", "margin")),
        *((name, ctypes.c_int64) for name in ("rows", "cols", "r")),
        ("spread", ctypes.c_double),
        ("screen", _Screen),
        ("found", _Doubtful),
        ("room", ctypes.c_int64),
        ("looked", ctypes.c_int64),
        ("small", ctypes.c_void_p),
        ("back", _Screen),
        ("unsure", _Doubtful),
        ("wide", _Wide),
    )


class _Kept(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("index", "by")),
        ("count", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("far_index", "far")),
        ("far_count", ctypes.c_int64),
    )


class _Change(ctypes.Structure):
    """``struct change`` of merge.c."""

    _fields_ = (
        ("back", ctypes.POINTER(_Task)),
        ("forth", ctypes.POINTER(_Task)),
        ("W", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("rows", "cols", "high", "start")),
        *((name, _Kept) for name in ("old", "fresh")),
        *((name, ctypes.c_void_p) for name in ("base", "out", "small")),
    )


def _load() -> ctypes.CDLL | None:
    path = Path(__file__).with_name("libloreg.so")
    if not path.is_file():
        return None
    try:
        found = ctypes.CDLL(str(path))
        source = (ctypes.c_char * 64).in_dll(found, "loreg_source").value.decode()
    except (OSError, ValueError):  # built for another machine, or by an early version
        return None
    here = b"".join(source.read_bytes() for source in sorted(path.parent.glob("*.c")))
    return found if source == hashlib.sha256(here).hexdigest() else None


library = _load()
"""None where there is none, or one of another version of the sources."""
vector_bytes: int = library.loreg_bytes() if library else 0
"""The width of the vectors that this processor has."""


def _function(name: str) -> Callable[..., int]:
    """The copy of a function of ``merge.c`` that is for this processor."""
    function = getattr(library, f"loreg_{name}_{vector_bytes}")
    function.restype = ctypes.c_int64
    return cast("Callable[..., int]", function)


class _Found:
    """Memory for elements in doubt, at a thread's disposal."""

    def __init__(self, use: str, room: int, workspace: Workspace) -> None:
        self._index = workspace.take(f"{use} index", room, torch.int64, _CPU)
        self._near = workspace.take(f"{use} near", room, torch.float64, _CPU)
        self._were = workspace.take(f"{use} were", room, torch.float64, _CPU)

    def given(self) -> _Doubtful:
        return _Doubtful(self._index.data_ptr(), self._near.data_ptr(), self._were.data_ptr(), 0)

    def taken(self, given: _Doubtful, first: int, columns: int) -> Candidates:
        if not given.count:
            return _NONE
        index, near, were = (x[: given.count].clone() for x in (self._index, self._near, self._were))
        return Candidates(index // columns + first, index % columns, near, were)


class _Known:
    """Memory for corrections that are beyond a byte."""

    def __init__(self, room: int, workspace: Workspace) -> None:
        self._index, self._by = (workspace.take(f"wide {use}", room, torch.int64, _CPU) for use in ("index", "by"))

    def given(self) -> _Wide:
        return _Wide(self._index.data_ptr(), self._by.data_ptr(), 0)

    def taken(self, given: _Wide) -> Outcome:
        return Outcome(0, *(x[: given.count].clone() for x in (self._index, self._by))) if given.count else Outcome()


@dataclass(frozen=True, slots=True)
class Factors:
    """W + left·right, as ``Fused`` is given it: float64 on the CPU, but ``right`` float32 where it has no more bits.

    ``rest``: what rounding ``left`` to float64 lost, None for nothing. ``rows``: the norms of the rows of left (m,);
    ``largest``: of the columns of right the largest norm. ``spread``: S of Prepared's bound; infinite if ``rest`` is
    not known.
    """

    left: Tensor
    right: Tensor
    rest: Tensor | None
    rows: Tensor
    largest: float
    spread: float

    @property
    def margin(self) -> Tensor | None:
        """How far L̂·right in float32, for left rounded to L̂ and in any order, is from the exact sum, for each row.

        Within (R + 3)2⁻²⁴Σ|l·r|, by Cauchy-Schwarz, and R·2⁻¹⁴⁹(1 + max|right|) for what underflows. It is over 2⁻¹³³
        too, so that a sum of zero, whose sign has a rule of its own, is always looked at. None where a float32 might
        overflow.
        """
        if not max(_largest(self.rows), self.largest, self.spread) < 2.0**100 or self.right.dtype != torch.float32:
            return None
        rank = len(self.right)
        margin = (rank + 4) * 2.0**-24 * self.largest * self.rows
        return margin.add_(rank * 2.0**-149 * (1 + self.largest) + 2.0**-132).mul_(1 + 2.0**-20).float()


def _largest(x: Tensor) -> float:
    return float(x.max()) if x.numel() else 0.0


class Fused:
    """``factors`` for one weight and one thread.

    ``dtypes``: W's and the output's. ``screens``: ``thresholds`` for what is rounded, and for what taking back the
    delta gives.
    """

    def __init__(
        self,
        factors: Factors,
        dtypes: tuple[torch.dtype, torch.dtype],
        screens: tuple[tuple[int, int, int], tuple[int, int, int]],
        workspace: Workspace,
    ) -> None:
        self._function = _function("_".join(("merge", *(_NAMES[dtype] for dtype in dtypes))))
        rank, columns = factors.right.shape
        room = max(_ROOM, 2 * columns)
        self._found, self._unsure = (_Found(use, room, workspace) for use in ("doubtful", "unsure"))
        self._known = _Known(room, workspace)
        self._right = _packed(factors.right)
        self._task = _Task(
            cols=columns, r=rank, room=room, spread=factors.spread,
            screen=_Screen(*screens[0]), back=_Screen(*screens[1]),
        )  # fmt: skip
        single = factors.right.dtype == torch.float32
        setattr(self._task, "Rsingle" if single else "R", self._right.data_ptr())
        by_row = {"L": factors.left.contiguous(), "Lrest": factors.rest}
        if dtypes == (torch.bfloat16, torch.bfloat16) and (margin := factors.margin) is not None:
            by_row |= {"Lsingle": factors.left.float(), "margin": margin}
        self._by_row = {name: value for name, value in by_row.items() if value is not None}

    def task(self, first: int) -> _Task:
        """For rows from the ``first`` on; it holds until the next is asked for."""
        task = self._task
        for name, value in self._by_row.items():
            setattr(task, name, value[first:].data_ptr())
        task.found, task.unsure, task.wide = self._found.given(), self._unsure.given(), self._known.given()
        return task

    def rows(self, W: Tensor, first: int, out: Tensor, residual: Tensor | None = None) -> Done:
        """As ``Blocks.rows``, with at least one row done."""
        contiguous = W.is_contiguous() and out.is_contiguous()
        W, to = W.contiguous(), out if contiguous else torch.empty(out.shape, dtype=out.dtype)
        task = self.task(first)
        task.W, task.to, task.rows, task.looked = W.data_ptr(), to.data_ptr(), len(W), 0
        task.small = None if residual is None else residual.data_ptr()
        done = self._function(ctypes.byref(task))
        if not contiguous:
            out[:done] = to[:done]
        found = self._found.taken(task.found, first, task.cols)
        if residual is None:
            return Done(done, found, None)
        return Done(done, found, self._unsure.taken(task.unsure, first, task.cols), self._known.taken(task.wide))


class End(NamedTuple):
    """An edit from a row of the weight's on, and how many more there are."""

    fused: Fused
    first: int
    rows: int


class Change:
    """Rows of a weight changed where they lie, from the first of ``W`` on: ``back``, with the corrections ``kept`` by
    ascending places from ``start`` on, gives what was there before, and ``forth`` what is to be there. None: nothing.

    ``W``: bfloat16 or float32 (both edits' dtypes), contiguous, on the CPU, of less than 2³¹ elements, at least one.
    What undoes it is in memory of ``workspace``.
    """

    def __init__(
        self,
        W: Tensor,
        back: End | None,
        kept: tuple[Tensor, ...],
        start: int,
        forth: End | None,
        workspace: Workspace,
    ) -> None:
        rows, cols = W.shape
        high = min(rows, max(_ROWS, _AT_ONCE // cols // _ROWS * _ROWS))
        size = high * cols
        # As much as the rows themselves take, and what the last ones may take beyond that.
        room, far_room = (rows * cols * W.itemsize // each + size + _FEW for each in (5, 16)) if forth else (0, 0)
        sizes = (
            *(("base", size, W.dtype), ("out", size, W.dtype), ("small", size, torch.int8)),
            *(("index", room, torch.int32), ("by", room, torch.int8)),
            *((name, far_room, torch.int64) for name in ("far index", "far")),
        )
        memory = [workspace.take(f"changed {name}", n, dtype, _CPU) for name, n, dtype in sizes]
        base, out, small = (tensor.data_ptr() for tensor in memory[:3])
        self._task = _Change(
            W=W.data_ptr(), rows=rows, cols=cols, high=high, start=start, base=base, out=out, small=small,
            fresh=_kept(memory[3:], 0, 0),
        )  # fmt: skip
        if back is not None:
            self._task.back = ctypes.pointer(back.fused.task(back.first))
            self._task.old = _kept(kept, len(kept[0]), len(kept[2]))
        if forth is not None:
            self._task.forth = ctypes.pointer(forth.fused.task(forth.first))
        self._function = _function(f"change_{_NAMES[W.dtype]}")
        self._fresh, self._held = memory[3:], (W, back, kept, forth, memory)  # which the task points to

    def run(self) -> int:
        """How many rows it has changed. Ends before rows in which something stays in doubt, or what undoes them would
        take more than they do."""
        return self._function(ctypes.byref(self._task))

    @property
    def used(self) -> tuple[int, int]:
        """How many of ``kept`` belong to those rows, and how many far ones."""
        return self._task.old.count, self._task.old.far_count

    @property
    def fresh(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What undoes ``forth`` in them: ``Corrections``."""
        near, far = self._task.fresh.count, self._task.fresh.far_count
        index, by, far_index, far_by = self._fresh
        return index[:near], by[:near], far_index[:far], far_by[:far]


def _kept(tensors: Sequence[Tensor], near: int, far: int) -> _Kept:
    index, by, far_index, far_by = (tensor.data_ptr() for tensor in tensors)
    return _Kept(index, by, near, far_index, far_by, far)


def _packed(right: Tensor) -> Tensor:
    """Panels of columns, each with all rows."""
    rank, columns = right.shape
    panels, whole = -(-columns // _PANEL), columns // _PANEL
    packed = right.new_zeros(panels, rank, _PANEL)
    packed[:whole] = right[:, : whole * _PANEL].reshape(rank, whole, _PANEL).transpose(0, 1)
    if whole < panels:
        packed[whole, :, : columns % _PANEL] = right[:, whole * _PANEL :]
    return packed


def places(x: Tensor) -> tuple[Tensor, Tensor]:
    """Where ``x`` (int8, 1-D, contiguous, on the CPU, of less than 2³¹) is not 0 (int32, ascending), and its values
    there (int8). Only where there is a ``library``."""
    data, n = ctypes.c_void_p(x.data_ptr()), ctypes.c_int64(len(x))
    count = _function("count")(data, n)
    index, values = (torch.empty(count + _FEW, dtype=dtype) for dtype in (torch.int32, torch.int8))
    _function("places")(data, n, ctypes.c_void_p(index.data_ptr()), ctypes.c_void_p(values.data_ptr()))
    return index[:count], values[:count]


def move(x: Tensor, index: Tensor, by: Tensor, start: int) -> None:
    """Moves the storage values of ``x``, of two or four bytes, at ``index``, counted from ``start``, each once, by so
    many places (``rounding.ordered``). ``index`` and ``by``: int32 and int8, or both int64. All 1-D, contiguous, on
    the CPU. Only where there is a ``library``."""
    given = (ctypes.c_void_p(tensor.data_ptr()) for tensor in (x, index, by))
    _function(f"move_{8 * x.itemsize}_{8 * by.itemsize}")(*given, ctypes.c_int64(len(index)), ctypes.c_int64(start))


def records(small: Tensor, raw: Tensor, wide: Tensor, block: int, into: Tensor) -> int:
    """The records of an undo journal [U3] for corrections ``small`` (int8), of which those that do not fit are in
    ``wide`` (int64), of the elements whose bytes are ``raw`` (uint8), in blocks of at most 65536 elements. Returns
    how many bytes it wrote: ``into`` (uint8) has room for those of ``raw`` and four a block.

    All 1-D, contiguous, on the CPU. Only where there is a ``library``.
    """
    width = len(raw) // max(1, len(small))
    x, of, by, to = (ctypes.c_void_p(tensor.data_ptr()) for tensor in (small, raw, wide, into))
    n, step, wides = (ctypes.c_int64(number) for number in (len(small), block, width))
    return _function("records")(x, n, step, of, wides, by, to)


def glance(before: Tensor, after: Tensor, x: Tensor, few: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over the rows of D = after - before, in float32 and in any order: D·xᵀ (rows, 4), ‖D‖ (rows, 1), and
    |after|·|x|ᵀ of the first ``few`` columns (rows, 4).

    ``before`` and ``after``: bfloat16 (rows, columns); ``x``: float32 (4, columns); all contiguous, on the CPU. Only
    where there is a ``library``.
    """
    rows, columns = before.shape
    residue, square, size = (torch.empty(rows, count) for count in (4, 1, 4))
    given = (ctypes.c_void_p(tensor.data_ptr()) for tensor in (before, after, x))
    sizes = (ctypes.c_int64(number) for number in (rows, columns, few))
    _function("glance")(*given, *sizes, *(ctypes.c_void_p(tensor.data_ptr()) for tensor in (residue, square, size)))
    return residue, square.sqrt_(), size


def computes(dtype_in: torch.dtype, dtype_out: torch.dtype, device: torch.device) -> bool:
    """Whether there is a ``Fused`` for these."""
    return library is not None and device.type == "cpu" and dtype_in in _NAMES and dtype_out in _NAMES
