"""Cases for the forms of a term: one weight, one term, and the bytes that a merge makes of it."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from fractions import Fraction
from math import prod
from typing import Any

from vector_cases.arithmetic import matrix, rounded, values
from vector_cases.documents import Edit, at, without
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


def forms() -> list[Vector]:
    return [*_low_rank(), *_lycoris(), *_scaled(), *_rotated(), *_decomposed(), *_sums(), *_refused()]


def _given(
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


def _vector(name: str, description: str, clauses: str, *args: Any, **more: Any) -> Vector:
    given = _given(*args, **more)
    try:
        return valid(name, description, clauses, given, outcome(given))
    except Refused:
        return rejected(name, description, clauses, given)


def _tensors(seed: str, dtype: str, **shapes: Sequence[int]) -> dict[str, Tensor]:
    return {role: drawn(f"{seed} {role}", dtype, *shape) for role, shape in shapes.items()}


def _weight(seed: str, dtype: str, *shape: int) -> Tensor:
    return drawn(f"{seed} W", dtype, *shape, low=-6)


def _low_rank() -> list[Vector]:
    def case(name: str, description: str, form: str, dtypes: str, W: Sequence[int], shapes: dict[str, Sequence[int]],
             parameters: dict[str, Any] | None = None, scale: str = "2", clauses: str = "F1 F2 F3 M9",
             **more: Any) -> Vector:  # fmt: skip
        of_w, of_tensors = dtypes.split()
        tensors = _tensors(name, of_tensors, **shapes)
        return _vector(name, description, clauses, form, _weight(name, of_w, *W), tensors, parameters, scale, **more)

    one = {"groups": 1}
    return [
        case("lora", "scale·BA.", "lora", "BF16 F32", (3, 4), {"A": (2, 4), "B": (3, 2)}, one, "0.7"),
        case("lora-in-out", "A weight that is stored (in, out).", "lora", "F32 BF16", (4, 3),
             {"A": (2, 4), "B": (3, 2)}, one, "0.7", orientation="in_out"),
        case("lora-conv", "A convolution, and factors of four dimensions.", "lora", "F16 F32", (3, 2, 2, 1),
             {"A": (2, 2, 2, 1), "B": (3, 2, 1, 1)}, one),
        case("lora-groups", "B is block-diagonal.", "lora", "BF16 F32", (4, 3), {"A": (4, 3), "B": (4, 2)},
             {"groups": 2}),
        case("lora-groups-in", "A is block-diagonal.", "lora", "BF16 F32", (3, 4), {"A": (2, 2), "B": (3, 2)},
             {"groups": 1, "groups_in": 2}),
        case("lora-groups-both", "Both are.", "lora", "F32 F32", (4, 4), {"A": (4, 2), "B": (4, 2)},
             {"groups": 2, "groups_in": 2}),
        case("lora-weights", "fl(0.7·fl(-1.5·0.1)): the recipe's, the term's, and scale.", "lora", "F32 F32", (2, 2),
             {"A": (1, 2), "B": (2, 1)}, one, "0.1", weight="-1.5", recipe_weight="0.7", clauses="F1 A2 M9"),
        case("lora-merged", "The second of three blocks of rows does not change.", "lora_merged", "BF16 F32", (6, 3),
             {"A": (4, 3), "B": (4, 2)}, {"enable": [True, False, True]}),
        case("lora-merged-all", "All blocks change.", "lora_merged", "F32 BF16", (4, 3), {"A": (2, 3), "B": (4, 1)},
             {"enable": [True, True]}),
        case("lora-reshaped", "A row of the weight is pieces of two rows of the product.", "lora_reshaped", "BF16 F32",
             (4, 3), {"A": (1, 2), "B": (6, 1)}),
        case("lora-reshaped-conv", "A convolution as loralib has it.", "lora_reshaped", "F32 F32", (4, 2, 2, 2),
             {"A": (2, 4), "B": (8, 2)}, clauses="F1 F2 F3 F5"),
        case("lora-reshaped-wide", "As a sum of low-rank terms it would be of rank 12: computed.", "lora_reshaped",
             "F32 F32", (2, 6), {"A": (3, 4), "B": (3, 3)}, clauses="F3 F5"),
        case("lora-expert", "The second of three experts.", "lora_expert", "BF16 F32", (2, 3),
             {"A": (6, 3), "B": (2, 6)}, {"experts": 3, "expert": 1, "rows": None}),
        case("lora-expert-rows", "Rows 1 and 2 of the outputs: half of a fused projection.", "lora_expert", "F32 BF16",
             (2, 3), {"A": (4, 3), "B": (4, 4)}, {"experts": 2, "expert": 0, "rows": [1, 3]}),
        case("lora-experts", "A stack of two.", "lora_experts", "BF16 F32", (2, 3, 2), {"A": (4, 2), "B": (3, 4)},
             {"experts": 2}),
        case("lora-experts-in-out", "A stack of matrices (in, out).", "lora_experts", "F32 BF16", (2, 2, 3),
             {"A": (4, 2), "B": (3, 4)}, {"experts": 2}, orientation="in_out"),
        case("adalora", "Singular values in B.", "adalora", "BF16 F32", (3, 4), {"A": (2, 4), "B": (3, 2), "E": (2, 1)}),
        case("adalora-bf16", "Values of eight bits.", "adalora", "F32 BF16", (2, 2),
             {"A": (3, 2), "B": (2, 3), "E": (3, 1)}),
        case("vera", "Shared matrices, larger than needed.", "vera", "BF16 F32", (2, 3),
             {"A": (2, 5), "B": (4, 2), "lambda_d": (2,), "lambda_b": (2,)}, scale="1"),
        case("vera-in-out", "The same for a weight (in, out).", "vera", "F32 BF16", (3, 2),
             {"A": (2, 3), "B": (2, 2), "lambda_d": (2,), "lambda_b": (2,)}, orientation="in_out"),
        case("adalora-f64", "B and E of 53 bits: their product is rounded, and the sum is exact from there on.", "adalora",
             "F32 F64", (2, 2), {"A": (1, 2), "B": (2, 1), "E": (1, 1)}, clauses="F1 F3 A6"),
    ]  # fmt: skip


def _lycoris() -> list[Vector]:
    def case(name: str, description: str, form: str, dtypes: str, W: Sequence[int], parameters: dict[str, Any] | None,
             clauses: str = "F4", **shapes: Sequence[int]) -> Vector:  # fmt: skip
        of_w, of_tensors = dtypes.split()
        tensors = _tensors(name, of_tensors, **shapes)
        return _vector(
            name, description, f"F2 {clauses}", form, _weight(name, of_w, *W), tensors, parameters, "0.7"
        )

    def lokr(name: str, description: str, dtypes: str, W: Sequence[int], clauses: str = "F4",
             align: str = "leading", **shapes: Sequence[int]) -> Vector:  # fmt: skip
        return case(f"lokr-{name}", description, "lokr", dtypes, W, {"align": align}, clauses, **shapes)

    core = {"t1": (2, 1, 2, 1), "t2": (1, 2, 2, 1)}
    return [
        case("loha", "Of rank 2·3 as a sum.", "loha", "BF16 F32", (3, 4), None,
             w1_a=(3, 2), w1_b=(2, 4), w2_a=(3, 3), w2_b=(3, 4)),
        case("loha-conv", "b of four dimensions.", "loha", "F32 BF16", (2, 2, 1, 2), None,
             w1_a=(2, 1), w1_b=(1, 2, 1, 2), w2_a=(2, 2), w2_b=(2, 4)),
        case("loha-wide", "Of rank 9, more than 4·2: computed.", "loha", "F32 F32", (2, 3), None, "F4 F5 A6",
             w1_a=(2, 3), w1_b=(3, 3), w2_a=(2, 3), w2_b=(3, 3)),
        case("loha-limit", "Of rank 8, just 4·2: exact.", "loha", "F32 F32", (2, 3), None, "F4 F5",
             w1_a=(2, 2), w1_b=(2, 3), w2_a=(2, 4), w2_b=(4, 3)),
        case("loha-cores", "With cores, of different ranks.", "loha", "BF16 F32", (3, 4, 2, 1), None, "F4 F5 A6",
             **core, w1_a=(2, 3), w1_b=(1, 4), w2_a=(1, 3), w2_b=(2, 4)),
        case("loha-cores-f32", "The same, stored in F32.", "loha", "F32 BF16", (3, 4, 2, 1), None, "F4 F5 A6",
             **core, w1_a=(2, 3), w1_b=(1, 4), w2_a=(1, 3), w2_b=(2, 4)),
        case("locon", "A convolution with a core.", "locon", "BF16 F32", (3, 2, 2, 1), None,
             up=(3, 2, 1, 1), mid=(2, 3, 2, 1), down=(3, 2, 1, 1)),
        case("locon-wide", "Of rank 9, more than 4·2: computed.", "locon", "F32 F32", (2, 2, 2), None, "F4 F5 A6",
             up=(2, 3, 1), mid=(3, 3, 2), down=(3, 2, 1)),
        lokr("whole", "Two whole matrices: each element is one product.", "BF16 F32", (4, 6), "F4 F5",
             w1=(2, 3), w2=(2, 2)),
        lokr("conv", "A convolution, w2 whole, a kernel of two dimensions.", "F16 BF16", (4, 2, 2, 2), "F4 F5",
             w1=(2, 1), w2=(2, 2, 2, 2)),
        lokr("w2-factors", "w1 whole and wide.", "F32 F32", (4, 9), w1=(2, 3), w2_a=(2, 1), w2_b=(1, 3)),
        lokr("w2-factors-tall", "w1 whole and tall.", "F32 F32", (6, 6), w1=(3, 2), w2_a=(2, 1), w2_b=(1, 3)),
        lokr("w1-factors", "w2 whole.", "BF16 F32", (4, 6), w1_a=(2, 1), w1_b=(1, 2), w2=(2, 3)),
        lokr("w1-factors-tall", "w2 whole and tall.", "F32 F32", (6, 4), w1_a=(2, 2), w1_b=(2, 2), w2=(3, 2)),
        lokr("factors", "Both of factors.", "F32 BF16", (4, 6), w1_a=(2, 2), w1_b=(2, 3), w2_a=(2, 2), w2_b=(2, 2)),
        lokr("wide", "Of rank 12, more than 4·2: computed.", "F32 F32", (2, 6), "F4 F5 A6",
             w1_a=(1, 4), w1_b=(4, 3), w2_a=(2, 3), w2_b=(3, 2)),
        lokr("core", "w1 whole, w2 with a core.", "BF16 F32", (4, 4, 2), w1=(2, 2), w2_a=(2, 2), w2_b=(1, 2),
             t2=(2, 1, 2)),
        lokr("core-factors", "w1 of factors, w2 with a core: computed.", "F32 F32", (4, 4, 2), "F4 F5 A6",
             w1_a=(2, 1), w1_b=(1, 2), w2_a=(2, 2), w2_b=(2, 2), t2=(2, 2, 2)),
        lokr("trailing", "As PEFT's Conv1d has it.", "F32 F32", (4, 4, 3), "F4 F5", "trailing", w1=(2, 2),
             w2=(2, 2, 3)),
        lokr("trailing-factors", "The same with w1 of factors: computed.", "F32 F32", (4, 6, 2), "F4 F5 A6", "trailing",
             w1_a=(2, 2), w1_b=(2, 3), w2=(2, 2, 2)),
        case("dense", "A difference.", "dense", "BF16 F32", (2, 3), None, value=(2, 3)),
        case("dense-conv", "That of a convolution.", "dense", "F32 BF16", (2, 1, 3), None, value=(2, 1, 3)),
        case("dense-bias", "That of a bias.", "dense", "BF16 F32", (3,), None, value=(3,)),
    ]  # fmt: skip


def _scaled() -> list[Vector]:
    def ia3(name: str, description: str, dtypes: str, W: Sequence[int], l: int, **more: Any) -> Vector:  # noqa: E741
        of_w, of_l = dtypes.split()
        orientation, weight = more.pop("orientation", "out_in"), more.pop("weight", "1")
        return _vector(
            f"ia3-{name}", description, "F2 F6", "ia3", _weight(name, of_w, *W), _tensors(name, of_l, l=(l, 1)),
            more, weight=weight, orientation=orientation,
        )  # fmt: skip

    def rows(name: str, description: str, dtypes: str, W: Sequence[int], indices: list[int], **more: Any) -> Vector:
        of_w, of_rows = dtypes.split()
        out = W[1] if more.get("orientation") == "in_out" else W[0]
        tensors = {"rows": drawn(f"{name} rows", of_rows, len(indices), out)}
        return _vector(f"rows-{name}", description, "F2 F6", "rows", _weight(name, of_w, *W), tensors,
                       {"indices": indices}, **more)  # fmt: skip

    return [
        ia3("out", "A number for each row.", "BF16 F32", (2, 3), 2, on="out"),
        ia3("in", "A number for each column.", "F32 F32", (2, 3), 3, on="in"),
        ia3("in-out", "A number for each column of a weight (in, out).", "BF16 F32", (3, 2), 3, on="in",
            orientation="in_out"),
        ia3("conv", "A number for each channel, with all of its kernel.", "F16 F32", (2, 3, 2), 3, on="in"),
        ia3("groups", "Two groups of a convolution have channels of their own.", "BF16 F32", (4, 2, 2), 4, on="in",
            groups=2),
        ia3("neutral", "1 + l.", "F32 F32", (2, 3), 2, on="out", neutral=0),
        ia3("bias", "A bias.", "BF16 F32", (3,), 3, on="out"),
        ia3("half", "At a weight of 0.5.", "F32 F32", (2, 2), 2, on="out", weight="0.5"),
        rows("some", "Two columns.", "BF16 F32", (2, 4), [2, 0]),
        rows("embedding", "Words of an embedding.", "F32 F32", (4, 2), [3, 1], orientation="in_out"),
        rows("half", "Halfway.", "F32 BF16", (2, 3), [1], weight="0.5"),
        rows("many", "65 of 66: computed as two dense terms, with the same result.", "BF16 BF16", (1, 66),
             list(range(65, 0, -1))),
        rows("scale", "At a scale of 2, weight 0.5.", "F32 F32", (2, 3), [0, 2], scale="2", weight="0.5"),
    ]  # fmt: skip


def _rotation(**more: Any) -> dict[str, Any]:
    return {"side": "in", "factor": 0.5, "total_limit": None, **more}


def _rotated() -> list[Vector]:
    def case(form: str, name: str, description: str, dtypes: str, W: Sequence[int], R: Sequence[int], s: bool = False,
             scale: str = "1", weight: str = "1", orientation: str = "out_in", **parameters: Any) -> Vector:  # fmt: skip
        of_w, of_tensors = dtypes.split()
        out = W[1] if orientation == "in_out" else W[0]
        shapes = {"R": R, **({"s": (out, 1)} if s else {})}
        return _vector(
            f"{form}-{name}", description, "F2 F7 A6", form, _weight(name, of_w, *W),
            _tensors(name, of_tensors, **shapes), _rotation(**parameters), scale, weight, orientation=orientation,
        )  # fmt: skip

    def oft(name: str, description: str, *args: Any, **more: Any) -> Vector:
        return case("oft", name, description, *args, **{"series": None, "block_limit": None, **more})

    def boft(name: str, description: str, *args: Any, **more: Any) -> Vector:
        return case("boft", name, description, *args, **{"order": "halves", **more})

    return [
        oft("in", "Rows, in two blocks; above the diagonal.", "BF16 F32", (3, 6), (2, 3)),
        oft("out", "Columns, in two blocks of whole matrices.", "F32 F32", (6, 2), (2, 3, 3), side="out",
            factor=-0.5),
        oft("shared", "One matrix for all blocks, and a rest.", "F32 F32", (2, 5), (1, 2, 2)),
        oft("cut", "Two blocks of three for five numbers.", "F32 BF16", (2, 5), (2, 3, 3)),
        oft("unused", "Four blocks of two for five numbers: the third is cut, the fourth not used.", "F32 F32",
            (2, 5), (4, 2, 2)),
        oft("series", "A polynomial.", "BF16 F32", (2, 3), (1, 3), series=[1, 2, 2, 1]),
        oft("series-1", "A polynomial of degree 0: no rotation.", "F32 F32", (2, 3), (1, 3), series=[1]),
        oft("block-limit", "Each block has its norm limited; the second is within.", "F32 F32", (2, 6), (2, 3),
            block_limit=0.7),
        oft("total-limit", "The norm of all blocks is limited.", "F32 F32", (2, 6), (2, 3, 3), total_limit=0.3),
        oft("within-limit", "The norm is within the limit.", "F32 F32", (2, 4), (1, 4, 4), total_limit=100),
        oft("s", "Rows are scaled afterwards.", "BF16 F32", (4, 3), (1, 3), s=True),
        oft("in-out", "A weight (in, out), rotated along in, at a weight of 0.5.", "F32 F32", (4, 3), (2, 2, 2),
            weight="0.5", orientation="in_out"),
        oft("conv", "A convolution, along out.", "F16 F32", (4, 2, 2), (2, 1), side="out", factor=1, scale="2"),
        boft("halves", "Two stages.", "F32 F32", (2, 8), (2, 2, 4, 4)),
        boft("one", "One stage, of an odd size: OFT.", "BF16 F32", (2, 3), (1, 1, 3, 3)),
        boft("three", "Three stages, along out, and s.", "F32 BF16", (8, 2), (3, 4, 2, 2), s=True, side="out"),
        boft("alternating", "As LyCORIS takes turns.", "F32 F32", (8, 2), (2, 2, 4, 4), side="out", factor=-1,
             order="alternating"),
        boft("limit", "The norm of all stages is limited.", "BF16 F32", (8, 1), (2, 4, 2, 2), side="out", factor=-1,
             order="alternating", total_limit=0.5),
    ]  # fmt: skip


def _decomposed() -> list[Vector]:
    def case(name: str, description: str, form: str, dtypes: str, W: Sequence[int], m: int,
             parameters: dict[str, Any], scale: str = "0.7", weight: str = "1", orientation: str = "out_in",
             **shapes: Sequence[int]) -> Vector:  # fmt: skip
        of_w, of_tensors = dtypes.split()
        tensors = _tensors(name, of_tensors, **shapes) | {"magnitude": drawn(f"{name} m", of_tensors, m, 1, low=-1)}
        return _vector(f"dora-{name}", description, "F2 F8 A6", form, _weight(name, of_w, *W), tensors, parameters,
                       scale, weight, orientation=orientation)  # fmt: skip

    out, into = {"axis": "out", "epsilon": 0}, {"axis": "in", "epsilon": 2.0**-23}
    zero = _given("lora", matrix("F32", (2, 2), [1, 2, 3, 4]), {
        "A": matrix("F32", (1, 2), [1, 2]), "B": matrix("F32", (2, 1), [-1, 1]), "magnitude": matrix("F32", (2,), [1, 1]),
    }, {"groups": 1, **out})  # fmt: skip
    return [
        case("lora", "A norm for each row.", "lora", "BF16 F32", (3, 5), 3, {"groups": 1, **out},
             A=(2, 5), B=(3, 2)),
        case("embedding", "A weight (in, out): a norm for each of out.", "lora", "F32 F32", (5, 3), 3,
             {"groups": 1, **out}, orientation="in_out", A=(2, 5), B=(3, 2)),
        case("conv-in", "A norm for each channel, with all of its kernel; epsilon.", "lora", "F32 BF16", (3, 2, 2), 2,
             {"groups": 1, **into}, A=(2, 2, 2), B=(3, 2, 1)),
        case("half", "At a weight of 0.5.", "lora", "F32 F32", (2, 3), 2, {"groups": 1, **out}, weight="0.5",
             A=(1, 3), B=(2, 1)),
        case("merged", "Blocks of rows.", "lora_merged", "BF16 F32", (4, 3), 4, {"enable": [False, True], **out},
             A=(2, 3), B=(2, 2)),
        case("reshaped", "Pieces of rows.", "lora_reshaped", "F32 F32", (4, 6), 4, out, A=(2, 4), B=(6, 2)),
        case("reshaped-wide", "The same, computed.", "lora_reshaped", "F32 F32", (2, 6), 2, out, A=(3, 4), B=(3, 3)),
        case("expert", "One expert.", "lora_expert", "F32 F32", (2, 3), 2,
             {"experts": 2, "expert": 1, "rows": None, **out}, A=(4, 3), B=(2, 4)),
        case("adalora", "Singular values.", "adalora", "F32 F32", (2, 3), 3, into, A=(2, 3), B=(2, 2), E=(2, 1)),
        case("vera", "Shared matrices.", "vera", "F32 F32", (2, 3), 2, out,
             A=(2, 3), B=(2, 2), lambda_d=(2,), lambda_b=(2,)),
        case("loha", "Products of rows and columns, in their order.", "loha", "F32 F32", (3, 4), 4, into,
             w1_a=(3, 2), w1_b=(2, 4), w2_a=(3, 3), w2_b=(3, 4)),
        case("locon", "A core, in its order.", "locon", "F32 F32", (3, 2, 2), 3, out, up=(3, 2, 1), mid=(2, 3, 2),
             down=(3, 2, 1)),
        case("lokr-wide", "w1 whole and wide: the product is on the right.", "lokr", "F32 F32", (4, 9), 4,
             {"align": "leading", **out}, w1=(2, 3), w2_a=(2, 2), w2_b=(2, 3)),
        case("lokr-tall", "w1 whole and tall: the product is on the left.", "lokr", "F32 F32", (6, 6), 6,
             {"align": "leading", **out}, w1=(3, 2), w2_a=(2, 2), w2_b=(2, 3)),
        case("lokr-core", "w2 with a core: w1 is on the left though it is wide.", "lokr", "F32 F32", (4, 6, 2), 6,
             {"align": "leading", **into}, w1=(2, 3), w2_a=(2, 2), w2_b=(2, 2), t2=(2, 2, 2)),
        case("lokr-square", "w1 whole and square: the product is on the right.", "lokr", "F32 F32", (4, 6), 4,
             {"align": "leading", **out}, w1=(2, 2), w2_a=(2, 2), w2_b=(2, 3)),
        case("dense", "A difference.", "dense", "BF16 F32", (2, 3), 2, out, value=(2, 3)),
        rejected("dora-zero", "A row of W + D is zero, and has no direction.", "F8", zero),
    ]  # fmt: skip


def _sums() -> list[Vector]:
    """What A3 and A4 say, where it is a form that says what is added."""
    one = matrix("F32", (1, 1), [1])
    W = _weight("several", "F32", 2, 66)
    difference = _given("dense", W, _tensors("several", "F32", value=(2, 66)), scale="0.3")
    plain = _given("lora", W, _tensors("several", "F32", A=(2, 66), B=(2, 2)), {"groups": 1}, "0.7")
    other = _given("adalora", W, _tensors("others", "F32", A=(1, 66), B=(2, 1), E=(1,)), {}, "0.1")

    def replaced(count: int) -> dict[str, Any]:
        tensors = {"rows": drawn("several rows", "F32", count, 2)}
        return _given("rows", W, tensors, {"indices": list(range(count))}, weight="0.9")

    def several(name: str, description: str, *given: dict[str, Any], **more: Any) -> Vector:
        made = {**given[0], **more, "terms": [each["terms"][0] for each in given]}
        return valid(name, description, "F1 A6 M9", made, outcome(made))

    big = matrix("F32", (1, 1), [2.0**127])
    return [
        several("several-terms", "Low-rank terms in their order, then dense ones in theirs.", difference, plain,
                replaced(3), other, recipe_weight="-0.6"),
        several("several-rows", "With more than 64 indices, rows are among the dense ones.", difference, plain,
                replaced(65), other),
        _vector("zero-kept", "-0 in W, replaced by W itself, keeps its bits.", "F6 A3", "rows",
                matrix("F32", (1, 2), ["80000000", 1]), {"rows": matrix("F32", (1, 1), [0])}, {"indices": [0]}),
        _vector("overflow", "A sum beyond the largest value.", "F1 A4", "dense", one, {"value": big}, scale="2"),
        _vector("nan", "NaN in a tensor.", "F1 A4", "dense", one, {"value": matrix("F32", (1, 1), ["7fc00000"])}),
        _vector("coefficient", "A coefficient that no double holds.", "F1 A4", "dense", one, {"value": one},
                scale="1e200", weight="1e200"),
    ]  # fmt: skip


def _refused() -> list[Vector]:
    W = matrix("F32", (2, 4), [1] * 8)

    def made(form: str, parameters: dict[str, Any], **shapes: Sequence[int]) -> dict[str, Any]:
        return _given(form, W, {role: matrix("F32", shape, [1] * prod(shape)) for role, shape in shapes.items()},
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
        "rows": made("rows", {"indices": [1, 3]}, rows=(2, 2)),
        "oft": made("oft", _rotation(series=None, block_limit=None), R=(2, 2, 2)),
        "boft": made("boft", _rotation(order="halves"), R=(2, 2, 2, 2)),
        "dora": made("lora", {"groups": 1, "axis": "out", "epsilon": 0}, A=(2, 4), B=(2, 2), magnitude=(2,)),
    }
    for name, each in given.items():
        outcome(each)  # what is refused below is so by what it changes
        assert name

    def refused(of: str, name: str, description: str, *edits: Callable[[Any], object], clauses: str = "F2") -> Vector:
        changed = copy.deepcopy(given[of])
        for edit in edits:
            edit(changed)
        return rejected(f"{of}-{name}", description, clauses, changed)

    def tensor(role: str, *shape: int) -> Edit:
        return at(f"terms/0/tensors/{role}", matrix("F32", shape, [1] * prod(shape)))

    def parameter(name: str, value: Any) -> Edit:
        return at(f"terms/0/parameters/{name}", value)

    return [
        refused("lora", "form", "A form that is not known.", at("terms/0/form", "lora_fa"), clauses="F1 M9"),
        refused("lora", "no-b", "A role is missing.", without("terms/0/tensors/B"), clauses="F2 M9"),
        refused("lora", "role", "A role that the form has not.", tensor("E", 2), clauses="F2 M9"),
        refused("lora", "no-parameter", "A parameter is missing.", without("terms/0/parameters/groups"), clauses="F2 M9"),
        refused("lora", "parameter", "A parameter that the form has not.", parameter("alpha", 1), clauses="F2 M9"),
        refused("lora", "default", "A parameter that is left out where it is 1.", parameter("groups_in", 1)),
        refused("lora", "groups-0", "No groups.", parameter("groups", 0)),
        refused("lora", "groups-real", "A number of groups that is not whole.", parameter("groups", 1.5)),
        refused("lora", "groups-3", "Outputs that do not divide.", parameter("groups", 3)),
        refused("lora", "rank", "A and B of different ranks.", tensor("B", 2, 1)),
        refused("lora", "in", "A for another number of inputs.", tensor("A", 2, 3)),
        refused("lora", "out", "B for another number of outputs.", tensor("B", 3, 2)),
        refused("lora", "vector", "A of one dimension.", tensor("A", 8)),
        refused("lora", "empty", "A without elements.", tensor("A", 0, 4), tensor("B", 2, 0)),
        refused("lora", "all-inputs", "A for all inputs of a convolution of two groups.", parameter("groups", 2),
                tensor("A", 2, 8), tensor("B", 2, 1)),
        refused("merged", "none", "No block is enabled.", parameter("enable", [False, False])),
        refused("merged", "numbers", "Flags that are numbers.", parameter("enable", [1, 0])),
        refused("reshaped", "size", "Another number of elements.", tensor("B", 3, 1)),
        refused("expert", "third", "The third of two experts.", parameter("expert", 2)),
        refused("expert", "rows", "Rows beyond the last.", parameter("rows", [1, 3])),
        refused("expert", "rows-empty", "No rows.", parameter("rows", [1, 1])),
        refused("expert", "stack", "One expert for a stack.", at("W", matrix("F32", (1, 2, 2), [1] * 4))),
        refused("vera", "narrow", "A has fewer columns than the weight.", tensor("A", 1, 3)),
        refused("vera", "lambda", "lambda_d of another size.", tensor("lambda_d", 2)),
        refused("loha", "one-core", "t1 alone.", tensor("t1", 1, 1, 2)),
        refused("loha", "sizes", "Two products of different sizes.", tensor("w2_a", 3, 1)),
        refused("lokr", "neither", "No w1.", without("terms/0/tensors/w1")),
        refused("lokr", "both", "w1, and its factors too.", tensor("w1_a", 1, 1), tensor("w1_b", 1, 2)),
        refused("lokr", "half", "w2_a without w2_b.", without("terms/0/tensors/w2"), tensor("w2_a", 2, 1)),
        refused("lokr", "core", "A core beside a whole w2.", tensor("t2", 1, 1, 1)),
        refused("lokr", "align", "An alignment that is not known.", parameter("align", "left")),
        refused("lokr", "trailing", "Trailing, for a w2 of two dimensions.", parameter("align", "trailing")),
        refused("dense", "size", "Another shape.", tensor("value", 4, 2)),
        refused("ia3", "size", "Numbers that do not divide the inputs.", tensor("l", 3)),
        refused("ia3", "on", "No side.", parameter("on", "both")),
        refused("ia3", "neutral", "A neutral of 1 is left out.", parameter("neutral", 1)),
        refused("ia3", "neutral-2", "A neutral of 2.", parameter("neutral", 2)),
        refused("ia3", "groups-out", "Groups along out.", parameter("on", "out"), tensor("l", 2),
                parameter("groups", 2)),
        refused("ia3", "magnitude", "W is an operand, so it has no magnitude.", tensor("magnitude", 2),
                parameter("axis", "out"), parameter("epsilon", 0), clauses="F8"),
        refused("rows", "twice", "An index twice.", parameter("indices", [1, 1])),
        refused("rows", "beyond", "An index beyond the last.", parameter("indices", [1, 4])),
        refused("rows", "negative", "An index below 0.", parameter("indices", [1, -1])),
        refused("rows", "count", "More rows than indices.", parameter("indices", [1])),
        refused("oft", "cover", "Blocks that do not cover the vectors.", tensor("R", 3, 1, 1)),
        refused("oft", "triangle", "A number of elements that no triangle has.", tensor("R", 1, 4)),
        refused("oft", "series", "A series of no terms.", parameter("series", [])),
        refused("oft", "limit", "A limit below 0.", parameter("block_limit", -1)),
        refused("oft", "s", "s of another size.", tensor("s", 3)),
        refused("boft", "stages", "More stages than the vectors have halves.", tensor("R", 3, 2, 2, 2)),
        refused("boft", "odd", "An odd size, alternating.", tensor("R", 1, 4, 1, 1), parameter("order", "alternating")),
        refused("boft", "blocks", "Blocks that do not cover the vectors.", tensor("R", 1, 1, 2, 2)),
        refused("dora", "size", "Magnitudes for other rows.", tensor("magnitude", 3), clauses="F8"),
        refused("dora", "divide", "Magnitudes that do not divide the inputs.", tensor("magnitude", 3),
                parameter("axis", "in"), clauses="F8"),
        refused("dora", "no-axis", "A magnitude without its axis.", without("terms/0/parameters/axis"), clauses="F8"),
        refused("dora", "no-magnitude", "An axis without a magnitude.", without("terms/0/tensors/magnitude"),
                clauses="F8"),
        refused("dora", "epsilon", "An epsilon below 0.", parameter("epsilon", -1), clauses="F8"),
    ]  # fmt: skip


__all__ = ["Dense", "LowRank", "drawn", "forms", "outcome"]
