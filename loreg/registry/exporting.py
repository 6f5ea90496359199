"""Giving a version back: the very bytes that were pushed, or a PEFT directory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path

from loreg.adapters.draft import RawTensor
from loreg.adapters.peft_export import folded_files, peft_files
from loreg.checkpoint import open_binary
from loreg.digest import Digest, DoubleHasher
from loreg.errors import BadInput, NotFound, UsageError
from loreg.format.manifest import AdapterManifest, SourceFile
from loreg.format.safetensors import read_header
from loreg.registry.bases import Bases
from loreg.registry.storage import Storage
from loreg.registry.versions import Version
from loreg.staging import staged, sync_tree

Files = Iterator[tuple[str, Iterable[bytes | memoryview]]]


def export(storage: Storage, version: Version, out: Path, format_: str) -> Path:
    """See ``Registry.export``. Raises Conflict if ``out`` is taken, NotFound if there is no original."""
    if format_ not in FORMATS:
        raise UsageError(f"{format_!r} is not a format that loreg exports: expected one of {', '.join(FORMATS)}.")
    files = FORMATS[format_](storage, version)
    with staged(out, version.digest) as folder:
        for name, chunks in files:
            with (folder / name).open("wb") as file:
                for chunk in chunks:
                    file.write(chunk)
                file.flush()
                os.fsync(file.fileno())
        sync_tree(folder)
    return out


def peft_directory(storage: Storage, version: Version) -> Files:
    """A directory that PEFT loads: the original one, where it came from PEFT."""
    source = version.manifest.source
    if source is not None and source.format == "peft":
        return original_files(storage, version)
    base = version.manifest.base
    known = Bases(storage).of_root(base.identity.weights_root, base.name)
    stored = known.manifest.by_name() if known else ()
    return peft_files(version.manifest, tensor_reader(storage, version.manifest), stored)


def folded_directory(storage: Storage, version: Version) -> Files:
    """The same with every scale folded into B, and all ranks the same. See ``folded_files``."""
    return folded_files(version.manifest, tensor_reader(storage, version.manifest))


def original_files(storage: Storage, version: Version) -> Files:
    """Every file as it was pushed [M8], each checked against its sha256 as it is read. Raises NotFound."""
    source = version.manifest.source
    if source is None:
        raise NotFound(f"{version} was composed here and never pushed as files: export it with --format peft.")
    read = tensor_reader(storage, version.manifest)
    for file in source.files:
        yield file.name, _source_chunks(storage, version, file, read)


def _source_chunks(
    storage: Storage, version: Version, file: SourceFile, read: Callable[[str], RawTensor]
) -> Iterator[bytes | memoryview]:
    hasher = DoubleHasher()
    blob = storage.read(file.blob)
    hasher.update(blob)
    yield blob
    for name in file.tensors:
        for chunk in read(name).chunks():
            hasher.update(chunk)
            yield chunk
    found = hasher.result()
    if (found.sha256, found.size) != (file.sha256, file.size):
        raise BadInput(
            f"{file.name} of {version} cannot be given back: expected sha256 {file.sha256}, found {found.sha256}; "
            "restore the store from a backup, or push it again."
        )


def tensor_reader(storage: Storage, manifest: AdapterManifest) -> Callable[[str], RawTensor]:
    """Brings ``factors:NAME`` and ``full:NAME`` from the blobs of a version, verified."""

    @cache
    def tensors(digest: Digest) -> dict[str, RawTensor]:
        blob = storage.path(digest)  # once for all of its tensors: it may have to be hashed
        with open_binary(blob) as file:
            header = read_header(file, blob.stat().st_size, what=f"blob {blob.name}")
        start = header.data_start
        return {t.name: RawTensor(t.name, t.dtype, t.shape, blob, start + t.start) for t in header.tensors}

    factors = manifest.blob("factors")

    def read(place: str) -> RawTensor:
        role, _, name = place.partition(":")
        blob = manifest.full[name].blob if role == "full" else factors.digest if factors else None
        found = tensors(blob).get("tensor" if role == "full" else name) if blob else None
        if found is None:
            raise BadInput(
                f"The manifest lists {place!r}, which its blob does not hold; it is damaged: push it again."
            )
        return found

    return read


FORMATS: Mapping[str, Callable[[Storage, Version], Files]] = {
    "original": original_files,
    "peft": peft_directory,
    "folded": folded_directory,
}
