"""``merge_`` and ``unmerge_``: a merge in the memory of a live model, in place, and the way back bit for bit.

    merged = serving.merge_(model, "0.7*sql + 0.3*humor")
    serving.unmerge_(model, merged)

The parameters are then, byte for byte, what ``Registry.merge`` writes for the same expression. What undoes it is an
integer for about one element in a hundred, and no copy of the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch.utils.weak import WeakIdKeyDictionary

from loreg.errors import Conflict, Unsupported, UsageError
from loreg.format import methods
from loreg.merge.combining import Combining
from loreg.merge.inputs import AdapterInput, in_recipe_order
from loreg.registry import Registry
from loreg.registry.inputs import resolve_terms
from loreg.serving import merging, swapping
from loreg.serving.applying import Edit, Editing
from loreg.serving.defaults import default_registry
from loreg.serving.merging import Ahead
from loreg.serving.places import Place, Tensors, tensors_of
from loreg.serving.targets import Targets, check_base

Check = Literal["touched", "none"]
State = tuple[int | None, torch.dtype]


def merge_(
    model: torch.nn.Module,
    expression: str,
    registry: Registry | None = None,
    *,
    method: str = "linear",
    parameters: Mapping[str, Any] | None = None,
    check: Check = "touched",
    threads: int | None = None,
) -> Merged:
    """W' = round(W + Σ wᵢΔWᵢ) for every parameter of ``model`` that the adapters of ``expression`` name, in place.

    ``model``: any ``torch.nn.Module`` whose parameters are plain ones on CPU or CUDA devices, in float32, bfloat16,
    float16 or float8, under the names of its checkpoint or those of transformers 5. What nothing names is left alone.
    ``registry``: default ``loreg.open()``. ``method`` and ``parameters``: as ``Registry.merge`` takes them, but for
    methods that work on factors: compose a version by them first, and merge that. ``threads``: of the CPU, a tensor
    each; default is as many as torch uses.

    ``check``: ``touched`` first hashes every parameter that the adapters name, and compares it with what they know of
    their base (a wider dtype that holds the same values passes). On a CPU that reads them once; from a CUDA device
    they are copied to the host for it, which takes about as long as loading them did. ``none`` takes the model as it
    is, for one that was trained or rounded since.

    Each element is the value of its parameter's dtype nearest to the exact sum (``loreg-exact-1``; for norms, roots
    and other methods ``loreg-f64-1``), whatever the device and the threads: the bytes that ``Registry.merge`` writes.
    The returned value undoes it, from integers on the parameters' devices that take about 3 % of the bytes of what
    was changed where |ΔW| is 1 % of |W|; of tensors that are replaced, or whose edit reads them (DoRA), it has the
    originals. Beside that, each thread needs some tens of MB and the factors of one tensor in float64; and a CUDA
    device, where all sums of LoRAs are one launch, half a byte for each of their weights and all their factors in
    float64, until it has returned.

    All or nothing: whatever is raised, KeyboardInterrupt included, every parameter is as it was. Raises NotFound,
    UsageError, BaseMismatch for a model of another base, BadInput for NaN or infinity, for a result that its dtype
    cannot hold, and for a tensor of an adapter that the model has no place for; Unsupported for parameters that are
    quantised, sharded, on the meta device or not contiguous, for a head that an adapter unties from its embedding,
    and for what changes a shape.
    """
    given = {"method": method, "parameters": parameters, "check": check, "threads": threads}
    return prepare(model, expression, registry, **given).apply()  # type: ignore[arg-type]


def unmerge_(model: torch.nn.Module, merged: Merged) -> None:
    """Take ``merged`` out of ``model`` again: every parameter that it changed gets its bytes back, in place.

    The model may be on another device by now. Several merges are taken back in the opposite order. An unmerge
    that was interrupted, or ran out of memory, leaves the model between the two, and goes on where it is called
    again. Raises UsageError for a merge that is taken back already, or of another
    model; Conflict if a parameter was changed since, as torch counts that (a change by way of ``.data`` or of memory
    that is shared is not counted), which this would not undo.
    """
    merged.undo(model)


@dataclass(frozen=True, slots=True, eq=False)
class Ready:
    """A merge whose expression is resolved, whose tensors are found in the model, and whose factors are loaded: on
    the device, where a merge is a launch there, as long as this is held. ``Merged.undo`` is then faster too.

    ``places``: of every tensor that is edited, or that an adapter knows of its base, by the checkpoint's names."""

    expression: str
    adapters: tuple[AdapterInput, ...]
    places: Mapping[str, Place]
    edits: tuple[Edit, ...]
    threads: int | None
    ahead: Ahead

    def apply(
        self, told: Callable[[Merged], None] = lambda _: None, back: Callable[[], None] = lambda: None
    ) -> Merged:
        """Edit the parameters, as they are now; as often as what is returned is undone. ``told`` gets it first: what
        that raises takes all back. ``back`` is called if an error is raised and everything is as it was."""
        tensors = {edit.target.place.name: edit.target.place.tensor for edit in self.edits}
        before = {name: state_of(tensor) for name, tensor in tensors.items()}

        def restored() -> None:
            for name, tensor in tensors.items():
                _same_as(tensor, before[name])  # so that an earlier merge can still be taken back
            back()

        def done(editings: list[Editing]) -> Merged:
            found = Merged(self.expression, tuple(editings), tensors, before, self.threads)
            told(found)
            return found

        return merging.merge(self.edits, self.threads, self.ahead, done, restored)

    def replace(
        self,
        merged: Merged,
        told: Callable[[Merged], None] = lambda _: None,
        back: Callable[[], None] = lambda: None,
    ) -> Merged:
        """Take ``merged``, of which ``check`` says that it is in the model, out of it, and edit the parameters as
        they then are, in one pass: all or nothing. ``told`` and ``back`` are as in ``apply``.
        """
        tensors = {edit.target.place.name: edit.target.place.tensor for edit in self.edits}
        before = {name: merged.before.get(name) or state_of(tensor) for name, tensor in tensors.items()}
        now = {name: state_of(tensor) for name, tensor in tensors.items()} | merged.after

        def kept(editings: list[Editing]) -> None:
            merged.editings, merged.undone = tuple(editings), False
            for name, tensor in {**tensors, **merged.tensors}.items():
                _same_as(tensor, now[name])
            back()

        def done(editings: list[Editing]) -> Merged:
            found = Merged(self.expression, tuple(editings), tensors, before, self.threads)
            for name, tensor in merged.tensors.items():
                if name not in tensors:
                    _same_as(tensor, merged.before[name])
            merged.undone = True
            told(found)
            merged.editings = ()  # nor what undid it is needed any more
            return found

        return swapping.swap(merged.editings, self.edits, self.threads, self.ahead, done, kept)


def prepare(
    model: torch.nn.Module,
    expression: str,
    registry: Registry | None = None,
    *,
    method: str = "linear",
    parameters: Mapping[str, Any] | None = None,
    check: Check = "touched",
    threads: int | None = None,
    scale: float = 1.0,
) -> Ready:
    """All of ``merge_`` but the merge itself, which ``apply`` of what is returned does. Raises what it does.
    ``scale``: of all weights of the expression, each product rounded once."""
    if registry is None:
        registry = default_registry()
    if check not in ("touched", "none"):
        raise UsageError(f"{check!r} is not a kind of check: expected 'touched' or 'none'.")
    if threads is not None and threads < 1:
        raise UsageError(f"{threads} threads can merge nothing: expected at least 1.")
    method, row = methods.method(method)
    settings = methods.parameters(method, parameters or {})
    if row.composes_only:
        raise Unsupported(f"{method} works on factors: compose a version by it (Registry.compose), and merge that.")
    adapters = [replace(each, weight=scale * each.weight) for each in resolve_terms(registry, expression)]
    kept = tuple(in_recipe_order(adapters))
    if not row.keeps_terms:
        methods.check_count(method, settings, len(kept))
    targets = Targets(Tensors(model), kept, method)
    found = targets.all()
    places = targets.places({target.name: target.edit for target in found})
    if check == "touched":
        check_base(kept, places)
    combining = Combining(kept, method, settings)
    edits = tuple(Edit.of(target, combining) for target in found)
    return Ready(expression, kept, places, edits, threads, Ahead(edits))


@dataclass(slots=True, eq=False)
class Merged:
    """A merge in a live model, and what undoes it. ``tensors``: those that it changed, by the names of the model."""

    expression: str
    editings: tuple[Editing, ...]
    tensors: Mapping[str, torch.Tensor]
    before: Mapping[str, State]
    threads: int | None = None
    after: dict[str, State] = field(default_factory=dict)
    undone: bool = False

    def __post_init__(self) -> None:
        self.after = {name: state_of(tensor) for name, tensor in self.tensors.items()}

    @property
    def touched_bytes(self) -> int:
        """Of everything that was edited."""
        return sum(editing.edit.target.place.weight.nbytes for editing in self.editings)

    @property
    def undo_bytes(self) -> int:
        """Of what is kept to undo it."""
        return sum(editing.nbytes for editing in self.editings)

    def undo(self, model: torch.nn.Module) -> None:
        """See ``unmerge_``."""
        self.check(model)
        try:
            merging.unmerge(self.editings, self.threads)
            for name, tensor in self.tensors.items():
                _same_as(tensor, self.before[name])
            self.undone = True
        except BaseException:
            self.after = {name: state_of(tensor) for name, tensor in self.tensors.items()}
            raise

    def check(self, model: torch.nn.Module) -> None:
        """Raises UsageError or Conflict unless it is in ``model``, as it was merged."""
        if self.undone:
            raise UsageError(f"{self.expression!r} was taken out of the model already.")
        live = tensors_of(model)
        for name, tensor in self.tensors.items():
            if live.get(name) is not tensor:
                raise UsageError(f"{name!r} of the model is not the tensor that {self.expression!r} was merged into.")
            if state_of(tensor) != self.after[name]:
                raise Conflict(
                    f"{name!r} was changed since {self.expression!r} was merged into it, and taking that back would "
                    "not give what was there before: take back later merges first, or load the model again."
                )


_RESTORED = WeakIdKeyDictionary()
"""Tensor → (its version after an unmerge, the earlier version that it then has the bytes of)."""


def state_of(tensor: torch.Tensor) -> State:
    """What is known of the values of a tensor without a look at them: its dtype, and torch's count of its changes in
    place, which an unmerge turns back. None for inference tensors, whose changes are not counted.
    """
    if tensor.is_inference():
        return None, tensor.dtype
    now = tensor._version
    if tensor in _RESTORED:
        after, state = _RESTORED[tensor]
        return state if after == now else now, tensor.dtype
    return now, tensor.dtype


def _same_as(tensor: torch.Tensor, state: State) -> None:
    if state[0] is not None:
        _RESTORED[tensor] = tensor._version, state[0]
