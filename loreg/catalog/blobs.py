"""Queries on blobs, and on the leases that pin them while a push is under way."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable
from datetime import UTC, datetime, timedelta

from sqlalchemy import Text, bindparam, delete, insert, select, type_coerce
from sqlalchemy.orm import Session

from loreg.catalog.models import Blob, Edge, Intent, Lease
from loreg.catalog.prefixes import between, only, portions
from loreg.digest import Digest, Fingerprint
from loreg.errors import Conflict, NotFound


def find_blob(s: Session, digest: Digest) -> Blob | None:
    """The row of a blob in whatever state: ``deleting`` means that it must be written anew."""
    return s.get(Blob, digest)


def live_generation(s: Session, digest: Digest) -> str | None:
    """Which copy of a blob is vouched for, None for none: half the time of ``find_blob``."""
    return s.connection().execute(_LIVE, {"digest": digest}).scalar()


_LIVE = select(Blob.generation).where(Blob.digest == bindparam("digest"), Blob.state == "live")


def find_blobs(s: Session, digests: Collection[Digest]) -> dict[Digest, Blob]:
    """The rows of those that have one, as :func:`find_blob`."""
    return {blob.digest: blob for some in portions(list(digests)) for blob in s.scalars(_AMONG, {"digests": some})}


_AMONG = select(Blob).where(Blob.digest.in_(bindparam("digests", expanding=True)))


def blob_matching_prefix(s: Session, hexprefix: str) -> Blob:
    """The one blob whose digest starts so. Raises NotFound, and UsageError where several do."""
    start, end = between(hexprefix)
    found = s.scalars(_STARTING, {"start": start, "end": end}).all()
    if not found:
        raise NotFound(f"no blob has a digest that starts with {hexprefix!r}; look with `loreg ls`.")
    return only(hexprefix, "blobs", found, [str(blob.digest) for blob in found])


_TEXT = type_coerce(Blob.digest, Text)
_STARTING = select(Blob).where(bindparam("start") <= _TEXT, bindparam("end") > _TEXT).limit(6)


def begin_lease(s: Session, owner: str, digests: Collection[Digest], now: datetime, ttl: timedelta) -> str:
    """Pin ``digests``, whether or not they are there yet. Commit before looking for any of them.

    A collector that runs between a look and a later pin would delete what the look has just found.
    """
    lease_id = os.urandom(16).hex()
    s.execute(insert(Lease), [{"id": lease_id, "owner": owner, "created_at": now, "expires_at": now + ttl}])
    if intents := [{"lease_id": lease_id, "digest": digest} for digest in sorted(set(digests))]:
        s.execute(insert(Intent), intents)
    return lease_id


def release_lease(s: Session, lease_id: str) -> None:
    """Drop the lease with its intents; one that is gone already is released."""
    s.execute(delete(Lease).where(Lease.id == lease_id))


def require_lease(s: Session, lease_id: str, now: datetime) -> None:
    """The fence: raises Conflict if the lease is gone or expired, and its blobs may be gone with it.

    Call it in the transaction that commits the push, so that no collector comes in between.
    """
    lease = s.scalar(_LEASE, {"id": lease_id})
    if lease is None or lease.expires_at <= now:
        state = "was taken away" if lease is None else f"expired at {lease.expires_at.isoformat()}"
        raise Conflict(
            f"the push was not committed: expected its lease {lease_id} to hold, but it {state}; push again."
        )


_LEASE = select(Lease).where(Lease.id == bindparam("id")).with_for_update()


def record_blobs(s: Session, blobs: Collection[tuple[Fingerprint, str]], now: datetime | None = None) -> None:
    """Vouch for these copies: each digest is live, with that generation, whatever its row said before.

    ``now`` is the clock's where it is not given.
    """
    known = find_blobs(s, [fingerprint.digest for fingerprint, _ in blobs])
    for fingerprint, generation in blobs:
        blob = known.get(fingerprint.digest) or Blob(digest=fingerprint.digest)
        blob.generation, blob.state, blob.created_at = generation, "live", now or datetime.now(UTC)
        blob.sha256, blob.size = fingerprint.sha256, fingerprint.size
        s.add(blob)
    s.flush()


def record_edges(s: Session, source: Digest, digests: Iterable[Digest]) -> None:
    """The manifest ``source`` needs these blobs, which are recorded already. Repeats change nothing."""
    known = set(s.scalars(_EDGES, {"source": source}))
    if new := [{"source": source, "blob": blob} for blob in sorted(set(digests) - known)]:
        s.execute(insert(Edge), new)


_EDGES = select(Edge.blob).where(Edge.source == bindparam("source"))
