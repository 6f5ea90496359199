"""The second and third stage of an edit: what one rounding left in doubt is decided, by a bound or exactly."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from loreg.algebra.delta import Dense, LowRank
from loreg.algebra.exact import Doubles, exact_sum
from loreg.algebra.passes import Candidates, as_rows
from loreg.algebra.rounding import bits, finite, round_to
from loreg.errors import BadInput

_FEW = 256
"""Candidates that are all decided exactly: to look at their bounds first would take longer."""
_EXACT_TERMS = 2**18  # doubles that one batch of the exact stage expands to


class Terms(Protocol):
    """What is added to a weight."""

    @property
    def low_rank(self) -> tuple[LowRank, ...]: ...

    @property
    def dense(self) -> tuple[Dense, ...]: ...


class Deciding:
    """The correctly rounded values of single elements of W + ``terms``, W of ``shape``, in ``dtype``.

    Their float64 approximations are within eta·(|near| + 2·spread).
    """

    def __init__(self, terms: Terms, shape: tuple[int, ...], dtype: torch.dtype, eta: float, spread: float) -> None:
        self._terms, self._shape, self._dtype, self._eta, self._spread = terms, shape, dtype, eta, spread

    def values(self, found: Candidates) -> Tensor:
        """Of ``dtype``, in the order of ``found``: those that the bound decides, and the rest exactly.

        Raises BadInput naming an element that is NaN or infinite, or rounds beyond the largest finite value.
        """
        near = found.near
        if near.numel() <= _FEW:
            values = torch.empty(near.shape, dtype=self._dtype, device=near.device)
            index = torch.arange(near.numel(), device=near.device)
        else:
            # 2^-51 and the third ηS pay for the rounding of the two ends themselves.
            margin = (self._eta + 2.0**-51) * near.abs() + 3 * self._eta * self._spread
            values, other = (round_to(near + side, self._dtype) for side in (-margin, margin))
            open_ = (bits(values) != bits(other)) | ~finite(values) | (near == 0)
            index = open_.nonzero()[:, 0]
        rank = sum(term.left.shape[1] for term in self._terms.low_rank)
        step = max(1, _EXACT_TERMS // (2 + 2 * len(self._terms.dense) + 4 * rank))
        for start in range(0, index.numel(), step):
            batch = index[start : start + step]
            values[batch] = self._exact(Candidates(*(x[batch] for x in found)))
        return values

    def _exact(self, found: Candidates) -> Tensor:
        """On the CPU, from exact sums; the terms may be on another device than ``found``."""
        rows, columns, _, W = found
        weight = W.double().cpu()
        self._refuse(~weight.isfinite(), found, "is NaN or infinite in W")
        dense = [
            (x.scale, _doubles(as_rows(x.value)[rows.to(x.value.device), columns.to(x.value.device)]))
            for x in self._terms.dense
        ]
        low_rank = [
            (x.scale, _doubles(x.left[rows.to(x.left.device)].T), _doubles(x.right[:, columns.to(x.right.device)]))
            for x in self._terms.low_rank
        ]
        odd = torch.from_numpy(exact_sum(weight.numpy(), dense, low_rank))
        signed = torch.where(odd != 0, odd, torch.where(weight == 0, weight, 0.0))
        values = round_to(signed, self._dtype)
        self._refuse(~finite(values), found, f"exceeds the largest finite {self._dtype}")
        return values.to(W.device)

    def _refuse(self, wrong: Tensor, found: Candidates, what: str) -> None:
        for j in wrong.nonzero()[:1, 0].tolist():
            element = [int(found.rows[j]), int(found.columns[j])][: len(self._shape)]
            raise BadInput(f"element {element} {what}: the merge is refused rather than written wrong.")


def _doubles(x: Tensor) -> Doubles:
    """A copy on the CPU, in float64 and row-major, for NumPy."""
    copy: Doubles = x.double().cpu().contiguous().numpy()
    return copy
