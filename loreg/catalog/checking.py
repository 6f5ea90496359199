"""Queries of the check of a store: what the catalog says of itself, of its blobs, and of what manifests say."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sqlalchemy import and_, delete, exists, func, or_, select, text, update
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session, aliased

from loreg.catalog.models import Adapter, BaseRow, Blob, Document, Edge, Model, Tag, TagMove, Target, Version
from loreg.catalog.searching import document
from loreg.digest import Digest, Fingerprint
from loreg.errors import LoregError


def every_blob(s: Session) -> list[Blob]:
    """All rows, in order of digests."""
    return list(s.scalars(select(Blob).order_by(Blob.digest)))


def adopt_copy(s: Session, digest: Digest, instead_of: str, generation: str) -> bool:
    """Vouch for another copy, if the row still vouches for ``instead_of``; whether it did."""
    found = s.get(Blob, digest)
    if found is None or found.generation != instead_of:
        return False
    found.generation, found.state = generation, "live"
    s.flush()
    return True


def restate_copy(s: Session, found: Fingerprint, generation: str) -> bool:
    """Write what a copy was found to be, if the row still vouches for that copy; whether it does."""
    row = s.get(Blob, found.digest)
    if row is None or row.generation != generation:
        return False
    row.sha256, row.size = found.sha256, found.size
    s.flush()
    return True


def touched_by(s: Session, digest: Digest) -> list[str]:
    """The versions and bases that need a blob, as people call them: ``sql:v2``, ``base gpt2``."""
    sources = select(Edge.source).where(Edge.blob == digest)
    versions = s.execute(
        select(Adapter.name, Version.number)
        .join(Version, Version.adapter_id == Adapter.id)
        .where(or_(Version.digest == digest, Version.digest.in_(sources)))
        .order_by(Adapter.name, Version.number)
    )
    bases = s.scalars(select(BaseRow.name).where(BaseRow.manifest == digest).order_by(BaseRow.name))
    return [f"{name}:v{number}" for name, number in versions] + [f"base {name}" for name in bases]


def set_edges(s: Session, source: Digest, blobs: Iterable[Digest]) -> None:
    """The manifest needs these blobs and no others, as far as they have rows."""
    s.execute(delete(Edge).where(Edge.source == source))
    known = set(s.scalars(select(Blob.digest).where(Blob.digest.in_(blobs))))
    s.add_all(Edge(source=source, blob=blob) for blob in sorted(known))
    s.flush()


def described(s: Session, manifest: Digest) -> dict[tuple[type[Version | BaseRow], int], dict[str, Any]]:
    """What the rows that stand for a manifest repeat of it (``describing.columns_of``); ``search``: whether a version
    is looked for in what it says."""
    found: dict[tuple[type[Version | BaseRow], int], dict[str, Any]] = {}
    names: tuple[str, ...] = ("base_root", "base_name", "rank", "modules", "bytes")
    for version in s.scalars(select(Version).where(Version.digest == manifest)):
        targets = s.scalars(
            select(Target.target).where(Target.version_id == version.id).order_by(Target.target)
        ).all()
        searched = s.scalar(select(Document.text).where(Document.version_id == version.id))
        found[Version, version.id] = {name: getattr(version, name) for name in names} | {
            "targets": tuple(targets),
            "search": searched == document(*_said_of(s, version.id), targets),
        }
    names = ("weights_root", "structure_root", "content_set", "tensors", "bytes")
    for base in s.scalars(select(BaseRow).where(BaseRow.manifest == manifest)):
        found[BaseRow, base.id] = {name: getattr(base, name) for name in names}
    return found


def describe(s: Session, row: tuple[type[Version | BaseRow], int], columns: dict[str, Any]) -> None:
    """Write what ``described`` reads."""
    table, identifier = row
    values = {name: value for name, value in columns.items() if name not in ("targets", "search")}
    s.execute(update(table).where(table.id == identifier).values(**values))
    if "targets" in columns:
        s.execute(delete(Target).where(Target.version_id == identifier))
        s.add_all(Target(version_id=identifier, target=target) for target in columns["targets"])
        said = document(*_said_of(s, identifier), columns["targets"])
        s.merge(Document(version_id=identifier, text=said))
    s.flush()


def _said_of(s: Session, version_id: int) -> tuple[str, str | None]:
    """Its name and its note."""
    query = select(Adapter.name, Version.note).join(Version, Version.adapter_id == Adapter.id)
    name, note = s.execute(query.where(Version.id == version_id)).one()
    return name, note


def contradictions(s: Session) -> list[str]:
    """What the catalog says that cannot be: damaged pages, references to nothing, tags and numbers out of step."""
    found = []
    if s.connection().dialect.name == "sqlite":
        said = [str(line) for line in s.scalars(text("PRAGMA integrity_check"))]
        found += [f"the database says: {line}" for line in said if line != "ok"]
        broken = s.execute(text("PRAGMA foreign_key_check")).all()
        found += [f"row {row[1]} of {row[0]} refers to nothing in {row[2]}" for row in broken]
    found += _unreadable(s)
    elsewhere = (
        select(Adapter.name, Tag.name)
        .join(Adapter, Adapter.id == Tag.adapter_id)
        .join(Version, Version.id == Tag.version_id)
    )
    for name, tag in s.execute(elsewhere.where(Version.adapter_id != Tag.adapter_id)):
        found.append(f"tag {tag!r} of {name!r} points to a version of another name")
    for name, tag in s.execute(elsewhere.where(Version.removed_at.is_not(None))):
        found.append(f"tag {tag!r} of {name!r} points into the trash")
    last = select(func.max(TagMove.seq)).where(TagMove.adapter_id == Tag.adapter_id, TagMove.name == Tag.name)
    moves = select(Adapter.name, Tag.name).join(Adapter, Adapter.id == Tag.adapter_id)
    for name, tag in s.execute(moves.where(Tag.seq != func.coalesce(last.scalar_subquery(), 0))):
        found.append(f"tag {tag!r} of {name!r} is at another move than its history")
    # Moves are numbered from 1 and none is ever taken out, so a number that is missing is a move that was changed.
    counted = select(Adapter.name, TagMove.name).join(Adapter, Adapter.id == TagMove.adapter_id)
    gaps = counted.group_by(Adapter.name, TagMove.name).having(func.max(TagMove.seq) != func.count())
    for name, tag in s.execute(gaps.order_by(Adapter.name, TagMove.name)):
        found.append(f"moves of tag {tag!r} of {name!r} are missing from its history")
    other = aliased(TagMove)
    newer = exists().where(
        other.adapter_id == TagMove.adapter_id, other.name == TagMove.name, other.seq > TagMove.seq
    )
    at = and_(Tag.adapter_id == TagMove.adapter_id, Tag.name == TagMove.name)
    ended = counted.join(Tag, at, isouter=True).where(~newer, Tag.version_id.is_distinct_from(TagMove.version_id))
    for name, tag in s.execute(ended.order_by(Adapter.name, TagMove.name)):
        found.append(f"tag {tag!r} of {name!r} is not where its last move put it")
    most = select(func.max(Version.number)).where(Version.adapter_id == Adapter.id).scalar_subquery()
    for name in s.scalars(select(Adapter.name).where(Adapter.last_number < most)):
        found.append(f"{name!r} would give a number a second time")
    return found


def _unreadable(s: Session) -> list[str]:
    """Tables with a value that is none of its column: text that is no Unicode, a time that never was. The database
    looks at neither, and nothing else here reads every column."""
    found = []
    for table in Model.metadata.sorted_tables:
        try:
            for _ in s.execute(select(table).execution_options(yield_per=1000)):
                pass
        except (DBAPIError, ValueError, TypeError, OverflowError, LoregError) as error:
            found.append(f"a row of {table.name} cannot be read: {error}")
    return found
