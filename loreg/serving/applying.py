"""The edits of a live model, each on its own: applied in place, a tensor per thread and tile by tile, and taken back
bit for bit.

A tile is computed beside the weight and copied onto it when it is right, so that an error leaves each element either
as it was, or edited and with what undoes that.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from loreg.algebra.corrections import Corrections
from loreg.algebra.edits import Prepared, Stacked, WeightedSum
from loreg.algebra.rounding import Workspace
from loreg.errors import BadInput
from loreg.format.methods import METHODS
from loreg.merge.combining import Combining
from loreg.merge.inputs import values
from loreg.serving.targets import Target
from loreg.tensors import NAMES

if TYPE_CHECKING:
    from loreg.serving.merging import Ahead, Returning

_TILE_BYTES = {"cpu": 2 << 20, "cuda": 32 << 20}
"""Of a weight, worked on at once: few steps, and on a CPU what is computed is still in cache when it is copied."""


class Space(threading.local):
    """What a thread computes in."""

    def __init__(self) -> None:
        self.workspace = Workspace()
        self.other = Workspace()  # of a second edit, that goes on from what the first has made of a tile


@dataclass(frozen=True, slots=True, eq=False)
class Edit:
    """A target with ``combining``, and its edit as a value where that is small: LoRA, which reads nothing of W."""

    target: Target
    combining: Combining
    plain: WeightedSum | None

    @classmethod
    def of(cls, target: Target, combining: Combining) -> Edit:
        modules = [
            part.adapter.manifest.modules[path]
            for part in target.edit.parts
            for path in (part.weight, part.bias)
            if path is not None
        ]
        replaces = any(part.full is not None for part in target.edit.parts)
        is_sum = METHODS[combining.method].keeps_terms and not replaces and all(m.exact for m in modules)
        bare = cls(target, combining, None)
        value = None
        if is_sum:
            with suppress(ReadsBase):
                value = bare.load(no_base)
        is_small = value is not None and (not value.dense or all(m.plain for m in modules))
        return cls(target, combining, value) if is_small else bare

    @property
    def view(self) -> tuple[int, ...]:
        """The shape in which the weight is edited."""
        return self.target.edit.view(self.target.place.shape)

    def load(self, before: Callable[[], Tensor]) -> WeightedSum:
        """The edit as a value, on the weight's device or to be brought there. ``before``: brings the weight."""
        if self.plain is not None:
            return self.plain
        place = self.target.place
        return self.target.edit.load(
            self.target.name, place.shape, before, self.combining, torch.device(place.tensor.device)
        )

    def replacement(self) -> Tensor | None:
        """What simply takes the weight's place [A5]."""
        part = self.target.edit.replaces() if METHODS[self.combining.method].keeps_terms else None
        if part is None or part.full is None or part.replacement is None:
            return None
        if part.replacement.value.dtype != NAMES.get(self.target.place.tensor.dtype):
            return None
        return values(part.adapter.full_tensor(part.full))


class Piece(NamedTuple):
    """Rows that were edited, and what undoes that: what the prediction misses, or the original."""

    first: int
    rows: int
    kept: Corrections | Tensor


class Editing:
    """One edit that is applied, and taken back. ``nbytes``: of what is kept for that."""

    def __init__(self, edit: Edit, ahead: weakref.ref[Ahead] | None = None) -> None:
        self.edit, self.ahead = edit, ahead
        self.returning: Returning | None = None  # what has begun to undo it, together with others
        self.pieces: list[Piece] = []
        self.turn = threading.Lock()
        self.over = False  # by its undoing: nothing may apply it then

    @property
    def nbytes(self) -> int:
        return sum(piece.kept.nbytes for piece in self.pieces)

    @torch.inference_mode()
    def apply(self, space: Space) -> None:
        with self.turn:
            if self.over:  # by an error elsewhere, of which this thread does not know yet
                return
            try:
                self._apply(space.workspace)
            except BadInput as error:
                raise type(error)(f"Tensor {self.edit.target.place.name!r}: {error}") from error

    def _apply(self, workspace: Workspace) -> None:
        weight = self.edit.target.place.weight
        if (replacement := self.edit.replacement()) is not None:
            self.pieces.append(Piece(0, len(self.rows(weight)), weight.clone()))
            weight.copy_(replacement)
            return
        original: Tensor | None = None

        def before() -> Tensor:
            nonlocal original
            original = weight.clone() if original is None else original
            return original

        value, rows = self.edit.load(before), self.rows(weight)
        if original is not None:  # What an edit of the base's own values did is not known without them [U2].
            self.pieces.append(Piece(0, len(rows), original))
        prepared = self._prepare(value, weight, workspace, residual=original is None)
        for first, W in _tiles(rows):
            out = workspace.take("out", W.numel(), W.dtype, W.device).view(W.shape)
            if original is not None:
                prepared.tile(W, first, out)
                W.copy_(out)
                continue
            piece = self.piece(prepared, W, first, out, workspace)
            W.copy_(out)
            self.pieces.append(piece)

    @property
    def tiled(self) -> bool:
        """Whether each tile is edited on its own: a sum that reads nothing of the weight."""
        return self.edit.plain is not None

    def prepared(self, weight: Tensor, workspace: Workspace, back: bool = False) -> Prepared | Stacked:
        """The edit of a tile, or what takes it back; of one that is ``tiled``."""
        value = self.edit.load(no_base)
        return self._prepare(-value if back else value, weight, workspace, residual=not back)

    def piece(self, prepared: Prepared | Stacked, W: Tensor, first: int, out: Tensor, workspace: Workspace) -> Piece:
        """Rows from the ``first``, edited into ``out``, and what undoes that. Writes nothing else."""
        small = workspace.take("residual", W.numel(), torch.int8, W.device)
        kept: Corrections | Tensor = Corrections.of(small, prepared.tile(W, first, out, small.view(W.shape)))
        if kept.nbytes >= W.nbytes:
            kept = W.clone()
        return Piece(first, len(W), kept)

    @property
    def whole(self) -> Corrections | None:
        """What undoes all of it, where that is one piece, and no original."""
        if len(self.pieces) != 1:
            return None
        first, height, kept = self.pieces[0]
        complete = first == 0 and height == len(self.rows(self.edit.target.place.weight))
        return kept if complete and isinstance(kept, Corrections) else None

    @torch.inference_mode()
    def undo(self, space: Space) -> None:
        """May be called again where it was interrupted."""
        with self.turn:
            self.over = True
            weight, workspace = self.edit.target.place.weight, space.workspace
            rows = self.rows(weight)
            prepared: Prepared | Stacked | None = None
            while self.pieces:
                first, height, kept = self.pieces[-1]
                W = rows[first : first + height]
                if isinstance(kept, Tensor):
                    W.copy_(kept.view(W.shape))
                else:
                    if prepared is None:
                        prepared = self.prepared(weight, workspace, back=True)
                    out = workspace.take("out", W.numel(), W.dtype, W.device).view(W.shape)
                    prepared.tile(W, first, out)
                    kept.to(W.device).add_to(out.view(-1))
                    W.copy_(out)
                self.pieces.pop()

    def rows(self, weight: Tensor) -> Tensor:
        """The weight as rows, those of a stack counted through all of it."""
        view = self.edit.view
        return weight.view(-1, view[-1]) if len(view) > 1 else weight.view(-1)

    def _prepare(
        self, value: WeightedSum, weight: Tensor, workspace: Workspace, residual: bool = False
    ) -> Prepared | Stacked:
        view, on_device = self.edit.view, weight.device.type == "cuda"
        return value.prepare(
            view, weight.dtype, weight.dtype, weight.device, workspace=workspace, residual=residual,
            tile_rows_hint=_step(self.rows(weight)) if on_device else None,
        )  # fmt: skip


class ReadsBase(BadInput):
    """Of an edit that is to be known without the base's own values."""


def no_base() -> Tensor:
    raise ReadsBase("an edit that is to be known without the base's own values reads them.")


def _step(rows: Tensor) -> int:
    """How many are one tile."""
    row = prod(rows.shape[1:]) * rows.itemsize
    return max(1, _TILE_BYTES[rows.device.type] // max(1, row))


def _tiles(rows: Tensor) -> Iterator[tuple[int, Tensor]]:
    if rows.numel():
        for first in range(0, len(rows), step := _step(rows)):
            yield first, rows[first : first + step]
