"""Other ways than a copy in memory to have the tensors of a blob: views of its file, or on a CUDA device."""

from __future__ import annotations

import errno
import mmap
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import torch

from loreg.algebra.delta import LowRank
from loreg.checkpoint import FileStamp, StoredTensor, open_binary, read_exactly
from loreg.digest import Digest
from loreg.errors import BadInput
from loreg.format.safetensors import Header
from loreg.merge.inputs import BlobReader
from loreg.tensors import from_buffer, to_memory, torch_dtype

_POPULATE_READ = 22
"""MADV_POPULATE_READ of linux/mman.h, which Python has no name for; since Linux 5.14."""

_STAGE = 4 << 20
"""Bytes of each of the two pinned buffers: to pin is slow, and to start a copy of that many costs little."""


@dataclass(slots=True)
class Content:
    """What was found out of a blob: its header, and which of its tensors are finite. Its digest says all its bytes,
    so that none of it has to be found out again."""

    header: Header | None = None
    finite: set[str] = field(default_factory=set)


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

    def low_rank(self, A: str, B: str, scale: float, device: torch.device) -> LowRank:
        left, right = self.tensor(B).to(device), self.tensor(A).to(device)
        if {A, B} <= self._content.finite:
            return LowRank.of_finite(left, right, scale)
        delta = LowRank(left, right, scale)
        self._content.finite |= {A, B}
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

    def bring(self, stored: StoredTensor) -> torch.Tensor:
        info = stored.info
        kind = torch_dtype(info.dtype, info.name)
        start, end = stored.offset, stored.offset + info.nbytes
        if info.nbytes:
            self._populate(start, end, info.name)
        return from_buffer(memoryview(self._pages)[start:end], kind, info.shape)

    def _populate(self, start: int, end: int, name: str) -> None:
        """Bring the pages in one call, several times faster than one fault after the other; and what would be a
        signal at a fault, such as an error of the disk, is an error of this call."""
        first = start - start % mmap.PAGESIZE
        try:
            self._pages.madvise(_POPULATE_READ, first, end - first)
        except OSError as error:
            if error.errno != errno.EINVAL:  # an older kernel; then they come when they are touched
                raise BadInput(f"{self.path} cannot be read up to the end of {name!r}: was it cut?") from error


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

    def bring(self, stored: StoredTensor) -> torch.Tensor:
        info = stored.info
        kind = torch_dtype(info.dtype, info.name)
        there = torch.empty(info.nbytes, dtype=torch.uint8, device=self._device)
        with open_binary(self.path) as file, torch.cuda.device(self._device):
            for first in range(0, info.nbytes, _STAGE):
                stage = next(self._stages)
                piece = stage.buffer[: min(_STAGE, info.nbytes - first)]
                stage.copied.synchronize()
                read_exactly(file.fileno(), to_memory(piece), stored.offset + first, self.path)
                there[first : first + len(piece)].copy_(piece, non_blocking=True)
                stage.copied.record()
        return there.view(kind).view(info.shape)
