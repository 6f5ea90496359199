"""End-to-end cases: an adapter of every variant, trained by nobody, written by the library that defines it.

A case builds a tiny base and an adapter with that library, random and not zero, and computes outputs with base and
adapter side by side, unmerged. ``tests/peers/test_variants.py`` takes each through import, merge, unmerge, compose
and export, and ``spec/variants.md`` is the table of what it found.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Built:
    """A case on disk.

    ``expected``: the library's own outputs, unmerged. ``run``: the outputs of the model in a directory, on the same
    inputs. ``push``: further arguments of ``Registry.push``. ``reload``: loads an exported PEFT directory beside the
    base and gives the outputs; None where the library cannot be given one.
    """

    base: Path
    adapter: Path
    expected: torch.Tensor
    run: Callable[[Path], torch.Tensor]
    push: Mapping[str, Any] = field(default_factory=dict)
    reload: Callable[[Path], torch.Tensor] | None = None


@dataclass(frozen=True)
class Case:
    """A row of the table. ``refused``: a pattern that the refusal of the import has to match; such an adapter has no
    other columns. ``note``: what a reader should know, such as where the library is wrong. ``tolerance``: largest
    allowed difference of an output, relative to the largest output, for float32 bases."""

    variant: str
    library: str
    build: Callable[[Path], Built]
    refused: str | None = None
    note: str = ""
    tolerance: float = 2e-5

    @property
    def id(self) -> str:
        return f"{self.library}: {self.variant}"


def cases() -> list[Case]:
    """Every case, in the order of the table."""
    import importlib
    import pkgutil

    found: list[Case] = []
    for module in sorted(
        info.name for info in pkgutil.iter_modules(__path__) if info.name not in ("table", "models")
    ):
        found += importlib.import_module(f"{__name__}.{module}").CASES
    return found
