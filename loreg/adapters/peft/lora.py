"""LoRA as PEFT writes it.

Scale (PEFT, ``tuners/lora/layer.py``): α/r, or α/√r with ``use_rslora``; α from the first key of
``alpha_pattern``, in the order of the file, that matches as ``(.*\\.)?(KEY)$``. The rank is that of the tensor,
whatever the config says.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from loreg.adapters.draft import DraftModule, DraftTerm, RawTensor
from loreg.adapters.peft.config import CONFIG, check_known, check_pattern, first_match
from loreg.adapters.peft.contents import PREFIX, Config, Contents
from loreg.errors import BadInput, Unsupported
from loreg.format.fields import Fields

_KEY = re.compile(r"(?P<path>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_embedding_[AB])")

# How a key of a variant that is not handled yet looks, and what to call it.
_REFUSED_KEYS = {
    "lora_magnitude_vector": "DoRA",
    "trainable_tokens": "trainable tokens",
    "lora_E": "AdaLoRA",
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "vera_lambda": "VeRA",
    "ia3_l": "(IA)³",
    "oft_": "OFT",
    # PEFT saves the biases of a saved module three times then, the untrained ones among them.
    ".original_module.": "bias='all' beside modules_to_save",
    ".modules_to_save.": "bias='all' beside modules_to_save",
}

_KNOWN = frozenset(
    {"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "bias", "lora_bias"}
    | {"lora_dropout", "init_lora_weights", "runtime_config", "megatron_core", "eva_config", "qalora_group_size"}
)
# Initialisations that leave the base as it is. PiSSA, OLoRA, CorDA, LoRA-GA and LoftQ train against another.
_PLAIN_INITS = (True, False, "gaussian", "orthogonal", "eva")

_UNGROUPED = {"groups": 1}


def read(tensors: Mapping[str, RawTensor], config: Config, path: Path) -> Contents:
    """See ``ReadContents``."""
    _check(config, path)
    parts: dict[str, dict[str, RawTensor]] = {}
    full: dict[str, RawTensor] = {}
    for key, tensor in tensors.items():
        if not key.startswith(PREFIX):
            raise Unsupported(f"Tensor {key!r} does not begin with {PREFIX!r}, as PEFT writes it.")
        name = key.removeprefix(PREFIX)
        if match := _KEY.fullmatch(name):
            parts.setdefault(match["path"], {})[match["part"]] = tensor
        elif refused := next((what for part, what in _REFUSED_KEYS.items() if part in name), None):
            raise Unsupported(f"Tensor {key!r} belongs to {refused}, which is not handled yet; nothing was stored.")
        elif "lora_" in name:
            raise Unsupported(f"Tensor {key!r} is none of the parts of a LoRA that are handled yet.")
        else:
            plain = name.replace(".base_layer.", ".")
            if plain in full:
                raise BadInput(f"Tensors {full[plain].key!r} and {key!r} both mean {plain!r}: expected one.")
            full[plain] = tensor
    return Contents({name: _module(name, found, config) for name, found in parts.items()}, full)


def _module(path: str, parts: Mapping[str, RawTensor], config: Config) -> DraftModule:
    def refuse(reason: str) -> NoReturn:
        raise BadInput(f"Module {path!r} of the adapter is not acceptable: {reason}.")

    embedding = "lora_embedding_A" in parts or "lora_embedding_B" in parts
    names = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")
    if set(parts) - {*names, "lora_B.bias"} or not set(names) <= set(parts):
        refuse(f"expected {' and '.join(names)}, found {', '.join(sorted(parts))}")
    A, B = parts[names[0]], parts[names[1]]
    if len(A.shape) in (3, 4, 5) and len(A.shape) == len(B.shape):
        raise Unsupported(f"Module {path!r} is a convolution (A has shape {list(A.shape)}): not handled yet.")
    if len(A.shape) != 2 or len(B.shape) != 2 or A.shape[0] != B.shape[1] or not A.shape[0]:
        refuse(f"expected A (rank, in) and B (out, rank), found {list(A.shape)} and {list(B.shape)}")
    bias = parts.get("lora_B.bias")
    if bias is not None and bias.shape != (B.shape[0],):
        refuse(f"expected a bias of shape [{B.shape[0]}], found {list(bias.shape)}")
    rank = A.shape[0]
    alpha = _alpha(path, config)
    scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    return DraftModule(
        terms=(DraftTerm("lora", {"A": A, "B": B}, scale, alpha, _UNGROUPED),),
        bias_terms=(DraftTerm("dense", {"value": bias}, scale),) if bias is not None else (),
        embedding=embedding,
        in_out_hint=bool(config.get("fan_in_fan_out")),
    )


def _alpha(path: str, config: Config) -> float:
    alphas: Mapping[str, float] = config.get("alpha_pattern") or {}
    alpha = float(alphas.get(first_match(path, alphas), config["lora_alpha"]))
    # Older PEFT (0.13, for one) looked for one key in both patterns, those of the ranks first, and took α from that.
    older = first_match(path, [*(config.get("rank_pattern") or {}), *alphas])
    if not config.get("peft_version") and float(alphas.get(older, config["lora_alpha"])) != alpha:
        raise Unsupported(
            f"Module {path!r}: rank_pattern and alpha_pattern overlap, by which α is {alpha:g} in today's PEFT and "
            f"another in older ones, and the adapter does not say which wrote it; give whole paths in {CONFIG}."
        )
    return alpha


def _check(config: Config, path: Path) -> None:
    fields = Fields(config, str(path))
    fields.natural("r", 1)
    fields.real("lora_alpha")
    for pattern in ("rank_pattern", "alpha_pattern"):
        check_pattern(config.get(pattern) or {}, f"{path}: {pattern}")
    check_known(config, _KNOWN, path)
    if (init := config.get("init_lora_weights", True)) not in _PLAIN_INITS:
        raise Unsupported(
            f"{path}: init_lora_weights is {init!r}, which changes the base that the adapter is for; this is not "
            "handled yet. Convert it to a plain LoRA with PEFT (path_initial_model_for_weight_conversion)."
        )
