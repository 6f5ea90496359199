"""Bases: registering them, finding them again, and the cache that spares hashing them twice."""

from __future__ import annotations

import difflib
import json
import re
from dataclasses import astuple, dataclass, replace
from pathlib import Path

from loreg.addresses import expanded
from loreg.catalog import Database, queries
from loreg.catalog.models import BaseRow
from loreg.checkpoint import Advance, Checkpoint, FileStamp, read_whole
from loreg.digest import Digest
from loreg.errors import BadInput, BaseMismatch, NotFound, RemoteError, UsageError
from loreg.format.base import BaseManifest, BaseReference, HubPin
from loreg.format.recipe import MergeRecord, Recipe
from loreg.format.reference import check_name
from loreg.registry.storage import PendingBlob, Storage, utcnow
from loreg.store import BlobKey


@dataclass(frozen=True)
class Base:
    """A registered base. ``path`` is where its files were last seen, and may be gone."""

    name: str
    manifest: BaseManifest
    path: Path | None
    hub: HubPin | None
    recipe: Recipe | None = None

    def reference(self) -> BaseReference:
        """What an adapter's manifest says of it, without ``touched`` [M3]."""
        return BaseReference(self.name, self.hub, self.manifest.identity, {}, self.recipe)

    def open(self) -> Checkpoint:
        """Its files. Raises NotFound if they are gone."""
        if self.path is None or not self.path.exists():
            place = f"it was at {self.path}" if self.path else "it has no path"
            raise NotFound(f"The files of base {self.name!r} are gone ({place}): give --base PATH.")
        return Checkpoint.open(self.path)


class LeafCache:
    """The catalog's memory of hashed files, by device, inode, size and times."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def get(self, stamp: FileStamp) -> str | None:
        with self._database.read() as session:
            found = queries.cached_leaves(session, astuple(stamp))
        return found if found and found.startswith("{") else None  # else it is a blob's: see registry.verified

    def put(self, stamp: FileStamp, leaves: str) -> None:
        with self._database.write() as session:
            queries.remember_leaves(session, astuple(stamp), leaves, utcnow())


class Bases:
    """The bases of one registry."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._database = storage.database
        self.cache = LeafCache(storage.database)
        self._last: tuple[Digest, BaseManifest] | None = None  # of what is pushed, most are for one base

    def add(self, source: str | Path, name: str | None, revision: str | None, advance: Advance) -> Base:
        """Hash the model at ``source`` (a path, or a Hub id) and register it. See ``Registry.add_base``."""
        return self.register(self._look(source, name, revision, advance))

    def _look(self, source: str | Path, name: str | None, revision: str | None, advance: Advance) -> Base:
        path, hub = _locate(source, revision)
        checkpoint = Checkpoint.open(path)
        manifest = checkpoint.manifest(self.cache, advance)
        identity = manifest.identity
        chosen = (
            check_name(name) if name is not None else self._free_name(_suggest(source, hub), identity.weights_root)
        )
        return Base(chosen, manifest, path.resolve(), hub, _recipe_beside(path, identity.weights_root))

    def add_dequantised(
        self,
        source: str | Path,
        name: str | None,
        revision: str | None,
        out: Path,
        dtype: str | None,
        advance: Advance,
    ) -> Base:
        """Make the 16-bit model of the quantised one at ``source`` in ``out``, and register that."""
        from loreg.registry.dequantising import dequantise

        path, _ = _locate(source, revision)
        checkpoint = Checkpoint.open(path)
        manifest = dequantise(checkpoint, out, advance, source=checkpoint.manifest(self.cache, advance), dtype=dtype)
        root = manifest.identity.weights_root
        chosen = check_name(name) if name is not None else self._free_name(_suggest(out, None), root)
        return self.register(Base(chosen, manifest, out.resolve(), None))

    def register(self, base: Base) -> Base:
        """Write a base that was looked at into the catalog; one that is there is brought up to date."""
        blob = PendingBlob.of(base.manifest.dump())
        if self._is_registered(base, blob):
            return base
        self._storage.commit(
            [blob],
            lambda session: queries.add_base(
                session,
                base.name,
                manifest=blob.digest,
                now=utcnow(),
                hub_repo=base.hub.repo if base.hub else None,
                hub_commit=base.hub.commit if base.hub else None,
                hub_files=json.dumps(dict(base.hub.files)) if base.hub else None,
                path=str(base.path) if base.path else None,
                **queries.columns_of(base.manifest),
            ),
        )
        return base

    def _is_registered(self, base: Base, blob: PendingBlob) -> bool:
        """Whether the catalog says all of it, and its manifest is there: then no push waits for the disk."""
        with self._database.read() as session:
            row = queries.find_base(session, name=base.name)
            found = queries.find_blob(session, blob.digest)
        hub = (base.hub.repo, base.hub.commit, json.dumps(dict(base.hub.files))) if base.hub else None
        return (
            row is not None
            and found is not None
            and found.state == "live"
            and row.manifest == blob.digest
            and row.path == (str(base.path) if base.path else row.path)
            and (hub is None or hub == (row.hub_repo, row.hub_commit, row.hub_files))
            and self._storage.store.size(BlobKey(blob.digest, found.generation)) == blob.fingerprint.size
        )

    def find(self, spec: str | Path, advance: Advance) -> Base:
        """A base by its name, its path or its Hub id. Writes nothing: ``register`` it once it is accepted."""
        if isinstance(spec, str):
            with self._database.read() as session:
                row = queries.find_base(session, name=spec)
            if row is not None:
                return self._load(row)
        try:
            return self._look(spec, None, None, advance)
        except (NotFound, RemoteError) as error:
            # Mistyped, most likely: say what there is, besides what became of looking it up.
            known = [row.name for row in self.all()]
            if near := difflib.get_close_matches(str(spec), known):
                raise NotFound(
                    f"No base is called {str(spec)!r}: did you mean {' or '.join(near)}? {error}"
                ) from error
            raise type(error)(f"{error} Registered bases: {', '.join(known) or 'none'}.") from error

    def of_root(self, weights_root: Digest, name: str | None = None) -> Base | None:
        """The registered base with these weights.

        Of several, one whose files are there; then the one called ``name``; then the one that was first. Their
        tensors are the same, the files beside them need not be.
        """
        with self._database.read() as session:
            rows = [row for row in queries.list_bases(session) if row.weights_root == weights_root]
        rows.sort(key=lambda row: (row.path is None or not Path(row.path).exists(), row.name != name, row.id))
        return self._load(rows[0]) if rows else None

    def all(self) -> list[BaseRow]:
        with self._database.read() as session:
            return queries.list_bases(session)

    def show(self, name: str) -> Base:
        """A registered base by its name. Raises NotFound."""
        with self._database.read() as session:
            row = queries.find_base(session, name=name)
            known = [other.name for other in queries.list_bases(session)] if row is None else []
        if row is None:
            listed = f"there are {', '.join(known)}" if known else "there are none yet"
            raise NotFound(f"No base is called {name!r}: {listed}; add it with 'loreg base add'.")
        return self._load(row)

    def _load(self, row: BaseRow) -> Base:
        if self._last is None or self._last[0] != row.manifest:
            self._last = row.manifest, BaseManifest.parse(self._storage.read(row.manifest))
        _, manifest = self._last
        if manifest.identity.weights_root != row.weights_root:
            raise BadInput(f"The manifest of base {row.name!r} does not have its weights_root; add the base again.")
        hub = None
        if row.hub_repo and row.hub_commit:
            hub = HubPin(row.hub_repo, row.hub_commit, json.loads(row.hub_files or "{}"))
        path = Path(row.path) if row.path else None
        return Base(row.name, manifest, path, hub, _recipe_beside(path, row.weights_root))

    def _free_name(self, suggestion: str, root: Digest) -> str:
        """The suggestion, or with a piece of the digest behind it where the name stands for other weights."""
        with self._database.read() as session:
            row = queries.find_base(session, name=suggestion)
        return suggestion if row is None or row.weights_root == root else f"{suggestion[:100]}-{root.short}"


def check_files(base: Base, checkpoint: Checkpoint, cache: LeafCache, advance: Advance) -> BaseManifest:
    """The identity of the files now. Raises BaseMismatch if they are not what was registered."""
    manifest = checkpoint.manifest(cache, advance)
    if manifest != base.manifest:
        before = base.manifest.by_name()
        differing = [tensor.name for tensor in manifest.tensors if before.get(tensor.name) != tensor]
        named = f", first {differing[0]!r}" if differing else ""
        raise BaseMismatch(
            f"The files at {checkpoint.root} are not base {base.name!r} any more: {len(differing)} tensors differ"
            f"{named}; restore them, or add them under another name."
        )
    return manifest


def _locate(source: str | Path, revision: str | None) -> tuple[Path, HubPin | None]:
    path = expanded(source)
    if path.exists():
        if revision is not None:
            raise UsageError(f"{source} is a directory here, and --revision is for Hub ids: give one of them.")
        return path, None
    text = str(source)
    if isinstance(source, Path) or text.startswith((".", "/", "~")) or text.count("/") > 1:
        raise NotFound(f"{source} does not exist: expected the directory of a model, or a Hub id.")
    from loreg import hub

    ref = hub.HubRef.parse_id(text)
    pin, folder = hub.snapshot(replace(ref, revision=revision) if revision else ref, verify=True)
    weights = {path: sha256 for path, sha256 in pin.sha256s.items() if path.endswith(".safetensors")}
    return folder, HubPin(pin.repo, pin.commit, weights)


def _recipe_beside(path: Path | None, root: Digest) -> Recipe | None:
    """How the base was merged, if it was: its ``loreg.json``, as long as that speaks of these very weights."""
    record = path / "loreg.json" if path else None
    if record is None or not record.is_file():
        return None
    merged = MergeRecord.parse(read_whole(record))
    return merged.recipe if merged.weights_root == root else None


def _suggest(source: str | Path, hub: HubPin | None) -> str:
    text = hub.repo if hub else Path(source).resolve().name
    cleaned = re.sub(r"[^a-z0-9._/-]+", "-", text.lower()).strip("-._/")
    return cleaned if cleaned else "base"
