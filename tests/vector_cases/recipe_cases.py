"""Cases for the method of a recipe and its parameters."""

from __future__ import annotations

from typing import Any

from vector_cases import documents
from vector_cases.documents import RECIPE, STRUCTURE, TIES, at, edited
from vector_cases.method_cases import DEFAULTS
from vector_cases.primitives import digest
from vector_cases.record import Vector, rejected, valid

LIMITS = {"rank": 8, "energy": None}
ALL = {"rank": None, "energy": None}
DENSE, LAPACK, EXACT = "loreg-f64-1", "float64-lapack", "loreg-exact-1"


def recipes() -> list[Vector]:
    return [*documents.recipes(), *_merges(), *_compositions(), *_refused()]


def _given(method: str, parameters: dict[str, Any], arithmetic: str) -> dict[str, str]:
    return edited(RECIPE, lambda d: d.update(method=method, parameters=parameters, arithmetic=arithmetic))


def _valid(
    name: str, description: str, method: str, parameters: dict[str, Any], arithmetic: str, clauses: str = "R3 C1 C8"
) -> Vector:
    given = _given(method, parameters, arithmetic)
    return valid(name, description, clauses, given, {"digest": digest(given["utf8"].encode())})


def _label(method: str) -> str:
    return method.replace(":", "-")


def _merges() -> list[Vector]:
    return [
        _valid(f"merge-{_label(name)}", f"A merge by {name}.", name, parameters, DENSE, "R3 C1")
        for name, parameters in DEFAULTS.items()
    ]


def _compositions() -> list[Vector]:
    truncated = [
        _valid(f"compose-{_label(name)}", f"{name}, truncated.", name, {**parameters, **LIMITS}, LAPACK)
        for name, parameters in DEFAULTS.items()
    ]
    drawn = {**DEFAULTS["dare_linear:mergekit"], "seed": 7}
    return [
        *truncated,
        _valid("cat", "One pair of factors.", "cat", {}, EXACT),
        _valid("cat-f64", "One pair of factors, of adapters that need norms.", "cat", {}, DENSE),
        _valid("peft-linear", "PEFT's linear.", "peft_linear", {}, LAPACK),
        _valid("svd-energy", "A truncation by energy.", "svd", {"rank": None, "energy": 0.9}, LAPACK),
        _valid("svd-both", "A truncation by both.", "svd", {"rank": 4, "energy": 1}, LAPACK),
        _valid("tsv", "All that there is.", "tsv", ALL, LAPACK),
        _valid("iso-c", "Eight directions.", "iso_c", LIMITS, LAPACK),
        _valid("knots", "With those of the inner method.", "knots", {**ALL, "inner": "ties:mergekit", **TIES},
               LAPACK),
        _valid("knots-slerp", "An inner method without any.", "knots", {**LIMITS, "inner": "slerp"}, LAPACK),
        _valid("core-space", "An inner method with a seed.", "core_space",
               {**ALL, "inner": "dare_linear:mergekit", **drawn}, LAPACK),
    ]  # fmt: skip


def _refused() -> list[Vector]:
    def refused(name: str, description: str, method: str, parameters: dict[str, Any], arithmetic: str,
                flags: tuple[str, ...] = STRUCTURE) -> Vector:  # fmt: skip
        return rejected(name, description, "R3 C1", _given(method, parameters, arithmetic), flags)

    knots = {**ALL, "inner": "ties:mergekit", **TIES}
    della = DEFAULTS["della"]
    return [
        refused("family", "A family without its definition.", "dare_ties", DEFAULTS["dare_ties:peft"], DENSE),
        refused("dense-exact", "A method on deltas that claims to be exact.", "sce", {"select_topk": 1}, EXACT),
        refused("dense-rank", "A merge, and a rank.", "slerp", LIMITS, DENSE),
        refused("dense-no-rank", "Truncated, and it does not say to what.", "slerp", {}, LAPACK),
        refused("dense-all", "Truncated to all.", "slerp", ALL, LAPACK),
        refused("cat-lapack", "One pair of factors, by LAPACK.", "cat", {}, LAPACK),
        refused("cat-rank", "One pair of factors, of a rank.", "cat", {"rank": 4}, EXACT),
        refused("knots-f64", "A method on factors that claims to be ordered.", "knots", knots, DENSE),
        refused("knots-inner", "An inner method that is not known.", "knots", {**knots, "inner": "ties"}, LAPACK),
        refused("knots-factors", "An inner method on factors.", "knots", {**ALL, "inner": "tsv"}, LAPACK),
        refused("knots-linear", "An inner method on sums.", "knots", {**ALL, "inner": "linear"}, LAPACK),
        refused("knots-outer", "Without the inner method's parameters.", "knots", {**ALL, "inner": "sce"}, LAPACK),
        refused("knots-no-inner", "Without an inner method.", "core_space", ALL, LAPACK),
        refused("svd-all", "A truncation to all.", "svd", ALL, LAPACK),
        refused("svd-rank-alone", "A truncation that says nothing of energy.", "svd", {"rank": 4}, LAPACK),
        refused("svd-rank-real", "A rank of 2.5.", "svd", {**ALL, "rank": 2.5}, LAPACK),
        refused("svd-energy-0", "No energy.", "svd", {**ALL, "energy": 0}, LAPACK),
        refused("svd-energy-2", "Twice the energy.", "svd", {**ALL, "energy": 2}, LAPACK),
        refused("peft-linear-rank", "A parameter that it has not.", "peft_linear", ALL, LAPACK),
        refused("missing", "A parameter is missing, though it has a default.", "karcher", {"max_iter": 10}, DENSE),
        refused("unknown", "A parameter that the method has not.", "magnitude_prune", {"density": 0.5, "seed": 0},
                DENSE),
        refused("density-0", "A density of 0.", "magnitude_prune", {"density": 0}, DENSE),
        refused("density-2", "A density of 2.", "magnitude_prune", {"density": 2}, DENSE),
        refused("density-text", "A density that is text.", "magnitude_prune", {"density": "0.5"}, DENSE),
        refused("seed-negative", "A seed below 0.", "della", {**della, "seed": -1}, DENSE),
        refused("flag", "A flag that is a number.", "della", {**della, "normalize": 1}, DENSE),
        refused("choice", "Another way to elect.", "della", {**della, "consensus": "mean"}, DENSE),
        refused("range", "Chances above 1.", "della", {**della, "density": 0.9}, DENSE, ()),
        rejected("parameters-list", "Parameters that are a list.", "R3", edited(RECIPE, at("parameters", [])),
                 STRUCTURE),
    ]  # fmt: skip
