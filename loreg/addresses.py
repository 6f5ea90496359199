"""Where something is, as people write it: a path, or a URL.

A mistyped URL is not taken for a path: ``postgresql:/me:secret@host/db`` would make a directory of that name, and the
registry would seem to be empty. And as it may hold a password, what could not be understood is not repeated.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from loreg.errors import UsageError

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*")


def split(address: str | Path, thing: str, expected: str) -> tuple[str | None, str]:
    """``("s3", "bucket/prefix")`` of ``s3://bucket/prefix``, and ``(None, path)`` of a path.

    Raises UsageError for what is neither. By RFC 3986 the first part of a relative path has no colon; one that has is
    taken for a path if it is there, or begins with ``./``. ``thing`` and ``expected`` are for the error.
    """
    text = str(address)
    scheme, separator, rest = text.partition("://")
    if isinstance(address, Path) or ":" not in text.partition("/")[0]:
        return None, text
    if separator and _SCHEME.fullmatch(scheme):
        return scheme, rest
    if os.path.lexists(text):
        return None, text
    raise UsageError(
        f"the address of {thing} looks like a URL and is none: expected {expected}; found a colon before the first "
        "slash, and no scheme:// (before the name of a file with a colon, write ./)."
    )


def expanded(path: str | Path) -> Path:
    """The path, with ``~`` replaced. Raises UsageError for the home of nobody."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        pass
    raise UsageError(
        f"{Path(path).parts[0]} at the beginning of a path stands for the home of a user: expected one of this "
        "machine, found none; write the path out."
    )


def directory(path: str | Path, thing: str) -> Path:
    """The absolute path of a directory of this machine. Raises UsageError for a URL."""
    scheme, _ = split(path, thing, "the path of a directory")
    if scheme is not None:
        raise UsageError(
            f"{thing} is a directory of this machine: expected its path, found a URL of {scheme}://; what is "
            "elsewhere is said by LOREG_STORE and LOREG_CATALOG."
        )
    return expanded(path).absolute()
