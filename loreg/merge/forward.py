"""The ``forward`` verification: what the models compute, not what their weights are.

Three runs over the same inputs: base + adapters unmerged in the storage dtype, the same in the next wider dtype,
and the merged model. The first two differ by what the dtype itself does to a forward pass; that is the noise
floor, and at least a step of the largest output, by which two that are rounded may differ: of a small model in
float32 the first two may agree better than that by chance. A merge passes if it differs from the unmerged model by at
most twice as much.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from loreg.adapters import names, renames
from loreg.algebra.delta import LowRank
from loreg.algebra.densify import dense_delta
from loreg.algebra.edits import WeightedSum
from loreg.errors import Unsupported
from loreg.merge.inputs import CPU, values
from loreg.merge.layout import Action
from loreg.merge.samples import Runnable, failing

if TYPE_CHECKING:
    from loreg.format.recipe import MergeRecord
    from loreg.merge.plan import MergePlan
    from loreg.merge.verify import Check, Subject

_HOOKED = ("linear", "conv1d", "embedding")
_ALLOWED = 2.0  # times the noise floor
_WIDER = {torch.bfloat16: torch.float32, torch.float16: torch.float32, torch.float32: torch.float64}


@dataclass(frozen=True, slots=True)
class Difference:
    """How two sets of outputs differ: largest |Δ| of a logit, mean KL divergence in nats, share of equal top-1."""

    largest: float
    divergence: float
    agreement: float

    @classmethod
    def between(cls, first: list[torch.Tensor], second: list[torch.Tensor]) -> Difference:
        largest, divergence, agreement = [], [], []
        for a, b in zip(first, second, strict=True):
            largest.append(float((a - b).abs().max()))
            p, q = a.log_softmax(-1), b.log_softmax(-1)
            divergence.append(float((p.exp() * (p - q)).sum(-1).mean()))
            agreement.append(float((a.argmax(-1) == b.argmax(-1)).double().mean()))
        return cls(max(largest), sum(divergence) / len(divergence), sum(agreement) / len(agreement))

    def __str__(self) -> str:
        return f"max |Δ| {self.largest:.3g}, KL {self.divergence:.2g}, top-1 equal {self.agreement:.1%}"


def check_plan(plan: MergePlan) -> None:
    """Raises, before anything is merged, what ``compare_outputs`` would raise for the plan's base: NotFound without
    transformers, Unsupported for a model that is not run. Reads no weights."""
    _check_tied(plan.unties)
    if plan.resized:
        raise Unsupported(
            "The merge changes the number of rows of the embedding, which the live model keeps: verify with probe or "
            "exact."
        )
    _floating((tensor.info.dtype, tensor.info.nbytes) for tensor in plan.outputs)
    Runnable.of(plan.base.root)


def compare_outputs(subject: Subject, merged_root: Path, record: MergeRecord) -> Iterable[Check]:
    """Run the three models. Raises NotFound without transformers, Unsupported for a model that it does not run; one
    that no longer runs once it is merged is a check that failed."""
    from loreg.merge.verify import Check

    _check_tied(bool(subject.layout.untied))
    dtype = _floating((tensor.dtype, tensor.nbytes) for tensor in record.tensors)
    runnable = Runnable.of(subject.base.root)
    unmerged = _run(runnable, subject.base.root, dtype, lambda model: _adapt(model, subject))
    wider = _run(runnable, subject.base.root, _WIDER[dtype], lambda model: _adapt(model, subject))
    try:
        merged = _run(runnable, merged_root, None, lambda model: None)
    except Unsupported as error:
        return [Check("forward", False, f"the unmerged model runs, and the merged does not: {error}")]
    noise, difference = Difference.between(unmerged, wider), Difference.between(unmerged, merged)
    step = torch.finfo(dtype).eps * max(float(output.abs().max()) for output in unmerged)
    ok = difference.largest <= _ALLOWED * max(noise.largest, step)
    detail = f"merged against unmerged: {difference}; noise floor of {dtype}: {noise}"
    return [Check("forward", ok, detail)]


def _check_tied(unties: bool) -> None:
    if unties:
        raise Unsupported(
            "The merge unties the embedding, which the live model has as one: verify with probe or exact."
        )


def _floating(sizes: Iterable[tuple[str, int]]) -> torch.dtype:
    """The dtype of most bytes, of (dtype, bytes) of tensors."""
    from loreg.tensors import TORCH

    counts: dict[str, int] = {}
    for dtype, nbytes in sizes:
        if TORCH.get(dtype) in _WIDER:
            counts[dtype] = counts.get(dtype, 0) + nbytes
    if not counts:
        raise Unsupported("The model has no tensors of bfloat16, float16 or float32, so it cannot be run forward.")
    return TORCH[max(counts, key=lambda name: counts[name])]


def _run(
    runnable: Runnable, root: Path, dtype: torch.dtype | None, adapt: Callable[[Any], None]
) -> list[torch.Tensor]:
    model = runnable.load(root, dtype)
    with failing(f"The adapters cannot be put into a live {type(model).__name__}"):
        adapt(model)
    outputs = runnable.outputs(model)
    del model
    gc.collect()
    return outputs


def _adapt(model: Any, subject: Subject) -> None:
    """Add the adapters to a live model as a trainer does: low-rank deltas beside the weights, not into them.

    What is no low-rank delta is added to the weight in the model's dtype.
    """
    outputs = {name: tensor for name, tensor in subject.outputs.items() if tensor.action is not Action.COPY}
    config = subject.base.config()
    live = {name: renames.in_memory(name, config) for name in outputs}
    owners = names.resolve(live.values(), dict(model.named_parameters(remove_duplicate=False)))
    for name, output in outputs.items():
        if live[name] not in owners or output.stored is None:
            raise Unsupported(f"{name!r} is no parameter of {type(model).__name__}, so the model cannot be compared.")
        path, _, parameter = owners[live[name]].rpartition(".")
        layer = model.get_submodule(path)
        before = partial(values, output.stored)
        edit = output.edit.load(name, output.stored.info.shape, before, subject.combining, CPU)
        found = output.edit.module()
        if found is not None and found[2].kind in _HOOKED and parameter == "weight":
            for delta in edit.low_rank:
                layer.register_forward_hook(_hook(delta, found[2].kind))
            edit = WeightedSum(dense=edit.dense)
        if edit.shape:
            weight = getattr(layer, parameter)
            changed = weight.data.double().reshape(edit.shape) + dense_delta(edit)
            weight.data = changed.reshape(weight.shape).to(weight.dtype)


def _hook(delta: LowRank, kind: str) -> Callable[..., torch.Tensor]:
    """Adds x·ΔWᵀ, as two thin products in the dtype of the activations."""

    def add(module: torch.nn.Module, arguments: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        left, right = delta.left.to(output.dtype), delta.right.to(output.dtype)
        if kind == "embedding":
            return output + delta.scale * (torch.nn.functional.embedding(arguments[0], left) @ right)
        if kind == "conv1d":
            return output + delta.scale * ((arguments[0] @ left) @ right)
        return output + delta.scale * ((arguments[0] @ right.T) @ left.T)

    return add
