"""Edits of many weights in the memory of a GPU, started at once and settled later: an edit is taken back, another one
applied, or both in one pass.

``gpu`` computes: nothing waits until :meth:`Launched.done`, and that for all weights together. What is in doubt is
decided here, so that every element is what the definition has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from loreg.algebra.corrections import Corrections
from loreg.algebra.edits import Prepared, Stacked
from loreg.algebra.gpu.groups import Group, Job, grouped
from loreg.algebra.gpu.lists import HOST, Open
from loreg.algebra.gpu.undo import Undo
from loreg.algebra.passes import UNSURE, Candidates, as_rows
from loreg.errors import BadInput


@dataclass(frozen=True, slots=True, eq=False)
class Undone:
    """What undoes an edit of one weight, as it was launched: of each of its matrices. On W's device."""

    parts: tuple[Undo, ...]
    size: int

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    @property
    def device(self) -> torch.device:
        return self.parts[0].marks.device

    def corrections(self) -> Corrections:
        """The same as places, in order."""
        flat, size = [part.flat() for part in self.parts], self.size // len(self.parts)
        index, by = (
            torch.cat(x) for x in zip(*((at + i * size, by) for i, (at, by) in enumerate(flat)), strict=True)
        )
        order = index.argsort()
        index, by = index[order], by[order]
        near = by.abs() < -UNSURE
        return Corrections.at(index[near], by[near].to(torch.int8), index[~near], by[~near], self.size)


@dataclass(frozen=True, slots=True, eq=False)
class Work:
    """``W`` into ``out``, which may be ``W`` itself: ``back``, which was applied before and left ``kept``, is taken
    back, and then ``forth`` applied; one of them may be None. Each is prepared for W's shape, dtype and device.
    ``name``: for messages."""

    forth: Prepared | Stacked | None
    W: Tensor
    out: Tensor
    name: str = ""
    back: Prepared | Stacked | None = None
    kept: Undone | None = None


@dataclass(frozen=True, slots=True)
class _Piece:
    """One matrix of a work."""

    forth: Prepared | None
    back: Prepared | None
    kept: Undo | None
    W: Tensor
    out: Tensor
    name: str

    def job(self, residual: bool) -> Job:
        forth, back = (None if x is None else x.on_gpu for x in (self.forth, self.back))
        return Job(self.W, self.out, forth, back, self.kept, residual=residual and forth is not None)

    def reversed(self) -> _Piece:
        return _Piece(self.back, self.forth, None, self.out, self.out, self.name)


class Launched:
    """What :func:`launch` has started. Keeps the tensors alive until it is done."""

    def __init__(self, works: Sequence[Work], residual: bool) -> None:
        """Not started yet. All are of one device."""
        self._works = works
        self._pieces = [list(_pieces(work)) for work in works]
        pieces = [piece for group in self._pieces for piece in group]
        self._parts = [
            _Part(group, [pieces[i] for i in members], members)
            for group, members in grouped([piece.job(residual) for piece in pieces])
        ]
        self._return: list[_Part] | None = None

    @torch.no_grad()
    def start(self) -> None:
        """All works. May be called again where it failed."""
        for part in self._parts:
            part.group.begin()

    @torch.no_grad()
    def done(self) -> list[Undone | None]:
        """Waits for the device, decides what is in doubt, and returns for each work what undoes it, or None.

        Only then are the outputs what they are to be. Raises BadInput, naming the element, if W holds NaN or infinity
        or a result exceeds the largest finite value. Whatever is raised, this may be called again and goes on where
        it was; or ``back``.
        """
        kept = dict[int, Undo]()
        for part in self._parts:
            kept.update(part.finish())
        return [_joined(work, found) for work, found in zip(self._works, self._of_works(kept), strict=True)]

    @torch.no_grad()
    def back(self) -> None:
        """Every output is, bit for bit, what it was, from wherever that failed or was done. May be called again where
        it failed. For works in place, with residuals or with nothing applied; nothing else may have changed them."""
        begun = [part for part in self._parts if part.group.began]
        if self._return is None:
            self._return = [part.reversed() for part in begun]
        for part in self._return:
            part.finish()
        for part in begun:
            part.group.put_back()

    def _of_works(self, kept: dict[int, Undo]) -> Iterator[list[Undo]]:
        first = 0
        for pieces in self._pieces:
            yield [kept[i] for i in range(first, first + len(pieces)) if i in kept]
            first += len(pieces)


class _Part:
    """A group, and what decides for its jobs; ``members``: which of all pieces they are."""

    def __init__(self, group: Group, pieces: Sequence[_Piece], members: Sequence[int]) -> None:
        self.group, self._pieces, self._members = group, pieces, members

    def finish(self) -> dict[int, Undo]:
        """What undoes each, by which piece it is of, if that was asked for."""
        group, kept = self.group, list[Undo]()
        group.begin()
        if group.back:
            open_ = group.taken().to(HOST)
            edits = [piece.back for piece in self._pieces if piece.back]
            group.take(open_, self._decided(edits, open_, Prepared.taken_back))
        if group.forth:
            edits = [piece.forth for piece in self._pieces if piece.forth]
            open_ = group.opened().to(HOST)
            found, unsure = open_.found, open_.unsure
            group.decide(found, self._decided(edits, found, Prepared.forth))
            if group.residual:
                kept = group.undo(unsure, self._missed(edits, unsure))
        group.put()
        return dict(zip(self._members, kept, strict=False))

    def reversed(self) -> _Part:
        return _Part(self.group.reversed(), [piece.reversed() for piece in self._pieces], self._members)

    def _decided(
        self, edits: Sequence[Prepared], open_: Open, by: Callable[[Prepared, Candidates], Tensor]
    ) -> Tensor:
        """The values that those elements are, in float32."""
        found = [torch.empty(0)]
        for piece, edit, one in self._each(edits, open_):
            with _named(piece.name):
                found.append(by(edit, one.candidates).float())
        return torch.cat(found)

    def _missed(self, edits: Sequence[Prepared], open_: Open) -> Tensor:
        """The residuals of those, where all else is decided."""
        found, after = [torch.empty(0, dtype=torch.int64)], self.group.after(open_).to(HOST)
        for piece, edit, one in self._each(edits, open_):
            here, after = after[: len(one.job)], after[len(one.job) :]
            with _named(piece.name):
                found.append(edit.back(one.deltas, here.to(piece.W.dtype)))
        return torch.cat(found)

    def _each(self, edits: Sequence[Prepared], open_: Open) -> Iterator[tuple[_Piece, Prepared, Open]]:
        """Of which any is open."""
        if not len(open_.job):
            return
        # S of each, for which the device is waited for once.
        spreads = torch.stack([x.spread for x in (edit.on_gpu for edit in edits) if x is not None]).tolist()
        for piece, edit, spread, one in zip(self._pieces, edits, spreads, open_.by_job(len(edits)), strict=True):
            if len(one.job):
                edit.know(spread)
                yield piece, edit, one


def launch(works: Sequence[Work], *, residual: bool = False) -> Launched:
    """Starts all ``works``, each prepared with that ``residual``, without waiting for the device.

    No two of them may share memory. Until :meth:`Launched.done` has returned, outputs are not to be read, nor W
    changed.
    """
    launched = Launched(works, residual)
    launched.start()
    return launched


def _pieces(work: Work) -> Iterator[_Piece]:
    ends = work.forth, work.back
    assert (work.back is None) == (work.kept is None), "an edit is taken back by what it left"
    kept = () if work.kept is None else work.kept.parts
    if any(isinstance(end, Stacked) for end in ends):
        for index in range(len(work.W)):
            forth, back = (end.matrices[index] if isinstance(end, Stacked) else None for end in ends)
            yield _Piece(forth, back, kept[index] if kept else None, work.W[index], work.out[index], work.name)
        return
    forth, back = (end if isinstance(end, Prepared) else None for end in ends)
    for end in (forth, back):
        if end is not None:
            end.check(work.W, 0, work.out)
    yield _Piece(forth, back, kept[0] if kept else None, as_rows(work.W), as_rows(work.out), work.name)


def _joined(work: Work, found: list[Undo]) -> Undone | None:
    return Undone(tuple(found), work.W.numel()) if found else None


@contextmanager
def _named(name: str) -> Iterator[None]:
    try:
        yield
    except BadInput as error:
        if not name:
            raise
        raise type(error)(f"Tensor {name!r}: {error}") from error
