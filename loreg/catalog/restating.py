"""Writing names, versions, tags and bases anew from what a ledger says, and blobs from what a store has."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any

from sqlalchemy import delete, insert, select
from sqlalchemy.orm import Session

from loreg.catalog.models import Adapter, BaseRow, Blob, Document, Edge, Tag, TagMove, Target, Version, instant
from loreg.catalog.searching import document
from loreg.digest import Digest, Fingerprint
from loreg.format.ledger import Facts, Key

Described = Mapping[Digest, Mapping[str, Any]]
"""By the digest of a manifest, the columns that repeat it (``describing.columns_of``)."""


def restate(s: Session, facts: Facts, described: Described) -> list[Key]:
    """Make every row of names, versions, tags and bases say what ``facts`` say. Returns the facts that cannot have
    rows, for want of a description. Rows get new ids. Notes nothing: the ledger says it already."""
    for table in (Tag, TagMove, Target, Version, Adapter, BaseRow):
        s.execute(delete(table))
    _insert(s, Adapter, _names(facts))
    names = {row.name: row.id for row in s.execute(select(Adapter.name, Adapter.id))}
    versions, targets, left_out = [], {}, []
    for key, value in _of_kind(facts, "version"):
        columns = dict(described.get(Digest.parse(value["manifest"]), {}))
        if "base_root" not in columns:
            left_out.append(key)
            continue
        targets[names[key[1]], key[2]] = columns.pop("targets")
        removed = None if value["removed"] is None else instant(value["removed"])
        said = {"note": value["note"], "created_at": instant(value["at"]), "removed_at": removed}
        digest = Digest.parse(value["manifest"])
        versions.append({"adapter_id": names[key[1]], "number": key[2], "digest": digest, **said, **columns})
    _insert(s, Version, versions)
    found = s.execute(select(Version.adapter_id, Version.number, Version.id))
    ids = {(adapter, number): identifier for adapter, number, identifier in found}
    _insert(s, Target, ({"version_id": ids[key], "target": each} for key in targets for each in targets[key]))
    called = {identifier: name for name, identifier in names.items()}
    notes = {(row["adapter_id"], row["number"]): row["note"] for row in versions}
    documents = ((key, document(called[key[0]], notes[key], targets[key])) for key in targets)
    _insert(s, Document, ({"version_id": ids[key], "text": text} for key, text in documents))
    _tags(s, facts, names, ids)
    for key, value in _of_kind(facts, "base"):
        columns = dict(described.get(Digest.parse(value["manifest"]), {}))
        if "weights_root" not in columns:
            left_out.append(key)
            continue
        said = {name: value[name] for name in ("hub_repo", "hub_commit", "hub_files", "path")}
        digest, created = Digest.parse(value["manifest"]), instant(value["at"])
        _insert(s, BaseRow, [{"name": key[1], "manifest": digest, "created_at": created, **said, **columns}])
    s.expire_all()
    return left_out


def record_store(
    s: Session, blobs: Iterable[tuple[Fingerprint, str]], edges: Iterable[tuple[Digest, Digest]], now: datetime
) -> None:
    """Blobs with the generation of their copies, and which manifest needs which, into a catalog that has none."""
    _insert(
        s,
        Blob,
        (
            {
                "digest": print_.digest,
                "generation": generation,
                "sha256": print_.sha256,
                "size": print_.size,
                "state": "live",
                "created_at": now,
            }
            for print_, generation in blobs
        ),
    )
    _insert(s, Edge, ({"source": source, "blob": blob} for source, blob in edges))


def is_empty(s: Session) -> bool:
    """Whether nobody has stored anything."""
    return all(s.scalars(select(table).limit(1)).first() is None for table in (Blob, Adapter, BaseRow))


def _names(facts: Facts) -> list[dict[str, Any]]:
    """Rows of adapters: as said, and where a record is missing that said it, as its versions let it be."""
    rows = {
        name: {"name": name, "last_number": value["last"], "created_at": instant(value["at"])}
        for (_, name), value in _of_kind(facts, "name")
    }
    for (_, name, number), value in _of_kind(facts, "version"):
        row = rows.setdefault(name, {"name": name, "last_number": 0, "created_at": instant(value["at"])})
        row["last_number"] = max(row["last_number"], number)
    for (_, name, *_rest), value in _of_kind(facts, "tag"):
        rows.setdefault(name, {"name": name, "last_number": 0, "created_at": instant(value["at"])})
    return list(rows.values())


def _tags(s: Session, facts: Facts, names: Mapping[str, int], ids: Mapping[tuple[int, int], int]) -> None:
    moves, newest = [], {}
    for (_, name, tag, seq), value in _of_kind(facts, "tag"):  # in the order of their moves
        place = {"adapter_id": names[name], "name": tag, "seq": seq}
        version = ids.get((names[name], value["number"]))
        moves.append({**place, "version_id": version, "moved_at": instant(value["at"])})
        newest[name, tag] = {**place, "version_id": version}
    _insert(s, TagMove, moves)
    _insert(s, Tag, (row for row in newest.values() if row["version_id"] is not None))


def _of_kind(facts: Facts, kind: str) -> Iterable[tuple[Any, dict[str, Any]]]:
    return sorted((item for item in facts.items() if item[0][0] == kind), key=lambda item: item[0])


def _insert(s: Session, table: Any, rows: Iterable[Mapping[str, Any]]) -> None:
    given = [dict(row) for row in rows]
    if given:
        s.execute(insert(table), given)
