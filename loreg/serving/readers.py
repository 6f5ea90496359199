"""A lock for many who read and one who writes: who reads sees what was there before a change, or after it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from loreg.errors import UsageError

_AMID: ContextVar[tuple[object, ...]] = ContextVar("loreg_amid", default=())
"""The readings in which this is called: also in a thread to which ``asyncio.to_thread`` gave them."""

_HEARTBEAT = 1.0
"""Seconds after which who waits looks for itself."""


class Readers:
    """Who waits to write goes before who comes to read later; who reads already may read again.

    The writer may read too. A reader who asks to write would wait for itself, and is refused. So it is for whoever
    is called, in another thread, in the context of one who reads.
    """

    # Ctrl-C comes behind any call. So what a block has begun is in a ``try`` with it, what it ends is ended before
    # anything is called, and the lock is no Condition's, whose own ``__enter__`` may be left with the lock held.

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._free = threading.Condition(self._lock)
        self._reading: dict[object, int] = {}  # each that is under way, and its thread
        self._writer: int | None = None
        self._waiting = 0

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Waits for a writer, and for those who wait to write."""
        me, own, outer = threading.get_ident(), object(), _AMID.get()
        try:
            with self._lock:
                if me != self._writer and not self._reads(me):
                    self._wait_for(lambda: self._writer is None and not self._waiting)
                self._reading[own] = me
            _AMID.set((*outer, own))
            yield
        finally:
            if own in self._reading:
                del self._reading[own]
            _AMID.set(outer)
            with self._lock:
                self._free.notify_all()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Alone. Raises UsageError in a thread that reads."""
        me = threading.get_ident()
        with self._lock:
            if me == self._writer or self._reads(me):
                raise UsageError(
                    "this thread is in the middle of a forward pass of the model, or of live.reading(): change what "
                    "is merged after it, or from another thread."
                )
        try:
            with self._lock:
                self._waiting += 1
                try:
                    self._wait_for(lambda: self._writer is None and not self._reading)
                    self._writer = me
                finally:
                    self._waiting -= 1
            yield
        finally:
            if self._writer == me:
                self._writer = None
            with self._lock:
                self._free.notify_all()

    def _reads(self, me: int) -> bool:
        return me in self._reading.values() or any(one in self._reading for one in _AMID.get())

    def _wait_for(self, what: Callable[[], bool]) -> None:
        while not self._free.wait_for(what, _HEARTBEAT):
            """Who was to tell may have been interrupted."""
