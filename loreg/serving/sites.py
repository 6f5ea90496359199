"""The layers of a live model that adapters add to, unmerged, and what they add."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from loreg.algebra.delta import LowRank, concatenate
from loreg.errors import BadInput, Unsupported, UsageError
from loreg.merge.edits import edits_of
from loreg.merge.inputs import CPU, AdapterInput
from loreg.registry import Registry
from loreg.registry.inputs import adapter_input, low_rank
from loreg.serving.places import Place, Tensors
from loreg.serving.targets import Targets, check_base


@dataclass(frozen=True, slots=True, eq=False)
class Site:
    """A layer and the factors that adapters have for it, padded with zeros to one rank R, and behind them one more,
    of zeros. ``A``: (n+1, R, in), of an embedding (n+1, in, R), as rows are looked up there; ``B``: (n+1, out, R),
    the scale folded in. ``slots``: of each adapter the index of its factors, and last that of no adapter."""

    name: str
    module: torch.nn.Module
    A: Tensor
    B: Tensor
    slots: tuple[int, ...]
    embeds: bool

    def add(self, x: Tensor, output: Tensor, index: Tensor) -> Tensor:
        """``output`` + B(Ax), for each row by the factors at its ``index``. Raises UsageError if ``x`` has others."""
        count, dtype = len(index), self.B.dtype
        given = x.shape if self.embeds else x.shape[:-1]
        rows = given[0] if given else 1
        if self.embeds and given and rows == 1:  # positions, the same for all rows
            rows, x, output = count, x.expand(count, *x.shape[1:]), output.expand(count, *output.shape[1:])
        if rows % count:
            raise UsageError(
                f"{self.name!r} was given {rows} rows, and adapters are named for {count}: expected as many, or a "
                "multiple of them with the parts of each row in succession."
            )
        wide = torch.promote_types(dtype, output.dtype)  # a sum in less would round what the base gives
        with torch.autocast(x.device.type, enabled=False):
            # What is of one row lies together, be it beams, positions or both.
            if self.embeds:
                inner = self.A[index[:, None], x.reshape(count, -1)]
            else:
                inner = torch.bmm(x.reshape(count, -1, x.shape[-1]).to(dtype), self.A[index].mT)
            base = output.reshape(count, -1, output.shape[-1]).to(wide)
            # Not in place: somebody else's hook may have kept the output.
            found = torch.baddbmm(base, inner.to(wide), self.B[index].mT.to(wide))
        return found.to(output.dtype).view(output.shape)


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
    adapters = {n: adapter_input(registry, version, 1.0) for n, version in enumerate(versions) if version is not None}
    kept = tuple(adapters.values())
    wanted: dict[str, dict[int, str]] = {}
    for number, adapter in adapters.items():
        for name, path in _modules(adapter).items():
            wanted.setdefault(name, {})[number] = path
    edits = {name: edit for name, edit in edits_of(kept).items() if edit.parts}
    places = Targets(Tensors(model), kept, "linear").places(edits)
    layers = {name: _layer(model, name, places[name]) for name in wanted if name in places}
    if check == "touched":
        check_base(kept, places)
    deltas = {
        number: dict(low_rank(registry, version, CPU, version.manifest.modules))
        for number, version in enumerate(versions)
        if version is not None
    }
    found = []
    for name, layer in layers.items():
        terms = {number: deltas[number][path] for number, path in wanted[name].items()}
        labels = {number: f"{adapters[number].label}: {path!r}" for number, path in wanted[name].items()}
        found.append(_site(places[name], layer, terms, labels, dtype, len(versions)))
    return found


def _modules(adapter: AdapterInput) -> dict[str, str]:
    """Checkpoint tensor → the path of the module that adapts it. Raises Unsupported for an edit of another kind."""
    found = {}
    for name, edit in edits_of([adapter]).items():
        for part in edit.parts:
            if part.weight is None or part.full is not None or part.bias is not None:
                raise Unsupported(
                    f"{adapter.label} {'replaces' if part.full is not None else 'adapts the bias'} {name!r}, which "
                    "cannot be served beside other adapters: merge it into a model of its own."
                )
            found[name] = part.weight
    return found


@dataclass(frozen=True, slots=True)
class _Layer:
    """``turned``: the weight is (in, out), and not (out, in); so it is too where rows are looked up in it."""

    module: torch.nn.Module
    turned: bool
    embeds: bool


def _layer(model: torch.nn.Module, name: str, place: Place) -> _Layer:
    """The layer whose weight is at ``place``. Raises Unsupported for one of which it is not known what it does with
    its weight."""
    path, _, leaf = place.name.rpartition(".")
    module = model.get_submodule(path)
    kind = type(module)
    if leaf == "weight" and place.expert is None:
        if kind is torch.nn.Linear:
            return _Layer(module, turned=False, embeds=False)
        if isinstance(module, torch.nn.Embedding) and kind is torch.nn.Embedding and module.max_norm is None:
            return _Layer(module, turned=True, embeds=True)
        if (kind.__module__, kind.__name__) == ("transformers.pytorch_utils", "Conv1D"):
            return _Layer(module, turned=True, embeds=False)
    raise Unsupported(
        f"{name!r} is {place.name!r} of the model, of a {kind.__name__}, whose outputs cannot be added to: expected "
        "the weight of a torch.nn.Linear, of a torch.nn.Embedding without max_norm, or of transformers' Conv1D; "
        "merge the adapter."
    )


def _site(
    place: Place,
    layer: _Layer,
    terms: Mapping[int, tuple[LowRank, ...]],
    labels: Mapping[int, str],
    dtype: torch.dtype | None,
    count: int,
) -> Site:
    """``terms``, ``labels``: by the number of the adapter, of ``count``."""
    weight = place.weight
    stored = [factor.dtype for deltas in terms.values() for delta in deltas for factor in (delta.left, delta.right)]
    kind = dtype or reduce(torch.promote_types, stored, weight.dtype)
    pairs = {}
    for number, deltas in terms.items():
        if deltas[0].shape != place.shape:
            raise BadInput(
                f"{labels[number]} is for a weight of shape {list(deltas[0].shape)}, and the model's {place.name!r} "
                f"has {list(place.shape)}: is it the model that the adapter was trained on?"
            )
        try:
            delta = concatenate(deltas, kind)
        except BadInput as error:
            raise type(error)(f"{labels[number]} cannot be had in {kind}: {error}") from error
        delta = delta.mT if layer.turned else delta
        pairs[number] = delta.left, delta.right
    rank = max(right.shape[0] for _, right in pairs.values())
    A = torch.zeros(len(pairs) + 1, rank, pairs[min(pairs)][1].shape[1], dtype=kind)
    B = torch.zeros(len(pairs) + 1, pairs[min(pairs)][0].shape[0], rank, dtype=kind)
    slots = [len(pairs)] * (count + 1)
    for slot, (number, (left, right)) in enumerate(pairs.items()):
        A[slot, : len(right)], B[slot, :, : len(right)] = right, left
        slots[number] = slot
    A, B = (A.mT.contiguous() if layer.embeds else A).to(weight.device), B.to(weight.device)
    return Site(place.name.rpartition(".")[0], layer.module, A, B, tuple(slots), layer.embeds)
