"""Trained token rows alone, as PEFT's type TRAINABLE_TOKENS has them (0.21, ``tuners/trainable_tokens``): what
``tokens`` reads beside a LoRA, with other names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from loreg.adapters.draft import RawTensor
from loreg.adapters.peft import tokens
from loreg.adapters.peft.config import check_known
from loreg.adapters.peft.contents import Config, Contents
from loreg.adapters.peft.parts import contents, sort
from loreg.errors import BadInput

KNOWN = frozenset({"token_indices", "init_weights"})

_ROWS = "trainable_tokens_delta"


def read(tensors: Mapping[str, RawTensor], config: Config, path: Path) -> Contents:
    """See ``ReadContents``."""
    check_known(config, KNOWN, path)
    found = sort(tensors, (_ROWS,))
    indices = config.get("token_indices")
    if not isinstance(indices, list) or not indices:
        raise BadInput(f"{path}: token_indices: expected a list of row numbers, found {str(indices)[:80]}.")
    rows = {name: parts[_ROWS] for name, parts in found.modules.items()}
    modules = tokens.read(rows, {tokens.FIELD: indices}, path)
    return contents(modules, found.rest, config)
