"""Running a plan: shard by shard, untouched ranges by the kernel, touched tensors tile by tile.

Memory is, for each thread, a tile and the factors of one tensor; never a tensor, a shard or the model.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import groupby
from math import prod
from pathlib import Path

import torch

from loreg.checkpoint import Advance, StoredTensor, open_binary, read_exactly
from loreg.digest import Digest, Hasher
from loreg.errors import BadInput, CheckFailed
from loreg.format.safetensors import Header
from loreg.merge.combining import Combining
from loreg.merge.inputs import values
from loreg.merge.layout import Action, OutputShard, OutputTensor
from loreg.merge.plan import MergePlan
from loreg.merge.workers import results, workers
from loreg.tensors import from_buffer, to_memory, torch_dtype

TILE_ELEMENTS = 1 << 20
_COPY_CHUNK = 64 << 20
_BUFFER = 4 << 20
# copy_file_range is refused across some file systems, and by some of them: then the bytes pass through us.
_NO_KERNEL_COPY = frozenset({errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM})


def execute(plan: MergePlan, folder: Path, *, device: torch.device, advance: Advance) -> dict[str, Digest]:
    """Write every shard into ``folder``, each flushed to the disk. Returns the content digests of what changed.

    ``advance`` is told the bytes written. Raises BadInput if an input is unreadable or not what was planned,
    or an element cannot be merged; CheckFailed if the disk is full or fails.
    """
    computation = _Computation(plan.combining, device)
    digests: dict[str, Digest] = {}
    with workers(device) as pool:
        for shard in plan.shards:
            with writing(folder / shard.name, shard.header) as output:
                for written in results(pool, _jobs(shard, output, computation, advance)):
                    digests.update(written)
    return digests


def _jobs(
    shard: OutputShard, output: int, computation: _Computation, advance: Advance
) -> Iterator[Callable[[], dict[str, Digest]]]:
    """The work on one shard, in independent pieces; each gives the digests of the changed tensors in it."""
    for action, group in groupby(shard.tensors, key=lambda tensor: tensor.action):
        if action is Action.COPY:
            yield partial(_copy, list(group), shard, output, advance)
        else:
            write = _replace if action is Action.REPLACE else computation.write
            for tensor in group:
                yield partial(write, tensor, shard, output, advance)


@contextmanager
def writing(path: Path, header: Header) -> Iterator[int]:
    """A new file of its final size with ``header`` in it, as a descriptor; flushed to the disk on success."""
    descriptor = -1
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        os.posix_fallocate(descriptor, 0, header.file_size)
        write_exactly(descriptor, memoryview(header.raw), 0)
        yield descriptor
        os.fsync(descriptor)
    except OSError as error:
        raise CheckFailed(
            f"{path} cannot be written: {error.strerror}; free some space, or check the disk."
        ) from error
    finally:
        if descriptor >= 0:
            os.close(descriptor)


def write_exactly(descriptor: int, data: memoryview, offset: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:], offset + done)


def _copy(tensors: list[OutputTensor], shard: OutputShard, output: int, advance: Advance) -> dict[str, Digest]:
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
        copy_range(path, begin, end - begin, output, to, advance)
    return {}


def copy_range(path: Path, offset: int, length: int, output: int, target: int, advance: Advance) -> None:
    """``length`` bytes from ``offset`` of ``path`` to ``target`` of ``output``, inside the kernel if it can."""
    with open_binary(path) as file:
        done, kernel = 0, True
        buffer = memoryview(bytearray(0))
        while done < length:
            if kernel:
                wanted = min(_COPY_CHUNK, length - done)
                try:
                    count = os.copy_file_range(file.fileno(), output, wanted, offset + done, target + done)
                except OSError as error:
                    if error.errno not in _NO_KERNEL_COPY:
                        raise
                    kernel, buffer = False, memoryview(bytearray(_BUFFER))
                    continue
                if count == 0:
                    raise BadInput(f"{path} is truncated: expected {length:,} bytes at {offset:,}, found {done:,}.")
            else:
                piece = buffer[: min(len(buffer), length - done)]
                read_exactly(file.fileno(), piece, offset + done, path)
                write_exactly(output, piece, target + done)
                count = len(piece)
            done += count
            advance(count)


def _replace(tensor: OutputTensor, shard: OutputShard, output: int, advance: Advance) -> dict[str, Digest]:
    """The bytes of the one adapter's full tensor [A5]."""
    part = tensor.edit.replaces()
    if part is None or part.full is None:
        raise BadInput(f"{tensor.info.name!r} is to be replaced, and nothing replaces it.")
    raw = to_memory(values(part.adapter.full_tensor(part.full)))
    if len(raw) != tensor.info.nbytes:
        raise BadInput(f"{part.adapter.label} has {len(raw):,} bytes for it, expected {tensor.info.nbytes:,}.")
    write_exactly(output, raw, shard.header.data_start + tensor.info.start)
    advance(len(raw))
    return {tensor.info.name: Digest.of(raw)}


class _Computation:
    """Edits one tensor: read a tile, compute it, hash and write it."""

    def __init__(self, combining: Combining, device: torch.device) -> None:
        self._combining = combining
        self._device = device

    def write(self, tensor: OutputTensor, shard: OutputShard, output: int, advance: Advance) -> dict[str, Digest]:
        stored, info = tensor.stored, tensor.info
        if stored is None:
            raise BadInput(f"{info.name!r} is to be computed from a base that does not have it.")
        target = torch_dtype(info.dtype, info.name)
        before, after = Hasher(), Hasher()
        position = shard.header.data_start + info.start
        try:
            shape = tensor.edit.view(info.shape)
            edit = tensor.edit.load(info.name, stored, self._combining, self._device)
            prepared = edit.prepare(shape, torch_dtype(stored.info.dtype, info.name), target, self._device)
            for first, tile, W in _tiles(stored, shape):
                before.update(tile)
                # In place where the dtype stays: fresh pages would cost more than the arithmetic.
                on_device = W.to(self._device)
                out = on_device if W.dtype == target else torch.empty_like(on_device, dtype=target)
                prepared.tile(on_device, first, out)
                raw = to_memory(out.cpu())
                after.update(raw)
                write_exactly(output, raw, position)
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


def _tiles(stored: StoredTensor, shape: tuple[int, ...]) -> Iterator[tuple[int, memoryview, torch.Tensor]]:
    """Runs of rows of a stored tensor seen in ``shape``: the first row, the raw bytes, and a CPU tensor over them.

    The rows of a stack of matrices are counted through all of them.
    """
    dtype = torch_dtype(stored.info.dtype, stored.info.name)
    columns = shape[-1:] if len(shape) > 1 else ()
    row = prod(columns) * dtype.itemsize
    if not stored.info.nbytes:
        return
    first = 0
    for tile in stored.chunks(max(1, TILE_ELEMENTS * dtype.itemsize // row) * row):
        count = len(tile) // row
        yield first, tile, from_buffer(tile, dtype, (count, *columns))
        first += count
