"""What a form is given: one term of an adapter for one weight, and how its tensors are looked at."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

EXPANSION = 4
"""A form that is exact only with more columns than the adapter's rank keeps to that up to EXPANSION·min(out, in)
of them, and computes a dense delta beyond [F5]. ``loreg.format.forms`` states the same rule for recipes."""


@dataclass(frozen=True, slots=True, eq=False)
class Term:
    """One term of an adapter, for one weight in module orientation.

    ``tensors``: by role, as stored, finite, on one device. ``parameters``: JSON values that ``loreg.format.forms``
    has checked, as it has the shapes. ``scale``: one IEEE double, what each form multiplies its product by.
    ``shape``: (out, in) of the weight, or of each of a stack; a convolution's is (out, in/groups·Πk), flattened,
    that of an embedding of V words of d numbers (d, V), a bias' (n, 1). ``base`` brings the weight itself, a view
    of that shape in its storage dtype, on the tensors' device; only forms that read it call it.
    """

    tensors: Mapping[str, Tensor]
    parameters: Mapping[str, Any]
    scale: float
    shape: tuple[int, int]
    base: Callable[[], Tensor]

    def matrix(self, role: str) -> Tensor:
        """A tensor as a matrix: every dimension after the first is one."""
        tensor = self.tensors[role]
        return tensor.reshape(tensor.shape[0], -1)


def is_worthwhile(rank: int, shape: tuple[int, int]) -> bool:
    """Whether an exact expansion to ``rank`` is kept for a weight of ``shape``, or a dense delta computed."""
    return rank <= EXPANSION * min(shape)
