"""Queries on adapters and their versions."""

from __future__ import annotations

import difflib
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Select, Text, func, or_, select, type_coerce
from sqlalchemy.orm import Session

from loreg.catalog.models import Adapter, BaseRow, Tag, Target, Version
from loreg.catalog.prefixes import only, starts_with
from loreg.digest import Digest
from loreg.errors import NotFound
from loreg.format.reference import check_name


@dataclass(frozen=True, slots=True)
class VersionRow:
    """One version of one adapter; ``targets`` sorted, ``created_at`` in UTC, ``bytes`` as pushed."""

    id: int
    name: str
    number: int
    digest: Digest
    base_root: Digest
    base_name: str
    rank: int
    modules: int
    bytes: int
    note: str | None
    created_at: datetime
    targets: tuple[str, ...]


_COLUMNS: list[Any] = [
    Version.id,
    Adapter.name,
    Version.number,
    Version.digest,
    Version.base_root,
    Version.base_name,
    Version.rank,
    Version.modules,
    Version.bytes,
    Version.note,
    Version.created_at,
]
_VERSIONS = select(*_COLUMNS).join(Adapter, Adapter.id == Version.adapter_id)


def _rows(s: Session, statement: Select[Any]) -> list[VersionRow]:
    """The versions that ``statement`` (made from ``_VERSIONS``) selects, with their targets: two queries."""
    ids = statement.with_only_columns(Version.id, maintain_column_froms=True)
    targets: defaultdict[int, list[str]] = defaultdict(list)
    for version_id, target in s.execute(
        select(Target.version_id, Target.target).where(Target.version_id.in_(ids)).order_by(Target.target)
    ):
        targets[version_id].append(target)
    return [VersionRow(**row._asdict(), targets=tuple(targets[row.id])) for row in s.execute(statement)]


def add_version(
    s: Session,
    name: str,
    digest: Digest,
    *,
    base_root: Digest,
    base_name: str,
    rank: int,
    modules: int,
    bytes: int,  # noqa: A002 - named as in the manifest and on the command line
    targets: Iterable[str],
    note: str | None,
    now: datetime,
) -> tuple[VersionRow, bool]:
    """The version with that content under that name, and whether it is new. Numbers go 1, 2, 3 ….

    The same content again is the version that is there, unchanged. Raises UsageError for a malformed name.
    """
    adapter = s.scalar(select(Adapter).where(Adapter.name == name).with_for_update())
    if adapter is None:
        adapter = Adapter(name=check_name(name), last_number=0, created_at=now)
        s.add(adapter)
        s.flush()
    same = _VERSIONS.where(Version.adapter_id == adapter.id, Version.digest == digest)
    if existing := _rows(s, same):
        return existing[0], False
    adapter.last_number += 1
    version = Version(
        adapter_id=adapter.id,
        number=adapter.last_number,
        digest=digest,
        base_root=base_root,
        base_name=base_name,
        rank=rank,
        modules=modules,
        bytes=bytes,
        note=note,
        created_at=now,
    )
    s.add(version)
    s.flush()
    s.add_all(Target(version_id=version.id, target=target) for target in sorted(set(targets)))
    s.flush()
    return _rows(s, same)[0], True


def find_version(
    s: Session,
    name: str,
    *,
    number: int | None = None,
    tag: str | None = None,
    digest_prefix: str | None = None,
) -> VersionRow:
    """The version of ``name`` that meets every condition given; the newest if none is.

    Raises NotFound, naming what is near, and UsageError for a prefix that fits several versions.
    """
    adapter = find_adapter(s, name)
    query = _VERSIONS.where(Version.adapter_id == adapter.id).order_by(Version.number.desc())
    wanted = []
    if number is not None:
        wanted.append(f"number {number}")
        query = query.where(Version.number == number)
    if tag is not None:
        wanted.append(f"tag {tag!r}")
        query = query.join(Tag, Tag.version_id == Version.id).where(Tag.name == tag)
    if digest_prefix is not None:
        wanted.append(f"a digest that starts with {digest_prefix!r}")
        query = query.where(*starts_with(Version.digest, digest_prefix))
    found = _rows(s, query.limit(6 if wanted else 1))
    if not found:
        raise NotFound(
            f"adapter {name!r} has no version with {' and '.join(wanted) or 'any number'}: it has "
            f"{_summary(s, adapter)}; look with `loreg log {name}`."
        )
    return only(str(digest_prefix), f"versions of {name!r}", found, [f"v{v.number} {v.digest}" for v in found])


def versions_of(s: Session, name: str) -> list[VersionRow]:
    """Every version of ``name``, oldest first. Raises NotFound."""
    adapter = find_adapter(s, name)
    return _rows(s, _VERSIONS.where(Version.adapter_id == adapter.id).order_by(Version.number))


def versions_by_digest(s: Session, digest: Digest) -> list[VersionRow]:
    """Every name and number that this content goes by, in order of names."""
    return _rows(s, _VERSIONS.where(Version.digest == digest).order_by(Adapter.name))


def list_versions(
    s: Session,
    *,
    base: str | None = None,
    rank: int | None = None,
    target: str | None = None,
    query: str | None = None,
    limit: int | None = None,
    all_versions: bool = False,
) -> list[VersionRow]:
    """The newest version of each name, or all, in order of names and numbers, that meet every condition.

    ``base`` is a name as pushed, the name of a base that was added, or the ``blake3:…`` of a weights root.
    ``query`` is looked for in name, note and targets; only ASCII letters match in either case.
    """
    statement = _VERSIONS.order_by(Adapter.name, Version.number).limit(limit)
    if not all_versions:
        other = Version.__table__.alias()
        newest = select(func.max(other.c.number)).where(other.c.adapter_id == Version.adapter_id)
        statement = statement.where(Version.number == newest.scalar_subquery())
    if base is not None:
        added = select(BaseRow.weights_root).where(BaseRow.name == base)
        root = type_coerce(Version.base_root, Text)
        statement = statement.where(or_(Version.base_name == base, root == base, Version.base_root.in_(added)))
    if rank is not None:
        statement = statement.where(Version.rank == rank)
    if target is not None:
        statement = statement.where(Version.id.in_(select(Target.version_id).where(Target.target == target)))
    if query is not None:
        hits = select(Target.version_id).where(Target.target.icontains(query, autoescape=True))
        statement = statement.where(
            or_(
                Adapter.name.icontains(query, autoescape=True),
                Version.note.icontains(query, autoescape=True),
                Version.id.in_(hits),
            )
        )
    return _rows(s, statement)


def find_adapter(s: Session, name: str) -> Adapter:
    """The adapter of that name; raises NotFound, naming near names."""
    adapter = s.scalar(select(Adapter).where(Adapter.name == name))
    if adapter is None:
        near = difflib.get_close_matches(name, s.scalars(select(Adapter.name)).all())
        hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else "; look with `loreg ls`."
        raise NotFound(f"no adapter is called {name!r}{hint}")
    return adapter


def _summary(s: Session, adapter: Adapter) -> str:
    numbers = s.scalars(select(Version.number).where(Version.adapter_id == adapter.id).order_by(Version.number)).all()
    tags = s.scalars(select(Tag.name).where(Tag.adapter_id == adapter.id).order_by(Tag.name)).all()
    if len(numbers) == 1:
        versions = f"one version, v{numbers[0]}"
    else:
        versions = f"{len(numbers)} versions, v{numbers[0]} to v{numbers[-1]}" if numbers else "no versions"
    return f"{versions}, and the tags {', '.join(tags)}" if tags else f"{versions}, and no tags"
