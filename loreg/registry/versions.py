"""Versions of adapters, as the catalog and the blobs know them: stored, found again, listed, tagged."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loreg.catalog import Database, queries
from loreg.catalog.queries import TagMoveRow, VersionRow
from loreg.digest import Digest
from loreg.errors import NotFound, UsageError
from loreg.format.manifest import AdapterManifest
from loreg.format.reference import Reference, check_name, check_tag
from loreg.registry.storage import PendingBlob, Storage, utcnow

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
        """Store a manifest and its blobs as a version of ``name``, and move ``latest`` and ``tags`` to it."""

        def finish(session: Session) -> tuple[VersionRow, bool]:
            now = utcnow()
            queries.record_edges(session, manifest.digest, [blob.digest for blob in manifest.blobs])
            row, created = queries.add_version(
                session,
                name,
                manifest.digest,
                base_root=manifest.base.identity.weights_root,
                base_name=manifest.base.name,
                rank=manifest.rank,
                modules=len(manifest.modules),
                bytes=manifest.nbytes,
                targets=manifest.targets,
                note=note,
                now=now,
            )
            for tag in dict.fromkeys([*([LATEST] if created else []), *tags]):
                queries.move_tag(session, name, tag, row, queries.tag_seq(session, name, tag), now)
            return row, created

        row, created = self.storage.commit(blobs, finish)
        return Version(row.name, row.number, row.digest, manifest, created)

    def resolve(self, reference: str | Reference) -> Version:
        """``sql``, ``sql:prod``, ``sql:v2``, ``sql@blake3:…`` or ``blake3:…`` to a version, its manifest verified.

        Raises NotFound naming what is near, UsageError for a malformed or ambiguous reference.
        """
        row = self.find(reference)
        return Version(row.name, row.number, row.digest, AdapterManifest.parse(self.storage.read(row.digest)))

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
        with self.database.write() as session:
            row = self._row(session, Reference.parse(reference))
            queries.move_tag(session, row.name, tag, row, queries.tag_seq(session, row.name, tag), utcnow())
        return self.resolve(Reference(row.name, number=row.number))

    @staticmethod
    def _row(session: Session, ref: Reference) -> VersionRow:
        if ref.name is None:
            raise UsageError(f"{ref} names no adapter: expected 'name', 'name:tag' or 'name@blake3:…'.")
        return queries.find_version(
            session, ref.name, number=ref.number, tag=ref.tag, digest_prefix=ref.digest_prefix
        )
