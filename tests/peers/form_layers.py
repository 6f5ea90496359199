"""Layers of other libraries around one float64 module, for the tests of forms: what they compute is the truth."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from loreg.algebra.densify import dense_delta
from loreg.algebra.forms import Term, edit_of
from loreg.format import forms as rows

LAYERS: Mapping[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(6, 8),
    "Conv1D": lambda: Conv1D(8, 6),
    "conv1d": lambda: nn.Conv1d(6, 8, 3, padding=1),
    "conv2d": lambda: nn.Conv2d(6, 8, 3, stride=2, padding=1, dilation=1),
    "conv2d_1x1": lambda: nn.Conv2d(6, 8, 1, padding=1),
    "conv2d_groups": lambda: nn.Conv2d(6, 8, (3, 2), groups=2),
    "conv3d": lambda: nn.Conv3d(6, 8, 2),
    "embedding": lambda: nn.Embedding(6, 8),
}


def layer(kind: str) -> nn.Module:
    """A module of float64 numbers that differ at each call."""
    module = LAYERS[kind]().double().requires_grad_(False)
    fill(module)
    return module


def fill(module: nn.Module, names: str = "", spread: float = 1.0, about: float = 0.0) -> None:
    """Random numbers in the parameters with ``names`` in theirs."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if names in name:
                parameter.copy_(about + spread * torch.randn_like(parameter))


def inputs(module: nn.Module) -> Tensor:
    if isinstance(module, nn.Embedding):
        return torch.arange(module.num_embeddings)
    if isinstance(module, nn.Linear | Conv1D):
        return torch.randn(5, 6).double()
    return torch.randn(2, 6, *(5,) * (module.weight.ndim - 2)).double()  # type: ignore[union-attr,operator]


def wrapped(module: nn.Module, config: Any) -> Any:
    """PEFT's layer around a copy of ``module``, in float64."""
    return get_peft_model(nn.Sequential(deepcopy(module)), config).double().base_model.model[0]


def as_matrix(module: nn.Module) -> Tensor:
    """The weight in module orientation, as a view."""
    weight = module.weight.data
    return weight.T if isinstance(module, Conv1D | nn.Embedding) else weight.flatten(1)  # type: ignore[operator]


def edited(
    W: Tensor, form: str, tensors: Mapping[str, Tensor], parameters: Mapping[str, Any], scale: float = 1.0
) -> Tensor:
    """W and the form's sum in float64, the term having passed the checks of the format."""
    tensors = {role: tensor.detach() for role, tensor in tensors.items()}
    out_in = W.shape if W.ndim == 2 else (len(W), 1)
    rows.check(form, {role: tuple(x.shape) for role, x in tensors.items()}, parameters, tuple(out_in), "test")
    return W + dense_delta(edit_of(form, Term(tensors, parameters, scale, tuple(W.shape), lambda: W)))


def with_weight(module: nn.Module, matrix: Tensor, bias: Tensor | None = None) -> nn.Module:
    """A copy of ``module`` with the weight ``matrix``, in module orientation, and a bias if it is given."""
    module = deepcopy(module)
    as_matrix(module).copy_(matrix)
    if bias is not None:
        module.bias.data = bias
    return module


def difference(x: Tensor, y: Tensor) -> float:
    """The largest difference, relative to the largest magnitude; 0 where both are nothing but zeros."""
    assert x.shape == y.shape
    x, y = x.detach(), y.detach()
    return float((x - y).abs().max() / x.abs().max().clamp(min=1e-300))


def same(x: Tensor, y: Tensor, within: float = 1e-13) -> bool:
    return difference(x, y) <= within
