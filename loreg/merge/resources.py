"""How much of the machine a merge takes."""

from __future__ import annotations

import resource
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from loreg.errors import UsageError
from loreg.format.terms import LowRankTerm
from loreg.merge.rereading import DESK_BYTES
from loreg.tensors import torch_dtype

if TYPE_CHECKING:
    from loreg.merge.layout import OutputTensor
    from loreg.merge.plan import MergePlan

TILE_BYTES = 2 << 20
"""What a thread reads, computes, hashes and writes at once: the steps are few, and each finds it in the cache."""
_DEVICE_TILES = 4
"""So many of them at once for a GPU, whose launches cost the same however much they compute."""
_LEAST_TILE = 256 << 10
_PER_THREAD = 16 << 20
"""For blocks in float64 and for elements in doubt."""
_RESERVE = 32 << 20
"""For all that is not counted: Python's own objects, what the allocator keeps, the manifest of the result."""


@dataclass(frozen=True, slots=True)
class Resources:
    """The device that computes, the threads that read and write for it, and what each takes at once."""

    device: torch.device
    threads: int
    tile_bytes: int

    @classmethod
    def of(
        cls,
        device: torch.device,
        plans: Sequence[MergePlan] = (),
        *,
        threads: int | None = None,
        memory: int | None = None,
        verify: bool = True,
    ) -> Resources:
        """As many threads as torch would use, unless ``threads`` says how many, and fewer if ``memory`` has room for
        fewer only: bytes that this whole process is to be resident with at most. ``verify``: whether the threads are
        to verify too. Raises UsageError if it is too little for ``plans``.
        """
        wanted = threads or torch.get_num_threads()
        whole = TILE_BYTES if device.type == "cpu" else _DEVICE_TILES * TILE_BYTES
        if memory is None:
            return cls(device, wanted, whole)
        fixed, per_byte = _needs(plans)
        fixed += DESK_BYTES if verify else 0
        left = memory - _resident() - _RESERVE
        for count in range(wanted, 0, -1):
            tile = int((left / count - fixed) / per_byte)
            if tile >= (whole if count > 1 else _LEAST_TILE):
                return cls(device, count, min(tile, whole))
        least = memory - left + fixed + int(per_byte * _LEAST_TILE)
        raise UsageError(
            f"{memory:,} bytes of memory are too little: this merge needs {least:,}, of which {_resident():,} are "
            "taken before it begins."
        )


def _needs(plans: Sequence[MergePlan]) -> tuple[int, float]:
    """Bytes that a thread needs for the tensor that needs most of them, besides its tiles; and for each byte of a
    tile."""
    fixed: dict[str, int] = {}
    per_byte: dict[str, float] = {}
    for plan in plans:
        for tensor in plan.changed:
            if tensor.stored is not None:
                name = tensor.stored.info.name
                fixed[name] = fixed.get(name, 0) + _factors(tensor)
                wide = torch_dtype(tensor.info.dtype, name).itemsize
                per_byte[name] = per_byte.get(name, 1.0) + wide / torch_dtype(tensor.stored.info.dtype, name).itemsize
    return max(fixed.values(), default=0) + _PER_THREAD, max(per_byte.values(), default=1.0)


def _factors(tensor: OutputTensor) -> int:
    """Bytes of an edit's operands: low-rank factors as they are stored and twice in float64, a dense delta as a few
    matrices in float64."""
    view = tensor.edit.view(tensor.info.shape)
    rank, dense = 0, 0
    for part in tensor.edit.parts:
        terms = part.adapter.manifest.modules[part.weight].terms if part.weight else ()
        rank += sum(term.rank for term in terms if isinstance(term, LowRankTerm))
        dense += part.full is not None or not all(isinstance(term, LowRankTerm) for term in terms)
    return 3 * 8 * rank * sum(view[-2:]) + (8 * (dense + 3) * prod(view[-2:]) if dense else 0)


def _resident() -> int:
    """Bytes of this process that are in memory now."""
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
