"""Queries on blobs, and on the leases that pin them while a push is under way."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable
from datetime import UTC, datetime, timedelta

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from loreg.catalog.models import Blob, Edge, Intent, Lease
from loreg.catalog.prefixes import only, starts_with
from loreg.digest import Digest, Fingerprint
from loreg.errors import Conflict, NotFound


def find_blob(s: Session, digest: Digest) -> Blob | None:
    """The row of a blob in whatever state: ``deleting`` means that it must be written anew."""
    return s.get(Blob, digest)


def blob_matching_prefix(s: Session, hexprefix: str) -> Blob:
    """The one blob whose digest starts so. Raises NotFound, and UsageError where several do."""
    found = s.scalars(select(Blob).where(*starts_with(Blob.digest, hexprefix)).limit(6)).all()
    if not found:
        raise NotFound(f"no blob has a digest that starts with {hexprefix!r}; look with `loreg ls`.")
    return only(hexprefix, "blobs", found, [str(blob.digest) for blob in found])


def begin_lease(s: Session, owner: str, digests: Collection[Digest], now: datetime, ttl: timedelta) -> str:
    """Pin ``digests``, whether or not they are there yet. Commit before looking for any of them.

    A collector that runs between a look and a later pin would delete what the look has just found.
    """
    lease_id = os.urandom(16).hex()
    s.add(Lease(id=lease_id, owner=owner, created_at=now, expires_at=now + ttl))
    s.flush()
    s.add_all(Intent(lease_id=lease_id, digest=digest) for digest in sorted(set(digests)))
    s.flush()
    return lease_id


def release_lease(s: Session, lease_id: str) -> None:
    """Drop the lease with its intents; one that is gone already is released."""
    s.execute(delete(Lease).where(Lease.id == lease_id))


def require_lease(s: Session, lease_id: str, now: datetime) -> None:
    """The fence: raises Conflict if the lease is gone or expired, and its blobs may be gone with it.

    Call it in the transaction that commits the push, so that no collector comes in between.
    """
    lease = s.scalar(select(Lease).where(Lease.id == lease_id).with_for_update())
    if lease is None or lease.expires_at <= now:
        state = "was taken away" if lease is None else f"expired at {lease.expires_at.isoformat()}"
        raise Conflict(
            f"the push was not committed: expected its lease {lease_id} to hold, but it {state}; push again."
        )


def record_blobs(s: Session, blobs: Iterable[tuple[Fingerprint, str]], now: datetime | None = None) -> None:
    """Vouch for these copies: each digest is live, with that generation, whatever its row said before.

    ``now`` is the clock's where it is not given.
    """
    at = now or datetime.now(UTC)
    for fingerprint, generation in blobs:
        s.merge(
            Blob(
                digest=fingerprint.digest,
                generation=generation,
                sha256=fingerprint.sha256,
                size=fingerprint.size,
                state="live",
                created_at=at,
            )
        )
    s.flush()


def record_edges(s: Session, source: Digest, digests: Iterable[Digest]) -> None:
    """The manifest ``source`` needs these blobs, which are recorded already. Repeats change nothing."""
    known = set(s.scalars(select(Edge.blob).where(Edge.source == source)))
    s.add_all(Edge(source=source, blob=blob) for blob in sorted(set(digests) - known))
    s.flush()
