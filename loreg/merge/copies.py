"""Recognising a base that is the right one in another dtype, so that a refusal can say so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from loreg.algebra.edits import WeightedSum
from loreg.checkpoint import Checkpoint, StoredTensor, describe
from loreg.digest import Digest
from loreg.errors import BadInput
from loreg.format.recipe import DTYPE_NAMES, DTYPES
from loreg.format.safetensors import TensorInfo
from loreg.merge.inputs import mapped
from loreg.tensors import TORCH, to_memory


def recognise_copy(
    base: Checkpoint, original: Checkpoint | None, touched: Mapping[str, Digest], differing: Sequence[str]
) -> str | None:
    """The dtype ('float32') of which ``base`` is a converted copy of the adapter's base, or None.

    Either the tensors here, converted, have the leaves that the adapter names (a widened copy), or those of
    ``original``, the adapter's base if it is at hand, converted are the ones here (a narrowed copy). Looks at
    the smallest tensor that differs, and then at all the others only if that one agrees.
    """
    stored = [base.tensors.get(name) for name in differing]
    pairs = [(name, tensor) for name, tensor in zip(differing, stored, strict=True) if tensor is not None]
    if len(pairs) != len(differing) or any(tensor.info.dtype not in DTYPES for _, tensor in pairs):
        return None
    pairs.sort(key=lambda pair: pair[1].info.nbytes)
    here = {tensor.info.dtype for _, tensor in pairs}
    if len(here) != 1:
        return None
    for dtype in DTYPES:
        if dtype not in here and all(_converted(tensor, dtype) == touched[name] for name, tensor in pairs):
            return DTYPE_NAMES[here.pop()]
    if original is not None and all(
        name in original.tensors and _converted(original.tensors[name], tensor.info.dtype) == _leaf(tensor)
        for name, tensor in pairs
    ):
        return DTYPE_NAMES[here.pop()]
    return None


def _tensor(stored: StoredTensor) -> torch.Tensor:
    info = stored.info
    return mapped(stored.shard.path, stored.offset, info.nbytes, info.dtype, info.shape, info.name)


def _leaf(stored: StoredTensor) -> Digest:
    return describe(stored.info, Digest.of(to_memory(_tensor(stored)))).leaf


def _converted(stored: StoredTensor, dtype: str) -> Digest | None:
    """The leaf that the tensor would have as ``dtype``, each element correctly rounded; None if one does not fit."""
    info = stored.info
    if info.dtype not in DTYPES:
        return None
    try:
        values = WeightedSum().apply(_tensor(stored).reshape(-1), TORCH[dtype])
    except BadInput:
        return None
    raw = to_memory(values)
    return describe(TensorInfo(info.name, dtype, info.shape, 0, len(raw)), Digest.of(raw)).leaf
