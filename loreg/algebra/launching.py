"""Edits of many weights that are in memory, such as those of a model that runs, started at once and settled later.

On a GPU with Triton, ``gpu`` computes: nothing waits until :meth:`Launched.done`, and that for all weights together.
Elsewhere the same is computed at once, by the passes of ``edits``. Either gives the bytes that the definition has.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from loreg.algebra import gpu
from loreg.algebra.corrections import Corrections
from loreg.algebra.edits import Prepared, Stacked
from loreg.algebra.gpu.lists import Listed, Open, Undone
from loreg.algebra.passes import UNSURE, Candidates, as_rows
from loreg.algebra.rounding import from_ordered, ordered
from loreg.errors import BadInput

_HOST = torch.device("cpu")


@dataclass(frozen=True, slots=True, eq=False)
class Work:
    """``W`` of the shape, dtype and device that ``prepared`` is for, into ``out``, which may be ``W`` itself.
    ``name``: for messages."""

    prepared: Prepared | Stacked
    W: Tensor
    out: Tensor
    name: str = ""


@dataclass(frozen=True, slots=True)
class _Piece:
    """One matrix of a work, whose first element is the ``start``-th there."""

    prepared: Prepared
    W: Tensor
    out: Tensor
    start: int
    name: str

    @property
    def fused(self) -> gpu.Fused:
        found = self.prepared.on_gpu
        assert found is not None
        return found

    def flat(self, found: Candidates | Open) -> Tensor:
        """Their places in a row."""
        return found.rows * self.W.shape[1] + found.columns


class Launched:
    """What :func:`launch` has started. Keeps the tensors alive until it is done."""

    def __init__(self, works: Sequence[Work], residual: bool) -> None:
        """Not started yet. Those that can be launched are of one device."""
        self._works, self._residual = works, residual
        self._here = list[tuple[Tensor, Corrections | None]]()
        self._pieces = [list(_pieces(work)) if launchable(work) else None for work in works]
        self._all = [piece for pieces in self._pieces for piece in pieces or ()]
        self._there = gpu.Launched([gpu.Job(piece.fused, piece.W, piece.out) for piece in self._all], residual)
        self._return: _Return | None = None

    @torch.no_grad()
    def start(self) -> None:
        """All works. If this raises, what ``done`` says of that holds."""
        with self._or_nothing():
            for work, pieces in zip(self._works, self._pieces, strict=True):
                if pieces is None:
                    with _named(work.name):
                        self._here.append(_at_once(work, self._residual))
            self._there.start()

    @torch.no_grad()
    def done(self) -> list[Corrections | None]:
        """Waits for the device, decides what is in doubt, and returns for each work what undoes it, or None.

        Only then are the outputs what they are to be. Raises BadInput, naming the element, if W holds NaN or infinity
        or a result exceeds the largest finite value. Whatever is raised: with residuals, every output that is its W
        is then, bit for bit, what it was, if all are; without, outputs are partly written, and where they are their W
        only this, called again, makes anything whole of them, going on where it was.
        """
        with self._or_nothing():
            opened = _on_host(self._there.opened())
            for piece, spread in zip(self._all, _spreads(self._all), strict=True):
                piece.prepared.know(spread)
            _decide(self._all, [open_.found for open_ in opened])
            undone = iter(self._undone([open_.unsure for open_ in opened]) if self._residual else ())
            here, found = iter(self._here), list[Corrections | None]()
            for work, pieces in zip(self._works, self._pieces, strict=True):
                if pieces is None:
                    out, one = next(here)
                    work.out.copy_(out)
                    found.append(one)
                else:
                    found.append(_joined(work, [next(undone) for _ in pieces]) if self._residual else None)
            return found

    def _undone(self, unsure: Sequence[Candidates]) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Of each piece, what ``Corrections`` has, counted from the work's first element."""
        pieces = self._all
        if not pieces:
            return
        device = pieces[0].W.device
        known = self._there.undone()
        places = [piece.flat(one) for piece, one in zip(pieces, unsure, strict=True)]
        after = [
            piece.out[index // piece.W.shape[1], index % piece.W.shape[1]].float()
            for piece, index in zip(pieces, _sent(places, device), strict=True)
        ]
        late, values, wide_at, wide = list[Tensor](), list[Tensor](), list[Tensor](), list[Tensor]()
        for piece, one, index, were in zip(pieces, unsure, places, _sent(after, _HOST), strict=True):
            by = index
            if len(index):
                with _named(piece.name):
                    by = piece.prepared.back(one, were.to(piece.W.dtype))
            fits = by.abs() < -UNSURE
            small = fits & (by != 0)
            late.append(index[small])
            values.append(by[small].to(torch.int8))
            wide_at.append(index[~fits])
            wide.append(by[~fits])
        sent = zip(*(_sent(parts, device) for parts in (late, values, wide_at, wide)), strict=True)
        for piece, before, (late_, values_, wide_at_, wide_) in zip(pieces, known, sent, strict=True):
            index = torch.cat([before.places, late_]) + piece.start
            yield index, torch.cat([before.value, values_]), wide_at_ + piece.start, wide_

    @contextmanager
    def _or_nothing(self) -> Iterator[None]:
        """Where there is a way back it is gone if anything is raised."""
        try:
            yield
        except BaseException:
            while True:
                try:
                    self._back()
                    break
                except KeyboardInterrupt:  # a second one: half of it would be of no use to anybody
                    continue
            raise

    def _back(self) -> None:
        if self._residual and all(piece.out.data_ptr() == piece.W.data_ptr() for piece in self._all):
            if self._return is None:
                self._return = _Return(self._all, self._there)
            self._return.run()


class _Return:
    """The way back of jobs in place, from wherever they are.

    An element was either in a word in doubt, and the lists have what it was; or it was W' less the delta, rounded,
    and a residual, which the lists have too.
    """

    def __init__(self, pieces: Sequence[_Piece], there: gpu.Launched) -> None:
        # What was listed is that of tiles that are done: nothing is started any more by ``there``.
        self._listed, self._undone = there.listed(), there.undone(so_far=True)
        self._pieces, self._there = pieces, there.taken_back()
        self._negated = [_negated(piece) for piece in pieces]
        self._right: list[tuple[Tensor, Tensor, Tensor]] | None = None

    def run(self) -> None:
        """May be called again where it was interrupted: each step then writes what it wrote."""
        if self._right is None:
            opened = [
                _without(open_, listed, piece.W.shape[1])
                for piece, open_, listed in zip(self._pieces, self._there.opened(), self._listed, strict=True)
            ]
            for piece, spread in zip(self._negated, _spreads(self._negated), strict=True):
                piece.prepared.know(spread)
            _decide(self._negated, [open_.found for open_ in _on_host(opened)])
            self._right = [_corrected(*each) for each in zip(self._pieces, self._undone, strict=True)]
        for piece, (rows, columns, values), listed in zip(self._pieces, self._right, self._listed, strict=True):
            piece.out[rows, columns] = values
            piece.out[listed.rows, listed.columns] = listed.were


def launch(works: Sequence[Work], *, residual: bool = False) -> Launched:
    """Starts all ``works``, each prepared with that ``residual``; on a GPU without waiting for it.

    No two of them may share memory. Until :meth:`Launched.done` has returned, outputs are not to be read, nor W
    changed. If this raises, what is said there of outputs holds.
    """
    launched = Launched(works, residual)
    launched.start()
    return launched


def launchable(work: Work) -> bool:
    """Whether the kernels can do it."""
    rows = _is_by_rows(work.W) and _is_by_rows(work.out)
    if isinstance(work.prepared, Stacked):
        return rows and bool(work.W.numel()) and work.prepared.on_gpu
    return rows and work.prepared.on_gpu is not None


def _is_by_rows(x: Tensor) -> bool:
    return x.stride(-1) == 1 or x.shape[-1] == 1


def _pieces(work: Work) -> Iterator[_Piece]:
    if isinstance(work.prepared, Stacked):
        size = work.W[0].numel()
        for index, prepared in enumerate(work.prepared.matrices):
            yield _Piece(prepared, work.W[index], work.out[index], index * size, work.name)
    else:
        work.prepared.check(work.W, 0, work.out)
        yield _Piece(work.prepared, as_rows(work.W), as_rows(work.out), 0, work.name)


def _negated(piece: _Piece) -> _Piece:
    return _Piece(-piece.prepared, piece.out, piece.out, piece.start, piece.name)


def _at_once(work: Work, residual: bool) -> tuple[Tensor, Corrections | None]:
    """The result beside the output, which takes it when all is right, and what undoes it."""
    rows = (-1, work.W.shape[-1]) if work.W.ndim == 3 else work.W.shape
    out = torch.empty_like(work.out, memory_format=torch.contiguous_format)
    small = torch.empty(work.W.shape, dtype=torch.int8, device=work.W.device) if residual else None
    outcome = work.prepared.tile(work.W.reshape(rows), 0, out.view(rows), None if small is None else small.view(rows))
    return out, None if small is None else Corrections.of(small.view(-1), outcome)


def _joined(work: Work, parts: Sequence[tuple[Tensor, Tensor, Tensor, Tensor]]) -> Corrections:
    index, by, wide_index, wide = map(torch.cat, zip(*parts, strict=True))
    return Corrections.at(index, by, wide_index, wide, work.W.numel())


@contextmanager
def _named(name: str) -> Iterator[None]:
    try:
        yield
    except BadInput as error:
        if not name:
            raise
        raise type(error)(f"Tensor {name!r}: {error}") from error


def _decide(pieces: Sequence[_Piece], found: Sequence[Candidates]) -> None:
    """Writes the values of what is in doubt, which is on the host, as what decides it is."""
    if not pieces:
        return
    places, values = list[Tensor](), list[Tensor]()
    for piece, one in zip(pieces, found, strict=True):
        places.append(piece.flat(one))
        value = one.near
        if len(one.near):
            with _named(piece.name):
                value = piece.prepared.forth(one)
        values.append(value.float())
    device = pieces[0].out.device
    for piece, index, value in zip(pieces, _sent(places, device), _sent(values, device), strict=True):
        if len(index):
            piece.out[index // piece.W.shape[1], index % piece.W.shape[1]] = value.to(piece.out.dtype)


def _spreads(pieces: Sequence[_Piece]) -> list[float]:
    """S of each, for which the device is waited for once."""
    found: list[float] = torch.stack([piece.fused.spread for piece in pieces]).tolist() if pieces else []
    return found


def _sent(parts: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """On the device, in one transfer. Of one dtype."""
    return list(torch.split(torch.cat(list(parts)).to(device), [len(part) for part in parts]))


def _on_host(opened: Sequence[Open]) -> list[Open]:
    """In a transfer of each field. W in float32, which has all values of the dtypes that there are."""
    if not opened:
        return []
    fields = zip(*(open_._replace(W=open_.W.float()) for open_ in opened), strict=True)
    return [Open(*parts) for parts in zip(*(_sent(field, _HOST) for field in fields), strict=True)]


def _without(open_: Open, listed: Listed, columns: int) -> Open:
    """But what is listed."""
    other = ~torch.isin(open_.rows * columns + open_.columns, listed.rows * columns + listed.columns)
    return Open(*(x[other] for x in open_))


def _corrected(piece: _Piece, undone: Undone) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, columns, and the values there."""
    rows, columns = undone.places // piece.W.shape[1], undone.places % piece.W.shape[1]
    values = ordered(piece.out[rows, columns]) + undone.value
    return rows, columns, from_ordered(values, piece.out.dtype)
