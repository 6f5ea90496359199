"""Whether a catalog may have changed, asked often and cheaply: for who watches what a reference means.

A kind of database says that in its own way (``sqlite.py``, ``postgres.py``). What all of them keep: a change that
commits after ``happened`` was called is told by a later call of it. So who calls it, and then reads, misses nothing.
"""

from __future__ import annotations

import selectors
import socket
from typing import Protocol


class Changes(Protocol):
    """Of one catalog, for one thread at a time."""

    @property
    def told(self) -> bool:
        """Whether ``wait`` returns by itself when something changes. Else it has to be asked again and again."""

    def happened(self) -> bool:
        """Whether anything may have changed since this was asked last; True the first time, and where it cannot be
        told, so that a read tells why."""

    def wait(self, wake: socket.socket, seconds: float) -> None:
        """Until something may have changed, ``wake`` can be read, or ``seconds`` are over."""

    def close(self) -> None: ...


_LONGEST = 1e6
"""Seconds: a selector has no number for all that a caller may have, and who is woken too early looks again."""


def wait_for(seconds: float, *files: socket.socket | int) -> None:
    """Until one of them can be read or ``seconds`` are over."""
    with selectors.DefaultSelector() as selector:  # select() itself takes no descriptor above 1023
        for file in files:
            selector.register(file, selectors.EVENT_READ)
        selector.select(min(max(0.0, seconds), _LONGEST))
