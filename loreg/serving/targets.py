"""What a merge does to which parameters of a live model; and what can be refused, before one is touched."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from loreg.adapters import models
from loreg.algebra.rounding import STORAGE_DTYPES, bits
from loreg.digest import Digest, Hasher
from loreg.errors import BadInput, BaseMismatch, Unsupported
from loreg.format.fingerprint import BaseTensor
from loreg.format.manifest import AdapterManifest
from loreg.format.methods import METHODS
from loreg.merge.edits import TensorEdit, edits_of, untied_of
from loreg.merge.inputs import AdapterInput
from loreg.serving.places import Place, Tensors
from loreg.tensors import NAMES, to_memory


@dataclass(frozen=True, slots=True, eq=False)
class Target:
    """A tensor of the checkpoint, where the model has it, and what is done to it."""

    name: str
    place: Place
    edit: TensorEdit


@dataclass(frozen=True, slots=True)
class Targets:
    """All of a merge by ``method``, and everything that its ``adapters`` name, by the names of the checkpoint."""

    live: Tensors
    adapters: tuple[AdapterInput, ...]
    method: str

    def all(self) -> list[Target]:
        """The largest first, for the threads. Raises BadInput, Unsupported naming what the model cannot be given."""
        edits = {name: edit for name, edit in edits_of(self.adapters).items() if edit.parts}
        places = self.places(edits)
        self._refuse_untying(places, edits)
        targets: dict[tuple[int, int, int], Target] = {}
        for name, edit in edits.items():
            if name in places:
                target = Target(name, places[name], edit)
                self._check(target, places)
                targets.setdefault(target.place.span, target)  # what is one tensor is edited once
        return sorted(targets.values(), key=lambda target: -target.place.weight.numel())

    def places(self, edits: Mapping[str, TensorEdit]) -> dict[str, Place]:
        """Of every tensor that is edited, or that an adapter knows of its base."""
        shapes: dict[str, tuple[int, ...]] = {}
        for adapter in self.adapters:
            shapes |= dict.fromkeys({*adapter.manifest.base.touched, *adapter.manifest.ties}, ())
        shapes |= {name: _shape(name, edit) for name, edit in edits.items()}
        found = self.live.find(shapes)
        follows = {name for a in self.adapters for name, tie in a.manifest.ties.items() if not tie.untied}
        for name in sorted(shapes.keys() - found.keys()):
            if name not in follows:  # a head that is its embedding follows it
                raise self._missing(name)
        return found

    def _missing(self, name: str) -> BadInput:
        label = next(
            a.label for a in self.adapters if name in {*a.manifest.base.touched, *a.manifest.ties, *a.manifest.full}
        )
        return BadInput(
            f"{label} has {name!r}, and the model has no such parameter (it has {len(self.live.tensors)} tensors, "
            f"such as {min(self.live.tensors, default='none')!r}), whole or as part of a stack: load the model that "
            "the adapter was trained on, without wrappers that rename, join or shard its parameters."
        )

    def _refuse_untying(self, places: Mapping[str, Place], edits: Mapping[str, TensorEdit]) -> None:
        for name, source in untied_of(self.adapters).items():
            here = name in places and source in places and places[name].overlaps(places[source])
            if here and _content(edits.get(name)) != _content(edits.get(source)):
                raise Unsupported(
                    f"The adapters change {name!r} and {source!r} each on its own, and the model has one parameter "
                    "for both: a live model is not untied; merge the checkpoint, which then stores both, and load it."
                )

    def _check(self, target: Target, places: Mapping[str, Place]) -> None:
        name, place, edit = target.name, target.place, target.edit
        place.check()
        shape, replaced = place.shape, any(part.replacement is not None for part in edit.parts)
        for part in edit.parts:
            if wrong := sorted(part.shapes() - {shape}):
                text = (
                    f"{part.adapter.label} expects {name!r} of shape {list(wrong[0])}, and the model's {place.name!r}"
                )
                if replaced:
                    raise Unsupported(f"{text} has {list(shape)}: a live model is not resized; merge the checkpoint.")
                raise BadInput(f"{text} has {list(shape)}: is it the model that the adapter was trained on?")
            if part.weight and part.adapter.manifest.modules[part.weight].view != edit.view(shape):
                raise BadInput(f"{part.adapter.label} takes {name!r} for another kind of layer than the others do.")
        copied = edit.replaces() if METHODS[self.method].keeps_terms else None
        if copied is None and any(name not in part.adapter.manifest.base.touched for part in edit.parts):
            twins = {twin for part in edit.parts for twin in part.adapter.manifest.ties}
            if name not in twins:
                raise Unsupported(f"{name!r} is new to the base: only one adapter, at weight 1, can add it.")
        if not _takes(target, copied is not None):
            raise Unsupported(
                f"{place.name!r} of the model is {place.tensor.dtype}: merging handles "
                f"{', '.join(str(dtype).removeprefix('torch.') for dtype in STORAGE_DTYPES)}."
            )
        self._check_shared(target, places)

    def _check_shared(self, target: Target, places: Mapping[str, Place]) -> None:
        """Nothing else may be in the same memory, but what each adapter knows to be the same tensor."""
        name, place = target.name, target.place
        known = [set(_tied(part.adapter, name)) for part in target.edit.parts]
        for other in self.live.sharing(place):
            same = [any(n in places and places[n].name == other.name for n in names) for names in known]
            if not all(same) or other.span != place.span:
                raise Unsupported(
                    f"{place.name!r} and {other.name!r} are one parameter of the model, of which the adapters know "
                    f"one ({name!r}): give each its own before (tie_word_embeddings, for a head and its embedding)."
                )
        module = target.edit.module()
        embedding = module is not None and module[2].kind == "embedding"
        if all(known) or not self.live.config:
            return
        if models.shares(self.live.config, name, place.shape, embedding):
            raise Unsupported(
                f"{name!r} has a row for each word, and this model may use it twice, as embedding and as head "
                "(tie_word_embeddings), in a way that loreg does not know: untie it in the base first."
            )


def _shape(name: str, edit: TensorEdit) -> tuple[int, ...]:
    """Of a tensor that is edited, as the adapters have it."""
    shapes = sorted({shape for part in edit.parts for shape in part.shapes()})
    if len(shapes) != 1:
        raise BadInput(f"The adapters take {name!r} for tensors of different shapes: {', '.join(map(str, shapes))}.")
    return shapes[0]


def _content(edit: TensorEdit | None) -> list[tuple[object, ...]]:
    """What an edit does, whatever the tensor is called."""
    return [
        (
            part.adapter.digest,
            part.adapter.weight,
            part.weight,
            part.bias,
            part.replacement and part.replacement.value,
        )
        for part in (edit.parts if edit is not None else ())
    ]


def _takes(target: Target, copied: bool) -> bool:
    """Whether the parameter can have the values of its edit; what is only copied may be of any dtype, its own."""
    if target.place.tensor.dtype in STORAGE_DTYPES:
        return True
    part = target.edit.replaces()
    dtype = NAMES.get(target.place.tensor.dtype)
    return copied and part is not None and part.replacement is not None and part.replacement.value.dtype == dtype


def _tied(adapter: AdapterInput, name: str) -> Iterator[str]:
    """The names of all that the adapter knows to be one tensor with ``name``; none if it knows of no tie."""
    ties = {twin: tie.to for twin, tie in adapter.manifest.ties.items()}
    source = ties.get(name, name)
    twins = [twin for twin, to in ties.items() if to == source]
    if twins:
        yield from (source, *twins)


def check_base(adapters: Sequence[AdapterInput], places: Mapping[str, Place]) -> None:
    """Raises BaseMismatch unless every tensor that an adapter knows of its base has, in the model, that base's bytes.

    A parameter of a wider dtype than the base's is as good, if its values are those of the narrower one. Reads each
    once; those on a CUDA device are copied to the host for it.
    """
    leaves: dict[str, Leaves] = {}
    for adapter in adapters:
        if found := differing(adapter.manifest, places, leaves):
            raise mismatch(adapter, [places[name].name if name in places else name for name in found])


def differing(
    manifest: AdapterManifest, places: Mapping[str, Place], leaves: dict[str, Leaves] | None = None
) -> list[str]:
    """Of the tensors that the version knows of its base, those that are elsewhere other ones, or nowhere, in order.
    ``leaves``: what is known already of those in the model."""
    known = leaves if leaves is not None else {}
    follows = {name for name, tie in manifest.ties.items() if not tie.untied}  # what it is tied to tells
    found = []
    for name, leaf in sorted(manifest.base.touched.items()):
        if name in places:
            if not known.setdefault(name, Leaves(name, places[name])).has(leaf):
                found.append(name)
        elif name not in follows:
            found.append(name)
    return found


def mismatch(adapter: AdapterInput, names: Sequence[str]) -> BaseMismatch:
    """Of which the model has other bytes than the adapter's base, or nothing."""
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return BaseMismatch(
        f"{adapter.label} was trained on {adapter.manifest.base.name!r}, and the model differs from it in "
        f"{len(names)} of the {len(adapter.manifest.base.touched)} tensors that it adapts: {shown}. Load that base, "
        "in its own dtype or a wider one, with nothing merged into it; or give check='none', if it is to be another."
    )


class Leaves:
    """The leaves [B1] that a tensor of the model has: in its own dtype, and in those that hold its values exactly."""

    def __init__(self, name: str, place: Place) -> None:
        self._name, self._place = name, place
        self._known: list[Digest] = []
        self._rest = self._all()

    @property
    def own(self) -> Digest:
        """The one in its own dtype, as it was when it was asked for first."""
        if not self._known:
            self._known.append(next(self._rest))
        return self._known[0]

    def has(self, leaf: Digest) -> bool:
        """Looks no further than it has to."""
        while leaf not in self._known:
            found = next(self._rest, None)
            if found is None:
                return False
            self._known.append(found)
        return True

    def _all(self) -> Iterator[Digest]:
        weight = self._place.weight
        yield self._leaf(weight)
        narrower = [dtype for dtype in STORAGE_DTYPES if dtype.itemsize < weight.itemsize]
        for dtype in narrower if weight.dtype in STORAGE_DTYPES else ():
            narrow = weight.to(dtype)
            if torch.equal(bits(narrow.to(weight.dtype)), bits(weight)):
                yield self._leaf(narrow)

    def _leaf(self, tensor: torch.Tensor) -> Digest:
        hasher = Hasher(threads=Hasher.ALL)
        raw = to_memory(tensor.cpu().contiguous())
        hasher.update(raw)
        dtype = NAMES.get(tensor.dtype, str(tensor.dtype))
        return BaseTensor(self._name, dtype, tuple(tensor.shape), len(raw), hasher.digest()).leaf
