"""What the sections share: how often, how large, and where."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.benchmarks.models import LLAMA_1B, LLAMA_7B, TINY, TINY_TWICE, Shape
from tests.benchmarks.pairs import Row
from tests.benchmarks.places import Place

MEMORY = Path("/dev/shm")
Line = str | Row
Lines = Iterator[Line]


@dataclass(frozen=True)
class Bench:
    """One run of the benchmarks. ``disk`` and ``memory`` are places of the model; ``small``: of a tiny one."""

    runs: int
    small: bool
    scratch: Path
    disk: Place
    memory: Place

    @property
    def places(self) -> tuple[Place, Place]:
        return self.disk, self.memory

    @property
    def larger(self) -> Place:
        """A base several times as large, of files without blocks."""
        return Place("disk", self.scratch / "larger", TINY_TWICE if self.small else LLAMA_7B, adapters=1, sparse=True)


@contextmanager
def opened(runs: int, small: bool, folder: Path | None) -> Iterator[Bench]:
    """A bench with its files under ``folder``, by default the temporary directory, and ``MEMORY``."""
    shape: Shape = TINY if small else LLAMA_1B
    with tempfile.TemporaryDirectory(prefix="loreg-benchmarks-", dir=folder) as scratch:
        shared = tempfile.mkdtemp(prefix="loreg-benchmarks-", dir=MEMORY) if MEMORY.is_dir() else None
        # Without it the place has no room, and says so.
        memory = Path(shared) if shared else MEMORY
        try:
            yield Bench(
                runs,
                small,
                Path(scratch),
                Place("disk", Path(scratch) / "disk", shape),
                Place("memory-backed", memory / "memory", shape),
            )
        finally:
            if shared:
                shutil.rmtree(shared)
