"""All edits of a live model, or none; and all of them taken back.

On a GPU what is a sum of LoRAs is launched for all weights together, in place, and the device waited for a few times,
however many they are (``algebra.launching``). The rest follows, an edit after the other or a thread each
(``applying``).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TypeVar

import torch

from loreg.algebra import gpu
from loreg.algebra.changing import Space
from loreg.algebra.edits import Prepared, Stacked
from loreg.algebra.launching import Launched, Work
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


Pair = tuple[Editing | None, Editing | None]
"""What is taken out of a tensor, and what is merged into it: in one pass, if it is both."""


class Together:
    """Edits of one device that are launched together, in place. No two pairs share memory.

    ``for_good``: nothing is merged, and there is no way back: what undid the old edits is gone with them.
    """

    def __init__(self, pairs: Sequence[Pair], ahead: Ahead | None = None, *, for_good: bool = False) -> None:
        self.old = [old for old, _ in pairs if old is not None]
        self._new = [new for _, new in pairs if new is not None]
        self._pairs, self._ahead, self._for_good = list(pairs), ahead or Ahead(), for_good
        self._begun: tuple[Launched, list[Work]] | None = None
        self._over = False

    @torch.inference_mode()
    def run(self, _space: Space) -> None:
        """Where this raises, it can be called again and goes on; or ``back`` can."""
        with self._turns():
            if self._over or any(editing.over for editing in self._new):
                return  # it is done; or an error elsewhere ended it, of which this thread does not know yet
            others = [editing for editing in self._all if editing.together not in (None, self)]
            if others and self._for_good:
                return  # they began while this was made: who asked for it looks again
            if others:
                name = others[0].edit.target.place.name
                raise Conflict(f"{name!r} is being changed by another thread: let that end, and do this again.")
            launched, works = self._start()
            found = launched.done()
            for (_, new), work, kept in zip(self._pairs, works, found, strict=True):
                if new is not None:
                    assert kept is not None  # with residuals
                    new.pieces.append(Piece(0, len(new.rows(work.W)), kept))
            for editing in self.old if self._for_good else ():
                editing.pieces.clear()
            self._over = True
            self._end()

    @torch.inference_mode()
    def back(self, _space: Space) -> None:
        """The tensors are again what they were, and the old edits undone by what undid them. May be called again
        where it failed."""
        with self._turns():
            self._over = True
            if self._begun is not None:
                self._check_places()
                _count_changes(self._all)
                self._begun[0].back()
                self._begun = None
            for editing in self._new:
                editing.pieces.clear()
            self._end()

    def settle(self, space: Space) -> None:
        """What has begun is done, or not done; its edits then have the pieces that they are undone by."""
        if self._for_good:
            self.run(space)
        else:
            self.back(space)

    @property
    def _all(self) -> list[Editing]:
        return [*self.old, *self._new]

    @contextmanager
    def _turns(self) -> Iterator[None]:
        with ExitStack() as stack:
            for editing in self._all:
                stack.enter_context(editing.turn)
            yield

    def _start(self) -> tuple[Launched, list[Work]]:
        for editing in self._all:
            editing.together = self
            editing.over |= self._for_good
        if self._begun is None:
            if self._for_good:  # others may have taken some back since
                self._pairs = [pair for pair in self._pairs if pair[0] is not None and pair[0].whole is not None]
            works = [self._work(*pair) for pair in self._pairs]
            self._begun = Launched(works, residual=True), works
        self._check_places()
        _count_changes(self._all)  # whatever becomes of them
        self._begun[0].start()
        return self._begun

    def _work(self, old: Editing | None, new: Editing | None) -> Work:
        edit, back = _edit(old, new), None
        if old is not None:
            ahead = old.ahead() if old.ahead is not None else None
            back = (ahead or self._ahead).of(old.edit)
        forth = None if new is None else self._ahead.of(new.edit)
        weight = edit.target.place.weight.view(edit.view)
        return Work(forth, weight, weight, edit.target.place.name, back, old.whole if old is not None else None)

    def _check_places(self) -> None:
        assert self._begun is not None
        for pair, work in zip(self._pairs, self._begun[1], strict=True):
            place = _edit(*pair).target.place
            if place.weight.data_ptr() != work.W.data_ptr() or place.weight.device != work.W.device:
                raise Conflict(
                    f"{place.name!r} was moved while a merge was half done in it, which cannot go on there: load the "
                    "model again."
                )

    def _end(self) -> None:
        for editing in self._all:
            editing.together = None


def _edit(old: Editing | None, new: Editing | None) -> Edit:
    """Whose tensor it is."""
    found = new if new is not None else old
    assert found is not None
    return found.edit


def go_together(old: Sequence[Editing], new: Sequence[Editing]) -> bool:
    """Whether edits that share memory, of either side, are a pair that can be launched."""
    if len(old) > 1 or len(new) > 1 or not all(is_launched(each.edit) for each in (*old, *new)):
        return False
    for one in old:
        if one.together is not None or one.whole is None or one.whole.device != one.edit.target.place.tensor.device:
            return False
    return all(
        one.edit.is_beside(other.edit) and _single(one.edit) == _single(other.edit) for one in old for other in new
    )


def _single(edit: Edit) -> bool:
    assert edit.plain is not None
    dtype = edit.target.place.tensor.dtype
    return gpu.single(edit.plain.low_rank, (dtype, dtype))


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
            first = [partial(Together([(None, one) for one in launched], ahead).run, space)] if launched else []
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
        for stage in _undoing(here, space):
            run(device, threads, stage)


def _undoing(editings: Sequence[Editing], space: Space) -> Iterator[list[Callable[[], None]]]:
    """What takes back edits of one device; each stage when those before it are done."""
    while True:
        begun = {id(one.together): one.together for one in editings if one.together is not None}
        if begun:
            yield [partial(together.settle, space) for together in begun.values()]
        whole = [one for one in editings if go_together([one], [])]
        if whole:
            yield [partial(Together([(one, None) for one in whole], for_good=True).run, space)]
        yield [partial(editing.undo, space) for editing in editings]
        if all(one.together is None for one in editings):  # or else a thread that was not yet known of began
            return


def apply_here(editings: Sequence[Editing], ahead: Ahead, space: Space) -> None:
    """All of one device, in this thread. Where it fails some are applied, each as a whole or in part."""
    launched, others = _divided(editings)
    if launched:
        Together([(None, one) for one in launched], ahead).run(space)
    for editing in others:
        editing.apply(space)


def undo_here(editings: Sequence[Editing], space: Space) -> None:
    """All of one device, in this thread. May be called again where it was interrupted."""
    for stage in _undoing(editings, space):
        for job in stage:
            job()


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
