"""What a merge must be, from PEFT's own live modules and from rational numbers. Nothing of loreg is used here."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from peft.tuners.lora import LoraLayer

# Significant bits (with the hidden one) and the exponent of the smallest normal number.
_FORMATS = {torch.bfloat16: (8, -126), torch.float16: (11, -14), torch.float32: (24, -126)}


@dataclass(frozen=True)
class Term:
    """One low-rank term of a stored weight, in its stored orientation: scale · left @ right, all as floats."""

    left: torch.Tensor
    right: torch.Tensor
    scale: float


@dataclass(frozen=True)
class Truth:
    """A tensor of the merged model before rounding: ``start`` + Σ terms + Σ biases; ``sum`` is that in float64."""

    start: torch.Tensor
    terms: tuple[Term, ...]
    biases: tuple[tuple[float, torch.Tensor], ...]
    sum: torch.Tensor

    def exact(self, index: tuple[int, ...]) -> Fraction:
        total = Fraction(self.start[index].item())
        for term in self.terms:
            row, column = term.left[index[0]].tolist(), term.right[:, index[1]].tolist()
            total += Fraction(term.scale) * sum(Fraction(a) * Fraction(b) for a, b in zip(row, column, strict=True))
        for scale, value in self.biases:
            total += Fraction(scale) * Fraction(value[index].item())
        return total


def truths(
    model: Any, weights: Mapping[str, float], in_file: Callable[[str], str] = lambda name: name
) -> dict[str, Truth]:
    """Tensor of the checkpoint → its truth, from a float64 PEFT model with the adapters of ``weights`` loaded.

    The start is what PEFT's live model holds, so that replaced biases and saved modules are in it; the delta is
    its own ``get_delta_weight``.
    """
    wide = model.get_base_model()
    result: dict[str, Truth] = {}
    layers = dict(wide.named_modules())
    for key, value in wide.state_dict().items():
        if "lora_" in key or ".original_module." in key:
            continue
        path = key.rpartition(".")[0].removesuffix(".base_layer")
        name = in_file(re.sub(r"\.base_layer|\.modules_to_save\.[^.]+", "", key))
        layer = layers.get(path)
        terms, biases, total = (), (), value
        if isinstance(layer, LoraLayer):
            active = [adapter for adapter in weights if adapter in layer.scaling]
            if key.endswith(".weight"):
                terms = tuple(_term(layer, adapter, weights[adapter]) for adapter in active)
                for adapter in active:
                    total = total + weights[adapter] * layer.get_delta_weight(adapter)
            elif key.endswith(".bias"):
                biases = tuple(
                    (weights[adapter] * layer.scaling[adapter], layer.lora_B[adapter].bias.detach())
                    for adapter in active
                    if layer.lora_bias[adapter]
                )
                for scale, bias in biases:
                    total = total + scale * bias
        result[name] = Truth(value, terms, biases, total.detach())
    return result


def _term(layer: Any, adapter: str, weight: float) -> Term:
    scale = weight * layer.scaling[adapter]
    if adapter in layer.lora_embedding_A:
        A, B = layer.lora_embedding_A[adapter].detach(), layer.lora_embedding_B[adapter].detach()
        return Term(A.T, B.T, scale)
    A, B = layer.lora_A[adapter].weight.detach(), layer.lora_B[adapter].weight.detach()
    return Term(A.T, B.T, scale) if layer.fan_in_fan_out else Term(B, A, scale)


def quantum(values: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """float64: the spacing of ``dtype`` at each of ``values`` (float64)."""
    precision, smallest = _FORMATS[dtype]
    exponent = np.frexp(values)[1] - 1
    return np.ldexp(1.0, np.maximum(exponent, smallest) - precision + 1)


def rounded(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``values`` (float64) to ``dtype``, to nearest, ties to even, in one step.

    Scaling by a power of two is exact, ``rint`` is to nearest and even, and every result is a value of ``dtype``:
    the conversion at the end cannot round.
    """
    step = quantum(values.numpy(), dtype)
    nearest = torch.from_numpy(np.rint(values.numpy() / step) * step)
    converted = nearest.to(dtype)
    assert torch.equal(converted.double(), nearest)
    return converted


def rounded_exactly(value: Fraction, dtype: torch.dtype) -> float:
    """The same for one rational number; Python rounds a Fraction to nearest, ties to even."""
    if value == 0:
        return 0.0
    precision, smallest = _FORMATS[dtype]
    exponent = math.frexp(float(value))[1] - 1
    while Fraction(2) ** exponent > abs(value):
        exponent -= 1
    while Fraction(2) ** (exponent + 1) <= abs(value):
        exponent += 1
    step = Fraction(2) ** (max(exponent, smallest) - precision + 1)
    return float(round(value / step) * step)


def distance_to_boundary(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """How far each of ``values`` (float64) is from the nearest midpoint of ``dtype``, relative to itself."""
    array = values.numpy()
    step = quantum(array, dtype)
    part = array / step
    away = np.abs(part - np.floor(part) - 0.5) * step
    return torch.from_numpy(away / np.maximum(np.abs(array), np.finfo(np.float64).tiny))
