"""Directories that appear whole or not at all: written beside their place, flushed, and renamed into it."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from loreg.digest import Digest
from loreg.errors import CheckFailed, Conflict


@contextmanager
def staged(out: Path, identity: Digest, *, wait: bool = False, resume: bool = False) -> Iterator[Path]:
    """A directory beside ``out`` that becomes ``out`` when the block succeeds, and vanishes when it does not.

    Its name follows from ``out`` and ``identity`` (of the work), so that what a killed process left is found
    again and not piled up: with ``resume`` as it was left, else emptied. Raises Conflict if ``out`` is taken, or
    another process is at the same work; with ``wait``, only once that one has finished.
    """
    require_free(out)
    with scratch(out, f"{identity.short}.partial", wait=wait, resume=resume) as folder:
        yield folder
        _put(folder, out)


def require_free(out: Path) -> None:
    """Conflict unless ``out`` can become a new directory; CheckFailed for what the disk says."""
    if out.resolve() == Path.cwd():
        raise Conflict(f"{out or '.'} is the directory that this runs in: choose a new one.")
    try:
        taken = out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir())))
    except OSError as error:
        raise CheckFailed(f"{out} cannot be looked at: {error.strerror or error}; check the disk.") from error
    if taken:
        raise Conflict(f"{out} exists and is not an empty directory: choose another, or remove it first.")


def refuse_inside(out: Path, root: Path) -> None:
    """Conflict if ``out`` lies in ``root``: it would be copied as a part of it the next time."""
    if out.resolve().is_relative_to(root.resolve()):
        raise Conflict(f"{out} lies in {root}, which it is made from: choose a directory outside.")


@contextmanager
def scratch(out: Path, purpose: str, *, wait: bool = False, resume: bool = False) -> Iterator[Path]:
    """A directory beside ``out``, of this process alone, for work towards it; gone when the block ends. It is empty,
    unless the one of a killed process is to be taken over by ``resume``.

    Raises Conflict if another process is in it, CheckFailed for whatever the disk says, in the block too.
    """
    folder = out.parent / f".{out.name}.{purpose}"
    while (lock := _locked(folder, out, wait)) is None:
        # Another process was in it, and is done. One that has failed leaves the work to who waited for it.
        if not wait or out.exists():
            raise Conflict(f"Another process has just written {out}: look at it, or choose another directory.")
    try:
        try:
            if not resume:
                _empty(folder)
            yield folder
        finally:
            # Ctrl-C included: a half-merged model is of no use, and large. Once renamed, the name is anybody's.
            if is_open_at(folder, lock):
                shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        raise CheckFailed(
            f"{out} cannot be written: {error.strerror}; free some space, or check the disk."
        ) from error
    finally:
        os.close(lock)


def _locked(folder: Path, out: Path, wait: bool) -> int | None:
    """Its descriptor, which holds the lock; None if it was renamed or deleted meanwhile."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        except NotADirectoryError as error:  # to be emptied and renamed, it has to be a directory of its own
            raise Conflict(f"{folder} is a link: remove it, or choose another directory than {out}.") from error
    except OSError as error:
        with suppress(OSError):
            folder.rmdir()
        raise CheckFailed(f"{folder} cannot be made: {error.strerror}.") from error
    held = False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        held = is_open_at(folder, lock)
        return lock if held else None
    except BlockingIOError as error:
        raise Conflict(f"Another process is writing {out}: wait for it, or choose another directory.") from error
    except OSError as error:
        raise CheckFailed(f"{folder} cannot be locked: {error.strerror}.") from error
    finally:
        if not held:
            os.close(lock)


def is_open_at(folder: Path, descriptor: int) -> bool:
    """Whether the name still stands for the directory that is open, and so locked."""
    try:
        return os.path.samestat(folder.stat(), os.fstat(descriptor))
    except OSError:
        return False


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _put(folder: Path, out: Path) -> None:
    sync_one(folder)
    try:
        with suppress(FileNotFoundError):
            out.rmdir()
        folder.rename(out)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise Conflict(f"{out} was written by another process meanwhile: choose another directory.") from error
        raise
    try:
        sync_one(out.parent)
    except OSError:
        # Not known to be on the disk: taken back, as an error is to mean that nothing is there.
        out.rename(folder)
        raise


def sync_one(path: Path) -> None:
    """Flush a file, or the names in a directory, to the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Flush every file and directory under ``folder`` to the disk."""
    for parent, _, files in os.walk(folder):
        for name in files:
            sync_one(Path(parent) / name)
        sync_one(Path(parent))
