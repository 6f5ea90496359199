"""Tensors that PEFT saves whole: trained modules, biases, and the embeddings that it keeps beside a LoRA.

A module of ``modules_to_save`` is trained as a copy and saved under its own name. Where ``bias`` is "all" or the
embeddings were resized, PEFT (0.21, ``utils/save_and_load.py``) saves it again under the names that it has inside its
wrapper, beside the base's own tensors, which the model does not use then.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from loreg.adapters.draft import RawTensor
from loreg.adapters.peft.contents import Config
from loreg.errors import BadInput

# Of a batch norm: how many batches it has seen, as one number.
_COUNTER = ".num_batches_tracked"
_WHOLE_NUMBERS = frozenset({"BOOL", "U8", "I8", "I16", "I32", "I64"})

_ORIGINAL, _COPY = ".original_module.", ".modules_to_save."


@dataclass(frozen=True, slots=True)
class Saved:
    """``full`` and ``together`` as in ``Contents``."""

    full: Mapping[str, RawTensor]
    together: frozenset[str]


def read(tensors: Mapping[str, RawTensor], config: Config) -> Saved:
    """``tensors``: by name without PEFT's prefix, all that are no part of an adapted module.

    A tensor that no saved module owns is the base's own, as it was when the adapter was trained: resized, perhaps.
    Where the model ties it, it is so in both places. Raises BadInput where two tensors have one meaning.
    """
    full: dict[str, RawTensor] = {}
    wrapped: dict[str, RawTensor] = {}
    for name, tensor in tensors.items():
        if _ORIGINAL in name or _COPY in name:
            wrapped[name] = tensor
            continue
        plain = unwrapped(name)
        if plain in full:
            raise BadInput(f"Tensors {full[plain].key!r} and {tensor.key!r} both mean {plain!r}: expected one.")
        full[plain] = tensor
    for name, tensor in wrapped.items():
        _check_spare(name, tensor, full)
    modules: Collection[str] = config.get("modules_to_save") or ()  # a list of names: ``read_config`` has seen to it
    together = {tensor.key for name, tensor in full.items() if not _is_owned(name, modules)}
    return Saved(full, frozenset(together))


def check_values(tensors: Iterable[RawTensor], whole: Saved) -> None:
    """Raises what ``RawTensor.check_finite`` does, but for buffers of whole numbers in modules that are saved whole:
    these replace the base's byte for byte, and nothing is computed with them."""
    buffers = {tensor.key for name, tensor in whole.full.items() if not name.endswith((".weight", ".bias"))}
    buffers -= whole.together
    for tensor in tensors:
        if tensor.dtype not in _WHOLE_NUMBERS or tensor.key not in buffers:
            tensor.check_finite()


def is_counter(tensor: RawTensor) -> bool:
    """Whether it is a number, of a batch norm, that may have no dimensions."""
    return tensor.key.endswith(_COUNTER) and tensor.dtype == "I64"


def unwrapped(name: str) -> str:
    """A tensor's name in the model, without the layers that PEFT puts around a module."""
    return re.sub(r"(?:\.token_adapter)?(?:\.base_layer)+\.", ".", name)


def _check_spare(name: str, tensor: RawTensor, full: Mapping[str, RawTensor]) -> None:
    """BadInput unless the trained tensor is there too, by its own name; and is the same if this is another copy."""
    if _ORIGINAL in name:
        if name.replace(_ORIGINAL, ".") not in full:
            raise BadInput(
                f"Tensor {tensor.key!r} is the base's, which modules_to_save has replaced, and no tensor replaces "
                "it: save the adapter again."
            )
        return
    module, _, rest = name.partition(_COPY)
    # The adapter's name stands between, unless PEFT took it out.
    named = (f"{module}.{rest}", f"{module}.{rest.partition('.')[2]}")
    if not any(other in full and full[other].same_as(tensor) for other in named):
        raise BadInput(
            f"Tensor {tensor.key!r} is not the same as {named[0]!r}, of which it is a copy: save it again."
        )


def _is_owned(name: str, modules: Collection[str]) -> bool:
    """Whether the tensor is of a module that is saved whole, by the ends of names that PEFT compares."""
    return any(f"{module}." in name for module in modules)
