"""Cases for manifests whose terms have forms, whose tensors are tied, or whose weights are no matrices."""

from __future__ import annotations

import copy
from typing import Any

from blake3 import blake3

from vector_cases import manifests as plain
from vector_cases.documents import Edit, Tensor, at, without
from vector_cases.manifests import QUERY, SMALL, base_of, blob, filled, parsed, ref, refusal
from vector_cases.primitives import canonical_file, digest, sha256
from vector_cases.record import Vector, b64

Json = dict[str, Any]
EMBEDDING, HEAD = filled("embed.weight", "BF16", 5, 4), filled("head.weight", "BF16", 5, 4)
MODULE = "modules/h.0.attn.q/"


def manifests() -> list[Vector]:
    return [*plain.manifests(), _every_kind(), *_formed(), *_wrong_terms(), *_stored(), *_ties()]


def term(form: str, parameters: Json, rank: int = 0, **tensors: Tensor) -> Json:
    return {
        "form": form, "rank": rank, "alpha": None, "scale": 1, "weight": 1,
        "tensors": {role: ref(tensor) for role, tensor in tensors.items()}, "parameters": parameters,
    }  # fmt: skip


def module(
    tensor: str, kind: str, size: tuple[int, int], *terms: Json, orientation: str = "out_in", **more: Any
) -> Json:
    return {
        "tensor": tensor, "kind": kind, "orientation": orientation, "in": size[1], "out": size[0],
        "rank": sum(t["rank"] for t in terms), "terms": list(terms), "bias_tensor": None, "bias_terms": [], **more,
    }  # fmt: skip


def _factors(*tensors: Tensor) -> bytes:
    """The factors blob: each content once, under its name."""
    named = {blake3(t.content_input).hexdigest(): t for t in tensors}
    return canonical_file([Tensor(name, t.dtype, t.shape, t.data) for name, t in named.items()])


def _manifest(modules: dict[str, Json], *tensors: Tensor) -> Json:
    document = copy.deepcopy(SMALL)
    base = base_of(*(Tensor(m["tensor"], "BF16", (1,), b"\0\0") for m in modules.values()))
    base["touched"] |= {m["bias_tensor"]: base["weights_root"] for m in modules.values() if m["bias_tensor"]}
    document.update(base=base, modules=modules, blobs=[blob(_factors(*tensors), "factors")])
    return document


def _every_kind() -> Vector:
    """A module of every kind, with shared tensors, and a file that has them in another order."""
    A, B = filled("shared A", "F32", 2, 4), filled("shared B", "F32", 6, 2)
    d, b, c = filled("d", "F32", 2), filled("b", "F32", 3), filled("c", "F32", 6)
    m, l, row = filled("m", "F32", 3, 1), filled("l", "F32", 4), filled("rows", "BF16", 2, 4)  # noqa: E741
    left, right, norm = filled("left", "BF16", 3, 6), filled("right", "BF16", 6, 4), filled("norm", "F32", 4)
    wide, high = filled("wide", "F32", 1, 2, 2, 1), filled("high", "F32", 3, 1)
    shared = {"A": A, "B": B}
    gain = term("ia3", {"on": "out"}, l=l)
    decomposed = {"groups": 1, "axis": "out", "epsilon": 0}
    modules = {
        "q": module("q.weight", "linear", (3, 4), term("vera", {}, 2, lambda_d=d, lambda_b=b, **shared)),
        "k": module("k.weight", "conv1d", (6, 4), term("vera", {}, 2, lambda_d=d, lambda_b=c, **shared),
                    orientation="in_out"),
        "conv": module("conv.weight", "conv", (3, 4), term("lora", decomposed, 1, A=wide, B=high, magnitude=m),
                       stored=[3, 2, 2, 1]),
        "experts": module("experts", "experts", (3, 4), term("lora_experts", {"experts": 3}, 2, A=right, B=left),
                          stored=[3, 3, 4]),
        "up": {**module("up.weight", "linear", (4, 2), gain), "bias_tensor": "up.bias", "bias_terms": [gain]},
        "norm": module("norm.weight", "vector", (4, 1), term("dense", {}, value=norm), stored=[4]),
        "words": module("words.weight", "embedding", (4, 5), term("rows", {"indices": [4, 0]}, rows=row),
                        orientation="in_out"),
    }  # fmt: skip
    tensors = [A, B, d, b, c, m, l, row, left, right, norm, wide, high]
    document = _manifest(modules, *tensors)
    order = [B, l, A, row]
    labels = [f"factors:{blake3(t.content_input).hexdigest()}" for t in order]
    head, data = b"any bytes", b"".join(t.data for t in order)
    file = head + data
    document["source"] = {"format": "peft", "files": [
        {"name": "x.bin", "size": len(file), "sha256": sha256(file), "blob": digest(head), "tensors": labels},
    ]}  # fmt: skip
    blobs = {digest(x): (x, role) for x, role in ((_factors(*tensors), "factors"), (head, "source"))}
    document["blobs"] = [blob(x, role) for _, (x, role) in sorted(blobs.items())]
    vector = parsed("every-kind", "A module of every kind; two of them share tensors.", "M4 M7 M8 M9 B4",
                    lambda _: None, document)  # fmt: skip
    vector["input"]["blobs"] = {name: b64(x) for name, (x, _) in blobs.items()}
    vector["result"]["files"] = {"x.bin": b64(file)}
    return vector


FORMED = _manifest(
    {"h.0.attn.q": module(QUERY.name, "linear", (3, 4), term(
        "lora", {"groups": 1}, 2, A=filled("A", "F32", 2, 4), B=filled("B", "F32", 3, 2)))},
    filled("A", "F32", 2, 4), filled("B", "F32", 3, 2),
)  # fmt: skip
TERM = MODULE + "terms/0/"
MAGNITUDE = ref(filled("m", "F32", 3))


def _decomposed(document: Any) -> None:
    found = document["modules"]["h.0.attn.q"]["terms"][0]
    found["tensors"]["magnitude"] = MAGNITUDE
    found["parameters"].update(axis="out", epsilon=1e-10)


def _also(*edits: Edit) -> Edit:
    def edit(document: Any) -> None:
        for each in edits:
            each(document)

    return edit


def _mixed(document: Any) -> None:
    found = document["modules"]["h.0.attn.q"]
    found["terms"].append(copy.deepcopy(SMALL["modules"]["h.0.attn.q"]["terms"][0]))
    found["rank"] = 4


def _formed() -> list[Vector]:
    return [
        parsed("form", "A term with a form.", "M7 M9", lambda _: None, FORMED),
        parsed("form-weight", "A weight outside; alpha and rank say what they like.", "M9",
               _also(at(TERM + "weight", -0.5), at(TERM + "alpha", 16), at(TERM + "rank", 0), at(MODULE + "rank", 0)),
               FORMED),
        parsed("form-magnitude", "DoRA.", "M9 F8", _decomposed, FORMED),
        parsed("form-and-plain", "A term with a form, and a plain one.", "M7 M9", _mixed, FORMED),
    ]  # fmt: skip


def _wrong_terms() -> list[Vector]:
    def refused(name: str, description: str, clauses: str, edit: Edit, structure: bool = True) -> Vector:
        flags = ("Structure",) if structure else ()
        return refusal(f"form-{name}", description, clauses, edit, flags, FORMED)

    value = {"dtype": "F32", "shape": [3], "digest": digest(b"")}

    def bias(shape: list[int]) -> Edit:
        made = term("dense", {}, value=filled("x", "F32", 3))
        made["tensors"]["value"]["shape"] = shape
        return _also(at(MODULE + "bias_tensor", "q.bias"), at(MODULE + "bias_terms", [made]),
                     at("base/touched/q.bias", digest(b"")))  # fmt: skip

    return [
        parsed("form-bias", "A bias term with a form.", "M9", bias([3]), FORMED),
        refused("bias-size", "A bias term of another size.", "M9", bias([4]), False),
        refused("unknown", "A form that is not known.", "M9", at(TERM + "form", "lora_fa")),
        refused("null", "A form that is null.", "M9", at(TERM + "form", None)),
        refused("no-tensors", "A term without tensors.", "M9", at(TERM + "tensors", {})),
        refused("role", "A role that the form has not.", "M9 F2", at(TERM + "tensors/E", value)),
        refused("role-missing", "A role is missing.", "M9 F2", without(TERM + "tensors/A")),
        refused("parameter", "A parameter that the form has not.", "M9 F2", at(TERM + "parameters/alpha", 1)),
        refused("parameter-missing", "A parameter is missing.", "M9 F2", without(TERM + "parameters/groups")),
        refused("parameter-default", "A parameter that is left out where it is 1.", "M9 F2",
                at(TERM + "parameters/groups_in", 1)),
        refused("parameter-list", "Parameters that are a list.", "M9", at(TERM + "parameters", [])),
        refused("sizes", "Tensors that do not fit each other.", "M9 F2",
                at(TERM + "tensors/A/shape", [3, 4]), False),
        refused("size", "Tensors for another weight.", "M9 F2", at(MODULE + "in", 5), False),
        refused("empty", "A tensor without elements.", "M9 F2", _also(at(TERM + "tensors/A/shape", [0, 4]),
                at(TERM + "tensors/B/shape", [3, 0])), False),
        refused("rank-negative", "A rank below 0.", "M9", at(TERM + "rank", -1)),
        refused("rank-missing", "No rank.", "M2 M9", without(TERM + "rank")),
        refused("rank-sum", "The module's rank is not the sum.", "M4 M9", at(TERM + "rank", 3), False),
        refused("weight-missing", "No weight.", "M2 M9", without(TERM + "weight")),
        refused("weight-text", "A weight that is text.", "M9", at(TERM + "weight", "1")),
        refused("unknown-field", "A field that is not known.", "M2 M9", at(TERM + "A", value)),
        refused("no-axis", "A magnitude without axis and epsilon.", "M9 F8",
                at(TERM + "tensors/magnitude", MAGNITUDE)),
        refused("no-magnitude", "An axis without a magnitude.", "M9 F8", _also(_decomposed,
                without(TERM + "tensors/magnitude"))),
        refused("magnitude-size", "A magnitude for other rows.", "M9 F8", _also(_decomposed,
                at(TERM + "tensors/magnitude/shape", [4])), False),
    ]  # fmt: skip


def _stored() -> list[Vector]:
    def of(kind: str, stored: list[int], size: tuple[int, int] = (3, 4), **more: Any) -> Edit:
        return lambda d: d["modules"]["h.0.attn.q"].update(
            kind=kind, stored=stored, out=size[0], **{"in": size[1]}, **more
        )

    def vector(stored: list[int], size: tuple[int, int] = (3, 1), **more: Any) -> Edit:
        made = term("dense", {}, value=filled("x", "F32", *size))
        return of("vector", stored, size, rank=0, terms=[made], **more)

    def of_experts(kind: str, experts: int, **more: Any) -> Edit:
        A, B = filled("right", "BF16", experts, 4), filled("left", "BF16", 3, experts)
        made = term("lora_experts", {"experts": experts}, 1, A=A, B=B)
        return lambda d: d["modules"]["h.0.attn.q"].update(kind=kind, rank=1, terms=[made], **more)

    def refused(name: str, description: str, edit: Edit, structure: bool = True) -> Vector:
        flags = ("Structure",) if structure else ()
        return refusal(f"stored-{name}", description, "M4", edit, flags)

    return [
        parsed("stored-conv", "A convolution of a kernel of two.", "M4", of("conv", [3, 2, 2])),
        parsed("stored-conv-3d", "A convolution of three dimensions.", "M4", of("conv", [3, 1, 2, 2, 1])),
        parsed("stored-vector", "A weight of one dimension.", "M4 M9", vector([3])),
        refused("missing", "A convolution, and not how it is stored.",
                at(MODULE + "kind", "conv")),
        refused("null", "Null, where there is a shape.", of("conv", None)),  # type: ignore[arg-type]
        refused("matrix", "A convolution of two sizes.", of("conv", [3, 4])),
        refused("elements", "Another number of elements.", of("conv", [3, 2, 3]), False),
        refused("first", "Another number of outputs.", of("conv", [2, 3, 2]), False),
        refused("negative", "A negative size.", of("conv", [3, -2, -2])),
        refused("linear", "A matrix needs no other shape.", at(MODULE + "stored", [3, 4])),
        refused("experts-two", "A stack of two sizes.", of("experts", [3, 4])),
        refused("experts-elements", "A stack of other matrices.", of("experts", [2, 3, 5]), False),
        refused("experts-turned", "A stack of matrices of other sides.", of("experts", [2, 4, 3]), False),
        refused("experts-plain", "A stack, and a term for a matrix.", of("experts", [2, 3, 4]), False),
        refused("experts-linear", "A matrix, and a term for a stack.", of_experts("linear", 2), False),
        refused("experts-count", "A stack of three, and a term for two.", of_experts("experts", 2, stored=[3, 3, 4]),
                False),
        parsed("stored-experts", "A stack of two.", "M4 F2", of_experts("experts", 2, stored=[2, 3, 4])),
        refused("vector-two", "A weight of one dimension, with two sizes.", vector([3, 1])),
        refused("vector-size", "Of another size.", vector([4]), False),
        refused("vector-wide", "Of two columns.", vector([3], (3, 2))),
        refused("vector-in-out", "In another orientation.", vector([3], orientation="in_out")),
    ]  # fmt: skip


def _ties() -> list[Vector]:
    document = copy.deepcopy(SMALL)
    document["base"] = base_of(QUERY, EMBEDDING)
    document["ties"] = {HEAD.name: {"to": EMBEDDING.name, "untied": False}}

    def refused(name: str, description: str, edit: Edit, structure: bool = True, clauses: str = "M10") -> Vector:
        flags = ("Structure",) if structure else ()
        return refusal(f"ties-{name}", description, clauses, edit, flags, document)

    adapted = at(MODULE + "tensor", HEAD.name)
    untied = at(f"ties/{HEAD.name}/untied", True)
    entry = f"ties/{HEAD.name}/"
    return [
        parsed("ties", "A head that is the embedding.", "M10", lambda _: None, document),
        parsed("ties-untied", "A head that is adapted alone, and has no bytes in the base.", "M3 M10",
               _also(adapted, untied), document),
        parsed("ties-two", "Two that are tied to the same.", "M10",
               at("ties/other.weight", {"to": EMBEDDING.name, "untied": True}), document),
        refused("untouched", "It is tied to one that is not among the touched.",
                at("base/touched", base_of(QUERY)["touched"]), False),
        refused("adapted", "A head that is adapted, not untied, and not among the touched.", adapted, False,
                "M3 M10"),
        refused("chain", "It is tied to one that is tied.",
                at(f"ties/{EMBEDDING.name}", {"to": QUERY.name, "untied": False}), False),
        refused("itself", "It is tied to itself.", _also(at(entry + "to", HEAD.name),
                at(f"base/touched/{HEAD.name}", digest(b""))), False),
        refused("empty", "No ties: the field is left out.", at("ties", {}), clauses="M2 M10"),
        refused("null", "Ties that are null.", at("ties", None), clauses="M2 M10"),
        refused("no-untied", "It does not say whether it is untied.", without(entry + "untied")),
        refused("untied-number", "untied that is a number.", at(entry + "untied", 1)),
        refused("to-null", "Tied to nothing.", at(entry + "to", None)),
        refused("unknown-field", "A field that is not known.", at(entry + "module", "head"), clauses="M2 M10"),
        refused("name", "A name that leaves its directory.", lambda d: d["ties"].update(
                {"../head": d["ties"].pop(HEAD.name)}), clauses="M10 S3"),
    ]  # fmt: skip
