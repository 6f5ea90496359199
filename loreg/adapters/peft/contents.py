"""What the tensors of a PEFT adapter mean: the common result of all its readers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from loreg.adapters.draft import DraftModule, Locate, RawTensor

PREFIX = "base_model.model."

Config: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Contents:
    """``modules`` by module path, ``full`` by tensor path.

    ``together``: keys of ``full`` tensors that replace a tied weight in both its places. ``unused``: keys of tensors
    that change nothing in the model, or say again what another does; the file is then kept in one piece, so that it
    can be given back. ``locate``: as in ``Draft``.
    """

    modules: Mapping[str, DraftModule]
    full: Mapping[str, RawTensor]
    together: frozenset[str] = frozenset()
    unused: frozenset[str] = frozenset()
    locate: Locate | None = None


ReadContents: TypeAlias = Callable[[Mapping[str, RawTensor], Config, Path], Contents]
"""(tensors by key, config, the config's path for messages) → contents. Raises BadInput, Unsupported."""
