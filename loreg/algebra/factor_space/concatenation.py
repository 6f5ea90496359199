"""The weighted sum, as its terms and truncated, and PEFT's stand-in for it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from loreg.algebra.delta import LowRank, common_shape
from loreg.algebra.factor_space.adapters import Adapters, Combined, Keys, present
from loreg.algebra.truncate import check_limits, stacked, truncate_product
from loreg.errors import Unsupported, UsageError


def cat(adapters: Adapters, parameters: Mapping[str, Any], keys: Keys = None) -> Combined:
    """Σ w·Δ as all terms of all adapters, which is what ``linear`` stores: of a rank that is the sum of ranks.

    Exact but for each scale, which is one IEEE double product; factors keep their dtypes, nothing is folded. For
    serving, :func:`~loreg.algebra.delta.concatenate` makes one pair of factors of it, and rounds. PEFT's ``cat``
    is the same product (peft/tuners/lora/model.py), rounded to the factors' dtype where weight and scale enter A.
    """
    terms = tuple(term.scaled(adapters[index][0]) for index in present(adapters) for term in adapters[index][1])
    common_shape(terms)
    return Combined(terms)


@torch.no_grad()
def svd(adapters: Adapters, parameters: Mapping[str, Any], keys: Keys = None) -> Combined:
    """Σ w·Δ truncated by its SVD: the nearest delta of its rank, see :func:`~loreg.algebra.truncate.truncate`.

    PEFT's ``svd`` (peft/tuners/lora/model.py) is the same product, from an SVD of the dense sum in the dtype of the
    factors, with σ wholly in B. Raises UsageError if there is neither ``rank`` nor ``energy``.
    """
    terms = [(adapters[index][0], term) for index in present(adapters) for term in adapters[index][1]]
    limits = parameters.get("rank"), parameters.get("energy")
    check_limits(common_shape([term for _, term in terms]), *limits)
    left, right = stacked([term for _, term in terms], [weight for weight, _ in terms])
    return Combined.of(truncate_product(left, right, *limits))


@torch.no_grad()
def peft_linear(adapters: Adapters, parameters: Mapping[str, Any], keys: Keys = None) -> Combined:
    """PEFT's ``add_weighted_adapter(combination_type="linear")``, only so that old results can be reproduced.

    With c = weight·scale: A = Σ sign(c)·√|c|·A, B = Σ √|c|·B, and the delta BA (peft/tuners/lora/model.py,
    ``_generalized_task_arithmetic_weighted_adapter``, PEFT 0.21). **Not the sum of the deltas**: for each pair of
    adapters BA has a cross term √|cᵢcⱼ|·sign(cⱼ)·BᵢAⱼ. Nor is it a function of the deltas: it changes with how each
    is factored. ``linear`` is the sum. Where the first of its adapters is rsLoRA, what PEFT then applies is √r times
    this, as is its ``svd`` and ``cat``: the merged adapter takes over the first one's configuration.

    In float64; PEFT computes in the wider of float32 and the factors' dtype, so products agree to that. One delta of
    the adapters' rank, scale 1. Raises UsageError if ranks differ, Unsupported for an adapter of several terms.
    """
    found = [adapters[index] for index in present(adapters) if adapters[index][1]]
    shape = common_shape([term for _, terms in found for term in terms])
    if any(len(terms) > 1 for _, terms in found):
        raise Unsupported(
            "peft_linear adds A to A and B to B, and an adapter has several of each, as one composed by linear has: "
            "truncate it with svd first, or use linear."
        )
    if len(shape) != 2:
        raise Unsupported(f"peft_linear combines matrices, found deltas of shape {shape}: take them one by one.")
    ranks = sorted({terms[0].rank for _, terms in found})
    if len(ranks) > 1:
        raise UsageError(
            f"peft_linear needs adapters of one rank, found {', '.join(map(str, ranks))}: use linear, or svd."
        )
    left = torch.zeros_like(found[0][1][0].left, dtype=torch.float64)
    right = torch.zeros_like(found[0][1][0].right, dtype=torch.float64)
    for weight, (term,) in found:
        c = weight * term.scale
        root = math.sqrt(abs(c))
        left += root * term.left.double()
        right += math.copysign(root, c) * term.right.double()
    return Combined((LowRank(left, right),))
