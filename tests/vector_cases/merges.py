"""Cases for whole merged models: files, records and journals, made of the exact sums of single tensors."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vector_cases import arithmetic, journals
from vector_cases.arithmetic import Matrix, bias, low_rank, matrix
from vector_cases.documents import RECIPE
from vector_cases.manifests import SMALL, blob, ref
from vector_cases.ordered import Refused
from vector_cases.primitives import FLOATS, Tensor, canonical_file, container, digest, identity, jcs, listing, sha256
from vector_cases.record import Vector, b64, rejected, valid

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
QUERY, FC = "h.0.attn.q", "h.0.mlp.c_fc"


def merges() -> list[Vector]:
    one, two = _adapter(1, QUERY), _adapter(2, QUERY, FC)
    both = [(one, "0.7"), (two, "1.5")]
    merged = [
        _vector("one", "One adapter, which leaves a shard alone.", "A1 B2 G1", [(one, "1")]),
        _vector("sum", "A sum of two, in whatever order it is written.", "A1 A2 B2 G1 R1", both),
        _vector("twice", "An adapter twice.", "A1 G1 R1", [(two, "2"), (two, "0.5")]),
        _vector("undo", "One adapter, and its journal.", "A1 G1 U1 U2 U3 U4", [(one, "1")], undo=True),
        _vector("undo-sum", "A sum, and its journal.", "A1 G1 U1 U2 U3 U4", both, undo=True),
    ]
    merged += [
        _vector(f"dtype-{dtype}", f"A sum, stored as {dtype}.", "A1 G1 R4 S6 S7", both, dtype=dtype)
        for dtype in ("F16", "F32")
    ]
    merged.append(
        _vector("undo-F32", "Stored with more bits, and its journal.", "A1 G1 R4 U1 U2 U3", both, "F32", undo=True)
    )
    return [*merged, _vector("overflow", "A sum beyond what F16 holds.", "A4", [(one, "1e6")], dtype="F16")]


@dataclass(frozen=True)
class Adapter:
    """``terms``: of each tensor that it edits, as in the vectors of sums; their weights are the recipe's to give."""

    manifest: bytes
    blob: bytes
    terms: dict[str, list[dict[str, Any]]]


def _values(rng: random.Random, dtype: str, *shape: int) -> Matrix:
    count = shape[0] * (shape[1] if shape[1:] else 1)
    return matrix(dtype, shape, [rng.choice((-1, 1)) * rng.randint(128, 255) / 128 for _ in range(count)])


def _tensor(name: str, m: Matrix) -> Tensor:
    return Tensor(name, m["dtype"], tuple(m["shape"]), bytes.fromhex(m["hex"]))


def _matrix(tensor: Tensor) -> Matrix:
    return {"dtype": tensor.dtype, "shape": list(tensor.shape), "hex": tensor.data.hex()}


_RNG = random.Random(23)
BASE = [
    [
        _tensor("ln_f.weight", _values(_RNG, "F32", 5)),
        _tensor(f"{QUERY}.weight", _values(_RNG, "BF16", 7, 5)),
        _tensor(f"{QUERY}.bias", _values(_RNG, "BF16", 7)),
    ],
    [
        Tensor("positions", "I64", (3,), bytes(range(24))),
        _tensor(f"{FC}.weight", _values(_RNG, "F16", 5, 9)),
        _tensor("wte.weight", _values(_RNG, "BF16", 6, 5)),
    ],
]
EVERY = [tensor for shard in BASE for tensor in shard]


def _loose(tensors: Sequence[Tensor], metadata: dict[str, str]) -> bytes:
    """A file in an order of its own, as a trainer's library may write it."""
    entries: dict[str, Any] = {"__metadata__": metadata}
    position = 0
    for t in tensors:
        end = position + len(t.data)
        entries[t.name] = {"dtype": t.dtype, "shape": list(t.shape), "data_offsets": [position, end]}
        position = end
    return container(json.dumps(entries) + "   ", b"".join(t.data for t in tensors))


METADATA: list[dict[str, str]] = [{"format": "pt"}, {}]
FILES = {
    SHARDS[0]: _loose(BASE[0], METADATA[0]),
    SHARDS[1]: canonical_file(BASE[1]),
    "config.json": b'{"model_type": "tiny", "tie_word_embeddings": false, "torch_dtype": "bfloat16"}',
    "model.safetensors.index.json": jcs({
        "metadata": {"total_size": sum(len(t.data) for t in EVERY)},
        "weight_map": {t.name: name for name, shard in zip(SHARDS, BASE, strict=True) for t in shard},
    }),
}  # fmt: skip


def _adapter(seed: int, *paths: str) -> Adapter:
    rng, modules, factors, terms, touched = random.Random(seed), {}, [], {}, {}
    for path in paths:
        turned = path == FC
        out, into, scale = (9, 5, 0.5) if turned else (7, 5, 2)
        a, b, c = (_small(rng, *shape) for shape in ((2, into), (out, 2), (out,)))
        named = [_tensor(f"{path}.lora_{role}.0", m) for role, m in (("A", a), ("B", b), ("bias", c))]
        term = {"rank": 2, "alpha": None, "scale": scale, "A": ref(named[0]), "B": ref(named[1])}
        module = {
            "tensor": f"{path}.weight", "kind": "conv1d" if turned else "linear",
            "orientation": "in_out" if turned else "out_in", "in": into, "out": out, "rank": 2, "terms": [term],
            "bias_tensor": None, "bias_terms": [],
        }  # fmt: skip
        terms[f"{path}.weight"] = [low_rank(b, a, scale=repr(scale), orientation=str(module["orientation"]))]
        if not turned:
            module |= {"bias_tensor": f"{path}.bias", "bias_terms": [{"scale": scale, "value": ref(named[2])}]}
            terms[f"{path}.bias"] = [bias(c, scale=repr(scale))]
        factors += named if not turned else named[:2]
        modules[path] = module
    for tensor in (t for t in EVERY if t.name in terms):
        touched[tensor.name] = digest(tensor.leaf_input)
    data = canonical_file(factors)
    base = {"name": "tiny", "hub": None, **identity(EVERY), "touched": touched, "recipe": None}
    document = {**SMALL, "base": base, "modules": modules, "blobs": [blob(data, "factors")]}
    return Adapter(jcs(document), data, terms)


def _small(rng: random.Random, *shape: int) -> Matrix:
    count = shape[0] * (shape[1] if shape[1:] else 1)
    return matrix("F32", shape, [rng.randint(-99, 99) / 1024 for _ in range(count)])


def _vector(name: str, description: str, clauses: str, weighted: Sequence[tuple[Adapter, str]], dtype: str = "",
            *, undo: bool = False) -> Vector:  # fmt: skip
    terms = sorted((digest(adapter.manifest), weight) for adapter, weight in weighted)
    recipe = {
        **RECIPE,
        "base": identity(EVERY)["weights_root"],
        "terms": [{"adapter": adapter, "weight": weight} for adapter, weight in terms],
        "dtype": dtype or None,
    }
    adapters = {adapter.manifest: adapter.blob for adapter, _ in weighted}
    given = {
        "base": {file: b64(data) for file, data in FILES.items()},
        "adapters": [
            {"manifest": text.decode(), "blobs": {digest(data): b64(data)}} for text, data in adapters.items()
        ],
        "recipe": jcs(recipe).decode(),
        "undo": undo,
    }
    try:
        return valid(name, description, clauses, given, _result(weighted, recipe, dtype, undo))
    except Refused:
        return rejected(name, description, clauses, given)


def _result(
    weighted: Sequence[tuple[Adapter, str]], recipe: dict[str, Any], dtype: str, undo: bool
) -> dict[str, Any]:
    files, journal, every = {}, [], []
    for file, shard, metadata in zip(SHARDS, BASE, METADATA, strict=True):
        made = []
        for tensor in shard:
            after, records = _merged(tensor, weighted, dtype)
            made.append(after)
            journal += [Tensor(f"tensor/{tensor.name}", "U8", (len(records),), records)] if records else []
        every += made
        start = len(FILES[file]) - sum(len(t.data) for t in shard)
        if [t.dtype for t in made] == [t.dtype for t in shard]:
            files[file] = FILES[file][:start] + b"".join(t.data for t in _as_stored(file, made))
        else:
            files[file] = canonical_file(made, metadata)
            journal.append(Tensor(f"header/{file}", "U8", (start,), FILES[file][:start]))
    root = identity(every)["weights_root"]
    record = {"format": "loreg/1", "kind": "merge", "recipe": recipe, "weights_root": root, "tensors": listing(every)}
    files["loreg.json"] = jcs(record)
    if undo:
        beside = ("config.json", "model.safetensors.index.json") if dtype else ()
        journal += [Tensor(f"file/{file}", "U8", (len(FILES[file]),), FILES[file]) for file in beside]
        about = {"recipe": digest(jcs(recipe)), "base": recipe["base"], "weights_root": root}
        files["loreg.undo"] = canonical_file(journal, {"format": "loreg-undo/1", **about})
    return {
        "weights_root": root,
        "tensors": {t.name: digest(t.data) for t in sorted(every, key=lambda t: t.name)},
        "files": {file: {"blake3": digest(data), "sha256": sha256(data)} for file, data in sorted(files.items())},
    }


def _as_stored(file: str, tensors: Sequence[Tensor]) -> list[Tensor]:
    """In the order of their data in a file of the base."""
    size = int.from_bytes(FILES[file][:8], "little")
    entries = json.loads(FILES[file][8 : 8 + size])
    return sorted(tensors, key=lambda t: entries[t.name]["data_offsets"])


def _merged(tensor: Tensor, weighted: Sequence[tuple[Adapter, str]], dtype: str) -> tuple[Tensor, bytes]:
    """A tensor of the output, and its records in a journal: none if it is the base's."""
    target = dtype if dtype and tensor.dtype in FLOATS else tensor.dtype
    terms = [
        {**term, "weight": weight} for adapter, weight in weighted for term in adapter.terms.get(tensor.name, ())
    ]
    if target == tensor.dtype and not terms:
        return tensor, b""
    w = _matrix(tensor)
    after = {**w, "dtype": target, "hex": arithmetic.merged(w, terms, target)}
    back = [{**term, "weight": repr(-float(term["weight"]))} for term in terms]
    kind, raw = FLOATS[tensor.dtype], b""
    if FLOATS[target].width > kind.width or target == tensor.dtype:
        were, predicted = (
            kind.split(bytes.fromhex(h)) for h in (w["hex"], arithmetic.merged(after, back, w["dtype"]))
        )
        raw = journals.record(tensor.dtype, were, predicted)
    return _tensor(tensor.name, after), raw or journals.RAW + tensor.data
