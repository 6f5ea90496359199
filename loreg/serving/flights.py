"""Work that many callers want at once, done once."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable
from concurrent.futures import Future, InvalidStateError
from concurrent.futures import TimeoutError as WaitedTooLong
from contextlib import suppress
from functools import partial
from typing import Generic, TypeVar

from loreg.errors import CheckFailed, RemoteError

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
        end = None if timeout is None else time.monotonic() + timeout
        while True:
            own = Future[T]()
            flight = self._board(key, own, work, what, here=timeout is None)
            left = None if end is None else min(max(0.0, end - time.monotonic()), threading.TIMEOUT_MAX)
            try:
                return flight.result(left)
            except WaitedTooLong:
                if flight.done():  # just now, or the work itself raised this
                    return flight.result()
                raise RemoteError(
                    f"{what} was not ready within {timeout:g} s, and is still being made: ask again, or allow it "
                    "longer."
                ) from None
            except BaseException as error:
                # Ctrl-C is for the thread that it ended, and not for those who waited for that: one of them goes on.
                if flight is own or isinstance(error, Exception) or not _is_of(flight, error):
                    raise

    def _board(self, key: Hashable, own: Future[T], work: Callable[[], T], what: str, here: bool) -> Future[T]:
        """The flight that is under way; else ``own``, begun: ``here``, so that Ctrl-C ends it, or in a thread."""
        try:
            with self._lock:
                flight = self._flying.setdefault(key, own)
            if flight is own and here:
                self._do(key, work, own)
            elif flight is own:
                threading.Thread(target=self._do, args=(key, work, own), name=f"loreg {what}", daemon=True).start()
            return flight
        except BaseException as error:  # nobody is to wait for what was never begun
            self._land(key, own, partial(own.set_exception, error))
            if isinstance(error, RuntimeError):
                raise CheckFailed(f"{what} cannot be made in a thread of its own: {error}.") from error
            raise

    def _do(self, key: Hashable, work: Callable[[], T], flight: Future[T]) -> None:
        try:
            found = work()
        except BaseException as error:
            self._land(key, flight, partial(flight.set_exception, error))
        else:
            self._land(key, flight, partial(flight.set_result, found))

    def _land(self, key: Hashable, flight: Future[T], tell: Callable[[], None]) -> None:
        """Whoever asks from now on asks anew."""
        with self._lock:
            if self._flying.get(key) is flight:
                del self._flying[key]
        with suppress(InvalidStateError):  # it was given up when its thread had just begun
            tell()


def _is_of(flight: Future[T], error: BaseException) -> bool:
    return flight.done() and flight.exception() is error
