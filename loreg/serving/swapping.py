"""From one merge in a live model to another: what is taken out and what is merged in meet in one pass.

Of a tensor that both change, rows are brought back to what the base has there, in the cache, and from that to what
they are to be (``algebra.changing``). A row belongs to exactly one of the two merges at any time, so an error finds
the way back by the same pass with the roles exchanged. On a GPU it is a tile, in registers, and all tensors are one
launch (``merging.Together``).
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TypeVar

import torch

from loreg.algebra.changing import Space
from loreg.serving import merging
from loreg.serving.applying import Edit, Editing
from loreg.serving.merging import Ahead, Together

T = TypeVar("T")


class Change:
    """Edits of one device that overlap: ``old`` are taken back, and ``new`` applied, in a thread of their own."""

    def __init__(self, old: Sequence[Editing], new: Sequence[Editing], ahead: Ahead) -> None:
        self.old, self.new = list(old), list(new)
        self._ahead = ahead
        self._turn = threading.Lock()
        self._over = False

    @torch.inference_mode()
    def run(self, space: Space) -> None:
        with self._turn:
            if self._over:  # by an error elsewhere, of which this thread does not know yet
                return
            if self._in_one_pass:
                self.old[0].give_way(self.new[0], space)
            else:
                merging.undo_here(self.old, space)
                merging.apply_here(self.new, self._ahead, space)

    @torch.inference_mode()
    def back(self, space: Space) -> None:
        """What ``old`` then are is applied as it was, and ``new`` is not. May be called again where it failed."""
        with self._turn:
            self._over = True
            if self._in_one_pass:
                self.new[0].give_way(self.old[0], space)
                return
            merging.undo_here(self.new, space)
            begun = [editing for editing in self.old if editing.over]
            if begun:
                merging.undo_here(begun, space)  # what an error left of them
                again = [Editing(editing.edit, editing.ahead) for editing in begun]
                self.old = [editing for editing in self.old if not editing.over] + again
                try:
                    merging.apply_here(again, self._ahead, space)
                except BaseException:
                    for editing in again:
                        editing.over = True  # so that what is applied of them is undone first, the next time
                    raise

    @property
    def _in_one_pass(self) -> bool:
        """Whether it is one tensor, and both edits of it are sums that do not read it."""
        if len(self.old) != 1 or len(self.new) != 1:
            return False
        (old,), (new,) = self.old, self.new
        if not old.edit.is_beside(new.edit):
            return False
        return old.tiled and new.tiled and not any(merging.is_launched(each.edit) for each in (old, new))


def swap(
    old: Sequence[Editing],
    edits: Sequence[Edit],
    threads: int | None,
    ahead: Ahead,
    done: Callable[[list[Editing]], T],
    kept: Callable[[list[Editing]], None],
) -> T:
    """Take ``old`` out of the weights and merge ``edits`` into them: all of it, or nothing; and what ``done`` gives.

    Whatever is raised, by ``done`` too, every element is then what it was, and ``kept`` was told what undoes that
    from now on; unless the way back fails as well, of which the error is then.
    """
    new = [Editing(edit, weakref.ref(ahead)) for edit in edits]
    space = Space()
    changes = {device: list(_changes(device, old, new, ahead)) for device in _devices(old, new)}
    try:
        for device, here in changes.items():
            merging.run(device, threads, [partial(change.run, space) for change in here])
        return done(new)
    except BaseException:
        while True:
            try:
                for device, here in changes.items():
                    merging.run(device, threads, [partial(change.back, space) for change in here])
                break
            except KeyboardInterrupt:  # a second one: half a model would be of no use to anybody
                continue
        kept([editing for here in changes.values() for change in here for editing in change.old])
        raise


def _devices(*editings: Sequence[Editing]) -> list[torch.device]:
    return list(dict.fromkeys(one.edit.target.place.tensor.device for group in editings for one in group))


def _changes(
    device: torch.device, old: Sequence[Editing], new: Sequence[Editing], ahead: Ahead
) -> Iterator[Change | Together]:
    """The largest first, for the threads."""
    gone, come = ([e for e in group if e.edit.target.place.tensor.device == device] for group in (old, new))
    groups = list(_overlapping(gone, come))
    pairs = [(next(iter(old), None), next(iter(new), None)) for old, new in groups if merging.go_together(old, new)]
    if pairs:
        yield Together(pairs, ahead)
    found = [Change(*group, ahead) for group in groups if not merging.go_together(*group)]
    yield from sorted(found, key=lambda change: -sum(_size(editing) for editing in (*change.old, *change.new)))


def _size(editing: Editing) -> int:
    return editing.edit.target.place.weight.numel()


def _overlapping(old: Sequence[Editing], new: Sequence[Editing]) -> Iterator[tuple[list[Editing], list[Editing]]]:
    """Groups of edits of which none is in the same memory as one of another group."""
    sides = [(editing, 0) for editing in old] + [(editing, 1) for editing in new]
    sides.sort(key=lambda side: side[0].edit.target.place.span)
    group: tuple[list[Editing], list[Editing]] = [], []
    storage, end = 0, 0
    for editing, side in sides:
        here, start, stop = editing.edit.target.place.span
        if (here != storage or start >= end) and any(group):
            yield group
            group, end = ([], []), 0
        group[side].append(editing)
        storage, end = here, max(end, stop) if here == storage else stop
    if any(group):
        yield group
