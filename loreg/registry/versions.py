"""Versions of adapters, as the catalog and the blobs know them: stored, found again, listed, tagged."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from loreg.addresses import expanded, split
from loreg.catalog import Database, queries
from loreg.catalog.queries import TagMoveRow, VersionRow
from loreg.digest import Digest
from loreg.errors import NotFound, UsageError
from loreg.format.manifest import AdapterManifest
from loreg.format.reference import Reference, check_name, check_tag
from loreg.registry.checking import Checked, check
from loreg.registry.collecting import GRACE, Collected, collect
from loreg.registry.storage import PendingBlob, Storage, utcnow
from loreg.store import LocalStore, Store, open_store

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

LATEST = "latest"


@dataclass(frozen=True, slots=True)
class Version:
    """One version of an adapter. ``created``: whether this push made it, or found it there.

    ``left_out``: files of the pushed directory that are no part of an adapter and were not stored.
    """

    name: str
    number: int
    digest: Digest
    manifest: AdapterManifest
    created: bool = False
    left_out: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.name}:v{self.number}"


@lru_cache(maxsize=16)
def _manifest(data: bytes) -> AdapterManifest:
    """Parsed once while it is asked for: of 150 modules that takes 10 ms, as long as to load their factors."""
    return AdapterManifest.parse(data)


class Versions:
    """The versions of one registry. Knows no adapter's format but loreg's own, and no tensor."""

    def __init__(self, database: Database, storage: Storage) -> None:
        self.database = database
        self.storage = storage

    def commit_version(
        self,
        name: str,
        manifest: AdapterManifest,
        blobs: list[PendingBlob],
        tags: Iterable[str] = (),
        note: str | None = None,
    ) -> Version:
        """Store a manifest as a version of ``name``, and move ``latest`` and ``tags`` to it. ``blobs``: all that it
        needs, and itself, last."""
        digest = blobs[-1].digest

        def finish(session: Session) -> tuple[VersionRow, bool]:
            now = utcnow()
            queries.record_edges(session, digest, [blob.digest for blob in manifest.blobs])
            row, created = queries.add_version(
                session,
                name,
                digest,
                note=note,
                now=now,
                **queries.columns_of(manifest),
            )
            moving = dict.fromkeys(tags)
            if created or row.removed_at is not None:
                queries.follow_newest(session, name, LATEST, now)
                moving.pop(LATEST, None)
            for tag in moving:
                queries.move_tag(session, name, tag, row, queries.tag_seq(session, name, tag), now)
            return row, created

        row, created = self.storage.commit(blobs, finish)
        return Version(row.name, row.number, row.digest, manifest, created)

    def resolve(self, reference: str | Reference) -> Version:
        """``sql``, ``sql:prod``, ``sql:v2``, ``sql@blake3:…`` or ``blake3:…`` to a version, its manifest verified.

        Raises NotFound naming what is near, UsageError for a malformed or ambiguous reference.
        """
        return self.version(self.find(reference))

    def version(self, row: VersionRow) -> Version:
        """What ``resolve`` says of a row that was found. Raises NotFound, BadInput."""
        return Version(row.name, row.number, row.digest, _manifest(self.storage.read(row.digest)))

    def find(self, reference: str | Reference) -> VersionRow:
        """The catalog's row of a version, without reading its manifest. Raises as ``resolve``."""
        ref = Reference.parse(reference) if isinstance(reference, str) else reference
        with self.database.read() as session:
            if ref.name is not None:
                return queries.find_version(
                    session, ref.name, number=ref.number, tag=ref.tag, digest_prefix=ref.digest_prefix
                )
            blob = queries.blob_matching_prefix(session, ref.digest_prefix or "")
            rows = queries.versions_by_digest(session, blob.digest)
        if not rows:
            raise NotFound(f"{blob.digest} is a blob, not a version of an adapter; look with 'loreg ls'.")
        return rows[0]

    def digest_of(self, reference: str | Reference) -> Digest | None:
        """What a reference means now, None for nothing: one query, for who asks over and over. Raises UsageError."""
        ref = Reference.parse(reference) if isinstance(reference, str) else reference
        with self.database.read() as session:
            return queries.standing_digest(
                session, ref.name, number=ref.number, tag=ref.tag, digest_prefix=ref.digest_prefix
            )

    def list_versions(self, **conditions: Any) -> list[VersionRow]:
        """See ``catalog.queries.list_versions``: by base, rank, target, query; the newest of each name."""
        with self.database.read() as session:
            return queries.list_versions(session, **conditions)

    def log(self, name: str) -> tuple[list[VersionRow], list[TagMoveRow]]:
        """Every version of ``name``, and every move of its tags, oldest first. Raises NotFound."""
        with self.database.read() as session:
            return queries.versions_of(session, check_name(name)), queries.tag_history(session, name)

    def tags(self, name: str) -> dict[str, int]:
        """Tag → version number. Raises NotFound."""
        with self.database.read() as session:
            return {tag.name: tag.number for tag in queries.tags_of(session, name)}

    def tag(self, reference: str, tag: str) -> Version:
        """Point ``tag`` at a version. Raises Conflict if it moved meanwhile."""
        check_tag(tag)
        with self.storage.writing() as session:
            row = self._row(session, Reference.parse(reference))
            queries.move_tag(session, row.name, tag, row, queries.tag_seq(session, row.name, tag), utcnow())
        return self.resolve(Reference(row.name, number=row.number))

    # The trash

    def remove(self, reference: str, *, tags_to: str | None = None) -> VersionRow:
        """Put a version into the trash: nobody sees it, and ``restore`` takes it back until a collection does away
        with it. ``latest`` then is the newest that is left; other tags that point to it move to ``tags_to``.

        Raises NotFound; Conflict if tags point to it and ``tags_to`` is not given, UsageError if that is no other
        version of the same name.
        """
        with self.storage.writing() as session:
            row = self._row(session, Reference.parse(reference))
            other = self._row(session, Reference.parse(tags_to)) if tags_to is not None else None
            if other is not None and other.id == row.id:
                raise UsageError(f"{tags_to} is the version that is to be removed: move its tags to another one.")
            queries.remove_version(session, row, LATEST, other, utcnow())
        return row

    def restore(self, reference: str) -> VersionRow:
        """Take a version out of the trash, by its number: ``sql:v2``. Raises NotFound, UsageError."""
        ref = Reference.parse(reference)
        if ref.name is None or ref.number is None:
            raise UsageError(f"{reference} does not say which version: expected one by its number, as in sql:v2.")
        with self.storage.writing() as session:
            return queries.restore_version(session, ref.name, ref.number, LATEST, utcnow())

    def trash(self) -> list[VersionRow]:
        """What was removed and can be taken back, the last one first."""
        with self.database.read() as session:
            return queries.removed_versions(session)

    def collect(self, *, grace: timedelta = GRACE, dry_run: bool = False) -> Collected:
        """Delete what nothing needs, and versions that have been in the trash for ``grace``. See
        ``registry.collecting``."""
        return collect(self.storage, grace=grace, dry_run=dry_run)

    def fsck(
        self,
        *,
        repair: bool = False,
        sources: Iterable[str | Path] = (),
        advance: Callable[[int], object] = lambda _: None,
    ) -> Checked:
        """Read and compare everything that is stored. ``repair``: mend what can be, from other copies here and from
        ``sources``: homes of other registries, addresses of stores, and versions on the Hub. Raises NotFound if one
        is none, UsageError for sources without ``repair``. See ``registry.checking``."""
        given = list(sources)
        if given and not repair:
            raise UsageError("Copies are only taken from other places to mend something: give --repair with --from.")
        with ExitStack() as stack:
            others = [_source(source, stack) for source in given]
            return check(self.storage, repair=repair, sources=others, advance=advance)

    @staticmethod
    def _row(session: Session, ref: Reference) -> VersionRow:
        if ref.name is None:
            raise UsageError(f"{ref} names no adapter: expected 'name', 'name:tag' or 'name@blake3:…'.")
        return queries.find_version(
            session, ref.name, number=ref.number, tag=ref.tag, digest_prefix=ref.digest_prefix
        )


def _source(place: str | Path, stack: ExitStack) -> Store:
    """Where good copies may be; what has to be fetched for that lies below a directory for as long as ``stack``."""
    if str(place).startswith("hf://"):
        from loreg.registry.syncing import fetch_store

        return fetch_store(str(place), Path(stack.enter_context(TemporaryDirectory())))
    scheme, _ = split(place, "a source of copies", "a registry's home, a store's address or hf://owner/name")
    if scheme is not None:
        return open_store(place)
    home = expanded(place)
    if not (home / "blobs").is_dir():
        raise NotFound(
            f"{home} is not the home of a registry: expected a directory with {home / 'blobs'}, a store's address or "
            "hf://owner/name."
        )
    return LocalStore(home)
