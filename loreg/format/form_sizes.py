"""What the tensors of each form [M9, F2] must be like, and the weights that they are for: sizes alone.

Functions without a suffix return (out, in), None where the tensors do not say, and raise BadInput where they do
not fit each other. ``…_fits`` raises BadInput for a weight that they do not fit though its size may be right;
``…_is_exact`` says whether the sum is exact [A6]; ``…_rank`` is the r of α/r.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import gcd, isqrt, prod
from typing import Any, TypeAlias

from loreg.errors import BadInput, Unsupported

Shapes: TypeAlias = Mapping[str, tuple[int, ...]]
"""Role of a tensor → its shape as stored."""

Parameters: TypeAlias = Mapping[str, Any]
OutIn: TypeAlias = tuple[int, int]
Size: TypeAlias = tuple[int | None, int | None]

EXPANSION = 4
"""Forms that are exact only as a sum of a higher rank are so up to EXPANSION·min(out, in) of it [F5]."""


def _matrix(shapes: Shapes, role: str, rows: int | None = None, columns: int | None = None) -> tuple[int, int]:
    """A tensor's size as a matrix; BadInput unless it has the rows and columns that are given."""
    shape = shapes[role]
    found = prod(shape[:1]), prod(shape[1:])
    wrong = any(expected not in (None, size) for expected, size in zip((rows, columns), found, strict=True))
    if len(shape) < 2 or wrong:
        expected = ", ".join("any" if size is None else str(size) for size in (rows, columns))
        raise BadInput(f"{role} has shape {shape}, expected a matrix of ({expected}).")
    return found


def _vector(shapes: Shapes, role: str, size: int | None = None) -> int:
    """The number of a tensor's elements; BadInput if another is given."""
    found = prod(shapes[role])
    if size not in (None, found):
        raise BadInput(f"{role} has shape {shapes[role]}, expected {size} elements.")
    return found


def _core(shapes: Shapes, role: str) -> tuple[int, int, int]:
    """A Tucker core (r, r, k…): its ranks, and Πk."""
    shape = shapes[role]
    if len(shape) < 3:
        raise BadInput(f"{role} has shape {shape}, expected (r, r, k…).")
    return shape[0], shape[1], prod(shape[2:])


def _divide(what: str, number: int, parts: int) -> int:
    if not parts or number % parts:
        raise BadInput(f"{what} is {number}, expected a multiple of {parts}.")
    return number // parts


def lora(shapes: Shapes, parameters: Parameters) -> Size:
    r, into = _matrix(shapes, "A")
    out, _ = _matrix(shapes, "B", columns=_divide("the rank", r, parameters["groups"]))
    _divide("the number of outputs", out, parameters["groups"])
    _divide("the rank", r, parameters.get("groups_in", 1))
    return out, into * parameters.get("groups_in", 1)


def lora_fits(shapes: Shapes, parameters: Parameters, out_in: OutIn) -> None:
    groups, into = parameters["groups"], prod(shapes["A"][1:])
    if groups > 1 and into == groups * out_in[1]:
        raise Unsupported(
            f"A sees all {into} inputs of a convolution of {groups} groups, of whose weight each output has "
            f"{out_in[1]}: PEFT computes that beside the layer, and no weight of the layer holds it."
        )


def lora_merged(shapes: Shapes, parameters: Parameters) -> Size:
    enable = parameters["enable"]
    rows, r = _matrix(shapes, "B")
    _, into = _matrix(shapes, "A", rows=r * sum(enable))
    return _divide("the number of B's rows", rows, sum(enable)) * len(enable), into


def lora_experts(shapes: Shapes, parameters: Parameters) -> Size:
    rank, into = _matrix(shapes, "A")
    _divide("the number of A's rows", rank, parameters["experts"])
    out, _ = _matrix(shapes, "B", columns=rank)
    return out, into


def lora_expert(shapes: Shapes, parameters: Parameters) -> Size:
    out, into = lora_experts(shapes, parameters)
    if parameters["expert"] >= parameters["experts"]:
        raise BadInput(f"expert {parameters['expert']} is not one of {parameters['experts']}, counted from 0.")
    if parameters["rows"] is None:
        return out, into
    first, last = parameters["rows"]
    if last > out:
        raise BadInput(f"rows {first} to {last} are not in B, which has {out}.")
    return last - first, into


def experts_rank(shapes: Shapes, parameters: Parameters) -> int:
    return shapes["A"][0] // int(parameters["experts"])


def adalora(shapes: Shapes, parameters: Parameters) -> Size:
    r, into = _matrix(shapes, "A")
    _vector(shapes, "E", r)
    return _matrix(shapes, "B", columns=r)[0], into


def vera(shapes: Shapes, parameters: Parameters) -> Size:
    r, _ = _matrix(shapes, "A")
    _matrix(shapes, "B", columns=r)
    _vector(shapes, "lambda_d", r)
    return _vector(shapes, "lambda_b"), None


def vera_fits(shapes: Shapes, parameters: Parameters, out_in: OutIn) -> None:
    found = shapes["B"][0], shapes["A"][1]
    if found[0] < out_in[0] or found[1] < out_in[1]:
        raise BadInput(f"B and A are for up to {found}, expected at least {out_in}.")


def reshaped_fits(shapes: Shapes, parameters: Parameters, out_in: OutIn) -> None:
    found = shapes["B"][0] * prod(shapes["A"][1:])
    if found != prod(out_in):
        raise BadInput(f"B·A has {found} elements, expected {prod(out_in)}.")


def lora_reshaped(shapes: Shapes, parameters: Parameters) -> Size:
    _matrix(shapes, "B", columns=_matrix(shapes, "A")[0])
    return None, None


def reshaped_is_exact(shapes: Shapes, parameters: Parameters, out_in: OutIn) -> bool:
    R, q = _matrix(shapes, "A")
    d = gcd(out_in[1], q)
    return R * (out_in[1] // d) * (q // d) <= EXPANSION * min(out_in)


def loha(shapes: Shapes, parameters: Parameters) -> Size:
    cores = [role for role in ("t1", "t2") if role in shapes]
    if len(cores) == 1:
        raise BadInput(f"found {cores[0]} alone, expected both t1 and t2, or neither.")
    if not cores:
        sizes = [(_matrix(shapes, a)[0], _matrix(shapes, b, rows=_matrix(shapes, a)[1])[1]) for a, b in _LOHA]
    else:
        sizes = [_tucker(shapes, core, a, b) for core, (a, b) in zip(cores, _LOHA, strict=True)]
        if shapes["t1"][2:] != shapes["t2"][2:]:
            raise BadInput(f"t1 and t2 have kernels {shapes['t1'][2:]} and {shapes['t2'][2:]}, expected the same.")
    if sizes[0] != sizes[1]:
        raise BadInput(f"w1 and w2 are for weights of shapes {sizes[0]} and {sizes[1]}, expected the same.")
    return sizes[0]


_LOHA = (("w1_a", "w1_b"), ("w2_a", "w2_b"))


def _tucker(shapes: Shapes, core: str, a: str, b: str) -> tuple[int, int]:
    p, q, kernel = _core(shapes, core)
    return _matrix(shapes, a, rows=p)[1], _matrix(shapes, b, rows=q)[1] * kernel


def loha_is_exact(shapes: Shapes, parameters: Parameters, out_in: OutIn) -> bool:
    return "t1" not in shapes and shapes["w1_b"][0] * shapes["w2_b"][0] <= EXPANSION * min(out_in)


def locon(shapes: Shapes, parameters: Parameters) -> Size:
    p, q, kernel = _core(shapes, "mid")
    return _matrix(shapes, "up", columns=p)[0], _matrix(shapes, "down", rows=q)[1] * kernel


def locon_is_exact(shapes: Shapes, parameters: Parameters, out_in: OutIn) -> bool:
    return prod(shapes["mid"][:2]) <= EXPANSION * min(out_in)


def lokr(shapes: Shapes, parameters: Parameters) -> Size:
    (a, c), (b, d) = _lokr_part(shapes, "w1"), _lokr_part(shapes, "w2")
    if parameters["align"] == "trailing" and len(shapes.get("w2", ())) != 3:
        raise BadInput(f"align is 'trailing', expected w2 of 3 dimensions, found {shapes.get('w2', 'none')}.")
    return a * b, c * d


def _lokr_part(shapes: Shapes, name: str) -> tuple[int, int]:
    """The size of w1 or w2 as a matrix."""
    parts = {part for part in (f"{name}_a", f"{name}_b") if part in shapes}
    if name == "w2" and "t2" in shapes:
        parts.add("t2")
    if len(parts) == 1 or (name in shapes) == bool(parts) or (len(parts) == 2 and "t2" in parts):
        raise BadInput(f"expected either {name}, or {name}_a and {name}_b, found {', '.join(sorted(shapes))}.")
    if name in shapes:
        return _matrix(shapes, name)
    if "t2" in parts:
        return _tucker(shapes, "t2", "w2_a", "w2_b")
    rows, r = _matrix(shapes, f"{name}_a")
    return rows, _matrix(shapes, f"{name}_b", rows=r)[1]


def lokr_rank(shapes: Shapes, parameters: Parameters) -> int:
    return next((shapes[role][0] for role in ("w1_b", "w2_b") if role in shapes), 0)


def lokr_is_exact(shapes: Shapes, parameters: Parameters, out_in: OutIn) -> bool:
    if "w1" in shapes and "w2" in shapes:
        return True
    if parameters["align"] == "trailing" or ("t2" in shapes and "w1" not in shapes):
        return False
    if "t2" in shapes:
        rank = shapes["w1"][1] * prod(shapes["t2"][:2])
    else:
        whole = {name: min(_matrix(shapes, name)) for name in ("w1", "w2") if name in shapes}
        rank = prod(whole[name] if name in whole else shapes[f"{name}_b"][0] for name in ("w1", "w2"))
    return rank <= EXPANSION * min(out_in)


def _whole(shapes: Shapes) -> tuple[int, int]:
    """The size of a whole value: of a bias, which is a vector, (n, 1)."""
    shape = shapes["value"]
    if not shape:
        raise BadInput("value has no dimensions, expected one with rows.")
    return shape[0], prod(shape[1:])


def dense(shapes: Shapes, parameters: Parameters) -> Size:
    return _whole(shapes)


def replaced(shapes: Shapes, parameters: Parameters) -> Size:
    rows, columns = _whole(shapes)
    return (columns, rows) if parameters["turned"] else (rows, columns)


def ia3(shapes: Shapes, parameters: Parameters) -> Size:
    return (_vector(shapes, "l") if parameters["on"] == "out" else None), None


def ia3_fits(shapes: Shapes, parameters: Parameters, out_in: OutIn) -> None:
    groups = parameters.get("groups", 1)
    if parameters["on"] == "out":
        if groups != 1:
            raise BadInput(f"on is 'out', expected no groups, found {groups}.")
        return
    _divide("the number of outputs", out_in[0], groups)
    _divide("the number of inputs", out_in[1], _divide("the number of l's elements", _vector(shapes, "l"), groups))


def rows(shapes: Shapes, parameters: Parameters) -> Size:
    return _matrix(shapes, "rows", rows=len(parameters["indices"]))[1], None


def rows_fits(shapes: Shapes, parameters: Parameters, out_in: OutIn) -> None:
    indices = parameters["indices"]
    if len(set(indices)) != len(indices) or max(indices) >= out_in[1]:
        raise BadInput(f"the indices of rows repeat, or exceed {out_in[1] - 1}: the largest is {max(indices)}.")


def rotation(shapes: Shapes, parameters: Parameters) -> Size:
    return (_vector(shapes, "s") if "s" in shapes else None), None


def oft_fits(shapes: Shapes, parameters: Parameters, out_in: OutIn) -> None:
    R, n = shapes["R"], out_in[0 if parameters["side"] == "out" else 1]
    if not R:
        raise BadInput("R has no dimensions, expected (blocks, s, s) or (blocks, s·(s - 1)/2).")
    size = R[1] if len(R) == 3 else (1 + isqrt(1 + 8 * R[-1])) // 2
    if R not in ((R[0], size, size), (R[0], size * (size - 1) // 2)):
        raise BadInput(f"R has shape {R}, expected (blocks, s, s) or (blocks, s·(s - 1)/2).")
    if size > n or (R[0] > 1 and size != -(-n // R[0])):
        raise BadInput(f"R is of {R[0]} rotations of {size} numbers, which do not cover vectors of {n}.")


def boft_fits(shapes: Shapes, parameters: Parameters, out_in: OutIn) -> None:
    R, n = shapes["R"], out_in[0 if parameters["side"] == "out" else 1]
    if len(R) != 4 or R[2] != R[3] or R[0] > n:
        raise BadInput(f"R has shape {R}, expected (stages, blocks, s, s) for vectors of {n}.")
    odd = R[2] % 2 and (R[0] > 1 or parameters["order"] != "halves")
    if R[1] * R[2] != n or odd or n % (R[2] << (R[0] - 1)):
        raise BadInput(f"R is of {R[0]} stages of {R[1]} rotations of {R[2]} numbers, not for vectors of {n}.")


def magnitude_fits(shapes: Shapes, parameters: Parameters, out_in: OutIn) -> None:
    """One number for each output; or for each input, of which a convolution has k… in a row."""
    if parameters["axis"] == "out":
        _vector(shapes, "magnitude", out_in[0])
    else:
        _divide("the number of inputs", out_in[1], _vector(shapes, "magnitude"))
