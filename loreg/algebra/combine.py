"""Several adapters' deltas for one weight made one: a function per method, all of one signature.

Each takes ``terms``, pairs of (weight, delta). ``linear`` is exact and gives the terms of the sum; what is not exact
gives a :class:`Combined`, which says by how much it is off.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from loreg.algebra.delta import LowRank, common_shape
from loreg.algebra.truncate import truncate

Terms = Sequence[tuple[float, LowRank]]
"""(weight, delta) pairs for one weight of the model; at least one."""


@dataclass(frozen=True, slots=True, eq=False)
class Combined:
    """Deltas whose sum is the result, ‖result - Σ w·Δ‖ / ‖Σ w·Δ‖ and ‖Σ w·Δ‖, in the Frobenius norm."""

    low_rank: tuple[LowRank, ...]
    relative_error: float
    norm: float


def linear(terms: Terms) -> tuple[LowRank, ...]:
    """Σ w·Δ as a tuple of deltas: the sum *is* the concatenation of ranks, so nothing folds and nothing rounds
    but each scale, one IEEE double product. Raises BadInput if there are no terms or shapes differ."""
    common_shape([delta for _, delta in terms])
    return tuple(delta.scaled(weight) for weight, delta in terms)


def svd(terms: Terms, rank: int | None = None, energy: float | None = None) -> Combined:
    """Σ w·Δ truncated to ``rank``, or to what holds ``energy`` of its square norm: see
    :func:`~loreg.algebra.truncate.truncate`. One delta of float64 factors; the error is the truncation's."""
    result = truncate(linear(terms), rank=rank, energy=energy)
    return Combined((result.delta,), result.relative_error, float(torch.linalg.vector_norm(result.singular_values)))
