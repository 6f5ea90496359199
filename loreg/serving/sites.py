"""The layers of a live model that adapters add to, unmerged, and what they add."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import reduce

import torch
from torch import Tensor

from loreg.algebra.beside import Beside
from loreg.algebra.delta import concatenate
from loreg.algebra.densify import dense_delta
from loreg.algebra.rounding import finite, round_to
from loreg.errors import BadInput, Conflict, Unsupported, UsageError
from loreg.format.module import IN_OUT
from loreg.format.terms import FormTerm
from loreg.merge.edits import Part, edits_of
from loreg.merge.inputs import CPU, AdapterInput
from loreg.registry import Registry
from loreg.registry.inputs import adapter_input, verified
from loreg.serving.live import state_of
from loreg.serving.places import Place, Tensors, lie
from loreg.serving.targets import Targets, check_base
from loreg.tensors import TORCH


@dataclass(frozen=True, slots=True, eq=False)
class Chosen:
    """What serves each of ``count`` rows at a site. ``index``: (count,), of its factors. ``bent``: of the rows whose
    outputs are scaled or shifted, their numbers, on the same device; None where there are none."""

    count: int
    index: Tensor
    bent: Tensor | None


@dataclass(frozen=True, slots=True, eq=False)
class Site:
    """A layer, and what adapters add to its outputs: y + B(Ax), and for some of them factor∘y + shift + B(Ax).

    The factors are padded with zeros to one rank R, and behind them is one more, of zeros. ``A``: (n+1, R, in), of an
    embedding (n+1, in, R), as rows are looked up there; ``B``: (n+1, out, R), the scale folded in. ``factor`` and
    ``shift``: (n+1, out), of those that ``bends`` has, the others' 1 and 0. ``slots``: of each adapter the index of
    its factors, and last that of no adapter. ``reads``: what was computed from."""

    name: str
    module: torch.nn.Module
    A: Tensor
    B: Tensor
    factor: Tensor
    shift: Tensor
    bends: frozenset[int]
    slots: tuple[int, ...]
    embeds: bool
    scales: bool
    reads: tuple[Read, ...]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (self.A, self.B, self.factor, self.shift))

    def choose(self, adapters: Sequence[int]) -> Chosen | None:
        """For rows by these adapters, -1 for none. None where it adds nothing to any of them."""
        slots = [self.slots[adapter] for adapter in adapters]
        if all(slot == self.slots[-1] for slot in slots):
            return None
        bent = [row for row, slot in enumerate(slots) if slot in self.bends]
        index, *rest = (torch.tensor(given, device=self.A.device) for given in (slots, bent) if given)
        return Chosen(len(slots), index, *rest or (None,))

    def check(self) -> None:
        """Raises Conflict if what it was computed from is another by now."""
        for read in self.reads:
            if not read.holds:
                raise Conflict(
                    f"{self.name}.{read.leaf} was changed since what the adapters add was computed from it (norms of "
                    "DoRA, or a trained bias in its place): have serving.unmerged load them again, for the model as "
                    "it is, or bring back what was there."
                )

    def add(self, x: Tensor, output: Tensor, rows: Chosen) -> Tensor:
        """``output`` and what is added to it, for each row by what is chosen. Raises UsageError if ``x`` has other
        rows, or is elsewhere, and what ``check`` does."""
        if rows.bent is not None:
            self.check()
        count, dtype = rows.count, self.B.dtype
        if x.device != self.A.device:
            raise UsageError(
                f"{self.name!r} was given inputs on {x.device}, and its factors are on {self.A.device}: have "
                "serving.unmerged load them again, for the model where it is."
            )
        given = x.shape if self.embeds else x.shape[:-1]
        height = given[0] if given else 1
        if self.embeds and given and height == 1:  # positions, the same for all rows
            height, x, output = count, x.expand(count, *x.shape[1:]), output.expand(count, *output.shape[1:])
        if height % count:
            raise UsageError(
                f"{self.name!r} was given {height} rows, and adapters are named for {count}: expected as many, or a "
                "multiple of them with the parts of each row in succession."
            )
        with torch.autocast(x.device.type, enabled=False):
            # What is of one row lies together, be it beams, positions or both.
            if self.embeds:
                inner = self.A[rows.index[:, None], x.reshape(count, -1)]
            else:
                inner = torch.bmm(x.reshape(count, -1, x.shape[-1]).to(dtype), self.A[rows.index].mT)
            base = output.reshape(count, -1, output.shape[-1])
            if rows.bent is None:
                found = self._added(base, inner, rows.index)
            elif len(rows.bent) == count:
                found = self._bent(base, inner, rows.index)
            else:
                # The rows beside these are what they would be without them, to the bit.
                found = self._added(base, inner, rows.index)
                some = (tensor.index_select(0, rows.bent) for tensor in (base, inner, rows.index))
                found = found.index_copy_(0, rows.bent, self._bent(*some))
        return found.view(output.shape)

    def _added(self, base: Tensor, inner: Tensor, index: Tensor) -> Tensor:
        wide = torch.promote_types(self.B.dtype, base.dtype)  # a sum in less would round what the base gives
        # Not in place: somebody else's hook may have kept the output.
        return torch.baddbmm(base.to(wide), inner.to(wide), self.B[index].mT.to(wide)).to(base.dtype)

    def _bent(self, base: Tensor, inner: Tensor, index: Tensor) -> Tensor:
        wide = torch.promote_types(self.factor.dtype, base.dtype)
        factor, shift = (tensor[index][:, None].to(wide) for tensor in (self.factor, self.shift))
        moved = torch.addcmul(shift, base.to(wide), factor)
        return torch.baddbmm(moved, inner.to(wide), self.B[index].mT.to(wide)).to(base.dtype)


@dataclass(frozen=True, slots=True, eq=False)
class Read:
    """A parameter whose values were read, and what it was then."""

    module: torch.nn.Module
    leaf: str
    tensor: Tensor
    state: tuple[object, ...]

    @classmethod
    def of(cls, module: torch.nn.Module, leaf: str) -> Read:
        tensor = getattr(module, leaf)
        return cls(module, leaf, tensor, _state(tensor))

    @property
    def holds(self) -> bool:
        """Whether it is what it was, as far as torch counts changes."""
        tensor = getattr(self.module, self.leaf, None)
        return tensor is self.tensor and _state(self.tensor) == self.state


def _state(tensor: Tensor) -> tuple[object, ...]:
    return *lie(tensor), *state_of(tensor)


def sites(
    model: torch.nn.Module,
    references: Sequence[str | None],
    registry: Registry,
    *,
    check: str,
    dtype: torch.dtype | None,
) -> list[Site]:
    """The layers that any of the adapters adapts. See ``unmerged``."""
    versions = [None if reference is None else registry.resolve(reference) for reference in references]
    adapters = {
        number: verified(adapter_input(registry, version, 1.0), CPU)
        for number, version in enumerate(versions)
        if version is not None
    }
    kept = tuple(adapters.values())
    parts = {number: _parts(adapter) for number, adapter in adapters.items()}
    edits = {name: edit for name, edit in edits_of(kept).items() if edit.parts}
    places = Targets(Tensors(model), kept, "linear").places(edits)
    layers: dict[str, _Layer] = {}
    for name in dict.fromkeys(name for found in parts.values() for name in found):
        if name in places:
            place = places[name]
            layer = layers.setdefault(place.name.rpartition(".")[0], _layer(model, name, place))
            for number, found in parts.items():
                if name in found:
                    layer.take(number, name, found[name], place)
    if check == "touched":
        check_base(kept, places)
    made = [_site(path, layer, dtype, len(versions)) for path, layer in layers.items()]
    for adapter in kept:
        adapter.check_unchanged()
    return made


def _parts(adapter: AdapterInput) -> dict[str, Part]:
    """Checkpoint tensor → what the adapter does to it. Raises Unsupported for a weight that is replaced."""
    found = {}
    for name, edit in edits_of([adapter]).items():
        for part in edit.parts:
            if part.full is not None and not name.endswith(".bias"):
                raise Unsupported(
                    f"{adapter.label} replaces {name!r}, which cannot be served beside other adapters: merge it into "
                    "a model of its own."
                )
            found[name] = part
    return found


@dataclass(slots=True)
class _Layer:
    """A module whose outputs can be added to, and what the adapters do to its weight and bias: of each its place,
    and by the number of an adapter its part.

    ``size``: (out, in). ``turned``: the weight is (in, out); so it is too where rows are looked up in it."""

    module: torch.nn.Module
    size: tuple[int, int]
    turned: bool = False
    embeds: bool = False
    weights: dict[int, Part] = field(default_factory=dict)
    biases: dict[int, Part] = field(default_factory=dict)
    places: dict[str, Place] = field(default_factory=dict)

    def take(self, number: int, name: str, part: Part, place: Place) -> None:
        """Takes what an adapter does to one of the two. Raises BadInput for another shape than it has."""
        if wrong := sorted(part.shapes() - {place.shape}):
            what = f"{part.weight!r} is for a weight" if part.weight is not None else f"{name!r} is for a bias"
            raise BadInput(
                f"{part.adapter.label}: {what} of shape {list(wrong[0])}, and the model's {place.name!r} has "
                f"{list(place.shape)}: is it the model that the adapter was trained on?"
            )
        place.check_device()
        leaf = place.name.rpartition(".")[2]
        self.places[leaf] = place
        (self.weights if leaf == "weight" else self.biases)[number] = part

    @property
    def parameter(self) -> Tensor:
        """One that it has, and that is adapted."""
        return next(iter(self.places.values())).weight

    def label(self, number: int) -> str:
        """What an adapter adds here, for messages."""
        part = self.weights.get(number) or self.biases[number]
        return f"{part.adapter.label}: {part.weight or part.bias or part.full!r}"


def _layer(model: torch.nn.Module, name: str, place: Place) -> _Layer:
    """The layer whose weight or bias is at ``place``. Raises Unsupported for one of which it is not known what it
    does with it."""
    path, _, leaf = place.name.rpartition(".")
    module = model.get_submodule(path)
    kind = type(module)
    if leaf in ("weight", "bias") and place.expert is None:
        if isinstance(module, torch.nn.Linear) and kind is torch.nn.Linear:
            return _Layer(module, (module.out_features, module.in_features))
        if isinstance(module, torch.nn.Embedding) and kind is torch.nn.Embedding and module.max_norm is None:
            return _Layer(module, (module.embedding_dim, module.num_embeddings), turned=True, embeds=True)
        if (kind.__module__, kind.__name__) == ("transformers.pytorch_utils", "Conv1D"):
            return _Layer(module, (module.weight.shape[1], module.weight.shape[0]), turned=True)  # type: ignore
        if isinstance(module, torch.nn.LayerNorm) and kind is torch.nn.LayerNorm and leaf == "bias":
            size = module.normalized_shape
            if len(size) == 1:
                return _Layer(module, (size[0], size[0]))
    raise Unsupported(
        f"{name!r} is {place.name!r} of the model, of a {kind.__name__}, whose outputs cannot be added to: expected "
        "the weight or bias of a torch.nn.Linear, of a torch.nn.Embedding without max_norm, or of transformers' "
        "Conv1D, or the bias of a torch.nn.LayerNorm of one dimension; merge the adapter."
    )


class _Values:
    """The parameters of a layer, of which it is remembered which were read."""

    def __init__(self, path: str, layer: _Layer) -> None:
        self._path, self._layer = path, layer
        self.reads: dict[str, Read] = {}

    def weight(self) -> Tensor:
        return self._read("weight")

    def bias(self) -> Tensor:
        return self._read("bias")

    def own_bias(self) -> Tensor | None:
        return None if getattr(self._layer.module, "bias", None) is None else self._read("bias")

    def _read(self, leaf: str) -> Tensor:
        read = self.reads.setdefault(leaf, Read.of(self._layer.module, leaf))
        Place(f"{self._path}.{leaf}", read.tensor).check()
        return read.tensor.detach()


@dataclass(frozen=True, slots=True, eq=False)
class _Addition:
    """What one adapter adds at a layer, on its device. ``left`` (out, R) and ``right`` (R, in), of the dtype of the
    factors; ``factor`` and ``shift`` (out,), float64; each None where there is none."""

    left: Tensor | None
    right: Tensor | None
    factor: Tensor | None
    shift: Tensor | None


def _site(path: str, layer: _Layer, dtype: torch.dtype | None, count: int) -> Site:
    """``count``: of the references."""
    values = _Values(path, layer)
    device, own = layer.parameter.device, layer.parameter.dtype
    kind = dtype or reduce(torch.promote_types, _stored(layer.weights.values()), own)
    added = {number: _addition(number, layer, values, kind) for number in sorted({*layer.weights, *layer.biases})}
    rank = max(0 if one.right is None else len(one.right) for one in added.values())
    (out, into), n = layer.size, len(added)
    A = torch.zeros(n + 1, rank, into, dtype=kind, device=device)
    B = torch.zeros(n + 1, out, rank, dtype=kind, device=device)
    bends = frozenset(
        slot for slot, one in enumerate(added.values()) if one.factor is not None or one.shift is not None
    )
    # Of all outputs, so not in less than float32; and no numbers where no adapter has any.
    height, wide = n + 1 if bends else 0, torch.promote_types(kind, torch.float32)
    factor = torch.ones(height, out, dtype=wide, device=device)
    shift = torch.zeros(height, out, dtype=wide, device=device)
    slots = [n] * (count + 1)
    for slot, (number, one) in enumerate(added.items()):
        slots[number] = slot
        if one.left is not None and one.right is not None:
            A[slot, : len(one.right)], B[slot, :, : len(one.right)] = one.right, one.left
        for whole, value in ((factor, one.factor), (shift, one.shift)):
            if value is not None:
                whole[slot] = _rounded(value, wide, f"{layer.label(number)} cannot be had in {wide}")
    return Site(
        path, layer.module, A.mT.contiguous() if layer.embeds else A, B, factor, shift, bends, tuple(slots),
        layer.embeds, any(one.factor is not None for one in added.values()), tuple(values.reads.values()),
    )  # fmt: skip


def _addition(number: int, layer: _Layer, values: _Values, kind: torch.dtype) -> _Addition:
    device = layer.parameter.device
    beside, shift = Beside(), None
    if (part := layer.weights.get(number)) is not None:
        beside = _beside(part, layer, values)
    if (part := layer.biases.get(number)) is not None:
        shift = dense_delta(part.load(values.bias, layer.size[:1], device))
    if beside.gain is not None and (bias := values.own_bias()) is not None:
        # The outputs have it in them, and it is not scaled.
        taken = -beside.gain * bias.double()
        shift = taken if shift is None else shift + taken
    factor = None if beside.gain is None else 1 + beside.gain
    if not beside.low_rank:
        return _Addition(None, None, factor, shift)
    try:
        delta = concatenate(beside.low_rank, kind)
    except BadInput as error:
        raise type(error)(f"{layer.label(number)} cannot be had in {kind}: {error}") from error
    return _Addition(delta.left, delta.right, factor, shift)


def _beside(part: Part, layer: _Layer, values: _Values) -> Beside:
    """What an adapter adds to the outputs of a layer by its weight, (out, in) as the layer has it."""
    assert part.weight is not None
    adapter = part.adapter
    beside = adapter.beside(part.weight, values.weight, layer.parameter.device)
    if (adapter.manifest.modules[part.weight].orientation == IN_OUT) == layer.turned:
        return beside
    if beside.gain is not None:  # of the other of two layers that have one weight
        raise Unsupported(
            f"{adapter.label} scales the outputs of {part.weight!r} (DoRA), and so the inputs of "
            f"{layer.places['weight'].name!r}, which is the same tensor: that cannot be served beside other "
            "adapters; merge it into a model of its own."
        )
    return beside.mT


def _rounded(value: Tensor, dtype: torch.dtype, what: str) -> Tensor:
    made = value if dtype == torch.float64 else round_to(value, dtype)
    if not bool(finite(made).all()):
        raise BadInput(f"{what}: a number is too large for it, NaN or infinity.")
    return made


def _stored(parts: Iterable[Part]) -> list[torch.dtype]:
    """Of the factors, as they are stored."""
    return [
        TORCH[tensor.dtype]
        for part in parts
        if part.weight is not None
        for term in part.adapter.manifest.modules[part.weight].terms
        for tensor in (term.tensors.values() if isinstance(term, FormTerm) else (term.A, term.B))
    ]
