"""How loreg is asked what a vector asks: a whole merged model."""

from __future__ import annotations

import base64
import hashlib
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tiny
from vector_documents import text_of

import loreg
from loreg.digest import Digest
from loreg.format.manifest import AdapterManifest
from loreg.registry.storage import PendingBlob

LONG = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


@contextmanager
def ready(given: dict[str, Any], folder: Path) -> Iterator[tuple[loreg.Registry, list[str], dict[str, Any]]]:
    """A registry in ``folder`` with the vector's adapters, and beside it its ``base``; the terms of its recipe as
    texts, and the options of the merge."""
    (folder / "base").mkdir()
    for name, data in given["base"].items():
        (folder / "base" / name).write_bytes(base64.b64decode(data))
    names, recipe = {}, json.loads(given["recipe"])
    with loreg.open(folder / "home") as registry:
        for number, adapter in enumerate(given["adapters"]):
            manifest = AdapterManifest.parse(text_of({"utf8": adapter["manifest"]}))
            blobs = [PendingBlob.of(base64.b64decode(data)) for data in adapter["blobs"].values()]
            registry.commit_version(f"a{number}", manifest, [*blobs, PendingBlob.of(manifest.dump())])
            names[str(manifest.digest)] = f"a{number}"
        terms = [f"{term['weight']}*{names[term['adapter']]}" for term in recipe["terms"]]
        options = {"base": folder / "base", "undo": given["undo"], "dtype": LONG.get(recipe["dtype"])}
        yield registry, terms, options


def result(out: Path) -> dict[str, Any]:
    """What the vector says of the files in ``out``."""
    files = {
        name: data for name, data in tiny.files_in(out).items() if not name.endswith(("config.json", "index.json"))
    }
    return {
        "weights_root": json.loads(files["loreg.json"])["weights_root"],
        "tensors": {name: str(Digest.of(t.data)) for name, t in sorted(tiny.tensors_in(out).items())},
        "files": {
            name: {"blake3": str(Digest.of(data)), "sha256": hashlib.sha256(data).hexdigest()}
            for name, data in files.items()
        },
    }


def run_merges(given: dict[str, Any]) -> Any:
    """Once in the recipe's order and once reversed; and each is the merge of that recipe."""
    with tempfile.TemporaryDirectory() as name, ready(given, Path(name)) as (registry, terms, options):
        found = []
        for number, ordered in enumerate((terms, terms[::-1])):
            made = registry.merge(" + ".join(ordered), Path(name) / f"out{number}", **options)
            assert made.record.recipe.dump() == text_of({"utf8": given["recipe"]})
            found.append(result(made.out))
        assert found[0] == found[1]
        return found[0]
