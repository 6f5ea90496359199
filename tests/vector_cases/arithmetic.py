"""Cases for loreg-exact-1: every element in rational numbers, rounded once. Slow, and plainly the definition."""

from __future__ import annotations

import random
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from vector_cases.ordered import Refused
from vector_cases.primitives import FLOATS
from vector_cases.record import Vector, rejected, valid

Matrix = dict[str, Any]
STORED = ("F32", "F16", "BF16", "F8_E5M2", "F8_E4M3")


def matrix(dtype: str, shape: Sequence[int], values: Sequence[float | str]) -> Matrix:
    """Values as numbers that ``dtype`` holds, or as words in hex, big end first, such as '7fc0'."""
    kind = FLOATS[dtype]
    words = [int(value, 16) if isinstance(value, str) else _word(dtype, value) for value in values]
    return {"dtype": dtype, "shape": list(shape), "hex": kind.join(words).hex()}


def _word(dtype: str, value: float) -> int:
    word = FLOATS[dtype].nearest(Fraction(value)) if value else 0
    if FLOATS[dtype].value(word) != Fraction(value):
        raise ValueError(f"{value} is no {dtype}")
    return word


def low_rank(
    b: Matrix, a: Matrix, weight: str = "1", scale: str = "1", orientation: str = "out_in"
) -> dict[str, Any]:
    return {"kind": "low_rank", "weight": weight, "scale": scale, "orientation": orientation, "A": a, "B": b}


def bias(value: Matrix, weight: str = "1", scale: str = "1") -> dict[str, Any]:
    return {"kind": "bias", "weight": weight, "scale": scale, "value": value}


def replace(value: Matrix, weight: str = "1") -> dict[str, Any]:
    return {"kind": "replace", "weight": weight, "value": value}


def values(m: Matrix) -> list[Fraction]:
    try:
        return [FLOATS[m["dtype"]].value(word) for word in FLOATS[m["dtype"]].split(bytes.fromhex(m["hex"]))]
    except ValueError as error:
        raise Refused from error


def merged(w: Matrix, terms: Sequence[dict[str, Any]], dtype: str) -> str:
    """The bytes of the merged tensor, as hex [A1-A5]."""
    first = terms[0] if len(terms) == 1 else {"kind": None}
    if first["kind"] == "replace" and float(first["weight"]) == 1 and first["value"]["dtype"] == dtype:
        return str(first["value"]["hex"])
    before = values(w)
    total = list(before)
    for term in terms:
        for index, value in enumerate(_contribution(term, before, w["shape"])):
            total[index] += value
    return rounded(w, total, dtype)


def rounded(w: Matrix, total: Sequence[Fraction], dtype: str) -> str:
    """Exact sums, one for each element of W, as ``dtype`` in hex [A1, A3, A4]."""
    if dtype not in STORED:
        raise Refused
    source, target = FLOATS[w["dtype"]], FLOATS[dtype]
    out = []
    for word, was, value in zip(source.split(bytes.fromhex(w["hex"])), values(w), total, strict=True):
        try:
            nearest = target.nearest(value) if value else 0
        except OverflowError as error:
            raise Refused from error
        if not value and not was and source.negative(word):
            nearest = 1 << (target.width - 1)
        out.append(nearest)
    return target.join(out).hex()


def _double(value: float) -> Fraction:
    if value - value != 0:
        raise Refused
    return Fraction(value)


def _contribution(term: dict[str, Any], before: list[Fraction], shape: Sequence[int]) -> list[Fraction]:
    weight = float(term["weight"])
    if term["kind"] == "replace":
        w = _double(weight)
        return [w * r - w * was for r, was in zip(values(term["value"]), before, strict=True)]
    c = _double(weight * float(term["scale"]))
    if term["kind"] == "bias":
        return [c * value for value in values(term["value"])]
    a, b = values(term["A"]), values(term["B"])
    (rank, columns), rows = term["A"]["shape"], term["B"]["shape"][0]
    product = [
        [c * sum(b[i * rank + k] * a[k * columns + j] for k in range(rank)) for j in range(columns)]
        for i in range(rows)
    ]
    if term["orientation"] == "in_out":
        product = [list(column) for column in zip(*product, strict=True)]
    return [value for row in product for value in row]


def arithmetic() -> list[Vector]:
    return [*_chosen(), *_zeros(), *_replacing(), *_refused(), *_random(), *_eight_bits()]


def _vector(name: str, description: str, clauses: str, w: Matrix, *terms: dict[str, Any], dtype: str = "") -> Vector:
    target = dtype or w["dtype"]
    given = {"W": w, "dtype": target, "terms": list(terms)}
    try:
        return valid(name, description, clauses, given, {"hex": merged(w, terms, target)})
    except Refused:
        return rejected(name, description, clauses, given)


def one(dtype: str, value: float | str) -> Matrix:
    return matrix(dtype, (1, 1), [value])


def _chosen() -> list[Vector]:
    def added(name: str, description: str, dtype: str, w: float, *deltas: float, clauses: str = "A1") -> Vector:
        ones = one("F32", 1.0)
        return _vector(name, description, clauses, one(dtype, w), *[low_rank(one("F64", d), ones) for d in deltas])

    up = 1 + 2.0**-7
    square = matrix("BF16", (2, 2), [1, 2, 3, 4])
    b, a = matrix("F32", (2, 1), [1, 2]), matrix("F32", (1, 2), [4, 8])
    return [
        added("tie-down", "A tie goes to the even value: 1 + 2^-8 is 1 in BF16.", "BF16", 1.0, 2.0**-8),
        added("tie-up", "A tie goes to the even value, the upper.", "BF16", up, 2.0**-8),
        added("tie-negative", "A tie below zero.", "BF16", -up, -(2.0**-8)),
        added("tie-broken", "2^-60 more than a tie: rounding through F32 or F64 first would lose it.", "BF16", 1.0,
              2.0**-8, 2.0**-60),
        added("tie-broken-far", "2^-1000 more than a tie.", "BF16", 1.0, 2.0**-8, 2.0**-1000),
        added("tie-broken-down", "2^-1000 less than a tie.", "BF16", up, 2.0**-8, -(2.0**-1000)),
        added("tie-f16", "A tie in F16, broken by 2^-40.", "F16", 1.0, 2.0**-11, 2.0**-40),
        added("tie-f32", "A tie in F32, broken by 2^-200.", "F32", 1.0, 2.0**-24, 2.0**-200),
        added("cancellation", "Terms that cancel leave the small one.", "F32", 1.0, 2.0**80, 2.0**-20, -(2.0**80)),
        added("cancel-all", "All but 2^-90 cancels.", "F32", 1.0, -1.0, 2.0**-90),
        added("wide-range", "A sum over 600 binary orders.", "F32", 0.0, 2.0**300, 1.0, -(2.0**300), 2.0**-300),
        added("subnormal", "A subnormal result.", "F16", 2.0**-24, 2.0**-24 * 1.5),
        added("subnormal-tie", "A tie between subnormals.", "F16", 2.0**-24, 2.0**-25),
        added("subnormal-to-normal", "The largest subnormal and half a step.", "F16", 2.0**-14 - 2.0**-24, 2.0**-25),
        added("underflow-tie", "Half of the least subnormal is a tie with zero.", "F32", 0.0, 2.0**-150),
        added("underflow-above", "A little more than half of it is not.", "F32", 0.0, 2.0**-150, 2.0**-200),
        added("below-overflow", "Just below half a step beyond the largest value.", "F16", 65504.0, 16.0,
                -(2.0**-30)),
        added("at-overflow", "Half a step beyond the largest value.", "F16", 65504.0, 16.0, clauses="A4"),
        added("overflow", "Beyond the largest value.", "BF16", 1.0, 2.0**128, clauses="A4"),
        added("overflow-within", "A term beyond the largest value that another cancels.", "F16", 1.0, 2.0**20,
                -(2.0**20)),
        _vector("c-is-a-double", "0.1 times 10 is 1 as a double product: the sum is exactly zero.", "A2", one("F32",
                -1),
                low_rank(one("F32", 1), one("F32", 1), "0.1", "10")),
        _vector("c-rounds-up", "0.7 times 0.1 is a double that is not the exact product.", "A2", one("F32", 0),
                low_rank(one("F64", 2.0**60), one("F32", 1), "0.7", "0.1")),
        _vector("c-underflows", "A product of weight and scale that is zero as a double.", "A2", one("F32", 1),
                low_rank(one("F64", 2.0**1000), one("F32", 1), "1e-200", "1e-200")),
        _vector("c-overflows", "A product of weight and scale that no double holds.", "A2 A4", one("F32", 1),
                low_rank(one("F32", 0), one("F32", 0), "1e200", "1e200")),
        _vector("out-in", "A weight of shape (out, in) gets BA.", "A1 M4", square, low_rank(b, a)),
        _vector("in-out", "A weight of shape (in, out) gets the transpose of BA.", "A1 M4", square,
                low_rank(b, a, orientation="in_out")),
        _vector("bias", "A bias of one dimension.", "A1", matrix("BF16", (3,), [1, -2, 0.5]),
                bias(matrix("F32", (3,), [2.0**-8, 1, 0]), "3", "0.5")),
        _vector("convert", "No term: a conversion, correctly rounded.", "A1", matrix("F32", (1, 3), [1 + 2.0**-8,
                up, 3]),
                dtype="BF16"),
        _vector("widen", "A wider output: one rounding, to the output's dtype.", "A1", one("BF16", 1),
                low_rank(one("F64", 2.0**-20), one("F32", 1)), dtype="F32"),
        _vector("narrow", "A narrower output: one rounding, not two.", "A1", one("F32", 1 + 2.0**-8 - 2.0**-23),
                low_rank(one("F64", 2.0**-23), one("F32", 1)), dtype="BF16"),
    ]  # fmt: skip


def _zeros() -> list[Vector]:
    def zero(
        name: str, description: str, w: float | str, *deltas: float, dtype: str = "F32", out: str = ""
    ) -> Vector:
        terms = [low_rank(one("F64", d), one("F32", 1)) for d in deltas]
        return _vector(name, description, "A3", one(dtype, w), *terms, dtype=out)

    return [
        zero("plus-zero-stays", "+0 and nothing added.", 0.0, 0.0),
        zero("minus-zero-stays", "-0 and nothing added keeps its bits.", "80000000", 0.0),
        zero("minus-zero-cancelled", "-0 and terms that cancel keeps its bits.", "80000000", 1.0, -1.0),
        zero("minus-zero-converted", "-0 in another dtype is its -0.", "80000000", out="BF16"),
        zero("exact-zero", "A weight that is cancelled becomes +0.", -1.0, 1.0),
        zero("exact-zero-positive", "A positive weight that is cancelled becomes +0.", 1.0, -1.0),
        zero("underflow-negative", "A negative sum that rounds to zero is -0.", 0.0, -(2.0**-200)),
        zero(
            "underflow-positive", "A positive sum that rounds to zero is +0, though W is -0.", "80000000", 2.0**-200
        ),
        zero("underflow-from-weight", "A weight that is cancelled to -2^-200 becomes -0.", 1.0, -1.0, -(2.0**-200)),
        zero("cancel-to-least", "All cancels but the least subnormal.", "00000001", 2.0**-149, -(2.0**-149)),
    ]


def _replacing() -> list[Vector]:
    w = matrix("BF16", (1, 3), [1, -2, 3])
    r = matrix("BF16", (1, 3), ["8000", "3f81", 0.0])
    single = matrix("F32", (1, 3), [1 + 2.0**-8, 2.0**-20, -1])
    return [
        _vector("replace-alone", "Alone at weight 1: its bytes, -0 included.", "A5", w, replace(r)),
        _vector("replace-half", "At weight 0.5 it is a sum: -0 is not kept.", "A1 A5", w, replace(r, "0.5")),
        _vector("replace-twice", "Two replacements are a sum.", "A1 A5", w, replace(r), replace(w, "0.5")),
        _vector("replace-and-add", "A replacement and a delta.", "A1 A5", w, replace(r),
                low_rank(matrix("F32", (1, 1), [2.0**-8]), matrix("F32", (1, 3), [1, 1, 1]))),
        _vector("replace-other-dtype", "Of another dtype it is rounded to the output's.", "A1 A5", w,
                replace(single)),
        _vector("replace-minus", "At weight -1: twice W less R.", "A1", w, replace(r, "-1")),
        _vector("replace-weight-double", "0.1 R - 0.1 W with the double nearest to 0.1.", "A1", single,
                replace(matrix("F32", (1, 3), [3, 5, 7]), "0.1")),
    ]  # fmt: skip


def _refused() -> list[Vector]:
    def inputs(name: str, description: str, w: str, b: str, a: str) -> Vector:
        return _vector(name, description, "A4", one("F32", w), low_rank(one("F32", b), one("F32", a)))

    zero, nan, inf = "00000000", "7fc00000", "7f800000"
    return [
        inputs("w-nan", "NaN in W.", nan, zero, zero),
        inputs("w-infinite", "Infinity in W.", inf, zero, zero),
        inputs("a-nan", "NaN in A, times zero.", zero, zero, nan),
        inputs("b-infinite", "Infinity in B, times zero.", zero, inf, zero),
        _vector(
            "bias-nan", "NaN in a bias.", "A4", matrix("F16", (2,), [0, 0]), bias(matrix("F16", (2,), [0, "7e00"]))
        ),
        _vector("convert-overflow", "A conversion beyond the largest value.", "A4", one("F32", 65520), dtype="F16"),
        _vector(
            "bf16-infinite", "Minus infinity in W.", "A4", one("BF16", "ff80"), low_rank(one("F32", 0), one("F32", 0))
        ),
    ]


def _random() -> list[Vector]:
    """Small matrices of any values, several terms, both orientations; words are drawn, not values."""
    draw = random.Random(1)

    def filled(dtype: str, rows: int, columns: int, low: int, high: int) -> Matrix:
        kind = FLOATS[dtype]
        bias = 2 ** (kind.exponent - 1) - 1
        words = [
            (draw.getrandbits(1) << (kind.width - 1)) | (draw.randint(low, high) + bias) << kind.mantissa
            | draw.getrandbits(kind.mantissa)
            for _ in range(rows * columns)
        ]  # fmt: skip
        return {"dtype": dtype, "shape": [rows, columns], "hex": kind.join(words).hex()}

    vectors = []
    for index in range(12):
        dtype = ("BF16", "F16", "F32")[index % 3]
        out = dtype if index < 9 else ("F32", "BF16", "F16")[index % 3]
        rows, columns = draw.randint(1, 4), draw.randint(1, 5)
        orientation = draw.choice(("out_in", "in_out"))
        inner, outer = (columns, rows) if orientation == "out_in" else (rows, columns)
        terms = []
        for _ in range(draw.randint(1, 3)):
            rank = draw.randint(1, 3)
            b, a = filled("F32", outer, rank, -6, 0), filled(draw.choice(("F32", "BF16")), rank, inner, -6, 0)
            terms.append(low_rank(b, a, draw.choice(("1", "0.7", "-1.5", "1e-3")), draw.choice(("2", "0.1", "16")),
                                  orientation))  # fmt: skip
        w = filled(dtype, rows, columns, -8, 2)
        vectors.append(
            _vector(f"random-{index}", f"{dtype} to {out}, {len(terms)} terms.", "A1 A2", w, *terms, dtype=out)
        )
    return vectors


def _eight_bits() -> list[Vector]:
    """Weights of eight bits, which half of the time are subnormal."""

    def added(name: str, description: str, dtype: str, w: float | str, *deltas: float, clauses: str = "A1",
              out: str = "") -> Vector:  # fmt: skip
        terms = [low_rank(one("F64", d), one("F32", 1)) for d in deltas]
        return _vector(f"f8-{name}", description, clauses, one(dtype, w), *terms, dtype=out)

    words = ["00", "80", "01", "81", "07", "08", "88", "38", "b9", "47", "7e", "fe"]
    e4m3 = matrix("F8_E4M3", (3, 4), words)
    e5m2 = matrix("F8_E5M2", (3, 4), [*words[:-2], "7b", "fb"])
    b, a = matrix("F32", (3, 1), [1, -2, 0.375]), matrix("F32", (1, 4), [2.0**-9, -0.25, 0.0625, -(2.0**-6)])
    return [
        added("tie", "A tie in F8_E4M3 goes to the even value.", "F8_E4M3", 1.0, 2.0**-4),
        added("tie-broken", "2^-60 more than a tie.", "F8_E4M3", 1.0, 2.0**-4, 2.0**-60),
        added("tie-e5m2", "A tie in F8_E5M2, broken by -2^-60.", "F8_E5M2", 1.25, 2.0**-3, -(2.0**-60)),
        added("subnormal-tie", "A tie between subnormals.", "F8_E4M3", 2.0**-9, 2.0**-10),
        added("underflow", "Less than half of the least subnormal is a zero with its sign.", "F8_E5M2", 0.0,
              -(2.0**-17), 2.0**-40, clauses="A1 A3"),
        added("top-tie", "464 is halfway to what is NaN, and is 448.", "F8_E4M3", 448, 16, clauses="A1 A4"),
        added("top-above", "A little more than 464.", "F8_E4M3", 448, 16, 2.0**-40, clauses="A4"),
        added("top-below-zero", "As much below zero.", "F8_E4M3", -448, -16, -(2.0**-40), clauses="A4"),
        added("top-e5m2", "Just below half a step beyond the largest value.", "F8_E5M2", 57344, 4096, -(2.0**-30),
              clauses="A1 A4"),
        added("overflow-e5m2", "Half a step beyond it.", "F8_E5M2", 57344, 4096, clauses="A4"),
        added("nan", "NaN in a weight.", "F8_E4M3", "7f", 0.0, clauses="A4"),
        added("infinite", "Infinity in a weight.", "F8_E5M2", "7c", 0.0, clauses="A4"),
        added("widen", "Stored as BF16.", "F8_E4M3", 448, 16, 2.0**-40, out="BF16", clauses="A1 R4"),
        _vector("f8-e4m3", "All kinds of values.", "A1", e4m3, low_rank(matrix("F32", (3, 1), [1, 0.5, 0.25]),
                matrix("F32", (1, 4), [2.0**-11, -0.03125, 2.0**-10, 0]))),
        _vector("f8-e5m2", "All kinds of values, in the other dtype.", "A1", e5m2, low_rank(b, a, "0.1")),
        added("f64", "F64 is not a dtype that weights are merged in.", "F64", 1.0, 1.0, clauses="A4"),
    ]  # fmt: skip
