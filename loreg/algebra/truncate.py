"""Truncation: the one lossy function of the algebra, and it returns what it threw away."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loreg.algebra.delta import LowRank, common_shape
from loreg.errors import UsageError


@dataclass(frozen=True, slots=True, eq=False)
class Truncated:
    """The best approximation of a sum of deltas by a delta of some rank.

    ``delta``: float64 factors left = U·√σ and right = √σ·Vᵀ, scale 1. Balanced, so that neither factor is
    pushed to the edge of a 16-bit range when it is stored. ``singular_values``: all of the sum's,
    float64, descending. ``relative_error``: ‖sum - delta‖ / ‖sum‖ in the Frobenius norm, 0 for a zero sum.
    """

    delta: LowRank
    singular_values: Tensor
    relative_error: float


def _rank_for(energy: float, sigma: Tensor) -> int:
    """The least rank whose singular values hold ``energy`` of the sum of squares; at least 1."""
    kept = sigma.square().cumsum(0)
    return min(1 + int((kept < energy * kept[-1]).sum()), sigma.numel())


def truncate(deltas: Sequence[LowRank], rank: int | None = None, energy: float | None = None) -> Truncated:
    """The sum Σ c·B·A of ``deltas`` (one shape (m, n), ranks adding up to R), truncated by its SVD.

    ``rank`` (1 … min(m, n)) bounds the rank; ``energy`` in (0, 1] asks for the least rank that keeps that
    share of ‖sum‖²; given both, the smaller rank holds. The result's rank is at most R, as the sum's is.
    Optimal in every unitarily invariant norm (Eckart & Young 1936, Mirsky 1960).

    Never forms the (m, n) matrix: B = Q₁R₁ and Aᵀ = Q₂R₂ of the stacked factors, then the SVD of R₁R₂ᵀ, of
    order R at most: O((m + n)R² + R³). In float64 on the factors' device; backward stable, so the error of a
    singular value is about 2⁻⁵³ of Σ‖cB‖‖A‖, which is all that is left where terms cancel. Signs are fixed:
    the first largest entry of each left vector is positive. Deterministic on one machine; the last bits may
    differ between LAPACK builds.

    Raises UsageError for a rank or energy out of range or neither, BadInput if shapes differ.
    """
    limit = min(common_shape(deltas))
    if rank is None and energy is None:
        raise UsageError("truncation needs a rank or an energy, found neither: give one of them.")
    if rank is not None and not 1 <= rank <= limit:
        raise UsageError(f"rank {rank} is out of range for a weight of shape {deltas[0].shape}: 1 to {limit}.")
    if energy is not None and not 0 < energy <= 1:
        raise UsageError(f"energy {energy} is out of range: expected a share above 0 and at most 1.")
    left = torch.cat([delta.scale * delta.left.double() for delta in deltas], dim=1)
    right = torch.cat([delta.right.double() for delta in deltas], dim=0)
    q_left, r_left = torch.linalg.qr(left)
    q_right, r_right = torch.linalg.qr(right.T)
    u, sigma, vt = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
    unit = sigma / sigma[0] if sigma[0] > 0 else sigma  # so that squares neither over- nor underflow
    k = sigma.numel() if rank is None else min(rank, sigma.numel())
    if energy is not None:
        k = min(k, _rank_for(energy, unit))
    vectors, root = q_left @ u[:, :k], sigma[:k].sqrt()
    peak = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    root = torch.where(peak < 0, -root, root)
    delta = LowRank(vectors * root, root.T * (vt[:k] @ q_right.T))
    total = float(torch.linalg.vector_norm(unit))
    lost = float(torch.linalg.vector_norm(unit[k:]))
    return Truncated(delta, sigma, lost / total if total else 0.0)
