"""Other people's formats, one file each: every reader yields a ``Draft``, which ``binding`` ties to a base."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from loreg.adapters import peft
from loreg.adapters.draft import Draft
from loreg.errors import NotFound, UsageError


class Reader(Protocol):
    """What a module of this package offers: whether a directory is of its format, and reading it."""

    CONFIG: str

    def recognises(self, folder: Path) -> bool: ...

    def read(self, folder: Path) -> Draft: ...


READERS: Mapping[str, Reader] = {"peft": peft}


def read(folder: Path, format: str | None = None) -> Draft:  # noqa: A002 - the option's name
    """Read the adapter in ``folder``, by the named format or the one that recognises it.

    Raises NotFound where nothing is recognised, UsageError for an unknown format, and what the reader raises.
    """
    if not folder.is_dir():
        raise NotFound(f"{folder} is not a directory: expected one that holds an adapter.")
    if format is not None and format not in READERS:
        raise UsageError(f"{format!r} is not a format that loreg reads: expected one of {', '.join(READERS)}.")
    for name, reader in READERS.items():
        if format == name or (format is None and reader.recognises(folder)):
            if not reader.recognises(folder):
                raise NotFound(f"{folder} holds no {name} adapter: expected {reader.CONFIG} in it.")
            return reader.read(folder)
    raise NotFound(f"{folder} holds no adapter that loreg knows: expected {peft.CONFIG} beside its weights.")
