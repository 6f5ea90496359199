"""The ``forward`` verification: what the models compute, not what their weights are.

Three runs over the same inputs: base + adapters unmerged in the storage dtype, the same in the next wider dtype,
and the merged model. The first two differ by what the dtype itself does to a forward pass; that is the noise
floor. A merge passes if it differs from the unmerged model by at most twice as much.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from loreg.adapters import names, renames
from loreg.algebra.delta import LowRank
from loreg.algebra.densify import dense_delta
from loreg.algebra.edits import WeightedSum
from loreg.errors import NotFound, Unsupported
from loreg.merge.inputs import CPU
from loreg.merge.layout import Action

if TYPE_CHECKING:
    from loreg.merge.verify import Check, Subject

PROMPTS = (
    "The capital of France is",
    "Write a SQL query that counts the users of each country.",
    "Tell me a joke about a cat.",
    "def fibonacci(n):",
)
_HOOKED = ("linear", "conv1d", "embedding")
_RANDOM_INPUTS = (4, 32)
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


def compare_outputs(subject: Subject) -> Iterable[Check]:
    """Run the three models. Raises NotFound without transformers, Unsupported for a model it does not load."""
    from loreg.merge.verify import Check

    inputs = _inputs(subject.base.root, subject.base.config())
    merged = _run(subject.merged.root, inputs, None, lambda model: None)
    dtype = _floating(subject)
    unmerged = _run(subject.base.root, inputs, dtype, lambda model: _adapt(model, subject))
    wider = _run(subject.base.root, inputs, _WIDER[dtype], lambda model: _adapt(model, subject))
    noise, difference = Difference.between(unmerged, wider), Difference.between(unmerged, merged)
    ok = difference.largest <= _ALLOWED * noise.largest
    detail = f"merged against unmerged: {difference}; noise floor of {dtype}: {noise}"
    return [Check("forward", ok, detail)]


def _floating(subject: Subject) -> torch.dtype:
    from loreg.tensors import TORCH

    counts: dict[str, int] = {}
    for tensor in subject.record.tensors:
        if TORCH.get(tensor.dtype) in _WIDER:
            counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.nbytes
    if not counts:
        raise Unsupported("The model has no tensors of bfloat16, float16 or float32, so it cannot be run forward.")
    return TORCH[max(counts, key=lambda name: counts[name])]


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise NotFound("--verify forward needs transformers: pip install 'loreg[peft]'.") from error
    return transformers


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """No bars and no chatter of transformers on a terminal that shows ours; as it was afterwards."""
    logging = transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _inputs(root: Path, config: dict[str, Any]) -> list[torch.Tensor]:
    """Token ids (1, n): of prompts if the model has a tokenizer, else fixed random ones."""
    transformers = _transformers()
    if (root / "tokenizer.json").is_file() or (root / "tokenizer_config.json").is_file():
        tokenizer = transformers.AutoTokenizer.from_pretrained(root)
        return [tokenizer(prompt, return_tensors="pt").input_ids for prompt in PROMPTS]
    generator = torch.Generator().manual_seed(0)
    count, length = _RANDOM_INPUTS
    ids = torch.randint(0, int(config.get("vocab_size", 2)), (count, 1, length), generator=generator)
    return list(ids)


@torch.no_grad()
def _run(
    root: Path, inputs: list[torch.Tensor], dtype: torch.dtype | None, adapt: Callable[[Any], None]
) -> list[torch.Tensor]:
    """Logits (or last hidden states) in float64, one tensor (1, n, …) per input."""
    transformers = _transformers()
    config = transformers.AutoConfig.from_pretrained(root)
    kind = getattr(transformers, next(iter(config.architectures or ()), ""), None)
    if kind is None:
        raise Unsupported(f"{root}: config.json names no architecture that transformers knows, so it cannot be run.")
    with _quiet(transformers):
        model = kind.from_pretrained(root, dtype=dtype or "auto").eval()
    adapt(model)
    results = []
    for ids in inputs:
        extra = {"decoder_input_ids": ids} if config.is_encoder_decoder else {}
        output = model(input_ids=ids, **extra)
        results.append((output.logits if "logits" in output else output[0]).double())
    del model
    gc.collect()
    return results


def _adapt(model: Any, subject: Subject) -> None:
    """Add the adapters to a live model as a trainer does: low-rank deltas beside the weights, not into them.

    What is no low-rank delta is added to the weight in the model's dtype.
    """
    if subject.layout.untied:
        raise Unsupported(
            "The merge unties the embedding, which the live model has as one: verify with probe or exact."
        )
    outputs = {name: tensor for name, tensor in subject.outputs.items() if tensor.action is not Action.COPY}
    config = subject.base.config()
    live = {name: renames.in_memory(name, config) for name in outputs}
    owners = names.resolve(live.values(), dict(model.named_parameters(remove_duplicate=False)))
    for name, output in outputs.items():
        if live[name] not in owners or output.stored is None:
            raise Unsupported(f"{name!r} is no parameter of {type(model).__name__}, so the model cannot be compared.")
        path, _, parameter = owners[live[name]].rpartition(".")
        layer = model.get_submodule(path)
        edit = output.edit.load(name, output.stored, subject.combining, CPU)
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
