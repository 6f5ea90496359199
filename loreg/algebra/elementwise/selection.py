"""SCE [C6]: select the elements on which the deltas differ, calculate their weights, erase what disagrees in sign.

Wan et al., "FuseChat", 2024, section 3.3; mergekit/merge_methods/sce.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from loreg.algebra.elementwise.consensus import agreeing
from loreg.algebra.elementwise.deltas import Deltas, added, blocks, divided, in_order
from loreg.algebra.elementwise.sparsify import Thinned, largest
from loreg.algebra.ordered import total
from loreg.errors import BadInput

_LEAST_SHARE = 1e-6


def _variance(parts: Sequence[Tensor]) -> Tensor:
    """k times the variance over ``parts``, by Welford's updates in their order: zero exactly where all are equal."""
    mean, square = torch.zeros_like(parts[0]), torch.zeros_like(parts[0])
    for count, part in enumerate(parts, 1):
        off = part - mean
        mean += divided(off, count)
        square += off.mul_(part - mean)
    return square


def sce(deltas: Deltas, parameters: Mapping[str, Any]) -> Tensor:
    """Σ sᵢ·yᵢ / Σ sᵢ over those yᵢ = fl(wᵢ·Δᵢ) that have the sign of Σ yᵢ (a zero sum counts as +).

    sᵢ is the share of yᵢ in Σ‖y‖²; equal shares if that is zero, and a sum of shares below 1e-6 divides as 1e-6.
    ``select_topk`` < 1 first sets to zero all but the ⌊select_topk·m⌋ elements of largest variance over the deltas,
    m the number of those whose variance is not zero: of one delta alone, nothing stays.

    mergekit has no weights (1 each is its result), and takes equal shares wherever the mean squares sum to less than
    1e-6, which is where most adapters' deltas lie: their elements are about 1e-4. That is not in the paper, depends
    on the unit of measure, and is not done here.
    """
    weighted = list(zip([Thinned(value) for value in deltas.flat()], deltas.weights, strict=True))
    out = deltas.result()
    kept: Tensor | None = None
    if parameters["select_topk"] < 1:
        for block in blocks(out.numel(), out.device):
            out[block] = _variance([delta.block(block).mul_(weight) for delta, weight in weighted])
        kept = largest(out, int(int((out != 0).sum()) * parameters["select_topk"]))
        weighted = [(Thinned(delta.value, kept), weight) for delta, weight in weighted]
    energies = [float(total(_whole(delta).mul_(weight).square_(), 0)) for delta, weight in weighted]
    whole = in_order(energies)
    if not whole < float("inf"):
        raise BadInput("the norm of a delta is beyond the range of float64: the adapter is damaged or diverged.")
    shares = [energy / whole if whole else 1.0 / len(energies) for energy in energies]
    for block in blocks(out.numel(), out.device):
        parts = [delta.block(block).mul_(weight) for delta, weight in weighted]
        positive = added(parts) >= 0
        mixed, divisor = torch.zeros_like(parts[0]), torch.zeros_like(parts[0])
        for part, share in zip(parts, shares, strict=True):
            agree = agreeing(part, positive)
            mixed += torch.where(agree, part, 0.0).mul_(share)
            divisor += agree.double().mul_(share)
        torch.div(mixed, divisor.clamp_(min=_LEAST_SHARE), out=out[block])
    return out.view(deltas.shape)


def _whole(delta: Thinned) -> Tensor:
    return delta.block(slice(0, delta.value.numel()))
