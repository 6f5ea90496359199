"""Rotations of hostile sizes: refused before anything is computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from loreg.algebra.forms import Term
from loreg.algebra.forms.orthogonal import oft
from loreg.errors import BadInput

PARAMETERS = {"side": "in", "factor": 0.5, "series": None, "block_limit": None, "total_limit": None}


def _term(R: Tensor, n: int = 6, **parameters: Any) -> Term:
    return Term({"R": R}, {**PARAMETERS, **parameters}, 1.0, (2, n), lambda: torch.ones(2, n))


@pytest.mark.parametrize("terms", [65, 5000])
def test_a_series_is_of_64_terms_at_most(terms: int) -> None:
    R = torch.ones(2, 3)
    assert oft(_term(R, series=[1.0] + [0.0] * 63)).shape == (2, 6)
    with pytest.raises(BadInput, match=f"series of {terms} terms is given, and one of 64 at most"):
        oft(_term(R, series=[1.0] * terms))


def test_a_triangle_has_a_side() -> None:
    sides = {side * (side - 1) // 2: side for side in range(1, 12)}
    for count in range(60):
        if count in sides:
            assert oft(_term(torch.zeros(1, count), n=sides[count])).shape == (2, sides[count])
        else:
            with pytest.raises(BadInput, match=f"{count} numbers are not the upper triangle"):
                oft(_term(torch.zeros(1, count), n=11))


@pytest.mark.timeout(60)
def test_the_side_of_a_huge_triangle_is_not_searched_for() -> None:
    with pytest.raises(BadInput, match="10000000001 numbers are not the upper triangle"):
        oft(_term(torch.zeros(1, 1, dtype=torch.float64).expand(1, 10**10 + 1)))
