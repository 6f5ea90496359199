"""Queries on bases, and on the cache of the digests of their files."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import select
from sqlalchemy.orm import Session

from loreg.catalog.ledger import note_fact
from loreg.catalog.models import BaseRow, FileHash
from loreg.digest import Digest
from loreg.errors import Conflict
from loreg.format.reference import check_name


def add_base(
    s: Session,
    name: str,
    *,
    manifest: Digest,
    weights_root: Digest,
    structure_root: Digest,
    content_set: Digest,
    tensors: int,
    bytes: int,  # noqa: A002 - named as in the manifest and on the command line
    now: datetime,
    hub_repo: str | None = None,
    hub_commit: str | None = None,
    hub_files: str | None = None,
    path: str | None = None,
) -> BaseRow:
    """The base of that name. The same weights again update the path and the hub pin where they are given.

    Raises Conflict if the name stands for other weights, UsageError if it is malformed.
    """
    row = find_base(s, name=name)
    if row is None:
        row = BaseRow(
            name=check_name(name),
            manifest=manifest,
            weights_root=weights_root,
            structure_root=structure_root,
            content_set=content_set,
            tensors=tensors,
            bytes=bytes,
            created_at=now,
        )
        s.add(row)
    elif row.weights_root != weights_root:
        raise Conflict(
            f"base {name!r} is there with other weights: expected weights root {row.weights_root}, "
            f"found {weights_root}; add it under another name."
        )
    if hub_repo is not None:
        row.hub_repo, row.hub_commit, row.hub_files = hub_repo, hub_commit, hub_files
    if path is not None:
        row.path = path
    if s.is_modified(row) or row in s.new:
        note_fact(s, "base", name)
    s.flush()
    return row


def find_base(s: Session, *, name: str | None = None, weights_root: Digest | None = None) -> BaseRow | None:
    """The base that meets every condition given, the first added if several do; None if none does."""
    query = select(BaseRow).order_by(BaseRow.id).limit(1)
    if name is not None:
        query = query.where(BaseRow.name == name)
    if weights_root is not None:
        query = query.where(BaseRow.weights_root == weights_root)
    return s.scalar(query)


def list_bases(s: Session) -> list[BaseRow]:
    """Every base, by name."""
    return list(s.scalars(select(BaseRow).order_by(BaseRow.name)))


def cached_leaves(s: Session, stat_key: tuple[int, int, int, int, int]) -> str | None:
    """What :func:`remember_leaves` was given for a file that has not changed since."""
    row = s.get(FileHash, tuple(stat_key))
    return None if row is None else row.leaves


def remember_leaves(s: Session, stat_key: tuple[int, int, int, int, int], json_text: str, now: datetime) -> None:
    """Keep the content digests of a file, by its (device, inode, size, mtime_ns, ctime_ns)."""
    device, inode, size, mtime_ns, ctime_ns = stat_key
    s.merge(
        FileHash(
            device=device,
            inode=inode,
            size=size,
            mtime_ns=mtime_ns,
            ctime_ns=ctime_ns,
            leaves=json_text,
            seen_at=now,
        )
    )
    s.flush()
