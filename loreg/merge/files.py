"""Files that a merge writes: of their full size at once, and on their way to the disk while it computes."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from loreg.checkpoint import Advance, open_binary, read_exactly
from loreg.errors import CheckFailed

_COPY_CHUNK = 64 << 20
_BUFFER = 4 << 20
# copy_file_range is refused across some file systems, and by some of them: then the bytes pass through us. So they do
# where a disk fails: it does not say which of the two.
_NO_KERNEL_COPY = frozenset({errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EIO})
_FLUSH_BYTES = 128 << 20
"""So much is written before the disk is told to begin, so that little is left to wait for at the end."""


class OutputFile:
    """A file of ``size`` bytes that several threads write, and another one flushes.

    Raises CheckFailed, naming the file, for what the disk says.
    """

    def __init__(self, path: Path, size: int, flusher: ThreadPoolExecutor) -> None:
        self._path, self._flusher, self._descriptor = path, flusher, -1
        self._since, self._flushes = 0, list[Future[None]]()
        self._in_kernel = True
        with _named(path):
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            try:
                # Not by posix_fallocate: a memory-backed file system would fill all its pages, and then with data.
                os.ftruncate(self._descriptor, size)
            except OSError:
                self.close()
                raise

    def write(self, data: memoryview, offset: int) -> None:
        """All of ``data`` at ``offset``."""
        done = 0
        with _named(self._path):
            while done < len(data):
                done += os.pwrite(self._descriptor, data[done:], offset + done)
            self._written(done)

    def copy(self, source: int, path: Path, offset: int, length: int, target: int) -> None:
        """``length`` bytes from ``offset`` of the open file ``source``, of that ``path``, to ``target``: inside the
        kernel if it can. Raises BadInput if ``path`` has not so many, or cannot be read."""
        done = 0
        while done < length and self._in_kernel:
            try:
                count = os.copy_file_range(source, self._descriptor, length - done, offset + done, target + done)
            except OSError as error:
                if error.errno not in _NO_KERNEL_COPY:
                    raise _failed(self._path, error) from error
                self._in_kernel = error.errno == errno.EIO  # which says something of this range alone
                break
            if count == 0:
                break  # the end of the file, which reading it says
            done += count
            with _named(self._path):
                self._written(count)
        buffer = memoryview(bytearray(min(_BUFFER, length - done)))
        while done < length:
            piece = buffer[: length - done]
            read_exactly(source, piece, offset + done, path)
            self.write(piece, target + done)
            done += len(piece)

    def _written(self, size: int) -> None:
        self._since += size  # about so much: two threads may add at once
        if self._since >= _FLUSH_BYTES:
            self._since = 0
            self._flushes.append(self._flusher.submit(os.fdatasync, self._descriptor))

    def finish(self, then: Callable[[], None] | None = None) -> None:
        """To be called when all is written: it is flushed and closed, and ``then`` is called."""
        self._flushes.append(self._flusher.submit(self._flush, list(self._flushes), then))

    def _flush(self, before: list[Future[None]], then: Callable[[], None] | None) -> None:
        for flush in before:
            flush.result()
        os.fsync(self._descriptor)
        self.close()
        if then is not None:
            then()

    def settle(self) -> None:
        """Waits until it is on the disk."""
        with _named(self._path):
            for flush in self._flushes:
                flush.result()

    def close(self) -> None:
        """Without flushing it; more than once is the same as once."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


def copy_range(path: Path, offset: int, length: int, to: Sequence[tuple[OutputFile, int]], advance: Advance) -> None:
    """``length`` bytes from ``offset`` of ``path`` to each place in ``to``: read once, as what is copied to the
    others is in memory still. Raises BadInput if ``path`` has not so many."""
    with open_binary(path) as file:
        for done in range(0, length, _COPY_CHUNK):
            size = min(_COPY_CHUNK, length - done)
            for output, position in to:
                output.copy(file.fileno(), path, offset + done, size, position + done)
                advance(size)


class OutputFiles:
    """The files of one merge: each is flushed while the next is written, and all are when the context ends."""

    def __init__(self) -> None:
        self._flusher = ThreadPoolExecutor(1, thread_name_prefix="loreg-flush")
        self._files: list[OutputFile] = []

    def __enter__(self) -> OutputFiles:
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        self._flusher.shutdown(wait=True, cancel_futures=kind is not None)
        try:
            if kind is None:
                self.settle()
        finally:  # of all: one that the disk refuses is no reason to leave the others open
            for file in self._files:
                file.close()

    def settle(self) -> None:
        """Waits until all that is finished is on the disk, and what was to be called then was."""
        for file in self._files:
            file.settle()

    def create(self, path: Path, size: int) -> OutputFile:
        """A new file of ``size`` bytes, to be written and then finished."""
        file = OutputFile(path, size, self._flusher)
        self._files.append(file)
        return file


@contextmanager
def _named(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _failed(path, error) from error


def _failed(path: Path, error: OSError) -> CheckFailed:
    return CheckFailed(f"{path} cannot be written: {error.strerror}; free some space, or check the disk.")
