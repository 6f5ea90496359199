"""Inputs of the benchmarks, made on the spot: Llama-shaped checkpoints of random weights, and adapters for them."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from loreg.format.safetensors import canonical_header

SHARDS = 3
RANK = 16
_DRAWN = 1 << 22


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama."""

    name: str
    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int = 32000

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(out, in) of each linear layer of a block."""
        kv = self.hidden * self.kv_heads // self.heads
        return {
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (kv, self.hidden),
            "self_attn.v_proj": (kv, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.inner, self.hidden),
            "mlp.up_proj": (self.inner, self.hidden),
            "mlp.down_proj": (self.hidden, self.inner),
        }

    @property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        names: dict[str, tuple[int, ...]] = {
            f"model.layers.{layer}.{name}.weight": size
            for layer in range(self.layers)
            for name, size in self.linears.items()
        }
        for layer in range(self.layers):
            for name in ("input_layernorm", "post_attention_layernorm"):
                names[f"model.layers.{layer}.{name}.weight"] = (self.hidden,)
        ends = {"model.embed_tokens.weight": (self.vocabulary, self.hidden), "model.norm.weight": (self.hidden,)}
        return {**names, **ends, "lm_head.weight": (self.vocabulary, self.hidden)}

    @property
    def parameters(self) -> int:
        return sum(math.prod(size) for size in self.tensors.values())

    @property
    def config(self) -> dict[str, object]:
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "vocab_size": self.vocabulary,
            "tie_word_embeddings": False,
            "dtype": "bfloat16",
        }


TINY = Shape("tiny", 64, 160, 2, 4, 2, 320)
TINY_TWICE = Shape("tiny, twice as wide", 128, 320, 2, 4, 4, 320)
LLAMA_1B = Shape("1.1 B", 2048, 5632, 22, 32, 4)
LLAMA_7B = Shape("7 B-shaped", 4096, 11008, 32, 32, 32)


def make_base(folder: Path, shape: Shape, *, sparse: bool = False) -> int:
    """A bf16 checkpoint in three shards, of zeros in files without blocks if ``sparse``; returns its bytes."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    drawn = (torch.randn(_DRAWN, generator=generator) * 0.02).to(torch.bfloat16)
    names, weight_map, size = sorted(shape.tensors), {}, 0
    for shard in range(SHARDS):
        file = f"model-{shard + 1:05d}-of-{SHARDS:05d}.safetensors"
        part = {name: shape.tensors[name] for name in names[shard::SHARDS]}
        header = canonical_header([(name, "BF16", sizes) for name, sizes in part.items()], {"format": "pt"})
        with (folder / file).open("wb", buffering=0) as out:
            out.write(header.raw)
            for position, info in enumerate(header.tensors):
                if not sparse:
                    _write(out.fileno(), drawn, position, info.nbytes // 2, len(info.shape) == 1)
            out.truncate(header.file_size)
            os.fsync(out.fileno())
        weight_map.update(dict.fromkeys(part, file))
        size += header.file_size
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(shape.config))
    return size


def _write(descriptor: int, drawn: torch.Tensor, position: int, count: int, norm: bool) -> None:
    """Numbers drawn once, from another place on for each tensor: to draw billions would take longer than all else."""
    if norm:
        os.write(descriptor, torch.ones(count, dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes())
        return
    start = position * 7919 % _DRAWN
    turned = torch.cat([drawn[start:], drawn[:start]]).view(torch.uint8).numpy()
    left = 2 * count
    while left:
        left -= os.write(descriptor, turned[:left].data)


def make_adapter(folder: Path, shape: Shape, seed: int, relative: float = 0.01, rank: int = RANK) -> None:
    """A PEFT adapter on every linear layer, in bf16, with ‖ΔW‖ of about ``relative``·‖W‖."""
    generator = torch.Generator().manual_seed(seed)
    # ΔW = 2·B·A: of a standard deviation 2·√r·σ², against W's 0.02.
    sigma = math.sqrt(relative * 0.02 / (2 * math.sqrt(rank)))
    tensors = {}
    for layer in range(shape.layers):
        for name, (out, inner) in shape.linears.items():
            path = f"base_model.model.model.layers.{layer}.{name}"
            for end, size in (("lora_A", (rank, inner)), ("lora_B", (out, rank))):
                factor = (torch.randn(*size, generator=generator) * sigma).to(torch.bfloat16)
                tensors[f"{path}.{end}.weight"] = factor
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    targets = sorted(name.rpartition(".")[2] for name in shape.linears)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": targets, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
