"""Directories on file systems of one kind or another."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def kind_of(path: Path) -> str:
    """The file system's, as mounted: ``ext4``, ``tmpfs``, …; empty where that cannot be told."""
    best, kind = -1, ""
    mounts = Path("/proc/self/mounts")
    for line in mounts.read_text().splitlines() if mounts.exists() else ():
        _, point, found, *_ = line.split(" ")
        if path.resolve().is_relative_to(point) and len(point) >= best:
            best, kind = len(point), found
    return kind


@contextmanager
def in_memory(otherwise: Path) -> Iterator[Path]:
    """A fresh directory on a tmpfs, or ``otherwise`` where there is none to write to."""
    shared = Path("/dev/shm")
    if kind_of(shared) != "tmpfs" or not os.access(shared, os.W_OK):
        yield otherwise
        return
    with tempfile.TemporaryDirectory(dir=shared, prefix="loreg-test-") as folder:
        yield Path(folder)
