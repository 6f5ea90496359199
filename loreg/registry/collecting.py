"""Garbage collection: what nothing needs leaves the store, and nothing else, whatever pushes do meanwhile.

The order of the steps is the safety argument, and each weaker one loses data (``tests/laws/protocol_model.py`` visits
every state of it):

1. *The store is listed before the catalog is read.* What is written after the listing is not in it, and so is not
   deleted; were it the other way about, a blob that a push wrote and committed in between would look like one
   that nothing knows.
2. *One transaction* marks what nothing needs and no push has pinned. A push pins before it looks, so either its pin
   is seen here, or it looks after this and finds the mark.
3. *Exactly those copies are deleted*, by digest and generation. A push that found the mark writes a fresh generation,
   which a delete that arrives late cannot hit.
4. Rows are forgotten that are still marked, with that generation.

How long versions stay in the trash is for people who change their mind. Safety has no part in it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta

from sqlalchemy.orm import Session

from loreg.catalog import queries
from loreg.catalog.queries import VersionRow
from loreg.digest import Digest
from loreg.errors import BadInput, LoregError, NotFound
from loreg.format.ledger import PART, LedgerRecord
from loreg.registry.storage import Storage, utcnow
from loreg.store import BlobKey, Store, Unfinished

LONG = 1000
"""How many records a ledger may have beyond what it takes to say everything."""

GRACE = timedelta(days=14)
"""How long what was removed can be taken back, unless a collection says otherwise."""


@dataclass(frozen=True, slots=True)
class Collected:
    """What a collection deleted, or would delete: copies of blobs, what writes had left that did not end, and the
    versions that were in the trash for so long. ``nbytes``: of all that."""

    copies: tuple[BlobKey, ...]
    unfinished: tuple[Unfinished, ...]
    versions: tuple[VersionRow, ...]
    nbytes: int


def collect(storage: Storage, *, grace: timedelta = GRACE, dry_run: bool = False) -> Collected:
    """Delete what nothing needs, or with ``dry_run`` say what that is.

    Raises BadInput, and deletes nothing, if a manifest that something stands for is missing or unreadable, or needs
    blobs that the catalog does not know it to need: the catalog would not be one to delete by.
    """
    store = storage.store
    listed, unfinished = list(store.keys()), list(store.unfinished())
    sound = set()
    with storage.database.read() as session:
        for root, is_adapters in queries.roots(session).items():
            with suppress(BadInput):  # it may be on its way out: what counts is what the transaction finds
                _check(session, storage, root, is_adapters)
                sound.add(root)
    storage.recorder.check()
    try:
        with storage.database.write() if dry_run else storage.writing() as session:
            now = utcnow()
            queries.reap_leases(session, now)
            versions = queries.purge_versions(session, now - grace)
            for root, is_adapters in queries.roots(session).items():
                if root not in sound:
                    _check(session, storage, root, is_adapters)
            marked = [(BlobKey(blob.digest, blob.generation), blob.size) for blob in queries.mark_unneeded(session)]
            pinned, known = queries.pinned_digests(session), queries.known_copies(session)
            orphans = [key for key in listed if known.get(key.digest) != key.generation and key.digest not in pinned]
            for key, _ in marked:
                known.pop(key.digest, None)
            copies = {key: store.size(key) or 0 for key in orphans if not _is_spare(key, known, store)} | dict(marked)
            left = tuple(write for write in unfinished if write.digest not in pinned)
            size = sum(copies.values()) + sum(write.size for write in left)
            found = Collected(tuple(sorted(copies)), left, tuple(versions), size)
            if dry_run:
                raise _Rehearsed
    except _Rehearsed:
        return found
    for key in found.copies:
        store.delete(key)
    for write in left:
        store.discard(write)
    with storage.database.write() as session:
        queries.drop_marked(session, [(key.digest, key.generation) for key, _ in marked])
    _shorten_ledger(storage)
    return found


def _shorten_ledger(storage: Storage) -> None:
    """Begin the ledger anew where it is much longer than what it says, and then delete what came before."""
    records = list(storage.store.records())
    with storage.database.read() as session:
        anew = LONG + 2 * queries.count_facts(session) // PART
    if len(records) <= anew:
        return
    with storage.writing() as session:
        queries.begin_anew(session)
    with storage.database.read() as session:
        last = queries.last_record(session)
    first = LedgerRecord.parse(last.body.encode()) if last else None
    # Else somebody has written a record since, and the next collection does it.
    if first is not None and first.part == first.parts > 0:
        for seq in records:
            if seq <= first.seq - first.parts:
                storage.store.delete_record(seq)


def _is_spare(key: BlobKey, known: Mapping[Digest, str], store: Store) -> bool:
    """Whether it is of a blob that is needed, and whose own copy is lost: a repair takes this one instead."""
    return key.digest in known and store.size(BlobKey(key.digest, known[key.digest])) is None


class _Rehearsed(Exception):
    """Takes back what a transaction marked."""


def _check(session: Session, storage: Storage, root: Digest, is_adapters: bool) -> None:
    """That a manifest is there, is what it was, and needs no more blobs than the catalog says."""
    try:
        blob = queries.find_blob(session, root)
        if blob is None or blob.state != "live":
            raise NotFound(f"Manifest {root} has no live blob.")
        manifest = json.loads(storage.store.read(BlobKey(root, blob.generation)))
        needed = {Digest.parse(entry["digest"]) for entry in manifest["blobs"]} if is_adapters else set()
    except (LoregError, ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{error} Nothing was collected: look with `loreg fsck`.") from error
    if not needed <= queries.needed_by(session, root):
        raise BadInput(
            f"The catalog does not know of all blobs that manifest {root} needs ({len(needed)}): nothing was "
            "collected; look with `loreg fsck`."
        )
