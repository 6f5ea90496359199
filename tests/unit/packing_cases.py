"""A base with the layers of a Llama, and adapters for some of them, to be packed; and what each adapter adds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import tiny
import torch

import loreg

SIZES = {
    "self_attn.q_proj": (8, 6),
    "self_attn.k_proj": (4, 6),
    "self_attn.v_proj": (4, 6),
    "self_attn.o_proj": (6, 8),
    "mlp.gate_proj": (10, 6),
    "mlp.up_proj": (10, 6),
    "mlp.down_proj": (6, 10),
}
LAYERS, WORDS, HIDDEN = 3, 12, 6
RANKS = {"one": 3, "two": 8, "three": 2}
"""The largest of each adapter."""


def layer(number: int, name: str) -> str:
    return f"model.layers.{number}.{name}"


def write_base(folder: Path, **sizes: tuple[int, int]) -> Path:
    rng = np.random.default_rng(0)
    tensors = {
        f"{layer(number, name)}.weight": tiny.normal(rng, "BF16", *sizes.get(name.rpartition(".")[2], size))
        for number in range(LAYERS)
        for name, size in SIZES.items()
    }
    ends = {name: tiny.normal(rng, "BF16", WORDS, HIDDEN) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    return tiny.write_model(folder, tensors | ends)


def _factors(seed: int, names: Mapping[str, int], dtype: str = "F32") -> dict[str, tiny.Factors]:
    """``names``: paths with the rank of each."""
    rng = np.random.default_rng(seed)
    sizes = {layer(n, name): size for n in range(LAYERS) for name, size in SIZES.items()}
    sizes["lm_head"] = (WORDS, HIDDEN)
    return {path: tiny.factors(rng, *sizes[path], rank, dtype) for path, rank in names.items()}


def push(registry: loreg.Registry, folder: Path, *, embeddings: bool = True) -> loreg.Registry:
    """The base and three adapters: of slices without one between them, of several ranks, of a head and an embedding;
    and ``both``, composed of two of them."""
    registry.add_base(write_base(folder / "base"), "base")
    everything = {layer(n, name): 3 for n in range(LAYERS) for name in ("self_attn.q_proj", "self_attn.v_proj")}
    one = _factors(1, everything | {layer(2, "mlp.gate_proj"): 1})
    two = _factors(2, {layer(1, "mlp.up_proj"): 8, layer(1, "self_attn.q_proj"): 5, "lm_head": 4}, "BF16")
    three = _factors(3, {layer(0, "mlp.down_proj"): 2, layer(1, "self_attn.q_proj"): 2})
    patterns = {"rank_pattern": {"q_proj": 5, "lm_head": 4}, "alpha_pattern": {"lm_head": 3}}
    registry.push(tiny.write_adapter(folder / "one", one, r=3, alpha=7, rank_pattern={"gate_proj": 1}), base="base",
                  name="one")  # fmt: skip
    registry.push(tiny.write_adapter(folder / "two", two, r=8, alpha=5, **patterns), base="base", name="two")
    path = tiny.write_adapter(folder / "three", three, r=2, alpha=9, use_rslora=True)
    if embeddings:
        rng, prefix = np.random.default_rng(4), "base_model.model.model.embed_tokens.lora_embedding_"
        more = {f"{prefix}A": tiny.normal(rng, "F32", 2, WORDS), f"{prefix}B": tiny.normal(rng, "F32", HIDDEN, 2)}
        file = path / "adapter_model.safetensors"
        file.write_bytes(tiny.container((tiny.contents(file) | more).items(), {"format": "pt"}))
        config = path / "adapter_config.json"
        config.write_text(config.read_text().replace('"target_modules": [', '"target_modules": ["embed_tokens", '))
    registry.push(path, base="base", name="three")
    registry.compose("0.5*one - 3*two", "both")
    return registry


def delta(registry: loreg.Registry, name: str, path: str, out: int, into: int) -> tuple[torch.Tensor, torch.Tensor]:
    """s·BA (out, in) in float64, zeros where the adapter has no such module, and Σ|s||B||A|."""
    modules = registry.resolve(name).manifest.modules
    if path not in modules:
        return torch.zeros(out, into, dtype=torch.float64), torch.zeros(out, into, dtype=torch.float64)
    low = registry.load(name)[path]
    low = low.mT if modules[path].orientation == "in_out" else low
    return low.dense(), abs(low.scale) * (low.left.double().abs() @ low.right.double().abs())
