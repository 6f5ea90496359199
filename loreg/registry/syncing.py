"""A version on the Hub: a plain PEFT adapter that anyone can load, and ``loreg.json``, its manifest.

What the PEFT files do not hold to the bit (a composed version's own factors, those of a pickled original) goes
beside them as ``loreg/<digest>.safetensors``. On the way back the manifest and every blob are made again and
checked against their digests, so a version that was pushed here and pulled there is the same version.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from loreg import hub
from loreg.adapters.draft import RawTensor
from loreg.errors import NotFound, RemoteError
from loreg.format.manifest import AdapterManifest, BlobRef, SourceFile
from loreg.format.reference import check_name, check_tag
from loreg.registry.core import Registry, Version
from loreg.registry.exporting import peft_directory
from loreg.registry.packing import tensors_blob
from loreg.registry.storage import PendingBlob
from loreg.store import LocalStore, Store, new_generation

MANIFEST = "loreg.json"


def sync_push(registry: Registry, reference: str, remote: str, private: bool) -> str:
    """See ``Registry.sync_push``."""
    ref = hub.HubRef.parse(remote)
    version = registry.resolve(reference)
    with tempfile.TemporaryDirectory() as scratch:
        files: dict[str, Path | bytes] = {}
        for name, chunks in peft_directory(registry.storage, version):
            files[name] = path = Path(scratch) / name
            with path.open("wb") as file:
                for chunk in chunks:
                    file.write(chunk)
        files[MANIFEST] = version.manifest.dump()
        for blob in _beside(version.manifest):
            files[_name(blob)] = registry.storage.path(blob.digest)
        return hub.send(ref, files, f"loreg: {version} ({version.digest})", private)


def sync_pull(registry: Registry, remote: str, name: str, tags: Iterable[str]) -> Version:
    """See ``Registry.sync_pull``."""
    check_name(name)
    wanted = [check_tag(tag) for tag in tags]
    with tempfile.TemporaryDirectory() as scratch:
        pin, manifest, found = _fetch(remote, Path(scratch))
        made = {blob.digest: blob for blob in found}
        missing = [blob for blob in manifest.blobs if blob.digest not in made]
        if missing:
            raise RemoteError(
                f"{pin.ref} is not what its {MANIFEST} says: the {missing[0].role} blob {missing[0].digest} cannot "
                "be made from its files; nothing was stored."
            )
        blobs = [made[blob.digest] for blob in manifest.blobs]
        return registry.commit_version(name, manifest, [*blobs, PendingBlob.of(manifest.dump())], wanted)


def fetch_store(remote: str, folder: Path) -> Store:
    """What a version on the Hub can give back of damaged blobs, as a store in ``folder``. Raises as ``sync_pull``."""
    _, manifest, blobs = _fetch(remote, folder / "files")
    store = LocalStore(folder)
    for blob in (*blobs, PendingBlob.of(manifest.dump())):
        store.put(blob.digest, new_generation(), blob.chunks())
    return store


def _fetch(remote: str, folder: Path) -> tuple[hub.HubPin, AdapterManifest, Iterator[PendingBlob]]:
    """The manifest of a version, and every blob that its files can make, which are fetched into ``folder``."""
    pin = hub.pin(hub.HubRef.parse(remote))
    if MANIFEST not in {file.path for file in pin.files}:
        raise NotFound(
            f"{pin.ref} has no {MANIFEST}, so it does not say which base it is for, by its bytes: download it and "
            "push it with 'loreg push DIR --base BASE'."
        )
    hub.fetch(pin, [MANIFEST], folder)
    manifest = AdapterManifest.parse((folder / MANIFEST).read_bytes())
    sources = manifest.source.files if manifest.source else ()
    hub.fetch(pin, [*(file.name for file in sources), *map(_name, _beside(manifest))], folder)
    return pin, manifest, _blobs(manifest, folder)


def _beside(manifest: AdapterManifest) -> list[BlobRef]:
    """The blobs that the original files do not hold, and that are sent as files of their own."""
    held = {place for file in (manifest.source.files if manifest.source else ()) for place in file.tensors}
    full = {tensor.blob for name, tensor in manifest.full.items() if f"full:{name}" not in held}
    factors = {f"factors:{name}" for name in manifest.factor_tensors()} - held
    return [b for b in manifest.blobs if b.digest in full or (b.role == "factors" and factors)]


def _name(blob: BlobRef) -> str:
    return f"loreg/{blob.digest.hex}.safetensors"


def _blobs(manifest: AdapterManifest, folder: Path) -> Iterator[PendingBlob]:
    """Every blob that the fetched files can make; what they are is for the caller to compare."""
    places: dict[str, RawTensor] = {}
    sizes = {blob.digest: blob.size for blob in manifest.blobs}
    for file in manifest.source.files if manifest.source else ():
        path = folder / file.name
        if not file.tensors:
            yield PendingBlob.of_file(path)
            continue
        with path.open("rb") as opened:
            yield PendingBlob.of(opened.read(sizes[file.blob]))
        places.update(_slices(manifest, file, path, sizes[file.blob]))
    for blob in _beside(manifest):
        yield PendingBlob.of_file(folder / _name(blob))
    factors = {name: places[f"factors:{name}"] for name in manifest.factor_tensors() if f"factors:{name}" in places}
    if factors:
        yield tensors_blob(factors)
    for name in manifest.full:
        if f"full:{name}" in places:
            yield tensors_blob({"tensor": places[f"full:{name}"]})


def _slices(manifest: AdapterManifest, file: SourceFile, path: Path, offset: int) -> Iterator[tuple[str, RawTensor]]:
    """The tensors of an original file, one behind the other after its header [M8]."""
    refs = {f"factors:{name}": ref for name, ref in manifest.factor_tensors().items()}
    refs |= {f"full:{name}": tensor.value for name, tensor in manifest.full.items()}
    for place in file.tensors:
        ref = refs[place]
        yield place, RawTensor(place, ref.dtype, ref.shape, path, offset)
        offset += ref.nbytes
