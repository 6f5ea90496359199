"""Running a plan: shard by shard, untouched ranges by the kernel, touched tensors tile by tile.

Memory is, for each thread, a tile and the factors of one tensor; never a tensor, a shard or the model.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from functools import partial
from itertools import groupby
from math import prod
from pathlib import Path

import torch

from loreg.algebra.rounding import Workspace
from loreg.checkpoint import Advance, StoredTensor
from loreg.digest import Digest, Hasher
from loreg.errors import BadInput
from loreg.merge.combining import Combining
from loreg.merge.files import OutputFile, OutputFiles
from loreg.merge.inputs import values
from loreg.merge.layout import Action, OutputShard, OutputTensor
from loreg.merge.plan import MergePlan
from loreg.merge.resume import Finished
from loreg.merge.workers import results, workers
from loreg.tensors import from_buffer, to_memory, torch_dtype

TILE_BYTES = 8 << 20
"""What a thread reads, computes, hashes and writes at once: the steps are few then, and any machine has so much."""


def execute(plan: MergePlan, folder: Path, *, device: torch.device, advance: Advance) -> dict[str, Digest]:
    """Write every shard into ``folder`` that is not there, each flushed to the disk. Returns the content digests of
    what changed.

    ``advance`` is told the bytes written. Raises BadInput if an input is unreadable or not what was planned,
    or an element cannot be merged; CheckFailed if the disk is full or fails.
    """
    computation = _Computation(plan.combining, device)
    finished = Finished(folder, plan.recipe.digest)
    finished.keep_only(plan.shards)
    digests: dict[str, Digest] = {}
    with OutputFiles() as files, workers(device) as pool:
        for shard in plan.shards:
            changed = finished.digests(shard, advance)
            if changed is None:
                changed = {}
                record = partial(finished.record, shard, changed)
                with files.create(folder / shard.name, shard.header.file_size, then=record) as output:
                    output.write(memoryview(shard.header.raw), 0)
                    for written in results(pool, _jobs(shard, output, computation, advance)):
                        changed.update(written)
            digests.update(changed)
    finished.forget()
    return digests


def _jobs(
    shard: OutputShard, output: OutputFile, computation: _Computation, advance: Advance
) -> Iterator[Callable[[], dict[str, Digest]]]:
    """The work on one shard, in independent pieces; each gives the digests of the changed tensors in it.

    The largest come first: one that was begun last would leave the other threads without work.
    """
    computed = [tensor for tensor in shard.tensors if tensor.action is Action.COMPUTE]
    for tensor in sorted(computed, key=lambda tensor: -tensor.info.nbytes):
        yield partial(computation.write, tensor, shard, output, advance)
    for action, group in groupby(shard.tensors, key=lambda tensor: tensor.action):
        if action is Action.COPY:
            yield partial(_copy, list(group), shard, output, advance)
        elif action is Action.REPLACE:
            for tensor in group:
                yield partial(_replace, tensor, shard, output, advance)


def _copy(tensors: list[OutputTensor], shard: OutputShard, output: OutputFile, advance: Advance) -> dict[str, Digest]:
    """A run of untouched tensors, in as few ranges as their places in the base allow."""
    ranges: list[tuple[Path, int, int, int]] = []
    for tensor in tensors:
        if tensor.stored is None:
            raise BadInput(f"{tensor.info.name!r} is to be copied from a base that does not have it.")
        source, target = tensor.stored.offset, shard.header.data_start + tensor.info.start
        if ranges:
            path, begin, end, to = ranges[-1]
            if (path, end, to + end - begin) == (tensor.stored.shard.path, source, target):
                ranges[-1] = (path, begin, source + tensor.info.nbytes, to)
                continue
        ranges.append((tensor.stored.shard.path, source, source + tensor.info.nbytes, target))
    for path, begin, end, to in ranges:
        output.copy(path, begin, end - begin, to, advance)
    return {}


def _replace(tensor: OutputTensor, shard: OutputShard, output: OutputFile, advance: Advance) -> dict[str, Digest]:
    """The bytes of the one adapter's full tensor [A5]."""
    part = tensor.edit.replaces()
    if part is None or part.full is None:
        raise BadInput(f"{tensor.info.name!r} is to be replaced, and nothing replaces it.")
    raw = to_memory(values(part.adapter.full_tensor(part.full)))
    if len(raw) != tensor.info.nbytes:
        raise BadInput(f"{part.adapter.label} has {len(raw):,} bytes for it, expected {tensor.info.nbytes:,}.")
    output.write(raw, shard.header.data_start + tensor.info.start)
    advance(len(raw))
    return {tensor.info.name: Digest.of(raw)}


class _Scratch(threading.local):
    """What a thread computes in: fresh pages for each tensor would cost more than the arithmetic."""

    def __init__(self) -> None:
        self.workspace = Workspace()
        self.buffer = memoryview(bytearray(TILE_BYTES))


class _Computation:
    """Edits one tensor: read a tile, compute it, hash and write it."""

    def __init__(self, combining: Combining, device: torch.device) -> None:
        self._combining = combining
        self._device = device
        self._scratch = _Scratch()

    def write(
        self, tensor: OutputTensor, shard: OutputShard, output: OutputFile, advance: Advance
    ) -> dict[str, Digest]:
        stored, info = tensor.stored, tensor.info
        if stored is None:
            raise BadInput(f"{info.name!r} is to be computed from a base that does not have it.")
        target = torch_dtype(info.dtype, info.name)
        before, after = Hasher(), Hasher()
        position = shard.header.data_start + info.start
        try:
            shape = tensor.edit.view(info.shape)
            edit = tensor.edit.load(info.name, stored, self._combining, self._device)
            dtype = torch_dtype(stored.info.dtype, info.name)
            scratch = self._scratch
            prepared = edit.prepare(shape, dtype, target, self._device, workspace=scratch.workspace)
            for first, tile, W in _tiles(stored, shape, scratch.buffer):
                before.update(tile)
                # In place where the dtype stays: fresh pages would cost more than the arithmetic.
                on_device = W.to(self._device)
                out = on_device if W.dtype == target else torch.empty_like(on_device, dtype=target)
                prepared.tile(on_device, first, out)
                raw = to_memory(out.cpu())
                after.update(raw)
                output.write(raw, position)
                position += len(raw)
                advance(len(raw))
        except BadInput as error:
            raise type(error)(f"Tensor {info.name!r}: {error}") from error
        if before.digest() != tensor.content:
            raise BadInput(
                f"Tensor {info.name!r} of {stored.shard.path} is not what it was when it was hashed: the file was "
                "changed; add the base again."
            )
        return {info.name: after.digest()}


def _tiles(
    stored: StoredTensor, shape: tuple[int, ...], buffer: memoryview
) -> Iterator[tuple[int, memoryview, torch.Tensor]]:
    """Runs of rows of a stored tensor seen in ``shape``: the first row, the raw bytes, and a CPU tensor over them.

    The rows of a stack of matrices are counted through all of them. A row that is longer than ``buffer`` gets one of
    its own.
    """
    dtype = torch_dtype(stored.info.dtype, stored.info.name)
    columns = shape[-1:] if len(shape) > 1 else ()
    row = prod(columns) * dtype.itemsize
    if not stored.info.nbytes:
        return
    first, size = 0, max(1, TILE_BYTES // row) * row
    for tile in stored.chunks(size, buffer if size <= len(buffer) else None):
        count = len(tile) // row
        yield first, tile, from_buffer(tile, dtype, (count, *columns))
        first += count
