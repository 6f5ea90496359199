"""Deltas as values: what one adapter adds to one stored weight.

A delta is a linear map, kept as its factors. Scaling and negating are exact or one IEEE operation; a sum is
a tuple of deltas, so nothing is folded and nothing rounds. Compatibility is checked once, when a value is
made; ``dense()`` is the slow truth that everything faster is tested against.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from loreg.algebra.rounding import STORAGE_DTYPES, finite, round_to
from loreg.errors import BadInput, Unsupported

FACTOR_DTYPES = (*STORAGE_DTYPES, torch.float64)
"""Dtypes that a factor or a dense delta may have; every value of each is a float64 value."""


def _check_values(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in FACTOR_DTYPES:
        raise Unsupported(
            f"the {name} of a delta has dtype {tensor.dtype}, expected one of "
            f"{', '.join(map(str, FACTOR_DTYPES))}: convert it first."
        )
    if not _all_finite(tensor):
        raise BadInput(f"the {name} of a delta holds NaN or infinity: the adapter is damaged or diverged.")


_INFINITY: Mapping[torch.dtype, tuple[torch.dtype, str, int]] = {
    torch.bfloat16: (torch.int16, "u2", 0x7F80),
    torch.float16: (torch.int16, "u2", 0x7C00),
    torch.float32: (torch.int32, "u4", 0x7F80_0000),
    torch.float64: (torch.int64, "u8", 0x7FF0_0000_0000_0000),
}
"""The words that values are, for torch and for numpy, and that of infinity, of which NaN is beyond."""

_BLOCK = 1 << 15
"""Words that are looked at together: they fit the first cache of a core."""


def _finite_here(tensor: Tensor) -> bool:
    """By the bits, on a CPU, and in this thread. torch would split each factor over its threads, and wait for them:
    where other programs have the cores, the 300 factors of an adapter then take ten times as long."""
    kind, word, infinity = _INFINITY[tensor.dtype]
    flat = tensor.mT if tensor.dim() > 1 and tensor.mT.is_contiguous() else tensor
    words = flat.detach().reshape(-1).view(kind).numpy().view(word)
    room = np.empty(min(_BLOCK, len(words)), word)
    for first in range(0, len(words), _BLOCK):
        block = words[first : first + _BLOCK]
        if np.left_shift(block, 1, out=room[: len(block)]).max() >= 2 * infinity:  # without the sign
            return False
    return True


def _all_finite(tensor: Tensor) -> bool:
    if tensor.dtype.itemsize == 1 or tensor.numel() == 0:
        return bool(finite(tensor).all())
    if tensor.device.type == "cpu":
        return _finite_here(tensor)
    # Ten times faster than a look at each element: NaN and infinity both show in the extremes.
    return all(math.isfinite(extreme) for extreme in torch.stack(torch.aminmax(tensor)).tolist())


def _check_scale(scale: float) -> None:
    if not math.isfinite(scale):
        raise BadInput(f"the scale of a delta is {scale}, expected a finite number.")


_T = TypeVar("_T", "LowRank", "Dense")


def _altered(delta: _T, **values: object) -> _T:
    """With other ``values`` that are as finite and fit as well: to look at them again would wait for the device."""
    other = copy(delta)
    for name, value in values.items():
        object.__setattr__(other, name, value)
    _check_scale(other.scale)
    return other


def _moved(x: Tensor, device: torch.device | str) -> Tensor:
    """On ``device``; one to which a copy from the host is under way is not waited for."""
    return x.to(device, non_blocking=x.device.type == "cpu")


@dataclass(frozen=True, slots=True, eq=False)
class LowRank:
    """``scale · left @ right``, in the orientation in which the weight is stored.

    ``left`` is (rows, r), ``right`` is (r, cols), r ≥ 1, both finite, on one device, each of a dtype in
    FACTOR_DTYPES; or (n, rows, r) and (n, r, cols), a stack of n such deltas for a weight of three dimensions.
    For a ``torch.nn.Linear`` left is LoRA's B and right its A; for a layer stored (in, out) the caller passes
    left = Aᵀ and right = Bᵀ. ``scale`` is one IEEE double.

    Raises BadInput for shapes that do not fit or values that are not finite, Unsupported for a dtype.
    """

    left: Tensor
    right: Tensor
    scale: float = 1.0

    def __post_init__(self) -> None:
        self._check_fit()
        _check_values("left factor", self.left)
        _check_values("right factor", self.right)

    @classmethod
    def of_sound(cls, left: Tensor, right: Tensor, scale: float) -> LowRank:
        """Of what a delta was made of before: to look at it again takes longer than to map it."""
        delta = object.__new__(cls)
        for name, value in (("left", left), ("right", right), ("scale", scale)):
            object.__setattr__(delta, name, value)
        return delta

    def _check_fit(self) -> None:
        left, right = tuple(self.left.shape), tuple(self.right.shape)
        fits = len(left) == len(right) in (2, 3) and left[-1] == right[-2] and left[:-2] == right[:-2]
        if not fits or 0 in left + right:
            raise BadInput(
                f"the factors of a delta have shapes {left} and {right}, expected (rows, r) and (r, cols), or a "
                f"stack of such, none of them zero."
            )
        if self.left.device != self.right.device:
            raise BadInput(f"the factors of a delta are on {self.left.device} and {self.right.device}.")
        _check_scale(self.scale)

    @property
    def shape(self) -> tuple[int, ...]:
        """(rows, cols), or (n, rows, cols), of the weight that this delta is for."""
        return *self.left.shape[:-1], self.right.shape[-1]

    @property
    def rank(self) -> int:
        """The inner dimension r: an upper bound of the rank of the product."""
        return self.left.shape[-1]

    @property
    def mT(self) -> LowRank:  # noqa: N802 - torch's name
        """The delta of the transposed weight, of each matrix of a stack."""
        return _altered(self, left=self.right.mT, right=self.left.mT)

    def __getitem__(self, index: int) -> LowRank:
        """One matrix of a stack."""
        return _altered(self, left=self.left[index], right=self.right[index])

    def scaled(self, weight: float) -> LowRank:
        """This delta times ``weight``: the new scale is one IEEE double product, weight·scale."""
        return _altered(self, scale=float(weight) * float(self.scale))

    def __neg__(self) -> LowRank:
        return _altered(self, scale=-self.scale)

    def to(self, device: torch.device | str) -> LowRank:
        """The same values on another device."""
        return _altered(self, left=_moved(self.left, device), right=_moved(self.right, device))

    def dense(self) -> Tensor:
        """(rows, cols), float64: the product in float64 arithmetic. The slow truth; not correctly rounded."""
        return self.scale * (self.left.double() @ self.right.double())


@dataclass(frozen=True, slots=True, eq=False)
class Dense:
    """``scale · value``: a delta with no structure, as of a bias. ``value`` has the weight's shape, and is finite.

    Raises BadInput for values that are not finite, Unsupported for a dtype outside FACTOR_DTYPES.
    """

    value: Tensor
    scale: float = 1.0

    def __post_init__(self) -> None:
        _check_values("value", self.value)
        _check_scale(self.scale)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight that this delta is for."""
        return tuple(self.value.shape)

    @property
    def mT(self) -> Dense:  # noqa: N802 - torch's name
        """The delta of the transposed weight, of each matrix of a stack."""
        return _altered(self, value=self.value.mT)

    def __getitem__(self, index: int) -> Dense:
        """One matrix of a stack."""
        return _altered(self, value=self.value[index])

    def reshape(self, shape: Sequence[int]) -> Dense:
        """The same elements, row-major, for a weight seen in another shape."""
        return _altered(self, value=self.value.reshape(tuple(shape)))

    def scaled(self, weight: float) -> Dense:
        """This delta times ``weight``: the new scale is one IEEE double product, weight·scale."""
        return _altered(self, scale=float(weight) * float(self.scale))

    def __neg__(self) -> Dense:
        return _altered(self, scale=-self.scale)

    def to(self, device: torch.device | str) -> Dense:
        """The same values on another device."""
        return _altered(self, value=_moved(self.value, device))

    def dense(self) -> Tensor:
        """``value``'s shape, float64: scale·value, each element rounded once to float64."""
        return self.scale * self.value.double()


def common_shape(deltas: Sequence[LowRank]) -> tuple[int, ...]:
    """The one shape that all ``deltas`` have; BadInput if there is none, or more than one."""
    shapes = sorted({delta.shape for delta in deltas})
    if len(shapes) != 1:
        found = "no delta" if not shapes else "shapes " + ", ".join(map(str, shapes))
        raise BadInput(f"deltas that are combined must be for one weight: expected one shape, found {found}.")
    return shapes[0]


def concatenate(deltas: Sequence[LowRank], dtype: torch.dtype) -> LowRank:
    """The sum of ``deltas`` as one pair of factors of ``dtype`` with scale 1: for serving and export.

    left = [c₁B₁ … cₖBₖ], right = [A₁; …; Aₖ]. This is the one place where a scale is folded into a factor,
    and it rounds: with u the unit roundoff of ``dtype`` (2⁻⁸ bfloat16, 2⁻¹¹ float16, 2⁻²⁴ float32, 2⁻⁵³
    float64), an element of left has relative error at most u + 2⁻⁵³(1 + u), one of right at most u (0 where
    ``dtype`` holds A's dtype). So, where nothing underflows, each element of the product is off by at most
    (2u + u² + 2⁻⁵²)·Σ|cᵢ||Bᵢ||Aᵢ|. Merging does not pass through here.

    Raises BadInput if shapes differ or a folded value exceeds ``dtype``, Unsupported for another dtype.
    """
    common_shape(deltas)
    if dtype not in FACTOR_DTYPES:
        raise Unsupported(f"factors cannot be stored as {dtype}: choose one of {FACTOR_DTYPES}.")
    left = torch.cat([delta.scale * delta.left.double() for delta in deltas], dim=-1)
    right = torch.cat([delta.right.double() for delta in deltas], dim=-2)
    if dtype != torch.float64:
        left, right = round_to(left, dtype), round_to(right, dtype)
    return LowRank(left, right)
