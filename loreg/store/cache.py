"""Local copies of blobs whose store is not in files, for whoever needs a file: ``cache/blobs/<aa>/<64 hex>``.

A copy is named by its digest, and believed for its bytes alone: whoever takes it hashes it first. So nothing here is
synced, and what a power loss leaves behind is fetched again.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from loreg.digest import Digest, Hasher
from loreg.errors import CheckFailed, UsageError
from loreg.store.base import as_bytes

DEFAULT_LIMIT = 20_000_000_000
_SPARED = 3600
"""Seconds since its last use in which a copy stays, whatever the limit: another process may be about to open it."""
_ABANDONED = 86_400
_NOTED = 600
"""Seconds within which a use is not noted again: a note changes the file's times, and has others hash it anew."""


def limit_from_environment() -> int:
    """``$LOREG_CACHE_BYTES``, default 20 GB. Raises UsageError."""
    text = os.environ.get("LOREG_CACHE_BYTES") or str(DEFAULT_LIMIT)
    if not text.isascii() or not text.isdecimal():
        raise UsageError(f"LOREG_CACHE_BYTES is {text!r}: expected a number of bytes, such as {DEFAULT_LIMIT}.")
    return int(text)


class BlobCache:
    """Below ``directory``, at most about ``limit`` bytes: the least recently used leave. Never one that this process
    has handed out, or that anybody used within the last hour: for these the limit is exceeded."""

    def __init__(self, directory: Path, limit: int = DEFAULT_LIMIT) -> None:
        self._directory = directory
        self._limit = limit
        self._in_use: set[Path] = set()
        self._added = 0
        self._swept = False

    def path(self, digest: Digest) -> Path:
        """Where the copy is if there is one; it stays there as long as this process does."""
        path = self._directory / digest.hex[:2] / digest.hex
        self._in_use.add(path)
        return path

    def note(self, path: Path) -> None:
        """That a copy was used just now."""
        with suppress(OSError):  # gone, or somebody else's: then it is as if it had not been used
            status, now = path.stat(), time.time_ns()
            if now - status.st_atime_ns > _NOTED * 1_000_000_000:
                os.utime(path, ns=(now, status.st_mtime_ns))

    def add(self, digest: Digest, chunks: Iterable[bytes | memoryview]) -> Digest:
        """Keep ``chunks`` as the copy of ``digest`` if they are its bytes; returns the digest that they have.

        Raises CheckFailed if the disk is full or cannot be written. What ``chunks`` raises passes unchanged.
        """
        path = self.path(digest)
        partial = self._directory / "tmp" / f"{digest.hex}.{os.urandom(8).hex()}"
        hasher = Hasher()
        try:
            with self._typed():
                partial.parent.mkdir(parents=True, exist_ok=True)
                descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                for chunk in chunks:
                    data = as_bytes(chunk)
                    hasher.update(data)
                    with self._typed():
                        while data:
                            self._added += (written := os.write(descriptor, data))
                            data = data[written:]
            finally:
                os.close(descriptor)
            if hasher.digest() == digest:
                with self._typed():
                    partial.chmod(0o444)
                    path.parent.mkdir(parents=True, exist_ok=True)
                    partial.replace(path)
        finally:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
        if not self._swept or self._added > self._limit // 64:
            self._sweep()
        return hasher.digest()

    def _sweep(self) -> None:
        """Delete what is too much, and what processes that died have left of their fetching."""
        self._swept, self._added, now = True, 0, time.time()
        for path, status in _files(self._directory / "tmp"):
            if now - status.st_mtime > _ABANDONED:
                _delete(path)
        with suppress(OSError):
            copies = [one for folder in self._directory.iterdir() if folder.name != "tmp" for one in _files(folder)]
            copies.sort(key=lambda copy: copy[1].st_atime_ns)
            excess = sum(status.st_size for _, status in copies) - self._limit
            for path, status in copies:
                if excess > 0 and path not in self._in_use and now - status.st_atime > _SPARED:
                    _delete(path)
                    excess -= status.st_size

    @contextmanager
    def _typed(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CheckFailed(
                f"a blob cannot be kept in {self._directory}: {error.strerror or error}; free some space, or choose "
                "another place with LOREG_HOME."
            ) from error


def _files(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    with suppress(OSError):
        for entry in folder.iterdir():
            with suppress(OSError):
                yield entry, entry.lstat()


def _delete(path: Path) -> None:
    with suppress(OSError):
        path.unlink()
