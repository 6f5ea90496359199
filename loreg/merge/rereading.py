"""Written tensors read back, each once: hashed, and judged against what they were made from, in tiles.

What a thread needs is two tiles and what they are judged in, whatever the size of a tensor. Nothing is mapped: pages
that a map brings count as the process's own, and to bring each costs more than to read into the same ones again.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from math import prod

import torch

from loreg.algebra.edits import WeightedSum
from loreg.algebra.rounding import Workspace
from loreg.checkpoint import Advance, StoredTensor, open_binary, read_exactly
from loreg.digest import Digest, Hasher
from loreg.merge.probe import CPU, TILE_ELEMENTS, Judge
from loreg.tensors import to_memory, torch_dtype

_PIECE = 1 << 20
"""Of what is only hashed: fits a core's cache."""

_SHORT = 32

DESK_BYTES = 20 << 20
"""What a thread's desk comes to hold, at most, for rows of up to TILE_ELEMENTS."""


class Desk(threading.local):
    """What a thread reads into and computes in."""

    def __init__(self) -> None:
        self.workspace = Workspace()

    def bytes(self, use: str, size: int) -> torch.Tensor:
        """uint8 (size,)."""
        return self.workspace.take(use, size, torch.uint8, CPU)


def content(written: StoredTensor, desk: Desk, advance: Advance) -> Digest:
    """The digest of its bytes."""
    hasher, size = Hasher(), min(_PIECE, written.info.nbytes)
    for piece in written.chunks(_PIECE, to_memory(desk.bytes("written", size))):
        hasher.update(piece)
        advance(len(piece))
    return hasher.digest()


def judged(
    written: StoredTensor,
    stored: StoredTensor,
    view: tuple[int, ...],
    edit: WeightedSum,
    judge: Judge,
    desk: Desk,
    advance: Advance,
) -> Digest:
    """As ``content``; and ``judge`` is shown each tile, with that of ``stored``, in the shape ``view`` that ``edit``
    is for: a vector as rows of one element, a stack one matrix after the other."""
    hasher, done = Hasher(), 0
    shape = view[-2:] if len(view) > 1 else (prod(view), 1)
    with open_binary(written.shard.path) as after, open_binary(stored.shard.path) as before:
        for matrix in _matrices(edit, view):
            judge.begin(matrix, (shape[0], shape[1]))
            for first, count in _tiles(*shape):
                rows = count, shape[1]
                new, tile = _read(after.fileno(), written, done, rows, desk, "written")
                _, W = _read(before.fileno(), stored, done, rows, desk, "stored")
                hasher.update(new)
                judge.rows(first, W, tile)
                advance(len(new))
                done += prod(rows)
    return hasher.digest()


def _matrices(edit: WeightedSum, view: tuple[int, ...]) -> Iterator[WeightedSum]:
    if 0 in view:
        return
    if len(view) == 3:
        for index in range(view[0]):
            yield edit[index] if edit.shape else edit
    elif len(view) == 2:
        yield edit
    else:
        yield WeightedSum(dense=tuple(term.reshape((-1, 1)) for term in edit.dense))


def _tiles(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    """Of a matrix: the first row and the number of rows; at least one, however long it is. Of short rows fewer than
    there are elements for, as each has numbers of its own in float64."""
    step = max(1, TILE_ELEMENTS // max(columns, _SHORT))
    for first in range(0, rows, step):
        yield first, min(step, rows - first)


def _read(
    descriptor: int, stored: StoredTensor, done: int, shape: tuple[int, int], desk: Desk, use: str
) -> tuple[memoryview, torch.Tensor]:
    """The elements from number ``done`` on as bytes, and as a tensor over these; valid until the next call."""
    dtype = torch_dtype(stored.info.dtype, stored.info.name)
    raw = desk.bytes(use, prod(shape) * dtype.itemsize)
    memory = to_memory(raw)
    read_exactly(descriptor, memory, stored.offset + done * dtype.itemsize, stored.shard.path)
    return memory, raw.view(dtype).view(shape)
