"""What the adapters of a merge do to each tensor of the checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

import torch

from loreg.algebra.delta import Dense
from loreg.algebra.edits import WeightedSum
from loreg.errors import BadInput
from loreg.format.module import FullTensor, Module
from loreg.merge.combining import Combining
from loreg.merge.inputs import AdapterInput, Base, read_values


@dataclass(frozen=True, slots=True)
class Part:
    """What one adapter does to one tensor: as weight or bias of the module at that path, or by replacing it by
    the tensor that it has under the name ``full``."""

    adapter: AdapterInput
    weight: str | None = None
    bias: str | None = None
    full: str | None = None

    @property
    def replacement(self) -> FullTensor | None:
        """The tensor that it replaces the base's by."""
        return None if self.full is None else self.adapter.manifest.full[self.full]

    def shapes(self) -> set[tuple[int, ...]]:
        """The shapes of the tensors that it is for: one, unless the adapter contradicts itself."""
        modules, shapes = self.adapter.manifest.modules, set()
        if self.weight is not None:
            shapes.add(modules[self.weight].shape)
        if self.bias is not None:
            shapes.add((modules[self.bias].out_features,))
        if self.replacement is not None:
            shapes.add(self.replacement.value.shape)
        return shapes

    def load(self, base: Base, view: tuple[int, ...], device: torch.device) -> WeightedSum:
        """The part as a value on ``device``, unweighted. A tensor R that replaces W adds R - W [A1], and is what the
        forms of the same adapter read: it is R that was trained upon."""
        edit, start = WeightedSum(), base
        if self.full is not None:
            R = read_values(self.adapter.full_tensor(self.full)).reshape(view).to(device)
            edit += WeightedSum(dense=(Dense(R), Dense(base(), -1.0)))

            def start() -> torch.Tensor:
                return R

        if self.weight is not None:
            edit += self.adapter.weight_edit(self.weight, start, device)
        if self.bias is not None:
            edit += self.adapter.bias_edit(self.bias, start, device)
        return edit


@dataclass(frozen=True, slots=True)
class TensorEdit:
    """Everything that happens to one tensor of the checkpoint, as names; ``load`` brings the tensors.

    ``origin``: the replacement that it all starts from instead of the base's tensor, whose shape it then has.
    """

    parts: tuple[Part, ...] = ()
    origin: Part | None = None

    def replaces(self) -> Part | None:
        """The replacement that is simply copied [A5]: the only edit, at weight 1."""
        if self.origin is not None:
            return None if self.parts else self.origin
        if len(self.parts) == 1:
            part = self.parts[0]
            if part.adapter.weight == 1 and part.full and part.weight is None and part.bias is None:
                return part
        return None

    def starting_from(self, origin: Part) -> TensorEdit:
        """The same, with the replacement of one of the parts as where it all starts."""
        rest = (replace(part, full=None) if part is origin else part for part in self.parts)
        kept = tuple(part for part in rest if part.weight or part.bias or part.full)
        return TensorEdit(kept, Part(origin.adapter, full=origin.full))

    def module(self) -> tuple[AdapterInput, str, Module] | None:
        """A module whose weight it is, if there is one."""
        for part in self.parts:
            if part.weight is not None:
                return part.adapter, part.weight, part.adapter.manifest.modules[part.weight]
        return None

    def view(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape in which the tensor is edited: a matrix, a stack of them, or a vector of any other's elements."""
        if found := self.module():
            return found[2].view
        return shape if len(shape) == 2 else (prod(shape),)

    def load(
        self, name: str, shape: tuple[int, ...], before: Base, combining: Combining, device: torch.device
    ) -> WeightedSum:
        """The edit of the tensor ``name``, of ``shape``, as a value, in the shape of ``view``.

        What has to be computed is, on ``device``. ``before``: brings what it is made from; asked only by what reads
        it.
        """
        view = self.view(shape)

        def base() -> torch.Tensor:
            return before().reshape(view).to(device)

        found = [(part.adapter, part.load(base, view, device)) for part in self.parts]
        return combining.combine(name, view, found, device)


def edits_of(adapters: Sequence[AdapterInput]) -> dict[str, TensorEdit]:
    """Checkpoint tensor → what the adapters do to it: every module and every tensor that is replaced by another.

    Tensors that the model has in common [M10]: what an adapter does to one of them it does to both, unless it unties
    them. A tensor that some adapter unties is in the result even if nothing happens to it.
    """
    untied = untied_of(adapters)
    found: dict[str, list[Part]] = {name: [] for name in untied}
    for adapter in adapters:
        own, twins = adapter.manifest.untied, {name: tie.to for name, tie in adapter.manifest.ties.items()}
        twins = {name: source for name, source in {**twins, **untied}.items() if name not in own}
        parts: dict[str, Part] = {}

        for path, module in adapter.manifest.modules.items():
            for name in _places(module.tensor, twins):
                parts[name] = replace(parts.get(name, Part(adapter)), weight=path)
            if module.bias_tensor is not None:
                parts[module.bias_tensor] = replace(parts.get(module.bias_tensor, Part(adapter)), bias=path)
        for tensor in adapter.manifest.replaced():
            for name in _places(tensor, twins):
                parts[name] = replace(parts.get(name, Part(adapter)), full=tensor)
        for name, part in parts.items():
            found.setdefault(name, []).append(part)
    return {name: TensorEdit(tuple(parts)) for name, parts in sorted(found.items())}


def _places(tensor: str, twins: Mapping[str, str]) -> list[str]:
    """A tensor and those that the model has in common with it."""
    return [tensor, *(name for name, source in twins.items() if source == tensor)]


def untied_of(adapters: Sequence[AdapterInput]) -> dict[str, str]:
    """Every tensor that an adapter unties → the one it was tied to. Raises BadInput where two adapters disagree."""
    untied: dict[str, str] = {}
    for adapter in adapters:
        for name, source in adapter.manifest.untied.items():
            if untied.setdefault(name, source) != source:
                raise BadInput(
                    f"{adapter.label} takes {name!r} as tied to {source!r}, and another adapter to {untied[name]!r}."
                )
    return untied
