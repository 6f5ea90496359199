"""Other ways than a copy in memory to have the tensors of a blob: views of its file, or on a CUDA device."""

from __future__ import annotations

import errno
import mmap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import cycle
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import torch

from loreg.algebra.delta import LowRank
from loreg.checkpoint import FileStamp, open_binary, read_exactly
from loreg.digest import Digest
from loreg.errors import BadInput
from loreg.format.safetensors import Header, TensorInfo
from loreg.merge.inputs import BlobReader, PlacedTerm
from loreg.tensors import from_buffer, to_memory, torch_dtype

_POPULATE_READ = 22
"""MADV_POPULATE_READ of linux/mman.h, which Python has no name for; since Linux 5.14."""

_STAGE = 4 << 20
"""Bytes of each of the two pinned buffers: to pin is slow, and to start a copy of that many costs little."""


@dataclass(slots=True)
class Content:
    """What was found out of a blob: its header, and of which terms, by path and index, the tensors are finite. Its
    digest says all its bytes, so that none of it has to be found out again."""

    header: Header | None = None
    sound: set[tuple[str, int]] = field(default_factory=set)


@lru_cache(maxsize=256)
def content_of(digest: Digest) -> Content:
    """Of the blob with that digest, of which the last 256 are remembered."""
    return Content()


class VerifiedBlob(BlobReader):
    """A blob whose bytes are those of its digest, of which ``content`` is known."""

    def __init__(self, path: Path, content: Content) -> None:
        self._content = content
        super().__init__(path)

    def read_header(self, stamp: FileStamp) -> Header:
        known = self._content.header
        if known is not None and known.file_size == stamp.size:
            return known
        self._content.header = super().read_header(stamp)  # or says what is wrong with a file that was cut
        return self._content.header

    def delta(self, term: PlacedTerm, A: torch.Tensor, B: torch.Tensor) -> LowRank:
        path, index, found = term
        if (path, index) in self._content.sound:
            return LowRank.of_sound(B, A, found.scale)
        delta = super().delta(term, A, B)
        self._content.sound.add((path, index))
        return delta


class MappedBlob(VerifiedBlob):
    """The tensors are views of one mapping of the file: no page is copied until somebody writes to it, and then for
    this process alone. The mapping lasts as long as one of them does, also when the file is removed meanwhile.

    Of a file that is cut in place while they are in use the pages behind its new end are gone, and the operating
    system ends whoever touches one (SIGBUS); no store does that to a blob. What is amiss earlier is BadInput, as all
    pages of a tensor are brought before it is handed out.
    """

    @cached_property
    def _pages(self) -> mmap.mmap:
        with open_binary(self.path) as file:
            try:
                return mmap.mmap(file.fileno(), self.shard.stamp.size, access=mmap.ACCESS_COPY)
            except (OSError, ValueError) as error:
                raise BadInput(f"{self.path} cannot be mapped: {error}; was it cut?") from error

    def bring(self, infos: Sequence[TensorInfo]) -> list[torch.Tensor]:
        data, kinds = self.header.data_start, [torch_dtype(info.dtype, info.name) for info in infos]
        for first, last in _neighbours(infos):
            self._populate(data + first.start, data + last.end, last.name)
        return [
            from_buffer(self._pages, kind, info.shape, data + info.start)
            for info, kind in zip(infos, kinds, strict=True)
        ]

    def _populate(self, start: int, end: int, name: str) -> None:
        """Bring the pages in one call, several times faster than one fault after the other; and what would be a
        signal at a fault, such as an error of the disk, is an error of this call."""
        first = start - start % mmap.PAGESIZE
        try:
            self._pages.madvise(_POPULATE_READ, first, end - first)
        except OSError as error:
            if error.errno != errno.EINVAL:  # an older kernel; then they come when they are touched
                raise BadInput(f"{self.path} cannot be read up to the end of {name!r}: was it cut?") from error


def _neighbours(infos: Iterable[TensorInfo]) -> Iterator[tuple[TensorInfo, TensorInfo]]:
    """The first and the last of each run of tensors that lie side by side, but for those that have no bytes."""
    first = last = None
    for info in sorted((info for info in infos if info.nbytes), key=attrgetter("start")):
        if first is None or last is None:
            first = info
        elif info.start > last.end:
            yield first, last
            first = info
        last = info
    if first is not None and last is not None:
        yield first, last


class _Stage(NamedTuple):
    """A pinned buffer; ``copied`` is over when what was last in it has left."""

    buffer: torch.Tensor
    copied: torch.cuda.Event


class StreamedBlob(VerifiedBlob):
    """The tensors are on a CUDA device, each read by pieces through pinned memory into its place there: while one
    piece travels the next is read."""

    def __init__(self, path: Path, content: Content, device: torch.device) -> None:
        super().__init__(path, content)
        self._device = device

    @cached_property
    def _stages(self) -> Iterator[_Stage]:
        """Two of them, in turns."""
        event: Any = torch.cuda.Event  # has no types
        return cycle([_Stage(torch.empty(_STAGE, dtype=torch.uint8, pin_memory=True), event()) for _ in range(2)])

    def bring(self, infos: Sequence[TensorInfo]) -> list[torch.Tensor]:
        with open_binary(self.path) as file, torch.cuda.device(self._device):
            return [self._streamed(file.fileno(), info) for info in infos]

    def _streamed(self, descriptor: int, info: TensorInfo) -> torch.Tensor:
        kind = torch_dtype(info.dtype, info.name)
        there = torch.empty(info.nbytes, dtype=torch.uint8, device=self._device)
        begin = self.header.data_start + info.start
        for done in range(0, info.nbytes, _STAGE):
            stage = next(self._stages)
            piece = stage.buffer[: min(_STAGE, info.nbytes - done)]
            stage.copied.synchronize()
            read_exactly(descriptor, to_memory(piece), begin + done, self.path)
            there[done : done + len(piece)].copy_(piece, non_blocking=True)
            stage.copied.record()
        return there.view(kind).view(info.shape)
