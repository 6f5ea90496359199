"""loreg-ledger/1: what people gave names to, written down in the store itself (``spec/store.md``).

Manifests are blobs, and say everything of an adapter but how it is called. Names, numbers, notes and tags are the
catalog's, and whoever loses the catalog would lose them. So each transaction that changes one of them is followed by
one *record* in the store, and the catalog can be made again from the store alone.

A record assigns values to *facts*. The state is what the last assignments say: replaying is updating a dictionary,
and a catalog is compared with its ledger by comparing two dictionaries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from loreg.digest import Digest
from loreg.errors import BadInput, UsageError
from loreg.format import canonical_json
from loreg.format.fields import Fields
from loreg.format.reference import check_name, check_tag

FORMAT = "loreg-ledger/1"
STORE_FORMAT = "loreg-store/1"
PART = 1000
"""How many facts a record of a snapshot has: some 200 kB."""

Key = tuple[str | int, ...]
"""``("name", name)``, ``("version", name, number)``, ``("tag", name, tag, seq)`` or ``("base", name)``."""

Facts = dict[Key, dict[str, Any]]


@dataclass(frozen=True, slots=True)
class LedgerRecord:
    """One transaction's assignments: a value, or None for what is no more. Times are microseconds since 1970, UTC.

    ``previous``: the digest of the record before it, so that the last one vouches for all. ``part`` of ``parts``: of
    a snapshot, which says everything anew, so that what came before its first part is not needed any more.
    """

    seq: int
    previous: Digest | None
    at: int
    facts: Mapping[Key, dict[str, Any] | None]
    part: int = 0
    parts: int = 0

    def dump(self) -> bytes:
        document: dict[str, Any] = {
            "format": FORMAT,
            "seq": self.seq,
            "previous": None if self.previous is None else str(self.previous),
            "at": self.at,
            "facts": [{"fact": list(key), "is": value} for key, value in sorted(self.facts.items(), key=_order)],
        }
        if self.parts:
            document["snapshot"] = {"part": self.part, "parts": self.parts}
        return canonical_json.dumps(document)

    @classmethod
    def parse(cls, data: bytes) -> LedgerRecord:
        """From canonical bytes. Raises BadInput."""
        with Fields(canonical_json.loads_canonical(data, what="record of the ledger"), "record") as f:
            f.choice("format", FORMAT)
            seq, at = f.natural("seq", 1), f.natural("at")
            previous = f.digest("previous") if seq > 1 else f.take("previous")
            if seq == 1 and previous is not None:
                f.refuse("previous", "null, as nothing is before the first record", previous)
            facts: dict[Key, dict[str, Any] | None] = {}
            for entry in f.items("facts"):
                with entry:
                    key = _key(entry)
                    value = entry.optional_object("is")
                    facts[key] = None if value is None else _VALUES[str(key[0])](value)
            part = parts = 0
            if f.has("snapshot"):
                with f.object("snapshot") as snapshot:
                    part, parts = snapshot.natural("part", 1), snapshot.natural("parts", 1)
            return cls(seq, previous, at, facts, part, parts)


@dataclass(frozen=True, slots=True)
class Owner:
    """Which catalog a store belongs to, and which store it is: 32 random hex digits each."""

    catalog: str
    store: str

    def dump(self) -> bytes:
        return canonical_json.dumps({"format": STORE_FORMAT, "catalog": self.catalog, "store": self.store})

    @classmethod
    def parse(cls, data: bytes) -> Owner:
        """From canonical bytes. Raises BadInput."""
        with Fields(canonical_json.loads_canonical(data, what="store.json"), "store.json") as f:
            f.choice("format", STORE_FORMAT)
            return cls(f.text("catalog"), f.text("store"))


@dataclass
class Ledger:
    """What records say together, up to ``record``, whose digest is ``digest``.

    ``mentioned``: the manifests that anything was ever said of. ``gaps``: the numbers of records before the last that
    are not there, or are not what the one after them follows on.
    """

    facts: Facts = field(default_factory=dict)
    mentioned: set[str] = field(default_factory=set)
    record: LedgerRecord | None = None
    digest: Digest | None = None
    gaps: tuple[int, ...] = ()

    @property
    def last(self) -> int:
        """Its number, 0 if there is none."""
        return self.record.seq if self.record else 0


def sealed(record: bytes) -> bytes:
    """A record as the store keeps it: a line with its digest, then its bytes."""
    return f"{Digest.of(record)}\n".encode() + record


def unsealed(data: bytes, seq: int) -> LedgerRecord:
    """The record number ``seq`` from what the store has of it. Raises BadInput."""
    line, newline, body = data.partition(b"\n")
    if not newline or line != str(Digest.of(body)).encode():
        raise BadInput(f"record {seq} of the ledger is damaged: its {len(data)} bytes are not those of its digest.")
    record = LedgerRecord.parse(body)
    if record.seq != seq:
        raise BadInput(f"record {seq} of the ledger is another one: it says that it is number {record.seq}.")
    return record


def replay(records: Mapping[int, LedgerRecord]) -> Ledger:
    """What the records say, from the last whole snapshot on; of those that are there, if some are missing."""
    ledger = Ledger()
    if not records:
        return ledger
    gaps = []
    for seq in range(_start(records), max(records) + 1):
        record = records.get(seq)
        if record is None:
            gaps.append(seq)
            continue
        if ledger.last == seq - 1 > 0 and record.previous != ledger.digest:
            gaps.append(seq - 1)
        for key, value in record.facts.items():
            if value is None:
                ledger.facts.pop(key, None)
            else:
                ledger.facts[key] = value
                if "manifest" in value:
                    ledger.mentioned.add(value["manifest"])
        ledger.record, ledger.digest = record, Digest.of(record.dump())
    ledger.gaps = tuple(gaps)
    return ledger


def snapshot(facts: Facts, seq: int, previous: Digest | None, at: int) -> Iterable[LedgerRecord]:
    """The records from number ``seq`` on that say everything anew."""
    keys = sorted(facts, key=lambda key: _order((key, None)))
    chunks = [keys[start : start + PART] for start in range(0, len(keys), PART)] or [[]]
    for part, chunk in enumerate(chunks, 1):
        record = LedgerRecord(seq, previous, at, {key: facts[key] for key in chunk}, part, len(chunks))
        yield record
        seq, previous = seq + 1, Digest.of(record.dump())


def _start(records: Mapping[int, LedgerRecord]) -> int:
    """Where to begin: at the last snapshot all of whose parts are there, else at the first record."""
    for seq in sorted(records, reverse=True):
        record = records[seq]
        if record.part == 1 and all(
            seq + more in records and records[seq + more].part == 1 + more for more in range(record.parts)
        ):
            return seq
    return 1


def _order(item: tuple[Key, Any]) -> tuple[str, ...]:
    return tuple(f"{part:020d}" if isinstance(part, int) else part for part in item[0])


def _key(entry: Fields) -> Key:
    raw = entry.take("fact")
    shapes: dict[str, tuple[type, ...]] = {
        "name": (str,),
        "version": (str, int),
        "tag": (str, str, int),
        "base": (str,),
    }
    if not isinstance(raw, list) or not raw or raw[0] not in shapes:
        entry.refuse("fact", f"a list that begins with one of {', '.join(shapes)}", str(raw))
    rest = raw[1:]
    if tuple(type(part) for part in rest) != shapes[raw[0]] or any(type(part) is int and part < 1 for part in rest):
        entry.refuse("fact", f"what a {raw[0]} is known by", str(raw))
    try:
        check_name(rest[0])
        if raw[0] == "tag":
            check_tag(rest[1])
    except UsageError as error:
        raise BadInput(f"{entry.path}.fact: {error}") from None
    return tuple(raw)


def _name(value: Fields) -> dict[str, Any]:
    with value as f:
        return {"at": f.natural("at"), "last": f.natural("last")}


def _version(value: Fields) -> dict[str, Any]:
    with value as f:
        return {
            "at": f.natural("at"),
            "manifest": str(f.digest("manifest")),
            "note": f.optional_text("note"),
            "removed": f.optional_natural("removed"),
        }


def _tag(value: Fields) -> dict[str, Any]:
    with value as f:
        return {"at": f.natural("at"), "number": f.optional_natural("number", 1)}


def _base(value: Fields) -> dict[str, Any]:
    with value as f:
        return {
            "at": f.natural("at"),
            "manifest": str(f.digest("manifest")),
            "hub_repo": f.optional_text("hub_repo"),
            "hub_commit": f.optional_text("hub_commit"),
            "hub_files": f.optional_text("hub_files"),
            "path": f.optional_text("path"),
        }


_VALUES: dict[str, Callable[[Fields], dict[str, Any]]] = {
    "name": _name,
    "version": _version,
    "tag": _tag,
    "base": _base,
}
