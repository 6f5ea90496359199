"""Several terms of a module as one pair of factors, for formats that have one scale per module."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from loreg.adapters.draft import RawTensor
from loreg.algebra.delta import LowRank, concatenate
from loreg.algebra.rounding import round_to
from loreg.tensors import NAMES, TORCH, from_buffer, to_memory


def tensor_of(raw: RawTensor) -> torch.Tensor:
    """The tensor on the CPU, in memory of its own."""
    buffer = bytearray()
    for chunk in raw.chunks():  # not b"".join: it collects all chunks first, and they are one buffer
        buffer += chunk
    return from_buffer(buffer, TORCH[raw.dtype], raw.shape)


def raw_of(key: str, tensor: torch.Tensor) -> RawTensor:
    """A tensor as bytes in memory."""
    contiguous = tensor.contiguous()
    return RawTensor(key, NAMES[tensor.dtype], tuple(tensor.shape), bytes(to_memory(contiguous)))


def fold(terms: Sequence[tuple[RawTensor, RawTensor, float]], scale: float) -> tuple[RawTensor, RawTensor]:
    """A (R, in) and B (out, R) in float32: Σ sᵢ·Bᵢ·Aᵢ = scale·B·A. ``terms``: (Aᵢ, Bᵢ, sᵢ), taken as matrices.

    Each element of B is rounded once, after its product with sᵢ/scale; see ``algebra.delta.concatenate`` for the
    bound. Where these are 1 or -1, nothing is rounded that float32 holds.
    """
    pairs = ((tensor_of(A).flatten(1), tensor_of(B).flatten(1), each / scale) for A, B, each in terms)
    stacked = concatenate([LowRank(B, A, ratio) for A, B, ratio in pairs], torch.float32)
    return raw_of("A", stacked.right), raw_of("B", stacked.left)


def padded(raw: RawTensor, axis: int, size: int) -> RawTensor:
    """A matrix with zeros behind what it has along ``axis``, until there are ``size``."""
    tensor = tensor_of(raw)
    shape = list(tensor.shape)
    shape[axis] = size - shape[axis]
    return raw_of(raw.key, torch.cat([tensor, tensor.new_zeros(shape)], axis)) if shape[axis] else raw


def fold_bias(terms: Sequence[tuple[RawTensor, float]]) -> RawTensor:
    """Σ scaleᵢ·biasᵢ in float32, rounded once per element, from a float64 sum in the terms' order."""
    values = [scale * tensor_of(raw).double() for raw, scale in terms]
    return raw_of("bias", round_to(torch.stack(values).sum(0), torch.float32))
