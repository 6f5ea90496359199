"""PEFT's own ``add_weighted_adapter`` against the methods in factor space: products, never factors."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import peft
import pytest
import torch
from torch import Tensor, nn

from loreg.algebra import LowRank
from loreg.algebra.factor_space import METHODS

ROWS, COLUMNS = 20, 14
RANKS = {"sql": (4, 8), "humor": (4, 4), "code": (4, 16), "law": (2, 3)}  # rank and alpha
WEIGHTS = {"sql": 0.7, "humor": -0.4, "code": 1.5, "law": 0.2}


class _Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(COLUMNS, ROWS, bias=False)


@cache
def _model() -> peft.LoraModel:
    torch.manual_seed(7)
    model = None
    for name, (rank, alpha) in RANKS.items():
        config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=["proj"], use_rslora=name == "code")
        if model is None:
            model = peft.get_peft_model(_Layer(), config, name)
        else:
            model.add_adapter(name, config)
        nn.init.normal_(model.base_model.model.proj.lora_B[name].weight)
    assert model is not None
    return model.base_model


def theirs(names: Sequence[str], kind: str, **options: object) -> Tensor:
    model = _model()
    model.add_weighted_adapter(list(names), [WEIGHTS[name] for name in names], "merged", kind, **options)
    try:
        found: Tensor = model.model.proj.get_delta_weight("merged").detach().double()
        return found
    finally:
        model.delete_adapter("merged")


def ours(names: Sequence[str], method: str, **parameters: object) -> Tensor:
    layer = _model().model.proj
    given = [
        (WEIGHTS[n], (LowRank(layer.lora_B[n].weight, layer.lora_A[n].weight, layer.scaling[n]),)) for n in names
    ]
    result = METHODS[method](given, parameters).terms
    assert not any(term.left.requires_grad for term in result) or method == "cat"
    return torch.stack([term.dense().detach() for term in result]).sum(0)


def off(found: Tensor, expected: Tensor) -> float:
    return float(torch.linalg.matrix_norm(found - expected) / torch.linalg.matrix_norm(expected))


EQUAL = ["sql", "humor", "code"]


@pytest.mark.parametrize("names", [EQUAL, list(RANKS), ["humor", "law"]], ids=len)
def test_cat(names: list[str]) -> None:
    assert off(ours(names, "cat"), theirs(names, "cat")) < 1e-6


@pytest.mark.parametrize("names", [EQUAL, list(RANKS), ["humor", "law"]], ids=len)
@pytest.mark.parametrize("rank", [1, 3, 6])
def test_svd(names: list[str], rank: int) -> None:
    found = ours(names, "svd", rank=rank)
    assert torch.linalg.matrix_rank(found, rtol=1e-9) == rank
    assert off(found, theirs(names, "svd", svd_rank=rank)) < 1e-5


@pytest.mark.parametrize("names", [EQUAL, ["sql", "humor"], ["humor", "code"], ["sql"]], ids=" ".join)
def test_peft_linear(names: list[str]) -> None:
    """One adapter is itself; of more, signs and cross terms are PEFT's, and it is not the sum."""
    expected = theirs(names, "linear")
    assert off(ours(names, "peft_linear"), expected) < 1e-6
    far = off(ours(names, "cat"), expected)
    assert far < 1e-6 if len(names) == 1 else far > 0.1


@pytest.mark.parametrize(
    ("theirs_is", "method", "rank"),
    [("cat", "cat", 8), ("svd", "svd", 4), ("linear", "peft_linear", 4)],
    ids=["cat", "svd", "linear"],
)
def test_peft_scales_by_root_r_where_the_first_adapter_is_rslora(theirs_is: str, method: str, rank: int) -> None:
    """PEFT's merged adapter takes over the first one's config, rsLoRA with it, and with alpha = r that is a scale
    of √r (peft/tuners/lora/model.py, ``replace`` in ``add_weighted_adapter``). Ours is the float64 truth."""
    parameters = {"rank": rank} if method == "svd" else {}
    right, wrong = ours(["code", "sql"], method, **parameters), theirs(["code", "sql"], theirs_is)
    assert off(wrong, rank**0.5 * right) < 1e-5
    assert off(theirs(["sql", "code"], theirs_is), right) < 1e-5


def test_ranks_that_differ_are_refused_by_both() -> None:
    with pytest.raises(ValueError, match="same r"):
        theirs(list(RANKS), "linear")
    with pytest.raises(Exception, match="one rank, found 2, 4"):
        ours(list(RANKS), "peft_linear")
