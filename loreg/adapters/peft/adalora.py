"""AdaLoRA as PEFT writes it (0.21, ``tuners/adalora``): the singular values that were kept, and their vectors.

Scale: α/(ρ + 10⁻⁵), or ρ/(ρ + 10⁻⁵) where α is not positive, with ρ the ``init_r`` of the config: PEFT keeps it
through every reduction of the ranks. Those are in ``rank_pattern``, a mask of ρ flags for each module, and the
saved tensors have what the mask leaves. A module of which it leaves nothing is saved without elements.

AdaLoRA's config is LoRA's; ``use_rslora``, ``alpha_pattern``, ``lora_bias`` and the initialisations do nothing here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from loreg.adapters.draft import DraftModule, DraftTerm, RawTensor
from loreg.adapters.peft.config import check_known
from loreg.adapters.peft.contents import PREFIX, Config, Contents
from loreg.adapters.peft.parts import checked, contents, sort
from loreg.errors import BadInput
from loreg.format.fields import Fields

KNOWN = frozenset(
    {"init_r", "lora_alpha", "rank_pattern", "fan_in_fan_out", "bias"}
    | {"target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step", "lora_dropout"}
    # LoRA's, which AdaLoRA's layers do not look at
    | {"r", "alpha_pattern", "use_rslora", "lora_bias", "init_lora_weights", "runtime_config", "megatron_core"}
    | {"eva_config", "qalora_group_size"}
)

_NEGLIGIBLE = 1e-5
_PARTS = {"A": "lora_A", "B": "lora_B", "E": "lora_E"}
# The name of the adapter stands at the end if the config was written while it was trained.
_MASKED = re.compile(rf"({re.escape(PREFIX)})?(?P<path>.+)\.lora_E(\.[^.]+)?")


def read(tensors: Mapping[str, RawTensor], config: Config, path: Path) -> Contents:
    """See ``ReadContents``."""
    check_known(config, KNOWN, path)
    fields = Fields(dict(config), str(path))
    rho, alpha = fields.natural("init_r", 1), fields.real("lora_alpha")
    kept = _kept(config, path, rho)
    found = sort(tensors, tuple(_PARTS.values()))
    if stranger := min(set(kept) - set(found.modules), default=None):
        raise BadInput(
            f"{path}: rank_pattern has {stranger!r}, of which the weights have no tensors: save them again."
        )
    scale = (alpha if alpha > 0 else float(rho)) / (rho + _NEGLIGIBLE)
    modules: dict[str, DraftModule] = {}
    for name, parts in found.modules.items():
        roles = {role: parts[part] for role, part in _PARTS.items()}
        term = checked(DraftTerm("adalora", roles, scale, alpha), name)
        if term.rank != kept.get(name, rho):
            raise BadInput(
                f"Module {name!r} of the adapter: expected {kept.get(name, rho)} singular values, by the config, "
                f"found {term.rank}; is this the config of these weights?"
            )
        if term.rank:
            modules[name] = DraftModule((term,), in_out_hint=bool(config.get("fan_in_fan_out")))
    return contents(modules, found.rest, config)


def _kept(config: Config, path: Path, rho: int) -> dict[str, int]:
    """How many singular values ``rank_pattern`` leaves of each module that it has."""
    masks = config.get("rank_pattern") or {}
    kept = {}
    for key, mask in masks.items() if isinstance(masks, dict) else ():
        name = _MASKED.fullmatch(key)
        if name is None or not isinstance(mask, list) or not all(type(flag) is bool for flag in mask):
            raise BadInput(
                f"{path}: rank_pattern: expected MODULE.lora_E and a list of true and false, found {key!r}."
            )
        if len(mask) != rho:
            raise BadInput(f"{path}: rank_pattern: expected {rho} flags (init_r) for {key!r}, found {len(mask)}.")
        kept[name["path"]] = sum(mask)
    if not isinstance(masks, dict):
        raise BadInput(f"{path}: rank_pattern: expected an object, found {masks!r}.")
    return kept
