"""What the methods in factor space share: their input, checked once, and the way a result leaves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from loreg.algebra.delta import LowRank, common_shape
from loreg.algebra.truncate import Truncated, check_limits, stacked, truncate_product
from loreg.errors import UsageError

Adapters = Sequence[tuple[float, tuple[LowRank, ...]]]
"""(weight, terms) for each adapter; the adapter's delta is the sum of its terms, zero if it has none."""

Keys = Sequence[int] | None
"""For each adapter a number that seeds its random masks; None means its index."""


@dataclass(frozen=True, slots=True, eq=False)
class Combined:
    """What a method makes of adapters: ``terms``, whose sum is the combined delta.

    ``norm``: ‖·‖ of what the method makes without ``rank`` and ``energy``; None if that is what the terms are.
    ``lost``: ‖·‖ of what these cut off. Both in the Frobenius norm, float64.
    """

    terms: tuple[LowRank, ...]
    norm: float | None = None
    lost: float = 0.0

    @classmethod
    def of(cls, found: Truncated) -> Combined:
        return cls((found.delta,), found.norm, found.lost)


class FactorMethod(Protocol):
    """A method: the adapters, the parameters that ``loreg.format.methods`` lists for it, and keys, to a delta."""

    def __call__(self, adapters: Adapters, parameters: Mapping[str, Any], keys: Keys = None) -> Combined: ...


@dataclass(frozen=True, slots=True, eq=False)
class Stack:
    """One adapter's terms side by side: its delta is left @ right, left (m, r) with scales folded in, right (r, n).

    float64; r is 0 for an adapter that leaves the weight alone. ``place``: its columns among all adapters'.
    ``index``: which of the adapters that were given it is.
    """

    weight: float
    index: int
    left: Tensor
    right: Tensor
    place: slice


@dataclass(frozen=True, slots=True, eq=False)
class Stacks:
    """The adapters of weight other than 0, in their order, and all their factors: left (m, R), right (R, n)."""

    each: tuple[Stack, ...]
    left: Tensor
    right: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.left.shape[0], self.right.shape[1]

    def weighted(self) -> Tensor:
        """``left`` with each adapter's columns times its weight: weighted() @ right is the weighted sum."""
        weights = [stack.weight for stack in self.each for _ in range(stack.left.shape[1])]
        return self.left * torch.tensor(weights, dtype=torch.float64, device=self.left.device)

    def zero(self) -> Combined:
        """The zero delta, of rank 1."""
        return Combined((LowRank(torch.zeros_like(self.left[:, :1]), torch.zeros_like(self.right[:1])),))


def present(adapters: Adapters) -> list[int]:
    """The indices of the adapters whose weight is not 0. Raises UsageError for a weight that is not finite."""
    for weight, _ in adapters:
        if not math.isfinite(weight):
            raise UsageError(f"an adapter has weight {weight}, expected a finite number.")
    return [index for index, (weight, _) in enumerate(adapters) if weight != 0]


def check(adapters: Adapters, parameters: Mapping[str, Any]) -> Stacks:
    """Raises what the package says of adapters, ``rank`` and ``energy`` that do not make sense."""
    indices = present(adapters)
    terms = [adapters[index][1] for index in indices]
    every = [term for each in terms for term in each]
    check_limits(common_shape(every), parameters.get("rank"), parameters.get("energy"))
    left, right = stacked(every)
    stacks, first = [], 0
    for index, each in zip(indices, terms, strict=True):
        place = slice(first, first + sum(term.rank for term in each))
        stacks.append(Stack(adapters[index][0], index, left[:, place], right[place], place))
        first = place.stop
    return Stacks(tuple(stacks), left, right)


def truncated(left: Tensor, right: Tensor, parameters: Mapping[str, Any]) -> Combined:
    """left @ right as one delta of balanced factors, truncated to ``rank`` and ``energy`` if they are given."""
    rank, energy = parameters.get("rank"), parameters.get("energy")
    if rank is None and energy is None:
        rank = min(left.shape[0], right.shape[1])
    return Combined.of(truncate_product(left, right, rank, energy))
