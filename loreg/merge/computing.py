"""Edits of one tensor of the base, for every output that has it: read a tile, compute, hash, write."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from math import gcd, prod

import torch

from loreg.algebra.rounding import Workspace
from loreg.checkpoint import Advance, StoredTensor
from loreg.digest import Digest, Hasher
from loreg.errors import BadInput
from loreg.format.journal import BLOCK
from loreg.merge.combining import Combining
from loreg.merge.files import OutputFile
from loreg.merge.inputs import read_values
from loreg.merge.journal import Recorder, Spill
from loreg.merge.layout import Action, OutputShard, OutputTensor
from loreg.merge.resources import Resources
from loreg.tensors import from_buffer, to_memory, torch_dtype


@dataclass(frozen=True, slots=True)
class Sink:
    """A tensor of one output, and where it goes.

    ``changed``: takes the digests of what a merge changed. ``original``: the base's tensor of that name, if there is
    one. ``spill``: takes what undoes the merge, if that is wanted.
    """

    tensor: OutputTensor
    shard: OutputShard
    output: OutputFile
    combining: Combining
    changed: dict[str, Digest]
    original: StoredTensor | None = None
    spill: Spill | None = None

    @property
    def position(self) -> int:
        """Of its first byte in the file."""
        return self.shard.header.data_start + self.tensor.info.start

    @property
    def view(self) -> tuple[int, ...]:
        """The shape in which it is edited."""
        return self.tensor.edit.view(self.tensor.info.shape)

    @property
    def edits_original(self) -> bool:
        """Whether it is computed from the base's tensor of its name."""
        return self.tensor.action is Action.COMPUTE and self.tensor.stored == self.original

    @property
    def recorder(self) -> Recorder | None:
        """What takes the base's tensor for the journal, if there is one and it changes."""
        if self.spill is None or self.original is None or self.tensor.action is Action.COPY:
            return None
        return Recorder(self.spill, self.original.info)


class Scratch(threading.local):
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
        self._spare = memoryview(b"")

    def _host(self, size: int) -> memoryview:
        if self.stream is None:
            return memoryview(bytearray(size))
        return to_memory(torch.empty(size, dtype=torch.uint8, pin_memory=True))

    def spare(self, size: int) -> memoryview:
        """Another buffer of ``size`` bytes, of whatever values are there; the same at each call."""
        if len(self._spare) < size:
            self._spare = memoryview(bytearray(size))
        return self._spare[:size]

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
        self._scratch = Scratch(resources)

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
                        advance(edit.tile(on_device, first, raw, in_place=edit is edits[-1]))
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

    def __init__(self, sink: Sink, stored: StoredTensor, scratch: Scratch) -> None:
        info = sink.tensor.info
        self.shape = sink.view
        self._sink, self._scratch = sink, scratch
        self._target = torch_dtype(info.dtype, info.name)
        dtype = torch_dtype(stored.info.dtype, info.name)
        self._recorder = sink.recorder if sink.edits_original else None
        reads = False

        def before() -> torch.Tensor:
            nonlocal reads
            reads = True
            return read_values(stored)

        edit = sink.tensor.edit.load(info.name, stored.info.shape, before, sink.combining, scratch.device)
        # What an edit of the base's own values did is not known without them [U2].
        self._predictable = not reads and (dtype == self._target or dtype.itemsize < self._target.itemsize)
        self._prepared = edit.prepare(
            self.shape, dtype, self._target, scratch.device,
            workspace=scratch.workspace, residual=self._recorder is not None and self._predictable,
        )  # fmt: skip
        self._after, self._position = Hasher(), sink.position

    def tile(self, W: torch.Tensor, first: int, raw: memoryview, *, in_place: bool) -> int:
        """The rows from ``first`` on, of these bytes; returns the number that it wrote."""
        out, take = W, self._scratch.workspace.take
        if not in_place or W.dtype != self._target or self._recorder is not None:
            out = take("out", W.numel(), self._target, W.device).view(W.shape)
        if self._recorder is None:
            self._prepared.tile(W, first, out)
        elif not self._predictable:
            self._prepared.tile(W, first, out)
            self._recorder.whole(raw)
        else:
            small = take("residual", W.numel(), torch.int8, W.device).view(W.shape)
            outcome = self._prepared.tile(W, first, out, small)
            self._recorder.add(raw, small.view(-1).cpu().numpy(), outcome.wide.cpu().numpy())
        written = self._scratch.bytes_of(out)
        self._after.update(written)
        self._sink.output.write(written, self._position)
        self._position += len(written)
        return len(written)

    def finish(self) -> None:
        if self._recorder is not None:
            self._recorder.finish()
        self._sink.changed[self._sink.tensor.info.name] = self._after.digest()


def keep(sink: Sink) -> None:
    """The base's own tensor into the journal, where it is replaced by another."""
    recorder, original = sink.recorder, sink.original
    if recorder is not None and original is not None:
        for piece in original.chunks():
            recorder.whole(piece)
        recorder.finish()


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
    first, size = 0, _rows(len(buffer) // row, prod(columns)) * row
    for tile in stored.chunks(size, buffer if size <= len(buffer) else None):
        count = len(tile) // row
        yield first, tile, from_buffer(tile, dtype, (count, *columns))
        first += count


def _rows(most: int, columns: int) -> int:
    """At most so many rows, or one: whole blocks of a journal where that can be, which then carries nothing over."""
    even = BLOCK // gcd(BLOCK, columns)
    return max(1, most // even * even or most)
