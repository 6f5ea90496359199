"""``resolve``: a reference to an immutable directory that any engine loads as a PEFT adapter.

Engines key their caches by name and path (vLLM's KV cache does), so the directory is named by the version's
digest and never overwritten: a tag that moves is a new path.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from loreg.digest import Digest, fingerprint
from loreg.errors import BadInput, Conflict
from loreg.registry import Registry, Version
from loreg.registry import open as open_registry
from loreg.registry.exporting import Files, peft_directory
from loreg.staging import staged, sync_tree


@dataclass(frozen=True, slots=True)
class Resolved:
    """A version ready to be served. ``path``: its PEFT directory; ``base``: the weights_root it belongs to.

    ``max_rank``: the largest rank of a module. ``nbytes``: the size of the files.
    """

    digest: Digest
    path: Path
    base: Digest
    max_rank: int
    nbytes: int


def resolve(reference: str, registry: Registry | None = None, *, cache: Path | None = None) -> Resolved:
    """The directory of a version, made on first use and checked against its digests on every call.

    ``registry``: default ``loreg.open()``. ``cache``: where directories are kept, default ``serving/`` in the
    registry's home. Atomic: whoever finds the directory finds all of it, and two callers get the same one.
    Raises NotFound for an unknown reference, BadInput if a file in the cache is damaged, Unsupported for a
    version that has no PEFT form.
    """
    if registry is None:
        with open_registry() as opened:
            return resolve(reference, opened, cache=cache)
    version = registry.resolve(reference)
    path = (cache or registry.home / "serving") / version.digest.hex
    if not path.is_dir():
        try:
            _write(peft_directory(registry.storage, version), path, version)
        except Conflict:
            # Another caller was faster: a directory of this name can only be the same one, and whole.
            if not path.is_dir():
                raise
    size = _check(path, version, peft_directory(registry.storage, version))
    return Resolved(version.digest, path, version.manifest.base.identity.weights_root, version.manifest.rank, size)


def _write(files: Files, path: Path, version: Version) -> None:
    with staged(path, version.digest, wait=True) as folder:
        for name, chunks in files:
            with (folder / name).open("wb") as file:
                for chunk in chunks:
                    file.write(chunk)
        sync_tree(folder)


def _check(path: Path, version: Version, expected: Files) -> int:
    """The size of the files in bytes, each of which is what the verified blobs of the store make of it."""
    size = 0
    for name, chunks in expected:
        file, wanted = path / name, fingerprint(chunks)
        if not file.is_file() or _digest(file) != wanted.digest:
            raise BadInput(
                f"{file}, served for {version}, is damaged: expected {wanted.digest}; remove {path}, and it is made "
                "again."
            )
        size += wanted.size
    return size


def _digest(path: Path) -> Digest:
    with path.open("rb") as file:
        return fingerprint(iter(lambda: file.read(1 << 20), b"")).digest
