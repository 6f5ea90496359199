"""The forms of a term [M9, F2]: which tensors and parameters each has, and the weights that they fit.

What a form computes is in ``loreg.algebra.forms``, one function for each row here. Sizes are in module
orientation: a weight is (out, in), a convolution's (out, in/groups·Πk), an embedding of V words of d numbers
(d, V), a bias (n, 1). In a row "…" stands for dimensions that are taken as one with the one before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import isfinite, prod
from typing import Any, TypeAlias

from loreg.errors import BadInput, Unsupported
from loreg.format import form_sizes as sizes
from loreg.format.fields import Fields
from loreg.format.form_sizes import OutIn, Parameters, Shapes, Size

Check: TypeAlias = Callable[[Fields, str], Any]


def _always(shapes: Shapes, parameters: Parameters, out_in: OutIn) -> bool:
    return True


def _never(shapes: Shapes, parameters: Parameters, out_in: OutIn) -> bool:
    return False


def _anything(shapes: Shapes, parameters: Parameters, out_in: OutIn) -> None:
    """No demand on the weight but its size."""


def _none(shapes: Shapes, parameters: Parameters) -> int:
    return 0


def _rows_of(role: str) -> Callable[[Shapes, Parameters], int]:
    return lambda shapes, parameters: shapes[role][0]


@dataclass(frozen=True, slots=True)
class Form:
    """A row. ``shape``: (out, in) that the tensors are for, None where they do not say; raises BadInput where they
    do not fit each other. ``rank``: what the trainer calls so, the r of α/r; 0 where there is none. ``fits``:
    raises BadInput for a weight of that shape that the tensors do not fit though their sizes do. ``exact``:
    whether the sum is exact, or computed in float64. ``reads_base``: whether W is an operand. ``decomposes``:
    whether the term can have a magnitude, and be DoRA; so not where W is an operand, or a stack.
    """

    required: tuple[str, ...]
    shape: Callable[[Shapes, Parameters], Size]
    rank: Callable[[Shapes, Parameters], int] = _none
    optional: tuple[str, ...] = ()
    parameters: Mapping[str, Check] = field(default_factory=dict)
    fits: Callable[[Shapes, Parameters, OutIn], None] = _anything
    exact: Callable[[Shapes, Parameters, OutIn], bool] = _always
    reads_base: bool = False
    decomposes: bool = True


def check(form: str, shapes: Shapes, parameters: Parameters, out_in: OutIn, path: str) -> None:
    """Raises BadInput, naming ``path``, unless tensors of ``shapes`` and ``parameters`` are those of ``form``, fit
    each other, and fit a weight of ``out_in``; Unsupported for a form or a layer that this version refuses.
    """
    if form not in FORMS:
        raise Unsupported(
            f"{path}: the form {form!r} is not one of {', '.join(FORMS)}: a newer format, or a mistake."
        )
    row = FORMS[form]
    _check_roles(form, row, shapes, path)
    with Fields(dict(parameters), f"{path}.parameters") as fields:
        values = {name: read(fields, name) for name, read in row.parameters.items()}
        if "magnitude" in shapes:
            values |= {name: read(fields, name) for name, read in _MAGNITUDE.items()}
    try:
        implied = row.shape(shapes, values)
        row.fits(shapes, values, out_in)
        if any(size not in (None, there) for size, there in zip(implied, out_in, strict=True)):
            found = ", ".join("any" if size is None else str(size) for size in implied)
            raise BadInput(f"its tensors are for a weight of shape ({found}), expected {out_in}.")
        if "magnitude" in shapes:
            sizes.magnitude_fits(shapes, values, out_in)
    except BadInput as error:
        raise type(error)(f"{path}: a term of form {form!r}: {error}") from None


def is_exact(form: str, shapes: Shapes, parameters: Parameters, out_in: OutIn) -> bool:
    """Whether a term that :func:`check` accepts is an exact sum, under ``loreg-exact-1`` [A6]; if not, it is
    computed under ``loreg-f64-1``."""
    return "magnitude" not in shapes and FORMS[form].exact(shapes, parameters, out_in)


def _check_roles(form: str, row: Form, shapes: Shapes, path: str) -> None:
    known = (*row.required, *row.optional, *(("magnitude",) if row.decomposes else ()))
    for role in row.required:
        if role not in shapes:
            raise BadInput(f"{path}: a term of form {form!r} needs the tensor {role!r}, found {', '.join(shapes)}.")
    for role, shape in shapes.items():
        if role not in known:
            raise BadInput(f"{path}: a term of form {form!r} has no tensor {role!r}, only {', '.join(known)}.")
        if prod(shape) == 0 or not shape:
            raise BadInput(f"{path}: the tensor {role!r} has shape {shape}, expected one with elements.")


# Checks of parameters


def _natural(minimum: int) -> Check:
    return lambda fields, name: fields.natural(name, minimum)


def _choice(*allowed: str) -> Check:
    return lambda fields, name: fields.choice(name, *allowed)


def _flag_number(fields: Fields, name: str) -> int:
    value = fields.natural(name)
    return value if value in (0, 1) else fields.refuse(name, "0 or 1", value)


def _optional(read: Check, default: Any) -> Check:
    """A parameter that is left out where it has its default, so that a term is written in one way."""

    def check(fields: Fields, name: str) -> Any:
        if not fields.has(name):
            return default
        value = read(fields, name)
        return value if value != default else fields.refuse(name, f"no {name}, which means the same", value)

    return check


def _flags(fields: Fields, name: str) -> list[bool]:
    value = fields.take(name)
    if not isinstance(value, list) or not all(isinstance(flag, bool) for flag in value) or True not in value:
        fields.refuse(name, "a list of true and false, at least one of them true", value)
    return list(value)


def _naturals(fields: Fields, name: str) -> list[int]:
    value = fields.take(name)
    if not isinstance(value, list) or not all(type(index) is int and index >= 0 for index in value):
        fields.refuse(name, "a list of whole numbers", value)
    return list(value)


def _span(fields: Fields, name: str) -> list[int] | None:
    """[first, end) or null."""
    value = fields.take(name)
    if value is None:
        return None
    if not isinstance(value, list) or [type(end) for end in value] != [int, int] or not 0 <= value[0] < value[1]:
        fields.refuse(name, "null, or a list of two whole numbers, the second the larger", value)
    return list(value)


def _nonnegative(fields: Fields, name: str) -> float:
    value = fields.real(name)
    return value if value >= 0 else fields.refuse(name, "a number of at least 0", value)


def _limit(fields: Fields, name: str) -> float | None:
    value = fields.optional_real(name)
    return value if value is None or value >= 0 else fields.refuse(name, "null or a number of at least 0", value)


def _series(fields: Fields, name: str) -> list[float] | None:
    value = fields.take(name)
    if value is None:
        return None
    numbers = isinstance(value, list) and all(type(c) in (int, float) and isfinite(c) for c in value)
    if not numbers or not 0 < len(value) <= _SERIES:
        fields.refuse(name, f"null, or a list of 1 to {_SERIES} numbers", value)
    return [float(coefficient) for coefficient in value]


_SIDE = _choice("in", "out")
_SERIES = 64  # each is a product of matrices; a trainer takes 5 or so

_MAGNITUDE: Mapping[str, Check] = {"axis": _SIDE, "epsilon": _nonnegative}
"""Parameters of a term with a magnitude."""

_ROTATION: Mapping[str, Check] = {"side": _SIDE, "factor": Fields.real, "total_limit": _limit}
_EXPERTS: Mapping[str, Check] = {"experts": _natural(1)}

FORMS: Mapping[str, Form] = {
    "lora": Form(
        ("A", "B"),
        sizes.lora,
        _rows_of("A"),
        parameters={"groups": _natural(1), "groups_in": _optional(_natural(1), 1)},
        fits=sizes.lora_fits,
    ),
    "lora_merged": Form(
        ("A", "B"), sizes.lora_merged, lambda shapes, _: shapes["B"][1], parameters={"enable": _flags}
    ),
    "lora_reshaped": Form(
        ("A", "B"), sizes.lora_reshaped, _rows_of("A"), fits=sizes.reshaped_fits, exact=sizes.reshaped_is_exact
    ),
    "lora_expert": Form(
        ("A", "B"),
        sizes.lora_expert,
        sizes.experts_rank,
        parameters={**_EXPERTS, "expert": _natural(0), "rows": _span},
    ),
    "lora_experts": Form(("A", "B"), sizes.lora_experts, sizes.experts_rank, parameters=_EXPERTS, decomposes=False),
    "adalora": Form(("A", "B", "E"), sizes.adalora, _rows_of("A")),
    "vera": Form(("A", "B", "lambda_d", "lambda_b"), sizes.vera, _rows_of("A"), fits=sizes.vera_fits),
    "loha": Form(
        ("w1_a", "w1_b", "w2_a", "w2_b"),
        sizes.loha,
        _rows_of("w1_b"),
        optional=("t1", "t2"),
        exact=sizes.loha_is_exact,
    ),
    "lokr": Form(
        (),
        sizes.lokr,
        sizes.lokr_rank,
        optional=("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2"),
        parameters={"align": _choice("leading", "trailing")},
        exact=sizes.lokr_is_exact,
    ),
    "locon": Form(("up", "down", "mid"), sizes.locon, _rows_of("down"), exact=sizes.locon_is_exact),
    "dense": Form(("value",), sizes.dense),
    "ia3": Form(
        ("l",),
        sizes.ia3,
        parameters={"on": _SIDE, "groups": _optional(_natural(1), 1), "neutral": _optional(_flag_number, 1)},
        fits=sizes.ia3_fits,
        reads_base=True,
        decomposes=False,
    ),
    "replaced": Form(
        ("value",),
        sizes.replaced,
        parameters={"turned": lambda fields, name: fields.flag(name)},
        reads_base=True,
        decomposes=False,
    ),
    "rows": Form(
        ("rows",),
        sizes.rows,
        parameters={"indices": _naturals},
        fits=sizes.rows_fits,
        reads_base=True,
        decomposes=False,
    ),
    "oft": Form(
        ("R",),
        sizes.rotation,
        optional=("s",),
        parameters={**_ROTATION, "series": _series, "block_limit": _limit},
        fits=sizes.oft_fits,
        exact=_never,
        reads_base=True,
        decomposes=False,
    ),
    "boft": Form(
        ("R",),
        sizes.rotation,
        optional=("s",),
        parameters={**_ROTATION, "order": _choice("halves", "alternating")},
        fits=sizes.boft_fits,
        exact=_never,
        reads_base=True,
        decomposes=False,
    ),
}
