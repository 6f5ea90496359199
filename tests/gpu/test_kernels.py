"""The kernels of ``algebra/gpu`` on a real GPU: the bytes of the CPU, and nothing that waits for the device."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from loreg.algebra import gpu
from loreg.algebra.delta import LowRank
from loreg.algebra.edits import Prepared, WeightedSum
from loreg.algebra.launching import Work, launch
from loreg.algebra.rounding import bits
from loreg.errors import BadInput
from loreg.serving import merging
from tests import launched

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device on this machine"),
    pytest.mark.skipif(not gpu.is_there(), reason="triton is not installed, or not for this device"),
]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
CUDA = torch.device("cuda")


@contextmanager
def _without_waiting() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _case(
    rows: int, columns: int, rank: int, dtype: torch.dtype, *, size: float = 1.0, seed: int = 0
) -> tuple[torch.Tensor, WeightedSum]:
    random = torch.Generator().manual_seed(seed)
    W = 0.02 * torch.randn(rows, columns, generator=random)
    W[torch.rand(rows, columns, generator=random) < 0.01] *= 2.0**-12
    left = torch.randn(rows, rank, generator=random).to(torch.bfloat16)
    right = (0.001 * size * torch.randn(rank, columns, generator=random)).to(torch.bfloat16)
    return W.to(dtype), WeightedSum((LowRank(left, right, 0.37),))


@pytest.mark.parametrize("dtype_in", DTYPES)
@pytest.mark.parametrize("dtype_out", DTYPES)
@pytest.mark.parametrize(("rows", "columns", "rank"), [(300, 513, 3), (256, 1024, 16), (129, 200, 64), (70, 136, 1)])
def test_tiles_have_the_bytes_of_the_cpu(
    dtype_in: torch.dtype, dtype_out: torch.dtype, rows: int, columns: int, rank: int
) -> None:
    W, edit = _case(rows, columns, rank, dtype_in)
    residual = dtype_in == dtype_out
    here, there = (
        (edit.prepare(W.shape, dtype_in, dtype_out, device, residual=residual), W.to(device))
        for device in ("cpu", "cuda")
    )
    results = []
    for prepared, weight in (here, there):
        out = torch.empty(W.shape, dtype=dtype_out, device=weight.device)
        small = torch.full(W.shape, 77, dtype=torch.int8, device=weight.device) if residual else None
        outcome = prepared.tile(weight, 0, out, small)
        results.append([x.cpu() for x in (bits(out), small, outcome.index, outcome.wide) if x is not None])
    assert isinstance(there[0], Prepared) and there[0].on_gpu is not None
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1.0, 30.0, 1000.0])
def test_a_model_is_merged_in_place_swapped_and_taken_back(dtype: torch.dtype, size: float) -> None:
    """Also where most words have a residual, which a first launch has no room for."""
    cases = [
        _case(rows, columns, rank, dtype, size=size, seed=seed)
        for seed, (rows, columns, rank) in enumerate(
            ((1024, 2048, 16), (2048, 1024, 16), (768, 776, 8), (100, 33, 4))
        )
    ]
    live = [W.to(CUDA) for W, _ in cases]
    torch.cuda.synchronize()
    launch(_works(cases, live), residual=True).done()  # compiles
    live = [W.to(CUDA) for W, _ in cases]
    with _without_waiting():
        launched = launch(_works(cases, live), residual=True)
    kept = launched.done()
    for (W, edit), weight in zip(cases, live, strict=True):
        assert torch.equal(bits(weight.cpu()), bits(edit.apply(W)))
    others = [_case(*W.shape, 16, dtype, size=size, seed=9)[1] for W, _ in cases]
    works = [
        replace(work, back=edit.prepare(W.shape, dtype, dtype, CUDA), kept=one)
        for work, (W, edit), one in zip(
            _works([(W, other) for (W, _), other in zip(cases, others, strict=True)], live), cases, kept, strict=True
        )
    ]
    with _without_waiting():
        launched = launch(works, residual=True)
    kept = launched.done()
    for (W, _), other, weight in zip(cases, others, live, strict=True):
        assert torch.equal(bits(weight.cpu()), bits(other.apply(W)))
    launched.back()
    for (W, edit), weight in zip(cases, live, strict=True):
        assert torch.equal(bits(weight.cpu()), bits(edit.apply(W)))
    launch(works, residual=True).done()
    backs = [
        Work(None, weight, weight, back=other.prepare(weight.shape, dtype, dtype, CUDA), kept=one)
        for weight, other, one in zip(live, others, kept, strict=True)
    ]
    with _without_waiting():
        launched = launch(backs)
    launched.done()
    assert all(torch.equal(bits(weight.cpu()), bits(W)) for (W, _), weight in zip(cases, live, strict=True))


def _works(cases: list[tuple[torch.Tensor, WeightedSum]], live: list[torch.Tensor]) -> list[Work]:
    """Prepared from factors on the host."""
    return [
        Work(edit.prepare(W.shape, W.dtype, W.dtype, CUDA, residual=True), weight, weight)
        for (W, edit), weight in zip(cases, live, strict=True)
    ]


def _live(count: int) -> dict[str, launched.Case]:
    kinds = [((256, 512), torch.bfloat16), ((3, 64, 96), torch.bfloat16), ((100, 33), torch.float32)]
    made = {
        f"{i}.{j}": launched.case(*shape, dtype=dtype, rank=8, seed=10 * i + j)
        for i in range(count)
        for j, (shape, dtype) in enumerate(kinds)
    }
    return {name: (W.to(CUDA), edit) for name, (W, edit) in made.items()}


def test_a_live_merge_has_the_bytes_of_the_cpu_and_waits_as_often_for_many_tensors_as_for_few() -> None:
    """Neither it nor the way back waits for one tensor."""
    waits = []
    for count in (1, 1, 6):  # first to compile
        cases = _live(count)
        before = {name: W.cpu() for name, (W, _) in cases.items()}
        edits = launched.edits(cases)
        ahead = merging.Ahead(edits)
        with _waits() as forth:
            editings = merging.merge(edits, None, ahead, list, lambda: None)
        for name, (W, edit) in cases.items():
            assert launched.same(W, edit.apply(before[name])), name
        kept = sum(editing.nbytes for editing in editings)
        assert all(editing.whole is not None for editing in editings)
        assert 0 < kept < 0.2 * sum(W.nbytes for W in before.values())
        with _waits() as back:
            merging.unmerge(editings, None)
        assert all(launched.same(W, before[name]) for name, (W, _) in cases.items())
        waits.append((len(forth), len(back)))
    assert waits[1] == waits[2], waits


@contextmanager
def _waits() -> Iterator[list[warnings.WarningMessage]]:
    """For the device, as torch warns of them."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            yield found
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_error_in_the_last_of_many_leaves_all_as_they_were(value: float) -> None:
    cases = _live(4)
    cases["last"] = launched.case(70, 136, seed=99)
    W = cases["last"][0].to(CUDA)
    W[69, 135] = W[3, 5] = value
    cases["last"] = W, cases["last"][1]
    before = {name: W.clone() for name, (W, _) in cases.items()}
    edits = launched.edits(cases)
    with pytest.raises(BadInput, match=r"'last': element \[3, 5\]|'last': element \[69, 135\]"):
        merging.merge(edits, None, merging.Ahead(edits), list, lambda: None)
    assert all(launched.same(W, before[name]) for name, (W, _) in cases.items())


def test_speed_of_layers_of_seven_billion() -> None:
    """Printed, with the bound that moving bytes sets: pytest -m gpu -s. Four layers, 0.8 billion weights."""
    shapes = [*[(4096, 4096)] * 4, (11008, 4096), (11008, 4096), (4096, 11008)] * 4
    live = [torch.randn(shape, device=CUDA, dtype=torch.bfloat16).mul_(0.02) for shape in shapes]
    edits = [
        WeightedSum((LowRank(torch.randn(m, 16).bfloat16(), (0.001 * torch.randn(16, n)).bfloat16(), 0.37),))
        for m, n in shapes
    ]
    copies = [torch.empty_like(weight) for weight in live]
    copying = _milliseconds(lambda: [copy.copy_(weight) for copy, weight in zip(copies, live, strict=True)])
    made = [edit.prepare(W.shape, W.dtype, W.dtype, CUDA, residual=True) for edit, W in zip(edits, live, strict=True)]
    plain = [Work(*each) for each in zip(made, live, copies, strict=True)]
    ends = list(zip(made, launch(plain, residual=True).done(), live, copies, strict=True))
    ways = {
        "merged": (plain, False),
        "merged, and what undoes it kept": (plain, True),
        "taken back": ([Work(None, out, W, back=one, kept=undo) for one, undo, W, out in ends], False),
        "swapped": ([Work(one, out, W, back=one, kept=undo) for one, undo, W, out in ends], True),
    }
    for name, (works, residual) in ways.items():
        computing = _milliseconds(lambda works=works, residual=residual: launch(works, residual=residual))
        print(f"{name}: {computing:.2f} ms, a copy {copying:.2f} ms: {100 * copying / computing:.0f} %")


def _milliseconds(work: object) -> float:
    assert callable(work)
    times = []
    for _ in range(7):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[len(times) // 2]
