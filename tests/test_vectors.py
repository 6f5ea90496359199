"""The vectors of spec/vectors/, run against loreg; and the clauses of the specification, none uncovered."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import jsonschema
import make_vectors
import pytest
import safetensors
import vector_documents
import vector_merges
import vector_sums

from loreg.errors import BadInput, LoregError, UsageError
from loreg.format import methods
from loreg.format.forms import FORMS

ROOT = Path(__file__).resolve().parent.parent
SPEC = ROOT / "spec" / "loreg-1.md"
CLAUSE = re.compile(r"^\*\*([A-Z][0-9]+)\.\*\*", re.MULTILINE)
CITATION = re.compile(r"\[([A-Z][0-9]+(?:(?:–|, )[A-Z][0-9]+)*)\]")

RUN: dict[str, Callable[[dict[str, Any]], Any]] = {
    "canonical_json": vector_documents.run_canonical_json,
    "safetensors": vector_documents.run_safetensors,
    "canonical_safetensors": vector_documents.run_canonical_safetensors,
    "base": vector_documents.run_base,
    "manifests": vector_documents.run_manifests,
    "recipes": vector_documents.run_recipes,
    "merge_records": vector_documents.run_merge_records,
    "derived": vector_documents.run_derived,
    "references": vector_documents.run_references,
    "expressions": vector_documents.run_expressions,
    "arithmetic": vector_sums.run_arithmetic,
    "forms": vector_sums.run_forms,
    "methods": vector_sums.run_methods,
    "journals": vector_sums.run_journals,
    "merges": vector_merges.run_merges,
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


def test_every_form_and_every_method_has_vectors() -> None:
    valid = {kind: [v["input"] for v in load(kind) if v["expected"] == "valid"] for kind in ("forms", "methods")}
    terms = [term for given in valid["forms"] for term in given["terms"]]
    for form, row in FORMS.items():
        found = [term for term in terms if term["form"] == form]
        assert len(found) >= 2, form
        for role in (*row.required, *row.optional, *(("magnitude",) if row.decomposes else ())):
            assert any(role in term["tensors"] for term in found), (form, role)
    dense = {name for name, row in methods.METHODS.items() if row.space == "dense"}
    assert {given["method"] for given in valid["methods"]} == dense
    assert {vector["method"] for vector in recipes()} == set(methods.METHODS)


def recipes() -> list[dict[str, Any]]:
    return [json.loads(v["input"]["utf8"]) for v in load("recipes") if v["expected"] == "valid"]


def table(title: str) -> list[list[str]]:
    """The rows of the table of the specification whose first column has this title."""
    text = SPEC.read_text(encoding="utf-8")
    rows = re.search(rf"^\| {title} \|.*\n\| ---.*\n((?:\|.*\n)+)", text, re.MULTILINE)
    assert rows is not None, title
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[1].splitlines()]


def test_the_table_of_forms() -> None:
    found: dict[str, tuple[set[str], set[str], set[str]]] = {}
    for name, tensors, parameters, *_ in table("form"):
        required, _, optional = tensors.partition("[")
        row = found.setdefault(re.findall("`(.+?)`", name)[0], (set(), set(), set()))
        for known, text in zip(row, (required, optional, parameters), strict=True):
            known.update(re.findall("`(.+?)`", text))
    assert {name: (set(r.required), set(r.optional), set(r.parameters)) for name, r in FORMS.items()} == {
        name: (required - optional, optional, parameters) for name, (required, optional, parameters) in found.items()
    }


def test_the_table_of_methods() -> None:
    spaces = {"exact": "sums", "dense": "deltas", "factors": "factors"}
    found, expected = {}, {}
    for name, space, parameters, count in table("method"):
        values = dict(re.findall(r"`(\w+)` ([^,]+)", parameters))
        defaults = {key: "!" if value == "!" else json.loads(value) for key, value in values.items()}
        found[name.strip("`")] = space, defaults, {"": (1, None), "2": (2, 2), "2 or more": (2, None)}.get(count)
    for name, row in methods.METHODS.items():
        defaults = {
            key: "!" if parameter.default is methods.REQUIRED else parameter.default
            for key, parameter in row.parameters.items()
        }
        expected[name] = spaces[row.space], defaults, None if "inner" in defaults else row.adapters
    assert found == expected


DOCUMENTS = ("base", "manifests", "recipes", "merge_records", "derived")


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
            families = (UsageError, BadInput) if kind == "methods" else UsageError if usage else BadInput
            assert isinstance(caught.value, families), vector["id"]
