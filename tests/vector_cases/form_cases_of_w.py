"""Cases for the forms that read the weight: they scale, replace or rotate it, or give it norms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vector_cases.arithmetic import matrix
from vector_cases.form_vector import drawn, given_of, tensors_of, vector, weight_of
from vector_cases.record import Vector, rejected


def scaled() -> list[Vector]:
    def ia3(name: str, description: str, dtypes: str, W: Sequence[int], l: int, **more: Any) -> Vector:  # noqa: E741
        of_w, of_l = dtypes.split()
        orientation, weight = more.pop("orientation", "out_in"), more.pop("weight", "1")
        return vector(
            f"ia3-{name}", description, "F2 F6", "ia3", weight_of(name, of_w, *W), tensors_of(name, of_l, l=(l, 1)),
            more, weight=weight, orientation=orientation,
        )  # fmt: skip

    def rows(name: str, description: str, dtypes: str, W: Sequence[int], indices: list[int], **more: Any) -> Vector:
        of_w, of_rows = dtypes.split()
        out = W[1] if more.get("orientation") == "in_out" else W[0]
        tensors = {"rows": drawn(f"{name} rows", of_rows, len(indices), out)}
        return vector(f"rows-{name}", description, "F2 F6", "rows", weight_of(name, of_w, *W), tensors,
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
        vector("replaced", "Another weight, at 0.5.", "F2 F6", "replaced", weight_of("replaced", "BF16", 2, 3),
                tensors_of("replaced", "F32", value=(2, 3)), {"turned": False}, weight="0.5"),
        vector("replaced-turned", "Another one that is (in, out), as the weight is.", "F2 F6", "replaced",
                weight_of("turned", "F32", 3, 2), tensors_of("turned", "BF16", value=(3, 2)), {"turned": True}, "2",
                orientation="in_out", recipe_weight="0.7"),
        vector("replaced-conv", "Of a convolution.", "F2 F6", "replaced", weight_of("conv", "F16", 2, 2, 1),
                tensors_of("conv", "F16", value=(2, 2, 1)), {"turned": False}),
        vector("replaced-bias", "Of a bias.", "F2 F6", "replaced", weight_of("bias", "F32", 3),
                tensors_of("bias", "F32", value=(3,)), {"turned": False}, weight="-1"),
        rows("some", "Two columns.", "BF16 F32", (2, 4), [2, 0]),
        rows("embedding", "Words of an embedding.", "F32 F32", (4, 2), [3, 1], orientation="in_out"),
        rows("half", "Halfway.", "F32 BF16", (2, 3), [1], weight="0.5"),
        rows("many", "65 of 66: computed as two dense terms, with the same result.", "BF16 BF16", (1, 66),
             list(range(65, 0, -1))),
        rows("scale", "At a scale of 2, weight 0.5.", "F32 F32", (2, 3), [0, 2], scale="2", weight="0.5"),
    ]  # fmt: skip


def rotation(**more: Any) -> dict[str, Any]:
    return {"side": "in", "factor": 0.5, "total_limit": None, **more}


def rotated() -> list[Vector]:
    def case(form: str, name: str, description: str, dtypes: str, W: Sequence[int], R: Sequence[int], s: bool = False,
             scale: str = "1", weight: str = "1", orientation: str = "out_in",
             **parameters: Any) -> Vector:  # fmt: skip
        of_w, of_tensors = dtypes.split()
        out = W[1] if orientation == "in_out" else W[0]
        shapes = {"R": R, **({"s": (out, 1)} if s else {})}
        return vector(
            f"{form}-{name}", description, "F2 F7 A6", form, weight_of(name, of_w, *W),
            tensors_of(name, of_tensors, **shapes), rotation(**parameters), scale, weight, orientation=orientation,
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


def decomposed() -> list[Vector]:
    def case(name: str, description: str, form: str, dtypes: str, W: Sequence[int], m: int,
             parameters: dict[str, Any], scale: str = "0.7", weight: str = "1", orientation: str = "out_in",
             **shapes: Sequence[int]) -> Vector:  # fmt: skip
        of_w, of_tensors = dtypes.split()
        tensors = tensors_of(name, of_tensors, **shapes) | {"magnitude": drawn(f"{name} m", of_tensors, m, 1, low=-1)}
        return vector(f"dora-{name}", description, "F2 F8 A6", form, weight_of(name, of_w, *W), tensors, parameters,
                       scale, weight, orientation=orientation)  # fmt: skip

    out, into = {"axis": "out", "epsilon": 0}, {"axis": "in", "epsilon": 2.0**-23}
    zero = given_of("lora", matrix("F32", (2, 2), [1, 2, 3, 4]), {
        "A": matrix("F32", (1, 2), [1, 2]), "B": matrix("F32", (2, 1), [-1, 1]),
        "magnitude": matrix("F32", (2,), [1, 1]),
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
