"""Work that many callers want at once, done once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as WaitedTooLong
from typing import Generic, TypeVar

from loreg.errors import RemoteError

T = TypeVar("T")


class Flights(Generic[T]):
    """By key, what is under way in this process. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._flying: dict[Hashable, Future[T]] = {}

    def run(self, key: Hashable, work: Callable[[], T], timeout: float | None, what: str) -> T:
        """What ``work`` gives, or raises; of callers with one key at one time, that of the first.

        ``timeout``: seconds; the work then goes on in a thread of its own. Raises RemoteError, naming ``what``, when
        they are over.
        """
        with self._lock:
            flight = self._flying.get(key)
            if first := flight is None:
                flight = self._flying[key] = Future()
        assert flight is not None
        if first and timeout is None:
            self._do(key, work, flight)  # here: Ctrl-C then ends it
        elif first:
            threading.Thread(target=self._do, args=(key, work, flight), name=f"loreg {what}", daemon=True).start()
        try:
            return flight.result(timeout)
        except WaitedTooLong:
            if flight.done():  # it was the work itself that raised this
                raise
            raise RemoteError(
                f"{what} was not ready within {timeout:g} s, and is still being made: ask again, or allow it longer."
            ) from None

    def _do(self, key: Hashable, work: Callable[[], T], flight: Future[T]) -> None:
        try:
            found = work()
        except BaseException as error:
            self._land(key)
            flight.set_exception(error)
        else:
            self._land(key)
            flight.set_result(found)

    def _land(self, key: Hashable) -> None:
        """Whoever asks from now on asks anew."""
        with self._lock:
            self._flying.pop(key, None)
