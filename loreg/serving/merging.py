"""All edits of a live model, or none; and all of them taken back.

On a GPU what is a sum of LoRAs is launched for all weights together, in place, and the device waited for once
(``algebra.launching``). The rest follows, an edit after the other or a thread each (``applying``).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from loreg.algebra import gpu
from loreg.algebra.changing import Space
from loreg.algebra.corrections import Corrections
from loreg.algebra.edits import Prepared, Stacked
from loreg.algebra.launching import Launched, Work, launch
from loreg.errors import Conflict
from loreg.merge.workers import results, workers
from loreg.serving.applying import Edit, Editing, Piece

T = TypeVar("T")
_Key = tuple[torch.dtype, torch.device]


class Ahead:
    """The edits that are launched, prepared on the devices of their weights."""

    def __init__(self, edits: Sequence[Edit] = ()) -> None:
        self._prepared = {edit: (_key(edit), _prepared(edit)) for edit in edits if is_launched(edit)}

    def of(self, edit: Edit) -> Prepared | Stacked:
        """Prepared now, where the weight's dtype or device is another than it was."""
        key, prepared = self._prepared.get(edit, (None, None))
        return prepared if prepared is not None and key == _key(edit) else _prepared(edit)


def is_launched(edit: Edit) -> bool:
    weight, plain = edit.target.place.weight, edit.plain
    if plain is None or plain.dense or not weight.numel() or len(edit.view) < 2:
        return False
    return gpu.computes(plain.low_rank, weight.dtype, weight.dtype, weight.device)


def _key(edit: Edit) -> _Key:
    return edit.target.place.tensor.dtype, edit.target.place.tensor.device


def _prepared(edit: Edit) -> Prepared | Stacked:
    assert edit.plain is not None
    dtype, device = _key(edit)
    prepared = edit.plain.prepare(edit.view, dtype, dtype, device, residual=True)
    if isinstance(prepared, Stacked):
        _ = prepared.matrices
    return prepared


def _work(edit: Edit, prepared: Prepared | Stacked) -> Work:
    place = edit.target.place
    weight = place.weight.view(edit.view)
    return Work(prepared, weight, weight, place.name)


@contextmanager
def _turns(editings: Sequence[Editing]) -> Iterator[None]:
    with ExitStack() as stack:
        for editing in editings:
            stack.enter_context(editing.turn)
        yield


@torch.inference_mode()
def _apply(editings: Sequence[Editing], ahead: Ahead) -> None:
    """All or nothing."""
    with _turns(editings):
        if any(editing.over for editing in editings):
            return
        found = launch([_work(one.edit, ahead.of(one.edit)) for one in editings], residual=True).done()
        for editing, kept in zip(editings, found, strict=True):
            assert kept is not None  # with residuals
            editing.pieces.append(Piece(0, len(editing.rows(editing.edit.target.place.weight)), kept))
        _count_changes(editings)


class Returning:
    """Edits of one device that are taken back together, as far as each was applied as a whole."""

    def __init__(self, editings: Sequence[Editing]) -> None:
        self._editings = editings
        self._todo = list[tuple[Editing, Corrections, Tensor]]()
        self._launched: Launched | None = None
        self._computed = False

    @torch.inference_mode()
    def run(self) -> None:
        """Goes on where it was interrupted."""
        with _turns(self._editings):
            if self._launched is None:
                self._begin()
            self._check_place()
            if self._launched is not None and not self._computed:
                self._launched.start()
                self._launched.done()
                self._computed = True
            _count_changes([editing for editing, _, _ in self._todo])
            while self._todo:
                editing, kept, weight = self._todo[-1]
                kept.to(weight.device).add_to(weight.view(-1))
                editing.pieces.clear()
                editing.returning = None
                self._todo.pop()

    def _begin(self) -> None:
        works = list[Work]()
        for editing in self._editings:
            editing.over = True
            if (kept := editing.whole) is not None:
                ahead = editing.ahead() if editing.ahead is not None else None
                work = _work(editing.edit, -(ahead or Ahead()).of(editing.edit))
                works.append(work)
                self._todo.append((editing, kept, work.W))
        self._launched = Launched(works, residual=False)
        for editing, _, _ in self._todo:
            editing.returning = self

    def _check_place(self) -> None:
        for editing, _, weight in self._todo:
            place = editing.edit.target.place
            if place.weight.data_ptr() != weight.data_ptr() or place.weight.device != weight.device:
                raise Conflict(
                    f"{place.name!r} was moved while a merge was half taken out of it, which cannot go on there: "
                    "load the model again."
                )


def _count_changes(editings: Sequence[Editing]) -> None:
    """As torch counts changes in place, of which it does not see those of a kernel."""
    for tensor in {id(one.edit.target.place.tensor): one.edit.target.place.tensor for one in editings}.values():
        if not tensor.is_inference():
            torch.autograd.graph.increment_version(tensor)


def merge(
    edits: Sequence[Edit],
    threads: int | None,
    ahead: Ahead,
    done: Callable[[list[Editing]], T],
    restored: Callable[[], None],
) -> T:
    """What ``done`` gives, when all of them are applied. All, or none: whatever is raised, by ``done`` too, every
    element is then what it was, and ``restored`` was called.

    Unless the way back fails as well, of which the error is then: what can be known of the weights is that they were
    changed.
    """
    editings = [Editing(edit, weakref.ref(ahead)) for edit in edits]
    space = Space()
    try:
        for device, here in _by_device(editings).items():
            launched, others = _divided(here)
            first = [partial(_apply, launched, ahead)] if launched else []
            run(device, threads, first, [partial(editing.apply, space) for editing in others])
        return done(editings)
    except BaseException:
        while True:
            try:
                unmerge(editings, threads)
                break
            except KeyboardInterrupt:  # a second one: half a model would be of no use to anybody
                continue
        restored()
        raise


def unmerge(editings: Sequence[Editing], threads: int | None) -> None:
    """What is not taken back yet; after an interruption it may be called again."""
    space = Space()
    for device, here in _by_device(editings).items():
        run(device, threads, _returning(here), [partial(editing.undo, space) for editing in here])


def _returning(editings: Sequence[Editing]) -> list[Callable[[], None]]:
    """What takes those back that are launched; what has begun goes on."""
    begun = {id(one.returning): one.returning for one in editings if one.returning is not None}
    launched, _ = _divided([one for one in editings if one.returning is None])
    return [one.run for one in (*begun.values(), *([Returning(launched)] if launched else []))]


def apply_here(editings: Sequence[Editing], ahead: Ahead, space: Space) -> None:
    """All of one device, in this thread. Where it fails some are applied, each as a whole or in part."""
    launched, others = _divided(editings)
    if launched:
        _apply(launched, ahead)
    for editing in others:
        editing.apply(space)


def undo_here(editings: Sequence[Editing], space: Space) -> None:
    """All of one device, in this thread. May be called again where it was interrupted."""
    for job in _returning(editings):
        job()
    for editing in editings:
        editing.undo(space)


def _by_device(editings: Sequence[Editing]) -> dict[torch.device, list[Editing]]:
    found: dict[torch.device, list[Editing]] = {}
    for editing in editings:
        found.setdefault(editing.edit.target.place.tensor.device, []).append(editing)
    return found


def _divided(editings: Sequence[Editing]) -> tuple[list[Editing], list[Editing]]:
    """Those that are launched, and the others."""
    here = [(editing, is_launched(editing.edit)) for editing in editings]
    return [editing for editing, launched in here if launched], [one for one, launched in here if not launched]


def run(device: torch.device, threads: int | None, *stages: Sequence[Callable[[], None]]) -> None:
    """One stage after the other, in threads, which no KeyboardInterrupt reaches."""
    if device.type == "cuda":  # the threads' streams are not the caller's
        torch.cuda.synchronize(device)
    with workers(device, threads if device.type == "cpu" else None) as pool:
        for jobs in stages:
            for _ in results(pool, jobs):
                pass
    if device.type == "cuda":
        torch.cuda.synchronize(device)
