"""The protocol of pushes, collections and repairs as a machine of which every state is visited.

One digest, which every push needs, and its copies by generation. A state is all that outlives a process (the store,
the catalog, deletes that are on their way) and how far each process is. Between any two steps any other process may
go on, any process may die, a lease may be taken from a push that is alive (its clock or its host stood still), and a
delete may arrive after its collector died. A copy may be damaged, which only a repair sees: it reads all of it.

*Safe* is a state in which every version that was committed finds its copy: the catalog's row is live, and the key of
that generation is in the store, and whole once a repair has said so.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TypeVar

import state_space

T = TypeVar("T")
REPAIR, BEFORE = -1, -2
"""The pin of a repair, and a version that was there before, where else there is the number of a push."""

Row = tuple[str, int]  # live or deleting, and the generation


@dataclass(frozen=True)
class Rules:
    """The protocol; each field that is False leaves out one of its rules."""

    pin_before_look: bool = True
    list_before_catalog: bool = True
    fresh_generation: bool = True
    fence: bool = True
    pin_a_repair: bool = True
    repair_by_a_fresh_copy: bool = True
    commit_what_the_row_says_now: bool = True


@dataclass(frozen=True)
class Push:
    """``at``: the step that comes next. ``generation``: of the copy that it ``found`` or wrote."""

    at: str = "begin"
    generation: int = -1
    found: bool = False


@dataclass(frozen=True)
class Repair:
    """``damaged``: the generation that it found to be. ``generation``: of the copy that is to take its place."""

    at: str = "begin"
    damaged: int = -1
    generation: int = -1


@dataclass(frozen=True)
class Collection:
    """``listed``: what it saw in the store. ``marked``: the generation whose row it marked. ``row``, ``pinned``,
    ``used``: what it saw in the catalog, of one that looks there first."""

    at: str = "begin"
    listed: frozenset[int] = frozenset()
    marked: int = -1
    seen: tuple[Row | None, bool, bool] | None = None


@dataclass(frozen=True)
class State:
    """``copies``: the generations in the store. ``late``: those that a delete is on its way to. ``pins``: the pushes
    that have a lease, and ``REPAIR``. ``versions``: the pushes that were committed. ``drawn``: how many generations
    there were. ``damaged``: those that are. ``mended``: a repair has said that it is whole again."""

    pushes: tuple[Push, ...]
    collections: tuple[Collection, ...]
    copies: frozenset[int]
    row: Row | None
    pins: frozenset[int] = frozenset()
    versions: frozenset[int] = frozenset()
    late: frozenset[int] = frozenset()
    drawn: int = 1
    repair: Repair = Repair("done")
    damaged: frozenset[int] = frozenset()
    mended: bool = False

    @property
    def safe(self) -> bool:
        if not self.versions:
            return True
        state, generation = self.row or ("", -1)
        return state == "live" and generation in self.copies and not (self.mended and generation in self.damaged)


def start(pushes: int, collections: int) -> State:
    """A copy that nothing needs any more: what a collector may take, and a push may find."""
    return State((Push(),) * pushes, (Collection(),) * collections, frozenset({0}), ("live", 0))


def damaged(pushes: int, collections: int) -> State:
    """The copy of a version is damaged, and there is another that no row knows."""
    begun = replace(start(pushes, collections), copies=frozenset({0, 1}), drawn=2, versions=frozenset({BEFORE}))
    return replace(begun, damaged=frozenset({0}), repair=Repair())


def steps(state: State, rules: Rules) -> Iterator[State]:
    """Every state that may come next."""
    for index, push in enumerate(state.pushes):
        for after, now in _push(state, index, push, rules):
            yield replace(after, pushes=_with(state.pushes, index, now))
        if push.at not in ("done", "dead"):
            yield replace(state, pushes=_with(state.pushes, index, Push("dead")))
    for index, collection in enumerate(state.collections):
        for later, then in _collect(state, collection, rules):
            yield replace(later, collections=_with(state.collections, index, then))
        if collection.at not in ("done", "dead"):
            yield replace(state, collections=_with(state.collections, index, Collection("dead")))
    for mended, next_ in _repair(state, rules):
        yield replace(mended, repair=next_)
    if state.repair.at != "done":  # it dies
        yield replace(state, repair=Repair("done"))
    if state.versions:  # they are removed
        yield replace(state, versions=frozenset())
    for pin in state.pins:  # whether its push is dead, or only slow
        yield replace(state, pins=state.pins - {pin})
    for generation in state.late:
        yield replace(state, late=state.late - {generation}, copies=state.copies - {generation})


def _push(state: State, index: int, push: Push, rules: Rules) -> Iterator[tuple[State, Push]]:
    pinned = replace(state, pins=state.pins | {index})
    if push.at == "begin":
        if rules.pin_before_look:
            yield pinned, replace(push, at="look")
        else:
            yield from _look(state, push, "pin", "pin")
    elif push.at == "pin":  # of the one that looked before
        yield pinned, replace(push, at="commit" if push.generation >= 0 else "write")
    elif push.at == "look":
        yield from _look(state, push, "commit", "write")
    elif push.at == "write":
        generation = state.drawn if rules.fresh_generation else 0
        written = replace(state, copies=state.copies | {generation}, drawn=state.drawn + rules.fresh_generation)
        yield written, Push("commit", generation)
    elif push.at == "commit":
        generation = push.generation
        if push.found and rules.commit_what_the_row_says_now and state.row is not None:
            generation = state.row[1]
        if (rules.fence and index not in state.pins) or generation not in state.copies:
            yield replace(state, pins=state.pins - {index}), Push("done")
        else:
            row, versions = ("live", generation), state.versions | {index}
            yield replace(state, row=row, versions=versions, pins=state.pins - {index}), Push("done")


def _look(state: State, push: Push, found: str, absent: str) -> Iterator[tuple[State, Push]]:
    row = state.row
    if row is not None and row[0] == "live" and row[1] in state.copies:
        yield state, Push(found, row[1], True)
    else:
        yield state, Push(absent)


def _repair(state: State, rules: Rules) -> Iterator[tuple[State, Repair]]:
    """``checking._Run._damaged``, which has seen what is damaged, and has another copy or a source."""
    repair, good = state.repair, state.copies - state.damaged
    if repair.at == "begin":
        pins = state.pins | ({REPAIR} if rules.pin_a_repair else set())
        if state.row is not None and state.row[0] == "live" and state.row[1] in state.damaged:
            yield replace(state, pins=pins), Repair("write", state.row[1])
    elif repair.at == "write":
        if rules.repair_by_a_fresh_copy:
            written = replace(state, copies=state.copies | {state.drawn}, drawn=state.drawn + 1)
            yield written, replace(repair, at="adopt", generation=state.drawn)
        else:
            for generation in good:
                yield state, replace(repair, at="adopt", generation=generation)
    elif repair.at == "adopt":
        lost = rules.pin_a_repair and REPAIR not in state.pins
        if lost or repair.generation not in state.copies or state.row != ("live", repair.damaged):
            yield replace(state, pins=state.pins - {REPAIR}), Repair("done")
        else:
            yield replace(state, row=("live", repair.generation)), replace(repair, at="put aside")
    elif repair.at == "put aside":
        left = replace(state, copies=state.copies - {repair.damaged}, pins=state.pins - {REPAIR}, mended=True)
        yield left, Repair("done")


def _collect(state: State, collection: Collection, rules: Rules) -> Iterator[tuple[State, Collection]]:
    catalog = state.row, bool(state.pins), bool(state.versions)
    if collection.at == "begin":
        if rules.list_before_catalog:
            yield state, Collection("mark", state.copies)
        else:
            yield _marked(state, catalog), Collection("list", seen=catalog, marked=_mark(catalog))
    elif collection.at == "list":
        assert collection.seen is not None
        doomed = _doomed(state.copies, collection.seen)
        yield replace(state, late=state.late | doomed), replace(collection, at="drop", seen=None)
    elif collection.at == "mark":
        doomed = _doomed(collection.listed, catalog)
        later = replace(_marked(state, catalog), late=state.late | doomed)
        yield later, Collection("drop", marked=_mark(catalog))
    elif collection.at == "drop":
        # Once its own deletes have arrived: here, once no delete of that generation is on its way.
        if collection.marked in state.late:
            return
        gone = state.row == ("deleting", collection.marked)
        yield replace(state, row=None if gone else state.row), Collection("done")


def _mark(catalog: tuple[Row | None, bool, bool]) -> int:
    """The generation of the row that is to be marked, or is marked still; -1 for none."""
    row, pinned, used = catalog
    return row[1] if row is not None and not pinned and not used else -1


def _marked(state: State, catalog: tuple[Row | None, bool, bool]) -> State:
    generation = _mark(catalog)
    return state if generation < 0 else replace(state, row=("deleting", generation))


def _doomed(listed: frozenset[int], catalog: tuple[Row | None, bool, bool]) -> frozenset[int]:
    """The row's copy if that was marked; and what no row knows, unless a push has its pin on the digest."""
    row, pinned, _ = catalog
    if pinned:
        return frozenset()
    marked = _mark(catalog)
    orphans = listed - ({row[1]} if row is not None else set())
    return orphans | ({marked} if marked >= 0 else set())


def _with(items: tuple[T, ...], index: int, item: T) -> tuple[T, ...]:
    return (*items[:index], item, *items[index + 1 :])


def explore(begin: State, rules: Rules) -> tuple[int, list[State]]:
    """All states: how many there are, and the way to the first that is not safe, empty where all are."""
    return state_space.explore(begin, lambda state: steps(state, rules), lambda state: state.safe)
