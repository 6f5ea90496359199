"""Cases for the methods that combine deltas: what each adapter adds to one tensor, and what they add together."""

from __future__ import annotations

import copy
import struct
from collections.abc import Sequence
from math import prod
from typing import Any

from vector_cases.arithmetic import matrix
from vector_cases.documents import ADAPTERS, Edit, at, without
from vector_cases.form_vector import Tensor, drawn
from vector_cases.methods import METHODS, Given, mask_key
from vector_cases.ordered import Dense, LowRank, delta, doubles, finite, numbers
from vector_cases.record import Vector, rejected, valid

_GENERAL = {"normalize": False, "lambda": 1}
_THIN = {**_GENERAL, "density": 1, "rescale": False}
_DRAWN = {**_THIN, "rescale": True, "seed": 0}
_ELECT = {"consensus": "sum"}

DEFAULTS: dict[str, dict[str, Any]] = {
    "task_arithmetic": _GENERAL,
    "magnitude_prune": {"density": 0.5},
    "ties:peft": {"density": 0.5, "majority_sign": "total"},
    "ties:mergekit": {**_THIN, **_ELECT, "normalize": True},
    "dare_linear:peft": {"density": 0.5, "seed": 0},
    "dare_linear:mergekit": _DRAWN,
    "dare_ties:peft": {"density": 0.5, "majority_sign": "total", "seed": 0},
    "dare_ties:mergekit": {**_DRAWN, **_ELECT},
    "della": {**_DRAWN, **_ELECT, "normalize": True, "epsilon": 0.15},
    "della_linear": {**_DRAWN, "epsilon": 0.15},
    "breadcrumbs": {**_THIN, "gamma": 0.01},
    "breadcrumbs_ties": {**_THIN, **_ELECT, "gamma": 0.01},
    "sce": {"select_topk": 1},
    "slerp": {},
    "nuslerp": {"flatten": True, "row_wise": False},
    "karcher": {"max_iter": 10, "tol": 1e-5},
    "model_stock": {"filter_wise": False},
}
"""The parameters of C1 with their defaults, and a density of 0.5 where there is none."""


def _matrices(tensor: Tensor) -> list[list[list[float]]]:
    """The last two dimensions as matrices, of which those before make a list; a vector is a matrix of one column."""
    shape, values = tensor["shape"], numbers(tensor)
    rows, columns = (shape[0], 1) if len(shape) == 1 else shape[-2:]
    stack = prod(shape[:-2]) if len(shape) > 2 else 1
    cut = [values[i * columns : (i + 1) * columns] for i in range(stack * rows)]
    return [cut[e * rows : (e + 1) * rows] for e in range(stack)]


def _delta(parts: list[dict[str, Any]], shape: Sequence[int]) -> list[float]:
    """The delta of one adapter [A6], row by row."""
    rows, columns = (shape[0], 1) if len(shape) == 1 else shape[-2:]
    values = []
    for e in range(prod(shape[:-2]) if len(shape) > 2 else 1):
        terms: list[LowRank | Dense] = []
        for part in parts:
            scale = float(part["scale"])
            if "value" in part:
                terms.append(Dense(scale, _matrices(part["value"])[e]))
            else:
                terms.append(LowRank(scale, _matrices(part["left"])[e], _matrices(part["right"])[e]))
        finite(terms)
        values += [x for row in delta(terms, rows, columns) for x in row]
    return values


def outcome(given: dict[str, Any]) -> dict[str, Any]:
    """What the specification says of a vector's input."""
    p, terms, shape = given["parameters"], given["terms"], given["shape"]
    keys = [mask_key(p.get("seed", 0), term["adapter"], given["tensor"]) for term in terms]
    deltas = [_delta(term["delta"], shape) for term in terms]
    made = METHODS[given["method"]](Given(deltas, [float(t["weight"]) for t in terms], keys, shape), p)
    words = [struct.pack(">Q", key).hex() for key in keys] if "seed" in p else None
    return {"keys": words, "hex": doubles(made)}


def values(seed: str, *shape: int, dtype: str = "F64", scale: str = "1") -> dict[str, Any]:
    """A part of a delta: scale·value."""
    return {"scale": scale, "value": drawn(seed, dtype, *shape)}


def of(dtype: str, shape: Sequence[int], *elements: float) -> dict[str, Any]:
    """A part with these values."""
    return {"scale": "1", "value": matrix(dtype, shape, elements)}


def factors(seed: str, rows: int, rank: int, columns: int, dtype: str = "F32", scale: str = "0.7") -> dict[str, Any]:
    left, right = drawn(f"{seed} L", dtype, rows, rank), drawn(f"{seed} R", dtype, rank, columns)
    return {"scale": scale, "left": left, "right": right}


Part = dict[str, Any]


def _given(method: str, parameters: dict[str, Any], shape: Sequence[int], *terms: tuple[str, list[Part]]) -> Any:
    named = [
        {"adapter": ADAPTERS[i % len(ADAPTERS)], "weight": weight, "delta": parts}
        for i, (weight, parts) in enumerate(terms)
    ]
    return {
        "method": method, "parameters": {**DEFAULTS[method], **parameters}, "tensor": "h.0.attn.weight",
        "shape": list(shape), "terms": named,
    }  # fmt: skip


THREE = (
    ("0.7", [factors("a", 4, 2, 5)]),
    ("-0.3", [factors("b", 4, 1, 5, "BF16", "2"), values("b", 4, 5, dtype="F32", scale="0.1")]),
    ("1.1", [values("c", 4, 5), factors("d", 4, 1, 5), factors("e", 4, 2, 5)]),
)
TWO = THREE[::2]
NONE: tuple[str, list[Part]] = ("0.4", [])


def _valid(name: str, description: str, clauses: str, *args: Any) -> Vector:
    given = _given(*args)
    return valid(name, description, clauses, given, outcome(given))


def methods() -> list[Vector]:
    return [*_defaults(), *_thinned(), *_masks(), *_angles(), *_refused()]


def _clauses(method: str) -> str:
    if method == "sce":
        return "C2 C4 C6"
    if method in ("slerp", "nuslerp", "karcher", "model_stock"):
        return "C2 C7"
    return "C1 C2 C4 C5 A6" + (" A7 C3" if "seed" in DEFAULTS[method] else "")


def _defaults() -> list[Vector]:
    vectors = []
    for name in METHODS:
        terms = TWO if name in ("slerp", "nuslerp") else THREE
        clauses = _clauses(name)
        label = name.replace(":", "-")
        vectors.append(_valid(label, f"{name}, as it is by default.", clauses, name, {}, (4, 5), *terms))
        if "density" in DEFAULTS[name]:
            thin = {"density": 0.58, **({"gamma": 0.09} if "gamma" in DEFAULTS[name] else {})}
            vectors.append(
                _valid(f"{label}-thin", f"{name} that drops elements.", clauses, name, thin, (4, 5), *THREE)
            )
        absent = (terms[0], NONE) if len(terms) == 2 else (*terms[:2], NONE)
        vectors.append(
            _valid(f"{label}-absent", f"{name}; the last adapter leaves the tensor alone.", clauses, name, {}, (4, 5),
                   *absent)
        )  # fmt: skip
        stack = (("0.7", [values("d", 2, 2, 3)]), ("0.5", [values("e", 2, 2, 3), values("f", 2, 2, 3)]))
        vectors.append(_valid(f"{label}-stack", f"{name} on a stack.", clauses, name, {}, (2, 2, 3), *stack))
    return vectors


def _thinned() -> list[Vector]:
    def case(name: str, description: str, method: str, parameters: dict[str, Any], *terms: Any,
             shape: Sequence[int] = (4, 5)) -> Vector:  # fmt: skip
        return _valid(name, description, _clauses(method), method, parameters, shape, *(terms or THREE))

    ties = of("F32", (8,), 1, -2, 2, 0.5, -1, 1, 2, -0.5)
    zeros = of("F32", (2, 3), *[0] * 6)
    cancel = [("1", [of("F32", (4,), 1, -1, 2, 0)]), ("1", [of("F32", (4,), -1, 1, -3, 0)])]
    vector = (("1", [values("g", 7)]), ("0.5", [values("h", 7)]))
    return [
        case("order", "Of equal magnitudes the lower index is kept.", "magnitude_prune", {"density": 0.5},
             ("1", [ties]), shape=(8,)),
        case("order-crumbs", "Two of the largest and three of the smallest go.", "breadcrumbs",
             {"density": 0.375, "gamma": 0.3}, ("1", [ties]), shape=(8,)),
        case("order-rank", "The rank in a row decides the chance.", "della_linear", {"density": 0.5, "epsilon": 0.4},
             ("1", [ties]), shape=(8,)),
        case("crumbs-few", "Less is dropped than gamma says, as density leaves no more.", "breadcrumbs",
             {"density": 0.9, "gamma": 0.5}),
        case("none-kept", "A density that keeps no element.", "magnitude_prune", {"density": 0.01}),
        case("one-kept", "The same, where at least one is kept.", "ties:mergekit", {"density": 0.01}),
        case("one-column", "Rows of one element, kept with the density itself.", "della", {"density": 0.5},
             ("1", [values("g", 7, 1)]), ("0.5", [values("h", 7, 1)]), shape=(7, 1)),
        case("vector", "A vector is one row.", "della", {"density": 0.5}, *vector, shape=(7,)),
        case("rescale", "Magnitudes brought to what they were.", "ties:mergekit", {"density": 0.5, "rescale": True}),
        case("no-rescale", "And not.", "dare_linear:mergekit", {"density": 0.5, "rescale": False}),
        case("rescale-zeros", "A delta of zeros has no factor.", "breadcrumbs", {"density": 0.5, "rescale": True},
             ("1", [zeros]), ("1", [values("i", 2, 3)]), shape=(2, 3)),
        case("normalize", "Divided by the sum of the weights.", "task_arithmetic", {"normalize": True}),
        case("normalize-cancel", "Weights that cancel divide nothing.", "task_arithmetic", {"normalize": True},
             ("0.1", [values("j", 2, 2)]), ("0.2", [values("k", 2, 2)]), ("-0.3", [values("l", 2, 2)]), shape=(2, 2)),
        case("lambda", "Times 0.3.", "dare_ties:mergekit", {"density": 0.7, "lambda": 0.3, "normalize": True}),
        case("count", "Signs are counted.", "ties:mergekit", {"density": 0.7, "consensus": "count"}),
        case("frequency", "Signs are counted, before they are weighed.", "ties:peft",
             {"density": 0.7, "majority_sign": "frequency"}),
        case("frequency-dare", "The same, of what is drawn.", "dare_ties:peft",
             {"density": 0.7, "majority_sign": "frequency"}),
        case("sign-of-zero", "A sum of zero elects plus.", "ties:mergekit", {}, *cancel, shape=(4,)),
        case("sign-of-zero-peft", "The same before weighing.", "ties:peft", {"density": 1}, *cancel, shape=(4,)),
        case("sign-of-zero-count", "And by count.", "ties:mergekit", {"consensus": "count"}, *cancel, shape=(4,)),
        case("all-kept", "A density of 1 keeps all, and divides nothing.", "dare_linear:peft", {"density": 1}),
        case("crumbs-elect", "Without the largest and smallest, signs elected.", "breadcrumbs_ties",
             {"density": 0.5, "gamma": 0.1, "rescale": True, "normalize": True}),
        case("sce-select", "Four tenths of the elements that differ.", "sce", {"select_topk": 0.4}),
        case("sce-alike", "Deltas that do not differ: none is selected.", "sce", {"select_topk": 0.5},
             ("0.5", [values("m", 2, 3)]), ("0.5", [values("m", 2, 3)]), shape=(2, 3)),
        case("sce-sign-of-zero", "A sum of zero elects plus.", "sce", {}, *cancel, shape=(4,)),
        case("sce-share", "Shares that sum to less than 1e-6 divide as that.", "sce", {},
             ("1", [of("F32", (2,), 1000, 0)]), ("1", [of("F32", (2,), 0.25, -0.125)]), shape=(2,)),
        case("sce-zeros", "Deltas of zeros have equal shares.", "sce", {}, ("1", [zeros]), ("1", [zeros]),
             shape=(2, 3)),
        case("replaced", "A tensor that is replaced adds R - W, after the low-rank part.", "task_arithmetic", {},
             ("0.7", [factors("n", 2, 1, 3), values("R", 2, 3, dtype="BF16"), values("W", 2, 3, dtype="BF16",
              scale="-1")]), ("1", [values("o", 2, 3)]), shape=(2, 3)),
        case("same-adapter", "An adapter twice, with the same mask.", "dare_linear:mergekit", {"density": 0.5},
             *THREE, ("2", [values("p", 4, 5)])),
    ]  # fmt: skip


def _masks() -> list[Vector]:
    ones = of("F32", (64,), *[1.0] * 64)

    def drawn_ones(name: str, description: str, seed: int, tensor: str, index: int = 0) -> Vector:
        given = _given("dare_linear:mergekit", {"density": 0.5, "seed": seed, "rescale": False}, (64,), ("1", [ones]))
        given["tensor"], given["terms"][0]["adapter"] = tensor, ADAPTERS[index]
        return valid(f"mask-{name}", description, "A7 C3 C4", given, outcome(given))

    return [
        drawn_ones("0", "The mask of seed 0.", 0, "h.0.attn.weight"),
        drawn_ones("1", "Of seed 1.", 1, "h.0.attn.weight"),
        drawn_ones("last", "Of the largest seed.", 2**53 - 1, "h.0.attn.weight"),
        drawn_ones("tensor", "Of another tensor, whose name is not ASCII.", 0, "h.0.é.weight"),
        drawn_ones("adapter", "Of another adapter.", 0, "h.0.attn.weight", 1),
    ]


def _angles() -> list[Vector]:
    def case(name: str, description: str, method: str, parameters: dict[str, Any], *terms: Any,
             shape: Sequence[int] = (4, 5)) -> Vector:  # fmt: skip
        return _valid(name, description, "C2 C7", method, parameters, shape, *(terms or TWO))

    x, above = values("x", 3, 2), values("above11", 3, 2)
    same = (("1", [x]), ("3", [{**x, "scale": "2"}]))
    opposite = (("1", [x]), ("2", [{**x, "scale": "-1"}]))
    zero = of("F32", (3, 2), *[0] * 6)
    right = (("1", [of("F32", (4,), 1, 0, 0, 0)]), ("2", [of("F32", (4,), 0, 3, 0, 0)]))
    small = {"shape": (3, 2)}
    return [
        case("slerp-parallel", "Parallel deltas: a straight line.", "slerp", {}, *same, **small),
        case("slerp-opposite", "Opposite ones: a straight line too.", "slerp", {}, *opposite, **small),
        case("slerp-zero", "A delta of zeros is at a right angle.", "slerp", {}, ("1", [x]), ("3", [zero]), **small),
        case("slerp-right", "A right angle, a third of the way.", "slerp", {}, *right, shape=(4,)),
        case("slerp-near", "Nearly parallel, and not yet a line.", "slerp", {}, ("1", [of("F32", (2,), 1, 0.0)]),
             ("3", [of("F32", (2,), 1, 0.0390625)]), shape=(2,)),
        case("slerp-nearer", "Nearer: a line.", "slerp", {}, ("1", [of("F32", (2,), 1, 0.0)]),
             ("3", [of("F32", (2,), 1, 0.03125)]), shape=(2,)),
        case("slerp-beyond", "A share below 0.", "slerp", {}, ("2", [x]), ("-0.5", [values("y", 3, 2)]), **small),
        case("nuslerp-rows", "An angle for each row.", "nuslerp", {"flatten": False}),
        case("nuslerp-columns", "An angle for each column.", "nuslerp", {"flatten": False, "row_wise": True}),
        case("nuslerp-one-row", "A matrix of one row has columns of one element.", "nuslerp",
             {"flatten": False, "row_wise": True}, ("1", [values("x", 1, 3)]), ("2", [values("y", 1, 3)]),
             shape=(1, 3)),
        case("nuslerp-vector", "A vector is one row, whatever is asked.", "nuslerp",
             {"flatten": False, "row_wise": True}, ("1", [values("x", 4)]), ("2", [values("y", 4)]), shape=(4,)),
        case("nuslerp-cancel", "Weights that cancel: equal shares.", "nuslerp", {}, ("0.5", [x]),
             ("-0.5", [values("y", 3, 2)]), **small),
        case("nuslerp-nearly-cancel", "A sum of weights of 1e-7: equal shares.", "nuslerp", {}, ("1", [x]),
             ("-0.9999999", [values("y", 3, 2)]), **small),
        case("nuslerp-near", "Nearly parallel ones have an angle.", "nuslerp", {}, ("1", [of("F32", (2,), 1, 0)]),
             ("2", [of("F32", (2,), 1, 2.0**-6)]), shape=(2,)),
        case("nuslerp-parallel", "Parallel deltas.", "nuslerp", {}, *same, **small),
        case("nuslerp-negative", "A sum of weights below 0.", "nuslerp", {}, ("-1", [x]),
             ("-2", [values("y", 3, 2)]), **small),
        case("karcher-one", "A single delta is itself.", "karcher", {}, ("2", [x]), **small),
        case("karcher-three", "Three, all of positive weight.", "karcher", {}, ("0.7", [factors("a", 4, 2, 5)]),
             ("0.2", [values("b", 4, 5)]), ("1.1", [values("c", 4, 5)])),
        case("karcher-zero", "A delta of zeros has a length and no direction.", "karcher", {}, ("1", [x]),
             ("2", [zero]), ("1", [values("y", 3, 2)]), **small),
        case("karcher-zeros", "Nothing but zeros.", "karcher", {}, ("1", [zero]), ("2", [zero]), **small),
        case("karcher-opposite", "Opposite deltas: it starts at the first.", "karcher", {}, ("1", [x]),
             ("1", [{**x, "scale": "-1"}]), **small),
        case("karcher-steps", "One step.", "karcher", {"max_iter": 1}, ("1", [x]), ("2", [values("y", 3, 2)]),
             ("3", [values("z", 3, 2)]), **small),
        case("karcher-most", "As many steps as there may be, of which few are needed.", "karcher",
             {"max_iter": 10_000}, ("1", [x]), ("2", [values("y", 3, 2)]), **small),
        case("karcher-loose", "A tolerance that ends it at once.", "karcher", {"tol": 0.5}, ("1", [x]),
             ("2", [values("y", 3, 2)]), ("3", [values("z", 3, 2)]), **small),
        case("stock-rows", "A factor for each row.", "model_stock", {"filter_wise": True}, *THREE),
        case("stock-negative", "A weight below 0 turns the angle round.", "model_stock", {}, ("1", [x]),
             ("-1", [values("y", 3, 2)]), **small),
        case("stock-opposite", "Opposite deltas: the factor is 0.", "model_stock", {}, *opposite, **small),
        case("stock-nearly-opposite", "Nearly opposite ones: the factor is 0 too.", "model_stock", {},
             ("1", [of("F32", (2,), 1, 0)]), ("1", [of("F32", (2,), -1, 2.0**-11)]), shape=(2,)),
        case("stock-parallel", "A cosine that rounds to more than 1 is 1.", "model_stock", {}, ("1", [above]),
             ("1", [above]), ("2", [values("y", 3, 2)]), **small),
        case("stock-zero", "A delta of zeros.", "model_stock", {}, ("1", [x]), ("1", [zero]), **small),
    ]  # fmt: skip


def _refused() -> list[Vector]:
    def refused(name: str, description: str, clauses: str, method: str, *edits: Edit) -> Vector:
        given = copy.deepcopy(_given(method, {}, (4, 5), *(TWO if method in ("slerp", "nuslerp") else THREE)))
        for edit in edits:
            edit(given)
        return rejected(name, description, clauses, given)

    def parameter(name: str, value: Any) -> Edit:
        return at(f"parameters/{name}", value)

    wrong = (
        ("density-0", "magnitude_prune", "density", 0), ("density-large", "dare_linear:peft", "density", 1.5),
        ("density-text", "ties:peft", "density", "0.5"), ("density-null", "ties:peft", "density", None),
        ("epsilon-half", "della", "epsilon", 0.5), ("gamma-1", "breadcrumbs", "gamma", 1),
        ("gamma-negative", "breadcrumbs_ties", "gamma", -0.1), ("lambda-null", "task_arithmetic", "lambda", None),
        ("seed-negative", "dare_ties:peft", "seed", -1), ("seed-real", "dare_ties:mergekit", "seed", 0.5),
        ("seed-large", "dare_linear:mergekit", "seed", 2**53), ("consensus", "della", "consensus", "total"),
        ("majority", "ties:peft", "majority_sign", "sum"), ("flag", "ties:mergekit", "normalize", 1),
        ("select-0", "sce", "select_topk", 0), ("flatten", "nuslerp", "flatten", None),
        ("tol-0", "karcher", "tol", 0), ("steps-0", "karcher", "max_iter", 0),
        ("steps-many", "karcher", "max_iter", 10_001), ("steps-endless", "karcher", "max_iter", 2**53 - 1),
        ("filter", "model_stock", "filter_wise", "true"),
    )  # fmt: skip

    def dropped(index: int) -> Edit:
        return lambda given: given["terms"].pop(index)

    def twice(given: Any) -> None:
        given["terms"].append(given["terms"][0])

    nan = {"scale": "1", "value": matrix("F32", (4, 5), ["7fc00000"] * 20)}
    refusals = [
        refused(f"parameter-{name}", f"{key} of {value!r}.", "C1", method, parameter(key, value))
        for name, method, key, value in wrong
    ]
    return [
        *refusals,
        refused("parameter-missing", "A default that is not said.", "C1 R3", "ties:mergekit",
                without("parameters/lambda")),
        refused("parameter-unknown", "A parameter that the method has not.", "C1 R3", "slerp", parameter("t", 0.5)),
        refused("parameter-rank", "A truncation, where nothing is composed.", "C1 R3", "sce", parameter("rank", 4)),
        refused("range", "Chances below 0.", "C1", "della", parameter("density", 0.1)),
        refused("range-above", "Chances above 1.", "C1", "della_linear", parameter("density", 0.9)),
        refused("slerp-three", "Three deltas, for a path between two.", "C1", "slerp", twice),
        refused("nuslerp-one", "One delta, for a path between two.", "C1", "nuslerp", dropped(0)),
        refused("stock-one", "One delta, where an angle is needed.", "C1", "model_stock", dropped(0), dropped(0)),
        refused("slerp-weights", "Shares of a sum of 0.", "C7", "slerp", at("terms/0/weight", "-1.1")),
        refused("karcher-weights", "Shares of a sum below 0.", "C7", "karcher", at("terms/0/weight", "-1")),
        refused("weights-overflow", "Weights whose sum no double holds.", "C2", "task_arithmetic",
                at("terms/0/weight", "1.5e+308"), at("terms/2/weight", "1e+308")),
        refused("nan", "NaN in a delta.", "C2 A4", "task_arithmetic", at("terms/2/delta", [nan])),
    ]  # fmt: skip
