"""The check of the catalog's names against the ledger, and of the ledger itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from loreg.catalog import queries
from loreg.catalog.models import RecordRow
from loreg.digest import Digest
from loreg.errors import BadInput, LoregError
from loreg.format.base import BaseManifest
from loreg.format.ledger import Facts, Key, Ledger, LedgerRecord, replay, sealed, unsealed
from loreg.format.manifest import AdapterManifest
from loreg.registry.problem import Problem
from loreg.registry.storage import Storage
from loreg.store import Store

_ATTEMPTS = 5


@dataclass
class _Found:
    """The catalog at one moment, and the ledger up to that."""

    facts: Facts
    tags: Mapping[tuple[str, str], tuple[int, int]]
    head: int
    ledger: Ledger
    problems: list[Problem] = field(default_factory=list)
    damaged: list[int] = field(default_factory=list)

    @property
    def whole(self) -> bool:
        return not self.problems


def audit(storage: Storage, repair: bool) -> list[Problem]:
    """What is wrong with records, and where catalog and ledger say different things.

    ``repair``: a whole ledger is right, as it has digests, and the catalog's rows are written anew from it. Where
    records are missing or damaged, the catalog is all there is, and the ledger begins anew with what it says.
    """
    found = _look(storage)
    for _ in range(_ATTEMPTS):
        if found.whole:
            break
        again = _look(storage)  # a record may be under way, or a collection may have begun the ledger anew
        if (again.head, again.problems) == (found.head, found.problems):
            break
        found = again
    differing = _differing(found)
    if not repair or not (found.problems or differing):
        return found.problems + differing
    if found.whole:
        how = "written anew from the ledger" if _restate(storage, found) else None
        return [replace(problem, repaired=how) for problem in differing]
    for seq in found.damaged:
        storage.store.quarantine_record(seq)
    with storage.writing() as session:
        queries.begin_anew(session)
    mended = [replace(problem, repaired="the ledger was begun anew from the catalog") for problem in found.problems]
    return mended + [replace(problem, repaired="what the catalog says was kept") for problem in differing]


def read_ledger(
    store: Store, until: int | None = None, kept: Mapping[int, LedgerRecord] | None = None
) -> tuple[Ledger, list[Problem], list[int]]:
    """What the store's records say, with those of ``kept`` that it has not; what is wrong with records; and which
    ones are damaged."""
    records, problems, damaged = dict(kept or {}), [], []
    for seq in sorted(store.records()):
        if until is not None and seq > until:
            continue
        try:
            data = store.read_record(seq)
            if data is not None:
                records[seq] = unsealed(data, seq)
        except LoregError as error:
            problems.append(Problem("ledger", f"record {seq}", str(error)))
            damaged.append(seq)
    ledger = replay(records)
    told = set(damaged)
    for seq in ledger.gaps:
        if seq not in told:
            problems.append(
                Problem("ledger", f"record {seq}", "it is missing, or not the one that the next follows on")
            )
    return ledger, problems, damaged


def _look(storage: Storage) -> _Found:
    problems = []
    with storage.database.read() as session:
        facts, rows = queries.every_fact(session), queries.kept_records(session)
        tags = queries.standing_tags(session)
    kept = {}
    for row in rows:
        try:
            kept[row.seq] = _parsed(row)
        except BadInput as error:
            problems.append(Problem("catalog", f"record {row.seq}", f"the catalog's copy of it is damaged: {error}"))
    head = rows[-1].seq if rows else 0
    if not head:  # nothing was named since the ledger was invented
        return _Found(facts, tags, 0, Ledger(facts))
    ledger, more, damaged = read_ledger(storage.store, head, kept)
    if not more and (ledger.last, ledger.digest) != (head, rows[-1].digest):
        said = f"the catalog ends at record {head}, {rows[-1].digest}; the ledger at {ledger.last}, {ledger.digest}"
        more.append(Problem("ledger", f"record {head}", said))
    return _Found(facts, tags, head, ledger, problems + more, damaged)


def _parsed(row: RecordRow) -> LedgerRecord:
    body = row.body.encode()
    if Digest.of(body) != row.digest:
        raise BadInput("its bytes are not those of its digest.")
    return unsealed(sealed(body), row.seq)


def _differing(found: _Found) -> list[Problem]:
    keys = found.facts.keys() | found.ledger.facts.keys()
    problems = [
        Problem("name", _in_words(key), f"the catalog says {_said(ours)}, the ledger {_said(theirs)}")
        for key in sorted(keys, key=str)
        if (ours := found.facts.get(key)) != (theirs := _as_far_as_known(found.ledger.facts, key))
    ]
    tags = standing_tags(found.ledger.facts)
    for name, tag in sorted(tags.keys() | found.tags.keys()):
        if found.tags.get((name, tag)) != tags.get((name, tag)):
            moves = found.tags.get((name, tag)), tags.get((name, tag))
            said = f"its move and its version are {moves[0]} in the catalog, {moves[1]} in the ledger"
            problems.append(Problem("name", f"the tag {tag!r} of {name!r}", said))
    return problems


def standing_tags(facts: Facts) -> dict[tuple[str, str], tuple[int, int]]:
    """As ``queries.standing_tags``: where the last move went, unless that is nowhere."""
    last: dict[tuple[str, str], int] = {}
    for key in facts:
        if key[0] == "tag":
            name, tag, seq = str(key[1]), str(key[2]), int(key[3])
            last[name, tag] = max(seq, last.get((name, tag), 0))
    found = {(name, tag): (seq, facts["tag", name, tag, seq]["number"]) for (name, tag), seq in last.items()}
    return {key: value for key, value in found.items() if value[1] is not None}


def _as_far_as_known(facts: Facts, key: Key) -> dict[str, Any] | None:
    """A move of a tag to a version that is gone since is a move to nothing."""
    value = facts.get(key)
    if value is not None and key[0] == "tag" and ("version", key[1], value["number"]) not in facts:
        return {**value, "number": None}
    return value


def _in_words(key: Key) -> str:
    match key:
        case ("version", name, number):
            return f"{name}:v{number}"
        case ("tag", name, tag, seq):
            return f"move {seq} of the tag {tag!r} of {name!r}"
        case ("base", name):
            return f"base {name!r}"
    return f"the name {key[1]!r}"


def _said(value: Mapping[str, Any] | None) -> str:
    return "nothing" if value is None else ", ".join(f"{name} {each!r}" for name, each in sorted(value.items()))


def _restate(storage: Storage, found: _Found) -> bool:
    """Write the catalog's rows anew from the ledger; whether that could be done without losing one."""
    described = {}
    for digest in {Digest.parse(value["manifest"]) for value in found.ledger.facts.values() if "manifest" in value}:
        try:
            raw = storage.store.read(storage.key(digest))
            described[digest] = queries.columns_of(parse_manifest(raw))
        except LoregError:
            return False
    with storage.database.write() as session:
        last = queries.last_record(session)
        if last is None or last.seq != found.head:
            return False  # somebody has named something meanwhile
        if left_out := queries.restate(session, found.ledger.facts, described):
            raise BadInput(f"{_in_words(left_out[0])} has a manifest of another kind: nothing was written anew.")
    return True


def parse_manifest(raw: bytes) -> AdapterManifest | BaseManifest:
    """Of either kind. Raises BadInput if it is neither."""
    try:
        return AdapterManifest.parse(raw)
    except BadInput:
        return BaseManifest.parse(raw)
