"""Checking a store and its catalog against each other, and mending what can be mended.

Everything is read: each copy of each blob, each manifest, each edge and each column that repeats a manifest, and what
the store has that the catalog does not know. A repair takes a good copy from wherever there is one, and puts what is
damaged aside: into quarantine, never away.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from loreg.catalog import queries
from loreg.digest import Digest, Fingerprint, fingerprint
from loreg.errors import BadInput, Conflict, LoregError, NotFound, RemoteError
from loreg.format.base import BaseManifest
from loreg.format.manifest import AdapterManifest
from loreg.registry.auditing import audit
from loreg.registry.problem import Problem
from loreg.registry.storage import Storage, utcnow
from loreg.store import BlobKey, Store, new_generation, pieces


@dataclass(frozen=True, slots=True)
class Checked:
    """``blobs``: how many copies were read. ``orphans``: copies that no row knows, which a collection deletes."""

    blobs: int
    orphans: int
    problems: tuple[Problem, ...]

    @property
    def ok(self) -> bool:
        """Whether all is well now."""
        return all(problem.repaired for problem in self.problems)


def check(
    storage: Storage,
    *,
    repair: bool = False,
    sources: Sequence[Store] = (),
    advance: Callable[[int], object] = lambda _: None,
) -> Checked:
    """Check everything; with ``repair`` mend it from other copies in the store, and from ``sources``.

    ``advance`` is told the bytes that were read. Raises what the catalog raises if it cannot be read at all.
    """
    run = _Run(storage, repair, sources, advance)
    run.owner()
    run.catalog()
    damaged = bool(run.problems)
    try:
        run.blobs()
        run.names()
        run.manifests()
    except Exception as error:
        if not damaged:
            raise
        # Rows that cannot be may break anything that reads them: what was found is said all the same.
        run.problems.append(Problem("catalog", "the catalog", f"the rest could not be checked: {error}"))
    return Checked(run.read, run.orphans, tuple(run.problems))


@dataclass
class _Run:
    storage: Storage
    repair: bool
    sources: Sequence[Store]
    advance: Callable[[int], object]
    problems: list[Problem] = field(default_factory=list)
    read: int = 0
    orphans: int = 0

    def catalog(self) -> None:
        """What the catalog says of itself that cannot be."""
        self.problems += [Problem("catalog", "the catalog", said) for said in self._contradictions()]

    def names(self) -> None:
        """What the catalog says other than the ledger, whose repair may mend contradictions too."""
        self.problems += audit(self.storage, self.repair)
        if self.repair:
            left = self._contradictions()
            self.problems = [
                replace(problem, repaired="written anew from the ledger")
                if problem.what == "the catalog" and problem.found not in left
                else problem
                for problem in self.problems
            ]

    def _contradictions(self) -> list[str]:
        with self.storage.database.read() as session:
            return queries.contradictions(session)

    def owner(self) -> None:
        """Whose the store is. One that is not this catalog's is looked at, but nothing of either is changed: rows
        that spoke of its copies would leave the right ones to the next collection."""
        try:
            self.storage.recorder.check()
        except (BadInput, Conflict) as error:
            mended = "written anew" if self.repair and self.storage.recorder.reclaim() else None
            said = f"{error} Nothing else was repaired." if self.repair and not mended else str(error)
            self.problems.append(Problem("catalog", "store.json", said, repaired=mended))
            self.repair = self.repair and mended is not None

    def blobs(self) -> None:
        """Each row's own copy; then what the store has besides."""
        copies = defaultdict(list)
        for key in self.storage.store.keys():  # noqa: SIM118 - not a dict
            copies[key.digest].append(key)
        with self.storage.database.read() as session:
            rows = queries.every_blob(session)
        for row in rows:
            key = BlobKey(row.digest, row.generation)
            others = [other for other in copies.pop(row.digest, []) if other != key]
            self.orphans += len(others)
            if row.state != "live":
                self._marked(row.digest)
            elif (wrong := self._wrong(self.storage.store, key, row)) is not None:
                self._damaged(key, row, *wrong, others)
        self.orphans += sum(len(keys) for keys in copies.values())

    def _wrong(self, store: Store, key: BlobKey, expected: Any) -> tuple[str, str] | None:
        """What is wrong with a copy: its kind, and in words."""
        try:
            found = fingerprint(pieces(store, key, self.advance))
        except NotFound:
            return "missing", "there is no copy in the store"
        except RemoteError:
            raise  # it says nothing of the copy
        except LoregError as error:
            return "unreadable", f"it cannot be read: {error}"
        self.read += 1
        if found.digest != expected.digest:  # once more: bytes may change on their way too
            with suppress(LoregError):
                found = fingerprint(pieces(store, key, self.advance))
        if found.digest == expected.digest:  # then the copy is good, and if something is wrong it is the row
            right = found == Fingerprint(expected.digest, expected.sha256, expected.size)
            return None if right else ("row", "the catalog has another size or SHA-256 of it")
        return "corrupt", f"its {found.size:,} bytes hash to {found.digest}, expected {expected.size:,}"

    def _damaged(self, key: BlobKey, row: Any, kind: str, found: str, others: Sequence[BlobKey]) -> None:
        with self.storage.database.read() as session:
            touches = tuple(queries.touched_by(session, key.digest))
            now = queries.find_blob(session, key.digest)
            if now is None or (now.generation, now.state) != (key.generation, "live"):
                return  # collected or written anew since the rows were read
        problem = Problem(kind, str(key.digest), found, touches)
        if self.repair and kind == "row":
            found_now = fingerprint(pieces(self.storage.store, key, self.advance))
            with self.storage.database.write() as session:
                if queries.restate_copy(session, found_now, key.generation):
                    problem = replace(problem, repaired="written anew from the copy")
        elif self.repair:
            # Pinned as by a push: a collector may be about to delete any copy that no row knows.
            with self.storage.pinned([key.digest]) as lease:
                problem = replace(problem, repaired=self._mended(lease, key, row, others))
                if kind == "corrupt" and self.storage.store.size(key) is not None:
                    where = self.storage.store.quarantine(key)
                    problem = replace(problem, found=f"{found}; the bytes are kept in {where}")
                with self.storage.database.write() as session:
                    queries.release_lease(session, lease)
        self.problems.append(problem)

    def _mended(self, lease: str, key: BlobKey, row: Any, others: Sequence[BlobKey]) -> str | None:
        """How a good copy came into the row, None if there is none. It is a fresh one, as a collector may have marked
        the others before the lease."""
        here = [(self.storage.store, other) for other in others]
        there = [(store, other) for store in self.sources for other in store.keys() if other.digest == key.digest]  # noqa: SIM118
        for store, other in (*here, *there):
            wrong = self._wrong(store, other, row)
            if wrong is not None and wrong[0] != "row":
                continue
            generation = new_generation()
            with suppress(NotFound):  # it has just been collected
                self.storage.store.put(key.digest, generation, pieces(store, other, self.advance))
                if self._adopt(lease, key, generation):
                    return f"mended by {'another copy' if store is self.storage.store else f'the copy in {store}'}"
        return None

    def _adopt(self, lease: str, key: BlobKey, generation: str) -> bool:
        """Have the row vouch for that copy, if it still vouches for ``key``; whether it did.

        Raises Conflict if the store is not the catalog's own any more: a check runs for hours, and a disk may go.
        """
        self.storage.recorder.own()
        with self.storage.database.write() as session:
            queries.require_lease(session, lease, utcnow())
            there = self.storage.store.size(BlobKey(key.digest, generation)) is not None
            return there and queries.adopt_copy(session, key.digest, key.generation, generation)

    def _marked(self, digest: Digest) -> None:
        """A blob that a collector has marked is one that nothing needs."""
        with self.storage.database.read() as session:
            touches = tuple(queries.touched_by(session, digest))
        if not touches:
            return
        problem = Problem("state", str(digest), "it is marked to be deleted", touches)
        if self.repair:
            with self.storage.database.write() as session:
                row = queries.find_blob(session, digest)
                if row is not None and queries.adopt_copy(session, digest, row.generation, row.generation):
                    problem = replace(problem, repaired="unmarked")
        self.problems.append(problem)

    def manifests(self) -> None:
        with self.storage.database.read() as session:
            roots = queries.roots(session)
        for digest, is_adapters in roots.items():
            with suppress(NotFound):  # which is among the problems already
                key = self.storage.key(digest)
                with suppress(BadInput, NotFound):
                    raw = self.storage.store.read(key)
                    self._manifest(digest, raw, is_adapters)

    def _manifest(self, digest: Digest, raw: bytes, is_adapters: bool) -> None:
        try:
            manifest = AdapterManifest.parse(raw) if is_adapters else BaseManifest.parse(raw)
        except BadInput as error:
            with self.storage.database.read() as session:
                touches = tuple(queries.touched_by(session, digest))
            if touches:
                self.problems.append(Problem("manifest", str(digest), str(error), touches))
            return
        if isinstance(manifest, AdapterManifest):
            self._edges(digest, manifest)
        self._columns(digest, manifest)

    def _edges(self, digest: Digest, manifest: AdapterManifest) -> None:
        needed = {blob.digest for blob in manifest.blobs}
        with self.storage.database.read() as session:
            known = queries.needed_by(session, digest)
            touches = tuple(queries.touched_by(session, digest))
        if needed == known or not touches:  # nothing stands for it: it has just been collected
            return
        found = (
            f"of its blobs the catalog does not know {len(needed - known)}, and knows {len(known - needed)} of others"
        )
        problem = Problem("edges", str(digest), found, touches)
        if self.repair:
            with self.storage.database.write() as session:
                if queries.touched_by(session, digest):
                    queries.set_edges(session, digest, needed)
                if queries.needed_by(session, digest) == needed:
                    problem = replace(problem, repaired="written anew from the manifest")
        self.problems.append(problem)

    def _columns(self, digest: Digest, manifest: AdapterManifest | BaseManifest) -> None:
        columns = queries.columns_of(manifest)
        if isinstance(manifest, AdapterManifest):
            columns["search"] = True
        with self.storage.database.read() as session:
            described = queries.described(session, digest)
            touches = tuple(queries.touched_by(session, digest))
        for row, said in described.items():
            wrong = [name for name, value in columns.items() if said[name] != value]
            if not wrong:
                continue
            problem = Problem("columns", str(digest), f"the catalog repeats it wrongly: {', '.join(wrong)}", touches)
            if self.repair:
                with self.storage.database.write() as session:
                    queries.describe(session, row, columns)
                problem = replace(problem, repaired="written anew from the manifest")
            self.problems.append(problem)
