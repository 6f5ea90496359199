"""The edits of a live model, each on its own: applied in place, a tensor per thread and tile by tile, and taken back
bit for bit.

Rows are changed a step after the other (``algebra.changing``), so that an error leaves each element either as it was,
or edited and with what undoes that.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from loreg.algebra.changing import Changing, Kept, Space, step_of
from loreg.algebra.corrections import Corrections
from loreg.algebra.edits import Prepared, Stacked, WeightedSum
from loreg.algebra.launching import Undone
from loreg.algebra.rounding import Workspace
from loreg.errors import BadInput, CheckFailed
from loreg.format.methods import METHODS
from loreg.merge.combining import Combining
from loreg.merge.inputs import values
from loreg.serving.targets import Target
from loreg.tensors import NAMES

if TYPE_CHECKING:
    from loreg.serving.merging import Ahead, Together


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

    def is_beside(self, other: Edit) -> bool:
        """Whether both are of one tensor, and edit it in one shape."""
        return self.target.place.span == other.target.place.span and self.view == other.view

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
    """Rows that were edited, and what undoes that; None where they were not."""

    first: int
    rows: int
    kept: Kept | Undone | None


class Editing:
    """One edit that is applied, and taken back. ``nbytes``: of what is kept for that."""

    def __init__(self, edit: Edit, ahead: weakref.ref[Ahead] | None = None) -> None:
        self.edit, self.ahead = edit, ahead
        self.together: Together | None = None  # what has begun to change its tensor, with others
        self.pieces: list[Piece] = []
        self.turn = threading.Lock()
        self.over = False  # by its undoing: nothing may apply it then
        self.torn = False  # nothing may be taken back then

    @property
    def nbytes(self) -> int:
        return sum(piece.kept.nbytes for piece in self.pieces if piece.kept is not None)

    @torch.inference_mode()
    def apply(self, space: Space) -> None:
        with self.turn:
            if self.over:  # by an error elsewhere, of which this thread does not know yet
                return
            try:
                self._apply(space)
            except BadInput as error:
                raise type(error)(f"Tensor {self.edit.target.place.name!r}: {error}") from error

    def _apply(self, space: Space) -> None:
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
        prepared = self._prepare(value, weight, space.first, residual=original is None)
        if original is None:
            self._advance(_all(rows), Changing(None, prepared, space), self)
            return
        # What an edit of the base's own values did is not known without them [U2].
        self.pieces.append(Piece(0, len(rows), original))
        for first, height, _ in _all(rows, step_of(rows)):
            W = rows[first : first + height]
            out = space.first.take("out", W.numel(), W.dtype, W.device).view(W.shape)
            prepared.tile(W, first, out)
            W.copy_(out)

    @torch.inference_mode()
    def undo(self, space: Space) -> None:
        """May be called again where it was interrupted. Not of what has begun with others."""
        with self.turn:
            self.over = True
            if self.together is not None:
                return
            weight = self.edit.target.place.weight
            predicts = any(isinstance(piece.kept, Corrections | Undone) for piece in self.pieces)
            back = self._prepared(weight, space.first, back=True) if predicts else None
            self._advance(self.pieces, Changing(back, None, space))

    @torch.inference_mode()
    def give_way(self, other: Editing, space: Space) -> None:
        """Each row that this has edited is taken back and edited by ``other``, of the same tensor; both ``tiled``."""
        weight = self.edit.target.place.weight
        back, forth = self._prepared(weight, space.first, back=True), other._prepared(weight, space.second)
        self._advance(self.pieces, Changing(back, forth, space), other)

    def _advance(self, todo: list[Piece], changing: Changing, other: Editing | None = None) -> None:
        """Changes what is to do, from the last piece on: each step takes rows from there, and adds them to the pieces
        of ``other``."""
        if self.torn:
            raise CheckFailed(
                f"{self.edit.target.place.name!r} was changed by a step that failed before what undoes it was kept: "
                "load the model again."
            )
        rows = self.rows(self.edit.target.place.weight)
        try:
            while todo:
                first, height, kept = todo[-1]
                kept = kept.corrections() if isinstance(kept, Undone) else kept
                step = changing.step(rows[first : first + height], first, kept)
                if other is not None and step.fresh is not None:
                    other.pieces.append(Piece(first, step.rows, step.fresh))
                first, height = first + step.rows, height - step.rows
                todo[-1:] = [Piece(first, height, step.rest)] if height else []
                changing.recorded(step)
        except BaseException:
            for editing in (self, other or self):
                editing.torn |= changing.torn
            raise

    @property
    def tiled(self) -> bool:
        """Whether each tile is edited on its own: a sum that reads nothing of the weight."""
        return self.edit.plain is not None

    @property
    def whole(self) -> Undone | None:
        """What undoes all of it, where that was launched."""
        kept = [piece.kept for piece in self.pieces if isinstance(piece.kept, Undone)]
        return kept[0] if kept else None

    def rows(self, weight: Tensor) -> Tensor:
        """The weight as rows, those of a stack counted through all of it."""
        view = self.edit.view
        return weight.view(-1, view[-1]) if len(view) > 1 and weight.numel() else weight.view(-1)

    def _prepared(self, weight: Tensor, workspace: Workspace, back: bool = False) -> Prepared | Stacked:
        """The edit, or what takes it back, of one that reads nothing of the weight."""
        value = self.edit.load(no_base)
        return self._prepare(-value if back else value, weight, workspace, residual=not back)

    def _prepare(
        self, value: WeightedSum, weight: Tensor, workspace: Workspace, residual: bool
    ) -> Prepared | Stacked:
        view, on_device = self.edit.view, weight.device.type == "cuda"
        return value.prepare(
            view, weight.dtype, weight.dtype, weight.device, workspace=workspace, residual=residual,
            tile_rows_hint=step_of(self.rows(weight)) if on_device else None,
        )  # fmt: skip


def _all(rows: Tensor, step: int | None = None) -> list[Piece]:
    """All of them, none of which is edited."""
    height = len(rows) if rows.numel() else 0
    step = step or height or 1
    return [Piece(first, min(step, height - first), None) for first in range(0, height, step)]


class ReadsBase(BadInput):
    """Of an edit that is to be known without the base's own values."""


def no_base() -> Tensor:
    raise ReadsBase("an edit that is to be known without the base's own values reads them.")
