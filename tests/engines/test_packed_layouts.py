"""What ``serving.pack`` makes, computed with by the engines' own operations in torch: those of vLLM and of SGLang.

Each is one file of the engine that needs nothing but torch, and is loaded on its own where the package is installed.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import loreg
from loreg import serving
from tests.unit.packing_cases import WORDS, delta, push

NAMES = ("one", "two", "three")
TOKENS = [0, 0, 2, 1, 1, 1, 0, 2]
"""The adapter of each token."""


def operations(package: str, file: str) -> ModuleType:
    """A file of an installed package, without the package's own imports. Skips where it is not there."""
    spec = importlib.util.find_spec(package)
    for place in (spec.submodule_search_locations or ()) if spec is not None else ():
        path = Path(place, file)
        if path.is_file():
            found = importlib.util.spec_from_file_location(f"{package}_operations", path)
            assert found is not None and found.loader is not None
            module = importlib.util.module_from_spec(found)
            found.loader.exec_module(module)
            return module
    pytest.skip(f"{package} is not installed, of which {file} is needed")


@pytest.fixture
def packable(registry: loreg.Registry, tmp_path: Path) -> loreg.Registry:
    return push(registry, tmp_path)


def expected(registry: loreg.Registry, path: str, x: torch.Tensor, out: int) -> tuple[torch.Tensor, torch.Tensor]:
    """s·B(Ax) for each token by its adapter, in float64, and the sum of the products' sizes."""
    pairs = [delta(registry, NAMES[number], path, out, x.shape[1]) for number in TOKENS]
    outputs = torch.stack([dense @ row for (dense, _), row in zip(pairs, x.double(), strict=True)])
    sizes = torch.stack([size @ row for (_, size), row in zip(pairs, x.double().abs(), strict=True)])
    return outputs, sizes


def _input(features: int) -> torch.Tensor:
    return torch.randn(len(TOKENS), features, generator=torch.Generator().manual_seed(features))


def test_vllm_computes_what_the_adapters_add(packable: loreg.Registry) -> None:
    """As ``PunicaWrapperCPU.add_lora_linear`` calls them, at scale 1: of each slice a shrink and an expansion."""
    ops = operations("vllm", "lora/ops/torch_ops/lora_ops.py")
    packed = serving.pack(NAMES, 8, "vllm", packable)
    index = torch.tensor(TOKENS)
    for name, stack in packed.layers.items():
        embeds = name.endswith("embed_tokens")
        x = _input(stack.A[0].shape[1 if embeds else 3])
        y = torch.zeros(len(TOKENS), sum(stack.sizes))
        first = 0
        for path, size, A, B in zip(stack.modules, stack.sizes, stack.A, stack.B, strict=True):
            inner = torch.zeros(len(TOKENS), packed.max_rank)
            if embeds:  # one row for each word, from a table of all adapters, as VocabParallelEmbeddingWithLoRA
                words = torch.arange(len(TOKENS)) % WORDS
                x = torch.nn.functional.one_hot(words, WORDS).float()
                inner = torch.nn.functional.embedding(words + index * WORDS, A.view(-1, packed.max_rank))
            else:
                ops.bgmv_shrink(x, A, inner, index, 1.0)
            ops.bgmv_expand_slice(inner, B, y, index, first, size, True)
            exact, scale = expected(packable, path, x, size)
            assert ((y[:, first : first + size] - exact).abs() <= 1e-5 * scale).all(), (name, path)
            first += size


def test_sglang_computes_what_the_adapters_add(packable: loreg.Registry) -> None:
    """As ``TorchNativeLoRABackend`` calls them, with the adapters' own ranks and scalings of 1."""
    ops: Any = operations("sglang", "srt/lora/torch_ops/lora_ops.py")
    packed = serving.pack(NAMES, 8, "sglang", packable)
    segments, lengths = torch.unique_consecutive(torch.tensor(TOKENS), return_counts=True)
    ranks, ones = torch.tensor(packed.ranks), torch.ones(len(NAMES))
    for name, stack in packed.layers.items():
        (A,), (B,) = stack.A, stack.B
        slices = A.shape[1] // packed.max_rank
        if name.endswith("embed_tokens"):
            words = torch.arange(len(TOKENS)) % WORDS
            x = torch.nn.functional.one_hot(words, WORDS).float()
            inner = ops.sgemm_lora_a_embedding_fwd(words, A, segments, lengths, ranks, ones, WORDS)
        else:
            x = _input(A.shape[2])
            inner = ops.sgemm_lora_a_fwd(x, A, segments, lengths, ranks, ones, slices)
        offsets = torch.tensor([0, *stack.sizes]).cumsum(0)
        y = ops.sgemm_lora_b_fwd(inner, B, segments, lengths, ranks, offsets)
        for place, path in enumerate(stack.modules):
            first, end = int(offsets[place]), int(offsets[place + 1])
            exact, scale = expected(packable, path, x, end - first)
            assert ((y[:, first:end] - exact).abs() <= 1e-5 * scale).all(), (name, path)
