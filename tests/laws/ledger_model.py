"""The ledger beside the catalog as a machine of which every state is visited.

A state is the catalog, the store's records, an older copy of the catalog that somebody may have taken, and how far
each process is. A process changes one fact after another, or shortens the ledger. Between any two steps any other
process may go on, any may die, the catalog may be lost and be made again from the store, and the copy may be put
back. Whoever does that has ended all processes before.

Beside each step is the function of loreg that it is. Blobs and leases are in ``protocol_model``. ``store.json`` is
left out: there is one store here, and every catalog is its own.

*Safe* is a state in which a catalog that was made from the store now would have every change that was acknowledged,
none that was not committed, and would be what the catalog once was; and nobody has committed without having all that
the store has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import NamedTuple

import state_space

Facts = frozenset[int]
Store = frozenset["Record"]


class Rules(NamedTuple):
    """The protocol; each field that is False leaves out one of its rules.

    ``catch_up``: what others have committed is written too. ``look_at_all_numbers``: whether the store has *any*
    record after the catalog's last one, not the next one alone, which shortening may have deleted.
    """

    record_before_acknowledging: bool = True
    commit_before_record: bool = True
    catch_up: bool = True
    settle_before_commit: bool = True
    refuse_another_record: bool = True
    look_at_opening: bool = True
    look_at_all_numbers: bool = True
    list_before_snapshot: bool = True
    snapshot_in_transaction: bool = True
    snapshot_before_delete: bool = True
    chain: bool = True


class Limits(NamedTuple):
    """How often it may happen. ``outlive``: nobody ends the processes when the catalog is lost or another is put in
    its place, and those that have records in hand go on writing them."""

    changes: int = 0
    snapshots: int = 0
    losses: int = 0
    copies: int = 0
    outlive: bool = False


class Record(NamedTuple):
    """``previous``: the record itself, where loreg has its digest; two are equal if all that is before them is.
    ``after``: what the catalog said when this was committed; no record says that, it is what replays are measured by.
    """

    seq: int
    previous: Record | None
    facts: Facts
    after: Facts
    part: int = 0
    parts: int = 0


class Catalog(NamedTuple):
    """``kept``: its table of records. The last one's ``after`` is what its other rows say."""

    kept: tuple[Record, ...] = ()

    @property
    def head(self) -> Record | None:
        return self.kept[-1] if self.kept else None

    @property
    def last(self) -> int:
        return self.kept[-1].seq if self.kept else 0

    @property
    def facts(self) -> Facts:
        return self.kept[-1].after if self.kept else frozenset()


class Process(NamedTuple):
    """``at``: the step that comes next; ``then``: the one after all of ``hand`` is in the store. ``last``: where it
    saw the catalog end. ``written``: up to where it knows the store to have all. ``change``: what it has committed.
    ``listed``: records that it may delete. ``seen``: the catalog, for a snapshot of what was read too early."""

    at: str = ""
    then: str = ""
    change: int = 0
    shortens: bool = False
    last: int = 0
    written: int = 0
    hand: tuple[Record, ...] = ()
    listed: frozenset[int] = frozenset()
    seen: Facts = frozenset()


ENDED = Process()
REFUSED = Process("refused")  # with Conflict, and what it asked for was not acknowledged


class State(NamedTuple):
    """``catalog``: None if it is lost. ``changes`` to ``copies``: how often that has happened. ``usurped``: somebody
    has committed who lacks what the store has."""

    processes: tuple[Process, ...]
    catalog: Catalog | None = Catalog()
    store: Store = frozenset()
    copy: Catalog | None = None
    committed: Facts = frozenset()
    acknowledged: Facts = frozenset()
    changes: int = 0
    snapshots: int = 0
    losses: int = 0
    copies: int = 0
    usurped: bool = False


class Replayed(NamedTuple):
    facts: Facts
    last: Record | None
    gaps: tuple[int, ...]


def start(processes: int) -> State:
    return State((ENDED,) * processes)


def wrong(state: State, rules: Rules) -> str:
    """What is not safe; empty if all is."""
    if state.usurped:
        return "somebody committed who lacks what the store has"
    return lost(state, rules)


def lost(state: State, rules: Rules) -> str:
    """What is wrong with a catalog that was made from the store now."""
    ledger = replay(state.store, rules.chain)
    if ledger.gaps:
        return "a record is missing, or is not what the next one follows on"
    if not state.acknowledged <= ledger.facts:
        return "what was acknowledged is lost"
    if not ledger.facts <= state.committed:
        return "what was never committed is recorded"
    if mixed(state, rules):
        return "what is replayed was never a catalog"
    return ""


def mixed(state: State, rules: Rules) -> bool:
    """Whether the ledger is taken for whole, and says what no catalog ever said."""
    ledger = replay(state.store, rules.chain)
    return not ledger.gaps and ledger.last is not None and ledger.facts != ledger.last.after


def refused(state: State, rules: Rules) -> bool:
    """Whether anybody was told that the catalog is an older copy."""
    return REFUSED in state.processes


@cache
def replay(store: Store, chain: bool = True) -> Replayed:
    """``format.ledger.replay``"""
    records = {record.seq: record for record in store}
    facts: Facts = frozenset()
    last: Record | None = None
    gaps = []
    for seq in range(_beginning(records), max(records, default=0) + 1):
        record = records.get(seq)
        if record is None:
            gaps.append(seq)
            continue
        if chain and last is not None and last.seq == seq - 1 and record.previous != last:
            gaps.append(seq - 1)
        facts, last = facts | record.facts, record
    return Replayed(facts, last, tuple(gaps))


def _beginning(records: dict[int, Record]) -> int:
    """``format.ledger._start``"""
    for seq in sorted(records, reverse=True):
        first = records[seq]
        more = [records.get(seq + part) for part in range(first.parts)]
        if first.part == 1 and [each and each.part for each in more] == list(range(1, first.parts + 1)):
            return seq
    return 1


def numbers(store: Store) -> frozenset[int]:
    """``Store.records``"""
    return frozenset(record.seq for record in store)


def snapshot(facts: Facts, after: Facts, previous: Record | None) -> tuple[Record, ...]:
    """``format.ledger.snapshot``, where a part has room for one fact"""
    records: list[Record] = []
    parts = max(1, len(facts))
    for part in range(1, parts + 1):
        seq = previous.seq + 1 if previous else 1
        previous = Record(seq, previous, frozenset(sorted(facts)[part - 1 : part]), after, part, parts)
        records.append(previous)
    return tuple(records)


def steps(state: State, rules: Rules, limits: Limits) -> Iterator[State]:
    """Every state that may come next."""
    for index, process in enumerate(state.processes):
        others = state.processes[:index] + state.processes[index + 1 :]
        for after, now in _step(state, process, rules, limits):
            yield after._replace(processes=_in_order((*others, now)))
        if process != ENDED:  # it dies
            yield state._replace(processes=_in_order((*others, ENDED)))
    yield from _misfortune(state, limits)


def _misfortune(state: State, limits: Limits) -> Iterator[State]:
    """What becomes of the catalog."""
    if state.catalog is None:
        yield state._replace(catalog=_rebuilt(state.store))
        alone = state
    else:
        alone = state._replace(processes=_in_order(_outliving(each, limits) for each in state.processes))
        if state.losses < limits.losses:
            yield alone._replace(catalog=None, losses=state.losses + 1)
        if state.copies < limits.copies and state.copy is None:
            yield state._replace(copy=state.catalog, copies=state.copies + 1)
    if state.copy is not None:
        yield alone._replace(catalog=state.copy, copy=None)


def _outliving(process: Process, limits: Limits) -> Process:
    """It has its records in hand, and needs no catalog to write them."""
    if not limits.outlive or process.at != "write":
        return ENDED
    return process._replace(then="tell" if process.then in ("acknowledge", "tell") else "")


def _rebuilt(store: Store) -> Catalog:
    """``rebuilding.rebuild``, up to the commit of its first transaction. The second, which changes nothing, is what
    every process does before it commits."""
    ledger = replay(store)
    before = (ledger.last,) if ledger.last else ()  # queries.go_on_from
    return Catalog(before + snapshot(ledger.facts, ledger.facts, ledger.last))


def _step(state: State, process: Process, rules: Rules, limits: Limits) -> Iterator[tuple[State, Process]]:
    at, catalog = process.at, state.catalog
    if at == "write":
        yield _write(state, process, rules)
    elif at in ("acknowledge", "tell"):
        yield from _acknowledge(state, process, limits)
    elif catalog is None:
        return  # a new one finds in store.json that it is none of its own, until one is made again
    elif at == "":
        if state.changes < limits.changes:
            yield state, _opened(Process(), catalog, rules)
        if state.snapshots < limits.snapshots:
            yield state, _opened(Process(shortens=True), catalog, rules)
    elif at == "look":  # Recorder._check_newest
        beyond = {seq for seq in numbers(state.store) if seq > process.last}
        if process.last and not rules.look_at_all_numbers:
            beyond &= {process.last + 1}
        yield state, process._replace(at="look again") if beyond else _owned(process)
    elif at == "look again":  # else somebody has just written it
        yield state, REFUSED if catalog.last == process.last else _opened(process, catalog, rules)
    elif at == "list":  # collecting._shorten_ledger: store.records()
        seen = frozenset() if rules.snapshot_in_transaction else catalog.facts
        listed = numbers(state.store) if rules.list_before_snapshot else frozenset()
        yield state, process._replace(at="settle", then="commit", listed=listed, seen=seen)
    elif at == "settle":  # Recorder._settle: queries.kept_records
        hand = () if process.then == "commit" and not rules.settle_before_commit else catalog.kept
        hand = tuple(record for record in hand if record.seq > process.written)
        if not rules.catch_up:
            hand = tuple(record for record in hand if process.change in record.facts)
        yield state, _after(process._replace(at="write", hand=hand))
    elif at == "commit":
        yield from _commit(state, catalog, process, rules, limits)
    elif at == "commit late":
        yield _commit_late(state, catalog, process)
    elif at == "last":  # collecting._shorten_ledger: queries.last_record
        listed = process.listed if rules.list_before_snapshot else numbers(state.store)
        yield state, _doomed(process._replace(listed=listed), catalog.head, rules)
    elif at == "delete":  # collecting._shorten_ledger: store.delete_record, in any order
        for seq in process.listed:
            left = process.listed - {seq}
            store = frozenset(record for record in state.store if record.seq != seq)
            yield state._replace(store=store), _deleting(process._replace(listed=left), rules)


def _opened(process: Process, catalog: Catalog, rules: Rules) -> Process:
    """``Recorder.own``: ``Recorder._last``"""
    return process._replace(at="look", last=catalog.last) if rules.look_at_opening else _owned(process)


def _owned(process: Process) -> Process:
    """The store was found to have nothing that the catalog has not."""
    if process.shortens:
        return process._replace(at="list", last=0)
    return process._replace(at="settle", then="commit", last=0)


def _write(state: State, process: Process, rules: Rules) -> tuple[State, Process]:
    """``Store.write_record``: the one there stays, and is refused if it is another."""
    record, *rest = process.hand
    there = next((each for each in state.store if each.seq == record.seq), record)
    if there != record and rules.refuse_another_record:
        return state, REFUSED
    now = _after(process._replace(hand=tuple(rest), written=record.seq))
    return (state if there != record else state._replace(store=state.store | {record})), now


def _after(process: Process) -> Process:
    """On to ``then``, once nothing is left in hand."""
    return process if process.hand else process._replace(at=process.then, then="")


def _commit(
    state: State, catalog: Catalog, process: Process, rules: Rules, limits: Limits
) -> Iterator[tuple[State, Process]]:
    """``Database.write``: ``queries.forget_records``, ``ledger.close_record``"""
    if process.shortens:
        if state.snapshots == limits.snapshots:
            return
        seen = catalog.facts if rules.snapshot_in_transaction else process.seen
        records = snapshot(seen, catalog.facts, catalog.head)
        after = state._replace(snapshots=state.snapshots + 1)
        then = "last" if rules.snapshot_before_delete else ""
        now = process._replace(at="settle" if then else "last", then=then, seen=frozenset())
    else:
        if state.changes == limits.changes:
            return
        change = state.changes + 1
        after = state._replace(changes=change)
        records = _changed(catalog, change)
        now = process._replace(at="settle", then="acknowledge", change=change)
        if not rules.commit_before_record:
            yield after, now._replace(at="write", then="commit late", hand=records)
            return
        after = after._replace(committed=state.committed | {change})
        if not rules.record_before_acknowledging:
            now = now._replace(at="acknowledge", then="settle")
    yield _committed(after, catalog, records, process.written), now


def _commit_late(state: State, catalog: Catalog, process: Process) -> tuple[State, Process]:
    """It has written its record already; refused, if somebody was faster."""
    records = _changed(catalog, process.change)
    if records[0].seq != process.written:
        return state, REFUSED
    after = state._replace(committed=state.committed | {process.change})
    return _committed(after, catalog, records, process.written), process._replace(at="acknowledge", then="")


def _changed(catalog: Catalog, change: int) -> tuple[Record, ...]:
    """The first record is a snapshot."""
    after, head = catalog.facts | {change}, catalog.head
    if head is None:
        return snapshot(after, after, None)
    return (Record(head.seq + 1, head, frozenset({change}), after),)


def _committed(state: State, catalog: Catalog, records: tuple[Record, ...], written: int) -> State:
    kept = tuple(record for record in catalog.kept if record.seq > written or record == catalog.head)
    newest = max(state.store, key=lambda record: record.seq, default=None)
    usurped = newest is not None and newest not in _chain(records[-1])
    return state._replace(catalog=Catalog(kept + records), usurped=state.usurped or usurped)


def _chain(record: Record | None) -> Iterable[Record]:
    while record is not None:
        yield record
        record = record.previous


def _acknowledge(state: State, process: Process, limits: Limits) -> Iterator[tuple[State, Process]]:
    """The command says that it has succeeded. Its process ends, or goes on with another, and does not look again."""
    said = state._replace(acknowledged=state.acknowledged | {process.change})
    if process.then:  # it acknowledged early
        yield said, process._replace(at=process.then, then="")
        return
    yield said, ENDED
    if process.at == "acknowledge" and state.changes < limits.changes:
        yield said, Process("settle", "commit", written=process.written)


def _doomed(process: Process, head: Record | None, rules: Rules) -> Process:
    """Else somebody has written a record since, and the next collection does it."""
    if head is None or not head.part == head.parts > 0:
        return ENDED
    older = frozenset(seq for seq in process.listed if seq <= head.seq - head.parts)
    return _deleting(process._replace(at="delete", listed=older), rules)


def _deleting(process: Process, rules: Rules) -> Process:
    if process.listed:
        return process
    return ENDED if rules.snapshot_before_delete else process._replace(at="settle", then="")


def _in_order(processes: Iterable[Process]) -> tuple[Process, ...]:
    """It does not matter which is which."""
    return tuple(sorted(processes, key=lambda each: (each.at, each.then, each.change, each.written, each.last)))


def explore(
    processes: int,
    limits: Limits,
    rules: Rules = Rules(),  # noqa: B008 - it never changes
    bad: Callable[[State, Rules], object] = wrong,
) -> tuple[int, list[State]]:
    """All states: how many there are, and the way to the first that is bad, empty where none is."""
    replay.cache_clear()
    return state_space.explore(
        start(processes), lambda state: steps(state, rules, limits), lambda state: not bad(state, rules)
    )
