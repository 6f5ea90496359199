"""What SQLite refuses, as errors of loreg: by its own result codes, never by the text of a message."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy.exc import DBAPIError

from loreg.errors import BadInput, CheckFailed, Conflict, LoregError, UsageError

_CONSTRAINT_DATATYPE = sqlite3.SQLITE_CONSTRAINT | 12 << 8  # Python 3.11 has no name for it
_DAMAGED = (BadInput, "restore a backup")
_PLACE = (UsageError, "make it writable, or choose another one with LOREG_CATALOG or LOREG_HOME")
_FAMILIES: dict[int, tuple[type[LoregError], str]] = {
    sqlite3.SQLITE_BUSY: (Conflict, "another process holds it; try again when that one is done"),
    sqlite3.SQLITE_LOCKED: (Conflict, "another process holds it; try again when that one is done"),
    sqlite3.SQLITE_FULL: (CheckFailed, "the disk is full; free some space"),
    sqlite3.SQLITE_IOERR: (BadInput, "check the disk, and restore a backup if need be"),
    sqlite3.SQLITE_CORRUPT: _DAMAGED,
    sqlite3.SQLITE_NOTADB: _DAMAGED,
    sqlite3.SQLITE_READONLY: _PLACE,
    sqlite3.SQLITE_CANTOPEN: _PLACE,
    sqlite3.SQLITE_PERM: _PLACE,
    sqlite3.SQLITE_CONSTRAINT: (Conflict, "it contradicts what is there already; look with `loreg ls`"),
    # Extended codes are looked up before their primary code.
    sqlite3.SQLITE_CONSTRAINT_CHECK: (UsageError, "that value is malformed; correct it"),
    _CONSTRAINT_DATATYPE: (UsageError, "that value is malformed; correct it"),
}


@contextmanager
def typed(path: Path) -> Iterator[None]:
    """Raise what the database says of the catalog at ``path`` as the family whose fault it is."""
    try:
        yield
    except DBAPIError as error:
        raise _refusal(path, error.orig) from error
    except sqlite3.Error as error:
        raise _refusal(path, error) from error
    except (OverflowError, UnicodeEncodeError) as error:
        raise UsageError(
            f"the catalog {path} cannot hold a value: expected integers of 64 bits and text in Unicode, "
            f"but {error}; correct it."
        ) from error


def _refusal(path: Path, error: BaseException | None) -> LoregError:
    code: int = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR)
    family, advice = _FAMILIES.get(code) or _FAMILIES.get(code & 0xFF) or _DAMAGED
    return family(f"the catalog {path} refused: {error}; {advice}.")
