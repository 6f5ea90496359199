"""Cases for adapter manifests: one small and one with everything, and what happens when a part is wrong."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import Any

from vector_cases.documents import (
    ADAPTERS,
    RECIPE,
    STRUCTURE,
    Edit,
    Tensor,
    at,
    edited,
    not_canonical,
    without,
)
from vector_cases.primitives import BITS, canonical_file, digest, identity, jcs, sha256
from vector_cases.record import Vector, b64, rejected, valid


def filled(name: str, dtype: str, *shape: int) -> Tensor:
    """A tensor of any bytes: as many as F32 or BF16 need, a function of its name."""
    count = 4 if dtype == "F32" else 2
    for size in shape:
        count *= size
    return Tensor(name, dtype, shape, hashlib.shake_128(name.encode()).digest(count))


QUERY = filled("h.0.attn.q.weight", "BF16", 3, 4)
FC = filled("h.0.mlp.c_fc.weight", "BF16", 4, 6)
FC_BIAS = filled("h.0.mlp.c_fc.bias", "BF16", 6)
NORM = filled("ln_f.weight", "BF16", 4)
BASE = [QUERY, FC, FC_BIAS, NORM]


def ref(tensor: Tensor) -> dict[str, Any]:
    return {"dtype": tensor.dtype, "shape": list(tensor.shape), "digest": digest(tensor.data)}


def blob(data: bytes, role: str) -> dict[str, Any]:
    return {"digest": digest(data), "sha256": sha256(data), "size": len(data), "role": role}


def base_of(*touched: Tensor) -> dict[str, Any]:
    leaves = {tensor.name: digest(tensor.leaf_input) for tensor in touched}
    return {"name": "tiny", "hub": None, **identity(BASE), "touched": leaves, "recipe": None}


def _term(a: Tensor, b: Tensor, alpha: float | None, scale: float) -> dict[str, Any]:
    return {"rank": a.shape[0], "alpha": alpha, "scale": scale, "A": ref(a), "B": ref(b)}


A = filled("h.0.attn.q.lora_A.0", "F32", 2, 4)
B = filled("h.0.attn.q.lora_B.0", "F32", 3, 2)
FACTORS = canonical_file([A, B])

SMALL: dict[str, Any] = {
    "format": "loreg/1",
    "kind": "adapter",
    "base": base_of(QUERY),
    "modules": {
        "h.0.attn.q": {
            "tensor": QUERY.name,
            "kind": "linear",
            "orientation": "out_in",
            "in": 4,
            "out": 3,
            "rank": 2,
            "terms": [_term(A, B, 4, 2)],
            "bias_tensor": None,
            "bias_terms": [],
        }
    },
    "full": {},
    "blobs": [blob(FACTORS, "factors")],
    "source": None,
    "provenance": {"parents": [], "recipe": None, "creator": None, "license": None, "training": {}},
    "annotations": {},
}


def _everything() -> tuple[dict[str, Any], dict[str, bytes], dict[str, bytes]]:
    """A manifest that uses every field; its blobs by digest; the files that it gives back."""
    fc = "h.0.mlp.c_fc"
    factors = [
        A, B,
        filled(f"{fc}.lora_A.0", "BF16", 1, 4), filled(f"{fc}.lora_B.0", "BF16", 6, 1),
        filled(f"{fc}.lora_A.1", "F32", 2, 4), filled(f"{fc}.lora_B.1", "F32", 6, 2),
        filled(f"{fc}.lora_bias.0", "F32", 6),
    ]  # fmt: skip
    by_name = {tensor.name: tensor for tensor in factors}
    norm = filled("new ln_f.weight", "BF16", 4)
    norm_file = canonical_file([replace(norm, name="tensor")])
    # The pushed file: another order, other names, and metadata, as a trainer's library would write it.
    order = [f"factors:{fc}.lora_B.0", f"factors:{A.name}", f"full:{NORM.name}", f"factors:{B.name}"]
    pushed = [norm if label.startswith("full:") else by_name[label.removeprefix("factors:")] for label in order]
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for label, tensor in zip(order, pushed, strict=True):
        end = position + len(tensor.data)
        entries[f"base_model.{label}"] = {
            "dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [position, end],
        }  # fmt: skip
        position = end
    text = json.dumps(entries).encode()
    header = len(text).to_bytes(8, "little") + text
    weights = header + b"".join(tensor.data for tensor in pushed)
    config = b'{\n  "r": 2\n}\n'
    blobs = {digest(data): (data, role) for data, role in (
        (canonical_file(factors), "factors"), (norm_file, "full"), (header, "source"), (config, "source"),
    )}  # fmt: skip
    files = {"adapter_config.json": config, "adapter_model.safetensors": weights}
    manifest = json.loads(jcs(SMALL))
    manifest["base"] = {
        **base_of(QUERY, FC, FC_BIAS, NORM),
        "hub": {"repo": "acme/tiny", "commit": "0123456789" * 4, "files": {"model.safetensors": sha256(b"model")}},
        "recipe": RECIPE,
    }
    manifest["modules"][fc] = {
        "tensor": FC.name, "kind": "conv1d", "orientation": "in_out", "in": 4, "out": 6, "rank": 3,
        "terms": [
            _term(by_name[f"{fc}.lora_A.0"], by_name[f"{fc}.lora_B.0"], None, -0.5),
            _term(by_name[f"{fc}.lora_A.1"], by_name[f"{fc}.lora_B.1"], 16, 0.125),
        ],
        "bias_tensor": FC_BIAS.name,
        "bias_terms": [{"scale": 0.5, "value": ref(by_name[f"{fc}.lora_bias.0"])}],
    }  # fmt: skip
    manifest["full"] = {NORM.name: {"blob": digest(norm_file), "module": "ln_f", "value": ref(norm)}}
    manifest["blobs"] = [blob(data, role) for _, (data, role) in sorted(blobs.items())]
    manifest["source"] = {
        "format": "peft",
        "files": [
            {"name": "adapter_config.json", "size": len(config), "sha256": sha256(config), "blob": digest(config),
             "tensors": []},
            {"name": "adapter_model.safetensors", "size": len(weights), "sha256": sha256(weights),
             "blob": digest(header), "tensors": order},
        ],
    }  # fmt: skip
    manifest["provenance"] = {
        "parents": ADAPTERS, "recipe": RECIPE, "creator": "ann", "license": "apache-2.0",
        "training": {"steps": 100, "notes": ["a", None, True]},
    }  # fmt: skip
    manifest["annotations"] = {"free": {"form": "…"}}
    return manifest, {name: data for name, (data, _) in blobs.items()}, files


def _tensors(manifest: dict[str, Any]) -> dict[str, Any]:
    """Name in the factors blob → dtype, shape and digest."""
    found = {}
    for path, module in manifest["modules"].items():
        for index, term in enumerate(module["terms"]):
            if "form" in term:
                found.update(_by_content(term))
            else:
                found[f"{path}.lora_A.{index}"], found[f"{path}.lora_B.{index}"] = term["A"], term["B"]
        for index, term in enumerate(module["bias_terms"]):
            found.update(_by_content(term) if "form" in term else {f"{path}.lora_bias.{index}": term["value"]})
    return found


def _by_content(term: dict[str, Any]) -> dict[str, Any]:
    """The tensors of a term with a form, by their content(t) of B4, of which the hash of raw is a part."""
    found = {}
    for entry in term["tensors"].values():
        typed = Tensor("", entry["dtype"], tuple(entry["shape"]), b"").typed
        size = prod(entry["shape"]) * BITS[entry["dtype"]] // 8
        raw = bytes.fromhex(entry["digest"].removeprefix("blake3:"))
        name = digest(b"loreg-content-v1\0" + typed + size.to_bytes(8, "little") + raw).removeprefix("blake3:")
        found[name] = entry
    return found


def parsed(name: str, description: str, clauses: str, edit: Edit, of: dict[str, Any] = SMALL) -> Vector:
    """The vector of a manifest that is accepted."""
    given = edited(of, edit)
    factors = _tensors(json.loads(given["utf8"]))
    return valid(name, description, clauses, given, {"digest": digest(given["utf8"].encode()), "factors": factors})


def manifests() -> list[Vector]:
    large, blobs, files = _everything()
    whole = parsed("everything", "A manifest that uses every field, and the files that it gives back.",
                   "M1 M3 M4 M5 M6 M7 M8 D1 D2", lambda _: None, large)  # fmt: skip
    whole["input"]["blobs"] = {name: b64(data) for name, data in blobs.items()}
    whole["result"]["files"] = {name: b64(data) for name, data in files.items()}
    small = parsed("small", "One linear module.", "M1 M3 M4 M5 M6 M7", lambda _: None)
    small["input"]["blobs"] = {digest(FACTORS): b64(FACTORS)}
    small["result"]["files"] = {}

    def only_full(document: Any) -> None:
        kept = {role: [b for b in document["blobs"] if b["role"] == role] for role in ("full",)}
        document.update(modules={}, blobs=kept["full"], source=None)

    return [
        small,
        whole,
        parsed("only-full", "An adapter that only replaces a tensor.", "M6", only_full, large),
        parsed("embedding", "An embedding: rows are looked up, so its weight is (in, out).", "M4",
               lambda d: d["modules"]["h.0.attn.q"].update(kind="embedding", orientation="in_out")),
        parsed("same-path-parts", "A path that holds another's tensor name.", "M7", _second("h.0.attn.q.lora_A",
                "x")),
        parsed("scale-zero", "A scale of zero.", "M5", at("modules/h.0.attn.q/terms/0/scale", 0)),
        *_envelope(),
        *_modules(),
        *_contents(large),
        *not_canonical(SMALL),
    ]  # fmt: skip


def refusal(
    name: str,
    description: str,
    clauses: str,
    edit: Edit,
    flags: Sequence[str] = STRUCTURE,
    of: dict[str, Any] = SMALL,
) -> Vector:
    return rejected(name, description, clauses, edited(of, edit), flags)


def _second(path: str, tensor: str) -> Edit:
    """An edit that adapts a second module with the same factors."""

    def edit(document: Any) -> None:
        document["modules"][path] = {**document["modules"]["h.0.attn.q"], "tensor": tensor}
        document["base"]["touched"].setdefault(tensor, document["base"]["weights_root"])

    return edit


def _envelope() -> list[Vector]:
    digits = digest(b"")
    return [
        refusal("format", "A later format.", "M1", at("format", "loreg/2")),
        refusal("format-number", "A format that is a number.", "M1", at("format", 1)),
        refusal("format-missing", "No format.", "M1", without("format")),
        refusal("kind", "Another kind.", "M1", at("kind", "recipe")),
        rejected("list", "A list.", "M1", {"utf8": "[]"}, STRUCTURE),
        rejected("null", "null.", "M1", {"utf8": "null"}, STRUCTURE),
        refusal("unknown-field", "A field that is not known.", "M2", at("signature", "x")),
        *(
            refusal(f"unknown-field-{i}", f"A field of {where} that is not known.", "M2", at(f"{where}/x", None))
            for i, where in enumerate(
                ("base", "modules/h.0.attn.q", "modules/h.0.attn.q/terms/0", "modules/h.0.attn.q/terms/0/A",
                        "blobs/0",
                 "provenance")
            )
        ),
        *(
            refusal(f"missing-{key}", f"No {key}: null or empty says that there is none.", "M2", without(key))
            for key in ("base", "modules", "full", "blobs", "source", "provenance", "annotations")
        ),
        refusal("annotations-list", "Annotations that are a list.", "M2", at("annotations", [])),
        refusal("base-missing-root", "No content_set.", "M3", without("base/content_set")),
        refusal("base-name-null", "A base without a name.", "M3", at("base/name", None)),
        refusal("untouched", "The adapted tensor is not among the touched.", "M3", at("base/touched", {}), ()),
        refusal("touched-digest", "A leaf that is no digest.", "M3 D1", at(f"base/touched/{QUERY.name}",
                digits[:-2])),
        refusal("hub-branch", "A hub pin to a branch.", "M3",
                 at("base/hub", {"repo": "a/b", "commit": "main", "files": {}})),
        refusal("hub-sha256", "A hub pin with a sha256 in upper case.", "M3 D2",
                 at("base/hub", {"repo": "a/b", "commit": "0" * 40, "files": {"m": "A" * 64}})),
        refusal("base-recipe", "The base's recipe is not a recipe.", "M3", at("base/recipe", {"format": "loreg/1"})),
        refusal("root-bare", "A root without its algorithm.", "D1", at("base/weights_root", digits[7:])),
        refusal("root-sha256", "A root by sha256.", "D1", at("base/weights_root", "sha256:" + sha256(b""))),
        refusal("root-upper", "A root in upper case.", "D1", at("base/weights_root", "blake3:" + "A" * 64)),
        refusal("root-upper-algorithm", "An algorithm in upper case.", "D1",
                 at("base/weights_root", digits.replace("blake3", "BLAKE3"))),
        refusal("sha256-prefixed", "A sha256 with a prefix.", "D2", at("blobs/0/sha256", "sha256:" + sha256(b""))),
        refusal("sha256-short", "A sha256 of 63 digits.", "D2", at("blobs/0/sha256", sha256(b"")[1:])),
    ]  # fmt: skip


def _modules() -> list[Vector]:
    module = "modules/h.0.attn.q/"
    term = module + "terms/0/"
    bias = {"scale": 1, "value": ref(filled("bias", "F32", 3))}

    def biased(name: Any, terms: Any) -> Edit:
        def edit(document: Any) -> None:
            document["modules"]["h.0.attn.q"].update(bias_tensor=name, bias_terms=terms)
            document["base"]["touched"]["b"] = document["base"]["weights_root"]

        return edit

    return [
        refusal("module-kind", "A kind of module that is not known.", "M4", at(module + "kind", "conv3d")),
        refusal("orientation", "An orientation that is not known.", "M4", at(module + "orientation", "out-in")),
        refusal("rank-sum", "A rank that is not the sum over the terms.", "M4", at(module + "rank", 3), ()),
        refusal("rank-zero", "A rank of zero.", "M4", at(module + "rank", 0)),
        refusal("rank-real", "A rank of 2.5.", "M4", at(module + "rank", 2.5)),
        refusal("rank-bool", "A rank of true.", "M4", at(module + "rank", True)),
        refusal("no-terms", "A module without terms.", "M4", at(module + "terms", [])),
        refusal("term-rank", "A term whose rank is not that of its factors.", "M4", at(term + "rank", 1), ()),
        refusal("a-transposed", "A of shape (in, rank).", "M4", at(term + "A/shape", [4, 2]), ()),
        refusal("b-transposed", "B of shape (rank, out).", "M4", at(term + "B/shape", [2, 3]), ()),
        refusal("a-vector", "A of one dimension.", "M4", at(term + "A/shape", [8])),
        refusal("in-features", "A module that is wider than its factors.", "M4", at(module + "in", 5), ()),
        refusal("out-features", "A module that is higher than its factors.", "M4", at(module + "out", 4), ()),
        refusal("swapped", "in and out swapped.", "M4", lambda d: d["modules"]["h.0.attn.q"].update({"in": 3,
                "out": 4}), ()),
        refusal("dtype", "A dtype that nobody knows.", "M4 S4", at(term + "A/dtype", "float32")),
        refusal("bias-without-tensor", "Bias terms, and no tensor.", "M4", biased(None, [bias])),
        refusal("bias-without-terms", "A bias tensor, and no terms.", "M4", biased("b", [])),
        refusal("bias-shape", "A bias of another size.", "M4",
                 biased("b", [{**bias, "value": {**bias["value"], "shape": [4]}}]), ()),
        refusal("one-tensor-twice", "Two modules adapt one tensor.", "M4", _second("other", QUERY.name), ()),
        refusal("bias-is-weight", "A bias tensor that is the weight.", "M4", biased(QUERY.name, [bias]), ()),
        refusal("scale-text", "A scale that is text.", "M5", at(term + "scale", "2")),
        refusal("scale-null", "No scale.", "M5", at(term + "scale", None)),
        refusal("scale-bool", "A scale of true.", "M5", at(term + "scale", True)),
        rejected("scale-overflow", "A scale that no double holds.", "M5 J3",
                 {"utf8": jcs(SMALL).decode().replace('"scale":2', '"scale":1e999')}),
        rejected("scale-nan", "A scale of NaN.", "M5 J3", {"utf8": jcs(SMALL).decode().replace('"scale":2',
                '"scale":NaN')}),
        rejected("scale-real", "A scale of 2.0: the canonical text is 2.", "M5 J6",
                 {"utf8": jcs(SMALL).decode().replace('"scale":2', '"scale":2.0')}),
    ]  # fmt: skip


def _contents(large: dict[str, Any]) -> list[Vector]:
    """What concerns blobs, replaced tensors and source files."""

    def refused(name: str, description: str, clauses: str, edit: Edit, flags: Sequence[str] = STRUCTURE) -> Vector:
        return refusal(name, description, clauses, edit, flags, large)

    def drop(role: str) -> Edit:
        return lambda d: d.update(blobs=[b for b in d["blobs"] if b["role"] != role])

    def called(name: str, description: str, file: str, flags: Sequence[str] = STRUCTURE) -> Vector:
        return refused(f"file-{name}", description, "M8", at("source/files/0/name", file), flags)

    return [
        refused("nothing", "No module, and no replaced tensor.", "M6", _nothing),
        refused("no-factors", "Modules, and no factors blob.", "M6", drop("factors")),
        refused("two-factors", "Two factors blobs.", "M6", lambda d: [b.update(role="factors") for b in d["blobs"]]),
        refused("factors-of-nothing", "A factors blob, and no modules.", "M6",
                lambda d: d.update(modules={}, source=None)),
        refused("no-full", "The blob of a replaced tensor is missing.", "M6", drop("full"), ()),
        refused("no-source", "The blob of a source file is missing.", "M6", drop("source"), ()),
        refused("blobs-unsorted", "Blobs in another order.", "M6", lambda d: d["blobs"].reverse(), ()),
        refused("blob-twice", "A blob twice.", "M6", lambda d: d["blobs"].insert(0, d["blobs"][0])),
        refused("blob-role", "A role that is not known.", "M6", at("blobs/0/role", "weights")),
        refused("blob-size", "A negative size.", "M6", at("blobs/0/size", -1)),
        refused("full-role", "The blob of a replaced tensor has another role.", "M6",
                lambda d: [b.update(role="source") for b in d["blobs"] if b["role"] == "full"], ()),
        refused("full-value", "A replaced tensor without a shape.", "M6", without(f"full/{NORM.name}/value/shape")),
        refused("unknown-tensor", "A source file with a tensor that the version has not.", "M7 M8",
                at("source/files/1/tensors/0", "factors:h.0.mlp.c_fc.lora_A.2"), ()),
        refused("unlabelled-tensor", "A source file with a tensor that does not say where it is.", "M8",
                at("source/files/1/tensors/0", "h.0.mlp.c_fc.lora_A.0")),
        refused("file-twice", "Two source files of one name.", "M8",
                at("source/files/1/name", "adapter_config.json"), ()),
        called("parent", "A source file outside the directory.", "../x"),
        called("absolute", "A source file at an absolute path.", "/etc/passwd"),
        called("directory", "A source file in a directory.", "a/b"),
        called("backslash", "A source file in a directory, elsewhere.", "..\\x"),
        called("dot", "A source file that is the directory.", "."),
        called("dots", "A source file that is the directory above.", ".."),
        called("empty", "A source file without a name.", ""),
        called("nul", "A source file with a NUL in its name.", "a\0b"),
        called("escape", "A source file with a terminal's escape character in its name.", "a\x1b[31m"),
        called("c1", "A source file with a control sequence introducer of eight bits.", "a\u009b31m"),
        called("long", "A name of 256 bytes.", "é" * 128, ()),
    ]  # fmt: skip


def _nothing(document: Any) -> None:
    document.update(modules={}, full={}, blobs=[], source=None)
