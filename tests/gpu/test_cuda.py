"""On a real GPU: the same bytes as on the CPU. ``pytest -m gpu`` runs these where there is one."""

from __future__ import annotations

from pathlib import Path

import live_models
import pytest
import tiny
import torch

import loreg
from loreg import serving
from loreg.algebra import elementwise
from loreg.algebra.delta import Dense, LowRank
from loreg.algebra.edits import WeightedSum
from loreg.algebra.forms import Term, edit_of
from loreg.errors import BadInput
from loreg.format import methods
from loreg.tensors import to_memory
from tests.unit.form_cases import CASES, Case

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


def _normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("method", sorted(elementwise.METHODS))
def test_methods_give_the_same_bits_on_cuda(method: str) -> None:
    row = methods.METHODS[method]
    parameters = methods.parameters(method, {"density": 0.6} if "density" in row.parameters else {})
    count = row.adapters[1] or 3
    values = tuple(_normal(96, 130, seed=seed) for seed in range(count))
    given = values, (0.7, 1.2, 0.4)[:count], (11, 12, 13)[:count]
    here = elementwise.METHODS[method](elementwise.Deltas(*given), parameters)
    there = elementwise.METHODS[method](
        elementwise.Deltas(tuple(value.cuda() for value in values), *given[1:]), parameters
    )
    assert bytes(to_memory(there.cpu())) == bytes(to_memory(here))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_forms_give_the_same_bytes_on_cuda(case: Case) -> None:
    shape = (case.parameters["experts"], *case.out_in) if case.form == "lora_experts" else case.out_in
    W = (_normal(*shape, seed=9) * 0.05).to(torch.bfloat16)
    tensors = {role: _normal(*size, seed=i).float() for i, (role, size) in enumerate(sorted(case.shapes.items()))}

    def merged(device: str) -> bytes:
        weight = W.to(device)
        term = Term(
            {role: tensor.to(device) for role, tensor in tensors.items()},
            case.parameters,
            0.5,
            case.out_in,
            lambda: weight,
        )
        return bytes(to_memory(edit_of(case.form, term).apply(weight).cpu()))

    assert merged("cuda") == merged("cpu")


def _model(folder: Path) -> torch.nn.Module:
    return live_models.module_of(tiny.tensors_in(folder))


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_a_live_model_on_cuda(dtype: str, registry: loreg.Registry, tmp_path: Path) -> None:
    """The bytes of a merge on disk; and those of the base again, there or after a move to the CPU."""
    base = tiny.write_model(tmp_path / "base", tiny.model(dtype=dtype, rows=160, cols=96))
    registry.add_base(base, "base")
    for seed, name in enumerate(("sql", "humor"), 1):
        adapter = tiny.write_adapter(tmp_path / name, tiny.adapter(seed, rank=3, rows=160, cols=96))
        registry.push(adapter, base="base", name=name)
    registry.merge("0.5*sql - humor", tmp_path / "out", verify="none")
    model = _model(base).cuda()
    before = live_models.bytes_of(model)
    for place in ("cuda", "cpu"):
        merged = serving.merge_(model, "0.5*sql - humor", registry)
        assert live_models.bytes_of(model) == live_models.bytes_of(_model(tmp_path / "out")) != before
        serving.unmerge_(model.to(place), merged)
        assert live_models.bytes_of(model) == before


def test_an_error_half_way_on_cuda_leaves_nothing(registry: loreg.Registry, tmp_path: Path) -> None:
    tensors = tiny.model()
    registry.add_base(tiny.write_model(tmp_path / "base", tensors), "base")
    registry.push(tiny.write_adapter(tmp_path / "sql", tiny.adapter()), base="base", name="sql")
    model = _model(tmp_path / "base").cuda()
    with torch.no_grad():
        model.get_submodule(tiny.V).weight[-1, -1] = float("inf")
    before = live_models.bytes_of(model)
    with pytest.raises(BadInput, match="infinite"):
        serving.merge_(model, "sql", registry, check="none")
    assert live_models.bytes_of(model) == before


def test_swaps_in_a_live_model(pushed: loreg.Registry, tmp_path: Path) -> None:
    """The bytes that a model on the CPU has after each, and at the end the base's; unmerged, the same outputs."""
    here = live_models.module_of(tiny.tensors_in(tmp_path / "base"))
    there = live_models.module_of(tiny.tensors_in(tmp_path / "base")).cuda()
    before = live_models.bytes_of(here)
    both = [serving.attach(model, pushed) for model in (here, there)]
    for expression in ("sql", "humor", "0.5*sql - humor", "sql"):
        for live in both:
            live.swap(expression)
        assert live_models.bytes_of(there) == live_models.bytes_of(here)
    for live in both:
        live.restore()
    assert live_models.bytes_of(there) == before


def test_factors_on_the_device(pushed: loreg.Registry) -> None:
    expected = serving.load("sql", pushed)
    with serving.Cache(pushed, device="cuda") as cache:
        for _ in range(2):  # straight from the file, and then from what the tier above has
            with cache.factors("sql", "gpu") as found, cache.factors("sql", "cpu"):
                for path, (A, B, scale) in found.items():
                    assert A.is_cuda and torch.equal(A.cpu(), expected[path][0])
                    assert B.is_cuda and torch.equal(B.cpu(), expected[path][1])
                    assert scale == expected[path][2]
