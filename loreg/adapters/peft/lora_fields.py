"""The fields of PEFT's ``LoraConfig`` (0.21, ``tuners/lora/config.py``, and what older ones had): each is known here.

A test compares the lists with the class, so that a field of a new release is refused until somebody has looked at it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from loreg.adapters.peft.config import check_known, check_pattern
from loreg.adapters.peft.contents import Config
from loreg.errors import Unsupported
from loreg.format.fields import Fields

HANDLED = frozenset(
    {"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "bias", "lora_bias"}
    | {"init_lora_weights", "use_dora", "use_bdlora", "trainable_token_indices", "ensure_weight_tying"}
    | {"target_parameters"}
)

# How the factors were first set or trained, and no part of what they compute. MonteCLoRA and VeLoRA differ from LoRA
# in training alone: their layers compute plain LoRA in eval mode.
HARMLESS = frozenset(
    {"lora_dropout", "eva_config", "corda_config", "lora_ga_config", "velora_config", "monteclora_config"}
    | {"runtime_config", "megatron_core", "qalora_group_size", "merge_weights"}
)

REFUSED: Mapping[str, str] = {
    "alora_invocation_tokens": "an activated LoRA changes only what follows its invocation tokens in the input, so "
    "no weight holds it; serve it beside its base",
    "arrow_config": "Arrow chooses among several adapters for every token, so no weight holds it; push the "
    "adapters that it routes to",
    "kasa_config": "KaSA has taken the smallest singular values out of the base, which is then another than the one "
    "on disk; save the truncated base as a model of its own",
    "layer_replication": "the model that was trained has layers of the base several times over, each with factors of "
    "its own, and a checkpoint has each layer once; save the expanded model as a base and name its layers",
    "loftq_config": "LoftQ trains against a quantised base that it made, which is another than the one on disk; save "
    "that base as a model of its own",
    "megatron_config": "its layers are Megatron's, split over devices; convert it to an adapter of the whole layers",
    "enable_lora": "it has MergedLinear layers of PEFT before 0.3; convert it with that release",
    "use_qalora": "QA-LoRA averages groups of inputs before A, for a base quantised in the same groups",
}

# Initialisations that leave the base as it is, and such that take the first factors' product out of it, so that the
# trained ones are for another base. LoRA-GA: only where gradients were collected, else B began as zero.
_PLAIN = ("gaussian", "orthogonal", "eva", "mica")
_CHANGING = ("pissa", "olora", "corda", "lora_ga")


def check(config: Config, path: Path) -> None:
    """Raises BadInput, and Unsupported for what is refused whatever the tensors are."""
    fields = Fields(config, str(path))
    fields.natural("r", 1)
    fields.real("lora_alpha")
    for pattern in ("rank_pattern", "alpha_pattern"):
        check_pattern(config.get(pattern) or {}, f"{path}: {pattern}")
    check_known(config, HANDLED | HARMLESS, path, REFUSED)
    blocks(config, path)
    changes_base(config, path)


def blocks(config: Config, path: Path) -> tuple[int, Mapping[str, tuple[str, ...]]]:
    """``use_bdlora``: the number of blocks, and parts of the names of modules whose "a", or "b", is made of them.

    Raises BadInput for values of other types.
    """
    said = config.get("use_bdlora")
    if said is None or said is False:
        return 1, {"a": (), "b": ()}
    fields = Fields(said, f"{path}: use_bdlora")
    named = {}
    for factor in ("a", "b"):
        field = f"target_modules_bd_{factor}"
        value = (fields.take(field) if fields.has(field) else None) or []
        if not isinstance(value, list) or not all(isinstance(part, str) for part in value):
            fields.refuse(field, "a list of parts of names, or null", value)
        named[factor] = tuple(value)
    count = fields.natural("nblocks", 1) if fields.has("nblocks") else 1
    return count, named


def changes_base(config: Config, path: Path) -> bool:
    """Whether ``init_lora_weights`` took the first factors out of the base. Raises Unsupported for an unknown one."""
    init = config.get("init_lora_weights", True)
    if init is None or isinstance(init, bool):
        return False
    name = str(init).lower()
    if name in _PLAIN:
        return False
    if name.startswith(_CHANGING):
        return True
    reason = REFUSED["loftq_config"] if name == "loftq" else "what it does to the base is not known"
    raise Unsupported(f"{path}: init_lora_weights is {init!r}: {reason}; nothing was stored.")
