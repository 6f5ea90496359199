"""Queries on adapters and their versions."""

from __future__ import annotations

import difflib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from typing import Any

from sqlalchemy import Integer, Select, Text, bindparam, exists, func, insert, or_, select, type_coerce, update
from sqlalchemy.orm import Session

from loreg.catalog.ledger import note_fact
from loreg.catalog.models import Adapter, BaseRow, Document, Tag, Target, Version
from loreg.catalog.prefixes import between, only, portions
from loreg.catalog.searching import FEW, candidates, contains, document, walk, words
from loreg.digest import Digest
from loreg.errors import NotFound
from loreg.format.reference import check_name


@dataclass(frozen=True, slots=True)
class VersionRow:
    """One version of one adapter; ``targets`` sorted, times in UTC, ``bytes`` as pushed. ``removed_at``: of one that
    is in the trash."""

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
    removed_at: datetime | None
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
    Version.removed_at,
]
EVERY = select(*_COLUMNS).join(Adapter, Adapter.id == Version.adapter_id)
_VERSIONS = EVERY.where(Version.removed_at.is_(None))
"""What everybody sees: all but the trash."""


def rows(s: Session, statement: Select[Any], **values: object) -> list[VersionRow]:
    """The versions that ``statement`` (made from ``EVERY``) selects with ``values`` for its parameters, and their
    targets: two queries."""
    return _with_targets(s, s.execute(statement, values).all())


def _with_targets(s: Session, found: Sequence[Any]) -> list[VersionRow]:
    targets: defaultdict[int, list[str]] = defaultdict(list)
    for ids in portions([row.id for row in found]):
        for version_id, target in s.connection().execute(_TARGETS, {"ids": ids}):
            targets[version_id].append(target)
    return [VersionRow(*(*row, tuple(sorted(targets[row.id])))) for row in found]


# Sorted here: after a walk, PostgreSQL would read all targets along their index to have some in order.
_TARGETS = select(Target.version_id, Target.target).where(Target.version_id.in_(bindparam("ids", expanding=True)))


@cache
def _finding(*given: str) -> Select[Any]:
    """The statement of ``find_version`` by what is given: to make it takes longer than to run it."""
    query = _VERSIONS.order_by(Version.number.desc()).limit(bindparam("limit", type_=Integer))
    if "name" in given:
        query = query.where(Adapter.name == bindparam("name"))
    if "number" in given:
        query = query.where(Version.number == bindparam("number"))
    if "tag" in given:
        query = query.join(Tag, Tag.version_id == Version.id).where(Tag.name == bindparam("tag"))
        query = query.where(Tag.adapter_id == Version.adapter_id)
    if "start" in given:
        digest = type_coerce(Version.digest, Text)
        query = query.where(digest >= bindparam("start"), digest < bindparam("end"))
    return query


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

    The same content again is the version that is there, unchanged, and taken out of the trash if it was in it: then
    ``removed_at`` still says so. Raises UsageError for a malformed name.
    """
    adapter = s.scalar(_ADAPTER.with_for_update(), {"name": name})
    if adapter is None:
        adapter = Adapter(name=check_name(name), last_number=0, created_at=now)
        s.add(adapter)
        s.flush()
    if existing := rows(s, _SAME, adapter=adapter.id, digest=digest):
        if existing[0].removed_at is not None:
            s.execute(update(Version).where(Version.id == existing[0].id).values(removed_at=None))
            note_fact(s, "version", name, existing[0].number)
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
    kinds = sorted(set(targets))
    if kinds:
        s.execute(insert(Target), [{"version_id": version.id, "target": target} for target in kinds])
    s.execute(insert(Document), [{"version_id": version.id, "text": document(name, note, kinds)}])
    note_fact(s, "name", name)
    note_fact(s, "version", name, version.number)
    about = digest, base_root, base_name, rank, modules, bytes, note, now, None, tuple(kinds)
    return VersionRow(version.id, name, version.number, *about), True


_ADAPTER = select(Adapter).where(Adapter.name == bindparam("name"))
_SAME = EVERY.where(Version.adapter_id == bindparam("adapter"), Version.digest == bindparam("digest"))


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
    wanted, values = [], {"name": name, "limit": 1}
    if number is not None:
        wanted.append(f"number {number}")
        values["number"] = number
    if tag is not None:
        wanted.append(f"tag {tag!r}")
        values["tag"] = tag
    if digest_prefix is not None:
        wanted.append(f"a digest that starts with {digest_prefix!r}")
        values["start"], values["end"] = between(digest_prefix)
    if wanted:
        values["limit"] = 6
    found = _with_targets(s, s.connection().execute(_finding(*values), values).all())
    if not found:
        adapter = find_adapter(s, name)
        if number is not None and is_removed(s, adapter, number):
            raise NotFound(f"{name}:v{number} is in the trash: take it back with `loreg restore {name}:v{number}`.")
        meeting = f" with {' and '.join(wanted)}" if wanted else ""
        raise NotFound(
            f"adapter {name!r} has no version{meeting}: it has {_summary(s, adapter)}; look with `loreg log {name}`."
        )
    return only(str(digest_prefix), f"versions of {name!r}", found, [f"v{v.number} {v.digest}" for v in found])


def standing_digest(
    s: Session,
    name: str | None,
    *,
    number: int | None = None,
    tag: str | None = None,
    digest_prefix: str | None = None,
) -> Digest | None:
    """The digest of the version that ``find_version`` would find, None where it would find none; without ``name``
    that of a version by any. One query, which looks at nothing else: it is asked over and over.

    Raises UsageError for a prefix that fits several versions.
    """
    values: dict[str, Any] = {"limit": 6 if digest_prefix is not None else 1}
    if name is not None:
        values["name"] = name
    if number is not None:
        values["number"] = number
    if tag is not None:
        values["tag"] = tag
    if digest_prefix is not None:
        values["start"], values["end"] = between(digest_prefix)
    found = list(dict.fromkeys(s.connection().scalars(_standing(*values), values)))
    return only(str(digest_prefix), "versions", found, list(map(str, found))) if found else None


@cache
def _standing(*given: str) -> Select[Any]:
    return _finding(*given).with_only_columns(Version.digest)


def versions_of(s: Session, name: str) -> list[VersionRow]:
    """Every version of ``name``, oldest first. Raises NotFound."""
    adapter = find_adapter(s, name)
    return rows(s, _VERSIONS.where(Version.adapter_id == adapter.id).order_by(Version.number))


def newest_version(s: Session, adapter: Adapter) -> VersionRow | None:
    """The one with the highest number, None if none is left."""
    return next(iter(rows(s, _NEWEST, adapter=adapter.id)), None)


_NEWEST = _VERSIONS.where(Version.adapter_id == bindparam("adapter")).order_by(Version.number.desc()).limit(1)


def versions_by_digest(s: Session, digest: Digest) -> list[VersionRow]:
    """Every name and number that this content goes by, in order of names."""
    return rows(s, _BY_DIGEST, digest=digest)


_BY_DIGEST = _VERSIONS.where(Version.digest == bindparam("digest")).order_by(Adapter.name)


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
    Each word of ``query`` is looked for anywhere in name, note and targets; only ASCII letters match in either case.
    """
    values: dict[str, Any] = {"limit": limit} if limit is not None else {}
    if not all_versions:
        values["newest"] = None
    if base is not None:
        roots = s.scalars(select(BaseRow.weights_root).where(BaseRow.name == base)).all()
        values |= {"base": base, "roots": [base, *map(str, roots)]}
    if rank is not None:
        values["rank"] = rank
    if target is not None:
        values["target"] = target
    fitting = [
        s.connection().scalars(_FITTING[name], {**values, "few": FEW + 1}).all()
        for name in _FITTING
        if name in values
    ]
    each = words(query or "")
    if each and (found := candidates(s, each, FEW + 1)) is not None:
        fitting.append(found)
    # A database that does not know how many fit would sort many, or walk past many: where few fit, it is told which.
    few = min(fitting, key=len, default=())
    if fitting and len(few) <= FEW:
        values["few"] = few
    elif limit is not None and (fitting or each):
        walk(s)
    values |= {f"word{place}": word for place, word in enumerate(each)}
    return _with_targets(s, s.connection().execute(_listing(*values), values).all())


_ROOT = type_coerce(Version.base_root, Text)
_FITTING = {
    "base": select(Version.id).where(
        or_(Version.base_name == bindparam("base"), _ROOT.in_(bindparam("roots", expanding=True)))
    ),
    "rank": select(Version.id).where(Version.rank == bindparam("rank")),
    "target": select(Target.version_id).where(Target.target == bindparam("target")),
}
"""The versions that meet each condition alone, by its index."""
_FITTING = {name: query.limit(bindparam("few", type_=Integer)) for name, query in _FITTING.items()}


@cache
def _listing(*given: str) -> Select[Any]:
    """The statement of ``list_versions`` by what is given. No condition in it is one that an index answers, but the
    last: the order of the names is that of an index, and the walk along it ends with the last that is wanted."""
    query = _VERSIONS.order_by(Adapter.name, Version.number)
    if "limit" in given:
        query = query.limit(bindparam("limit", type_=Integer))
    if "newest" in given:
        other = Version.__table__.alias()
        newest = select(func.max(other.c.number)).where(
            other.c.adapter_id == Version.adapter_id, other.c.removed_at.is_(None)
        )
        query = query.where(Version.number == newest.scalar_subquery())
    if "base" in given:
        roots: Any = bindparam("roots", expanding=True)
        query = query.where(
            or_(Version.base_name.concat("") == bindparam("base"), _ROOT.concat("").in_(roots)),
        )
    if "rank" in given:
        query = query.where(Version.rank + 0 == bindparam("rank"))
    if "target" in given:
        has = exists().where(Target.version_id == Version.id, Target.target == bindparam("target"))
        query = query.where(has.correlate(Version))
    if "word0" in given:
        said = (contains(name) for name in given if name.startswith("word"))
        query = query.where(exists().where(Document.version_id == Version.id, *said).correlate(Version))
    if "few" in given:
        query = query.where(Version.id.in_(bindparam("few", expanding=True)))
    return query


def find_adapter(s: Session, name: str) -> Adapter:
    """The adapter of that name; raises NotFound, naming near names."""
    adapter = s.scalar(_ADAPTER, {"name": name})
    if adapter is None:
        near = difflib.get_close_matches(name, _names_like(s, name))
        hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else "; look with `loreg ls`."
        raise NotFound(f"no adapter is called {name!r}{hint}")
    return adapter


def _names_like(s: Session, name: str) -> Sequence[str]:
    """All names, or where they are so many that to compare them takes a second, those that begin or end alike."""
    found = s.scalars(select(Adapter.name).limit(FEW + 1)).all()
    if len(found) > FEW:
        alike = or_(
            Adapter.name.startswith(name[:3], autoescape=True), Adapter.name.endswith(name[-3:], autoescape=True)
        )
        found = s.scalars(select(Adapter.name).where(alike).order_by(Adapter.name).limit(FEW)).all()
    return found


def is_removed(s: Session, adapter: Adapter, number: int) -> bool:
    """Whether that version is in the trash."""
    found = EVERY.where(Version.adapter_id == adapter.id, Version.number == number, Version.removed_at.is_not(None))
    return bool(rows(s, found))


def _summary(s: Session, adapter: Adapter) -> str:
    mine = select(Version.number, Version.removed_at).where(Version.adapter_id == adapter.id)
    found = s.execute(mine.order_by(Version.number)).all()
    numbers = [number for number, removed_at in found if removed_at is None]
    removed = [f"v{number}" for number, removed_at in found if removed_at is not None]
    tags = s.scalars(select(Tag.name).where(Tag.adapter_id == adapter.id).order_by(Tag.name)).all()
    if len(numbers) == 1:
        versions = f"one version, v{numbers[0]}"
    else:
        versions = f"{len(numbers)} versions, v{numbers[0]} to v{numbers[-1]}" if numbers else "no versions"
    trash = f", {', '.join(removed[-3:])} in the trash (see `loreg trash`)" if removed else ""
    return f"{versions}{trash}, and {'the tags ' + ', '.join(tags) if tags else 'no tags'}"
