"""Where a live model holds the tensors of a checkpoint: under another name, in a stack, or not at all.

A checkpoint's names are looked for by the tables that bind an adapter (``adapters/renames.py``, ``fusions.py``), the
other way round. What is not found one to one is refused, under its name.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from loreg.adapters import fusions, renames
from loreg.errors import BadInput, Unsupported
from loreg.layers import parts

_PLAIN = (torch.Tensor, torch.nn.Parameter)
_WRAPPERS = ("_orig_mod", "module")
"""What torch.compile and data parallelism call the model that they wrap."""


@dataclass(frozen=True, slots=True, eq=False)
class Place:
    """A tensor of the checkpoint in a live model: ``tensor``, the model's parameter or buffer of ``name``, or of
    matrix ``expert`` of it, a stack, the rows from the first of ``rows`` to before the second."""

    name: str
    tensor: torch.Tensor
    expert: int | None = None
    rows: tuple[int, int] = (0, 0)

    @property
    def weight(self) -> torch.Tensor:
        """The elements themselves, as they lie now: what is written to it, the model has."""
        whole = self.tensor.detach()
        return whole if self.expert is None else whole[self.expert, self.rows[0] : self.rows[1]]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.weight.shape)

    @property
    def span(self) -> tuple[int, int, int]:
        """Which memory it is: the storage, and the first byte in it and the one after the last."""
        weight = self.weight
        start = int(weight.storage_offset()) * weight.itemsize
        return weight.untyped_storage().data_ptr(), start, start + weight.nbytes

    def overlaps(self, other: Place) -> bool:
        (one, a, b), (two, c, d) = self.span, other.span
        return one == two and a < d and c < b

    def check(self) -> None:
        """Raises Unsupported for what is no plain memory of numbers on a CPU or CUDA device."""
        self.check_device()
        tensor, kind = self.tensor, type(self.tensor)
        if kind not in _PLAIN:
            reason = f"is a {kind.__name__}, a part of a tensor or a quantised one: expected a plain parameter"
        elif tensor.layout != torch.strided or not tensor.is_contiguous():
            reason = "is not contiguous in memory: make it so first (.contiguous())"
        else:
            return
        raise Unsupported(f"{self.name!r} of the model {reason}.")

    def check_device(self) -> None:
        """Raises Unsupported for another device than a CPU or CUDA's."""
        if self.tensor.device.type not in ("cpu", "cuda"):
            raise Unsupported(
                f"{self.name!r} of the model is on the device {self.tensor.device}, and 'cpu' or 'cuda' is expected: "
                "load the weights first."
            )


def config_of(model: torch.nn.Module) -> dict[str, Any]:
    """What transformers has in config.json of the model, {} of another. Raises Unsupported if it is quantised."""
    for wrapper in _WRAPPERS:
        model = getattr(model, wrapper, model)
    config: Any = getattr(model, "config", None)
    found = config.to_dict() if hasattr(config, "to_dict") else config
    if not isinstance(found, dict):
        return {}
    if found.get("quantization_config"):
        raise Unsupported("The model is quantised, and merging needs plain numbers: load its 16-bit form.")
    # As a file would have it; and of the model that there is, not of the one that the checkpoint was saved from.
    stored: dict[str, Any] = json.loads(json.dumps(found, default=str))
    return {**stored, "architectures": [type(model).__name__]}


def tensors_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter and buffer by its name; one that the model has twice, under both."""
    return {
        **dict(model.named_buffers(remove_duplicate=False)),
        **dict(model.named_parameters(remove_duplicate=False)),
    }


Layout = dict[str, tuple[object, ...]]


def layout_of(model: torch.nn.Module) -> Layout:
    """Which tensors the model has, where they lie, and how: another one where something was put in a tensor's place,
    moved, converted or tied."""
    return {name: (id(tensor), *lie(tensor)) for name, tensor in tensors_of(model).items()}


def lie(tensor: torch.Tensor) -> tuple[object, ...]:
    """Where it is in memory, and how."""
    if type(tensor) not in _PLAIN or tensor.layout != torch.strided:
        return (type(tensor),)
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


class Tensors:
    """The parameters and buffers of a model, by the names that a checkpoint has for them."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.config = config_of(model)
        self.tensors = tensors_of(model)
        self._known = renames.Known(self.tensors, self.config)

    def find(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Place]:
        """Checkpoint tensor → its place; ``shapes``: those that it has there, () where that is not known. What the
        model does not have is left out.

        Raises BadInput where a name fits in two ways, or two names the same place; Unsupported for a stack that the
        checkpoint stores transposed.
        """
        found = {
            name: Place(there, self.tensors[there]) for name, there in self._known.resolve(sorted(shapes)).items()
        }
        found |= self._in_stacks({name: shape for name, shape in shapes.items() if name not in found})
        taken: dict[tuple[str, int | None, tuple[int, int]], str] = {}
        for name, place in found.items():
            if (other := taken.setdefault((place.name, place.expert, place.rows), name)) != name:
                raise BadInput(f"{name!r} and {other!r} would both be {place.name!r} of the model: expected one.")
            if len(shapes[name]) == 3 and self._turns:
                raise Unsupported(
                    f"{name!r} is a stack that this model holds transposed in memory, which is not handled: merge "
                    "the checkpoint, and load that."
                )
        return found

    @property
    def _turns(self) -> bool:
        kinds = {part.get("model_type") for part in parts(self.config)}
        return not kinds.isdisjoint(fusions.TURNED_ON_DISK)

    def sharing(self, place: Place) -> Iterator[Place]:
        """What else of the model is in the same memory, by its other names."""
        for other in self._by_storage[place.span[0]]:
            if other.name != place.name and place.overlaps(other):
                yield other

    @cached_property
    def _by_storage(self) -> dict[int, list[Place]]:
        found: dict[int, list[Place]] = {}
        for name, tensor in self.tensors.items():
            if type(tensor) in _PLAIN and tensor.device.type != "meta":
                place = Place(name, tensor)
                found.setdefault(place.span[0], []).append(place)
        return found

    def _in_stacks(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Place]:
        """Layers of single experts that the model holds as parts of one stack."""
        sites = [(name, site) for name, shape in shapes.items() if shape for site in fusions.in_stack(name)]
        stacks = self._known.resolve(sorted({site.stack for _, site in sites}))
        found: dict[str, Place] = {}
        for name, site in sites:
            stack, (rows, *rest) = self.tensors.get(stacks.get(site.stack, "")), shapes[name]
            fits = stack is not None and tuple(stack.shape[1:]) == (site.pieces * rows, *rest)
            if stack is not None and fits and site.expert < len(stack):
                first = site.piece * rows
                found[name] = Place(stacks[site.stack], stack, site.expert, (first, first + rows))
        return found
