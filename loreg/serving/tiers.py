"""A store of values within a number of bytes: the least recently used leave, never one that somebody uses."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Generic, TypeVar

from loreg.errors import CheckFailed
from loreg.serving import signals

V = TypeVar("V")


@dataclass(frozen=True, slots=True)
class Statistics:
    """Of one tier. ``hits``, ``misses`` and ``evictions`` since it was made; ``used``: how many entries are in use
    now, on disk also those that are held for an engine (``serving.held``). ``limit`` None: there is none."""

    entries: int
    nbytes: int
    limit: int | None
    used: int
    hits: int
    misses: int
    evictions: int


@dataclass(slots=True)
class _Entry(Generic[V]):
    value: Future[V]
    nbytes: int
    users: int = 0


class Tier(Generic[V]):
    """Values by key, made by whoever asks for one first, while others who ask wait for it. Thread-safe."""

    def __init__(self, name: str, limit: int | None) -> None:
        self.name, self.limit = name, limit
        self._changed = threading.Lock()
        self._entries: OrderedDict[Hashable, _Entry[V]] = OrderedDict()
        self._nbytes = 0
        self._counts = {"hits": 0, "misses": 0, "evictions": 0}

    def acquire(self, key: Hashable, what: str, size: Callable[[], int], make: Callable[[], V]) -> V:
        """The value of ``key``, which stays until it is released, by as many as acquired it.

        ``size``: the bytes that it takes; so much is made room for before ``make`` is called. Raises CheckFailed,
        naming ``what``, where too much of what is there is in use; and what ``make`` raises: then there is nothing of
        it.
        """
        nbytes = None if self.holds(key) else size()  # which may take a while
        with self._changed:
            entry = self._entries.get(key)
            if first := entry is None:
                nbytes = size() if nbytes is None else nbytes
                self._make_room(what, nbytes)
                entry = self._entries[key] = _Entry(Future(), nbytes)
                self._nbytes += nbytes
                self._count("misses")
            else:
                self._count("hits")
                self._entries.move_to_end(key)
            assert entry is not None
            entry.users += 1
        if first:
            try:
                entry.value.set_result(make())
            except BaseException as error:
                with self._changed:
                    del self._entries[key]
                    self._nbytes -= entry.nbytes
                entry.value.set_exception(error)
                raise
        try:
            return entry.value.result()
        except BaseException as error:
            with self._changed:
                entry.users -= 1
            # Ctrl-C is for the thread that it ended, and not for those who waited for that: one of them goes on.
            others = entry.value.done() and entry.value.exception() is error and not isinstance(error, Exception)
            if not others:
                raise
        return self.acquire(key, what, size, make)

    def release(self, key: Hashable) -> None:
        """That a value is used no more by one of those who acquired it."""
        with self._changed:
            self._entries[key].users -= 1

    def peek(self, key: Hashable) -> V | None:
        """A value that is there and whole, unused by this."""
        with self._changed:
            entry = self._entries.get(key)
            return entry.value.result() if entry is not None and _is_whole(entry) else None

    def holds(self, key: Hashable) -> bool:
        with self._changed:
            return key in self._entries

    @property
    def statistics(self) -> Statistics:
        with self._changed:
            used = sum(not _is_free(entry) for entry in self._entries.values())
            return Statistics(len(self._entries), self._nbytes, self.limit, used, **self._counts)

    def _make_room(self, what: str, nbytes: int) -> None:
        """All of it, or nothing leaves."""
        if self.limit is None:
            return
        excess, chosen = self._nbytes + nbytes - self.limit, list[Hashable]()
        for key, entry in self._entries.items():
            if excess <= 0:
                break
            if _is_free(entry):
                chosen.append(key)
                excess -= entry.nbytes
        if excess > 0:
            held = sum(entry.nbytes for entry in self._entries.values() if not _is_free(entry))
            raise CheckFailed(
                f"{what} needs {nbytes:,} bytes of {self.name}, of which {self.limit:,} are allowed and {held:,} in "
                "use: release others first, or allow more."
            )
        for key in chosen:
            self._nbytes -= self._entries.pop(key).nbytes
            self._count("evictions")

    def _count(self, what: str) -> None:
        self._counts[what] += 1
        signals.default().count(f"cache_{what}", tier=self.name)


def _is_whole(entry: _Entry[V]) -> bool:
    return entry.value.done() and entry.value.exception() is None


def _is_free(entry: _Entry[V]) -> bool:
    return not entry.users and _is_whole(entry)
