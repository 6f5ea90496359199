"""The columns that repeat a manifest: what is searched by, and what is written anew from the manifest."""

from __future__ import annotations

from typing import Any

from loreg.format.base import BaseManifest
from loreg.format.manifest import AdapterManifest


def columns_of(manifest: AdapterManifest | BaseManifest) -> dict[str, Any]:
    """Of the row of a version (``targets`` are rows of their own), or of a base."""
    if isinstance(manifest, BaseManifest):
        identity = manifest.identity
        return {
            "weights_root": identity.weights_root,
            "structure_root": identity.structure_root,
            "content_set": identity.content_set,
            "tensors": len(manifest.tensors),
            "bytes": manifest.nbytes,
        }
    return {
        "base_root": manifest.base.identity.weights_root,
        "base_name": manifest.base.name,
        "rank": manifest.rank,
        "modules": len(manifest.modules),
        "bytes": manifest.nbytes,
        "targets": manifest.targets,
    }
