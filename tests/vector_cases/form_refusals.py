"""Terms that a reader refuses: each a good one with something changed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from math import prod
from typing import Any

from vector_cases.arithmetic import matrix
from vector_cases.documents import Edit, at, without
from vector_cases.form_vector import given_of, outcome
from vector_cases.record import Vector, rejected


def rotation(**more: Any) -> dict[str, Any]:
    return {"side": "in", "factor": 0.5, "total_limit": None, **more}


def refused() -> list[Vector]:
    W = matrix("F32", (2, 4), [1] * 8)

    def made(form: str, parameters: dict[str, Any], **shapes: Sequence[int]) -> dict[str, Any]:
        return given_of(form, W, {role: matrix("F32", shape, [1] * prod(shape)) for role, shape in shapes.items()},
                      parameters)  # fmt: skip

    given = {
        "lora": made("lora", {"groups": 1}, A=(2, 4), B=(2, 2)),
        "merged": made("lora_merged", {"enable": [True, False]}, A=(1, 4), B=(1, 1)),
        "reshaped": made("lora_reshaped", {}, A=(1, 2), B=(4, 1)),
        "expert": made("lora_expert", {"experts": 2, "expert": 1, "rows": None}, A=(2, 4), B=(2, 2)),
        "vera": made("vera", {}, A=(1, 4), B=(2, 1), lambda_d=(1,), lambda_b=(2,)),
        "loha": made("loha", {}, w1_a=(2, 1), w1_b=(1, 4), w2_a=(2, 1), w2_b=(1, 4)),
        "lokr": made("lokr", {"align": "leading"}, w1=(1, 2), w2=(2, 2)),
        "dense": made("dense", {}, value=(2, 4)),
        "ia3": made("ia3", {"on": "in"}, l=(4,)),
        "replaced": made("replaced", {"turned": False}, value=(2, 4)),
        "rows": made("rows", {"indices": [1, 3]}, rows=(2, 2)),
        "oft": made("oft", rotation(series=None, block_limit=None), R=(2, 2, 2)),
        "boft": made("boft", rotation(order="halves"), R=(2, 2, 2, 2)),
        "dora": made("lora", {"groups": 1, "axis": "out", "epsilon": 0}, A=(2, 4), B=(2, 2), magnitude=(2,)),
    }
    for name, each in given.items():
        outcome(each)  # what is refused below is so by what it changes
        assert name

    def wrong(of: str, name: str, description: str, *edits: Callable[[Any], object], clauses: str = "F2") -> Vector:
        changed = copy.deepcopy(given[of])
        for edit in edits:
            edit(changed)
        return rejected(f"wrong-{of}-{name}", description, clauses, changed)

    def tensor(role: str, *shape: int) -> Edit:
        return at(f"terms/0/tensors/{role}", matrix("F32", shape, [1] * prod(shape)))

    def parameter(name: str, value: Any) -> Edit:
        return at(f"terms/0/parameters/{name}", value)

    return [
        wrong("lora", "form", "A form that is not known.", at("terms/0/form", "lora_fa"), clauses="F1 M9"),
        wrong("lora", "no-b", "A role is missing.", without("terms/0/tensors/B"), clauses="F2 M9"),
        wrong("lora", "role", "A role that the form has not.", tensor("E", 2), clauses="F2 M9"),
        wrong("lora", "no-parameter", "A parameter is missing.", without("terms/0/parameters/groups"),
              clauses="F2 M9"),
        wrong("lora", "parameter", "A parameter that the form has not.", parameter("alpha", 1), clauses="F2 M9"),
        wrong("lora", "default", "A parameter that is left out where it is 1.", parameter("groups_in", 1)),
        wrong("lora", "groups-0", "No groups.", parameter("groups", 0)),
        wrong("lora", "groups-real", "A number of groups that is not whole.", parameter("groups", 1.5)),
        wrong("lora", "groups-3", "Outputs that do not divide.", parameter("groups", 3)),
        wrong("lora", "rank", "A and B of different ranks.", tensor("B", 2, 1)),
        wrong("lora", "in", "A for another number of inputs.", tensor("A", 2, 3)),
        wrong("lora", "out", "B for another number of outputs.", tensor("B", 3, 2)),
        wrong("lora", "vector", "A of one dimension.", tensor("A", 8)),
        wrong("lora", "empty", "A without elements.", tensor("A", 0, 4), tensor("B", 2, 0)),
        wrong("lora", "bias", "Factors for a bias.", at("W", matrix("F32", (2,), [1, 1])), tensor("A", 2, 1),
                clauses="F1"),
        wrong("lora", "all-inputs", "A for all inputs of a convolution of two groups.", parameter("groups", 2),
                tensor("A", 2, 8), tensor("B", 2, 1)),
        wrong("merged", "none", "No block is enabled.", parameter("enable", [False, False])),
        wrong("merged", "numbers", "Flags that are numbers.", parameter("enable", [1, 0])),
        wrong("reshaped", "size", "Another number of elements.", tensor("B", 3, 1)),
        wrong("expert", "third", "The third of two experts.", parameter("expert", 2)),
        wrong("expert", "rows", "Rows beyond the last.", parameter("rows", [1, 3])),
        wrong("expert", "rows-empty", "No rows.", parameter("rows", [1, 1])),
        wrong("expert", "stack", "One expert for a stack.", at("W", matrix("F32", (1, 2, 2), [1] * 4))),
        wrong("vera", "narrow", "A has fewer columns than the weight.", tensor("A", 1, 3)),
        wrong("vera", "lambda", "lambda_d of another size.", tensor("lambda_d", 2)),
        wrong("loha", "one-core", "t1 alone.", tensor("t1", 1, 1, 2)),
        wrong("loha", "sizes", "Two products of different sizes.", tensor("w2_a", 3, 1)),
        wrong("lokr", "neither", "No w1.", without("terms/0/tensors/w1")),
        wrong("lokr", "both", "w1, and its factors too.", tensor("w1_a", 1, 1), tensor("w1_b", 1, 2)),
        wrong("lokr", "half", "w2_a without w2_b.", without("terms/0/tensors/w2"), tensor("w2_a", 2, 1)),
        wrong("lokr", "core", "A core beside a whole w2.", tensor("t2", 1, 1, 1)),
        wrong("lokr", "align", "An alignment that is not known.", parameter("align", "left")),
        wrong("lokr", "trailing", "Trailing, for a w2 of two dimensions.", parameter("align", "trailing")),
        wrong("dense", "size", "Another shape.", tensor("value", 4, 2)),
        wrong("ia3", "size", "Numbers that do not divide the inputs.", tensor("l", 3)),
        wrong("ia3", "on", "No side.", parameter("on", "both")),
        wrong("ia3", "neutral", "A neutral of 1 is left out.", parameter("neutral", 1)),
        wrong("ia3", "neutral-2", "A neutral of 2.", parameter("neutral", 2)),
        wrong("ia3", "groups-out", "Groups along out.", parameter("on", "out"), tensor("l", 2),
                parameter("groups", 2)),
        wrong("ia3", "magnitude", "W is an operand, so it has no magnitude.", tensor("magnitude", 2),
                parameter("axis", "out"), parameter("epsilon", 0), clauses="F8"),
        wrong("replaced", "turned", "(out, in), and said to be (in, out).", parameter("turned", True)),
        wrong("replaced", "number", "A flag that is a number.", parameter("turned", 0)),
        wrong("replaced", "magnitude", "W is an operand, so it has no magnitude.", tensor("magnitude", 2),
                parameter("axis", "out"), parameter("epsilon", 0), clauses="F8"),
        wrong("rows", "twice", "An index twice.", parameter("indices", [1, 1])),
        wrong("rows", "beyond", "An index beyond the last.", parameter("indices", [1, 4])),
        wrong("rows", "negative", "An index below 0.", parameter("indices", [1, -1])),
        wrong("rows", "count", "More rows than indices.", parameter("indices", [1])),
        wrong("oft", "cover", "Blocks that do not cover the vectors.", tensor("R", 3, 1, 1)),
        wrong("oft", "triangle", "A number of elements that no triangle has.", tensor("R", 1, 4)),
        wrong("oft", "series", "A series of no terms.", parameter("series", [])),
        wrong("oft", "long", "A series of over 64 terms.", parameter("series", [1] * 65)),
        wrong("oft", "limit", "A limit below 0.", parameter("block_limit", -1)),
        wrong("oft", "s", "s of another size.", tensor("s", 3)),
        wrong("boft", "stages", "More stages than the vectors have halves.", tensor("R", 3, 2, 2, 2)),
        wrong("boft", "odd", "An odd size, alternating.", tensor("R", 1, 4, 1, 1), parameter("order", "alternating")),
        wrong("boft", "blocks", "Blocks that do not cover the vectors.", tensor("R", 1, 1, 2, 2)),
        wrong("dora", "size", "Magnitudes for other rows.", tensor("magnitude", 3), clauses="F8"),
        wrong("dora", "divide", "Magnitudes that do not divide the inputs.", tensor("magnitude", 3),
                parameter("axis", "in"), clauses="F8"),
        wrong("dora", "no-axis", "A magnitude without its axis.", without("terms/0/parameters/axis"), clauses="F8"),
        wrong("dora", "no-magnitude", "An axis without a magnitude.", without("terms/0/tensors/magnitude"),
                clauses="F8"),
        wrong("dora", "epsilon", "An epsilon below 0.", parameter("epsilon", -1), clauses="F8"),
    ]  # fmt: skip
