"""The one bridge between bytes and torch: dtype names, buffers to tensors, tensors to bytes.

Everything below works on bytes; everything in ``algebra`` works on tensors. Little-endian throughout, as the
safetensors container is.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from math import prod
from mmap import mmap

import torch

from loreg.errors import Unsupported

if sys.byteorder != "little":
    raise ImportError("loreg reads safetensors in place, and so needs a little-endian machine.")

TORCH: Mapping[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
NAMES: Mapping[torch.dtype, str] = {dtype: name for name, dtype in TORCH.items()}


def torch_dtype(name: str, tensor: str) -> torch.dtype:
    """The torch dtype of a safetensors dtype. Raises Unsupported, naming ``tensor``."""
    if name not in TORCH:
        raise Unsupported(f"Tensor {tensor!r} has dtype {name}, which loreg does not compute with yet.")
    return TORCH[name]


def from_buffer(
    buffer: bytearray | memoryview | mmap, dtype: torch.dtype, shape: tuple[int, ...], offset: int = 0
) -> torch.Tensor:
    """A tensor over the bytes of ``buffer``, which is writable, from ``offset`` on; it shares them."""
    if 0 in shape:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(buffer, dtype=dtype, count=prod(shape), offset=offset).view(shape)


def to_memory(tensor: torch.Tensor) -> memoryview:
    """The raw bytes of a contiguous CPU tensor, without a copy; valid as long as the tensor is."""
    if tensor.numel() == 0:
        return memoryview(b"")
    return tensor.detach().view(-1).view(torch.uint8).numpy().data
