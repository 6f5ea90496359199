"""Directories that appear whole or not at all: written beside their place, flushed, and renamed into it."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from loreg.digest import Digest
from loreg.errors import CheckFailed, Conflict


@contextmanager
def staged(out: Path, identity: Digest) -> Iterator[Path]:
    """A directory beside ``out`` that becomes ``out`` when the block succeeds, and vanishes when it does not.

    Its name follows from ``out`` and ``identity`` (of the work), so that what a killed process left is found
    again and not piled up. Raises Conflict if ``out`` is taken, or another process is at the same work.
    """
    if out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise Conflict(f"{out} exists and is not an empty directory: choose another, or remove it first.")
    folder = out.parent / f".{out.name}.{identity.short}.partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise CheckFailed(f"{folder} cannot be made: {error.strerror}.") from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Conflict(f"Another process is writing {out}: wait for it, or choose another directory.") from error
        try:
            _empty(folder)
            yield folder
            _put(folder, out)
        except BaseException:
            # Ctrl-C included: a half-merged model is of no use, and large.
            shutil.rmtree(folder, ignore_errors=True)
            raise
    except OSError as error:
        raise CheckFailed(
            f"{out} cannot be written: {error.strerror}; free some space, or check the disk."
        ) from error
    finally:
        os.close(lock)


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _put(folder: Path, out: Path) -> None:
    _flush(folder)
    with suppress(FileNotFoundError):
        out.rmdir()
    folder.rename(out)
    _flush(out.parent)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Flush every file and directory under ``folder`` to the disk."""
    for parent, _, files in os.walk(folder):
        for name in files:
            _flush(Path(parent) / name)
        _flush(Path(parent))
