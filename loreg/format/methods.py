"""The methods that make one delta out of several adapters' [C1]: their names, parameters and arithmetic.

A name is a family, or ``family:definition`` where libraries mean different things by one name. A family alone then
stands for its ``:mergekit`` definition, which works on ΔW, as loreg does; what PEFT calls ``ties`` works on factors,
and only its ``ties_svd`` is ``ties:peft``. A recipe holds the full name and every parameter, defaults included.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal

from loreg.errors import BadInput, UsageError
from loreg.format.fields import Fields

EXACT = "loreg-exact-1"
"""The storage value nearest to the exact real number [A1]."""

ORDERED = "loreg-f64-1"
"""Float64 operations in a stated order, and one rounding at the end [A6]: for norms, roots, thresholds."""

LAPACK = "float64-lapack"
"""Float64 through LAPACK: not the same to the bit everywhere. Only for composed adapters [R3, C8]."""

REQUIRED = object()
"""The default of a parameter that must be given; None is a value."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """``parse(fields, name)`` takes the parameter from an object and checks it, or raises BadInput."""

    parse: Callable[[Fields, str], Any]
    default: Any
    help: str


def _no_check(values: Mapping[str, Any]) -> str | None:
    return None


@dataclass(frozen=True, slots=True)
class Method:
    """A row. ``space``: what it works on. ``exact``: the terms of a sum; ``dense``: each adapter's ΔW, by
    ``loreg.algebra.elementwise``; ``factors``: A and B, by ``loreg.algebra.factor_space``, for composing only.

    ``sums``: whether it gives the weighted sum, whole or truncated: then biases add, and a replaced tensor of the sum
    is what it is. ``composes_only``: whether it gives one pair of factors for each module, so that a merge by it
    composes a version first, and merges that. ``adapters``: the least and the greatest number of them. ``check``:
    what is wrong with parameters that are each right, as a phrase, or None.
    """

    arithmetic: str
    space: Literal["exact", "dense", "factors"]
    summary: str
    source: str
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    sums: bool = False
    composes_only: bool = False
    adapters: tuple[int, int | None] = (1, None)
    check: Callable[[Mapping[str, Any]], str | None] = _no_check

    @property
    def keeps_terms(self) -> bool:
        """Whether it keeps every term as it is, and combines nothing: of no adapters it is the base."""
        return self.space == "exact" and not self.composes_only


def _real(test: Callable[[float], bool], expected: str) -> Callable[[Fields, str], float]:
    def parse(fields: Fields, name: str) -> float:
        value = fields.real(name)
        return value if test(value) else fields.refuse(name, expected, value)

    return parse


def _or_null(parse: Callable[[Fields, str], Any]) -> Callable[[Fields, str], Any]:
    def parse_or_null(fields: Fields, name: str) -> Any:
        value = fields.take(name)
        return None if value is None else parse(Fields({name: value}, fields.path), name)

    return parse_or_null


def _natural(least: int, below: int, expected: str) -> Callable[[Fields, str], int]:
    def parse(fields: Fields, name: str) -> int:
        value = fields.natural(name, least)
        return value if value < below else fields.refuse(name, expected, value)

    return parse


def _one_of(*allowed: str) -> Callable[[Fields, str], str]:
    return lambda fields, name: fields.choice(name, *allowed)


_fraction = _real(lambda x: 0 < x <= 1, "a number above 0 and at most 1")
_rank = Parameter(_or_null(lambda f, name: f.natural(name, 1)), None, "greatest rank of the result; null: no bound")
_energy = Parameter(_or_null(_fraction), None, "least share of the square norm that the result keeps; null: all")
_TRUNCATION = {"rank": _rank, "energy": _energy}

_density = Parameter(_fraction, 1.0, "share of each delta's elements that is kept")
_seed = _natural(0, 2**53, "a whole number below 2^53, which JSON can hold")


def _flag(default: bool, text: str) -> Parameter:
    return Parameter(lambda f, name: f.flag(name), default, text)


# What rows are put together from. The order is the one in which parameters are shown.
_MUST_KEEP = {"density": replace(_density, default=REQUIRED)}
_KEEP = {"density": _density}
_DRAW = {"seed": Parameter(_seed, 0, "seed of the random masks")}
_ELECTS = "what elects a sign: the sum of values"
_PEFT_SIGN = {"majority_sign": Parameter(_one_of("total", "frequency"), "total", f"{_ELECTS}, or of signs")}
_CONSENSUS = {"consensus": Parameter(_one_of("sum", "count"), "sum", f"{_ELECTS}, or the count of signs")}


def _scaled(normalize: bool) -> dict[str, Parameter]:
    return {
        "normalize": _flag(normalize, "divide by the sum of the weights that had a part"),
        "lambda": Parameter(lambda f, name: f.real(name), 1.0, "what the result is multiplied by"),
    }


def _rescaled(rescale: bool) -> dict[str, Parameter]:
    return {"rescale": _flag(rescale, "bring the kept elements to the sum of magnitudes that all had")}


def _range_of_ranks(values: Mapping[str, Any]) -> str | None:
    density, epsilon = values["density"], values["epsilon"]
    if density == 1 or (density - epsilon > 0 and density + epsilon < 1):
        return None
    return (
        f"density {density} with epsilon {epsilon} gives probabilities outside (0, 1): lower epsilon, "
        f"or keep all with density 1"
    )


def _some_truncation(values: Mapping[str, Any]) -> str | None:
    if values["rank"] is None and values["energy"] is None:
        return "found neither rank nor energy: give one of them"
    return None


_BY_RANK = {
    "epsilon": Parameter(
        _real(lambda x: 0 <= x < 0.5, "a number of at least 0 and below 0.5"),
        0.15,
        "how far the chance to be kept lies from density for the least and the largest element of a row",
    )
}
_OUTLIERS = {
    "gamma": Parameter(
        _real(lambda x: 0 <= x < 1, "a number of at least 0 and below 1"),
        0.01,
        "share of each delta's elements that is dropped as too large",
    )
}
_positive = _real(lambda x: x > 0, "a number above 0")
# A tolerance that is never met would else be a merge that never ends.
_steps = _natural(1, 10_001, "a whole number of at most 10000")

_PEFT = "peft/utils/merge_utils.py, as tuners/lora/model.py applies it to ΔW"
_GENERALISED = "mergekit/merge_methods/generalized_task_arithmetic.py"
_TIES = "Yadav et al. 2023, arXiv:2306.01708"
_DARE = "Yu et al. 2023, arXiv:2311.03099"
_DELLA = "Deep et al. 2024, arXiv:2406.11617"
_CRUMBS = "Davari & Belilovsky 2023, arXiv:2312.06795"


def _dense(summary: str, source: str, parameters: Mapping[str, Parameter], **more: Any) -> Method:
    return Method(ORDERED, "dense", summary, source, parameters, **more)


_DENSE = {
    "task_arithmetic": _dense(
        "The weighted sum, normalised and scaled if asked.",
        f"Ilharco et al. 2022, arXiv:2212.04089; {_GENERALISED}",
        _scaled(False),
    ),
    "magnitude_prune": _dense("The weighted sum of each delta's largest elements.", _PEFT, _MUST_KEEP),
    "ties:peft": _dense(
        "Largest elements, signs elected before weighing, mean over the deltas that agree.",
        f"{_TIES}; {_PEFT}",
        _MUST_KEEP | _PEFT_SIGN,
    ),
    "ties:mergekit": _dense(
        "Largest elements, signs elected after weighing, weighted mean over the deltas that agree.",
        f"{_TIES}; {_GENERALISED}",
        _KEEP | _scaled(True) | _rescaled(False) | _CONSENSUS,
    ),
    "dare_linear:peft": _dense(
        "The weighted sum of randomly kept elements, each over density.",
        f"{_DARE}; {_PEFT}",
        _MUST_KEEP | _DRAW,
    ),
    "dare_linear:mergekit": _dense(
        "The weighted sum of randomly kept elements, rescaled to each delta's sum of magnitudes.",
        f"{_DARE}; {_GENERALISED}",
        _KEEP | _DRAW | _scaled(False) | _rescaled(True),
    ),
    "dare_ties:peft": _dense(
        "Randomly kept elements over density, signs elected before weighing, mean over those that agree.",
        f"{_DARE}; {_PEFT}",
        _MUST_KEEP | _PEFT_SIGN | _DRAW,
    ),
    "dare_ties:mergekit": _dense(
        "Randomly kept elements, rescaled, signs elected after weighing, sum over the deltas that agree.",
        f"{_DARE}; {_GENERALISED}",
        _KEEP | _DRAW | _scaled(False) | _rescaled(True) | _CONSENSUS,
    ),
    "della": _dense(
        "Elements kept by chance that grows with their rank in the row, rescaled, signs elected, weighted mean.",
        f"{_DELLA}; {_GENERALISED}",
        _KEEP | _BY_RANK | _DRAW | _scaled(True) | _rescaled(True) | _CONSENSUS,
        check=_range_of_ranks,
    ),
    "della_linear": _dense(
        "The weighted sum of elements kept by chance that grows with their rank in the row, rescaled.",
        f"{_DELLA}; {_GENERALISED}",
        _KEEP | _BY_RANK | _DRAW | _scaled(False) | _rescaled(True),
        check=_range_of_ranks,
    ),
    "breadcrumbs": _dense(
        "The weighted sum of each delta without its largest and its smallest elements.",
        f"{_CRUMBS}; {_GENERALISED}",
        _KEEP | _OUTLIERS | _scaled(False) | _rescaled(False),
    ),
    "breadcrumbs_ties": _dense(
        "Each delta without its largest and smallest elements, signs elected, sum over the deltas that agree.",
        f"{_CRUMBS}; {_GENERALISED}",
        _KEEP | _OUTLIERS | _scaled(False) | _rescaled(False) | _CONSENSUS,
    ),
    "sce": _dense(
        "Elements of largest variance over the deltas, weighed by each delta's energy, mean over those that agree.",
        "Wan et al. 2024, arXiv:2408.07990; mergekit/merge_methods/sce.py",
        {"select_topk": Parameter(_fraction, 1.0, "share of the elements that differ which is kept")},
    ),
    "slerp": _dense(
        "Spherical interpolation of two deltas; weights are shares of the way.",
        "Shoemake 1985; mergekit/merge_methods/slerp.py, on ΔW",
        {},
        adapters=(2, 2),
    ),
    "nuslerp": _dense(
        "Spherical interpolation of two deltas, whole, by rows or by columns.",
        "mergekit/merge_methods/nuslerp.py",
        {
            "flatten": _flag(True, "one angle for the whole delta, not one for each row"),
            "row_wise": _flag(False, "if not flattened, one angle for each column, as mergekit has it"),
        },
        adapters=(2, 2),
    ),
    "karcher": _dense(
        "The mean direction on the sphere, of the mean length.",
        "arXiv:2603.04972; mergekit/merge_methods/karcher.py, on ΔW",
        {
            "max_iter": Parameter(_steps, 10, "greatest number of steps, at most 10000"),
            "tol": Parameter(_positive, 1e-5, "angle in radians that counts as none"),
        },
    ),
    "model_stock": _dense(
        "The mean delta, shortened by the angle between deltas.",
        "Jang et al. 2024, arXiv:2403.19522; mergekit/merge_methods/model_stock.py",
        {"filter_wise": _flag(False, "one angle for each row, not one for the whole delta")},
        adapters=(2, None),
    ),
}

_inner = Parameter(
    lambda fields, name: fields.choice(name, *_DENSE),
    "ties:mergekit",
    "the method that combines in the common subspace; its parameters are given beside it",
)


def _factors(summary: str, source: str, parameters: Mapping[str, Parameter], **more: Any) -> Method:
    return Method(LAPACK, "factors", summary, source, parameters, composes_only=True, **more)


METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "linear": Method(EXACT, "exact", "The weighted sum, exactly.", "spec/loreg-1.md, A1", sums=True),
        "cat": Method(
            EXACT,
            "exact",
            "The weighted sum as one adapter whose rank is the sum of ranks.",
            "as linear",
            sums=True,
            composes_only=True,
        ),
        "svd": _factors(
            "The weighted sum, truncated to a rank or to a share of its energy: give one of them.",
            "Eckart & Young 1936; loreg/algebra/truncate.py",
            _TRUNCATION,
            sums=True,
            check=_some_truncation,
        ),
        "peft_linear": _factors(
            "PEFT's linear: sums of A and of B by themselves. Not the sum of the deltas; to reproduce old results.",
            "peft/tuners/lora/model.py",
            {},
        ),
        **_DENSE,
        "knots": _factors(
            "Another method, on the coordinates of each delta in the common singular basis.",
            "Stoica et al. 2024, arXiv:2410.19735",
            {"inner": _inner, **_TRUNCATION},
        ),
        "core_space": _factors(
            "Another method, on the small cores of the deltas in common bases.",
            "Panariello et al. 2025, arXiv:2509.17786",
            {"inner": replace(_inner, default="task_arithmetic"), **_TRUNCATION},
        ),
        "tsv": _factors(
            "The leading singular vectors of each delta, made orthogonal to the others'.",
            "Gargiulo et al. 2024, arXiv:2412.00081",
            _TRUNCATION,
        ),
        "iso_c": _factors(
            "The weighted sum with all its singular values made equal to their mean.",
            "Marczak et al. 2025, arXiv:2502.04959",
            _TRUNCATION,
        ),
    }
)
"""Every method by its full name."""

SUMS = tuple(name for name, row in METHODS.items() if row.sums)
"""The methods that give the weighted sum."""

_DEFINITION = ":mergekit"


def method(name: str) -> tuple[str, Method]:
    """The full name and the row of a method; a family that has several definitions is its ``:mergekit`` one.

    Raises UsageError, which lists every method, for another name.
    """
    full = name if name in METHODS else name + _DEFINITION
    if full not in METHODS:
        raise UsageError(f"there is no method {name!r}: choose one of {', '.join(METHODS)}.")
    return full, METHODS[full]


def known(name: str, inner: str | None = None, truncated: bool = False) -> dict[str, Parameter]:
    """The parameters of a method, in the order of its row, then those of truncation and of the ``inner`` method.

    ``name`` and ``inner``: full names. ``truncated``: what a dense method gives is truncated to be an adapter.
    """
    own = {**METHODS[name].parameters, **(_TRUNCATION if truncated else {})}
    return own if inner is None else {**own, **_DENSE[inner].parameters}


def parameters(name: str, given: Mapping[str, Any], truncated: bool = False) -> dict[str, Any]:
    """``given`` checked, with the defaults of what is not given, in the order of :func:`known`.

    Of a method with an ``inner`` one, the inner one's parameters are beside its own. Raises UsageError for an
    unknown method or parameter, one that is missing, or a value that does not make sense.
    """
    name, row = method(name)
    given, inner = dict(given), None
    if "inner" in row.parameters:
        asked = str(given.get("inner", row.parameters["inner"].default))
        inner = given["inner"] = asked if asked in _DENSE else asked + _DEFINITION
        if inner not in _DENSE:
            raise UsageError(f"the method {name} has no inner {asked!r}: choose one of {', '.join(_DENSE)}.")
    takes = known(name, inner, truncated)
    for key in sorted(given):
        if key not in takes:
            names = ", ".join(takes) or "none"
            raise UsageError(f"the method {name} has no parameter {key!r}: its parameters are {names}.")
    for key, parameter in takes.items():
        if parameter.default is REQUIRED and key not in given:
            raise UsageError(f"the method {name} needs the parameter {key!r} ({parameter.help}): give it.")
    complete = {key: given.get(key, parameter.default) for key, parameter in takes.items()}
    try:
        return read(name, Fields(complete, name), truncated)
    except BadInput as error:
        raise UsageError(str(error)) from None


def read(name: str, fields: Fields, truncated: bool = False) -> dict[str, Any]:
    """The parameters of the method with the full name ``name`` from an object with all, as a recipe has them.

    ``truncated``: what a dense method gives is truncated to be an adapter, and ``rank`` and ``energy`` say how.
    Raises BadInput for a parameter that is missing, unknown or wrong [R3]. ``name`` is a key of METHODS.
    """
    values: dict[str, Any] = {}
    with fields as f:
        if choice := METHODS[name].parameters.get("inner"):
            values["inner"] = choice.parse(f, "inner")
        inner = values.get("inner")
        rest = {key: each for key, each in known(name, inner, truncated).items() if key not in values}
        values |= {key: each.parse(f, key) for key, each in rest.items()}
    checks = [METHODS[each].check for each in (name, inner) if each is not None]
    for check in (*checks, *([_some_truncation] if truncated else [])):
        if wrong := check(values):
            raise BadInput(f"{fields.path}: {wrong}.")
    return values


def check_count(name: str, values: Mapping[str, Any], count: int) -> None:
    """UsageError unless the method, and its inner one, takes ``count`` adapters. ``values``: its parameters."""
    for each in (name, values.get("inner")):
        if each is not None:
            least, most = METHODS[each].adapters
            if count < least or (most is not None and count > most):
                expected = f"exactly {least}" if least == most else f"at least {least}"
                raise UsageError(
                    f"the method {each} takes {expected} adapters of weight other than 0, found {count}."
                )
