"""Edits of an adapter's directory as PEFT writes it: one field of the config, one tensor."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Edit = Callable[[Path], None]


def with_config(**changes: Any) -> Edit:
    """Other values of fields; ``...`` takes a field out."""

    def edit(folder: Path) -> None:
        path = folder / "adapter_config.json"
        fields = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({key: value for key, value in fields.items() if value is not ...}))

    return edit


def with_tensors(change: Callable[[dict[str, torch.Tensor]], None]) -> Edit:
    """``change`` is done to the tensors by name."""

    def edit(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        found = load_file(path)
        change(found)
        save_file(found, path)

    return edit
