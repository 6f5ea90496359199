"""Trained token rows alone, as PEFT's type TRAINABLE_TOKENS has them (0.21, ``tuners/trainable_tokens``): what
``tokens`` reads beside a LoRA, with other names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from loreg.adapters.draft import RawTensor
from loreg.adapters.peft import tokens
from loreg.adapters.peft.config import check_known
from loreg.adapters.peft.contents import Config, Contents
from loreg.adapters.peft.parts import contents, sort
from loreg.errors import BadInput

KNOWN = frozenset({"token_indices", "init_weights"})

_ROWS = "trainable_tokens_delta"
_HEAD = "lm_head"


def read(tensors: Mapping[str, RawTensor], config: Config, path: Path) -> Contents:
    """See ``ReadContents``."""
    check_known(config, KNOWN, path)
    found = sort(tensors, (_ROWS,))
    indices = config.get("token_indices")
    if not isinstance(indices, list) or not indices:
        raise BadInput(f"{path}: token_indices: expected a list of row numbers, found {str(indices)[:80]}.")
    rows = {name: parts[_ROWS] for name, parts in found.modules.items()}
    modules = tokens.read(rows, {tokens.FIELD: indices}, path)
    if len(modules) == 1:
        # PEFT looks for a head that is tied to the embedding, and for nothing that is tied to a head.
        modules = {name: replace(module, together=not name.endswith(_HEAD)) for name, module in modules.items()}
    used = {raw.key for module in modules.values() if not module.repeats for raw in module.terms[0].tensors.values()}
    unused = [tensor for tensor in rows.values() if tensor.key not in used]
    return contents(modules, found.rest, config, unused)
