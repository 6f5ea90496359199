"""On a real GPU: the same bytes as on the CPU. ``pytest -m gpu`` runs these where there is one."""

from __future__ import annotations

import pytest
import torch

from loreg.algebra.delta import Dense, LowRank
from loreg.algebra.edits import WeightedSum
from loreg.tensors import to_memory

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device on this machine"),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("factors", [torch.bfloat16, torch.float32])
def test_same_bytes_on_cuda(dtype: torch.dtype, factors: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, size: float) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * size

    W = normal(1024, 768, size=0.02).to(dtype)
    terms = [
        LowRank(normal(1024, rank, size=0.02).to(factors), normal(rank, 768, size=0.05).to(factors), scale)
        for rank, scale in ((16, 2.0), (4, -0.7))
    ]
    edit = WeightedSum(tuple(terms), (Dense(normal(1024, 768, size=0.001).to(dtype), 0.5),))
    there = edit.to("cuda").apply(W.cuda()).cpu()
    assert bytes(to_memory(there)) == bytes(to_memory(edit.apply(W)))
