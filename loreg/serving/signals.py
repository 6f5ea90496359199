"""``Signals``: what serving counts and times, for whoever wants to look, in Prometheus' form too.

    from prometheus_client import REGISTRY, generate_latest
    REGISTRY.register(signals.default().prometheus())  # pip install 'loreg[metrics]'

Counting is a lock and a number in a dictionary, a microsecond or two, so that a resolve of a tenth of a millisecond
may count what it likes.
"""

from __future__ import annotations

import os
import re
import threading
import time
import weakref
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeVar

from loreg.errors import NotFound, UsageError

if TYPE_CHECKING:
    from prometheus_client import Metric

BOUNDS = tuple(digit * 10.0**power for power in range(-5, 2) for digit in (1, 2.5, 5))
"""The upper bounds, in seconds, between which timings are counted: 10 µs to 50 s, three for each power of ten."""

HELP = {
    "resolve": "How long it took to turn a reference into a directory that was at hand, found on the disk, or made.",
    "load": "How long it took to load the factors of a version, by the kind of device.",
    "change": "How long a live model took to be changed, and readers of it had to wait, by what was done.",
    "cache_hits": "Factors that a tier of a cache had.",
    "cache_misses": "Factors that a tier of a cache had not.",
    "cache_evictions": "Factors that left a tier of a cache for others.",
    "watch_moves": "Moves of a watched reference that were told.",
    "watch_outages": "Times at which a watched catalog could not be read, and was asked again later.",
    "push": "How long it took to load an adapter into an engine or out of it, by engine, action and outcome.",
}
"""What names mean. One that is not here, of a program that counts with loreg's signals, is described by itself."""

Number = TypeVar("Number")
_NAME = re.compile(r"[a-z][a-z0-9_]*")


class Series(NamedTuple):
    """One line of numbers: a name, and its labels in order of their names."""

    name: str
    labels: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Timing:
    """How often something was timed, for how many ``seconds`` in all, and how many took no longer than each of
    ``BOUNDS`` but longer than the one before; the last number is of those beyond the last."""

    count: int
    seconds: float
    buckets: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All numbers at one instant."""

    counts: Mapping[Series, float]
    timings: Mapping[Series, Timing]


class Collector(Protocol):
    """What ``CollectorRegistry.register`` takes."""

    def collect(self) -> Iterator[Metric]: ...


class Signals:
    """Counters and timings. Threads share it; a forked process begins at zero, so that two do not report one event.

    Names are lower-case words joined by ``_``. Labels tell a few kinds apart, such as a tier or an outcome: each
    combination is kept for ever, so no references, digests or paths.
    """

    def __init__(self) -> None:
        self._begin()
        _ALL.add(self)

    def _begin(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[Series, float] = {}
        self._timings: dict[Series, list[float]] = {}  # the sum, and how many fell between the bounds

    def count(self, name: str, by: float = 1, **labels: str) -> None:
        """Add ``by`` to a counter. Raises UsageError for a negative number, or a name that is none."""
        if by < 0:
            raise UsageError(f"the counter {name!r} cannot go down: expected 0 or more, found {by}.")
        series = _series(name, labels)
        with self._lock:
            if series not in self._counts:
                _check(series)
                self._counts[series] = 0
            self._counts[series] += by

    def time(self, name: str, **labels: str) -> Timer:
        """A context that times its block, whether that ends or raises. Labels that are known only then are set on
        it: ``with signals.time("resolve") as timer: timer.labels["outcome"] = "hit"``."""
        return Timer(self, name, labels)

    def observe(self, name: str, seconds: float, **labels: str) -> None:
        """Add what took ``seconds``."""
        series, place = _series(name, labels), bisect_left(BOUNDS, seconds)
        with self._lock:
            found = self._timings.get(series)
            if found is None:
                _check(series)
                found = self._timings[series] = [0.0] * (len(BOUNDS) + 2)
            found[0] += seconds
            found[1 + place] += 1

    def snapshot(self) -> Snapshot:
        """Everything counted and timed so far."""
        with self._lock:
            counts = dict(self._counts)
            timings = {series: tuple(numbers) for series, numbers in self._timings.items()}
        read = {}
        for series, (seconds, *numbers) in timings.items():
            buckets = tuple(map(int, numbers))
            read[series] = Timing(sum(buckets), seconds, buckets)
        return Snapshot(counts, read)

    def prometheus(self) -> Collector:
        """The same numbers for a registry of ``prometheus_client``, read whenever that is scraped: a counter
        ``watch_moves`` as ``loreg_watch_moves_total``, a timing ``push`` as the histogram ``loreg_push_seconds``.

        Raises NotFound if ``prometheus_client`` is not installed.
        """
        try:
            import prometheus_client.core  # noqa: F401 - found out here, and not at the first scrape
        except ImportError as error:
            raise NotFound(
                f"Prometheus' form needs prometheus_client, which cannot be imported ({error}): "
                "pip install 'loreg[metrics]'."
            ) from error
        return _Prometheus(self)


class Timer:
    """See ``Signals.time``. ``seconds``: what the block took, once it is over."""

    __slots__ = ("_began", "_name", "_signals", "labels", "seconds")

    def __init__(self, signals: Signals, name: str, labels: dict[str, str]) -> None:
        self._signals, self._name, self.labels = signals, name, labels
        self.seconds = 0.0

    def __enter__(self) -> Timer:
        self._began = time.perf_counter()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self.seconds = time.perf_counter() - self._began
        self._signals.observe(self._name, self.seconds, **self.labels)


class _Prometheus:
    def __init__(self, signals: Signals) -> None:
        self._signals = signals

    def collect(self) -> Iterator[Metric]:
        from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
        from prometheus_client.utils import floatToGoString

        found = self._signals.snapshot()
        for name, names, rows in _families(found.counts):
            counter = CounterMetricFamily(f"loreg_{name}", _help(name), labels=names)
            for values, number in rows:
                counter.add_metric(values, number)
            yield counter
        for name, names, timings in _families(found.timings):
            histogram = HistogramMetricFamily(f"loreg_{name}_seconds", _help(name), labels=names)
            for values, timing in timings:
                cumulative, total = [], 0
                for bound, number in zip((*BOUNDS, float("inf")), timing.buckets, strict=True):
                    total += number
                    cumulative.append((floatToGoString(bound), total))
                histogram.add_metric(values, cumulative, timing.seconds)
            yield histogram


def _families(
    found: Mapping[Series, Number],
) -> Iterator[tuple[str, list[str], list[tuple[list[str], Number]]]]:
    """By name: the names of all labels, and the values of each series with its number. A label that a series has not
    is empty, which to Prometheus is the same."""
    for name in sorted({series.name for series in found}):
        mine = [(dict(series.labels), number) for series, number in found.items() if series.name == name]
        names = sorted({label for labels, _ in mine for label in labels})
        yield name, names, [([labels.get(label, "") for label in names], number) for labels, number in mine]


def _help(name: str) -> str:
    return HELP.get(name, f"{name.replace('_', ' ').capitalize()}.")


def _series(name: str, labels: Mapping[str, str]) -> Series:
    return Series(name, tuple(sorted(labels.items())) if labels else ())


def _check(series: Series) -> None:
    """Once for each, as it is made. ``le`` is the label of a histogram's bounds."""
    for word in (series.name, *(label for label, _ in series.labels)):
        if not _NAME.fullmatch(word) or word == "le":
            raise UsageError(
                f"{word!r} is no name of a signal: expected lower-case words joined by _, as in cache_hits."
            )


_ALL: weakref.WeakSet[Signals] = weakref.WeakSet()


def _begin_all() -> None:
    for signals in list(_ALL):
        signals._begin()


os.register_at_fork(after_in_child=_begin_all)  # a thread that is not in the child may have held the lock

_default = Signals()


def default() -> Signals:
    """What loreg itself counts into."""
    return _default


def replace_default(signals: Signals) -> Signals:
    """Have loreg count into ``signals`` from now on; returns what it counted into until now."""
    global _default
    before, _default = _default, signals
    return before
