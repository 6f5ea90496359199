"""A lock for many who read and one who writes: who reads sees what was there before a change, or after it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from loreg.errors import UsageError


class Readers:
    """Who waits to write goes before who comes to read later; who reads already may read again.

    The writer may read too. A reader who asks to write would wait for itself, and is refused.
    """

    def __init__(self) -> None:
        self._free = threading.Condition()
        self._depth: dict[int, int] = {}
        self._writer: int | None = None
        self._waiting = 0

    def enter(self) -> None:
        """Begin to read: waits for a writer, and for those who wait to write."""
        me = threading.get_ident()
        with self._free:
            if me not in self._depth and me != self._writer:
                self._free.wait_for(lambda: self._writer is None and not self._waiting)
            self._depth[me] = self._depth.get(me, 0) + 1

    def leave(self) -> None:
        """End what this thread began last. Nothing, if it began nothing."""
        me = threading.get_ident()
        with self._free:
            depth = self._depth.pop(me, 0)
            if depth > 1:
                self._depth[me] = depth - 1
            self._free.notify_all()

    @contextmanager
    def reading(self) -> Iterator[None]:
        self.enter()
        try:
            yield
        finally:
            self.leave()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Alone. Raises UsageError in a thread that reads."""
        me = threading.get_ident()
        with self._free:
            if me in self._depth or me == self._writer:
                raise UsageError(
                    "this thread is in the middle of a forward pass of the model, or of live.reading(): change what "
                    "is merged after it, or from another thread."
                )
            self._waiting += 1
            try:
                self._free.wait_for(lambda: self._writer is None and not self._depth)
                self._writer = me
            finally:
                self._waiting -= 1
                self._free.notify_all()
        try:
            yield
        finally:
            with self._free:
                self._writer = None
                self._free.notify_all()
