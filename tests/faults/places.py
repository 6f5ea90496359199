"""Directories on file systems of one kind or another."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


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


@contextmanager
def small_disk(folder: Path, options: str) -> Iterator[Path]:
    """A tmpfs of its own, mounted at ``folder``; skips the test where that is not allowed."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(mount, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no mount(8) here")
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)
