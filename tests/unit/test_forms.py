"""The table of forms: what each accepts and refuses, and that its sum is what the table says, to the last bit."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from form_cases import CASES, Case
from torch import Tensor

from loreg.algebra import edits, forms
from loreg.errors import BadInput, Unsupported
from loreg.format import forms as table

SUMS = {name: case for name, case in CASES.items() if case.truth is not None}

cases = pytest.mark.parametrize("name", CASES)


def check(case: Case, **changed: Any) -> None:
    given = {"shapes": case.shapes, "parameters": case.parameters, "out_in": case.out_in, **changed}
    table.check(case.form, given["shapes"], given["parameters"], given["out_in"], "modules['m']")


def tensors(case: Case, hard: bool) -> tuple[dict[str, Tensor], Tensor, float]:
    """Values, a weight and a scale: of all bits of float32 and many sizes, so that float64 is not enough for a sum;
    or ``hard``, of so few bits that the sums often are ties."""
    generator = torch.Generator().manual_seed(11)

    def values(shape: tuple[int, ...]) -> Tensor:
        if hard:
            return torch.randint(-3, 4, shape, generator=generator) / 2
        return torch.randn(shape, generator=generator) * 2.0 ** torch.randint(-9, 9, shape, generator=generator)

    depth = (case.parameters["experts"],) if case.form == "lora_experts" else ()
    W = values((*depth, *case.out_in)) * (256 if hard else 1)
    return {role: values(shape) for role, shape in case.shapes.items()}, W.bfloat16(), 0.5 if hard else 1 / 3


def rational(x: Tensor) -> Any:
    return np.array([Fraction(v) for v in x.double().flatten().tolist()], dtype=object).reshape(tuple(x.shape))


def bfloat16(q: Fraction) -> float:
    """``q`` rounded to nearest, ties to even: 8 bits."""
    if q == 0:
        return 0.0
    exponent = math.frexp(q)[1]  # of a double near it, so one too many at most, where |q| is just below a power
    exponent -= abs(q) < Fraction(2) ** (exponent - 1)
    ulp = Fraction(2) ** (exponent - 8)
    return float(round(q / ulp) * ulp)


def test_both_tables_have_the_same_forms() -> None:
    assert set(forms.FORMS) == set(table.FORMS) == {case.form for case in CASES.values()}


@cases
def test_a_good_term_is_accepted_and_makes_a_sum(name: str) -> None:
    case = CASES[name]
    check(case)
    row = table.FORMS[case.form]
    implied = row.shape(case.shapes, case.parameters)
    assert all(size in (None, there) for size, there in zip(implied, case.out_in, strict=True))
    assert row.rank(case.shapes, case.parameters) == case.rank
    values, W, scale = tensors(case, False)
    edit = forms.edit_of(case.form, forms.Term(values, case.parameters, scale, case.out_in, lambda: W))
    assert edit.shape == tuple(W.shape)


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("name", SUMS)
def test_the_sum_is_what_the_definition_says_and_exact_where_the_table_says_so(name: str, hard: bool) -> None:
    case = SUMS[name]
    values, W, scale = tensors(case, hard)
    term = forms.Term(values, case.parameters, scale, case.out_in, lambda: pytest.fail("the form reads the weight"))
    edit = forms.edit_of(case.form, term)
    assert case.truth is not None
    truth = case.truth({role: rational(x) for role, x in values.items()})
    found = sum(Fraction(x.scale) * rational(x.value) for x in edit.dense)
    found = found + sum(Fraction(x.scale) * (rational(x.left) @ rational(x.right)) for x in edit.low_rank)
    exact = Fraction(scale) * truth
    assert table.is_exact(case.form, case.shapes, case.parameters, case.out_in) == case.exact
    if case.exact or hard:
        assert (found == exact).all()
    else:
        assert (found != exact).any()  # else the case is none
        assert (abs(found - exact) <= Fraction(2) ** -48 * abs(truth).max()).all()
    merged = edits.apply(W, edit, torch.bfloat16)
    expected = [bfloat16(w + d) for w, d in zip(rational(W).flat, found.flat, strict=True)]
    assert merged.double().flatten().tolist() == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", SUMS)
def test_the_sum_is_of_values_whatever_their_dtype(name: str, dtype: torch.dtype) -> None:
    case = SUMS[name]
    values, W, scale = tensors(case, True)
    found, expected = (
        forms.edit_of(case.form, forms.Term(given, case.parameters, scale, case.out_in, lambda: W))
        for given in ({role: x.to(dtype) for role, x in values.items()}, values)
    )
    assert torch.equal(edits.apply(W, found), edits.apply(W, expected))


@cases
def test_a_term_with_another_size_is_refused(name: str) -> None:
    case = CASES[name]
    for role, shape in case.shapes.items():
        for dimension in range(len(shape)):
            other = list(shape)
            other[dimension] += 1
            if (role, dimension) in case.loose:
                check(case, shapes={**case.shapes, role: tuple(other)})
                continue
            with pytest.raises(BadInput, match=r"^modules\['m'\]: a term of form"):
                check(case, shapes={**case.shapes, role: tuple(other)})
        for other in ((), (0,), (*shape[:-1], 0)):
            with pytest.raises(BadInput, match=f"{role!r} has shape"):
                check(case, shapes={**case.shapes, role: tuple(other)})


ANY_IN = {"ia3-out", "rows", "oft-triangles", "oft-shared"}
ANY_OUT = {"ia3-in", "oft-triangles", "oft-shared", "boft"}


@cases
def test_a_term_for_another_weight_is_refused(name: str) -> None:
    case = CASES[name]
    out, into = case.out_in
    for other, fits in (((out + 1, into), name in ANY_OUT), ((out, into + 1), name in ANY_IN)):
        if fits:
            check(case, out_in=other)
        elif name != "vera" or other[0] != out:  # whose A is larger by one
            with pytest.raises(BadInput, match=r"^modules\['m'\]: a term of form"):
                check(case, out_in=other)


@cases
def test_tensors_that_are_missing_or_unknown_are_refused(name: str) -> None:
    case = CASES[name]
    for role in case.shapes:
        if name == "oft" and role == "s":
            continue
        with pytest.raises(BadInput, match=r"^modules\['m'\]"):
            check(case, shapes={other: shape for other, shape in case.shapes.items() if other != role})
    with pytest.raises(BadInput, match=f"a term of form {case.form!r} has no tensor 'lora_C'"):
        check(case, shapes={**case.shapes, "lora_C": (1,)})


OPTIONAL = {"groups_in", "neutral"}


@cases
def test_parameters_that_are_missing_or_unknown_are_refused(name: str) -> None:
    case = CASES[name]
    for key in case.parameters:
        if key in OPTIONAL or (case.form, key) == ("ia3", "groups"):
            continue
        rest = {other: value for other, value in case.parameters.items() if other != key}
        with pytest.raises(BadInput, match=rf"parameters: the field '{key}' is missing"):
            check(case, parameters=rest)
    with pytest.raises(BadInput, match="unknown field 'beta'"):
        check(case, parameters={**case.parameters, "beta": 1})


@pytest.mark.parametrize(
    ("name", "changed", "message"),
    [
        ("lora", {"groups": 0}, "groups: expected a whole number of at least 1, found 0"),
        ("lora", {"groups": True}, "groups: expected a whole number"),
        ("lora", {"groups_in": 1}, "expected no groups_in, which means the same, found 1"),
        ("lora-grouped", {"groups": 3}, "the rank is 4, expected a multiple of 3"),
        ("lora_merged", {"enable": [False, False]}, "at least one of them true"),
        ("lora_merged", {"enable": [1, 0, 1]}, "a list of true and false"),
        ("lora_merged", {"enable": [True, False]}, "A has shape .4, 5., expected a matrix of .2, any."),
        ("lora_expert", {"expert": 3}, "expert 3 is not one of 3, counted from 0"),
        ("lora_expert", {"rows": [1, 5]}, "rows 1 to 5 are not in B, which has 4"),
        ("lora_expert", {"rows": [2, 2]}, "two whole numbers, the second the larger"),
        ("lora_expert", {"rows": None}, "for a weight of shape .4, 5., expected .2, 5."),
        ("lora_experts", {"experts": 4}, "the number of A's rows is 6, expected a multiple of 4"),
        ("lokr-whole", {"align": "middle"}, "align: expected one of leading, trailing, found 'middle'"),
        ("lokr-w2-in-two", {"align": "trailing"}, "expected w2 of 3 dimensions, found none"),
        ("ia3-in", {"on": "both"}, "on: expected one of in, out"),
        ("ia3-out", {"groups": 2}, "expected no groups, found 2"),
        ("ia3-in", {"neutral": 1}, "expected no neutral, which means the same"),
        ("ia3-in", {"neutral": 2}, "neutral: expected 0 or 1"),
        ("rows", {"indices": [5, 5]}, "the indices of rows repeat"),
        ("rows", {"indices": [6, 0]}, "or exceed 5: the largest is 6"),
        ("rows", {"indices": [-1, 0]}, "indices: expected a list of whole numbers"),
        ("oft", {"series": []}, "series: expected null, or a list of 1 to 64 numbers"),
        ("oft", {"total_limit": -1.0}, "total_limit: expected null or a number of at least 0"),
        ("oft", {"factor": None}, "factor: expected a finite number, found null"),
    ],
)
def test_a_parameter_that_makes_no_sense_is_refused(name: str, changed: dict[str, Any], message: str) -> None:
    case = CASES[name]
    with pytest.raises(BadInput, match=message):
        check(case, parameters={**case.parameters, **changed})


@pytest.mark.parametrize(
    ("name", "shapes", "message"),
    [
        ("loha-tucker", {"t2": None}, "found t1 alone, expected both t1 and t2, or neither"),
        ("loha-tucker", {"t2": (2, 2, 1, 3)}, "t1 and t2 have kernels .3, 1. and .1, 3., expected the same"),
        ("loha", {"w2_b": (3, 6)}, "w1 and w2 are for weights of shapes .4, 5. and .4, 6."),
        ("lokr-whole", {"w1_a": (2, 2)}, "expected either w1, or w1_a and w1_b, found w1, w1_a, w2"),
        ("lokr-whole", {"t2": (2, 2, 3)}, "expected either w2, or w2_a and w2_b, found t2, w1, w2"),
        ("lokr-tucker", {"w2_b": None}, "expected either w2, or w2_a and w2_b, found t2, w1, w2_a"),
        ("lora_reshaped", {"A": (2, 5)}, "B·A has 30 elements, expected 24"),
        ("vera", {"A": (2, 4)}, r"B and A are for up to \(7, 4\), expected at least \(4, 5\)"),
        ("vera", {"B": (3, 2)}, r"B and A are for up to \(3, 6\), expected at least \(4, 5\)"),
        ("oft-triangles", {"R": (3, 4)}, r"expected \(blocks, s, s\) or \(blocks, s·\(s - 1\)/2\)"),
        ("boft", {"R": (10**12, 4, 2, 2)}, "for vectors of 8"),
    ],
)
def test_tensors_that_do_not_go_together_are_refused(
    name: str, shapes: dict[str, tuple[int, ...] | None], message: str
) -> None:
    case = CASES[name]
    changed = {role: shape for role, shape in {**case.shapes, **shapes}.items() if shape is not None}
    with pytest.raises(BadInput, match=message):
        check(case, shapes=changed)


def test_a_grouped_convolution_of_peft_is_refused_by_name() -> None:
    with pytest.raises(Unsupported, match="A sees all 10 inputs of a convolution of 2 groups, of whose weight"):
        table.check("lora", {"A": (4, 10), "B": (6, 2)}, {"groups": 2}, (6, 5), "modules['m']")


@pytest.mark.parametrize("name", ["lora", "loha", "lokr-whole", "dense"])
def test_a_magnitude_needs_its_parameters_and_is_not_exact(name: str) -> None:
    case = CASES[name]
    out, into = case.out_in
    for axis, size in (("out", out), ("in", into), ("in", 1)):
        shapes = {**case.shapes, "magnitude": (size, 1)}
        parameters = {**case.parameters, "axis": axis, "epsilon": 0}
        check(case, shapes=shapes, parameters=parameters)
        assert not table.is_exact(case.form, shapes, parameters, case.out_in)
        with pytest.raises(BadInput, match="multiple of" if axis == "in" else "magnitude has shape"):
            check(case, shapes={**shapes, "magnitude": (into + 1,)}, parameters=parameters)
        with pytest.raises(BadInput, match="'epsilon' is missing"):
            check(case, shapes=shapes, parameters={**case.parameters, "axis": axis})
        with pytest.raises(BadInput, match="epsilon: expected a number of at least 0"):
            check(case, shapes=shapes, parameters={**parameters, "epsilon": -1e-9})
        with pytest.raises(BadInput, match="unknown field 'axis'"):
            check(case, parameters=parameters)


@pytest.mark.parametrize("name", ["ia3-in", "rows", "oft", "boft", "lora_experts"])
def test_what_reads_the_weight_has_no_magnitude(name: str) -> None:
    case = CASES[name]
    with pytest.raises(BadInput, match="has no tensor 'magnitude'"):
        check(case, shapes={**case.shapes, "magnitude": (case.out_in[0],)})


def test_a_magnitude_decomposes_the_weight() -> None:
    case = CASES["lora"]
    values, W, _ = tensors(case, False)
    W = W.float()
    norms = (W.double() + values["B"].double() @ values["A"].double()).norm(dim=1)
    parameters = {**case.parameters, "axis": "out", "epsilon": 0}
    term = forms.Term({**values, "magnitude": 2 * norms}, parameters, 1.0, case.out_in, lambda: W)
    truth = 2 * (W.double() + values["B"].double() @ values["A"].double())
    torch.testing.assert_close(edits.apply(W, forms.edit_of("lora", term)), truth.float())


def test_unknown_forms_and_other_shapes_are_refused() -> None:
    values, W, scale = tensors(CASES["lora"], False)
    term = forms.Term(values, {"groups": 1}, scale, (4, 6), lambda: W)
    with pytest.raises(BadInput, match=r"for a weight of shape \(4, 5\), not \(4, 6\)"):
        forms.edit_of("lora", term)
    with pytest.raises(Unsupported, match="the form 'lora2' is not one of lora, "):
        forms.edit_of("lora2", term)
    with pytest.raises(Unsupported, match=r"modules\['m'\]: the form 'lora2' is not one of lora, "):
        table.check("lora2", {}, {}, (4, 5), "modules['m']")
