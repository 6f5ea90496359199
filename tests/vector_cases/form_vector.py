"""One weight, the terms of a module, and the bytes that a merge makes of them: how such a vector is made."""

from __future__ import annotations

import random
from collections.abc import Sequence
from fractions import Fraction
from math import prod
from typing import Any

from vector_cases.arithmetic import rounded, values
from vector_cases.forms import expert_of, is_exact, terms_of
from vector_cases.ordered import Dense, LowRank, Refused, Terms, delta, doubles, finite, turned
from vector_cases.primitives import FLOATS
from vector_cases.record import Vector, rejected, valid
from vector_cases.term import Given

Tensor = dict[str, Any]


def drawn(seed: str, dtype: str, *shape: int, low: int = -4, high: int = 0) -> Tensor:
    """Any values of magnitudes from 2^low to 2^(high + 1), all bits drawn."""
    draw, kind = random.Random(seed), FLOATS[dtype]
    bias = 2 ** (kind.exponent - 1) - 1
    words = [
        (draw.getrandbits(1) << (kind.width - 1)) | (draw.randint(low, high) + bias) << kind.mantissa
        | draw.getrandbits(kind.mantissa)
        for _ in range(prod(shape))
    ]  # fmt: skip
    return {"dtype": dtype, "shape": list(shape), "hex": kind.join(words).hex()}


def outcome(given: dict[str, Any]) -> dict[str, Any]:
    """What the specification says of a vector's input."""
    W, turn, shape = given["W"], given["orientation"] == "in_out", given["W"]["shape"]
    stacked = any(term["form"] == "lora_experts" for term in given["terms"])
    count, rows = (shape[0], shape[1]) if stacked else (1, shape[0])
    flat = [float(x) for x in values(W)]
    columns = len(flat) // count // rows
    total, deltas, exact = [], [], True
    for e in range(count):
        part = flat[e * rows * columns : (e + 1) * rows * columns]
        stored = [part[i * columns : (i + 1) * columns] for i in range(rows)]
        unweighted: list[LowRank | Dense] = []
        for term in given["terms"]:
            scale = float(term["scale"])
            t = Given(term["tensors"], term["parameters"], scale, turned(stored) if turn else stored)
            made = expert_of(t, e) if stacked else terms_of(term["form"], t)
            exact = exact and is_exact(term["form"], t, made)
            unweighted += [(x.turned() if turn else x).times(float(term["weight"])) for x in made]
        weighted = [x.times(float(given["recipe_weight"])) for x in unweighted]
        finite(weighted)
        deltas += [x for row in delta(unweighted, rows, columns) for x in row]
        total += _exact_sum(stored, weighted)
    return {
        "hex": rounded(W, total, W["dtype"]),
        "delta": doubles(deltas),
        "arithmetic": "loreg-exact-1" if exact else "loreg-f64-1",
    }


def _exact_sum(W: list[list[float]], terms: Terms) -> list[Fraction]:
    places = ((i, j) for i in range(len(W)) for j in range(len(W[0])))
    return [Fraction(W[i][j]) + sum(x.exactly(i, j) for x in terms) for i, j in places]


def given_of(
    form: str,
    W: Tensor,
    tensors: dict[str, Tensor],
    parameters: dict[str, Any] | None = None,
    scale: str = "1",
    weight: str = "1",
    recipe_weight: str = "1",
    orientation: str = "out_in",
) -> dict[str, Any]:
    term = {"form": form, "scale": scale, "weight": weight, "tensors": tensors, "parameters": parameters or {}}
    return {"W": W, "orientation": orientation, "recipe_weight": recipe_weight, "terms": [term]}


def vector(name: str, description: str, clauses: str, *args: Any, **more: Any) -> Vector:
    given = given_of(*args, **more)
    try:
        return valid(name, description, clauses, given, outcome(given))
    except Refused:
        return rejected(name, description, clauses, given)


def tensors_of(seed: str, dtype: str, **shapes: Sequence[int]) -> dict[str, Tensor]:
    return {role: drawn(f"{seed} {role}", dtype, *shape) for role, shape in shapes.items()}


def weight_of(seed: str, dtype: str, *shape: int) -> Tensor:
    return drawn(f"{seed} W", dtype, *shape, low=-6)
