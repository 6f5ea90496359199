"""Writing and reading undo journals, in bounded memory.

The records of a tensor are spilled as they come, shard by shard, into a file that survives a merge that is killed;
when all is written they are put together in the one order of a canonical file, whatever the threads did.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from loreg.algebra import native
from loreg.checkpoint import open_binary, read_range, reading
from loreg.digest import Digest, Hasher
from loreg.errors import BadInput
from loreg.format.journal import BLOCK, ESCAPE, RAW, TENSOR, Record, Undoes, records
from loreg.format.safetensors import BITS, Header, TensorInfo, read_header
from loreg.merge.files import OutputFiles
from loreg.tensors import from_buffer, to_memory

Array = npt.NDArray[Any]
_BATCH = 1 << 20
_RAW = np.array([RAW], "<u4").tobytes()


@dataclass(frozen=True, slots=True)
class Entry:
    """The records of one tensor: where they are in a spill, and the digest of all of them."""

    extents: tuple[tuple[int, int], ...]
    digest: Digest

    @property
    def size(self) -> int:
        return sum(size for _, size in self.extents)

    def to_json(self) -> dict[str, Any]:
        return {"extents": [list(extent) for extent in self.extents], "digest": self.digest.hex}

    @classmethod
    def from_json(cls, document: Any) -> Entry:
        return cls(tuple((int(at), int(size)) for at, size in document["extents"]), Digest(document["digest"]))


class Spill:
    """The records of one shard's tensors, written by several threads at once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(exist_ok=True)
        self._file = path.open("wb", buffering=0)
        self._lock = threading.Lock()
        self._end = 0
        self.entries: dict[str, Entry] = {}

    def append(self, data: bytes | bytearray) -> tuple[int, int]:
        with self._lock:
            at, self._end = self._end, self._end + len(data)
        done = 0
        while done < len(data):
            done += os.pwrite(self._file.fileno(), memoryview(data)[done:], at + done)
        return at, len(data)

    def flush(self) -> None:
        """On the disk, and closed."""
        os.fsync(self._file.fileno())
        self._file.close()

    def close(self) -> None:
        """Without flushing it; more than once is the same as once."""
        self._file.close()


def holds(path: Path, entries: Mapping[str, Entry]) -> bool:
    """Whether a spill has the bytes that ``entries`` say."""
    for entry in entries.values():
        hasher = Hasher()
        for at, size in entry.extents:
            for piece in read_range(path, at, size):
                hasher.update(piece)
        if hasher.digest() != entry.digest:
            return False
    return True


def width_of(tensor: TensorInfo) -> int:
    """Bytes of what a journal counts as an element: those of less than a byte are counted by bytes [U3]."""
    return max(1, BITS[tensor.dtype] // 8)


class Recorder:
    """Takes one tensor of the base, in runs of elements of any length, and writes its records. For one thread."""

    def __init__(self, spill: Spill, tensor: TensorInfo) -> None:
        self._spill, self._name, self._width = spill, TENSOR + tensor.name, width_of(tensor)
        self._hasher = Hasher()
        self._extents: list[tuple[int, int]] = []
        self._out = bytearray()
        self._small: Array = np.empty(0, np.int8)
        self._raw = bytearray()
        self._wide: Array = np.empty(0, np.int64)
        self._room = torch.empty(0, dtype=torch.uint8)

    def add(self, raw: memoryview, small: Array, wide: Array) -> None:
        """The next elements: their bytes, the corrections that fit into a byte, and those that do not, in order,
        where ``small`` has ESCAPE."""
        done, seen = 0, 0
        if len(self._small):
            done = min(BLOCK - len(self._small), len(small))
            seen = int(np.count_nonzero(small[:done] == ESCAPE)) if len(wide) else 0
            self._carry(raw[: done * self._width], small[:done], wide[:seen])
            if len(self._small) == BLOCK:
                self._flush_carried()
        whole = done + (len(small) - done) // BLOCK * BLOCK
        rest = int(np.count_nonzero(small[whole:] == ESCAPE)) if len(wide) else 0
        last = len(wide) - rest
        if whole > done:
            self._blocks(raw[done * self._width : whole * self._width], small[done:whole], wide[seen:last])
        self._carry(raw[whole * self._width :], small[whole:], wide[last:])

    def whole(self, raw: memoryview) -> None:
        """The next elements as they are: all or none of a tensor's runs."""
        self._raw += raw
        block = BLOCK * self._width
        full = len(self._raw) // block * block
        for at in range(0, full, block):
            self._put(_RAW, self._raw[at : at + block])
        del self._raw[:full]

    def finish(self) -> None:
        if len(self._small):
            self._flush_carried()
        elif self._raw:
            self._put(_RAW, self._raw)
        self._spill_out()
        self._spill.entries[self._name] = Entry(tuple(self._extents), self._hasher.digest())

    def _carry(self, raw: memoryview, small: Array, wide: Array) -> None:
        if len(small):
            self._raw += raw
            self._small = np.concatenate([self._small, small])
            self._wide = np.concatenate([self._wide, wide])

    def _flush_carried(self) -> None:
        raw, self._raw = self._raw, bytearray()
        self._blocks(memoryview(raw), self._small, self._wide)
        self._small, self._wide = np.empty(0, np.int8), np.empty(0, np.int64)

    def _blocks(self, raw: memoryview, small: Array, wide: Array) -> None:
        """Whole blocks, or the last one."""
        if native.library is not None:
            room = len(raw) + 4 * -(-len(small) // BLOCK)
            if len(self._room) < room:
                self._room = torch.empty(room, dtype=torch.uint8)
            corrections, before = torch.from_numpy(small), from_buffer(raw, torch.uint8, (len(raw),))
            size = native.records(corrections, before, torch.from_numpy(wide), BLOCK, self._room)
            self._put(to_memory(self._room)[:size])
            return
        index = np.flatnonzero(small)
        offsets, values = index % BLOCK, small[index]
        bounds = np.searchsorted(index, range(0, len(small) + BLOCK, BLOCK))
        escapes = np.searchsorted(np.flatnonzero(values == ESCAPE), bounds)
        parts = offsets.astype("<u2").data, values.data, wide.astype("<i8", copy=False).data
        cuts, size = zip(bounds.tolist(), escapes.tolist(), strict=True), BLOCK * self._width
        for block, ((a, c), (b, d)) in enumerate(pairwise(cuts)):
            here = raw[block * size : (block + 1) * size]
            if 3 * (b - a) + 8 * (d - c) > len(here):
                self._put(_RAW, here)
            else:
                self._put((b - a).to_bytes(4, "little"), parts[0][a:b], parts[1][a:b], parts[2][c:d])

    def _put(self, *parts: bytes | bytearray | memoryview) -> None:
        for part in parts:
            self._out += part
        if len(self._out) >= _BATCH:
            self._spill_out()

    def _spill_out(self) -> None:
        if self._out:
            self._hasher.update(self._out)
            self._extents.append(self._spill.append(self._out))
            self._out = bytearray()


def write_journal(
    path: Path, undoes: Undoes, spilled: Mapping[str, tuple[Path, Entry]], short: Mapping[str, bytes]
) -> int:
    """The journal as a new file, flushed, of entries in spills and of short ones; its size in bytes."""
    sizes = {name: entry.size for name, (_, entry) in spilled.items()}
    header = undoes.header(sizes | {name: len(data) for name, data in short.items()})
    with OutputFiles() as files:
        output = files.create(path, header.file_size)
        output.write(memoryview(header.raw), 0)
        for info in header.tensors:
            at = header.data_start + info.start
            if info.name in short:
                output.write(memoryview(short[info.name]), at)
                continue
            spill, entry = spilled[info.name]
            for begin, size in entry.extents:
                for piece in read_range(spill, begin, size, _BATCH):
                    output.write(piece, at)
                    at += len(piece)
        output.finish()
    return header.file_size


class Journal:
    """A journal on disk. Raises BadInput if it is none."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with open_binary(path) as file, reading(path):
            self._header: Header = read_header(file, path.stat().st_size, what=str(path))
        self.undoes = Undoes.of(self._header, what=str(path))
        self._entries = self._header.by_name()
        self.tensors = {name.removeprefix(TENSOR) for name in self._entries if name.startswith(TENSOR)}
        """Those that it has records of."""

    def named(self, prefix: str) -> dict[str, bytes]:
        """The short entries whose names begin so, by the rest of the name."""
        return {
            name.removeprefix(prefix): b"".join(bytes(piece) for piece in self._pieces(name))
            for name in self._entries
            if name.startswith(prefix)
        }

    def _pieces(self, name: str) -> Iterator[memoryview]:
        info = self._entries[name]
        return read_range(self.path, self._header.data_start + info.start, info.nbytes)

    def corrections(self, tensor: TensorInfo) -> Corrections:
        """Of a tensor of the base."""
        info, width = self._entries[TENSOR + tensor.name], width_of(tensor)
        with reading(self.path):
            file = self.path.open("rb", buffering=_BATCH)
            file.seek(self._header.data_start + info.start)

        def read(size: int) -> bytes:
            with reading(self.path):
                return file.read(size)

        what = f"{self.path}, of tensor {tensor.name!r},"
        found = records(read, info.nbytes, tensor.nbytes // width, width, what=what)
        return Corrections(found, width, file.close)


class Corrections:
    """The records of a tensor, from its first element to its last."""

    def __init__(self, found: Iterator[Record], width: int, close: Callable[[], None]) -> None:
        self._records, self._width, self._close = found, width, close
        self._record = next(found, None)
        self._used = 0

    def apply(self, into: memoryview, predict: Callable[[], None]) -> None:
        """The bytes of the next elements into ``into``.

        ``predict()`` writes what taking the delta back gives there; it is asked only if that is needed.
        """
        words = np.frombuffer(into, f"<i{self._width}")
        done, parts = 0, list[tuple[Array, Record, int]]()
        while done < len(words):
            if self._record is None:
                raise BadInput("a journal ends before its tensor does.")
            take = min(BLOCK - self._used, len(words) - done)
            parts.append((words[done : done + take], self._record, self._used))
            done, self._used = done + take, self._used + take
            if self._used == BLOCK:
                self._record, self._used = next(self._records, None), 0
        if any(record.raw is None for _, record, _ in parts):
            predict()
        for part, record, first in parts:
            if record.raw is None:
                _correct(part, record, first)
            else:
                part[:] = np.frombuffer(record.raw, part.dtype)[first : first + len(part)]

    def finish(self) -> None:
        """To be called after the last element. Raises BadInput if there is more than its records."""
        next(self._records, None)  # a record that was not asked for is not there: it has one for each block
        self._close()


def _correct(words: Array, record: Record, first: int) -> None:
    """Adds to the order numbers [U3] of storage values what the record says from its element ``first`` on."""
    places = np.frombuffer(record.offsets, "<u2").astype(np.int64) - first
    by = np.frombuffer(record.corrections, np.int8).astype(np.int64)
    by[by == ESCAPE] = record.wide
    inside = (places >= 0) & (places < len(words))
    places, by = places[inside], by[inside]
    number = _turned(words[places].astype(np.int64), words.itemsize) + by
    words[places] = _turned(number, words.itemsize).astype(words.dtype)


def _turned(number: Array, width: int) -> Array:
    """Words as order numbers, and back: the negative ones in reverse."""
    turned: Array = np.where(number < 0, number ^ ((1 << (8 * width - 1)) - 1), number)
    return turned
