"""How much of the machine a merge takes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

TILE_BYTES = 8 << 20
"""What a thread reads, computes, hashes and writes at once: the steps are few then, and any machine has so much."""


@dataclass(frozen=True, slots=True)
class Resources:
    """The device that computes, the threads that read and write for it, and what each takes at once."""

    device: torch.device
    threads: int
    tile_bytes: int = TILE_BYTES

    @classmethod
    def of(cls, device: torch.device, threads: int | None = None) -> Resources:
        """As many threads as torch would use, unless ``threads`` says how many."""
        return cls(device, threads or torch.get_num_threads(), TILE_BYTES)
