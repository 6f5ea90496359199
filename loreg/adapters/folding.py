"""Several terms of a module as one pair of factors, for formats that have one scale per module."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from loreg.adapters.draft import RawTensor
from loreg.algebra.delta import LowRank, concatenate
from loreg.algebra.rounding import round_to
from loreg.format.module import Module
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


def fold(path: str, module: Module, raws: Mapping[str, RawTensor]) -> tuple[RawTensor, RawTensor, RawTensor | None]:
    """A (R, in), B (out, R) and the bias of scale 1, in float32: Σ scaleᵢ·Bᵢ·Aᵢ = B·A.

    ``raws``: the tensors of the module by their names in the manifest. Rounds, once per element of B; see
    ``algebra.delta.concatenate`` for the bound.
    """
    terms = [
        LowRank(tensor_of(raws[f"{path}.lora_B.{index}"]), tensor_of(raws[f"{path}.lora_A.{index}"]), term.scale)
        for index, term in enumerate(module.terms)
    ]
    stacked = concatenate(terms, torch.float32)
    bias = None
    if module.bias_terms:
        values = [
            term.scale * tensor_of(raws[f"{path}.lora_bias.{index}"]).double()
            for index, term in enumerate(module.bias_terms)
        ]
        bias = raw_of("bias", round_to(torch.stack(values).sum(0), torch.float32))
    return raw_of("A", stacked.right), raw_of("B", stacked.left), bias
