"""Which files of blobs were read and found whole, so that a large one is not hashed by every process anew.

What is remembered is what ``stat`` says of a file: device, inode, size and both times. Whoever changes a byte changes
its ctime, which no call sets; only who sets the clock itself back can hide that, or who writes to the disk below its
file system. A disk that rots changes nothing that ``stat`` says: ``strict`` believes none of this, nor does ``fsck``.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import astuple
from datetime import UTC, datetime

from loreg.catalog import Database, queries
from loreg.checkpoint import FileStamp
from loreg.digest import Digest
from loreg.errors import LoregError, UsageError

WORTH = 16 << 20
"""Bytes from which on it is written into the catalog: a transaction takes longer than to hash less than that."""


def is_strict(strict: bool | None) -> bool:
    """What was asked for, else what ``$LOREG_VERIFY`` says: ``always`` or ``once``. Raises UsageError."""
    if strict is not None:
        return strict
    said = os.environ.get("LOREG_VERIFY") or "once"
    if said not in ("always", "once"):
        raise UsageError(f"LOREG_VERIFY is {said!r}: expected 'always' or 'once'.")
    return said == "always"


class Verified:
    """The memory of one process, and of the catalog for files of at least ``WORTH`` bytes."""

    def __init__(self, database: Database, strict: bool = False) -> None:
        self._database = database
        self._strict = strict
        self._seen: dict[FileStamp, Digest] = {}

    def holds(self, digest: Digest, stamp: FileStamp) -> bool:
        """Whether the file that ``stamp`` is of was found to have that digest."""
        if self._strict:
            return False
        if stamp not in self._seen and stamp.size >= WORTH:
            # The catalog may not be one that can be read from here; then the file is hashed.
            with suppress(LoregError), self._database.read() as session:
                if queries.cached_leaves(session, astuple(stamp)) == _text(digest):
                    self._seen[stamp] = digest
        return self._seen.get(stamp) == digest

    def remember(self, digest: Digest, stamp: FileStamp, began_ns: int) -> None:
        """That a file has the digest. It was read since ``began_ns``, and ``stamp`` taken before: one that was
        changed meanwhile has another by now."""
        # One that was just written may be written again within the same tick of the clock, and keep its stamp.
        if self._strict or not stamp.settled_at(began_ns):
            return
        self._seen[stamp] = digest
        if stamp.size >= WORTH:
            with suppress(LoregError), self._database.write() as session:
                queries.remember_leaves(session, astuple(stamp), _text(digest), datetime.now(UTC))

    def clear(self) -> None:
        """Forget what this process has seen."""
        self._seen.clear()


def _text(digest: Digest) -> str:
    """What stands where a file of a base has its tensors: no object, so that none is taken for the other."""
    return json.dumps(str(digest))
