"""Formats of one file of weights: that file, or a directory with no other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite, prod
from pathlib import Path
from struct import unpack

from loreg.adapters.draft import DraftFile, RawTensor, read_tensors
from loreg.adapters.peft.directory import license_of, side_files
from loreg.errors import BadInput, NotFound, Unsupported

_PICKLED = (".pt", ".pth", ".bin", ".ckpt")

_NUMBERS = {"F16": "<e", "F32": "<f", "F64": "<d", "I64": "<q", "I32": "<i", "I16": "<h", "I8": "<b", "U8": "<B"}


@dataclass(frozen=True, slots=True)
class OneFile:
    """``tensors`` by key; ``header``: the bytes before them in the file, None if that has no such order."""

    path: Path
    tensors: Mapping[str, RawTensor]
    header: bytes | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Beside:
    """What was pushed, as files; what lies in the directory beside the weights."""

    files: tuple[DraftFile, ...]
    left_out: tuple[str, ...] = ()
    license: str | None = None


def find(path: Path) -> Path | None:
    """The file of weights at ``path``; in a directory the only one, safetensors before all others. None if none.

    Raises BadInput where there are several.
    """
    if not path.is_dir():
        return path if path.suffix in (".safetensors", *_PICKLED) else None
    for suffixes in ((".safetensors",), _PICKLED):
        found = sorted(each for each in path.iterdir() if each.suffix in suffixes and each.is_file())
        if len(found) > 1:
            names = ", ".join(each.name for each in found[:4])
            raise BadInput(
                f"{path} holds {len(found)} files of weights, such as {names}, and which is the adapter cannot be "
                "told: give the path of that file."
            )
        if found:
            return found[0]
    return None


def open_weights(path: Path) -> OneFile:
    """The tensors of the file of weights at ``path``. Loads torch only for a pickled one, and runs no code of it.

    Raises NotFound for none, BadInput for several and for a damaged one.
    """
    found = find(path)
    if found is None:
        raise NotFound(f"{path} holds no file of weights: expected one of {', '.join(('.safetensors', *_PICKLED))}.")
    if found.suffix in _PICKLED:
        from loreg.adapters.pickled import load_tensors

        return OneFile(found, {tensor.key: tensor for tensor in load_tensors(found)})
    header, tensors = read_tensors(found)
    return OneFile(found, {tensor.key: tensor for tensor in tensors}, header.raw, header.metadata)


def beside(path: Path, weights: OneFile) -> Beside:
    """The files of what was pushed as ``path``."""
    split = weights.header is not None
    file = DraftFile(weights.path, tuple(weights.tensors.values()) if split else (), weights.header)
    if not path.is_dir():
        return Beside((file,))
    kept, left_out = side_files(path, weights.path.name)
    return Beside((file, *kept), left_out, license_of(path / "README.md"))


def number(tensor: RawTensor) -> float:
    """The value of a tensor of one element.

    Raises BadInput for more elements and for NaN or infinity, Unsupported for a dtype of no real numbers.
    """
    if prod(tensor.shape) != 1:
        raise BadInput(f"Tensor {tensor.key!r} has shape {list(tensor.shape)}: expected a single number.")
    data = b"".join(bytes(chunk) for chunk in tensor.chunks())
    if tensor.dtype == "BF16":
        value = float(unpack("<f", b"\0\0" + data)[0])
    elif tensor.dtype in _NUMBERS:
        value = float(unpack(_NUMBERS[tensor.dtype], data)[0])
    else:
        raise Unsupported(f"Tensor {tensor.key!r} has dtype {tensor.dtype}: expected a number.")
    if not isfinite(value):
        raise BadInput(f"Tensor {tensor.key!r} is {value}: expected a finite number.")
    return value
