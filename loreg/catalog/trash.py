"""Queries on the trash: versions that nobody sees any more, and that can be taken back until they are collected."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import delete, select, update
from sqlalchemy.orm import Session

from loreg.catalog.ledger import note_fact
from loreg.catalog.models import Tag, Version
from loreg.catalog.tags import follow_newest, move_tag
from loreg.catalog.versions import EVERY, VersionRow, find_adapter, rows
from loreg.errors import Conflict, NotFound


def remove_version(s: Session, version: VersionRow, latest: str, tags_to: VersionRow | None, now: datetime) -> None:
    """Put it into the trash, and let the tag ``latest`` follow. Other tags that point to it move to ``tags_to``.

    Raises Conflict if there are such tags and nowhere to move them: what a tag names is what others run.
    """
    tags = s.execute(select(Tag.name, Tag.seq).where(Tag.version_id == version.id, Tag.name != latest)).all()
    if tags and tags_to is None:
        names = ", ".join(sorted(name for name, _ in tags))
        raise Conflict(
            f"{version.name}:v{version.number} is what the tags {names} point to: move them first, as with "
            f"`loreg tag REF {tags[0].name}`, or with --tags-to REF."
        )
    for name, seq in tags:
        assert tags_to is not None
        move_tag(s, version.name, name, tags_to, seq, now)
    s.execute(update(Version).where(Version.id == version.id).values(removed_at=now))
    note_fact(s, "version", version.name, version.number)
    follow_newest(s, version.name, latest, now)


def restore_version(s: Session, name: str, number: int, latest: str, now: datetime) -> VersionRow:
    """Take it back under its number; the tag ``latest`` follows. Tags that it had are where they were moved to.

    Raises NotFound if it is not in the trash.
    """
    adapter = find_adapter(s, name)
    found = rows(s, EVERY.where(Version.adapter_id == adapter.id, Version.number == number))
    if not found or found[0].removed_at is None:
        state = "is not in it: it was not removed" if found else "is not there either: it never was, or was collected"
        raise NotFound(f"{name}:v{number} cannot be taken out of the trash and {state}; look with `loreg trash`.")
    s.execute(update(Version).where(Version.id == found[0].id).values(removed_at=None))
    note_fact(s, "version", name, number)
    follow_newest(s, name, latest, now)
    return rows(s, EVERY.where(Version.id == found[0].id))[0]


def removed_versions(s: Session, before: datetime | None = None) -> list[VersionRow]:
    """All that were removed, or those until ``before``, the last one first."""
    found = EVERY.where(Version.removed_at.is_not(None)).order_by(Version.removed_at.desc(), Version.id.desc())
    return rows(s, found if before is None else found.where(Version.removed_at <= before))


def purge_versions(s: Session, before: datetime) -> list[VersionRow]:
    """Those that were removed until ``before`` are gone for good: nothing of theirs is pinned by them any more."""
    found = removed_versions(s, before)
    s.execute(delete(Version).where(Version.id.in_(version.id for version in found)))
    for version in found:
        note_fact(s, "version", version.name, version.number)
    return found
