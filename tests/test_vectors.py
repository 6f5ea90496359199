"""The vectors of spec/vectors/, run against loreg; and the clauses of the specification, none uncovered."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import jsonschema
import make_vectors
import pytest
import safetensors
import torch

from loreg.algebra.delta import Dense, LowRank
from loreg.algebra.edits import WeightedSum
from loreg.digest import Digest, fingerprint
from loreg.errors import BadInput, LoregError, UsageError
from loreg.format import canonical_json
from loreg.format.base import BaseManifest
from loreg.format.fingerprint import BaseIdentity, BaseTensor, Match, identify, match_base
from loreg.format.manifest import AdapterManifest
from loreg.format.recipe import MergeRecord, Recipe
from loreg.format.reference import Reference, check_tag, parse_expression
from loreg.format.safetensors import canonical_header, parse_header
from loreg.merge.edits import Part, TensorEdit
from loreg.merge.inputs import AdapterInput
from loreg.tensors import TORCH, from_buffer, to_memory

ROOT = Path(__file__).resolve().parent.parent
SPEC = ROOT / "spec" / "loreg-1.md"
CLAUSE = re.compile(r"^\*\*([A-Z][0-9]+)\.\*\*", re.MULTILINE)
CITATION = re.compile(r"\[([A-Z][0-9]+(?:(?:–|, )[A-Z][0-9]+)*)\]")

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
    import io

    from loreg.format.safetensors import read_header

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
    import struct

    return [
        {"weight": t.weight, "bits": struct.pack(">d", t.weight).hex(), "reference": str(t.reference)}
        for t in parse_expression(given["text"])
    ]


def matrix(given: dict[str, Any]) -> torch.Tensor:
    return from_buffer(bytearray.fromhex(given["hex"]), TORCH[given["dtype"]], tuple(given["shape"]))


def run_arithmetic(given: dict[str, Any]) -> Any:
    """Once in the order written and once reversed: the definition knows no order."""
    forwards, backwards = (_merged(given, terms) for terms in (given["terms"], given["terms"][::-1]))
    assert forwards == backwards
    return {"hex": forwards}


def _merged(given: dict[str, Any], terms: list[dict[str, Any]]) -> str:
    W = matrix(given["W"])
    full = tuple(_replacing(float(t["weight"])) for t in terms if t["kind"] == "replace")
    if len(full) == len(terms) and TensorEdit(full).replaces() and terms[0]["value"]["dtype"] == given["dtype"]:
        return cast(str, terms[0]["value"]["hex"])
    low_rank: list[LowRank] = []
    dense: list[Dense] = []
    for term in terms:
        weight = float(term["weight"])
        if term["kind"] == "low_rank":
            A, B = matrix(term["A"]), matrix(term["B"])
            left, right = (A.T, B.T) if term["orientation"] == "in_out" else (B, A)
            low_rank.append(LowRank(left, right, float(term["scale"])).scaled(weight))
        elif term["kind"] == "bias":
            dense.append(Dense(matrix(term["value"]), float(term["scale"])).scaled(weight))
        else:
            dense += [Dense(matrix(term["value"]), weight), Dense(W, -weight)]
    merged = WeightedSum(tuple(low_rank), tuple(dense)).apply(W, TORCH[given["dtype"]])
    return bytes(to_memory(merged)).hex()


def _replacing(weight: float) -> Part:
    nothing = cast(AdapterManifest, None)
    return Part(AdapterInput("a vector", weight, Digest("0" * 64), nothing, {}), full="W")


RUN: dict[str, Callable[[dict[str, Any]], Any]] = {
    "canonical_json": run_canonical_json,
    "safetensors": run_safetensors,
    "canonical_safetensors": run_canonical_safetensors,
    "base": run_base,
    "manifests": run_manifests,
    "recipes": run_recipes,
    "merge_records": run_merge_records,
    "references": run_references,
    "expressions": run_expressions,
    "arithmetic": run_arithmetic,
}


def load(kind: str) -> list[dict[str, Any]]:
    document = json.loads((make_vectors.FOLDER / f"{kind}.json").read_bytes())
    assert (document["format"], document["kind"]) == ("loreg/1", kind)
    return cast(list[dict[str, Any]], document["vectors"])


def every_vector() -> Iterator[tuple[str, dict[str, Any]]]:
    for kind in RUN:
        for vector in load(kind):
            yield kind, vector


@pytest.mark.parametrize("kind", RUN)
def test_vectors(kind: str) -> None:
    vectors = load(kind)
    for expected in ("valid", "rejected"):
        assert any(vector["expected"] == expected for vector in vectors), f"no {expected} vector in {kind}.json"
    wrong = []
    for vector in vectors:
        try:
            outcome = {"expected": "valid", "result": RUN[kind](vector["input"])}
        except (BadInput, UsageError):
            outcome = {"expected": "rejected"}
        if outcome != {key: vector[key] for key in ("expected", "result") if key in vector}:
            wrong.append((vector["id"], vector["description"], outcome))
    assert not wrong


def test_every_file_is_run() -> None:
    assert {path.stem for path in make_vectors.FOLDER.glob("*.json")} == RUN.keys() == make_vectors.KINDS.keys()


@pytest.mark.parametrize("kind", RUN)
def test_records(kind: str) -> None:
    document = json.loads((make_vectors.FOLDER / f"{kind}.json").read_bytes())
    names = [vector["id"] for vector in document["vectors"]]
    assert len(set(names)) == len(names)
    for vector in document["vectors"]:
        assert vector.keys() - {"result"} == {"id", "description", "clauses", "flags", "input", "expected"}
        assert vector["clauses"] and set(vector["flags"]) <= document["flags"].keys()
        assert ("result" in vector) == (vector["expected"] == "valid")


@pytest.mark.parametrize("kind", RUN)
def test_vectors_are_golden(kind: str) -> None:
    assert make_vectors.vector_file(kind) == (make_vectors.FOLDER / f"{kind}.json").read_bytes()


def clauses() -> list[str]:
    return CLAUSE.findall(SPEC.read_text(encoding="utf-8"))


def expand(citation: str) -> Iterator[str]:
    """``J6, B1–B3`` → J6, B1, B2, B3."""
    for part in citation.split(", "):
        first, _, last = part.partition("–")
        letter = first[0]
        assert not last or last[0] == letter, citation
        yield from (f"{letter}{n}" for n in range(int(first[1:]), int((last or first)[1:]) + 1))


def cited_in_code() -> set[str]:
    texts = (path.read_text(encoding="utf-8") for path in (ROOT / "loreg").rglob("*.py"))
    return {clause for text in texts for found in CITATION.findall(text) for clause in expand(found)}


def test_clauses_are_numbered_once_and_in_order() -> None:
    found = clauses()
    assert len(found) > 30 and len(set(found)) == len(found)
    for letter in {clause[0] for clause in found}:
        numbers = [int(clause[1:]) for clause in found if clause[0] == letter]
        assert numbers == list(range(1, len(numbers) + 1)), letter


def test_every_clause_has_a_vector() -> None:
    covered = {clause for _, vector in every_vector() for clause in vector["clauses"]}
    assert sorted(set(clauses()) - covered) == []
    assert sorted(covered - set(clauses())) == []


def test_every_clause_is_cited_where_it_is_kept() -> None:
    assert sorted(set(clauses()) - cited_in_code()) == []


def test_every_citation_is_a_clause() -> None:
    assert sorted(cited_in_code() - set(clauses())) == []


def test_every_reference_inside_the_specification_is_a_clause() -> None:
    text = SPEC.read_text(encoding="utf-8")
    assert {clause for found in CITATION.findall(text) for clause in expand(found)} <= set(clauses())


def test_examples_in_the_specification() -> None:
    """Each fenced block ``example NAME`` of the specification is what the second implementation computes."""
    from vector_cases.examples import EXAMPLES

    found = dict(re.findall(r"```text example ([a-z_]+)\n(.*?)```", SPEC.read_text(encoding="utf-8"), re.DOTALL))
    assert found == {name: text() for name, text in EXAMPLES.items()}


DOCUMENTS = ("base", "manifests", "recipes", "merge_records")


def documents() -> Iterator[tuple[str, dict[str, Any]]]:
    for kind in DOCUMENTS:
        for vector in load(kind):
            if "utf8" in vector["input"]:
                yield kind, vector


def test_schema() -> None:
    schema = json.loads((ROOT / "spec" / "manifest.schema.json").read_bytes())
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    wrong = []
    for kind, vector in documents():
        try:
            value = json.loads(vector["input"]["utf8"])
        except ValueError:
            continue  # not a document at all, so nothing for a schema to judge
        refused = vector["expected"] == "rejected" and "Structure" in vector["flags"]
        if validator.is_valid(value) == refused:
            wrong.append((kind, vector["id"], vector["flags"]))
    assert not wrong


def test_the_library_accepts_what_is_flagged_so() -> None:
    """What loreg refuses and the library reads; and everything that loreg reads, the library reads too."""
    wrong = []
    for vector in load("safetensors"):
        try:
            safetensors.deserialize(base64.b64decode(vector["input"]["base64"]))
            accepted = True
        except safetensors.SafetensorError:
            accepted = False
        if accepted != (vector["expected"] == "valid" or "AcceptedByLibrary" in vector["flags"]):
            wrong.append((vector["id"], accepted))
    assert not wrong


def test_the_library_loads_canonical_files() -> None:
    for vector in load("canonical_safetensors"):
        if vector["expected"] == "valid":
            loaded = dict(safetensors.deserialize(base64.b64decode(vector["result"]["base64"])))
            given = {t["name"]: (t["dtype"], base64.b64decode(t["data"])) for t in vector["input"]["tensors"]}
            assert {name: (t["dtype"], bytes(t["data"])) for name, t in loaded.items()} == given


def test_refusals_are_loreg_errors_of_the_right_family() -> None:
    """A malformed expression is the caller's mistake, a malformed document is bad input: exit codes differ."""
    for kind, vector in every_vector():
        if vector["expected"] == "rejected":
            with pytest.raises(LoregError) as caught:
                RUN[kind](vector["input"])
            usage = kind in ("references", "expressions")
            assert isinstance(caught.value, UsageError if usage else BadInput), vector["id"]
