"""Writes spec/vectors/ from the cases in vector_cases/: ``python tests/make_vectors.py``.

The files are golden: a test makes them again and compares bytes. A vector of a released format is never
edited; new ones are added.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vector_cases import (
    arithmetic,
    containers,
    documents,
    expressions,
    form_cases,
    journals,
    manifest_forms,
    merges,
    method_cases,
    recipe_cases,
)
from vector_cases.record import Vector

FOLDER = Path(__file__).resolve().parent.parent / "spec" / "vectors"

FLAGS = {
    "AcceptedByLibrary": "The safetensors library 0.8 reads this file; loreg must not.",
    "Structure": "manifest.schema.json refuses the document too; where the flag is missing it takes code.",
}

KINDS: dict[str, Callable[[], list[Vector]]] = {
    "canonical_json": containers.canonical_json,
    "safetensors": containers.safetensors,
    "canonical_safetensors": containers.canonical_safetensors,
    "base": documents.base,
    "manifests": manifest_forms.manifests,
    "recipes": recipe_cases.recipes,
    "merge_records": documents.merge_records,
    "derived": documents.derived,
    "references": expressions.references,
    "expressions": expressions.expressions,
    "arithmetic": arithmetic.arithmetic,
    "forms": form_cases.forms,
    "methods": method_cases.methods,
    "journals": journals.journals,
    "merges": merges.merges,
}


def vector_file(kind: str) -> bytes:
    """The whole file of one kind: a vector per line, so that a difference is read easily."""
    vectors = KINDS[kind]()
    used = sorted({flag for vector in vectors for flag in vector["flags"]})
    head = {"format": "loreg/1", "kind": kind, "flags": {flag: FLAGS[flag] for flag in used}}
    lines = ",\n".join(_line(vector) for vector in vectors)
    return (_line(head)[:-1] + ',"vectors":[\n' + lines + "\n]}\n").encode("utf-8")


def _line(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    for kind in KINDS:
        (FOLDER / f"{kind}.json").write_bytes(vector_file(kind))


if __name__ == "__main__":
    main()
