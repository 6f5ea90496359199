"""Methods that change singular vectors or values: task singular vectors, and isotropic merging."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from loreg.algebra.delta import LowRank
from loreg.algebra.factor_space.adapters import Adapters, Combined, Keys, check, truncated
from loreg.algebra.truncate import kept_rank, spectrum, triangle
from loreg.errors import UsageError

SHARED = 2.0**-26
"""A singular value of the adapters' vectors side by side below this means a direction that they share: √2⁻⁵², about
what two computations of one direction may be apart by."""


@torch.no_grad()
def tsv(adapters: Adapters, parameters: Mapping[str, Any], keys: Keys = None) -> Combined:
    """TSV-Merge: each adapter's leading singular vectors, made orthogonal to the others', with its singular values.

    Δᵢ = UᵢΣᵢVᵢᵀ, cut to its ⌊min(m, n)/k⌋ largest; U = [U₁ … U_k], and V likewise, is replaced by the nearest matrix
    with orthonormal columns, U⊥ = PQᵀ where U = PDQᵀ; the result is U⊥·diag(w₁Σ₁, …, w_kΣ_k)·V⊥ᵀ. (Gargiulo et al.,
    "Task singular vectors: reducing task interference in model merging", CVPR 2025; AntoAndGar/task_singular_vectors,
    src/utils/TSVM_utils.py.)

    Decided here. *What is cut*: the paper's 1/k is of min(m, n), so an adapter of a lower rank is not cut at all. Its
    singular values that are zero, which in the paper's full-rank matrices are none, have no vectors, and none take
    part. *Weights* multiply singular values and leave vectors where they are; the paper has one factor for all. So
    scaling all weights scales the result, a negative weight subtracts, and the order of adapters is all one.
    *Shared directions*: where adapters have one in common (the same adapter twice, say), PQᵀ is not unique, and
    LAPACK's brings in an arbitrary direction. Here the zeros of D, up to 2⁻²⁶, are left out: PQᵀ is then the partial
    isometry, unique, and adapters that agree are averaged. One adapter at weight 1 is itself.

    Raises UsageError for more adapters than min(m, n).
    """
    stacks = check(adapters, parameters)
    most = min(stacks.shape) // len(stacks.each)
    if most == 0:
        raise UsageError(
            f"tsv of {len(stacks.each)} adapters leaves none of them a singular vector for a weight of shape "
            f"{stacks.shape}: combine at most {min(stacks.shape)}."
        )
    lefts, rights, values = [], [], []
    for stack in stacks.each:
        if stack.left.shape[1] == 0:
            continue
        found = spectrum(triangle(stack.left), triangle(stack.right.T))
        count = min(most, found.rank(stacks.shape))
        vectors, rows = found.basis(stack.left, count)
        sigma = found.sigma[:count]
        lefts.append(vectors)
        rights.append((rows / sigma[:, None]) @ stack.right)
        values.append(stack.weight * sigma)
    left, right, diagonal = torch.cat(lefts, dim=1), torch.cat(rights, dim=0), torch.cat(values)
    if diagonal.numel() == 0:
        return stacks.zero()
    return truncated(_orthogonal(left) * diagonal, _orthogonal(right.T).T, parameters)


def _orthogonal(x: Tensor) -> Tensor:
    """PQᵀ of X = PDQᵀ over the part of D above SHARED; (m, k) as X is."""
    _, d, qt = torch.linalg.svd(triangle(x), full_matrices=False)
    inverse = torch.where(d > SHARED, 1 / d, 0.0)
    result: Tensor = x @ (qt.T * inverse @ qt)
    return result


@torch.no_grad()
def iso_c(adapters: Adapters, parameters: Mapping[str, Any], keys: Keys = None) -> Combined:
    """Iso-C: the weighted sum with all its singular values made equal to their mean.

    Σ w·Δ = UΣVᵀ; the result is σ̄·UVᵀ, σ̄ the mean of the singular values. (Marczak et al., "No task left behind:
    isotropic model merging with common and task-specific subspaces", ICML 2025.)

    Decided here. *The mean runs over the rank of the sum*, its singular values that are not noise
    (:meth:`~loreg.algebra.truncate.Spectrum.rank`). The paper's sums have full rank, for which this is the same. Of
    a sum of lower rank the paper's code would count the zeros in, with singular vectors that are whatever LAPACK
    makes up, and push the weight in directions of no adapter. Over the rank, what that code keeps is kept too: the
    sum of the singular values. (apanariello4/core-space-merging likewise flattens within the span of the factors.)
    ``rank`` and ``energy`` truncate the sum *before* it is flattened; afterwards no direction leads.

    Scaling all weights scales the result, and the order of adapters is all one. One adapter is not itself. Vectors
    of small singular values, which this enlarges, are only as good as float64 knows them: to some 2⁻⁵³ of
    Σ‖cB‖‖A‖ over the gap to the next singular value.
    """
    stacks = check(adapters, parameters)
    left = stacks.weighted()
    found = spectrum(triangle(left), triangle(stacks.right.T))
    count = found.rank(stacks.shape)
    if count == 0:
        return stacks.zero()
    unit = found.sigma[:count] / found.sigma[0]
    whole, every = float(found.sigma[:count].mean()), count
    count = kept_rank(unit.square(), parameters.get("rank"), parameters.get("energy"))
    vectors, rows = found.basis(left, count)
    sigma = found.sigma[:count]
    root = sigma.mean().sqrt()
    delta = LowRank(vectors * root, (rows * (root / sigma[:, None])) @ stacks.right)
    # The vectors that both have differ by the means, and the others are missing.
    lost = math.hypot(math.sqrt(count) * (float(sigma.mean()) - whole), math.sqrt(every - count) * whole)
    return Combined((delta,), math.sqrt(every) * whole, lost)
