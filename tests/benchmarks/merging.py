"""Merges against copies and PEFT, several at once, undone and proved: on the disk and in memory-backed files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import prod

from tests.benchmarks.bench import Bench, Lines
from tests.benchmarks.pairs import HEADER, Goal, Row, at_most, compared, faster, in_turn, unmeasured
from tests.benchmarks.places import ADAPTERS, Place

ONE = ADAPTERS[0]
FOUR = " + ".join(ADAPTERS)
AGAINST_COPY = {"disk": at_most(1.10), "memory-backed": at_most(1.5)}
AGAINST_PEFT = faster(6)
FOUR_AT_ONCE = at_most(1.25)
ONE_PASS = at_most(0.75)
WITH_UNDO = at_most(1.25)
JOURNAL = Goal(0.03, "≤ 3 %")
PROVED = at_most(2)

Rows = Iterator[Row]


def merge(bench: Bench) -> Lines:
    """One adapter against ``cp -r`` and against PEFT."""
    shape = bench.disk.shape
    yield from _table(
        bench,
        f"Merging one adapter: {shape.name}, {2 * shape.parameters / 1e9:.2f} GB of bf16 in 3 shards, rank 16 on "
        "every linear layer",
        _merged,
    )
    yield ""
    yield (
        f"‖ΔW‖ is {100 * bench.disk.relative:.3g} % of ‖W‖ (Frobenius, over the linear layers of the first block). "
        f"The disk has {bench.disk.system}, the memory-backed files are on {bench.memory.system}. Nothing is "
        "dropped from caches: both sides read a base that the page cache has. Merges and PEFT are timed by their "
        "own clocks, imports left out; whole processes have them. The base's digests are known from `loreg base "
        "add`, nothing is verified afterwards, and each merge is flushed to the disk before it ends, which PEFT's "
        "is not."
    )


def _merged(bench: Bench, place: Place) -> Rows:
    sync = place is bench.disk
    ours, copies, peft = in_turn(bench.runs, [place.merge(ONE), place.copy(sync=sync), place.peft()])
    for name, other, theirs, goal in (
        ("a copy", "`cp -r` + sync" if sync else "`cp -r`", copies, AGAINST_COPY[place.name]),
        ("PEFT", "load, merge_and_unload, save", peft, AGAINST_PEFT),
    ):
        yield compared(f"{place.name}: merge, against {name}", ours, other, theirs, goal)
        yield compared(f"{place.name}: merge, against {name}, whole processes", ours, other, theirs, whole=True)


def many(bench: Bench) -> Lines:
    """Four adapters in one output, and three outputs in one pass."""
    yield from _table(bench, "Several at once", _many)


def _many(bench: Bench, place: Place) -> Rows:
    three = ADAPTERS[:3]
    one, four, together, apart = in_turn(
        bench.runs, [place.merge(ONE), place.merge(FOUR), place.merge(*three), place.passes(*three)]
    )
    yield compared(f"{place.name}: four adapters at once, against one", four, "one adapter", one, FOUR_AT_ONCE)
    yield compared(f"{place.name}: three outputs in one pass", together, "in three passes", apart, ONE_PASS)


def undo(bench: Bench) -> Lines:
    """A merge with its journal, the journal's size, and both ways back."""
    yield from _table(bench, "Undoing", _undone)
    yield ""
    yield "An unmerge checks every tensor that it reads, and reads back what it wrote: the base, bit for bit."


def _undone(bench: Bench, place: Place) -> Rows:
    sync = place is bench.disk
    works = [place.merge(ONE), place.merge(ONE, options=["--undo"]), place.copy(sync=sync)]
    works += [place.unmerge(journal=True), place.unmerge(journal=False)]
    plain, undo, copies, by_journal, by_base = in_turn(bench.runs, works)
    yield compared(f"{place.name}: merge with `--undo`", undo, "without", plain, WITH_UNDO)
    name = f"{place.name}: the journal, of the touched bytes"
    if undo.reason is not None:
        yield unmeasured(name, undo.reason, JOURNAL.text)
    else:
        told, tensors = undo.runs[-1].told, place.shape.tensors
        size, touched = told["undo_bytes"], sum(2 * prod(tensors[tensor]) for tensor in told["touched"])
        found = JOURNAL.judged(size / touched, f"{100 * size / touched:.3g} %")
        yield Row((name, f"{size / 1e6:.4g} MB", f"{touched / 1e6:.4g} MB", found, JOURNAL.text))
    other = "`cp -r` + sync" if sync else "`cp -r`"
    yield compared(f"{place.name}: unmerge by the journal, against a copy", by_journal, other, copies)
    yield compared(f"{place.name}: unmerge by the base, against a copy", by_base, other, copies)


def verify(bench: Bench) -> Lines:
    """A merge that is proved before it has its name."""
    yield from _table(bench, "Proving", _verified)


def _verified(bench: Bench, place: Place) -> Rows:
    proved, plain = in_turn(bench.runs, [place.merge(ONE, options=["--verify", "probe"]), place.merge(ONE)])
    yield compared(f"{place.name}: merge and `--verify probe`", proved, "`--verify none`", plain, PROVED)


def _table(bench: Bench, title: str, rows: Callable[[Bench, Place], Rows]) -> Lines:
    yield from (f"## {title}", "", *HEADER)
    for place in bench.places:
        yield from rows(bench, place)
