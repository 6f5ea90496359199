"""Cases for the forms that add to a weight: LoRA and its kin, LyCORIS, and sums of several terms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vector_cases.arithmetic import matrix
from vector_cases.form_cases_of_w import decomposed, rotated, scaled
from vector_cases.form_refusals import refused
from vector_cases.form_vector import drawn, given_of, outcome, tensors_of, vector, weight_of
from vector_cases.record import Vector, valid


def forms() -> list[Vector]:
    return [*_low_rank(), *_lycoris(), *scaled(), *rotated(), *decomposed(), *_sums(), *refused()]


def _low_rank() -> list[Vector]:
    def case(name: str, description: str, form: str, dtypes: str, W: Sequence[int], shapes: dict[str, Sequence[int]],
             parameters: dict[str, Any] | None = None, scale: str = "2", clauses: str = "F1 F2 F3 M9",
             **more: Any) -> Vector:  # fmt: skip
        of_w, of_tensors = dtypes.split()
        tensors = tensors_of(name, of_tensors, **shapes)
        return vector(name, description, clauses, form, weight_of(name, of_w, *W), tensors, parameters, scale, **more)

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
        case("lora-reshaped", "A row of the weight is made of two of the product.", "lora_reshaped", "BF16 F32",
             (4, 3), {"A": (1, 2), "B": (6, 1)}),
        case("lora-reshaped-conv", "A convolution as loralib has it.", "lora_reshaped", "F32 F32", (4, 2, 2, 2),
             {"A": (2, 4), "B": (8, 2)}, clauses="F1 F2 F3 F5"),
        case("lora-reshaped-wide", "As a sum of low-rank terms it would be of rank 12: computed.", "lora_reshaped",
             "F32 F32", (2, 6), {"A": (3, 4), "B": (3, 3)}, clauses="F3 F5"),
        case("lora-expert", "The second of three experts.", "lora_expert", "BF16 F32", (2, 3),
             {"A": (6, 3), "B": (2, 6)}, {"experts": 3, "expert": 1, "rows": None}),
        case("lora-expert-rows", "Outputs 1 and 2: half of a fused projection.", "lora_expert", "F32 BF16",
             (2, 3), {"A": (4, 3), "B": (4, 4)}, {"experts": 2, "expert": 0, "rows": [1, 3]}),
        case("lora-experts", "A stack of two.", "lora_experts", "BF16 F32", (2, 3, 2), {"A": (4, 2), "B": (3, 4)},
             {"experts": 2}),
        case("lora-experts-in-out", "A stack of matrices (in, out).", "lora_experts", "F32 BF16", (2, 2, 3),
             {"A": (4, 2), "B": (3, 4)}, {"experts": 2}, orientation="in_out"),
        case("adalora", "Singular values in B.", "adalora", "BF16 F32", (3, 4),
             {"A": (2, 4), "B": (3, 2), "E": (2, 1)}),
        case("adalora-bf16", "Values of eight bits.", "adalora", "F32 BF16", (2, 2),
             {"A": (3, 2), "B": (2, 3), "E": (3, 1)}),
        case("vera", "Shared matrices, larger than needed.", "vera", "BF16 F32", (2, 3),
             {"A": (2, 5), "B": (4, 2), "lambda_d": (2,), "lambda_b": (2,)}, scale="1"),
        case("vera-in-out", "The same for a weight (in, out).", "vera", "F32 BF16", (3, 2),
             {"A": (2, 3), "B": (2, 2), "lambda_d": (2,), "lambda_b": (2,)}, orientation="in_out"),
        case("adalora-f64", "B and E of 53 bits: their product is rounded.", "adalora",
             "F32 F64", (2, 2), {"A": (1, 2), "B": (2, 1), "E": (1, 1)}, clauses="F1 F3 A6"),
    ]  # fmt: skip


def _lycoris() -> list[Vector]:
    def case(name: str, description: str, form: str, dtypes: str, W: Sequence[int], parameters: dict[str, Any] | None,
             clauses: str = "F4", **shapes: Sequence[int]) -> Vector:  # fmt: skip
        of_w, of_tensors = dtypes.split()
        tensors = tensors_of(name, of_tensors, **shapes)
        return vector(name, description, f"F2 {clauses}", form, weight_of(name, of_w, *W), tensors, parameters, "0.7")

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
        lokr("trailing-factors", "With w1 of factors: computed.", "F32 F32", (4, 6, 2), "F4 F5 A6", "trailing",
             w1_a=(2, 2), w1_b=(2, 3), w2=(2, 2, 2)),
        case("dense", "A difference.", "dense", "BF16 F32", (2, 3), None, value=(2, 3)),
        case("dense-conv", "That of a convolution.", "dense", "F32 BF16", (2, 1, 3), None, value=(2, 1, 3)),
        case("dense-bias", "That of a bias.", "dense", "BF16 F32", (3,), None, value=(3,)),
    ]  # fmt: skip


def _sums() -> list[Vector]:
    """What A3 and A4 say, where it is a form that says what is added."""
    one = matrix("F32", (1, 1), [1])
    W = weight_of("several", "F32", 2, 66)
    difference = given_of("dense", W, tensors_of("several", "F32", value=(2, 66)), scale="0.3")
    plain = given_of("lora", W, tensors_of("several", "F32", A=(2, 66), B=(2, 2)), {"groups": 1}, "0.7")
    other = given_of("adalora", W, tensors_of("others", "F32", A=(1, 66), B=(2, 1), E=(1,)), {}, "0.1")

    def replaced(count: int) -> dict[str, Any]:
        tensors = {"rows": drawn("several rows", "F32", count, 2)}
        return given_of("rows", W, tensors, {"indices": list(range(count))}, weight="0.9")

    def several(name: str, description: str, *given: dict[str, Any], **more: Any) -> Vector:
        made = {**given[0], **more, "terms": [each["terms"][0] for each in given]}
        return valid(name, description, "F1 A6 M9", made, outcome(made))

    big = matrix("F32", (1, 1), [2.0**127])
    return [
        several("several-terms", "Low-rank terms in their order, then dense ones in theirs.", difference, plain,
                replaced(3), other, recipe_weight="-0.6"),
        several("several-rows", "With more than 64 indices, rows are among the dense ones.", difference, plain,
                replaced(65), other),
        vector("zero-kept", "-0 in W, replaced by W itself, keeps its bits.", "F6 A3", "rows",
                matrix("F32", (1, 2), ["80000000", 1]), {"rows": matrix("F32", (1, 1), [0])}, {"indices": [0]}),
        vector("overflow", "A sum beyond the largest value.", "F1 A4", "dense", one, {"value": big}, scale="2"),
        vector("nan", "NaN in a tensor.", "F1 A4", "dense", one, {"value": matrix("F32", (1, 1), ["7fc00000"])}),
        vector("coefficient", "A coefficient that no double holds.", "F1 A4", "dense", one, {"value": one},
                scale="1e200", weight="1e200"),
    ]  # fmt: skip
