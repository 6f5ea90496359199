"""LoHa and LoKr as PEFT writes them (0.21, ``tuners/loha``, ``tuners/lokr``).

Scale: α/r, with r and α of the config and its patterns, for LoKr too where both of its factors are whole and no
tensor has r. But LoKr of PEFT 0.13 and older computed without any (fixed in #2180), and is what it was trained to be:
its config has no ``rank_dropout_scale``. PEFT 0.14 and later load such a one with α/r.

Convolutions are the layers themselves: PEFT computes with their stride, padding, dilation and groups.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from loreg.adapters.draft import DraftModule, DraftTerm, RawTensor
from loreg.adapters.peft.config import check_known, check_pattern
from loreg.adapters.peft.contents import Config, Contents
from loreg.adapters.peft.parts import checked, contents, from_patterns, sort
from loreg.errors import BadInput
from loreg.format.fields import Fields

# Dropouts are for training; the shapes of the tensors say how convolutions are decomposed.
KNOWN = frozenset(
    {"r", "alpha", "rank_pattern", "alpha_pattern", "rank_dropout", "module_dropout", "init_weights"}
    | {"use_effective_conv2d"}
)
KNOWN_LOKR = KNOWN | {"decompose_both", "decompose_factor", "rank_dropout_scale"}

_LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
_LOHA_CORES = ("hada_t1", "hada_t2")
_LOKR = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")


def read_loha(tensors: Mapping[str, RawTensor], config: Config, path: Path) -> Contents:
    """See ``ReadContents``."""
    _check(config, path)
    check_known(config, KNOWN, path)
    found = sort(tensors, _LOHA, _LOHA_CORES)
    modules = {name: _module("loha", name, parts, config) for name, parts in found.modules.items()}
    return contents(modules, found.rest, config)


def read_lokr(tensors: Mapping[str, RawTensor], config: Config, path: Path) -> Contents:
    """See ``ReadContents``."""
    _check(config, path)
    check_known(config, KNOWN_LOKR, path)
    found = sort(tensors, (), _LOKR)
    modules = {name: _module("lokr", name, parts, config) for name, parts in found.modules.items()}
    return contents(modules, found.rest, config)


def _module(form: str, path: str, parts: Mapping[str, RawTensor], config: Config) -> DraftModule:
    tensors = {part.partition("_")[2]: tensor for part, tensor in parts.items()}
    rank, alpha = from_patterns(path, config, "r", "alpha")
    scale = alpha / rank if form == "loha" or "rank_dropout_scale" in config else 1.0
    whole = len(tensors["w2"].shape) if "w2" in tensors else 0
    # See the form: only for a Conv1d does PEFT let a whole w2 of three dimensions meet a matrix.
    parameters = {"align": "trailing" if whole == 3 else "leading"} if form == "lokr" else {}
    term = checked(DraftTerm(form, tensors, scale, alpha, parameters), path)
    for role, tensor in tensors.items():
        if role in ("w1_b", "w2_b") and tensor.shape[0] != rank:
            raise BadInput(
                f"Module {path!r} of the adapter: expected {role} of rank {rank}, as the config says, by which α is "
                f"divided, found {tensor.shape[0]}; is this the config of these weights?"
            )
    return DraftModule((term,))


def _check(config: Config, path: Path) -> None:
    fields = Fields(dict(config), str(path))
    fields.natural("r", 1)
    fields.real("alpha")
    for pattern in ("rank_pattern", "alpha_pattern"):
        check_pattern(config.get(pattern) or {}, f"{path}: {pattern}")
