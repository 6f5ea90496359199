"""A registry in another place: from one machine to a team's server, and back.

What is copied is what the catalog said when the copy began; the source may be used meanwhile. The target has the same
rows and the same copies, and a catalog and a store of its own: two registries with one past. The order is that of a
push, and for the same reasons: every digest is pinned in the target's catalog before the first byte, so that a
collection there deletes nothing of it, and one transaction at the end looks whether all of it is there and makes it
visible.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from loreg.addresses import expanded, split
from loreg.catalog import Database, copying, queries
from loreg.catalog.database import file_of
from loreg.digest import Digest
from loreg.errors import BadInput, Conflict, LoregError, NotFound, UsageError
from loreg.registry.recording import Recorder
from loreg.registry.storage import utcnow
from loreg.store import Store, open_store, pieces

LEASE = timedelta(days=7)
"""How long a copy may take: of a terabyte over 15 Mbit/s. What one that was killed has pinned is kept as long."""


@dataclass(frozen=True, slots=True)
class Copied:
    """``copies``: copies of blobs that were written, and ``nbytes`` of them; ``there``: which were there already, of
    the right size; ``rows``: of the catalog."""

    copies: int
    there: int
    nbytes: int
    rows: int


def copy_store(
    source: str | Path,
    target: str | Path,
    *,
    source_catalog: str | None = None,
    target_catalog: str | None = None,
    catalog: bool = True,
    advance: Callable[[int], object] = lambda _: None,
) -> Copied:
    """Copy a registry: its blobs, each under its digest and generation and verified as it is written; its catalog.

    ``source``, ``target``: the home of a registry, or the address of a store, whose catalog has to be given then.
    What an earlier run has copied is not copied again: a copy of the right size, as none appears before all of it is
    verified. Without ``catalog``, the store alone becomes the same store in another place, with its ledger and its
    owner; nobody may write into it meanwhile. Raises NotFound, UsageError, BadInput for damage in the source,
    Conflict if the target has something else.
    """
    from_store, to_store = _store(source), _store(target)
    if str(from_store) == str(to_store):
        raise UsageError(f"{source} and {target} are one store: choose another to copy to.")
    if not catalog:
        return _copy_store_alone(from_store, to_store, advance)
    with ExitStack() as stack:
        from_catalog = _catalog(source, source_catalog, "--catalog-from")
        to_catalog = _catalog(target, target_catalog, "--catalog-to")
        _require_there(from_catalog, source)
        from_database = stack.enter_context(Database.open(from_catalog))
        Recorder(from_database, from_store).check()
        _require_fresh(to_catalog, to_store)
        to_database = stack.enter_context(Database.open(to_catalog))
        recorder = Recorder(to_database, to_store)
        recorder.own()
        snapshot = stack.enter_context(from_database.read())
        with to_database.read() as session:
            copying.require_part(snapshot, session)
        needed = copying.copies_needed(snapshot)
        with _pinned(to_database, needed) as lease:
            found = _copy_blobs(from_store, to_store, advance)
            with recorder.writing() as session:
                queries.require_lease(session, lease, utcnow())
                _require_all(needed, to_store)
                rows = copying.copy_rows(snapshot, session)
                if rows:
                    queries.begin_anew(session)
        return Copied(*found, rows)


def _copy_store_alone(source: Store, target: Store, advance: Callable[[int], object]) -> Copied:
    """Records are listed before blobs, so that what they speak of is among these; the owner is told last."""
    owner, there = source.owner(), target.owner()
    if there is not None and there != owner:
        raise Conflict(f"{target} is another registry's store: choose an empty one to copy to.")
    records = sorted(source.records())
    found = _copy_blobs(source, target, advance)
    for seq in records:
        record = source.read_record(seq)
        if record is not None:
            target.write_record(seq, record)
    if owner is not None and target.claim(owner) != owner:
        raise Conflict(f"{target} has become another registry's store meanwhile: choose an empty one to copy to.")
    return Copied(*found, 0)


def _copy_blobs(source: Store, target: Store, advance: Callable[[int], object]) -> tuple[int, int, int]:
    """How many copies were written, how many were there, and the bytes of the first."""
    copies = there = nbytes = 0
    present = set(target.keys())
    for key in source.keys():  # noqa: SIM118 - not a dict
        size = source.size(key)
        if size is None:
            continue  # collected since it was listed
        if key in present:
            if target.size(key) == size:
                there += 1
                continue
            target.quarantine(key)  # damaged: nothing of another size is ever given a key
        try:
            target.put(key.digest, key.generation, pieces(source, key, advance))
        except NotFound:
            if source.size(key) is not None:
                raise
            continue
        except BadInput as error:
            raise BadInput(f"{source} cannot be copied: {error} Look with `loreg fsck --repair` there.") from error
        copies, nbytes = copies + 1, nbytes + size
    return copies, there, nbytes


@contextmanager
def _pinned(database: Database, needed: Collection[tuple[Digest, str]]) -> Iterator[str]:
    """A lease on all that is to come, for as long as the block lasts."""
    owner = f"{socket.gethostname()}:{os.getpid()}"
    with database.write() as session:
        lease = queries.begin_lease(session, owner, {digest for digest, _ in needed}, utcnow(), LEASE)
    try:
        yield lease
    finally:
        # Also on Ctrl-C; should it fail as well, it expires, and the first error is the one to report.
        with suppress(LoregError), database.write() as session:
            queries.release_lease(session, lease)


def _require_all(needed: Collection[tuple[Digest, str]], store: Store) -> None:
    present = {(key.digest, key.generation) for key in store.keys()}  # noqa: SIM118 - not a dict
    if missing := [str(digest) for digest, generation in needed if (digest, generation) not in present]:
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise Conflict(
            f"there is no copy of blob {missing[0]}{others} to be had, as after what was collected from the source "
            "while it was copied: copy again, and look with `loreg fsck` there if that does not help."
        )


def _scheme(place: str | Path) -> str | None:
    """That of a store's address, None of the home of a registry."""
    return split(place, "a registry", "its home, or s3://bucket/prefix")[0]


def _store(place: str | Path) -> Store:
    return open_store(place if _scheme(place) is not None else _home(place))


def _home(place: str | Path) -> Path:
    return expanded(place).absolute()


def _catalog(place: str | Path, given: str | None, option: str) -> str | Path:
    """Where the catalog is."""
    if given is not None:
        return given
    if _scheme(place) is not None:
        raise UsageError(
            f"{place} is a store, and where its catalog is is not said: give {option}, or --no-catalog to copy the "
            "store alone."
        )
    return _home(place) / "catalog.db"


def _require_there(catalog: str | Path, place: str | Path) -> None:
    """Raises NotFound, so that a slip of the pen does not make a new one."""
    path = file_of(catalog)
    if path is not None and not path.exists():
        raise NotFound(
            f"{place} is not the home of a registry: expected its catalog at {path}; if that is elsewhere, as with "
            "LOREG_CATALOG, say where with --catalog-from."
        )


def _require_fresh(catalog: str | Path, store: Store) -> None:
    """Raises Conflict for a store whose catalog is not where a new one would be made, and whatever looking into it
    does: what is refused leaves no catalog behind."""
    path = file_of(catalog)
    if store.owner() is not None and path is not None and not path.exists():
        raise Conflict(
            f"{store} is another registry's store: expected its catalog at {path}, found none; give that with "
            "--catalog-to, or choose an empty place to copy to."
        )
