"""An adapter whose names are tied to a checkpoint: what ``binding`` yields."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from loreg.adapters.draft import DraftModule, RawTensor
from loreg.format.manifest import Tie


@dataclass(frozen=True, slots=True)
class BoundModule:
    """A module of the draft, and the checkpoint tensors that it adapts.

    ``out_in``: the size of the weight, or of each of a stack. ``stored``: its shape in the checkpoint, where that is
    no matrix.
    """

    draft: DraftModule
    tensor: str
    kind: str
    orientation: str
    out_in: tuple[int, int]
    bias_tensor: str | None
    stored: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class BoundFull:
    """A tensor that is replaced, or added if the checkpoint has none of its name."""

    tensor: RawTensor
    module: str
    added: bool


@dataclass(frozen=True, slots=True)
class Binding:
    """``modules`` by path in the model, ``full`` and ``ties`` by name in the checkpoint.

    ``copies``: key of a tensor that the adapter holds once more → the name in ``full`` under which it is.
    """

    modules: Mapping[str, BoundModule]
    full: Mapping[str, BoundFull]
    ties: Mapping[str, Tie]
    copies: Mapping[str, str] = field(default_factory=dict)
