"""Sums of sparsified deltas [C5], with or without an election of signs: PEFT's definitions and mergekit's.

They share names and differ in substance. PEFT elects signs *before* it weighs and divides by the *number* of
deltas that agree; mergekit elects after it has weighed and divides, if at all, by the sum of their *weights*. PEFT
makes up for what DARE drops by dividing by the density; mergekit, by default, restores the sum of magnitudes.

An absolute threshold of mergekit on the size of a tensor (rescaling only above 1e-7, say) is a test for zero here,
so that deltas twice the size give a result twice the size. What is added runs over deltas in their order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from loreg.algebra.elementwise.deltas import Deltas, added, blocks, divided, in_order
from loreg.algebra.elementwise.sparsify import Sparsifier, Thinned, magnitude

_NO_WEIGHT = 1e-8
"""A sum of weights below this divides nothing: the weights are meant to cancel, as 0.1 + 0.2 - 0.3 does not."""


def _positive(parts: Sequence[Tensor], by_count: bool) -> Tensor:
    """bool: where the elected sign is +, which it is unless the sum (or of signs, the count) is below zero."""
    return added([part.sign() for part in parts] if by_count else parts) >= 0


def agreeing(part: Tensor, positive: Tensor) -> Tensor:
    """bool: where ``part`` has the elected sign; a zero never has."""
    return torch.where(positive, part > 0, part < 0)


def peft(
    deltas: Deltas,
    parameters: Mapping[str, Any],
    *,
    sparsifier: Sparsifier,
    rescale: bool = False,
    elect: bool = False,
) -> Tensor:
    """PEFT's ``magnitude_prune``, ``dare_linear``, ``ties`` and ``dare_ties`` (peft/utils/merge_utils.py), on ΔW as
    its ``*_svd`` combination types apply them.

    Per element, with x the kept part of Δ (``rescale``: fl(x / density)): Σ fl(x·w); with ``elect`` only over those
    whose x has the sign of Σ x (``majority_sign`` "total") or of Σ sign(x) ("frequency"), a zero sum counting as +,
    divided by their number. (PEFT first rounds the weights to float32; that is not done here.)
    """
    thinned = [sparsifier(deltas, index, parameters) for index in range(len(deltas.values))]
    rescale = rescale and parameters["density"] < 1
    out = deltas.result()
    for block in blocks(out.numel(), out.device):
        parts = [each.block(block) for each in thinned]
        if rescale:
            parts = [divided(part, parameters["density"]) for part in parts]
        if not elect:
            out[block] = added([part.mul_(weight) for part, weight in zip(parts, deltas.weights, strict=True)])
            continue
        positive = _positive(parts, parameters["majority_sign"] == "frequency")
        mixed, count = torch.zeros_like(parts[0]), torch.zeros_like(parts[0])
        for part, weight in zip(parts, deltas.weights, strict=True):
            agree = agreeing(part, positive)
            mixed += torch.where(agree, part, 0.0).mul_(weight)
            count += agree
        torch.div(mixed, count.clamp_(min=1), out=out[block])
    return out.view(deltas.shape)


def peft_magnitude(deltas: Deltas, index: int, parameters: Mapping[str, Any]) -> Thinned:
    """As :func:`~loreg.algebra.elementwise.sparsify.magnitude`; a density that allows no element keeps none."""
    return magnitude(deltas, index, parameters, at_least=0)


def mergekit(
    deltas: Deltas, parameters: Mapping[str, Any], *, sparsifier: Sparsifier | None = None, elect: bool = False
) -> Tensor:
    """mergekit's generalised task arithmetic (mergekit/merge_methods/generalized_task_arithmetic.py): of
    ``task_arithmetic``, ``ties``, ``dare_*``, ``della*`` and ``breadcrumbs*``.

    Per element, with y = fl(x·w) and x the kept part of Δ (``rescale``: times the factor of
    :meth:`~loreg.algebra.elementwise.sparsify.Thinned.rescaled`): m = Σ y; with ``elect`` only over those that have
    the sign of Σ y (``consensus`` "sum") or of Σ sign(y) ("count"), a zero sum counting as +. ``normalize`` divides
    by the sum of the same weights, where it is 1e-8 or more in magnitude. ``lambda`` multiplies, if it is not 1.

    Mind that ``normalize`` cancels the sign and size of a single adapter's weight: -1·Δ becomes Δ.
    """
    thinned = [Thinned(value) for value in deltas.flat()]
    if sparsifier:
        thinned = [sparsifier(deltas, index, parameters) for index in range(len(deltas.values))]
        if parameters["rescale"]:
            thinned = [each.rescaled() for each in thinned]
    out = deltas.result()
    for block in blocks(out.numel(), out.device):
        parts = [each.block(block).mul_(weight) for each, weight in zip(thinned, deltas.weights, strict=True)]
        mixed, divisor = _elected(parts, deltas.weights, parameters["consensus"]) if elect else (added(parts), None)
        if parameters["normalize"]:
            if divisor is None:
                divisor = torch.tensor(in_order(deltas.weights), dtype=torch.float64, device=out.device)
            mixed /= torch.where(divisor.abs() < _NO_WEIGHT, 1.0, divisor)
        out[block] = mixed if parameters["lambda"] == 1 else mixed.mul_(parameters["lambda"])
    return out.view(deltas.shape)


def _elected(parts: Sequence[Tensor], weights: Sequence[float], consensus: str) -> tuple[Tensor, Tensor]:
    """The sum of the parts that agree with the elected sign, and of their weights."""
    positive = _positive(parts, consensus == "count")
    mixed, divisor = torch.zeros_like(parts[0]), torch.zeros_like(parts[0])
    for part, weight in zip(parts, weights, strict=True):
        agree = agreeing(part, positive)
        mixed += torch.where(agree, part, 0.0)
        divisor += agree.double().mul_(weight)
    return mixed, divisor
