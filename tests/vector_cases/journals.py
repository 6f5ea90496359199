"""Cases for undo journals: records made of exact sums, and journals as files."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Sequence
from typing import Any

from vector_cases.arithmetic import STORED, Matrix, low_rank, matrix, merged
from vector_cases.primitives import FLOATS, Tensor, canonical_file, container, digest
from vector_cases.record import Vector, b64, rejected, valid

RAW = struct.pack("<I", 2**32 - 1)
DIGESTS = {key: digest(key.encode()) for key in ("recipe", "base", "weights_root")}


def journals() -> list[Vector]:
    return [*_recorded(), *_records(), *_files()]


def number(word: int, width: int) -> int:
    """The order number of a storage value [U3]."""
    negative = word >> (width - 1)
    return word if not negative else ~(word ^ (1 << (width - 1)))


def record(dtype: str, were: Sequence[int], predicted: Sequence[int]) -> bytes:
    """The one record of a tensor of few elements, from words [U3, U4]."""
    width = FLOATS[dtype].width
    by = [number(w, width) - number(p, width) for w, p in zip(were, predicted, strict=True)]
    places = [place for place, value in enumerate(by) if value]
    small = [by[place] if abs(by[place]) < 128 else -128 for place in places]
    wide = [by[place] for place in places if abs(by[place]) > 127]
    data = struct.pack(f"<{len(places)}H{len(places)}b{len(wide)}q", *places, *small, *wide)
    raw = FLOATS[dtype].join(list(were))
    return RAW + raw if len(data) > len(raw) else struct.pack("<I", len(places)) + data


def _recorded() -> list[Vector]:
    """W, and a delta: what the journal holds of W."""
    rng = random.Random(17)

    def made(name: str, description: str, w: Matrix, *terms: dict[str, Any]) -> Vector:
        dtype = w["dtype"]
        after = {**w, "hex": merged(w, terms, dtype)}
        back = [{**term, "weight": repr(-float(term["weight"]))} for term in terms]
        words = [FLOATS[dtype].split(bytes.fromhex(text)) for text in (w["hex"], merged(after, back, dtype))]
        given = {"operation": "record", "W": w, "terms": list(terms)}
        return valid(
            name, description, "U2 U3 U4", given, {"after": after["hex"], "base64": b64(record(dtype, *words))}
        )

    vectors = []
    for dtype in STORED:
        for size in (1.0, 0.03125):
            kind = FLOATS[dtype]
            values = [kind.value(kind.nearest(_number(rng, size))) for _ in range(60)]
            w = matrix(dtype, (6, 10), [float(v) for v in values])
            b, a = (matrix("F32", shape, [rng.randint(-9, 9) / 64 for _ in range(shape[0] * shape[1])])
                    for shape in ((6, 2), (2, 10)))  # fmt: skip
            name = f"random-{dtype}-{size}"
            vectors.append(made(name, "Random values.", w, low_rank(b, a, "0.7", "2")))
    one, delta = matrix("F32", (1, 1), [1]), matrix("F32", (1, 3), [0.0078125, -0.0078125, 0.001953125])
    w = matrix("BF16", (1, 3), [1, 1, 1])
    vectors.append(made("power-of-two", "W where the spacing changes.", w, low_rank(one, delta)))
    far = matrix("BF16", (1, 4), [2.0**-20, -(2.0**-20), 0, 2.0**-30])
    vectors.append(made("far", "Corrections beyond a byte, and raw as that is shorter.", far,
                        low_rank(one, matrix("F32", (1, 4), [1, 1, 1, 1.00390625]))))  # fmt: skip
    long = matrix("BF16", (1, 40), [2.0**-20, *[1.0] * 39])
    vectors.append(made("escape", "One correction beyond a byte.", long,
                        low_rank(one, matrix("F32", (1, 40), [1.00390625, *[1.0] * 39]))))  # fmt: skip
    zeros = matrix("BF16", (1, 4), [0, "8000", 1, -1])
    vectors.append(made("zeros", "Both zeros, and a sum that is zero.", zeros,
                        low_rank(one, matrix("F32", (1, 4), [0, 0, -1, 1]))))  # fmt: skip
    return vectors


def _number(rng: random.Random, size: float) -> Any:
    from fractions import Fraction

    return Fraction(rng.gauss(0, size)) or Fraction(size)


def _records() -> list[Vector]:
    """Records and what was predicted: what W was."""
    predicted = [0x3F80, 0xBF80, 0x0000, 0x8000, 0x3F7F, 0x4000]
    raw = FLOATS["BF16"].join(predicted)

    def read(name: str, description: str, data: bytes, words: list[int] | None, clauses: str = "U3") -> Vector:
        given = {"operation": "correct", "dtype": "BF16", "predicted": raw.hex(), "base64": b64(data)}
        if words is None:
            return rejected(name, description, clauses, given)
        return valid(name, description, clauses, given, {"hex": FLOATS["BF16"].join(words).hex()})

    def sparse(places: Sequence[int], values: Sequence[int], wide: Sequence[int] = ()) -> bytes:
        counts = struct.pack("<I", len(places))
        return counts + struct.pack(f"<{len(places)}H{len(values)}b{len(wide)}q", *places, *values, *wide)

    changed = [0x3F81, 0xBF7F, 0x8000, 0x8001, *predicted[4:]]
    return [
        read("nothing", "No correction.", sparse([], []), predicted),
        read(
            "corrections",
            "Corrections of either sign, and across zero.",
            sparse([0, 1, 2, 3], [1, 1, -1, -1]),
            changed,
        ),
        read("raw", "A raw record.", RAW + FLOATS["BF16"].join(changed), changed),
        read("descending", "Places in another order.", sparse([1, 0], [1, 1]), None),
        read("twice", "A place that is corrected twice.", sparse([1, 1], [1, 1]), None),
        read("beyond", "A place beyond the block.", sparse([0, 6], [1, 1]), None),
        read("many", "More corrections than elements.", struct.pack("<I", 7) + bytes(21), None),
        read("of-nothing", "A correction by 0.", sparse([0, 1], [1, 0]), None, "U3 U4"),
        read("short-escape", "A long correction that fits into a byte.", sparse([0], [-128], [127]), None),
        read("no-escape", "A long correction that is missing.", sparse([0], [-128]), None),
        read("long", "Corrections that are longer than the bytes.", sparse([0, 1], [-128, 1], [300]), None, "U4"),
        read("cut", "A record that ends early.", sparse([0, 1], [1, 1])[:-1], None),
        read("cut-count", "A record of three bytes.", b"\0\0\0", None),
        read("cut-raw", "A raw record that ends early.", RAW + raw[:-1], None),
        read("left", "A byte after the last record.", sparse([0], [1]) + b"\0", None, "U4"),
        read("empty", "No record.", b"", None),
    ]


def _files() -> list[Vector]:
    metadata = {"format": "loreg-undo/1", **DIGESTS}
    entries = {
        "tensor/a.weight": struct.pack("<I", 0),
        "header/model.safetensors": bytes(16),
        "file/config.json": b"{}",
    }

    def file(names: dict[str, bytes], about: dict[str, str], dtype: str = "U8") -> bytes:
        tensors = [Tensor(name, dtype, (len(data),), data) for name, data in names.items()]
        return canonical_file(tensors, about)

    def refused(name: str, description: str, data: bytes, clauses: str = "U1") -> Vector:
        return rejected(name, description, clauses, {"operation": "parse", "base64": b64(data)})

    def read(name: str, description: str, data: bytes, clauses: str, sizes: dict[str, int]) -> Vector:
        given = {"operation": "parse", "base64": b64(data)}
        return valid(name, description, clauses, given, {**DIGESTS, "entries": sizes})

    good = file(entries, metadata)
    length = int.from_bytes(good[:8], "little")
    header = json.loads(good[8 : 8 + length])
    header["__metadata__"] = header.pop("__metadata__")
    sizes = {name: len(data) for name, data in sorted(entries.items())}
    return [
        read("file", "A journal.", good, "U1 U5", sizes),
        read("no-entries", "A journal of a merge that changed nothing.", file({}, metadata), "U1", {}),
        refused("another-format", "A later version.", file(entries, {**metadata, "format": "loreg-undo/2"})),
        refused("no-base", "Metadata that is missing.", file(entries, {"format": "loreg-undo/1"})),
        refused("more", "Metadata that is not known.", file(entries, {**metadata, "time": "now"})),
        refused("digest", "A digest that is none.", file(entries, {**metadata, "base": "blake3:00"}), "U1 D1"),
        refused("other-entry", "An entry of no kind that is known.", file({**entries, "other": b""}, metadata)),
        refused("nameless", "An entry of no tensor.", file({**entries, "tensor/": b""}, metadata)),
        refused("dtype", "Entries of another dtype.", file(entries, metadata, "I8")),
        refused("order", "Not in canonical form.", container(json.dumps(header), good[8 + length :]), "U1 S6"),
        refused("cut-file", "A journal that ends early.", good[:-1], "U1 S5"),
    ]  # fmt: skip
