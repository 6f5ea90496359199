"""The compiled form of one weight's low-rank edit, where it was built: ``merge.c``.

It gives what the passes of ``edits.py`` give, in one: sums in float64 within the same bound, each rounded once, and
those in doubt for the exact stage. Which of the two computed is of no meaning to a digest. Where no compiler was at
hand at installation there is no library, and torch computes.
"""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from loreg.algebra.passes import Candidates
from loreg.algebra.rounding import Workspace, thresholds

_PANEL = 16
_ROOM = 2**18
"""Doubtful elements that there is memory for: 6 MiB, of which only pages that are written count."""

_NAMES = {torch.bfloat16: "bf16", torch.float32: "f32"}
_ARGUMENTS = [*4 * [ctypes.c_void_p], *3 * [ctypes.c_int64], *3 * [ctypes.c_uint64], *3 * [ctypes.c_void_p]]
_ARGUMENTS += [ctypes.c_int64, ctypes.c_void_p]


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


class Fused:
    """W + left·right for one weight and one thread: ``left`` (m, R) and ``right`` (R, n) float64 on the CPU."""

    def __init__(
        self,
        left: Tensor,
        right: Tensor,
        dtype_in: torch.dtype,
        dtype_out: torch.dtype,
        eta: float,
        spread: float,
        workspace: Workspace,
    ) -> None:
        self._function = _function(dtype_in, dtype_out)
        self._left, (self._rank, self._columns) = left.contiguous(), right.shape
        panels = -(-self._columns // _PANEL)
        packed = torch.zeros(panels, self._rank, _PANEL, dtype=torch.float64)
        whole = self._columns // _PANEL
        packed[:whole] = right[:, : whole * _PANEL].reshape(self._rank, whole, _PANEL).transpose(0, 1)
        if whole < panels:
            packed[whole, :, : self._columns % _PANEL] = right[:, whole * _PANEL :]
        self._right = packed
        self._thresholds = thresholds(dtype_out, eta, spread)
        room = max(_ROOM, 2 * self._columns)
        cpu = torch.device("cpu")
        self._found = (
            workspace.take("doubtful", room, torch.int64, cpu),
            workspace.take("near", room, torch.float64, cpu),
            workspace.take("were", room, torch.float64, cpu),
        )

    def rows(self, W: Tensor, first: int, out: Tensor) -> tuple[int, Candidates]:
        """As ``Blocks.rows``, with at least one row done."""
        count = ctypes.c_int64()
        contiguous = W.is_contiguous() and out.is_contiguous()
        W, to = W.contiguous(), out if contiguous else torch.empty(out.shape, dtype=out.dtype)
        done = self._function(
            W.data_ptr(), to.data_ptr(), self._left[first:].data_ptr(), self._right.data_ptr(), len(W),
            self._columns, self._rank, *self._thresholds, *(x.data_ptr() for x in self._found),
            len(self._found[0]), ctypes.addressof(count),
        )  # fmt: skip
        if not contiguous:
            out[:done] = to[:done]
        index, near, were = (x[: count.value].clone() for x in self._found)
        return done, Candidates(index // self._columns + first, index % self._columns, near, were)


def computes(dtype_in: torch.dtype, dtype_out: torch.dtype, device: torch.device) -> bool:
    """Whether there is a ``Fused`` for these."""
    return library is not None and device.type == "cpu" and dtype_in in _NAMES and dtype_out in _NAMES


def _function(dtype_in: torch.dtype, dtype_out: torch.dtype) -> Callable[..., int]:
    function = getattr(library, f"loreg_merge_{_NAMES[dtype_in]}_{_NAMES[dtype_out]}")
    function.restype, function.argtypes = ctypes.c_int64, _ARGUMENTS
    return function  # type: ignore[no-any-return]
