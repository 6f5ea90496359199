"""Forms that rotate the weight [F7]: OFT and BOFT, of PEFT and of LyCORIS, under ``loreg-f64-1``.

OFT is Qiu et al. 2023 (arXiv 2306.07280), BOFT Liu et al. 2024 (arXiv 2311.06243). Both rotate vectors of the
weight by matrices on a diagonal: its rows (``side`` "in") or its columns ("out"), a vector v becoming Q·v. A
matrix Q comes from a stored one by Cayley's formula, of which no released version has the same variant:

====================================  =====  =======  =====================  ==============  ==================
library, tensor                       side   factor   series, for n terms    limit           ``s``
====================================  =====  =======  =====================  ==============  ==================
PEFT ≥ 0.18, `oft_R.weight`           in     ½        null, or [1], [1, 2],  ε/√b per block
  (b, s(s-1)/2), above the diagonal                   [1, 2, 2, 1] for 3
                                                      and 4, else
                                                      [1, 2, …, 2, 1]: n
PEFT 0.16 and 0.17, the same          in     ½        null, or [1, 2, …, 2]  ε/√b per block
PEFT, `oft_embedding_R.weight`        out    -½       as PEFT ≥ 0.18         ε/√b per block
PEFT 0.14 and 0.15, `oft_r` (b, s, s) in     ½        null                   εc²/√b          `oft_s`
PEFT ≤ 0.13, `oft_r` (b, s, s)        out    -½       null                   εc²/√b
PEFT BOFT, `boft_R` (m, b, s, s)      in     ½                                               `boft_s`
LyCORIS diag-oft, `oft_blocks`        out    1        null                   α·out in total  `rescale`
LyCORIS boft, `oft_blocks`            out    -1                              α·out in total  `rescale`
====================================  =====  =======  =====================  ==============  ==================

*Which PEFT.* `oft_r` without `oft_s` is 0.13 or older, whose config has no `oft_block_size`; PEFT itself refuses
it, and `oft_r` with `oft_s`. With `use_cayley_neumann` the config's `peft_version` decides, and where there is
none it is 0.17 or older. PEFT 0.21 loads those, warns, and computes the series of 0.18.

*Limits* are of COFT (`coft`, `eps`) and of `constraint`, and hold at inference: a forward pass applies them to what
is stored. b is R's number of blocks, 1 if `block_share`; c = ⌈out/r⌉. PEFT computes a limit in float32, which is
another number by up to 2⁻²³ of itself. LyCORIS' α is the stored `alpha`, 0 for none.

*Scale* is 1 in PEFT. A multiplier of LyCORIS' diag-oft is an outer weight; one of its boft interpolates every
stage, and is no multiple of anything.

*Bias* is left as it is. PEFT's BOFT and its OFT up to 0.13 take it off the result before they rotate or scale, and
add it after; its later OFT rotates inputs. LyCORIS edits the weight alone, but with `bypass_mode` rotates outputs,
bias included, when it computes; its merge never does.

*Not a form of the weight*, to be refused by the reader: a convolution of PEFT's OFT ≥ 0.16 whose kernel has more
than one element. It unfolds its input, rotates patches, and adds them up where they overlap (`_fold`), so that even
R = 0 multiplies the input by up to Πk; its merge rotates the weight instead (0.21, oft/layer.py).

A rotation of 0 gives W back bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import isqrt

import torch
from torch import Tensor

from loreg.algebra.delta import Dense
from loreg.algebra.edits import WeightedSum
from loreg.algebra.forms.term import Term
from loreg.algebra.ordered import product, total
from loreg.algebra.roots import square_root
from loreg.errors import BadInput

_BLOCK_ELEMENTS = 2**20  # 8 MiB of float64: vectors that are rotated at once
_ELIMINATION_ELEMENTS = 2**16
_MOST_TERMS = 64  # of a series: PEFT's default is 5, and each costs a product of all blocks


def oft(term: Term) -> WeightedSum:
    """W' = s∘(W·Qᵀ) for ``side`` "in", s∘(Q·W) for "out", Q block-diagonal; see the module for each library.

    ``R`` is (b, s, s), or (b, s(s-1)/2): elements above a diagonal, row by row. b = 1 means one matrix for all
    blocks. Else b blocks cover the vectors: s = ⌈n/b⌉ for vectors of n numbers; the last block that is needed
    is cut to what remains, and any further one is not used (PEFT ≤ 0.13). ``s``, optional: one number per row.

    ``factor``, ``block_limit`` and ``total_limit`` (numbers, or null for no limit) as :func:`_skew` says. Then
    Q = (I - S)·(I + S)⁻¹ if ``series`` is null, see :func:`_cayley`, else Σ series[k]·Sᵏ, see :func:`_polynomial`.
    (PEFT's series has the signs of the inverse, (I + S)·(I - S)⁻¹; as its S can have either sign, it matters only
    to those who read a file.)

    *Order.* (Q·v)_i = Σ_j fl(Q_ij·v_j) from +0 on, j ascending within the block, then times s. The result is (W',
    -W), each times ``term.scale``. Needs one float64 copy of W, three of R as matrices, and about 40 MiB. Raises
    BadInput for blocks that do not fit, and for a series of over 64 terms.
    """
    parameters, side = term.parameters, term.parameters["side"]
    R, n = term.tensors["R"], term.shape[0 if side == "out" else 1]
    M = R.double() if R.ndim == 3 else _from_triangles(R.double())
    b, size = M.shape[:2]
    if size > n or (b > 1 and size != -(-n // b)):
        raise BadInput(f"{b} rotations of {size} numbers do not cover vectors of {n}, as a term of form 'oft' must.")
    series = parameters["series"]
    if series is not None and len(series) > _MOST_TERMS:
        raise BadInput(f"a series of {len(series)} terms is given, and one of {_MOST_TERMS} at most is computed.")
    S = _skew(M, parameters["factor"], parameters["block_limit"], parameters["total_limit"])
    Q = _cayley(S) if series is None else _polynomial(S, series)
    return _edited(term, lambda vectors: _rotated(Q, vectors))


def boft(term: Term) -> WeightedSum:
    """OFT in stages, each rotating other groups of the vectors' numbers; see the module for each library.

    ``R`` is (m, b, s, s), b·s = n for vectors of n numbers. Stage i, ascending, cuts a vector into spans of 2ⁱ·s,
    and a span in halves. Its c-th block of s numbers is made of the c-th of 2ⁱ pieces of the first half and of
    the second, s/2 numbers each: one after the other for ``order`` "halves" (PEFT, `block_butterfly_perm`),
    alternating, the first half's first, for "alternating" (LyCORIS). Stage 0 of "halves" is OFT, and s may be odd
    if there is no other. The rotated numbers go back where they were. Then ``s``, optional, times the rows.

    ``factor`` and ``total_limit``, the latter for all stages together, as :func:`_skew` says, then :func:`_cayley`.
    PEFT without its CUDA extension cannot load m > 1. Order of operations, result and memory as of :func:`oft`.
    Raises BadInput for stages that do not fit.
    """
    parameters, side = term.parameters, term.parameters["side"]
    R, n, order = term.tensors["R"], term.shape[0 if side == "out" else 1], term.parameters["order"]
    stages, b, size = R.shape[:3]
    odd = size % 2 and (stages > 1 or order != "halves")
    if b * size != n or odd or n % (size << (stages - 1)):
        raise BadInput(f"{stages} stages of {b} rotations of {size} numbers do not fit vectors of {n} numbers.")
    S = _skew(R.double().flatten(0, 1), parameters["factor"], None, parameters["total_limit"])
    Q = _cayley(S).view(R.shape)

    def rotated(vectors: Tensor) -> Tensor:
        for stage in range(stages):
            places = _places(n, size, stage, order).to(vectors.device)
            turned = _rotated(Q[stage], vectors[places])
            vectors = torch.empty_like(turned)
            vectors[places] = turned
        return vectors

    return _edited(term, rotated)


def _places(n: int, size: int, stage: int, order: str) -> Tensor:
    """Which number of a vector stands at each place of the blocks that a stage rotates."""
    if stage == 0 and order == "halves":
        return torch.arange(n)
    spans = torch.arange(n).view(-1, 2, 1 << stage, size // 2)
    return spans.permute(0, 2, 1, 3).flatten() if order == "halves" else spans.permute(0, 2, 3, 1).flatten()


@torch.no_grad()
def _edited(term: Term, rotated: Callable[[Tensor], Tensor]) -> WeightedSum:
    """The edit of a weight whose vectors, the columns of what ``rotated`` is given, become those it returns."""
    W = term.base()
    edited = torch.empty(W.shape, dtype=torch.float64, device=W.device)
    source, target = (W, edited) if term.parameters["side"] == "out" else (W.T, edited.T)
    step = max(1, _BLOCK_ELEMENTS // source.shape[0])
    for start in range(0, source.shape[1], step):
        span = slice(start, start + step)
        target[:, span] = rotated(source[:, span].double().contiguous())
    if "s" in term.tensors:
        edited *= term.tensors["s"].double().reshape(-1, 1)
    return WeightedSum(dense=(Dense(edited, term.scale), Dense(W, -term.scale)))


def _rotated(Q: Tensor, vectors: Tensor) -> Tensor:
    """The columns of ``vectors``, (n, k), rotated by the blocks of ``Q``, (b, s, s): float64."""
    size = Q.shape[-1]
    whole, rest = divmod(len(vectors), size)
    matrices = Q[:whole] if len(Q) > 1 else Q.expand(whole, -1, -1)
    blocks = vectors[: whole * size].reshape(whole, size, -1)
    parts = [product(matrices, blocks).flatten(0, 1)]
    if rest:
        last = Q[whole if len(Q) > 1 else 0, :rest, :rest]
        parts.append(product(last, vectors[whole * size :]))
    return torch.cat(parts)


def _from_triangles(R: Tensor) -> Tensor:
    """Skew-symmetric matrices, (b, s, s), of what they have above their diagonals, (b, s(s-1)/2)."""
    size = (1 + isqrt(1 + 8 * R.shape[1])) // 2
    if size * (size - 1) // 2 != R.shape[1]:
        raise BadInput(f"{R.shape[1]} numbers are not the upper triangle of a square matrix.")
    M = R.new_zeros(len(R), size, size)
    rows, columns = torch.triu_indices(size, size, 1, device=R.device)
    M[:, rows, columns] = R
    M[:, columns, rows] = -R
    return M


@torch.no_grad()
def _skew(M: Tensor, factor: float, block_limit: float | None, total_limit: float | None) -> Tensor:
    """S = factor·(M - Mᵀ) of (b, s, s) matrices, float64.

    ``block_limit`` λ: a matrix of M with a norm above λ becomes fl(λ·fl(M/norm)) first. ``total_limit`` Λ: let N be
    fl(‖M - Mᵀ‖ + 10⁻⁸), of all matrices together; if N > Λ, M - Mᵀ becomes fl(fl((M - Mᵀ)·Λ)/N) before it is
    multiplied by ``factor``. A norm is the root of the folded sum of squares, row-major.
    """
    if block_limit is not None:
        norm = square_root(total((M * M).flatten(1), 1))[:, None, None]
        M = torch.where(norm <= block_limit, M, block_limit * (M / norm))
    S = M - M.transpose(1, 2)
    if total_limit is not None:
        # of one dimension: CUDA multiplies by the reciprocal of a divisor that is a number
        norm = square_root(total((S * S).flatten(), 0).reshape(1)) + 1e-8
        S = torch.where(norm > total_limit, S * total_limit / norm, S)
    return S.mul_(factor)


@torch.no_grad()
def _cayley(S: Tensor) -> Tensor:
    """Q = (I - S)·(I + S)⁻¹ = 2·(I + S)⁻¹ - I, in place of ``S``, (b, s, s) float64, skew-symmetric.

    The inverse is by Gauss-Jordan elimination in place, without pivoting. Step k, ascending, with p = a_kk: row k
    becomes fl(a_kj/p), and fl(1/p) at k; every other element becomes fl(a_ij - fl(a_ik·row_j)), where a_ik, once
    read, counts as 0. Then Q = fl(2a - 1) on the diagonal, 2a elsewhere.

    No pivot can fail: the symmetric part of I + S is I. With a leading block A₁₁ and what is right of it, A₁₂, a
    Schur complement is I + S₂₂ + A₁₂ᵀA₁₁⁻¹A₁₂, whose symmetric part is I and something positive semidefinite.
    So each pivot is at least 1, and no element exceeds 1 + ‖S‖ + ‖S‖² (Golub & Van Loan, Matrix Computations,
    4th ed., §4.2.2, have the general case).
    """
    diagonal = S.diagonal(dim1=1, dim2=2)
    diagonal += 1
    rows = max(1, _ELIMINATION_ELEMENTS // (S.shape[0] * S.shape[2]))
    for k in range(S.shape[1]):
        pivot, column = S[:, k, k, None].clone(), S[:, :, k].clone()
        row = S[:, k] / pivot
        row[:, k] = pivot[:, 0].reciprocal()
        S[:, :, k] = 0
        column[:, k] = 0
        for start in range(0, S.shape[1], rows):
            S[:, start : start + rows] -= column[:, start : start + rows, None] * row[:, None]
        S[:, k] = row
    S *= 2
    diagonal -= 1
    return S


@torch.no_grad()
def _polynomial(S: Tensor, series: Sequence[float]) -> Tensor:
    """Σ series[k]·Sᵏ: fl(Q + fl(series[k]·P)), k ascending, from series[0]·I on, P becoming ``product(P, S)``."""
    Q = torch.zeros_like(S)
    Q.diagonal(dim1=1, dim2=2).add_(series[0])
    P = S
    for k, coefficient in enumerate(series[1:], start=1):
        P = S if k == 1 else product(P, S)
        Q += coefficient * P
    return Q
