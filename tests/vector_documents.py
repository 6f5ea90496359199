"""How loreg is asked what a vector asks: documents, containers, names."""

from __future__ import annotations

import base64
import hashlib
import io
import struct
from typing import Any

from loreg.digest import Digest, fingerprint
from loreg.errors import BadInput
from loreg.format import canonical_json
from loreg.format.base import BaseManifest
from loreg.format.derived import Derived
from loreg.format.fingerprint import BaseIdentity, BaseTensor, Match, identify, match_base
from loreg.format.manifest import AdapterManifest
from loreg.format.recipe import MergeRecord, Recipe
from loreg.format.reference import Reference, check_tag, parse_expression
from loreg.format.safetensors import canonical_header, parse_header, read_header

LEVELS = {
    Match.NONE: "none",
    Match.STRUCTURE: "structure_root",
    Match.TOUCHED: "touched",
    Match.CONTENT: "content_set",
    Match.WEIGHTS: "weights_root",
}


def text_of(given: dict[str, str]) -> bytes:
    return given["utf8"].encode() if "utf8" in given else base64.b64decode(given["base64"])


def run_canonical_json(given: dict[str, Any]) -> Any:
    value = canonical_json.loads(text_of(given))
    try:
        return {"canonical": canonical_json.dumps(value).decode()}
    except BadInput:
        return {"canonical": None}


def run_safetensors(given: dict[str, Any]) -> Any:
    data = base64.b64decode(given["base64"])
    header = parse_bytes(data)
    tensors = [
        {"name": t.name, "dtype": t.dtype, "shape": list(t.shape), "start": t.start, "end": t.end}
        for t in header.tensors
    ]
    return {"metadata": dict(header.metadata), "data_start": header.data_start, "tensors": tensors}


def parse_bytes(data: bytes) -> Any:
    return read_header(io.BytesIO(data), len(data), what="a vector")


def run_canonical_safetensors(given: dict[str, Any]) -> Any:
    entries = [(t["name"], t["dtype"], tuple(t["shape"])) for t in given["tensors"]]
    header = canonical_header(entries, given["metadata"])
    data = {t["name"]: base64.b64decode(t["data"]) for t in given["tensors"]}
    file = header.raw + b"".join(data[info.name] for info in header.tensors)
    assert parse_header(header.raw, len(file), what="a vector") == header
    return {"base64": base64.b64encode(file).decode(), "digest": str(Digest.of(file))}


def base_tensors(entries: list[dict[str, Any]]) -> list[BaseTensor]:
    tensors = []
    for t in entries:
        data = base64.b64decode(t["data"])
        tensors.append(BaseTensor(t["name"], t["dtype"], tuple(t["shape"]), len(data), Digest.of(data)))
    return tensors


def roots(identity: BaseIdentity) -> dict[str, str]:
    return {key: str(getattr(identity, key)) for key in ("weights_root", "structure_root", "content_set")}


def run_base(given: dict[str, Any]) -> Any:
    if given["operation"] == "parse":
        manifest = BaseManifest.parse(text_of(given))
        assert manifest.dump() == text_of(given)
        return {**roots(manifest.identity), "digest": str(Digest.of(manifest.dump()))}
    tensors = base_tensors(given["tensors"])
    if given["operation"] == "identify":
        return {"leaves": {t.name: str(t.leaf) for t in tensors}, **roots(identify(tensors))}
    expected = dict(given["expected"])
    touched = {name: Digest.parse(leaf) for name, leaf in expected.pop("touched").items()}
    identity = BaseIdentity(**{key: Digest.parse(text) for key, text in expected.items()})
    level, differing = match_base(identity, touched, {t.name: t for t in tensors})
    return {"level": LEVELS[level], "differing": list(differing)}


def run_manifests(given: dict[str, Any]) -> Any:
    manifest = AdapterManifest.parse(text_of(given))
    assert manifest.dump() == text_of(given)
    factors = {name: ref.to_json() for name, ref in manifest.factor_tensors().items()}
    result: dict[str, Any] = {"digest": str(manifest.digest), "factors": factors}
    if "blobs" in given:
        result["files"] = give_back(manifest, {k: base64.b64decode(v) for k, v in given["blobs"].items()})
    return result


def give_back(manifest: AdapterManifest, blobs: dict[str, bytes]) -> dict[str, str]:
    """Checks every blob against the manifest, and rebuilds the pushed files from them."""
    for blob in manifest.blobs:
        found = fingerprint([blobs[str(blob.digest)]])
        assert (found.digest, found.sha256, found.size) == (blob.digest, blob.sha256, blob.size)
    contents: dict[str, bytes] = {}
    factors = manifest.blob("factors")
    if factors:
        stored = read_canonical(blobs[str(factors.digest)])
        assert stored.keys() == manifest.factor_tensors().keys()
        assert all(Digest.of(stored[name]) == ref.digest for name, ref in manifest.factor_tensors().items())
        contents |= {f"factors:{name}": data for name, data in stored.items()}
    for name, full in manifest.full.items():
        stored = read_canonical(blobs[str(full.blob)])
        assert list(stored) == ["tensor"] and Digest.of(stored["tensor"]) == full.value.digest
        contents[f"full:{name}"] = stored["tensor"]
    files = {}
    for file in manifest.source.files if manifest.source else ():
        data = blobs[str(file.blob)] + b"".join(contents[name] for name in file.tensors)
        assert (len(data), hashlib.sha256(data).hexdigest()) == (file.size, file.sha256)
        files[file.name] = base64.b64encode(data).decode()
    return files


def read_canonical(data: bytes) -> dict[str, bytes]:
    """The tensors of a blob, which must be canonical."""
    header = parse_bytes(data)
    assert canonical_header([(t.name, t.dtype, t.shape) for t in header.tensors], header.metadata).raw == header.raw
    return {t.name: data[header.data_start + t.start : header.data_start + t.end] for t in header.tensors}


def run_recipes(given: dict[str, Any]) -> Any:
    recipe = Recipe.parse(text_of(given))
    assert recipe.dump() == text_of(given)
    return {"digest": str(recipe.digest)}


def run_merge_records(given: dict[str, Any]) -> Any:
    record = MergeRecord.parse(text_of(given))
    assert record.dump() == text_of(given)
    return {"digest": str(Digest.of(record.dump())), "recipe": str(record.recipe.digest)}


def run_derived(given: dict[str, Any]) -> Any:
    record = Derived.parse(text_of(given))
    assert record.dump() == text_of(given)
    return {"digest": str(Digest.of(record.dump()))}


def run_references(given: dict[str, Any]) -> Any:
    if given["operation"] == "set_tag":
        check_tag(given["text"])
        return None
    reference = Reference.parse(given["text"])
    assert str(reference) == given["text"]
    return {
        "name": reference.name,
        "tag": reference.tag,
        "number": reference.number,
        "digest_prefix": reference.digest_prefix,
    }


def run_expressions(given: dict[str, Any]) -> Any:
    return [
        {"weight": t.weight, "bits": struct.pack(">d", t.weight).hex(), "reference": str(t.reference)}
        for t in parse_expression(given["text"])
    ]
