"""Counters and timings: what is counted is there, from any thread; and Prometheus' own parser reads it."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

import pytest

from loreg.errors import NotFound, UsageError
from loreg.serving import signals
from loreg.serving.signals import BOUNDS, Series, Signals


def test_counts_add_up_by_labels() -> None:
    counted = Signals()
    counted.count("hits")
    counted.count("hits", 2)
    counted.count("hits", 5, tier="disk")
    counted.count("hits", 7, tier="disk", kind="blob")
    counted.count("hits", 1, kind="blob", tier="disk")  # the order in which labels are given is nothing
    assert counted.snapshot().counts == {
        Series("hits"): 3,
        Series("hits", (("tier", "disk"),)): 5,
        Series("hits", (("kind", "blob"), ("tier", "disk"))): 8,
    }


def test_a_snapshot_does_not_go_on() -> None:
    counted = Signals()
    counted.count("hits")
    before = counted.snapshot()
    counted.count("hits")
    assert before.counts[Series("hits")] == 1


def test_timings_fall_between_their_bounds() -> None:
    counted = Signals()
    for seconds in (0.0, BOUNDS[0], BOUNDS[0] * 1.01, 0.003, 1e9):
        counted.observe("work", seconds)
    found = counted.snapshot().timings[Series("work")]
    assert found.count == 5
    assert found.seconds == pytest.approx(1e9)
    assert found.buckets[0] == 2  # a bound belongs to what is below it
    assert found.buckets[1] == 1
    assert found.buckets[BOUNDS.index(0.005)] == 1
    assert found.buckets[-1] == 1
    assert sum(found.buckets) == 5


def test_a_block_is_timed_also_if_it_raises() -> None:
    counted = Signals()
    with pytest.raises(ZeroDivisionError), counted.time("work", outcome="done") as timer:
        timer.labels["outcome"] = "failed"
        1 / 0
    (series,) = counted.snapshot().timings
    assert series == Series("work", (("outcome", "failed"),))
    assert 0 < counted.snapshot().timings[series].seconds == timer.seconds < 1


class Yielding(dict):
    """Lets other threads in between reading a number and writing it: of itself, this Python hardly ever does."""

    def __getitem__(self, key: object) -> object:
        value = super().__getitem__(key)
        time.sleep(0)
        return value


def test_no_event_of_any_thread_is_lost() -> None:
    counted = Signals()
    counted._counts = Yielding()
    before, each = sys.getswitchinterval(), 1000

    def work(number: int) -> None:
        for _ in range(each):
            counted.count("done", 1, kind=str(number % 2))
            counted.observe("work", 0.001)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    found = counted.snapshot()
    assert found.counts == {Series("done", (("kind", kind),)): 4 * each for kind in "01"}
    assert found.timings[Series("work")].count == 8 * each


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_fork_begins_at_zero_and_can_count_whoever_held_the_lock() -> None:
    counted = Signals()
    counted.count("before")
    with counted._lock:  # as another thread may, that is not in the child
        child = os.fork()
        if child == 0:
            signal.alarm(10)
            counted.count("after")
            os._exit(0 if counted.snapshot().counts == {Series("after"): 1} else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert counted.snapshot().counts == {Series("before"): 1}


@pytest.mark.parametrize(
    ("name", "labels"), [("Hits", {}), ("", {}), ("a-b", {}), ("hits", {"le": "1"}), ("hits", {"__x": "1"})]
)
def test_names_are_those_that_every_form_can_write(name: str, labels: dict[str, str]) -> None:
    with pytest.raises(UsageError, match="name of a signal"):
        Signals().count(name, **labels)
    with pytest.raises(UsageError, match="name of a signal"):
        Signals().observe(name, 1.0, **labels)


def test_counters_do_not_go_down() -> None:
    with pytest.raises(UsageError, match="cannot go down"):
        Signals().count("hits", -1)


def test_the_default_can_be_replaced() -> None:
    mine = Signals()
    before = signals.replace_default(mine)
    try:
        assert signals.default() is mine
    finally:
        assert signals.replace_default(before) is mine
    assert signals.default() is before


def test_without_the_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(NotFound, match=r"loreg\[metrics\]"):
        Signals().prometheus()


def test_prometheus_reads_the_same_numbers() -> None:
    client = pytest.importorskip("prometheus_client", reason="the extra metrics is not installed")
    parser = pytest.importorskip("prometheus_client.parser")
    counted, registry = Signals(), client.CollectorRegistry()
    counted.count("watch_moves", 2)
    counted.count("cache_hits", 3, tier="disk")
    counted.count("cache_hits", 4, tier='a "b"\\\n')
    counted.count("cache_hits", 5, kind="blob")
    for seconds in (0.0004, 0.0005, 3.0, 1000.0):
        counted.observe("push", seconds, engine="vllm")
    registry.register(counted.prometheus())
    text = client.generate_latest(registry).decode()
    families = {family.name: family for family in parser.text_string_to_metric_families(text)}
    assert families["loreg_watch_moves"].type == "counter"
    assert families["loreg_watch_moves"].documentation == signals.HELP["watch_moves"]
    assert registry.get_sample_value("loreg_watch_moves_total") == 2
    hits = {tuple(sample.labels.values()): sample.value for sample in families["loreg_cache_hits"].samples}
    assert hits == {("", "disk"): 3, ("", 'a "b"\\\n'): 4, ("blob", ""): 5}
    push = families["loreg_push_seconds"]
    assert push.type == "histogram"
    found = {(sample.name, sample.labels.get("le")): sample.value for sample in push.samples}
    assert found["loreg_push_seconds_count", None] == 4
    assert found["loreg_push_seconds_sum", None] == pytest.approx(1003.0009)
    assert found["loreg_push_seconds_bucket", "0.00025"] == 0
    assert found["loreg_push_seconds_bucket", "0.0005"] == 2
    assert found["loreg_push_seconds_bucket", "5.0"] == 3
    assert found["loreg_push_seconds_bucket", "50.0"] == 3
    assert found["loreg_push_seconds_bucket", "+Inf"] == 4
    counted.count("watch_moves")
    assert registry.get_sample_value("loreg_watch_moves_total") == 3  # read anew at each scrape
