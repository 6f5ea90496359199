"""Tensors with edits of their own, as a live model has them, without a registry."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch

from loreg.algebra import LowRank, WeightedSum
from loreg.algebra.rounding import bits
from loreg.serving.applying import Edit
from loreg.serving.places import Place

Case = tuple[torch.Tensor, WeightedSum]


def case(*shape: int, dtype: torch.dtype = torch.bfloat16, rank: int = 3, seed: int = 0, size: float = 0.01) -> Case:
    """Normal numbers, some of them small; a delta of ``size`` times them."""
    random = torch.Generator().manual_seed(seed)
    W = torch.randn(shape, generator=random)
    W[torch.rand(shape, generator=random) < 0.03] *= 2.0**-14
    left = torch.randn(*shape[:-1], rank, generator=random).bfloat16()
    right = torch.randn(*shape[:-2], rank, shape[-1], generator=random).bfloat16()
    return W.to(dtype), WeightedSum((LowRank(left, right, size / rank**0.5),))


def edits(cases: Mapping[str, Case]) -> list[Edit]:
    """Of the tensors themselves."""
    return [Edit(_target(name, W), _none(), plain) for name, (W, plain) in cases.items()]


def _target(name: str, W: torch.Tensor) -> Any:
    return SimpleNamespace(name=name, place=Place(name, W), edit=SimpleNamespace(view=tuple, replaces=lambda: None))


def _none() -> Any:
    """In the place of a way to combine, of which an edit with a value asks only whether it replaces a tensor."""
    return SimpleNamespace(method="linear")


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(bits(one.cpu()), bits(other.cpu()))
