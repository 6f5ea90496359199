"""Cases for bases, recipes and merge records."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from typing import Any

from blake3 import blake3

from vector_cases.primitives import Tensor, digest, identity, jcs, listing, sha256
from vector_cases.record import Vector, b64, rejected, valid

Edit = Callable[[Any], object]
STRUCTURE = ("Structure",)


def edited(document: dict[str, Any], edit: Edit) -> dict[str, str]:
    """A copy of ``document`` after ``edit``, as canonical text."""
    changed = copy.deepcopy(document)
    edit(changed)
    return {"utf8": jcs(changed).decode("utf-8")}


def at(path: str, value: Any) -> Edit:
    """An edit that sets the field at ``path``: keys separated by '/'."""

    def edit(document: Any) -> None:
        *parents, last = (int(key) if key.isdigit() else key for key in path.split("/"))
        for key in parents:
            document = document[key]
        document[last] = value

    return edit


def without(path: str) -> Edit:
    """An edit that takes the field at ``path`` away."""

    def edit(document: Any) -> None:
        *parents, last = path.split("/")
        for key in parents:
            document = document[int(key) if key.isdigit() else key]
        del document[last]

    return edit


def not_canonical(document: dict[str, Any]) -> list[Vector]:
    """The ways in which bytes can say what a document says and still not be it."""
    text = jcs(document).decode("utf-8")
    forms = (
        ("indented", "The same document, indented.", "J6", json.dumps(document, sort_keys=True, indent=1)),
        ("trailing-newline", "The same document and a newline.", "J6", text + "\n"),
        ("escaped", "The same document with a letter escaped.", "J6", text.replace('"format"', '"f\\u006frmat"', 1)),
        ("unsorted", "The same document, keys in another order.", "J6", _reversed(document)),
        ("duplicate-key", "A key twice.", "J2", '{"kind":"x",' + text[1:]),
        ("byte-order-mark", "The same document after a byte order mark.", "J1", "\ufeff" + text),
        ("truncated", "The same document without its last byte.", "J1", text[:-1]),
    )
    return [rejected(name, description, clauses, {"utf8": form}) for name, description, clauses, form in forms]


def _reversed(document: dict[str, Any]) -> str:
    return json.dumps(dict(sorted(document.items(), reverse=True)), separators=(",", ":"))


def two(value: float) -> bytes:
    """A distinct run of eight bytes per value."""
    return blake3(str(value).encode()).digest()[:8]


W = Tensor("h.0.attn.weight", "F32", (1, 2), two(1))
V = Tensor("h.0.mlp.weight", "BF16", (2, 2), two(2))
N = Tensor("ln.bias", "F16", (4,), two(3))
HEAD = Tensor("lm_head.weight", "BF16", (2, 2), two(2))
BASE = [W, V, N]


def base() -> list[Vector]:
    return [*_identities(), *_matches(), *_base_manifests()]


def _described(tensors: Sequence[Tensor]) -> list[dict[str, Any]]:
    return [{"name": t.name, "dtype": t.dtype, "shape": list(t.shape), "data": b64(t.data)} for t in tensors]


def _identities() -> list[Vector]:
    def identified(name: str, description: str, tensors: list[Tensor], clauses: str = "B1 B2 B3 B4") -> Vector:
        leaves = {t.name: digest(t.leaf_input) for t in tensors}
        given = {"operation": "identify", "tensors": _described(tensors)}
        return valid(name, description, clauses, given, {"leaves": leaves, **identity(tensors)})

    return [
        identified("one-tensor", "One tensor.", [W]),
        identified("no-tensor", "No tensor.", []),
        identified("three-tensors", "Three tensors.", BASE),
        identified("other-order", "The same three in another order: the same roots.", [N, W, V], "B2 B3 B4"),
        identified("renamed", "One name differs: the same content_set.", [Tensor("h.0.x", *_rest(W)), V, N], "B4"),
        identified("tied-head", "A tensor twice under two names: the same content_set.", [*BASE, HEAD], "B4"),
        identified("other-shape", "The same bytes in another shape.", [Tensor(W.name, "F32", (2, 1), W.data), V, N]),
        identified("other-dtype", "The same bytes as another dtype.", [Tensor(W.name, "I32", (1, 2), W.data), V, N]),
        identified("other-bytes", "Other bytes: the same structure_root.", [Tensor(W.name, "F32", (1, 2), two(4)),
                V, N]),
        identified("scalar-and-empty", "A scalar and a tensor without elements.",
                   [Tensor("s", "F64", (), two(5)), Tensor("e", "U8", (0, 3), b"")]),
        identified("name-bytes", "Names go by UTF-8, where UTF-16 has another order.",
                   [Tensor("\U0001f600", "U8", (1,), b"\1"), Tensor("\ufb33", "U8", (1,), b"\2")], "B1 B2 B3"),
        rejected("same-name", "Two tensors of one name.", "B2", {"operation": "identify", "tensors": _described([W,
                W])}),
    ]  # fmt: skip


def _rest(tensor: Tensor) -> tuple[str, tuple[int, ...], bytes]:
    return tensor.dtype, tensor.shape, tensor.data


def _matches() -> list[Vector]:
    def matched(name: str, description: str, here: list[Tensor], level: str, differing: Sequence[str] = (),
                touched: Sequence[Tensor] = (W,)) -> Vector:  # fmt: skip
        expected = {**identity(BASE), "touched": {t.name: digest(t.leaf_input) for t in touched}}
        given = {"operation": "match", "expected": expected, "tensors": _described(here)}
        return valid(name, description, "B5", given, {"level": level, "differing": list(differing)})

    other_w, other_n = Tensor(W.name, "F32", (1, 2), two(4)), Tensor(N.name, "F16", (4,), two(6))
    return [
        matched("match-weights", "The same base, in another order.", [N, V, W], "weights_root"),
        matched("match-content", "A tied head more: the same content.", [*BASE, HEAD], "content_set"),
        matched("match-touched", "A tensor differs that is not adapted.", [W, V, other_n], "touched"),
        matched("match-structure", "The adapted tensor differs.", [other_w, V, N], "structure_root", [W.name]),
        matched("match-structure-order", "Two adapted tensors differ, named in order.",
                [other_w, V, other_n], "structure_root", [W.name, N.name], (N, W)),
        matched("match-none", "The adapted tensor differs, and another is missing.", [other_w, V], "none", [W.name]),
        matched("match-missing", "The adapted tensor is missing.", [V, N], "none", [W.name]),
        matched("match-dtype", "The adapted tensor has the same bytes as another dtype.",
                [Tensor(W.name, "I32", (1, 2), W.data), V, N], "none", [W.name]),
        matched("match-renamed", "The adapted tensor has another name: the adapter cannot find it.",
                [Tensor("x", *_rest(W)), V, N], "none", [W.name]),
        matched("match-nothing-touched", "An adapter that adapts nothing of the base does not fit every base.",
                [other_w, V, N], "structure_root", (), ()),
    ]  # fmt: skip


def _base_manifests() -> list[Vector]:
    manifest = {"format": "loreg/1", "kind": "base", "tensors": listing(BASE)}

    def parsed(name: str, description: str, tensors: list[Tensor]) -> Vector:
        document = {**manifest, "tensors": listing(tensors)}
        given = {"operation": "parse", **edited(document, lambda _: None)}
        return valid(name, description, "B6 M1", given, {**identity(tensors), "digest": digest(jcs(document))})

    def refused(name: str, description: str, clauses: str, edit: Edit, flags: Sequence[str] = STRUCTURE) -> Vector:
        return rejected(name, description, clauses, {"operation": "parse", **edited(manifest, edit)}, flags)

    entry = "tensors/ln.bias/"
    return [
        parsed("manifest", "A base manifest.", BASE),
        parsed("manifest-empty", "A base without tensors.", []),
        refused("manifest-format", "Another format.", "B6 M1", at("format", "loreg/2")),
        refused("manifest-kind", "Another kind.", "B6 M1", at("kind", "adapter")),
        refused("manifest-unknown-field", "A field that is not known.", "B6 M2", at("x", 1)),
        refused("manifest-unknown-inner", "A field of a tensor that is not known.", "B6 M2", at(entry + "nbytes", 8)),
        refused("manifest-missing", "No tensors.", "B6", without("tensors")),
        refused("manifest-dtype", "A dtype that nobody knows.", "B6 S4", at(entry + "dtype", "F33")),
        refused("manifest-shape", "A negative size.", "B6 S4", at(entry + "shape", [-4])),
        refused("manifest-shape-real", "A size that is no whole number.", "B6 S4", at(entry + "shape", [0.5])),
        refused("manifest-dimensions", "65 dimensions.", "B6 S4", at(entry + "shape", [1] * 65)),
        refused("manifest-huge", "More bytes than 2^53 - 1.", "B6 S5", at(entry + "shape", [2**53 - 1] * 2), ()),
        refused("manifest-not-whole-bytes", "One element of 4 bits.", "B6 S5",
                lambda d: d["tensors"]["ln.bias"].update(dtype="F4", shape=[1]), ()),
        refused("manifest-name", "A name that leaves its directory.", "B6 S3",
                lambda d: d["tensors"].update({"../a": d["tensors"].pop("ln.bias")})),
        refused("manifest-digest-upper", "A digest in upper case.", "B6 D1",
                at(entry + "digest", "blake3:" + "A" * 64)),
        *(dict(v, id="manifest-" + v["id"], input={"operation": "parse",
                **v["input"]}) for v in not_canonical(manifest)),
    ]  # fmt: skip


ADAPTERS = sorted(digest(text) for text in (b"sql", b"humor", b"poems"))
RECIPE: dict[str, Any] = {
    "format": "loreg/1",
    "kind": "recipe",
    "base": identity(BASE)["weights_root"],
    "terms": [{"adapter": ADAPTERS[0], "weight": "0.7"}, {"adapter": ADAPTERS[1], "weight": "-1.5"}],
    "method": "linear",
    "parameters": {},
    "arithmetic": "loreg-exact-1",
    "dtype": None,
    "base_mismatch": False,
}


def recipes() -> list[Vector]:
    def parsed(name: str, description: str, clauses: str, edit: Edit) -> Vector:
        given = edited(RECIPE, edit)
        return valid(name, description, clauses, given, {"digest": digest(given["utf8"].encode())})

    def refused(name: str, description: str, clauses: str, edit: Edit, flags: Sequence[str] = STRUCTURE) -> Vector:
        return rejected(name, description, clauses, edited(RECIPE, edit), flags)

    def terms(*pairs: tuple[int, str]) -> Edit:
        return at("terms", [{"adapter": ADAPTERS[i], "weight": weight} for i, weight in pairs])

    def also(*edits: Edit) -> Edit:
        def edit(document: Any) -> None:
            for each in edits:
                each(document)

        return edit

    svd = also(at("method", "svd"), at("parameters", {"rank": 4, "energy": None}), at("arithmetic", "float64-lapack"))
    weights = ("1", "-1", "0.1", "1e-7", "0.000001", "1e+21", "5e-324", "9007199254740992", "-0.30000000000000004")
    texts = ("", "0", "-0", "1.0", "+1", ".5", "1.", "01", "0.70", "7e-1", "1e21", "1E+21", "0x1", "1_0", "1 ", "nan",
             "inf", "-Infinity", "1e400", "\u0661", *(loose := ("9007199254740993",
                     "0.1000000000000000055")))  # fmt: skip
    return [
        parsed("two-terms", "Two terms.", "R1 R2 R3 R4 M1", lambda _: None),
        parsed("no-terms", "No terms: a merge that changes nothing.", "R1", at("terms", [])),
        parsed("same-adapter", "An adapter twice, weights in order of their text.", "R1", terms((0, "-1"), (0,
                "0.5"))),
        parsed("equal-terms", "A term twice: a + a is not 2a as a recipe.", "R1", terms((0, "1"), (0, "1"))),
        *(parsed(f"weight-{i}", f"The weight {w}.", "R2", terms((0, w))) for i, w in enumerate(weights)),
        *(parsed(f"dtype-{d}", f"Floating tensors are stored as {d}.", "R4", at("dtype", d)) for d in ("BF16",
                "F16", "F32")),
        parsed("float64", "The arithmetic of edits with norms.", "R3", at("arithmetic", "loreg-f64-1")),
        parsed("svd", "How an adapter was composed: the sum, truncated.", "R3", svd),
        parsed("mismatch", "The check of the base was overridden.", "R3", at("base_mismatch", True)),
        refused("terms-unsorted", "Terms in another order.", "R1", terms((1, "1"), (0, "1")), ()),
        refused("weights-unsorted", "Weights of one adapter in another order.", "R1", terms((0, "2"), (0, "-1")), ()),
        *(
            refused(f"weight-not-canonical-{i}", f"The weight {text!r}.", "R2", terms((0, text)),
                    () if text in loose else STRUCTURE)
            for i, text in enumerate(texts)
        ),
        refused("weight-number", "A weight that is a number.", "R2", at("terms/0/weight", 1)),
        refused("method", "Another method.", "R3", at("method", "ties")),
        refused("parameters", "A parameter that the method does not take.", "R3", at("parameters", {"density": 1})),
        refused("arithmetic", "Another arithmetic.", "R3", at("arithmetic", "loreg-exact-2")),
        refused("svd-no-rank", "A truncation to no rank.", "R3", also(svd, at("parameters", {}))),
        refused("svd-rank-0", "A truncation to rank 0.", "R3", also(svd, at("parameters/rank", 0))),
        refused("svd-exact", "A truncation that claims to be exact.", "R3", also(svd, at("arithmetic",
                "loreg-exact-1"))),
        refused("linear-lapack", "A sum that is not exact.", "R3", at("arithmetic", "float64-lapack")),
        refused("dtype", "A dtype that weights are not stored in.", "R4", at("dtype", "F64")),
        refused("dtype-lower-case", "A dtype in lower case.", "R4", at("dtype", "bf16")),
        refused("mismatch-null", "base_mismatch that is null.", "R3", at("base_mismatch", None)),
        refused("format", "Another format.", "M1", at("format", "loreg/2")),
        refused("kind", "Another kind.", "M1", at("kind", "merge")),
        refused("unknown-field", "A field that is not known.", "M2", at("seed", 1)),
        refused("unknown-term-field", "A field of a term that is not known.", "M2", at("terms/0/name", "sql")),
        refused("missing-field", "No dtype: null says that there is none.", "R4", without("dtype")),
        refused("base-sha256", "A base by its sha256.", "D1", at("base", "sha256:" + sha256(b""))),
        refused("base-no-algorithm", "A digest without its algorithm.", "D1", at("base", ADAPTERS[0][7:])),
        refused("base-newline", "A digest and a newline.", "D1", at("base", ADAPTERS[0] + "\n")),
        refused("base-short", "A digest of 63 digits.", "D1", at("base", ADAPTERS[0][:-1])),
        refused("adapter-upper", "A digest in upper case.", "D1", at("terms/0/adapter", "blake3:" + "A" * 64)),
        *not_canonical(RECIPE),
    ]  # fmt: skip


def derived() -> list[Vector]:
    record = {
        "format": "loreg/1",
        "kind": "derived",
        "source": identity([W, V])["weights_root"],
        "scheme": "bitsandbytes nf4",
        "dtype": "BF16",
        "weights_root": identity(BASE)["weights_root"],
    }

    def parsed(name: str, description: str, edit: Edit) -> Vector:
        given = edited(record, edit)
        return valid(name, description, "G2 M1", given, {"digest": digest(given["utf8"].encode())})

    def refused(name: str, description: str, clauses: str, edit: Edit) -> Vector:
        return rejected(name, description, clauses, edited(record, edit), STRUCTURE)

    return [
        parsed("record", "A model that was made of a quantised one.", lambda _: None),
        parsed("f16", "Its weights in F16.", at("dtype", "F16")),
        refused("dtype", "Weights in F32.", "G2", at("dtype", "F32")),
        refused("dtype-lower-case", "A dtype in lower case.", "G2", at("dtype", "bfloat16")),
        refused("source-missing", "It does not say of what it was made.", "G2", without("source")),
        refused("source-sha256", "A source by its sha256.", "G2 D1", at("source", "sha256:" + sha256(b""))),
        refused("scheme-null", "No scheme.", "G2", at("scheme", None)),
        refused("time", "A time.", "G2 M2", at("created_at", "2026-01-01")),
        refused("format", "Another format.", "M1", at("format", "loreg/2")),
        refused("kind", "Another kind.", "M1", at("kind", "merge")),
        *not_canonical(record),
    ]


TIES = {"density": 0.5, "normalize": True, "lambda": 1, "rescale": False, "consensus": "sum"}


def merge_records() -> list[Vector]:
    record = {
        "format": "loreg/1",
        "kind": "merge",
        "recipe": RECIPE,
        "weights_root": identity(BASE)["weights_root"],
        "tensors": listing(BASE),
    }

    def refused(name: str, description: str, clauses: str, edit: Edit, flags: Sequence[str] = STRUCTURE) -> Vector:
        return rejected(name, description, clauses, edited(record, edit), flags)

    def parsed(name: str, description: str, clauses: str, **recipe: Any) -> Vector:
        given = edited(record, lambda d: d["recipe"].update(recipe))
        made = {"digest": digest(given["utf8"].encode()), "recipe": digest(jcs({**RECIPE, **recipe}))}
        return valid(name, description, clauses, given, made)

    def other(name: str, description: str, method: str, parameters: dict[str, Any], arithmetic: str) -> Vector:
        return refused(name, description, "G1 R3", lambda d: d["recipe"].update(
            method=method, parameters=parameters, arithmetic=arithmetic))  # fmt: skip

    return [
        parsed("record", "A record of a merge.", "G1 M1"),
        parsed("ties", "A merge by a method on deltas.", "G1 R3", method="ties:mergekit", parameters=TIES,
               arithmetic="loreg-f64-1"),
        refused("root", "A root that does not follow from the tensors.", "G1", at("weights_root", ADAPTERS[0]), ()),
        refused("dtype-changed", "A tensor's dtype was changed.", "G1", at("tensors/ln.bias/dtype", "BF16"), ()),
        refused("tensor-lost", "A tensor was taken away.", "G1", without("tensors/ln.bias"), ()),
        refused("recipe-missing", "No recipe.", "G1", without("recipe")),
        refused("recipe-null", "A recipe that is null.", "G1", at("recipe", None)),
        refused("recipe-unsorted", "A recipe with terms in another order.", "G1 R1",
                lambda d: d["recipe"]["terms"].reverse(), ()),
        other("recipe-svd", "A recipe that does not merge.", "svd", {"rank": 4, "energy": None}, "float64-lapack"),
        other("recipe-cat", "A recipe of one pair of factors.", "cat", {}, "loreg-exact-1"),
        other("recipe-truncated", "A method on deltas, truncated.", "ties:mergekit",
              {**TIES, "rank": 4, "energy": None}, "float64-lapack"),
        other("recipe-knots", "A method on factors.", "knots",
              {**TIES, "inner": "ties:mergekit", "rank": None, "energy": None}, "float64-lapack"),
        refused("time", "A time: the record would no longer be a function of base and recipe.", "G1 M2",
                at("created_at", "2026-01-01")),
        refused("format", "Another format.", "M1", at("format", "loreg/2")),
        refused("huge", "More bytes than 2^53 - 1.", "G1 S5", at("tensors/ln.bias/shape", [2**53 - 1] * 2), ()),
        *not_canonical(record),
    ]  # fmt: skip
