"""How loreg is asked what a vector asks: what becomes of the numbers of one tensor."""

from __future__ import annotations

import base64
import io
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch

from loreg.algebra.delta import Dense, LowRank
from loreg.algebra.densify import dense_delta
from loreg.algebra.edits import WeightedSum
from loreg.digest import Digest
from loreg.format import methods
from loreg.format.fields import Fields
from loreg.format.journal import Undoes, records
from loreg.format.manifest import AdapterManifest
from loreg.format.methods import EXACT, ORDERED
from loreg.format.module import Module
from loreg.format.safetensors import TensorInfo, read_header
from loreg.merge.combining import Combining, mask_key
from loreg.merge.edits import Part, TensorEdit
from loreg.merge.inputs import AdapterInput
from loreg.merge.journal import Corrections, Recorder, Spill
from loreg.tensors import TORCH, from_buffer, to_memory

CPU = torch.device("cpu")


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


def run_journals(given: dict[str, Any]) -> Any:
    """By operation: what is recorded of W, W from records, or what a file is."""
    if given["operation"] == "parse":
        raw = base64.b64decode(given["base64"])
        header = read_header(io.BytesIO(raw), len(raw), what="a journal")
        undoes = Undoes.of(header, what="a journal")
        digests = {key: str(getattr(undoes, key)) for key in ("recipe", "base", "weights_root")}
        return {**digests, "entries": {entry.name: entry.nbytes for entry in sorted(header.tensors, key=by_name)}}
    if given["operation"] == "correct":
        entry, predicted = base64.b64decode(given["base64"]), bytes.fromhex(given["predicted"])
        width, into = TORCH[given["dtype"]].itemsize, memoryview(bytearray(predicted))
        found = records(io.BytesIO(entry).read, len(entry), len(predicted) // width, width, what="an entry")
        corrections = Corrections(found, width, lambda: None)
        corrections.apply(into, lambda: None)
        corrections.finish()
        return {"hex": bytes(into).hex()}
    W = matrix(given["W"])
    low_rank = [
        LowRank(matrix(t["B"]), matrix(t["A"]), float(t["scale"])).scaled(float(t["weight"])) for t in given["terms"]
    ]
    after, small = torch.empty_like(W), torch.empty(W.shape, dtype=torch.int8)
    edit = WeightedSum(tuple(low_rank))
    outcome = edit.prepare(W.shape, W.dtype, W.dtype, residual=True).tile(W, 0, after, small)
    with tempfile.TemporaryDirectory() as folder:
        spill = Spill(Path(folder) / "spill")
        recorder = Recorder(spill, TensorInfo("W", given["W"]["dtype"], tuple(W.shape), 0, W.nbytes))
        recorder.add(to_memory(W), small.view(-1).numpy(), outcome.wide.numpy())
        recorder.finish()
        spill.flush()
        return {
            "after": bytes(to_memory(after)).hex(),
            "base64": base64.b64encode(spill.path.read_bytes()).decode("ascii"),
        }


def by_name(info: TensorInfo) -> str:
    return info.name


def _replacing(weight: float) -> Part:
    nothing = cast(AdapterManifest, None)
    return Part(AdapterInput("a vector", weight, Digest("0" * 64), nothing, {}), full="W")


def doubles(x: torch.Tensor) -> str:
    """Raw float64; a zero is +0, as its sign has no effect in a delta."""
    return bytes(to_memory((x + 0.0).contiguous())).hex()


def reference(given: dict[str, Any]) -> dict[str, Any]:
    digest = Digest.of(bytes.fromhex(given["hex"]))
    return {"dtype": given["dtype"], "shape": given["shape"], "digest": str(digest)}


class Blob:
    """The factors of a manifest, as they are read from a blob."""

    def __init__(self, module: Module, terms: Sequence[dict[str, Any]]) -> None:
        self._tensors = {
            ref.content_name: matrix(given["tensors"][role])
            for term, given in zip(module.bias_terms or module.terms, terms, strict=True)
            for role, ref in cast(Any, term).tensors.items()
        }

    def tensor(self, name: str) -> torch.Tensor:
        return self._tensors[name]


def run_forms(given: dict[str, Any]) -> Any:
    """A tensor of one dimension once as a bias, and once as a weight."""
    first, *others = [_edited(given, bias) for bias in ((False, True) if len(given["W"]["shape"]) == 1 else (False,))]
    assert all(other == first for other in others)
    return first


def _module(given: dict[str, Any], bias: bool) -> Module:
    """The module of a manifest that has these terms."""
    shape, stacked = given["W"]["shape"], given["terms"][0]["form"] == "lora_experts"
    size = shape[1:] if stacked else [shape[0], matrix(given["W"]).numel() // shape[0]]
    out, into = size[::-1] if given["orientation"] == "in_out" else size
    terms = [
        {
            **{name: term[name] for name in ("form", "parameters")},
            **{name: float(term[name]) for name in ("scale", "weight")},
            "rank": 0,
            "alpha": None,
            "tensors": {role: reference(tensor) for role, tensor in term["tensors"].items()},
        }
        for term in given["terms"]
    ]
    kind = "experts" if stacked else {1: "vector", 2: "linear"}.get(len(shape), "conv")
    stored = {} if len(shape) == 2 else {"stored": shape}
    document = {
        "tensor": "w", "kind": kind, "orientation": given["orientation"], "in": into, "out": out, "rank": 0,
        "terms": terms, "bias_tensor": None, "bias_terms": [], **stored,
    }  # fmt: skip
    if bias:
        zero = {"dtype": "F32", "shape": [out, 1], "hex": "00000000" * out}
        plain = {
            "rank": 1,
            "alpha": None,
            "scale": 1,
            "A": reference({**zero, "shape": [1, out]}),
            "B": reference(zero),
        }
        document |= {
            "kind": "linear",
            "in": out,
            "rank": 1,
            "terms": [plain],
            "bias_tensor": "b",
            "bias_terms": terms,
        }
        del document["stored"]
    return Module.from_fields(Fields(document, "module"))


def _edited(given: dict[str, Any], bias: bool) -> Any:
    module, W = _module(given, bias), matrix(given["W"])
    adapter = AdapterInput("a vector", 1.0, Digest("0" * 64), cast(Any, SimpleNamespace(modules={"m": module})), {})
    adapter.__dict__["_factors"] = Blob(module, given["terms"])
    view = W if bias else W.reshape(module.view)
    edit = adapter.bias_edit("m", lambda: view) if bias else adapter.weight_edit("m", lambda: view)
    merged = edit.scaled(float(given["recipe_weight"])).apply(view)
    return {
        "hex": bytes(to_memory(merged)).hex(),
        "delta": doubles(dense_delta(edit)),
        "arithmetic": EXACT if module.exact else ORDERED,
    }


def run_methods(given: dict[str, Any]) -> Any:
    name, terms, device = given["method"], given["terms"], CPU
    parameters = methods.read(name, Fields(dict(given["parameters"]), "parameters"))
    methods.check_count(name, parameters, len(terms))
    nothing = cast(AdapterManifest, None)
    adapters = tuple(
        AdapterInput(f"term {i}", float(term["weight"]), Digest.parse(term["adapter"]), nothing, {})
        for i, term in enumerate(terms)
    )
    edits = [(a, _parts(term["delta"])) for a, term in zip(adapters, terms, strict=True) if term["delta"]]
    combined = Combining(adapters, name, parameters).combine(given["tensor"], tuple(given["shape"]), edits, device)
    (delta,) = combined.dense
    assert delta.scale == 1 and not combined.low_rank
    keys = [mask_key(parameters["seed"], a.digest, given["tensor"]) for a in adapters if "seed" in parameters]
    return {"keys": [f"{key:016x}" for key in keys] or None, "hex": doubles(delta.value)}


def _parts(parts: list[dict[str, Any]]) -> WeightedSum:
    """What one adapter does to a tensor."""
    return WeightedSum(
        tuple(LowRank(matrix(p["left"]), matrix(p["right"]), float(p["scale"])) for p in parts if "left" in p),
        tuple(Dense(matrix(p["value"]), float(p["scale"])) for p in parts if "value" in p),
    )
