"""Truncation: the one lossy function of the algebra, and it returns what it threw away.

A product of factors is decomposed without being formed (:func:`spectrum`), a dense matrix through its smaller Gram
matrix (:func:`truncate_dense`). Everything is float64 on the device of its input, through LAPACK or its like:
deterministic on one machine, the last bits may differ between builds, devices and thread counts: one thread of
torch's gives the same everywhere on that machine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loreg.algebra.delta import LowRank, common_shape
from loreg.errors import BadInput, Unsupported, UsageError

UNIT = 2.0**-52
"""The spacing of float64 at 1: twice the relative error of one operation."""


@dataclass(frozen=True, slots=True, eq=False)
class Truncated:
    """The best approximation of a sum of deltas, or of a dense matrix, by a delta of some rank.

    ``delta``: float64 factors left = U·√σ and right = √σ·Vᵀ, scale 1. Balanced, so that neither factor is
    pushed to the edge of a 16-bit range when it is stored. ``singular_values``: all of the sum's,
    float64, descending. ``norm``: ‖sum‖ in the Frobenius norm, 0 where that is rounding noise, see :func:`norm`.
    ``relative_error``: ‖sum - delta‖ / ‖sum‖, 0 for a zero sum.
    """

    delta: LowRank
    singular_values: Tensor
    norm: float
    relative_error: float

    @property
    def lost(self) -> float:
        """‖sum - delta‖ in the Frobenius norm."""
        return self.relative_error * self.norm


@dataclass(frozen=True, slots=True, eq=False)
class Spectrum:
    """The SVD U·diag(sigma)·Vᵀ of ``left @ right``, left (m, R) and right (R, n), as what is to be multiplied.

    ``left @ to_left`` is U·diag(sigma), ``to_right @ right`` is diag(sigma)·Vᵀ; to_left is (R, p), to_right (p, R),
    p ≤ min(m, n, R). ``noise`` is 2⁻⁵²·Σⱼ‖left[:, j]‖‖right[j]‖, the size of what float64 leaves of a singular value
    that is truly zero.
    """

    sigma: Tensor
    to_left: Tensor
    to_right: Tensor
    noise: float

    def rank(self, shape: Sequence[int]) -> int:
        """How many singular values are not noise: above max(m, n)·noise, for a product of ``shape`` (m, n).

        The rule of ``torch.linalg.matrix_rank``, with the norm of the factors for the largest singular value, so
        that terms that cancel leave nothing, and not their rounding errors.
        """
        return int((self.sigma > max(shape) * self.noise).sum())

    def basis(self, left: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The first ``count`` left singular vectors (m, count), the first largest entry of each positive, and the
        rows of ``to_right`` with the same signs. Zeros for a singular value below ``noise``, which has none."""
        sigma = self.sigma[:count]
        inverse = torch.where(sigma > self.noise, 1 / sigma, 0.0)
        vectors = left @ (self.to_left[:, :count] * inverse)
        signs = _signs(vectors)
        return vectors * signs, (signs * (inverse > 0))[:, None] * self.to_right[:count]


def _signs(vectors: Tensor) -> Tensor:
    """±1 for each column: the sign of its first entry of largest magnitude."""
    peak = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))[0]
    return torch.where(peak < 0, -1.0, 1.0).to(vectors.dtype)


def triangle(x: Tensor) -> Tensor:
    """R of X = QR for a float64 (m, r) ``x``, (min(m, r), r); Q is not made. RᵀR = XᵀX, R unique up to signs of rows.

    Backward stable, column by column: R is exact for an x that is off by a small multiple of 2⁻⁵³ of each column's
    norm. Cholesky twice (Yamamoto et al., "Roundoff error analysis of the CholeskyQR2 algorithm", ETNA 44, 2015),
    which takes a third of Householder's time for 2048 × 64 on two cores; it may lose accuracy only in the first
    step, so the Q of that is looked at, and where it is not nearly orthogonal Householder does the work.
    """
    if x.shape[0] > x.shape[1] > 0:
        first, failed = torch.linalg.cholesky_ex(x.T @ x, upper=True)
        if not bool(failed):
            q = torch.linalg.solve_triangular(first.T, x.T, upper=False)
            gram = q @ q.T
            off = gram - torch.eye(gram.shape[0], dtype=x.dtype, device=x.device)
            if bool(torch.linalg.matrix_norm(off) < 1 / 16):
                both: Tensor = torch.linalg.cholesky(gram, upper=True) @ first
                return both
    result: Tensor = torch.linalg.qr(x, mode="r").R
    return result


def _column_norms(x: Tensor) -> Tensor:
    """As vector_norm over rows, without squares that over- or underflow."""
    peak = x.abs().max().clamp(min=torch.finfo(x.dtype).tiny)
    norms: Tensor = torch.linalg.vector_norm(x / peak, dim=0)
    return norms * peak


def spectrum(triangle_left: Tensor, triangle_right: Tensor) -> Spectrum:
    """The SVD of ``left @ right`` from :func:`triangle` of left and of rightᵀ: O((m + n)R² + R³), no (m, n) matrix.

    With left = Q₁R₁ and rightᵀ = Q₂R₂ the product is Q₁(R₁R₂ᵀ)Q₂ᵀ; from R₁R₂ᵀ = PΣWᵀ follow UΣ = left·R₂ᵀW and
    ΣVᵀ = PᵀR₁·right, so that neither Q is needed. The error of a singular value is some 2⁻⁵³ of
    Σⱼ‖left[:, j]‖‖right[j]‖, which is all that is left where terms cancel. Raises BadInput beyond float64's range.
    """
    core = triangle_left @ triangle_right.T
    noise = _noise(triangle_left, triangle_right)
    p, sigma, wt = torch.linalg.svd(core, full_matrices=False)
    return Spectrum(sigma, triangle_right.T @ wt.T, p.T @ triangle_left, noise)


def _noise(triangle_left: Tensor, triangle_right: Tensor) -> float:
    """See :class:`Spectrum`. Raises BadInput beyond float64's range."""
    noise = UNIT * float(_column_norms(triangle_left) @ _column_norms(triangle_right))
    if not noise < torch.inf:
        raise BadInput("the product of a delta's factors exceeds float64: the adapter is damaged or diverged.")
    return noise


def check_limits(shape: Sequence[int], rank: int | None, energy: float | None) -> None:
    """Raises UsageError for a rank outside 1 … min(m, n) or an energy outside (0, 1], Unsupported for a ``shape``
    that is not that of a matrix. None is no limit."""
    if len(shape) != 2:
        raise Unsupported(f"a delta of shape {tuple(shape)} has no singular values: take its matrices one by one.")
    limit = min(shape)
    if rank is not None and not 1 <= rank <= limit:
        raise UsageError(f"rank {rank} is out of range for a weight of shape {tuple(shape)}: 1 to {limit}.")
    if energy is not None and not 0 < energy <= 1:
        raise UsageError(f"energy {energy} is out of range: expected a share above 0 and at most 1.")


def kept_rank(squares: Tensor, rank: int | None, energy: float | None) -> int:
    """How many of the descending squares (1-D, of singular values) are kept; at least 1, at most all.

    ``rank`` bounds it; ``energy`` asks for the fewest whose sum is that share of the sum of all.
    """
    most = squares.numel()
    if rank is not None:
        most = min(most, rank)
    if energy is not None:
        held = squares.cumsum(0)
        most = min(most, 1 + int((held < energy * held[-1]).sum()))
    return most


@torch.no_grad()
def stacked(deltas: Sequence[LowRank], weights: Sequence[float] | None = None) -> tuple[Tensor, Tensor]:
    """(m, R) and (R, n), float64, whose product is Σ w·Δ: [w₁c₁B₁ … wₖcₖBₖ], wc one IEEE product, and [A₁; …; Aₖ].

    ``weights`` are 1 if not given. Raises BadInput if there are no deltas, or shapes or devices differ.
    """
    common_shape(deltas)
    if len({delta.left.device for delta in deltas}) != 1:
        raise BadInput("deltas that are combined must be on one device: move them first.")
    pairs = zip(deltas, weights or [1.0] * len(deltas), strict=True)
    scales = [weight * delta.scale for delta, weight in pairs for _ in range(delta.rank)]
    left = _side_by_side([delta.left for delta in deltas], 1)
    left *= torch.tensor(scales, dtype=torch.float64, device=left.device)
    return left, _side_by_side([delta.right for delta in deltas], 0)


def _side_by_side(parts: Sequence[Tensor], dim: int) -> Tensor:
    """A new tensor of all parts, float64; converted once if their dtype is one, which takes half the time."""
    if len({part.dtype for part in parts}) > 1:
        parts = [part.double() for part in parts]
    whole = torch.cat(list(parts), dim)
    return whole.double()


@torch.no_grad()
def norm(deltas: Sequence[LowRank]) -> float:
    """‖Σ c·B·A‖ in the Frobenius norm, float64: no (m, n) matrix is formed.

    From the Gram matrices of the stacked factors, a third of the work, off by 2⁻³² of itself; where terms cancel
    beyond that, from their triangles, off by some 2⁻⁵³ of Σⱼ‖left[:, j]‖‖right[j]‖. What that leaves is no value by
    the rule of :meth:`Spectrum.rank`: 0 then. Raises BadInput beyond float64's range, and as :func:`stacked`.
    """
    left, right = stacked(deltas)
    grams = left.T @ left, right @ right.T
    square = float((grams[0] * grams[1]).sum())
    size = float(grams[0].diagonal().sqrt() @ grams[1].diagonal().sqrt())
    if 2.0**-900 < size * size * 2.0**-20 < square < torch.inf:
        return math.sqrt(square)
    triangles = triangle(left), triangle(right.T)
    found = _frobenius(triangles[0] @ triangles[1].T)
    return _or_noise(found, (left.shape[0], right.shape[1]), _noise(*triangles))


def _or_noise(found: float, shape: Sequence[int], noise: float) -> float:
    return found if found > max(shape) * noise else 0.0


def _frobenius(x: Tensor) -> float:
    """The norm of all elements, without squares that over- or underflow."""
    peak = float(x.abs().max())
    return peak * float(torch.linalg.vector_norm(x / peak)) if peak > 0 else 0.0


@torch.no_grad()
def distance(one: LowRank, other: LowRank) -> float:
    """‖ΔW - ΔW'‖ in the Frobenius norm, of two deltas of one rank and scale whose factors are nearly the same.

    BA - B'A' = (B - B')A + B'(A - A'): differences of factors first, so that nothing cancels. Float64.
    """
    left, right = one.left.double(), one.right.double()
    near, below = other.left.double(), other.right.double()
    parts = [(left - near, right), (near, right - below)]
    apart = [LowRank(*pair, one.scale) for pair in parts if all(bool(factor.any()) for factor in pair)]
    return norm(apart) if apart else 0.0


def truncate(deltas: Sequence[LowRank], rank: int | None = None, energy: float | None = None) -> Truncated:
    """The sum Σ c·B·A of ``deltas`` (one shape (m, n), ranks adding up to R), truncated by its SVD.

    ``rank`` (1 … min(m, n)) bounds the rank; ``energy`` in (0, 1] asks for the least rank that keeps that
    share of ‖sum‖²; given both, the smaller rank holds. The result's rank is at most R, as the sum's is.
    Optimal in every unitarily invariant norm (Eckart & Young 1936, Mirsky 1960).

    Never forms the (m, n) matrix: see :func:`spectrum`, whose bound holds for the delta too. Signs are fixed: the
    first largest entry of each left vector is positive.

    Raises UsageError for a rank or energy out of range or neither, BadInput if shapes differ or the sum exceeds
    float64, Unsupported for deltas that are stacks of matrices.
    """
    check_limits(common_shape(deltas), rank, energy)
    return truncate_product(*stacked(deltas), rank, energy)


@torch.no_grad()
def truncate_product(left: Tensor, right: Tensor, rank: int | None = None, energy: float | None = None) -> Truncated:
    """As :func:`truncate`, for left @ right, float64 (m, R) and (R, n)."""
    check_limits((left.shape[0], right.shape[1]), rank, energy)
    if rank is None and energy is None:
        raise UsageError("truncation needs a rank or an energy, found neither: give one of them.")
    found = spectrum(triangle(left), triangle(right.T))
    sigma = found.sigma
    unit = sigma / sigma[0] if sigma[0] > 0 else sigma  # so that squares neither over- nor underflow
    k = kept_rank(unit.square(), rank, energy)
    vectors, rows = found.basis(left, k)
    root = sigma[:k].sqrt()
    inverse = torch.where(root > 0, 1 / root, 0.0)
    delta = LowRank(vectors * root, (rows * inverse[:, None]) @ right)
    total = float(torch.linalg.vector_norm(unit))
    size = _or_noise(total * float(sigma[0]), (left.shape[0], right.shape[1]), found.noise)
    lost = float(torch.linalg.vector_norm(unit[k:]))
    return Truncated(delta, sigma, size, lost / total if size else 0.0)


@torch.no_grad()
def truncate_dense(delta: Tensor, rank: int | None = None, energy: float | None = None) -> Truncated:
    """``delta``, (m, n) and float64, truncated as :func:`truncate` does a sum: the inverse of a merge.

    X = the delta, transposed if m < n: V the k leading eigenvectors of XᵀX; Q of X·V = QR; and QQᵀX is the result,
    left = Q√σ and right = QᵀX/√σ, σ the norms of rows of QᵀX. ``relative_error`` is ‖X - QQᵀX‖/‖X‖, measured: it is
    exact for the delta that is returned, to some 2⁻⁵³, and nothing is estimated. Columns that are noise are dropped.

    How near to the best (Eckart & Young 1936): the eigenvalues of XᵀX are off by some (m + n)·2⁻⁵³ of ‖X‖², and the
    square of the relative error is above the optimum's by at most 2k times that, as QQᵀX is at least as near as
    XVVᵀ. Measured: within 1e-9 of the optimum for flat and geometric spectra, low rank, and low rank with noise. For
    the same reason ``singular_values`` are good only to √(n·2⁻⁵²) of the largest, and 0 below that.

    On two cores 4096² takes 6 s, where LAPACK's SVD (gesdd) takes 13.5 s. A randomised method is faster still and
    misses the optimum by an amount that nobody knows. Memory: one more matrix of the delta's size and about five
    of (n, n), n the smaller side.

    Raises UsageError for a rank or energy out of range or neither, BadInput for NaN or infinity or a matrix
    without elements, Unsupported for another dtype or number of dimensions.
    """
    check_limits(delta.shape, rank, energy)
    if rank is None and energy is None:
        raise UsageError("truncation needs a rank or an energy, found neither: give one of them.")
    if delta.dtype != torch.float64:
        raise Unsupported(f"a dense delta to be truncated has dtype {delta.dtype}, expected torch.float64.")
    shape = tuple(delta.shape)
    if delta.numel() == 0:
        raise BadInput(f"a dense delta of shape {shape} has no elements to be truncated.")
    low, high = map(float, torch.aminmax(delta))  # NaN if there is one; a tenth of the time that isfinite takes
    if not (math.isfinite(low) and math.isfinite(high)):
        raise BadInput(f"a dense delta of shape {shape} holds NaN or infinity: is a checkpoint damaged?")
    exponent = math.frexp(max(-low, high))[1]
    exponent = 0 if abs(exponent) < 400 else 2 * max(-500, min(500, exponent // 2))
    x = delta if exponent == 0 else delta * 2.0**-exponent  # so that squares neither over- nor underflow
    tall = x if x.shape[0] >= x.shape[1] else x.T
    squares, vectors = torch.linalg.eigh(tall.T @ tall)
    squares, vectors = squares.flip(0), vectors.flip(1)
    squares = torch.where(squares > squares.numel() * UNIT * squares[0], squares, 0.0)
    q = torch.linalg.qr(tall @ vectors[:, : kept_rank(squares, rank, energy)]).Q
    z = q.T @ tall
    sigma = torch.linalg.vector_norm(z, dim=1)
    real = sigma > max(x.shape) * UNIT * sigma[0]
    real[0] = True
    q, z, root = q[:, real], z[real], sigma[real].sqrt()
    total = float(torch.linalg.matrix_norm(tall))
    lost = float(torch.linalg.matrix_norm(torch.addmm(tall, q, z, alpha=-1)))
    left, right = q * root, z / torch.where(root > 0, root, 1.0)[:, None]
    if tall is not x:
        left, right = right.T, left.T
    signs = _signs(left) * 2.0 ** (exponent // 2)
    result = LowRank(left * signs, signs[:, None] * right)
    error = lost / total if total else 0.0
    return Truncated(result, squares.sqrt() * 2.0**exponent, total * 2.0**exponent, error)
