"""What the elementwise methods share: their input as a value, and the few operations they are made of.

Everything is ``loreg-f64-1``: IEEE operations on doubles, each rounded on its own, in an order that is stated. Two
things that look harmless break that and are avoided here. CUDA divides a tensor by a Python number as a product with
its reciprocal, so a divisor is always a tensor (:func:`divided`). ``sum`` of Python floats is compensated from
Python 3.12 on, so scalars are added one by one (:func:`in_order`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loreg.errors import BadInput, UsageError

BLOCK = 2**16
"""Elements that are worked on at once on the CPU: 512 KiB of float64, of which a handful stay in a core's cache."""

DEVICE_BLOCK = 2**22


@dataclass(frozen=True, slots=True, eq=False)
class Deltas:
    """The deltas of k ≥ 1 adapters for one weight, in canonical order: the order of the recipe's terms.

    ``values``: float64, finite, of one shape with one dimension or more, on one device; never written to. An adapter
    that leaves this weight alone enters as zeros, as it would in a library that merges whole checkpoints.
    ``weights``: finite, none of them zero. ``keys``: for each delta a number that seeds its random mask, taken
    modulo 2⁶⁴; equal keys give equal masks.

    Raises BadInput for tensors that do not fit together or hold NaN or infinity, UsageError for weights.
    """

    values: tuple[Tensor, ...]
    weights: tuple[float, ...]
    keys: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.values or not len(self.values) == len(self.weights) == len(self.keys):
            raise BadInput(
                f"a method needs one weight and one key for each delta and at least one delta, found "
                f"{len(self.values)} deltas, {len(self.weights)} weights and {len(self.keys)} keys."
            )
        shapes = sorted({tuple(value.shape) for value in self.values})
        if len(shapes) != 1 or not shapes[0]:
            raise BadInput(
                f"deltas that are combined must be for one weight: expected one shape of at least one dimension, "
                f"found {', '.join(map(str, shapes))}."
            )
        for what, found in (("dtype", {v.dtype for v in self.values}), ("device", {v.device for v in self.values})):
            if len(found) != 1 or (what == "dtype" and found != {torch.float64}):
                expected = "torch.float64" if what == "dtype" else "one"
                names = ", ".join(sorted(map(str, found)))
                raise BadInput(f"deltas that are combined have {what} {names}, expected {expected}.")
        for index, value in enumerate(self.values):
            if not bool(torch.isfinite(value).all()):
                raise BadInput(f"delta {index} holds NaN or infinity: the adapter is damaged or diverged.")
        for weight in self.weights:
            if not math.isfinite(weight) or weight == 0:
                raise UsageError(f"a delta has weight {weight}, expected a finite number other than 0.")
        if not math.isfinite(sum(map(abs, self.weights))):
            raise UsageError(f"the weights {self.weights} have no finite sum: expected smaller numbers.")
        object.__setattr__(self, "values", tuple(value.contiguous() for value in self.values))

    @property
    def shape(self) -> torch.Size:
        return self.values[0].shape

    @property
    def device(self) -> torch.device:
        return self.values[0].device

    def flat(self) -> tuple[Tensor, ...]:
        """Each delta as one row-major row."""
        return tuple(value.reshape(-1) for value in self.values)

    def rows(self) -> tuple[Tensor, ...]:
        """Each delta as a matrix: a vector is one row, and dimensions beyond the first are one."""
        shape = (1, -1) if len(self.shape) == 1 else (self.shape[0], -1)
        return tuple(value.reshape(shape) if value.numel() else value.new_zeros(0, 0) for value in self.values)

    def result(self) -> Tensor:
        """An uninitialised flat tensor for the result; ``view(shape)`` makes it one of the deltas' shape."""
        return torch.empty(self.shape.numel(), dtype=torch.float64, device=self.device)


Method = Callable[[Deltas, Mapping[str, Any]], Tensor]
"""A method: the deltas, and the parameters that ``loreg.format.methods`` lists for it, to a float64 tensor of the
deltas' shape that is to be *added* to the weight."""


def blocks(count: int, device: torch.device, width: int = 1) -> Iterator[slice]:
    """Ranges that cover 0 … count, things of ``width`` elements each, of a size that is quick to work on.

    Where a range ends changes no result.
    """
    size = max(1, (BLOCK if device.type == "cpu" else DEVICE_BLOCK) // max(1, width))
    return (slice(first, min(first + size, count)) for first in range(0, count, size))


def divided(x: Tensor, divisor: float) -> Tensor:
    """fl(x / divisor) for each element, on every device."""
    return x / torch.tensor(divisor, dtype=torch.float64, device=x.device)


def in_order(numbers: Iterable[float]) -> float:
    """The sum from 0 on, left to right, each addition rounded to a double."""
    result = 0.0
    for number in numbers:
        result += number
    return result


def added(parts: Sequence[Tensor]) -> Tensor:
    """Elementwise sum of at least one tensor, left to right, each addition rounded."""
    result = parts[0].clone()
    for part in parts[1:]:
        result += part
    return result


def combination(deltas: Deltas, coefficients: Sequence[float]) -> Tensor:
    """Σᵢ fl(cᵢ·Δᵢ), left to right, each addition rounded. A coefficient of 0 removes its term.

    Raises BadInput if a coefficient is not finite: the deltas are too large for a norm.
    """
    if not all(map(math.isfinite, coefficients)):
        raise BadInput("the norm of a delta is beyond the range of float64: the adapter is damaged or diverged.")
    kept = [(value, c) for value, c in zip(deltas.flat(), coefficients, strict=True) if c != 0]
    out = deltas.result()
    if not kept:
        return out.zero_().view(deltas.shape)
    for block in blocks(out.numel(), out.device):
        out[block] = added([value[block] * c for value, c in kept])
    return out.view(deltas.shape)
