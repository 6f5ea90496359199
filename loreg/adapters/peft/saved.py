"""Tensors that PEFT saves whole: trained modules, biases, and the embeddings that it keeps beside a LoRA.

A module of ``modules_to_save`` is trained as a copy and saved under its own name. Where ``bias`` is "all" or the
embeddings were resized, PEFT (0.21, ``utils/save_and_load.py``) saves it again under the names that it has inside its
wrapper, beside the base's own tensors, which the model does not use then.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from loreg.adapters.draft import RawTensor
from loreg.adapters.peft.contents import Config
from loreg.errors import BadInput

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
    modules = [str(name) for name in config.get("modules_to_save") or ()]
    together = {tensor.key for name, tensor in full.items() if not _is_owned(name, modules)}
    return Saved(full, frozenset(together))


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
    parts = name.split(".")
    return any(".".join(parts[:end]).endswith(module) for end in range(1, len(parts)) for module in modules)
