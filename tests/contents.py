"""What can be pushed without an adapter on disk: manifests and blobs, made once, for tests that push thousands."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import tiny

import loreg
from loreg.digest import Digest
from loreg.format.manifest import AdapterManifest
from loreg.registry.storage import PendingBlob


@dataclass(frozen=True)
class Content:
    """``digest``: the manifest's. ``blobs``: it comes last, as in a push. ``files``: what was pushed, by name, and
    what an export has to give back."""

    manifest: AdapterManifest
    digest: Digest
    data: dict[Digest, bytes]
    blobs: tuple[PendingBlob, ...]
    files: dict[str, bytes]


def contents(home: Path, folder: Path, count: int) -> Iterator[Content]:
    """Two and two have the same factors and another alpha, so that versions share blobs. ``home``: of a registry for
    nothing else, which then has all of them. One module each: much of the time of a push goes into its manifest."""
    base = tiny.write_model(folder / "base", tiny.model())
    with loreg.open(home) as registry:
        registry.add_base(base, "base")
        for number in range(count):
            modules = {tiny.Q: tiny.adapter(seed=20 + number // 2, rank=1 + number // 2)[tiny.Q]}
            adapter = tiny.write_adapter(folder / f"adapter{number}", modules, alpha=8 + number)
            manifest = registry.push(adapter, base="base", name=f"all{number}").manifest
            digests = [*(blob.digest for blob in manifest.blobs), manifest.digest]
            data = {digest: registry.storage.read(digest) for digest in digests}
            blobs = tuple(PendingBlob.of(each) for each in data.values())
            yield Content(manifest, manifest.digest, data, blobs, tiny.files_in(adapter))
