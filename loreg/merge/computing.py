"""Edits of one tensor of the base, for every output that has it: read a tile, compute, hash, write."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from math import prod

import torch

from loreg.algebra.rounding import Workspace
from loreg.checkpoint import Advance, StoredTensor
from loreg.digest import Digest, Hasher
from loreg.errors import BadInput
from loreg.merge.combining import Combining
from loreg.merge.files import OutputFile
from loreg.merge.layout import Action, OutputShard, OutputTensor
from loreg.merge.resources import Resources
from loreg.tensors import from_buffer, to_memory, torch_dtype


@dataclass(frozen=True, slots=True)
class Sink:
    """A tensor of one output, and where it goes. ``changed``: takes the digests of what a merge changed."""

    tensor: OutputTensor
    shard: OutputShard
    output: OutputFile
    combining: Combining
    changed: dict[str, Digest]

    @property
    def position(self) -> int:
        """Of its first byte in the file."""
        return self.shard.header.data_start + self.tensor.info.start

    @property
    def view(self) -> tuple[int, ...]:
        """The shape in which it is edited."""
        return self.tensor.edit.view(self.tensor.info.shape)


class _Scratch(threading.local):
    """What a thread computes in: fresh pages for each tensor would cost more than the arithmetic.

    For a CUDA device the host's side is page-locked and the work is on a stream of the thread's own, so that one
    thread's transfers pass under what the others read, compute, hash and write.
    """

    def __init__(self, resources: Resources) -> None:
        self.device = resources.device
        self.workspace = Workspace()
        self.stream = _stream(resources.device)
        self.tile = self._host(resources.tile_bytes)
        self._back: torch.Tensor | None = None

    def _host(self, size: int) -> memoryview:
        if self.stream is None:
            return memoryview(bytearray(size))
        return to_memory(torch.empty(size, dtype=torch.uint8, pin_memory=True))

    def context(self) -> AbstractContextManager[object]:
        return nullcontext() if self.stream is None else torch.cuda.stream(self.stream)

    def bytes_of(self, out: torch.Tensor) -> memoryview:
        """The bytes of a tensor on the device, valid until the next call."""
        if self.stream is None:
            return to_memory(out)
        if self._back is None or self._back.nbytes < out.nbytes:
            self._back = torch.empty(out.nbytes, dtype=torch.uint8, pin_memory=True)
        back = self._back[: out.nbytes]
        back.copy_(out.view(-1).view(torch.uint8), non_blocking=True)
        self.stream.synchronize()
        return to_memory(back)


def _stream(device: torch.device) -> torch.cuda.Stream | None:
    return torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]


class Computation:
    """What the threads of a merge share: where they compute, and in how large tiles."""

    def __init__(self, resources: Resources) -> None:
        self._resources = resources
        self._scratch = _Scratch(resources)

    def write(self, sinks: Sequence[Sink], advance: Advance) -> None:
        """All ``sinks`` of one tensor of the base, of one view: copied where nothing happens to it."""
        stored, content, name = sinks[0].tensor.stored, sinks[0].tensor.content, sinks[0].tensor.info.name
        if stored is None:
            raise BadInput(f"{name!r} is to be computed from a base that does not have it.")
        copies = [sink for sink in sinks if sink.tensor.action is Action.COPY]
        before, done, scratch = Hasher(), 0, self._scratch
        try:
            with scratch.context():
                edits = [_Edited(sink, stored, scratch) for sink in sinks if sink.tensor.action is Action.COMPUTE]
                for first, raw, W in tiles(stored, edits[0].shape, scratch.tile):
                    before.update(raw)
                    for sink in copies:
                        sink.output.write(raw, sink.position + done)
                        advance(len(raw))
                    on_device = W.to(scratch.device, non_blocking=True)
                    for edit in edits:
                        # In place for the last, where the dtype stays: nobody needs W after it.
                        advance(edit.tile(on_device, first, in_place=edit is edits[-1]))
                    done += len(raw)
                if before.digest() != content:
                    raise BadInput(
                        f"in {stored.shard.path} it is not what it was when it was hashed: the file was changed; add "
                        "the base again."
                    )
        except BadInput as error:
            raise type(error)(f"Tensor {name!r}: {error}") from error
        for edit in edits:
            edit.finish()


class _Edited:
    """One edit of a tensor, tile by tile into its output."""

    def __init__(self, sink: Sink, stored: StoredTensor, scratch: _Scratch) -> None:
        info = sink.tensor.info
        self.shape = sink.view
        self._sink, self._scratch = sink, scratch
        self._target = torch_dtype(info.dtype, info.name)
        dtype = torch_dtype(stored.info.dtype, info.name)
        edit = sink.tensor.edit.load(info.name, stored, sink.combining, scratch.device)
        self._prepared = edit.prepare(self.shape, dtype, self._target, scratch.device, workspace=scratch.workspace)
        self._after, self._position = Hasher(), sink.position

    def tile(self, W: torch.Tensor, first: int, *, in_place: bool) -> int:
        """The rows from ``first`` on; returns the bytes written."""
        out = W
        if not in_place or W.dtype != self._target:
            out = self._scratch.workspace.take("out", W.numel(), self._target, W.device).view(W.shape)
        self._prepared.tile(W, first, out)
        raw = self._scratch.bytes_of(out)
        self._after.update(raw)
        self._sink.output.write(raw, self._position)
        self._position += len(raw)
        return len(raw)

    def finish(self) -> None:
        self._sink.changed[self._sink.tensor.info.name] = self._after.digest()


def tiles(
    stored: StoredTensor, shape: tuple[int, ...], buffer: memoryview
) -> Iterator[tuple[int, memoryview, torch.Tensor]]:
    """Runs of rows of a stored tensor seen in ``shape``, through ``buffer``: the first row, the raw bytes, and a CPU
    tensor over them.

    The rows of a stack of matrices are counted through all of them. A row that is longer than ``buffer`` gets one of
    its own.
    """
    dtype = torch_dtype(stored.info.dtype, stored.info.name)
    columns = shape[-1:] if len(shape) > 1 else ()
    row = prod(columns) * dtype.itemsize
    if not stored.info.nbytes:
        return
    first, size = 0, max(1, len(buffer) // row) * row
    for tile in stored.chunks(size, buffer if size <= len(buffer) else None):
        count = len(tile) // row
        yield first, tile, from_buffer(tile, dtype, (count, *columns))
        first += count
