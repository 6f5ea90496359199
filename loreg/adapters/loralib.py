"""Microsoft's loralib: state dicts with ``PATH.lora_A`` and ``PATH.lora_B`` (0.1.2, ``layers.py``, ``utils.py``).

They hold neither rank nor α, and do not say which layer a pair is of; the weight that it is for does:

====================  ================  ===================  =============================================
layer                 ``lora_A``        ``lora_B``           weight
====================  ================  ===================  =============================================
Linear                (r, in)           (out, r)             (out, in), or (in, out) with fan_in_fan_out
Embedding             (r, V)            (d, r)               (V, d)
MergedLinear          (r·e, in)         (out/n·e, r)         as Linear's; e of n blocks of rows are enabled
Conv2d, Conv1d with   (r·k, in·k)       (out/groups·k, r·k)  (out, in/groups, k, …), at ``PATH.conv`` or,
k = 1                                                        in a model that was not made with it, ``PATH``
====================  ================  ===================  =============================================

α has to be given, and for a MergedLinear which blocks are enabled, unless all are. The scale is α/r. What else
``lora_state_dict`` saves are biases, which replace the base's.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import inf, isfinite, nan, prod
from pathlib import Path
from typing import Any, NoReturn

from loreg import layers
from loreg.adapters import one_file, renames
from loreg.adapters.draft import Draft, DraftModule, DraftTerm, RawTensor
from loreg.errors import BadInput, Unsupported, UsageError
from loreg.format.fingerprint import BaseTensor

EXPECTED = "a state dict of loralib with tensors such as PATH.lora_A"
OPTIONS = ("alpha", "enable_lora")

_A, _B = ".lora_A", ".lora_B"
_WORDS = ("emb", "wte", "wpe", "shared")


def recognises(path: Path) -> bool:
    return one_file.find(path) is not None and any(
        key.endswith((_A, _B)) for key in one_file.open_weights(path).tensors
    )


def read(path: Path, alpha: float | None = None, enable_lora: Sequence[bool] | None = None) -> Draft:
    """Read such a file, or the directory that it is alone in.

    ``alpha``: the layers' lora_alpha; ``enable_lora``: that of the MergedLinear layers. Raises UsageError without
    ``alpha``, BadInput, Unsupported. The draft has no modules before it is located: the base's weights say what they
    are.
    """
    weights = one_file.open_weights(path)
    if alpha is None:
        raise UsageError(
            f"{weights.path} is of loralib, which stores no alpha: give the layers' lora_alpha (--alpha)."
        )
    alpha = _number(alpha)
    if enable_lora is not None and not _are_flags(enable_lora):
        raise UsageError(
            f"enable_lora is {str(enable_lora)[:80]}: expected true and false for each block, at least one of them "
            "true."
        )
    pairs, full = _sorted(weights.tensors)
    for tensor in weights.tensors.values():
        tensor.check_finite()
    beside = one_file.beside(path, weights)
    return Draft(
        format="loralib",
        base_name=None,
        modules={},
        full=full,
        saved_modules=frozenset(),
        files=beside.files,
        left_out=beside.left_out,
        license=beside.license,
        locate=partial(_locate, [Pair(name, *pair, alpha, enable_lora) for name, pair in pairs.items()]),
    )


def _number(alpha: object) -> float:
    """``alpha`` as a finite double, else UsageError: what the caller of the Python API gave may be anything."""
    try:
        value = float(alpha) if isinstance(alpha, int | float) and not isinstance(alpha, bool) else nan
    except OverflowError:  # an integer of hundreds of digits
        value = inf
    if not isfinite(value):
        raise UsageError(f"alpha is {str(value if value == inf else alpha)[:80]}: expected a finite number.")
    return value


def _are_flags(enable_lora: object) -> bool:
    return (
        isinstance(enable_lora, list | tuple) and any(enable_lora) and {type(flag) for flag in enable_lora} == {bool}
    )


def _sorted(tensors: Mapping[str, RawTensor]) -> tuple[dict[str, tuple[RawTensor, RawTensor]], dict[str, RawTensor]]:
    """Path → A and B; biases by name."""
    paths = {key.removesuffix(_A).removesuffix(_B): None for key in tensors if key.endswith((_A, _B))}
    for path in paths:
        for part in (_A, _B):
            if path + part not in tensors:
                raise BadInput(f"Module {path!r} of the adapter has no {part[1:]}: the file is not complete.")
    full = {key: tensor for key, tensor in tensors.items() if not key.endswith((_A, _B))}
    for key in full:
        if "bias" not in key:
            raise Unsupported(
                f"Tensor {key!r} is neither of a LoRA nor a bias, all that lora_state_dict of loralib saves: save "
                "lora.lora_state_dict(model) instead of the whole model."
            )
    return {path: (tensors[path + _A], tensors[path + _B]) for path in paths}, full


@dataclass(frozen=True, slots=True)
class Pair:
    """The factors at a path, and what was given of them."""

    path: str
    A: RawTensor
    B: RawTensor
    alpha: float
    enable: Sequence[bool] | None

    def refuse(self, reason: str, error: type[BadInput] = BadInput) -> NoReturn:
        raise error(f"Module {self.path!r} of the adapter {reason}.")

    def module(self, weight: BaseTensor) -> DraftModule:
        """What it does to ``weight``. Raises BadInput where no layer of loralib has them both, UsageError where it is
        some blocks of a MergedLinear and it was not given which, Unsupported for a layer that shapes cannot tell."""
        if len(self.A.shape) != 2 or len(self.B.shape) != 2 or 0 in (*self.A.shape, *self.B.shape):
            self.refuse(f"has A and B of shapes {self.A.shape} and {self.B.shape}, expected matrices")
        if len(weight.shape) > 2:
            return self._convolution(weight)
        (rows, into), (out, r) = self.A.shape, self.B.shape
        whole = {into, out}
        if rows == r and len(weight.shape) == 2 and set(weight.shape) == whole and prod(weight.shape) == into * out:
            return self._linear(weight)
        return self._merged(weight)

    def _term(self, form: str, rank: int, **parameters: Any) -> DraftTerm:
        return DraftTerm(form, {"A": self.A, "B": self.B}, self.alpha / rank, self.alpha, parameters)

    def _linear(self, weight: BaseTensor) -> DraftModule:
        """Linear or Embedding; stored (in, out) without being a Conv1D of GPT-2's kind it is the latter."""
        leaf = self.path.rpartition(".")[2]
        square = weight.shape[0] == weight.shape[1]
        if square and any(word in leaf for word in _WORDS):
            self.refuse(
                f"is for a square weight, {weight.name!r}, and may be a Linear or an Embedding, which would add "
                "another matrix: which it is the file does not say",
                Unsupported,
            )
        turned = not square and weight.shape == (self.A.shape[1], self.B.shape[0])
        embedding = turned and not layers.may_store_in_out(leaf)
        return DraftModule((self._term("lora", self.A.shape[0], groups=1),), embedding=embedding)

    def _merged(self, weight: BaseTensor) -> DraftModule:
        (rows, into), (some, r) = self.A.shape, self.B.shape
        if len(weight.shape) != 2 or into not in weight.shape or rows % r:
            self.refuse(
                f"does not fit its base: A is {list(self.A.shape)}, B {list(self.B.shape)}, and {weight.name!r} "
                f"{list(weight.shape)}, which no layer of loralib has together; was it trained on another base?"
            )
        enabled, out = rows // r, prod(weight.shape) // into
        blocks, rest = divmod(out * enabled, some)
        if rest or blocks < enabled:
            self.refuse(
                f"does not fit its base: {weight.name!r} has {out} outputs, of which {enabled} enabled blocks with B "
                f"{list(self.B.shape)} are no whole number of blocks; was it trained on another base?"
            )
        enable = [True] * blocks if blocks == enabled else self.enable
        if enable is None:
            raise UsageError(
                f"Module {self.path!r} of the adapter is a MergedLinear of {blocks} blocks of which {enabled} are "
                f"enabled, and the file does not say which: give enable_lora (--enable-lora), such as "
                f"{','.join('1' if i < enabled else '0' for i in range(blocks))}."
            )
        if len(enable) != blocks or sum(enable) != enabled:
            raise UsageError(
                f"Module {self.path!r} of the adapter is a MergedLinear of {blocks} blocks of which {enabled} are "
                f"enabled: enable_lora says {list(enable)}."
            )
        return DraftModule((self._term("lora_merged", r, enable=list(enable)),))

    def _convolution(self, weight: BaseTensor) -> DraftModule:
        """The kernel has one size in loralib, and its product the elements of the weight of a Conv2d alone, or of any
        whose k is 1."""
        k, rank = weight.shape[2], self.A.shape[0]
        if set(weight.shape[2:]) != {k} or rank != self.B.shape[1] or rank % k or self.A.shape[1] % k:
            self.refuse(
                f"does not fit its base: A is {list(self.A.shape)}, B {list(self.B.shape)}, and {weight.name!r} "
                f"{list(weight.shape)}, expected (r·k, in·k) and (out/groups·k, r·k) for a kernel of one size k; was "
                "it trained on another base?"
            )
        return DraftModule((self._term("lora_reshaped", rank // k),))


def _locate(pairs: Sequence[Pair], draft: Draft, tensors: Mapping[str, BaseTensor], config: layers.Config) -> Draft:
    """The draft with its modules, and convolutions as the base names them."""
    paths = {pair.path: _conv(pair.path, tensors) for pair in pairs}
    found = renames.resolve([f"{path}.weight" for path in paths.values()], tensors, config)
    modules = {}
    for pair in pairs:
        path = paths[pair.path]
        if f"{path}.weight" not in found:
            pair.refuse(
                f"has no weight in the base, which has {len(tensors)} tensors, such as {min(tensors)!r}; was it "
                "trained on another base?"
            )
        modules[path] = pair.module(tensors[found[f"{path}.weight"]])
    given = next((list(pair.enable) for pair in pairs if pair.enable is not None), None)
    if given and not any(given == term.parameters.get("enable") for m in modules.values() for term in m.terms):
        raise UsageError(
            f"enable_lora is {given}, and no module of the adapter is a MergedLinear with these blocks: leave it "
            "out, or give that of the layers."
        )
    full = {_bias(name, paths, tensors): tensor for name, tensor in draft.full.items()}
    for name, target in renames.resolve([*(f"{path}.weight" for path in modules), *full], tensors, config).items():
        if name in full:
            _check_bias(full[name], tensors[target])
    return replace(draft, modules=modules, full=full)


def _check_bias(bias: RawTensor, replaced: BaseTensor) -> None:
    """BadInput for a bias of another length than the base's, which would be taken for a resized tensor."""
    if bias.shape != replaced.shape:
        raise BadInput(
            f"Tensor {bias.key!r} of shape {list(bias.shape)} replaces {replaced.name!r} of the base: expected shape "
            f"{list(replaced.shape)}; was it trained on another base?"
        )


def _conv(path: str, tensors: Collection[str]) -> str:
    """Where the layer's weight is: loralib's convolutions have one inside, which a model made without it has not."""
    return f"{path}.conv" if f"{path}.conv.weight" in tensors else path


def _bias(name: str, paths: Mapping[str, str], tensors: Collection[str]) -> str:
    owner = name.removesuffix(".conv.bias")
    return f"{paths[owner]}.bias" if owner in paths and name not in tensors else name
