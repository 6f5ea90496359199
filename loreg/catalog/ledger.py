"""Queries on what the store's ledger says too: names, numbers, notes, tags and bases, as facts.

A transaction notes which facts it changes; at its end their values are read and become one record, which commits with
it. Whoever committed it then writes it into the store (``registry.storage``). What nobody could write, as the process
died, still stands in the table, and the next one to commit writes it.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import Any

from sqlalchemy import bindparam, delete, func, select
from sqlalchemy.orm import Session

from loreg.catalog.models import Adapter, BaseRow, RecordRow, RegistryRow, Tag, TagMove, Version, microseconds
from loreg.digest import Digest
from loreg.errors import BadInput
from loreg.format.ledger import Facts, Key, LedgerRecord, snapshot

_NOTED, _ANEW = "loreg_noted", "loreg_anew"


def note_fact(s: Session, *key: str | int) -> None:
    """This transaction changes that fact, or does away with it."""
    s.info.setdefault(_NOTED, set()).add(key)


def begin_anew(s: Session) -> None:
    """This transaction ends with a snapshot: what was recorded before is not needed any more."""
    s.info[_ANEW] = True


def close_record(s: Session, now: datetime) -> set[str] | None:
    """Turn what was noted into a record. The first one of a catalog that has rows already is a snapshot.

    Returns the names of adapters whose versions or tags the transaction changes; None if it may be any.
    """
    keys, anew = s.info.pop(_NOTED, set()), s.info.pop(_ANEW, False)
    if not keys and not anew:
        return set()
    s.flush()
    head = last_record(s)
    seq, previous = (head.seq + 1, head.digest) if head else (1, None)
    at = microseconds(now)
    records: Iterable[LedgerRecord]
    if anew or head is None:
        records = snapshot(every_fact(s), seq, previous, at)
    else:
        records = [LedgerRecord(seq, previous, at, {key: _value(s, key) for key in keys})]
    s.add_all(map(_row, records))
    s.flush()
    return None if anew else {key[1] for key in keys if key[0] in ("version", "tag")}


def last_record(s: Session) -> RecordRow | None:
    return s.scalar(select(RecordRow).order_by(RecordRow.seq.desc()).limit(1))


def kept_records(s: Session) -> list[RecordRow]:
    """Those that may not be in the store yet, and the last one, which stays here to be followed."""
    return list(s.scalars(select(RecordRow).order_by(RecordRow.seq)))


def forget_records(s: Session, until: int) -> None:
    """Drop those up to number ``until``, which are in the store; the last one stays."""
    last = select(func.max(RecordRow.seq)).scalar_subquery()
    s.execute(delete(RecordRow).where(RecordRow.seq <= until, RecordRow.seq < last))


def go_on_from(s: Session, last: LedgerRecord) -> None:
    """A catalog that is made again goes on where the ledger ends."""
    s.add(_row(last))
    s.flush()


def identity(s: Session) -> RegistryRow:
    """Which catalog this is, and which store is its own. Raises BadInput if that is lost."""
    row = s.scalars(select(RegistryRow)).one_or_none()
    if row is None:
        raise BadInput(
            "The catalog does not say which one it is: expected one row in its table registry; restore a backup, or "
            "move it away, and make it again with `loreg fsck --rebuild-catalog`."
        )
    return row


def every_fact(s: Session) -> Facts:
    """All that a ledger says of this catalog."""
    facts: Facts = {}
    names: dict[int, str] = {}
    for adapter in s.scalars(select(Adapter)):
        names[adapter.id] = adapter.name
        facts["name", adapter.name] = _of_adapter(adapter)
    numbers: dict[int, int] = {}
    for version in s.scalars(select(Version)):
        numbers[version.id] = version.number
        facts["version", names[version.adapter_id], version.number] = _of_version(version)
    for move in s.scalars(select(TagMove)):
        number = None if move.version_id is None else numbers[move.version_id]
        facts["tag", names[move.adapter_id], move.name, move.seq] = _of_move(move, number)
    for base in s.scalars(select(BaseRow)):
        facts["base", base.name] = _of_base(base)
    return facts


def count_facts(s: Session) -> int:
    """How many :func:`every_fact` has."""
    counts = [s.scalar(select(func.count()).select_from(table)) for table in (Adapter, Version, TagMove, BaseRow)]
    return sum(count or 0 for count in counts)


def standing_tags(s: Session) -> dict[tuple[str, str], tuple[int, int]]:
    """(Name, tag) → its last move, and the number of the version that it points to."""
    found = s.execute(
        select(Adapter.name, Tag.name, Tag.seq, Version.number)
        .join(Adapter, Adapter.id == Tag.adapter_id)
        .join(Version, (Version.id == Tag.version_id) & (Version.adapter_id == Tag.adapter_id))
    )
    return {(name, tag): (seq, number) for name, tag, seq, number in found}


def _value(s: Session, key: Key) -> dict[str, Any] | None:
    kind, name = key[0], key[1]
    if kind == "base":
        base = s.scalar(select(BaseRow).where(BaseRow.name == name))
        return None if base is None else _of_base(base)
    adapter = s.scalar(_ADAPTER, {"name": name})
    if adapter is None:
        return None
    if kind == "name":
        return _of_adapter(adapter)
    if kind == "version":
        version = s.scalar(_VERSION, {"adapter": adapter.id, "number": key[2]})
        return None if version is None else _of_version(version)
    move = s.get(TagMove, (adapter.id, key[2], key[3]), populate_existing=True)
    if move is None:
        return None
    return _of_move(move, s.scalar(_NUMBER, {"id": move.version_id}))


_ADAPTER = select(Adapter).where(Adapter.name == bindparam("name"))
_MINE = Version.adapter_id == bindparam("adapter"), Version.number == bindparam("number")
_VERSION = select(Version).where(*_MINE).execution_options(populate_existing=True)
_NUMBER = select(Version.number).where(Version.id == bindparam("id"))


def _row(record: LedgerRecord) -> RecordRow:
    body = record.dump()
    return RecordRow(seq=record.seq, digest=Digest.of(body), body=body.decode())


def _of_adapter(row: Adapter) -> dict[str, Any]:
    return {"at": microseconds(row.created_at), "last": row.last_number}


def _of_version(row: Version) -> dict[str, Any]:
    removed = None if row.removed_at is None else microseconds(row.removed_at)
    return {"at": microseconds(row.created_at), "manifest": str(row.digest), "note": row.note, "removed": removed}


def _of_move(row: TagMove, number: int | None) -> dict[str, Any]:
    return {"at": microseconds(row.moved_at), "number": number}


def _of_base(row: BaseRow) -> dict[str, Any]:
    return {
        "at": microseconds(row.created_at),
        "manifest": str(row.manifest),
        "hub_repo": row.hub_repo,
        "hub_commit": row.hub_commit,
        "hub_files": row.hub_files,
        "path": row.path,
    }
