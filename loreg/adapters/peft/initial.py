"""Factors that were taken out of the base before training: PiSSA, OLoRA, CorDA, LoRA-GA.

These begin with factors B₀, A₀ that are not zero, and train on W - s·B₀A₀, so that the first output is the base's
(PEFT 0.21, ``tuners/lora/layer.py``, `pissa_init` and the like). For the base on disk the adapter is then

    ΔW = s·BA - s·B₀A₀,

which PEFT itself makes of it, as one LoRA of twice the rank, where it is given the first factors
(``path_initial_model_for_weight_conversion``, `subtract_mutated_init`); that is read as any LoRA.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from loreg.adapters.draft import DraftModule, DraftTerm, RawTensor
from loreg.adapters.peft.config import CONFIG, read_config
from loreg.adapters.peft.contents import Config
from loreg.adapters.peft.directory import read_weights
from loreg.adapters.peft.lora_fields import changes_base
from loreg.errors import BadInput, NotFound, Unsupported

# What the scale and the meaning of the factors hang on, and so has to be the same before training and after.
_SHARED = (
    "r",
    "lora_alpha",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "use_dora",
    "use_bdlora",
    "fan_in_fan_out",
)


def tensors(folder: Path | None, config: Config, path: Path) -> dict[str, RawTensor]:
    """The tensors in ``folder``, the adapter as it was saved before training, by key.

    Raises Unsupported where there is no folder and the adapter needs one, BadInput where it is not this adapter's.
    """
    if not changes_base(config, path):
        raise BadInput(
            f"{path}: init_lora_weights is {config.get('init_lora_weights', True)!r}, which leaves the base as it "
            "is: push the adapter without the initial factors, which are no part of it."
        )
    if folder is None:
        raise Unsupported(
            f"{path}: init_lora_weights is {config['init_lora_weights']!r}, by which the first factors were taken "
            "out of the base that the adapter is for; give the directory that was saved before training (--initial), "
            "or convert the adapter with PEFT (path_initial_model_for_weight_conversion)."
        )
    if not (folder / CONFIG).is_file():
        raise NotFound(f"{folder} holds no PEFT adapter: expected {CONFIG}, as it was saved before training.")
    begun = read_config(folder / CONFIG)
    for name in _SHARED:
        if (begun.get(name) or None) != (config.get(name) or None):
            raise BadInput(
                f"{folder / CONFIG}: {name} is {str(begun.get(name))[:80]}, and that of the adapter is "
                f"{str(config.get(name))[:80]}: expected the factors that its training began with."
            )
    found = {}
    for tensor in read_weights(folder).tensors:
        tensor.check_finite()
        found[tensor.key] = replace(tensor, key=f"{tensor.key} before training")
    return found


def taken_off(modules: Mapping[str, DraftModule], first: Mapping[str, DraftModule]) -> dict[str, DraftModule]:
    """``modules`` less what they were at ``first``. Raises BadInput unless they are the same modules of one shape."""
    if odd := sorted(set(modules) ^ set(first)):
        has, lacks = ("adapter", "initial factors") if odd[0] in modules else ("initial factors", "adapter")
        raise BadInput(f"Module {odd[0]!r} is in the {has} and not in the {lacks}: expected those of one training.")
    return {path: _less(path, module, first[path]) for path, module in modules.items()}


def _less(path: str, module: DraftModule, first: DraftModule) -> DraftModule:
    (term,), (begun,) = module.terms, first.terms
    if term.shapes != begun.shapes:
        raise BadInput(
            f"Module {path!r} has factors of shapes {term.shapes} and began with {begun.shapes}: expected the same."
        )
    if module.bias_terms or term.parameters["groups"] != 1:
        raise Unsupported(f"Module {path!r} has a lora_bias or blocks, with which no such initialisation is defined.")
    if "magnitude" in term.tensors:
        return replace(module, terms=(_joined(term, begun),))
    return replace(module, terms=(term, replace(begun, scale=-begun.scale)))


def _joined(term: DraftTerm, begun: DraftTerm) -> DraftTerm:
    """Both as one term of twice the rank, [B, -B₀]·[A; A₀]: DoRA takes the norm of all that is added to W."""
    A, A0, B, B0 = term.tensors["A"], begun.tensors["A"], term.tensors["B"], begun.tensors["B"]
    if A.dtype != A0.dtype or B.dtype != B0.dtype or len(A.shape) != 2:
        raise Unsupported(f"{A0.key!r} is {A0.dtype} and {A.key!r} is {A.dtype}: expected matrices of one dtype.")
    size = B.nbytes // (B.shape[0] * B.shape[1])
    left = np.frombuffer(B.content(), dtype=f"<u{size}").reshape(B.shape)
    right = np.frombuffer(B0.content(), dtype=f"<u{size}").reshape(B0.shape) ^ (1 << (8 * size - 1))  # the sign bit
    joined = np.concatenate([left, right.astype(left.dtype)], axis=1)
    rank = A.shape[0] + A0.shape[0]
    tensors = {
        "A": RawTensor(f"{A.key} and before", A.dtype, (rank, A.shape[1]), A.content() + A0.content()),
        "B": RawTensor(f"{B.key} and before", B.dtype, (B.shape[0], rank), joined.tobytes()),
    }
    return replace(term, tensors={**term.tensors, **tensors}, alpha=None)
