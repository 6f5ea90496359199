"""Queries on tags, which move by compare-and-swap and keep their history."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import func, select, update
from sqlalchemy.engine import CursorResult
from sqlalchemy.orm import Session

from loreg.catalog.ledger import note_fact
from loreg.catalog.models import Adapter, Tag, TagMove, Version
from loreg.catalog.versions import VersionRow, find_adapter, newest_version
from loreg.digest import Digest
from loreg.errors import Conflict, UsageError
from loreg.format.reference import check_tag


@dataclass(frozen=True, slots=True)
class TagRow:
    """Where a tag points now. ``seq`` is what :func:`move_tag` wants as ``expected_seq``."""

    name: str
    seq: int
    number: int
    digest: Digest


@dataclass(frozen=True, slots=True)
class TagMoveRow:
    """One move of a tag; ``number`` and ``digest`` are None if that version is gone since, or it points nowhere."""

    name: str
    seq: int
    number: int | None
    digest: Digest | None
    moved_at: datetime


def move_tag(s: Session, adapter: str, tag: str, version: VersionRow, expected_seq: int | None, now: datetime) -> int:
    """Point ``tag`` of the adapter of that name at ``version``, if it has not moved since; its new ``seq``.

    ``expected_seq`` is the ``seq`` that the caller saw (:func:`tag_seq`); None if the tag was not there.
    Raises Conflict if it is another by now, UsageError for a malformed tag or another adapter's version.
    """
    if version.name != adapter:
        raise UsageError(
            f"tag {tag!r} of {adapter!r} cannot point at a version of {version.name!r}: "
            "expected one of its own; push that content under this name first."
        )
    check_tag(tag)
    adapter_id = find_adapter(s, adapter).id
    current = s.get(Tag, (adapter_id, tag))
    found = current.seq if current else None
    if expected_seq is None:
        moved = found is None
        last = select(func.max(TagMove.seq)).where(TagMove.adapter_id == adapter_id, TagMove.name == tag)
        seq = (s.scalar(last) or 0) + 1  # goes on where a removed tag of that name ended
        if moved:
            s.add(Tag(adapter_id=adapter_id, name=tag, version_id=version.id, seq=seq))
    else:
        seq = expected_seq + 1
        result = s.execute(
            update(Tag)
            .where(Tag.adapter_id == adapter_id, Tag.name == tag, Tag.seq == expected_seq)
            .values(version_id=version.id, seq=seq)
        )
        moved = isinstance(result, CursorResult) and result.rowcount == 1
    if not moved:
        raise Conflict(
            f"tag {tag!r} of {adapter!r} was moved by somebody else: expected it at move "
            f"{expected_seq or 0}, found it at {found or 0}; look with `loreg log {adapter}` and try again."
        )
    s.add(TagMove(adapter_id=adapter_id, name=tag, seq=seq, version_id=version.id, moved_at=now))
    s.flush()
    note_fact(s, "tag", adapter, tag, seq)
    return seq


def follow_newest(s: Session, adapter: str, tag: str, now: datetime) -> None:
    """Point ``tag`` at the newest version that there is; no tag where there is none."""
    found = find_adapter(s, adapter)
    newest = newest_version(s, found)
    current = s.get(Tag, (found.id, tag))
    if newest and (current is None or current.version_id != newest.id):
        move_tag(s, adapter, tag, newest, current.seq if current else None, now)
    elif not newest and current is not None:
        s.add(TagMove(adapter_id=found.id, name=tag, seq=current.seq + 1, version_id=None, moved_at=now))
        note_fact(s, "tag", adapter, tag, current.seq + 1)
        s.delete(current)
        s.flush()


def tag_seq(s: Session, name: str, tag: str) -> int | None:
    """How often the tag has moved, None if it is not there (nor, perhaps, the adapter)."""
    return s.scalar(select(Tag.seq).join(Adapter).where(Adapter.name == name, Tag.name == tag))


def tags_of(s: Session, name: str) -> list[TagRow]:
    """The tags of an adapter, by name. Raises NotFound for an adapter that is not there."""
    adapter = find_adapter(s, name)
    rows = s.execute(
        select(Tag.name, Tag.seq, Version.number, Version.digest)
        .join(Version, Version.id == Tag.version_id)
        .where(Tag.adapter_id == adapter.id)
        .order_by(Tag.name)
    )
    return [TagRow(*row) for row in rows]


def tag_history(s: Session, name: str) -> list[TagMoveRow]:
    """Every move of every tag of an adapter, oldest first. Raises NotFound."""
    adapter = find_adapter(s, name)
    rows = s.execute(
        select(TagMove.name, TagMove.seq, Version.number, Version.digest, TagMove.moved_at)
        .join(Version, Version.id == TagMove.version_id, isouter=True)
        .where(TagMove.adapter_id == adapter.id)
        .order_by(TagMove.moved_at, TagMove.name, TagMove.seq)
    )
    return [TagMoveRow(*row) for row in rows]
