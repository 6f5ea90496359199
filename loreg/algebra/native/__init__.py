"""The compiled form of one weight's low-rank edit, where it was built: ``merge.c``.

It gives what the passes of ``edits.py`` give, in one: sums in float64 within the same bound, each rounded once, and
those in doubt for the exact stage. Which of the two computed is of no meaning to a digest. Where no compiler was at
hand at installation there is no library, and torch computes.
"""

from __future__ import annotations

import ctypes
import hashlib
from pathlib import Path

import torch
from torch import Tensor

from loreg.algebra.passes import Candidates, Done
from loreg.algebra.rounding import Workspace

_PANEL = 16
_ROOM = 2**18
"""Doubtful elements that there is memory for: 6 MiB, of which only pages that are written count."""

_NAMES = {torch.bfloat16: "bf16", torch.float32: "f32"}


class _Doubtful(ctypes.Structure):
    _fields_ = (
        ("index", ctypes.c_void_p),
        ("near", ctypes.c_void_p),
        ("weight", ctypes.c_void_p),
        ("count", ctypes.c_int64),
    )


class _Screen(ctypes.Structure):
    _fields_ = (("tau", ctypes.c_uint64), ("top", ctypes.c_uint64), ("slack", ctypes.c_uint64))


class _Task(ctypes.Structure):
    """``struct task`` of merge.c."""

    _fields_ = (
        ("W", ctypes.c_void_p),
        ("to", ctypes.c_void_p),
        ("L", ctypes.c_void_p),
        ("R", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("cols", ctypes.c_int64),
        ("r", ctypes.c_int64),
        ("screen", _Screen),
        ("found", _Doubtful),
        ("room", ctypes.c_int64),
        ("small", ctypes.c_void_p),
        ("back", _Screen),
        ("unsure", _Doubtful),
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
    return found if source == hashlib.sha256(path.with_name("merge.c").read_bytes()).hexdigest() else None


library = _load()
"""None where there is none, or one of another version of ``merge.c``."""


class _Found:
    """Memory for elements in doubt, at a thread's disposal."""

    def __init__(self, use: str, room: int, workspace: Workspace) -> None:
        cpu = torch.device("cpu")
        self._index = workspace.take(f"{use} index", room, torch.int64, cpu)
        self._near = workspace.take(f"{use} near", room, torch.float64, cpu)
        self._were = workspace.take(f"{use} were", room, torch.float64, cpu)

    def given(self) -> _Doubtful:
        return _Doubtful(self._index.data_ptr(), self._near.data_ptr(), self._were.data_ptr(), 0)

    def taken(self, given: _Doubtful, first: int, columns: int) -> Candidates:
        index, near, were = (x[: given.count].clone() for x in (self._index, self._near, self._were))
        return Candidates(index // columns + first, index % columns, near, were)


class Fused:
    """W + left·right for one weight and one thread: ``left`` (m, R) and ``right`` (R, n) float64 on the CPU.

    ``dtypes``: W's and the output's. ``screens``: ``thresholds`` for what is rounded, and for what taking back the
    delta gives.
    """

    def __init__(
        self,
        left: Tensor,
        right: Tensor,
        dtypes: tuple[torch.dtype, torch.dtype],
        screens: tuple[tuple[int, int, int], tuple[int, int, int]],
        workspace: Workspace,
    ) -> None:
        self._function = getattr(library, "loreg_merge_" + "_".join(_NAMES[dtype] for dtype in dtypes))
        self._function.restype = ctypes.c_int64
        self._left, (rank, columns) = left.contiguous(), right.shape
        panels = -(-columns // _PANEL)
        packed = torch.zeros(panels, rank, _PANEL, dtype=torch.float64)
        whole = columns // _PANEL
        packed[:whole] = right[:, : whole * _PANEL].reshape(rank, whole, _PANEL).transpose(0, 1)
        if whole < panels:
            packed[whole, :, : columns % _PANEL] = right[:, whole * _PANEL :]
        self._right = packed
        room = max(_ROOM, 2 * columns)
        self._found, self._unsure = (_Found(use, room, workspace) for use in ("doubtful", "unsure"))
        self._task = _Task(
            R=packed.data_ptr(), cols=columns, r=rank, room=room,
            screen=_Screen(*screens[0]), back=_Screen(*screens[1]),
        )  # fmt: skip

    def rows(self, W: Tensor, first: int, out: Tensor, residual: Tensor | None = None) -> Done:
        """As ``Blocks.rows``, with at least one row done."""
        contiguous = W.is_contiguous() and out.is_contiguous()
        W, to = W.contiguous(), out if contiguous else torch.empty(out.shape, dtype=out.dtype)
        task = self._task
        task.W, task.to, task.L, task.rows = W.data_ptr(), to.data_ptr(), self._left[first:].data_ptr(), len(W)
        task.small = None if residual is None else residual.data_ptr()
        task.found, task.unsure = self._found.given(), self._unsure.given()
        done = self._function(ctypes.byref(task))
        if not contiguous:
            out[:done] = to[:done]
        found = self._found.taken(task.found, first, task.cols)
        return Done(done, found, None if residual is None else self._unsure.taken(task.unsure, first, task.cols))


def computes(dtype_in: torch.dtype, dtype_out: torch.dtype, device: torch.device) -> bool:
    """Whether there is a ``Fused`` for these."""
    return library is not None and device.type == "cpu" and dtype_in in _NAMES and dtype_out in _NAMES
