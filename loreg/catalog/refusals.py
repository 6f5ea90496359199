"""What a database refuses, as errors of loreg: by its own result codes, never by the text of a message."""

from __future__ import annotations

import errno
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from sqlalchemy.exc import DataError, DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from loreg.errors import BadInput, CheckFailed, Conflict, LoregError, RemoteError, UsageError

if TYPE_CHECKING:
    from loreg.catalog.kinds import Kind

Family = tuple[type[LoregError], str]

_CONSTRAINT_DATATYPE = sqlite3.SQLITE_CONSTRAINT | 12 << 8  # Python 3.11 has no name for it
_DAMAGED: Family = (BadInput, "{remedy}")
_DISK: Family = (BadInput, "check the disk, and if need be {remedy}")
_PLACE: Family = (UsageError, "make it writable, or choose another one with LOREG_CATALOG or LOREG_HOME")
_HELD: Family = (Conflict, "another process holds it; try again when that one is done")
_FULL: Family = (CheckFailed, "the disk is full; free some space")
_MALFORMED: Family = (UsageError, "that value is malformed; correct it")
_CONTRADICTS: Family = (Conflict, "it contradicts what is there already; look with `loreg ls`")
_TOO_MANY_FILES: Family = (
    CheckFailed,
    "this process has too many open files; raise the limit, as with `ulimit -n 4096`, or do less at once",
)
_SQLITE: dict[int, Family] = {
    sqlite3.SQLITE_BUSY: _HELD,
    sqlite3.SQLITE_LOCKED: _HELD,
    sqlite3.SQLITE_FULL: _FULL,
    sqlite3.SQLITE_IOERR: _DISK,
    sqlite3.SQLITE_CORRUPT: _DAMAGED,
    sqlite3.SQLITE_NOTADB: _DAMAGED,
    sqlite3.SQLITE_READONLY: _PLACE,
    sqlite3.SQLITE_CANTOPEN: _PLACE,
    sqlite3.SQLITE_PERM: _PLACE,
    sqlite3.SQLITE_CONSTRAINT: _CONTRADICTS,
    # Extended codes are looked up before their primary code.
    sqlite3.SQLITE_CONSTRAINT_CHECK: _MALFORMED,
    _CONSTRAINT_DATATYPE: _MALFORMED,
}

_ALLOWED: Family = (UsageError, "have that allowed, or choose another one with LOREG_CATALOG")
# A commit whose answer is lost may have been made or not; a push that is tried again finds the same version then.
_LOST: Family = (
    RemoteError,
    "see whether the server runs; what was being written then may be there or not: look, and try again",
)
_POSTGRES: dict[str, Family] = {
    "08": _LOST,
    "22": _MALFORMED,
    "23": _CONTRADICTS,
    "23502": _MALFORMED,
    "23514": _MALFORMED,
    "25006": _PLACE,  # a read, or a standby
    "25P03": _LOST,
    "28": _ALLOWED,
    "3D": _ALLOWED,
    "3F": _ALLOWED,
    "40": _HELD,
    "42501": _ALLOWED,
    "53": (CheckFailed, "the server has too little left; free some of it"),
    "53100": _FULL,
    "53300": (RemoteError, "too many are connected; try again later"),
    "55P03": _HELD,
    "57": _LOST,
    "57014": (Conflict, "the server ended what took too long; try again"),
    "58": _DISK,
}
"""By SQLSTATE, and by its class, which is looked up after it."""


@contextmanager
def typed(kind: Kind) -> Iterator[None]:
    """Raise what the database says of the catalog as the family whose fault it is."""
    try:
        yield
    except DBAPIError as error:
        raise _refusal(kind, error) from error
    except sqlite3.Error as error:
        raise _said(kind, error, _of_sqlite(kind, error)) from error
    except PoolTimeoutError as error:
        raise Conflict(
            f"the catalog {kind.name} is used by too many threads of this process at once: none was done in time; "
            "try again with fewer."
        ) from error
    except UnicodeDecodeError as error:
        raise BadInput(
            f"the catalog {kind.name} is damaged: it holds text that is none ({error}); {kind.remedy}."
        ) from error
    except (OverflowError, UnicodeEncodeError) as error:
        raise UsageError(
            f"the catalog {kind.name} cannot hold a value: expected integers of 64 bits and text in Unicode, "
            f"but {error}; correct it."
        ) from error


def _refusal(kind: Kind, error: DBAPIError) -> LoregError:
    orig = error.orig
    if isinstance(orig, sqlite3.Error):
        return _said(kind, orig, _of_sqlite(kind, orig))
    state: str | None = getattr(orig, "sqlstate", None)
    if state is not None:
        return _said(kind, orig, _POSTGRES.get(state) or _POSTGRES.get(state[:2]) or _DAMAGED)
    # psycopg itself: a value that it cannot send, or a connection that broke.
    return _said(kind, orig, _MALFORMED if isinstance(error, DataError) else _LOST)


def _of_sqlite(kind: Kind, error: sqlite3.Error) -> Family:
    code: int = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR)
    if code & 0xFF in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_IOERR):
        if _no_more_files():
            return _TOO_MANY_FILES
        if kind.is_full():
            return _FULL
    return _SQLITE.get(code) or _SQLITE.get(code & 0xFF) or _DAMAGED


def _said(kind: Kind, error: BaseException | None, family: Family) -> LoregError:
    raised, advice = family
    said = " ".join(str(error).split())
    return raised(f"the catalog {kind.name} refused: {said}; {advice.format(remedy=kind.remedy)}.")


def _no_more_files() -> bool:
    """SQLite says only that it could not open a file, and not why. It needs up to four at once: the catalog, its log,
    the index of that, and a journal; those that it got it has closed again."""
    opened: list[int] = []
    try:
        for _ in range(4):
            opened.append(os.open(os.devnull, os.O_RDONLY))
    except OSError as error:
        return error.errno in (errno.EMFILE, errno.ENFILE)
    finally:
        for descriptor in opened:
            os.close(descriptor)
    return False
