"""Tensors that were made and are to be stored: on disk until then, so that memory does not grow with the model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock

from loreg.adapters.draft import RawTensor
from loreg.errors import CheckFailed
from loreg.registry.storage import PendingBlob


@dataclass
class Spill:
    """A directory of one piece of work. For several threads at once."""

    folder: Path
    _end: int = 0
    _lock: Lock = field(default_factory=Lock)

    def keep(self, raw: RawTensor) -> RawTensor:
        """The same tensor with its bytes in a file: behind those before it, if they are in memory."""
        if isinstance(raw.data, Path):
            return raw
        (data,) = raw.chunks()
        path = self.folder / "tensors"
        with self._lock, _typed(self.folder), path.open("ab") as file:
            start = self._end
            file.write(data)
            self._end = start + len(data)
        return replace(raw, data=path, offset=start)

    def file(self, blob: PendingBlob) -> Path:
        """A file with the bytes of a blob."""
        path = self.folder / blob.digest.hex
        with _typed(self.folder), path.open("wb") as file:
            for chunk in blob.chunks():
                file.write(chunk)
        return path


@contextmanager
def spilling(beside: Path) -> Iterator[Spill]:
    """A directory in ``beside``, which need not exist, of a name that no other has; gone when the block ends.

    Raises CheckFailed for what the disk says, here and of every file.
    """
    with _typed(beside):
        beside.mkdir(parents=True, exist_ok=True)
        folder = TemporaryDirectory(prefix="factors-", dir=beside, ignore_cleanup_errors=True)
    with folder as name:
        yield Spill(Path(name))


@contextmanager
def _typed(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckFailed(
            f"Factors cannot be written to {folder}: {error.strerror}; free some space, or check the disk."
        ) from error
