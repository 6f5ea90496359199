"""A catalog made again from the store alone: manifests are blobs, and the ledger has their names.

Every copy is read. What the ledger names is there under its name, number, note and tags again; what was in the trash
is in the trash. A manifest that no record mentions, as its push did not come to its end or the record is lost, is
called ``lost-found/<12 digits>``: nothing that the store has is lost. What is damaged is put aside, and told.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy.orm import Session

from loreg.catalog import Database, queries
from loreg.catalog.models import microseconds
from loreg.digest import Digest, Fingerprint, fingerprint
from loreg.errors import BadInput, Conflict, LoregError, NotFound, RemoteError
from loreg.format.canonical_json import MAX_BYTES
from loreg.format.ledger import Facts, Ledger, Owner
from loreg.format.manifest import AdapterManifest
from loreg.registry.auditing import parse_manifest, read_ledger, standing_tags
from loreg.registry.problem import Problem
from loreg.registry.recording import Recorder
from loreg.registry.storage import utcnow
from loreg.registry.versions import LATEST
from loreg.store import BlobKey, Store, new_generation, pieces

LOST = "lost-found"
_MISSING = "there is no copy in the store"


@dataclass(frozen=True, slots=True)
class Rebuilt:
    """How much there is again. ``blobs``: copies that were read. ``lost_found``: the names given to what had none.

    ``problems``: what is missing.
    """

    blobs: int
    versions: int
    bases: int
    tags: int
    lost_found: tuple[str, ...]
    problems: tuple[Problem, ...]

    @property
    def ok(self) -> bool:
        return not self.problems


@dataclass
class _Store:
    """What the store was found to have: good copies, and the manifests among them."""

    copies: dict[Digest, tuple[Fingerprint, str]] = field(default_factory=dict)
    columns: dict[Digest, dict[str, Any]] = field(default_factory=dict)
    needs: dict[Digest, tuple[Fingerprint, ...]] = field(default_factory=dict)
    damaged: list[BlobKey] = field(default_factory=list)
    unreadable: dict[Digest, str] = field(default_factory=dict)
    read: int = 0


def require_store(store: Store) -> None:
    """Raises NotFound where nothing says that there is a store: an address that was mistyped, more likely."""
    if store.owner() is None and next(store.records(), None) is None and next(store.keys(), None) is None:
        raise NotFound(
            f"There is no store at {store}: expected blobs, a ledger or store.json, found none of them; say where it "
            "is with --home or LOREG_STORE."
        )


def rebuild(database: Database, store: Store, advance: Callable[[int], object] = lambda _: None) -> Rebuilt:
    """Fill an empty catalog with what the store has; it then is the store's own.

    Raises Conflict if the catalog is not empty. ``advance`` is told the bytes that were read.
    """
    with database.read() as session:
        if not queries.is_empty(session):
            raise Conflict(
                "The catalog is not empty: it is made again only where there is none. Move it away if it is damaged, "
                "with the files -wal and -shm beside it; for single faults there is `loreg fsck --repair`."
            )
    found = _read(store, advance)
    ledger, problems, damaged = read_ledger(store)
    lost = _name_the_lost(found, ledger)
    facts = {key: value for key, value in ledger.facts.items() if _manifest(value) in (None, *found.columns)}
    problems += _problems(found, ledger.facts)
    owner = _owner(store)
    for key in found.damaged:
        store.quarantine(key)
    for seq in damaged:
        store.quarantine_record(seq)
    with database.write() as session:
        if owner is not None:
            row = queries.identity(session)
            row.catalog, row.store = owner.catalog, owner.store
        _record_store(session, found, facts)
        queries.restate(session, facts, found.columns)
        if ledger.record is not None:
            queries.go_on_from(session, ledger.record)
        queries.begin_anew(session)
    with Recorder(database, store).writing():
        pass  # writes the record of all that into the store
    kinds = [key[0] for key in facts]
    counts = kinds.count("version"), kinds.count("base"), len(standing_tags(facts))
    return Rebuilt(found.read, *counts, tuple(lost), tuple(problems))


def _read(store: Store, advance: Callable[[int], object]) -> _Store:
    found, damaged = _Store(), []
    for key in sorted(store.keys()):
        try:
            print_ = fingerprint(pieces(store, key, advance))
        except RemoteError:
            raise  # it says nothing of the copy
        except LoregError:
            found.unreadable[key.digest] = key.generation  # it may be read another time
            continue
        found.read += 1
        if print_.digest != key.digest:
            damaged.append(key)
        elif key.digest not in found.copies:
            found.copies[key.digest] = print_, key.generation
            _recognise(found, store, key, print_.size)
    found.damaged = [key for key in damaged if key.digest not in found.copies]
    return found


def _recognise(found: _Store, store: Store, key: BlobKey, size: int) -> None:
    """Keep what a manifest says; other blobs, JSON of other programs among them, are no manifests."""
    if size > MAX_BYTES:
        return
    with store.open(key) as file:
        if file.read(1) != b"{":
            return
    with suppress(BadInput):
        manifest = parse_manifest(store.read(key))
        found.columns[key.digest] = queries.columns_of(manifest)
        if isinstance(manifest, AdapterManifest):
            found.needs[key.digest] = tuple(Fingerprint(b.digest, b.sha256, b.size) for b in manifest.blobs)


def _name_the_lost(found: _Store, ledger: Ledger) -> list[str]:
    """Names for the manifests that no record mentions, put among the facts."""
    lost = sorted(digest for digest in found.columns if str(digest) not in ledger.mentioned)
    now = microseconds(utcnow())
    for digest in lost:
        name = f"{LOST}/{digest.short}"
        value: dict[str, Any] = {"at": now, "manifest": str(digest)}
        if digest in found.needs:
            ledger.facts["name", name] = {"at": now, "last": 1}
            ledger.facts["version", name, 1] = {**value, "note": None, "removed": None}
            ledger.facts["tag", name, LATEST, 1] = {"at": now, "number": 1}
        else:
            nothing = dict.fromkeys(("hub_repo", "hub_commit", "hub_files", "path"))
            ledger.facts["base", name] = {**value, **nothing}
    return [f"{LOST}/{digest.short}" for digest in lost]


def _problems(found: _Store, facts: Facts) -> list[Problem]:
    """What is damaged, and what versions and bases need and the store has not."""
    touches = defaultdict(list)
    for key, value in facts.items():
        manifest = _manifest(value)
        if manifest is not None:
            name = f"base {key[1]}" if key[0] == "base" else f"{key[1]}:v{key[2]}"
            for digest in (manifest, *(print_.digest for print_ in found.needs.get(manifest, ()))):
                touches[digest].append(name)
    damaged = {key.digest for key in found.damaged}
    problems = [
        Problem("corrupt", str(key.digest), "its bytes are others; put aside", tuple(touches[key.digest]))
        for key in found.damaged
    ]
    for digest, names in sorted(touches.items()):
        if digest not in found.copies and digest not in damaged:
            kind, said = ("unreadable", "it cannot be read") if digest in found.unreadable else ("missing", _MISSING)
            problems.append(Problem(kind, str(digest), said, tuple(names)))
    return problems


def _owner(store: Store) -> Owner | None:
    said = store.owner()
    try:
        return None if said is None else Owner.parse(said)
    except BadInput:
        store.disown()  # unreadable; the catalog that is made here claims it
        return None


def _record_store(session: Session, found: _Store, facts: Facts) -> None:
    """Rows of the blobs that are needed. One that is missing has a row that says so to every check."""
    standing = {digest for value in facts.values() if (digest := _manifest(value)) is not None}
    blobs = {digest: found.copies[digest] for digest in standing}
    for manifest in standing:
        for print_ in found.needs.get(manifest, ()):
            lost = print_, found.unreadable.get(print_.digest) or new_generation()
            blobs[print_.digest] = found.copies.get(print_.digest) or lost
    edges = {(manifest, print_.digest) for manifest in standing for print_ in found.needs.get(manifest, ())}
    queries.record_store(session, blobs.values(), sorted(edges), utcnow())


def _manifest(value: Mapping[str, Any]) -> Digest | None:
    return Digest.parse(value["manifest"]) if "manifest" in value else None
