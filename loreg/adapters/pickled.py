"""``.bin`` files, through torch's unpickler that builds tensors and nothing else."""

from __future__ import annotations

from pathlib import Path

import torch

from loreg.adapters.draft import RawTensor
from loreg.errors import BadInput
from loreg.tensors import NAMES, to_memory


def load_tensors(path: Path) -> tuple[RawTensor, ...]:
    """The state dict in ``path``, in memory. Raises BadInput for anything but a map from text to tensors.

    ``weights_only=True``: a pickle that would run code is refused, never run.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever an unpickler trips over: one flipped byte has given nine types of errors
        reason = str(error).partition("\n")[0][:200]
        raise BadInput(
            f"{path} is not a state dict that loads without running code: {reason}; save it as safetensors."
        ) from error
    if not isinstance(state, dict) or not all(
        isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in state.items()
    ):
        raise BadInput(f"{path}: expected a map from names to tensors.")
    tensors = []
    for key, value in state.items():
        if value.dtype not in NAMES or value.layout != torch.strided or value.is_meta:
            raise BadInput(f"Tensor {key!r} in {path} is {value.layout} {value.dtype}: expected a dense tensor.")
        if value.numel() * value.itemsize > value.untyped_storage().nbytes():  # a few bytes, spread over terabytes
            raise BadInput(f"Tensor {key!r} in {path} has more elements than the file holds: save it contiguously.")
        raw = bytes(to_memory(value.resolve_conj().resolve_neg().contiguous()))
        tensors.append(RawTensor(key, NAMES[value.dtype], tuple(value.shape), raw))
    return tuple(tensors)
