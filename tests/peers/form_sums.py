"""Layers of other libraries with random factors, and what a form makes of those: for the tests of forms that do
not read the weight.

What a layer computes in its forward pass is the truth, and the base layer with the edited weight must compute the
same; so must the layer's own delta and merge, where they are right.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from loreg.algebra.edits import WeightedSum
from loreg.algebra.forms import Term, edit_of
from loreg.format import forms

DOUBLE = torch.float64
A = "default"  # the name of every adapter


def randomised(layer: nn.Module, train: bool = False) -> nn.Module:
    """The layer in float64, every parameter a random value of float32, so that products of two are exact."""
    layer.double().train(train)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    return layer


def inputs(layer: nn.Module) -> Tensor:
    if isinstance(layer, nn.Embedding):
        return torch.arange(layer.num_embeddings)[None]
    if isinstance(layer, nn.modules.conv._ConvNd):
        return torch.randn(2, layer.in_channels, *(9,) * (layer.weight.ndim - 2), dtype=DOUBLE)
    width = layer.weight.shape[0] if isinstance(layer, Conv1D) else layer.weight.shape[1]
    return torch.randn(3, width, dtype=DOUBLE)


def edited(base: nn.Module, delta: Tensor, x: Tensor) -> Tensor:
    """What ``base`` computes with its weight changed by ``delta``."""
    return torch.func.functional_call(base, {"weight": base.weight + delta}, (x,))


def edit(
    form: str, tensors: Mapping[str, Tensor], scale: float, out_in: tuple[int, int], **parameters: Any
) -> WeightedSum:
    """The form's sum, for tensors that its row accepts."""
    tensors = {role: tensor.detach() for role, tensor in tensors.items()}
    forms.check(form, {role: tuple(tensor.shape) for role, tensor in tensors.items()}, parameters, out_in, "m")

    def no_base() -> Tensor:
        raise AssertionError("the form reads the weight")

    return edit_of(form, Term(tensors, parameters, scale, out_in, no_base))


def dense(found: WeightedSum) -> Tensor:
    """The sum in float64."""
    return sum((term.dense() for term in (*found.low_rank, *found.dense)), torch.zeros((), dtype=DOUBLE))


def out_in(weight: Tensor) -> tuple[int, int]:
    return weight.shape[0], math.prod(weight.shape[1:])


def agree(found: Tensor, truth: Tensor) -> None:
    torch.testing.assert_close(found, truth, rtol=1e-11, atol=1e-11)


def check(
    base: nn.Module, layer: nn.Module, found: WeightedSum, merge: bool = True, transposed: bool = False
) -> None:
    """``layer``, around ``base``, computes what ``base`` does with the edit; its own merge too."""
    delta = dense(found).T if transposed else dense(found)
    delta = delta.reshape(base.weight.shape)
    x = inputs(base)
    computed = layer(x)
    assert not torch.allclose(computed, base(x))  # the adapter does something
    agree(edited(base, delta, x), computed)
    if merge:
        agree(layer.get_delta_weight(A), delta)
        W = base.weight.detach().clone()
        layer.merge()
        agree(base.weight, W + delta)
        layer.unmerge()
