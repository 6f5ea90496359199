"""Files that a merge writes: of their full size at once, and on their way to the disk while it computes."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from loreg.checkpoint import Advance, open_binary, read_exactly
from loreg.errors import BadInput, CheckFailed

_COPY_CHUNK = 64 << 20
_BUFFER = 4 << 20
# copy_file_range is refused across some file systems, and by some of them: then the bytes pass through us.
_NO_KERNEL_COPY = frozenset({errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM})
_FLUSH_BYTES = 128 << 20
"""So much is written before the disk is told to begin, so that little is left to wait for at the end."""


class OutputFile:
    """A file that several threads write, and another one flushes."""

    def __init__(self, path: Path, flusher: ThreadPoolExecutor) -> None:
        self._path, self._flusher = path, flusher
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        self._since, self._flushes = 0, list[Future[None]]()

    def resize(self, size: int) -> None:
        # Not by posix_fallocate: a memory-backed file system would fill all its pages, and then again with data.
        os.ftruncate(self._descriptor, size)

    def write(self, data: memoryview, offset: int) -> None:
        """All of ``data`` at ``offset``."""
        done = 0
        while done < len(data):
            done += os.pwrite(self._descriptor, data[done:], offset + done)
        self._written(done)

    def copy(self, path: Path, offset: int, length: int, target: int, advance: Advance) -> None:
        """``length`` bytes from ``offset`` of ``path`` to ``target``, inside the kernel if it can. Raises BadInput if
        ``path`` has not so many."""
        with open_binary(path) as file:
            done, kernel = 0, True
            buffer = memoryview(bytearray(0))
            while done < length:
                if kernel:
                    wanted = min(_COPY_CHUNK, length - done)
                    try:
                        count = os.copy_file_range(
                            file.fileno(), self._descriptor, wanted, offset + done, target + done
                        )
                    except OSError as error:
                        if error.errno not in _NO_KERNEL_COPY:
                            raise
                        kernel, buffer = False, memoryview(bytearray(_BUFFER))
                        continue
                    if count == 0:
                        raise BadInput(
                            f"{path} is truncated: expected {length:,} bytes at {offset:,}, found {done:,}."
                        )
                    self._written(count)
                else:
                    piece = buffer[: min(len(buffer), length - done)]
                    read_exactly(file.fileno(), piece, offset + done, path)
                    self.write(piece, target + done)
                    count = len(piece)
                done += count
                advance(count)

    def _written(self, size: int) -> None:
        self._since += size  # about so much: two threads may add at once
        if self._since >= _FLUSH_BYTES:
            self._since = 0
            self._flushes.append(self._flusher.submit(os.fdatasync, self._descriptor))

    def finish(self, then: Callable[[], None] | None) -> Future[None]:
        """To be called when all is written: done when it is on the disk, closed, and ``then`` was called."""
        return self._flusher.submit(self._flush, then)

    def _flush(self, then: Callable[[], None] | None) -> None:
        try:
            for flush in self._flushes:
                flush.result()
            os.fsync(self._descriptor)
        finally:
            self.close()
        if then is not None:
            then()

    def close(self) -> None:
        """Without flushing it; more than once is the same as once."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


class OutputFiles:
    """The files of one merge: each is flushed while the next is written, and all are when the context ends."""

    def __init__(self) -> None:
        self._flusher = ThreadPoolExecutor(1, thread_name_prefix="loreg-flush")
        self._finished: list[tuple[Path, Future[None]]] = []

    def __enter__(self) -> OutputFiles:
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        self._flusher.shutdown(wait=True)
        if kind is None:
            for path, flushed in self._finished:
                with _named(path):
                    flushed.result()

    @contextmanager
    def create(self, path: Path, size: int, then: Callable[[], None] | None = None) -> Iterator[OutputFile]:
        """A new file of ``size`` bytes; ``then`` is called once it is on the disk. Raises CheckFailed for what that
        says."""
        with _named(path):
            file = OutputFile(path, self._flusher)
            try:
                file.resize(size)
                yield file
            except BaseException:
                self._flusher.submit(file.close).result()  # not under the hands of a flush
                raise
        self._finished.append((path, file.finish(then)))


@contextmanager
def _named(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckFailed(
            f"{path} cannot be written: {error.strerror}; free some space, or check the disk."
        ) from error
