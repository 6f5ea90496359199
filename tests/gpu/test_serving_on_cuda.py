"""``load``, ``pack`` and ``unmerged`` on a real GPU, against the CPU: ``pytest -m gpu`` where there is one."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from live_models import bytes_of, module_of

import loreg
from loreg import serving
from loreg.merge import blobs
from loreg.serving.packing import Layout
from tests.unit.packing_cases import push
from tests.unit.test_unmerged import Net, ids
from tests.unit.test_unmerged_dora import BENT, Served, served

__all__ = ["served"]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device on this machine"),
]


@pytest.fixture
def packable(registry: loreg.Registry, tmp_path: Path) -> loreg.Registry:
    return push(registry, tmp_path)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("stage", [64, 1 << 20])
def test_factors_are_streamed_into_place(
    packable: loreg.Registry, monkeypatch: pytest.MonkeyPatch, stage: int, dtype: torch.dtype | None
) -> None:
    monkeypatch.setattr(blobs, "_STAGE", stage)
    for name in ("one", "two", "three", "both"):
        here, there = (serving.load(name, packable, device=device, dtype=dtype) for device in ("cpu", "cuda"))
        assert here.keys() == there.keys()
        for path, (A, B, scale) in there.items():
            assert A.device.type == B.device.type == "cuda"
            assert torch.equal(A.cpu(), here[path][0]) and torch.equal(B.cpu(), here[path][1])
            assert scale == here[path][2]


@pytest.mark.parametrize("layout", ["vllm", "sglang"])
def test_packed_tensors_are_those_of_the_cpu(packable: loreg.Registry, layout: Layout) -> None:
    names = ["one", "two", "three", "both"]
    here, there = (serving.pack(names, 16, layout, packable, device=device) for device in ("cpu", "cuda"))
    for name, stack in there.layers.items():
        for one, other in zip((*stack.A, *stack.B), (*here.layers[name].A, *here.layers[name].B), strict=True):
            assert one.is_cuda and torch.equal(one.cpu(), other)


def test_rows_are_served_on_the_device(pushed: loreg.Registry) -> None:
    batch, found = ids(4), []
    for device in ("cpu", "cuda"):
        model = Net(tiny.model()).to(device)
        served = serving.unmerged(model, ["sql", "humor"], pushed, check="none")
        with torch.inference_mode(), served as mixed, mixed.rows(["humor", None, "sql", "sql"]):
            found.append(model(batch.to(device)))
    here, there = found
    assert there.is_cuda and (there.cpu() - here).abs().max() <= 1e-12 * here.abs().max()


def test_rows_with_dora_and_trained_biases_are_served_on_the_device(served: Served) -> None:
    rows: list[str | None] = [*BENT, None, "sql"]
    model, batch = Net(tiny.model()).to("cuda"), ids(len(rows))
    mixed = serving.unmerged(model, rows, served.registry, check="none")
    with torch.inference_mode(), mixed, mixed.rows(rows):
        there = model(batch.to("cuda"))
    expected = served.expected(rows, batch)
    assert there.is_cuda and (there.cpu() - expected).abs().max() <= 1e-12 * expected.abs().max()


def test_a_merge_on_the_device_is_taken_back_where_the_model_went(pushed: loreg.Registry, tmp_path: Path) -> None:
    """And one on the CPU on the device."""
    model = module_of(tiny.tensors_in(tmp_path / "base"))
    before = bytes_of(model)
    for there, here in (("cuda", "cpu"), ("cpu", "cuda")):
        model.to(there)
        merged = serving.merge_(model, "sql", pushed)
        model.to(here)
        serving.unmerge_(model, merged)
        assert bytes_of(model.cpu()) == before
