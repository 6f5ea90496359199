"""LoRA on ``torch.nn.MultiheadAttention``, whose ``in_proj_weight`` is a parameter of its own (PEFT since 0.14).

PEFT adds the delta of ``out_proj`` twice, in every forward pass and so in training too: once by hand, and once more
by the layer's own ``merge`` (0.21, ``tuners/lora/layer.py``, `MultiheadAttention.merge`; PEFT #3774). What was
trained is W + 2·s·BA, and that is what is merged here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from loreg.adapters.draft import DraftModule
from loreg.adapters.peft.contents import Config
from loreg.errors import BadInput, Unsupported

WRAPPED = ".base_layer.out_proj"
PARAMETER = "in_proj_weight"
TWICE = 2.0
_KNOWN_VERSIONS = (0, 21)
_DIGITS = 18  # of both numbers of a release; Python turns no text of thousands into one


def joined(modules: Mapping[str, DraftModule], config: Config) -> dict[str, DraftModule]:
    """The modules by their paths in the model, those of an attention with its parameters and scales.

    Raises Unsupported for a release of PEFT that may add the delta once, and for a bias that PEFT's layer ignores.
    """
    owners = {path.removesuffix(WRAPPED) for path in modules if path.endswith(WRAPPED)}
    if owners:
        _check_version(config)
    result = {}
    for path, module in modules.items():
        owner = path.removesuffix(WRAPPED)
        if owner in owners and module.bias_terms:
            raise Unsupported(
                f"Module {owner!r} is an attention with lora_bias, of which PEFT's forward uses one bias and ignores "
                "the other: train it without."
            )
        if path.endswith(WRAPPED):
            if owner not in modules:
                raise BadInput(f"Module {owner!r} of the adapter lacks the factors of {PARAMETER}: save it again.")
            terms = tuple(replace(term, scale=TWICE * term.scale) for term in module.terms)
            result[f"{owner}.out_proj"] = replace(module, terms=terms)
        elif path in owners:
            result[path] = replace(module, parameter=PARAMETER)
        else:
            result[path] = module
    return result


def _check_version(config: Config) -> None:
    said = config.get("peft_version")
    found = re.match(r"(\d+)\.(\d+)", str(said)) if said else None
    if found and len(found[0]) > _DIGITS:
        raise BadInput(f"peft_version: expected a release such as '0.21.0', found {str(said)[:60]!r}: correct it.")
    if found and (int(found[1]), int(found[2])) > _KNOWN_VERSIONS:
        raise Unsupported(
            f"The adapter has a MultiheadAttention and is of PEFT {said}: up to 0.21 its forward adds the delta of "
            "out_proj twice, and whether this release does is not known here."
        )
