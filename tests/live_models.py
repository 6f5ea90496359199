"""Live models of checkpoints on disk, and their bytes: of transformers' own class, or else of plain modules."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from pathlib import Path

import tiny
import torch

from loreg.tensors import NAMES, TORCH, to_memory

Bytes = dict[str, tuple[str, tuple[int, ...], bytes]]


def module_of(tensors: Mapping[str, tiny.Tensor]) -> torch.nn.Module:
    """A model that has these parameters, and buffers of what is no float, under their names."""
    root = torch.nn.Module()
    for name, value in tensors.items():
        *path, leaf = name.split(".")
        module = root
        for part in path:
            if part not in module._modules:
                module.add_module(part, torch.nn.Module())
            module = module.get_submodule(part)
        data = torch.frombuffer(bytearray(value.data), dtype=TORCH[value.dtype]).reshape(value.shape)
        if data.is_floating_point():
            module.register_parameter(leaf, torch.nn.Parameter(data))
        else:
            module.register_buffer(leaf, data)
    return root


def load(folder: Path) -> torch.nn.Module:
    """The model that is saved in ``folder``, in its own dtype."""
    config = folder / "config.json"
    classes = json.loads(config.read_text()).get("architectures") if config.is_file() else None
    if not classes:
        return module_of(tiny.tensors_in(folder))
    kind = getattr(importlib.import_module("transformers"), classes[0])
    model: torch.nn.Module = kind.from_pretrained(folder, dtype="auto")
    return model.eval()


def bytes_of(model: torch.nn.Module) -> Bytes:
    """Everything that the model would save."""
    return {
        name: (NAMES[t.dtype], tuple(t.shape), bytes(to_memory(t.detach().cpu().contiguous())))
        for name, t in model.state_dict(keep_vars=True).items()
    }
