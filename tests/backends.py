"""Where a registry can be: every pair of catalog and store that loreg knows, for suites that run over all of them."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import postgres_server
import s3_server

import loreg
from loreg.catalog import Database


@dataclass(frozen=True)
class Place:
    """A registry that is nobody else's: its home, and where its catalog and its store are if not there."""

    home: Path
    catalog: str | None = None
    store: str | None = None

    def open(self) -> loreg.Registry:
        return loreg.open(self.home, catalog=self.catalog, store=self.store)

    def database(self) -> Database:
        """Its catalog alone."""
        return Database.open(self.catalog or self.home / "catalog.db")

    def leave(self) -> None:
        """Nobody opens it again, and its schema may be given to another."""
        if self.catalog is not None:
            postgres_server.shared().leave(self.catalog)


def _sqlite_and_files(directory: Path) -> Place:
    return Place(directory / "home")


def _sqlite_and_s3(directory: Path) -> Place:
    # The variables stay set: a process has one such server, and its children find it by them.
    os.environ.update(s3_server.environment(s3_server.seaweed().endpoint))
    return Place(directory / "home", store=s3_server.fresh_prefix())


def _postgres_and_files(directory: Path) -> Place:
    _, url = postgres_server.shared().made()
    return Place(directory / "home", catalog=url)


def _postgres_and_s3(directory: Path) -> Place:
    return replace(_sqlite_and_s3(directory), catalog=_postgres_and_files(directory).catalog)


PLACES: dict[str, Callable[[Path], Place]] = {
    "sqlite-files": _sqlite_and_files,
    "sqlite-s3": _sqlite_and_s3,
    "postgres-files": _postgres_and_files,
    "postgres-s3": _postgres_and_s3,
}
"""By name: a fresh, empty place, with what is on disk below a directory. Raises Skipped, with the reason, where its
server cannot be had."""

ON_FILES = ("sqlite-files", "postgres-files")
"""One place of each kind of catalog, for suites that look at the files of the store."""
