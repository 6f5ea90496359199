"""Queries of the garbage collector: what is needed, what is pinned, and what is marked to go."""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime

from sqlalchemy import delete, exists, or_, select, update
from sqlalchemy.orm import Session

from loreg.catalog.models import BaseRow, Blob, Edge, Intent, Lease, Version
from loreg.digest import Digest


def reap_leases(s: Session, now: datetime) -> int:
    """Drop the leases that have expired, with their pins; how many. Their pushes are fenced from then on."""
    found = s.scalars(select(Lease.id).where(Lease.expires_at <= now)).all()
    s.execute(delete(Lease).where(Lease.id.in_(found)))
    return len(found)


def roots(s: Session) -> dict[Digest, bool]:
    """The manifests that something stands for: a version, one in the trash too, or a base. True for adapters'."""
    return dict.fromkeys(s.scalars(select(BaseRow.manifest)), False) | dict.fromkeys(
        s.scalars(select(Version.digest).distinct()), True
    )


def needed_by(s: Session, source: Digest) -> set[Digest]:
    """The blobs that a manifest needs, as the catalog has it."""
    return set(s.scalars(select(Edge.blob).where(Edge.source == source)))


def pinned_digests(s: Session) -> set[Digest]:
    """What pushes that are under way are about to look for, or to write."""
    return set(s.scalars(select(Intent.digest).distinct()))


def known_copies(s: Session) -> dict[Digest, str]:
    """The generation of every blob that has a row, whatever its state."""
    return {row.digest: row.generation for row in s.execute(select(Blob.digest, Blob.generation))}


def mark_unneeded(s: Session) -> list[Blob]:
    """Mark as ``deleting`` the live blobs that nothing needs and nobody has pinned; all marked ones not pinned.

    Edges of manifests that nothing stands for any more go first. A blob that was marked by a collector that died is
    among what is returned, unless a push has pinned it since.
    """
    stands = or_(
        exists().where(Version.digest == Edge.source),
        exists().where(BaseRow.manifest == Edge.source),
    )
    s.execute(delete(Edge).where(~stands))
    needed = or_(
        exists().where(Edge.blob == Blob.digest),
        exists().where(Version.digest == Blob.digest),
        exists().where(BaseRow.manifest == Blob.digest),
    )
    pinned = exists().where(Intent.digest == Blob.digest)
    s.execute(update(Blob).where(Blob.state == "live", ~needed, ~pinned).values(state="deleting"))
    s.expire_all()
    return list(s.scalars(select(Blob).where(Blob.state == "deleting", ~needed, ~pinned).order_by(Blob.digest)))


def drop_marked(s: Session, copies: Collection[tuple[Digest, str]]) -> None:
    """Forget the blobs whose copies are deleted, if they are still marked, and of that generation: one that a push
    has written anew meanwhile has another."""
    for digest, generation in copies:
        s.execute(delete(Blob).where(Blob.digest == digest, Blob.generation == generation, Blob.state == "deleting"))
