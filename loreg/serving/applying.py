"""The edits of a live model: applied in place, a tensor per thread and tile by tile, and taken back bit for bit.

A tile is computed beside the weight and copied onto it when it is right, so that an error leaves each element either
as it was, or edited and with what undoes that.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from loreg.algebra.corrections import Corrections
from loreg.algebra.edits import Prepared, Stacked, WeightedSum
from loreg.algebra.rounding import Workspace
from loreg.errors import BadInput
from loreg.format.methods import METHODS
from loreg.merge.combining import Combining
from loreg.merge.inputs import values
from loreg.merge.workers import results, workers
from loreg.serving.targets import Target
from loreg.tensors import NAMES

_TILE_BYTES = {"cpu": 8 << 20, "cuda": 32 << 20}
"""Of a weight, worked on at once: few steps, and on a CPU what is computed is still in cache when it is copied."""


class Space(threading.local):
    """What a thread computes in."""

    def __init__(self) -> None:
        self.workspace = Workspace()


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
        is_plain = METHODS[combining.method].keeps_terms and not replaces and all(m.plain for m in modules)
        bare = cls(target, combining, None)
        return cls(target, combining, bare.load(_no_base)) if is_plain else bare

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


class _Piece(NamedTuple):
    """Rows that were edited, and what undoes that: what the prediction misses, or the original."""

    first: int
    rows: int
    kept: Corrections | Tensor


class Editing:
    """One edit that is applied, and taken back. ``nbytes``: of what is kept for that."""

    def __init__(self, edit: Edit) -> None:
        self.edit = edit
        self._pieces: list[_Piece] = []
        self._turn = threading.Lock()
        self._over = False

    @property
    def nbytes(self) -> int:
        return sum(piece.kept.nbytes for piece in self._pieces)

    @torch.inference_mode()
    def apply(self, space: Space) -> None:
        with self._turn:
            if self._over:  # by an error elsewhere, of which this thread does not know yet
                return
            try:
                self._apply(space.workspace)
            except BadInput as error:
                raise type(error)(f"Tensor {self.edit.target.place.name!r}: {error}") from error

    def _apply(self, workspace: Workspace) -> None:
        weight = self.edit.target.place.weight
        if (replacement := self.edit.replacement()) is not None:
            self._pieces.append(_Piece(0, len(self._rows(weight)), weight.clone()))
            weight.copy_(replacement)
            return
        original: Tensor | None = None

        def before() -> Tensor:
            nonlocal original
            original = weight.clone() if original is None else original
            return original

        value, rows = self.edit.load(before), self._rows(weight)
        if original is not None:  # What an edit of the base's own values did is not known without them [U2].
            self._pieces.append(_Piece(0, len(rows), original))
        prepared = self._prepare(value, weight, workspace, residual=original is None)
        for first, W in _tiles(rows):
            out = workspace.take("out", W.numel(), W.dtype, W.device).view(W.shape)
            if original is not None:
                prepared.tile(W, first, out)
                W.copy_(out)
                continue
            small = workspace.take("residual", W.numel(), torch.int8, W.device)
            kept: Corrections | Tensor = Corrections.of(small, prepared.tile(W, first, out, small.view(W.shape)))
            if kept.nbytes >= W.nbytes:
                kept = W.clone()
            W.copy_(out)
            self._pieces.append(_Piece(first, len(W), kept))

    @torch.inference_mode()
    def undo(self, space: Space) -> None:
        """May be called again where it was interrupted."""
        with self._turn:
            self._over = True
            weight, workspace = self.edit.target.place.weight, space.workspace
            rows = self._rows(weight)
            prepared: Prepared | Stacked | None = None
            while self._pieces:
                first, height, kept = self._pieces[-1]
                W = rows[first : first + height]
                if isinstance(kept, Tensor):
                    W.copy_(kept.view(W.shape))
                else:
                    if prepared is None:
                        prepared = self._prepare(-self.edit.load(_no_base), weight, workspace)
                    out = workspace.take("out", W.numel(), W.dtype, W.device).view(W.shape)
                    prepared.tile(W, first, out)
                    kept.to(W.device).add_to(out.view(-1))
                    W.copy_(out)
                self._pieces.pop()

    def _rows(self, weight: Tensor) -> Tensor:
        """The weight as rows, those of a stack counted through all of it."""
        view = self.edit.view
        return weight.view(-1, view[-1]) if len(view) > 1 else weight.view(-1)

    def _prepare(
        self, value: WeightedSum, weight: Tensor, workspace: Workspace, residual: bool = False
    ) -> Prepared | Stacked:
        view, on_device = self.edit.view, weight.device.type == "cuda"
        return value.prepare(
            view, weight.dtype, weight.dtype, weight.device, workspace=workspace, residual=residual,
            tile_rows_hint=_step(self._rows(weight)) if on_device else None,
        )  # fmt: skip


def _no_base() -> Tensor:
    raise BadInput("an edit that is to be known without the base's own values reads them.")


def _step(rows: Tensor) -> int:
    """How many are one tile."""
    row = prod(rows.shape[1:]) * rows.itemsize
    return max(1, _TILE_BYTES[rows.device.type] // max(1, row))


def _tiles(rows: Tensor) -> Iterator[tuple[int, Tensor]]:
    if rows.numel():
        for first in range(0, len(rows), step := _step(rows)):
            yield first, rows[first : first + step]


def merge(edits: Sequence[Edit], threads: int | None) -> list[Editing]:
    """All of them, or none: whatever is raised, every element is then what it was."""
    editings = [Editing(edit) for edit in edits]
    space = Space()
    try:
        _run(editings, [partial(editing.apply, space) for editing in editings], threads)
    except BaseException:
        while True:
            try:
                unmerge(editings, threads)
                break
            except KeyboardInterrupt:  # a second one: half a model would be of no use to anybody
                continue
        raise
    return editings


def unmerge(editings: Sequence[Editing], threads: int | None) -> None:
    """What is not taken back yet; after an interruption it may be called again."""
    space = Space()
    _run(editings, [partial(editing.undo, space) for editing in editings], threads)


def _run(editings: Sequence[Editing], jobs: Sequence[Callable[[], None]], threads: int | None) -> None:
    """A job of each, those of one device after those of another."""
    by_device: dict[torch.device, list[Callable[[], None]]] = {}
    for editing, job in zip(editings, jobs, strict=True):
        by_device.setdefault(editing.edit.target.place.tensor.device, []).append(job)
    for device, here in by_device.items():
        if device.type == "cuda":  # the threads' streams are not the caller's
            torch.cuda.synchronize(device)
        with workers(device, threads if device.type == "cpu" else None) as pool:
            for _ in results(pool, here):
                pass
        if device.type == "cuda":
            torch.cuda.synchronize(device)
