"""``watch``: what a reference means, told when that changes: a tag that moves, a version that is removed or restored,
a name that is pushed for the first time.

    with serving.watch("sql:prod", registry) as moves:
        engine.load(serving.resolve("sql:prod", registry))
        for moved in moves:
            engine.swap(moved.old, moved.new)

A catalog in PostgreSQL tells of a change itself, by a notification that its transaction sends as it commits. One in
SQLite is asked every ``interval`` whether any other connection has written to its file, which takes microseconds, and
is read only if one has.
"""

from __future__ import annotations

import asyncio
import math
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from types import TracebackType
from typing import Self, TypeVar

from loreg.digest import Digest
from loreg.errors import Conflict, RemoteError, UsageError
from loreg.format.reference import Reference
from loreg.registry import Registry
from loreg.serving import signals
from loreg.serving.defaults import default_registry

T = TypeVar("T")

INTERVAL = 0.2
"""Seconds. Of a catalog in SQLite, five questions a second keep a core busy for some ten thousandth of it."""
_PATIENCE = 5.0
"""Seconds, or the interval if that is more: the longest pause before a catalog that cannot be read is asked again."""
_LONG = 3600.0
"""Seconds to wait for what tells of itself."""


@dataclass(frozen=True, slots=True)
class Moved:
    """A reference means another version than it did: ``old`` and ``new`` are digests, None for nothing.

    ``at``: when that was noticed, in UTC; ``Registry.log`` has when each tag moved.
    """

    reference: str
    old: Digest | None
    new: Digest | None
    at: datetime


def watch(
    reference: str, registry: Registry | None = None, *, interval: float = INTERVAL, timeout: float | None = None
) -> Watch:
    """An iterator of what happens to ``reference`` from now on, also before its first step; and ``old`` of the first
    event is ``current``, what it means now.

    Moves that nobody took are one: after A → B → C the next event says A → C, and after A → B → A there is none. So a
    consumer may be as slow as it likes, and nothing is told twice.

    ``registry``: default is one that is opened once for the process. ``interval``: seconds between two looks, where
    the catalog does not tell of changes by itself. ``timeout``: seconds without an event after which the iteration
    ends; it may then be begun again. A catalog that cannot be reached, or is locked, is asked again until it can;
    what moved meanwhile is told then. Close it, or use it as a context: from any thread, which ends the iteration.

    Raises UsageError for a malformed reference or an ``interval`` that is not above 0, and what a read of the catalog
    raises, if it cannot be read at first or is damaged later. That the reference means nothing yet is no error.
    """
    return Watch(reference, registry, interval, timeout)


def watch_async(
    reference: str, registry: Registry | None = None, *, interval: float = INTERVAL, timeout: float | None = None
) -> AsyncWatch:
    """The same as an asynchronous iterator, and context. It begins with the first step, or where the context does,
    and waits in a thread of its own, which a cancellation ends too."""
    return AsyncWatch(reference, registry, interval, timeout)


class Watch:
    """See ``watch``. ``current``: what the reference means as far as it was told, None for nothing."""

    current: Digest | None

    def __init__(self, reference: str, registry: Registry | None, interval: float, timeout: float | None) -> None:
        if not 0 < interval < math.inf:
            raise UsageError(f"the interval of a watch is {interval}: expected seconds, more than 0.")
        self.reference, self._parsed = reference, Reference.parse(reference)
        self._interval, self._timeout = interval, math.inf if timeout is None else timeout
        self._turn, self._closed = threading.Lock(), False
        with ExitStack() as opened:
            self._registry = registry or default_registry()
            self._wake, self._waker = socket.socketpair()
            opened.callback(self._wake.close)
            opened.callback(self._waker.close)
            self._changes = self._registry.database.changes(self._parsed.name)
            opened.callback(self._changes.close)
            self._changes.happened()  # first, so that what commits while it is read is told later
            self.current = self._registry.digest_of(self._parsed)
            self._resources = opened.pop_all()
        self._certain, self._outages = True, 0

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Moved:
        """The next event. Raises StopIteration after ``timeout``, or once it is closed."""
        deadline = time.monotonic() + self._timeout
        try:
            with self._turn:
                while not self._closed:
                    if (moved := self._look()) is not None:
                        return moved
                    left = deadline - time.monotonic()
                    if left <= 0:
                        break
                    self._changes.wait(self._wake, min(left, self._pause()))
        finally:
            if self._closed:
                self._release()
        raise StopIteration

    def _pause(self) -> float:
        if self._outages:
            return min(self._interval * 2.0 ** min(self._outages, 30), max(self._interval, _PATIENCE))
        return _LONG if self._changes.told else self._interval

    def _look(self) -> Moved | None:
        try:
            if not self._changes.happened() and self._certain:
                return None
            self._certain = False  # until it is read
            found = self._registry.digest_of(self._parsed)
        except (RemoteError, Conflict):  # not there, or locked: what is served meanwhile is none of its business
            self._outages += 1
            signals.default().count("watch_outages")
            return None
        self._certain, self._outages = True, 0
        if found == self.current:
            return None
        moved = Moved(self.reference, self.current, found, datetime.now(UTC))
        self.current = found
        signals.default().count("watch_moves")
        return moved

    def close(self) -> None:
        """End the iteration: whoever waits in it is woken. More than once is once."""
        self._closed = True
        with suppress(OSError):
            self._waker.send(b"\0")
        self._release()

    def _release(self) -> None:
        """By whoever is the last to leave: what another thread waits on is not closed under it."""
        if self._turn.acquire(blocking=False):
            try:
                self._resources.close()
            finally:
                self._turn.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_resources"):
            self.close()


class AsyncWatch:
    """See ``watch_async``."""

    def __init__(self, reference: str, registry: Registry | None, interval: float, timeout: float | None) -> None:
        self._given = reference, registry, interval, timeout
        self._watch: Watch | None = None
        self._closed = False
        # Of its own: the event loop's has few threads, and a watch may wait for ever.
        self._thread = ThreadPoolExecutor(1, f"loreg watch {reference}")

    @property
    def current(self) -> Digest | None:
        """As of ``Watch``; None before it begins."""
        return self._watch.current if self._watch is not None else None

    async def __aenter__(self) -> Self:
        try:
            await self._began()
        except asyncio.CancelledError:
            self.close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Moved:
        try:
            watch = await self._began()
            moved = None if watch is None else await self._run(lambda: next(watch, None))
        except asyncio.CancelledError:
            self.close()  # else the thread would wait on, and with it the end of the program
            raise
        if moved is None:
            raise StopAsyncIteration
        return moved

    async def _began(self) -> Watch | None:
        if self._watch is None and not self._closed:
            await self._run(self._begin)
        return None if self._closed else self._watch

    def close(self) -> None:
        self._closed = True
        if self._watch is not None:
            self._watch.close()
        self._thread.shutdown(wait=False)

    async def aclose(self) -> None:
        """End the iteration, whichever task waits in it."""
        self.close()

    async def _run(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def _begin(self) -> None:
        self._watch = Watch(*self._given)
        if self._closed:  # meanwhile
            self._watch.close()
