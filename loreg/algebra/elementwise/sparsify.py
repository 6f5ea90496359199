"""Which elements of a delta are kept [C4], and by what the kept ones grow.

A choice by magnitude is exact: it is made among the doubles themselves, in the order *larger magnitude first, then
lower index in row-major order*, so that elements of equal magnitude at the threshold are kept from the lowest index
on. (mergekit and PEFT leave those to torch's sort, which promises nothing, and mergekit compares in float32 on a
CPU.) Counts are integers, so no order of summation enters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loreg.algebra.elementwise.deltas import Deltas, blocks, divided
from loreg.algebra.elementwise.masks import uniform
from loreg.algebra.ordered import total

_MAGNITUDE = 2**63 - 1  # all bits of a double but the sign; as integers they are in the order of magnitudes
_DIGIT = 16


def largest(x: Tensor, count: int) -> Tensor:
    """bool, the shape of ``x``: the ``count`` elements of ``x`` (1-D, float64, no NaN) of largest magnitude.

    Of those that equal the least kept one, the first. Digit by digit from the top, on the bits: each round counts
    how often each digit occurs and goes on with those that share the threshold's. Needs twice the size of ``x``.
    """
    if count <= 0 or count >= x.numel():
        return torch.full_like(x, count > 0, dtype=torch.bool)
    keys = x.view(torch.int64) & _MAGNITUDE
    rest, missing, threshold = keys, count, 0
    for shift in range(64 - _DIGIT, -1, -_DIGIT):
        digits = (rest >> shift).bitwise_and_(2**_DIGIT - 1)
        counts = torch.bincount(digits, minlength=2**_DIGIT)
        at_least = counts.flip(0).cumsum(0)
        place = int((at_least < missing).sum())
        missing -= int(at_least[place - 1]) if place else 0
        digit = 2**_DIGIT - 1 - place
        threshold = threshold << _DIGIT | digit
        if counts[digit] < rest.numel():  # a delta of zeros alone would else be copied four times
            rest = rest[digits == digit]
    kept = keys > threshold
    if missing == rest.numel():
        return kept.logical_or_(keys == threshold)
    kept[(keys == threshold).nonzero()[:missing, 0]] = True
    return kept


@dataclass(frozen=True, slots=True, eq=False)
class Thinned:
    """A sparsified delta: ``value`` (flat) where ``kept`` (None: everywhere), times ``factor``, else +0."""

    value: Tensor
    kept: Tensor | None = None
    factor: float = 1.0

    def block(self, block: slice) -> Tensor:
        """A new tensor with the elements of ``block``; each is the delta's own, or fl(Δ·factor)."""
        x = self.value[block]
        if self.kept is None:
            return x.clone()
        x = torch.where(self.kept[block], x, 0.0)
        return x if self.factor == 1 else x.mul_(self.factor)

    def rescaled(self) -> Thinned:
        """With the factor fl(fl(Σ|Δ|) / fl(Σ over the kept of |Δ|)), sums folded (``ordered.total``), so that the
        sum of magnitudes is what it was. A delta of which nothing or only zeros are kept stays as it is."""
        if self.kept is None:
            return self
        before = float(total(self.value.abs(), 0))
        after = float(total(torch.where(self.kept, self.value, 0.0).abs_(), 0))
        return Thinned(self.value, self.kept, before / after) if after > 0 else self


Sparsifier = Callable[[Deltas, int, Mapping[str, Any]], Thinned]
"""(deltas, which of them, parameters) → that one, sparsified. ``density`` 1 keeps all."""


def magnitude(deltas: Deltas, index: int, parameters: Mapping[str, Any], at_least: int = 1) -> Thinned:
    """The ``max(at_least, ⌊density·n⌋)`` largest of n elements (one IEEE product), see :func:`largest`."""
    x, density = deltas.flat()[index], parameters["density"]
    if density >= 1:
        return Thinned(x)
    return Thinned(x, largest(x, max(at_least, int(density * x.numel()))))


def outliers(deltas: Deltas, index: int, parameters: Mapping[str, Any]) -> Thinned:
    """Without the largest ⌊gamma·n⌋ of n elements, and without the smallest, so that ⌊density·n⌋ stay.

    Where density leaves fewer than that to be dropped, only so many of the largest go. (Davari & Belilovsky, "Model
    breadcrumbs", 2023.)
    """
    x, density = deltas.flat()[index], parameters["density"]
    if density >= 1:
        return Thinned(x)
    target = int(density * x.numel())
    top = min(int(parameters["gamma"] * x.numel()), x.numel() - target)
    return Thinned(x, largest(x, top + target).logical_and_(largest(x, top).logical_not_()))


def random(deltas: Deltas, index: int, parameters: Mapping[str, Any]) -> Thinned:
    """Element i is kept if u(key, i) < density, u of :func:`~loreg.algebra.elementwise.masks.uniform`."""
    x, density, key = deltas.flat()[index], parameters["density"], deltas.keys[index]
    if density >= 1:
        return Thinned(x)
    kept = torch.empty_like(x, dtype=torch.bool)
    for block in blocks(x.numel(), x.device):
        kept[block] = uniform(key, block.start, block.stop - block.start, x.device) < density
    return Thinned(x, kept)


def by_rank(deltas: Deltas, index: int, parameters: Mapping[str, Any]) -> Thinned:
    """As ``random``, but with a probability that grows with an element's rank of magnitude in its row.

    p = fl(fl(density - ε) + fl(fl(fl(rank / (n - 1))·2)·ε)), ε = ``epsilon``, the rank from 0 for the last in the
    order of this module to n - 1 for the first of n columns; density where n = 1, for which mergekit has no answer.
    (Deep et al., "DELLA-Merging", 2024.)
    """
    x, density, epsilon = deltas.rows()[index], parameters["density"], parameters["epsilon"]
    if density >= 1:
        return Thinned(deltas.flat()[index])
    kept = torch.empty_like(x, dtype=torch.bool)
    columns = x.shape[1]
    steps = torch.arange(columns - 1, -1, -1, dtype=torch.float64, device=x.device)
    probability = divided(steps, columns - 1).mul_(2).mul_(epsilon).add_(density - epsilon)
    if columns == 1:
        probability.fill_(density)
    for block in blocks(x.shape[0], x.device, columns):
        order = x[block].abs().sort(dim=1, descending=True, stable=True).indices
        chance = torch.empty_like(x[block]).scatter_(1, order, probability.expand(order.shape))
        draw = uniform(deltas.keys[index], block.start * columns, chance.numel(), x.device)
        kept[block] = draw.view_as(chance) < chance
    return Thinned(deltas.flat()[index], kept.view(-1))
