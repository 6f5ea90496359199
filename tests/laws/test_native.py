"""The compiled pass of an edit gives the bytes, and the doubts, of torch's."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loreg.algebra import LowRank, WeightedSum, native
from loreg.algebra.rounding import bits
from loreg.errors import BadInput
from loreg.format.journal import BLOCK, ESCAPE
from loreg.format.safetensors import TensorInfo
from loreg.merge.journal import Recorder, Spill

compiled = pytest.mark.skipif(native.library is None, reason="loreg was installed where there was no C compiler")
PAIRS = [(one, other) for one in (torch.bfloat16, torch.float32) for other in (torch.bfloat16, torch.float32)]
pairs = pytest.mark.parametrize(("dtype_in", "dtype_out"), PAIRS)


def test_it_is_there_where_a_compiler_is() -> None:
    if shutil.which("cc") is None:
        pytest.skip("there is no C compiler on this machine")
    assert native.library is not None, "install loreg again: python -m pip install -e ."


def _by_torch(work: Callable[[], Any]) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "library", None)
        return work()


def _edited(W: torch.Tensor, edit: WeightedSum, dtype: torch.dtype, cuts: int) -> tuple[torch.Tensor, int]:
    out = torch.empty(W.shape, dtype=dtype)
    prepared = edit.prepare(W.shape, W.dtype, dtype)
    height = -(-len(W) // cuts)
    doubts = sum(
        prepared.tile(W[first : first + height], first, out[first : first + height]).doubt
        for first in range(0, len(W), height)
    )
    return out, doubts


@compiled
@pairs
@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 41),
    columns=st.one_of(st.integers(1, 70), st.integers(500, 540)),
    rank=st.integers(1, 70),
    scale=st.sampled_from([1.0, 0.3, 2.0**-40, 2.0**60]),
    seed=st.integers(0, 2**32),
    cuts=st.integers(1, 3),
)
def test_any_shape(
    dtype_in: torch.dtype,
    dtype_out: torch.dtype,
    rows: int,
    columns: int,
    rank: int,
    scale: float,
    seed: int,
    cuts: int,
) -> None:
    random = torch.Generator().manual_seed(seed)
    W = torch.randn(rows, columns, generator=random).to(dtype_in)
    W[torch.rand(rows, columns, generator=random) < 0.05] = 0
    left = torch.randn(rows, rank, generator=random)
    edit = WeightedSum((LowRank(left, torch.randn(rank, columns, generator=random), scale),))
    found, doubts = _edited(W, edit, dtype_out, cuts)
    assert doubts == _edited(W, edit, dtype_out, 1)[1]
    expected, _ = _by_torch(lambda: _edited(W, edit, dtype_out, 1))
    assert torch.equal(bits(found), bits(expected))


@compiled
@pairs
@pytest.mark.parametrize("width", [16, 32, 64])
def test_vectors_of_every_width(dtype_in: torch.dtype, dtype_out: torch.dtype, width: int) -> None:
    """What a narrower processor would run gives the same, and finds the same corrections."""
    if width > native.vector_bytes:
        pytest.skip(f"this processor's vectors have {native.vector_bytes} bytes")
    random = torch.Generator().manual_seed(2)
    W = torch.randn(67, 701, generator=random).to(dtype_in)
    edit = WeightedSum((LowRank(torch.randn(67, 9, generator=random) * 0.01, torch.randn(9, 701, generator=random)),))

    def residual() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        out, small = torch.empty(W.shape, dtype=dtype_out), torch.empty(W.shape, dtype=torch.int8)
        outcome = edit.prepare(W.shape, dtype_in, dtype_out, residual=True).tile(W, 0, out, small)
        return bits(out), small, outcome.wide

    expected = _by_torch(residual)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "vector_bytes", width)
        found = residual()
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert dtype_in.itemsize < dtype_out.itemsize or expected[1].count_nonzero() > 500  # a wider one remembers W


@compiled
@pairs
def test_more_doubts_than_there_is_room_for(dtype_in: torch.dtype, dtype_out: torch.dtype) -> None:
    """Sums of few bits, of which most are midpoints, in a weight of more elements than are kept at once."""
    random = torch.Generator().manual_seed(1)
    W = torch.randint(128, 256, (90, 300), generator=random).to(dtype_in)
    half = 2.0**-1 if dtype_out == torch.bfloat16 else 2.0**-17
    # What rounding c·B loses is not known of float64, so that no tie is known to be one before the exact stage.
    left = torch.randint(0, 2, (90, 1), generator=random).double()
    edit = WeightedSum((LowRank(left, torch.ones(1, 300), half),))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "_ROOM", 4096)
        found, doubts = _edited(W, edit, dtype_out, 1)
    assert doubts > 3 * 4096
    expected, _ = _by_torch(lambda: _edited(W, edit, dtype_out, 1))
    assert torch.equal(bits(found), bits(expected))


@compiled
@pairs
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_no_number_is_refused(dtype_in: torch.dtype, dtype_out: torch.dtype, value: float) -> None:
    W = torch.ones(9, 40, dtype=dtype_in)
    W[7, 33] = value
    edit = WeightedSum((LowRank(torch.ones(9, 2), torch.ones(2, 40)),))
    with pytest.raises(BadInput, match=r"element \[7, 33\] is NaN or infinite"):
        edit.apply(W, dtype_out)


@compiled
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_result_beyond_the_largest_value_is_refused(dtype: torch.dtype) -> None:
    W = torch.full((9, 40), torch.finfo(dtype).max, dtype=dtype)
    edit = WeightedSum((LowRank(torch.eye(9)[:, 2:3], torch.eye(40)[5:6], 1e38),))
    with pytest.raises(BadInput, match=r"element \[2, 5\] exceeds"):
        edit.apply(W)


@compiled
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scale", [1.0, 0.3, 2.0**-7])
def test_ties_and_all_but_ties_of_several_terms(dtype: torch.dtype, scale: float) -> None:
    """Midpoints that only a sum of many bits tells from what lies beside them, against fractions."""
    random = torch.Generator().manual_seed(3)
    W = torch.randint(128, 256, (64, 96), generator=random).to(dtype) * torch.finfo(dtype).eps
    half = torch.finfo(dtype).eps * torch.finfo(dtype).eps * 64
    left = torch.stack([torch.full((64,), half), torch.randn(64, generator=random) * 2.0**-60], dim=1)
    left[::2, 1] = 0
    right = torch.stack([torch.randint(-2, 3, (96,), generator=random).float(), torch.randn(96, generator=random)])
    edit = WeightedSum((LowRank(left, right, scale),))
    found, doubts = _edited(W, edit, dtype, 1)
    expected, before = _by_torch(lambda: _edited(W, edit, dtype, 1))
    assert torch.equal(bits(found), bits(expected))
    assert doubts < before or not before


@compiled
@pytest.mark.parametrize("width", [16, 32, 64])
@pytest.mark.parametrize("sign", [1, -1])
def test_midpoints_below_a_power_of_two(width: int, sign: int) -> None:
    """They are a quarter of a step away, and float32 off by more than that, as large numbers cancel."""
    if width > native.vector_bytes:
        pytest.skip(f"this processor's vectors have {native.vector_bytes} bytes")
    left, right = torch.full((8, 20), -sign * (1 - 2.0**-10) * 2.0**-7), torch.full((20, 64), 2.0**-6)
    left[:, 0], right[0] = sign * 2049.0, 1.0
    W, edit = torch.full((8, 64), -sign * 2048.0, dtype=torch.bfloat16), WeightedSum((LowRank(left, right),))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "vector_bytes", width)
        merged = edit.apply(W)
    assert merged.eq(sign * 0.99609375).all() and torch.equal(merged, _by_torch(lambda: edit.apply(W)))


@compiled
@settings(max_examples=40, deadline=None)
@given(size=st.floats(-30, 3), seed=st.integers(0, 2**32), rank=st.integers(1, 24), zeros=st.booleans())
def test_a_delta_of_any_size_beside_the_weight(size: float, seed: int, rank: int, zeros: bool) -> None:
    """Single precision decides where it can, and gives up where most is in doubt."""
    random = torch.Generator().manual_seed(seed)
    W = (0.02 * torch.randn(70, 300, generator=random)).to(torch.bfloat16)
    if zeros:
        W[::3] = 0
        W[::5] = -0.0
    left = (torch.randn(70, rank, generator=random) * 2.0**size).to(torch.bfloat16)
    right = torch.randn(rank, 300, generator=random).to(torch.bfloat16)
    if zeros:
        left[::2] = 0
    edit = WeightedSum((LowRank(left, right, 0.02), LowRank(left, -right, 0.01)))
    found, _ = _edited(W, edit, torch.bfloat16, 2)
    expected, _ = _by_torch(lambda: _edited(W, edit, torch.bfloat16, 1))
    assert torch.equal(bits(found), bits(expected))


@compiled
@pytest.mark.parametrize("width", [16, 32, 64])
@pytest.mark.parametrize(("columns", "few"), [(1, 1), (7, 7), (64, 64), (701, 512), (1100, 512)])
def test_what_is_summed_at_a_glance(width: int, columns: int, few: int) -> None:
    """Against float64, within what float32 may lose in any order; what is no number is none in the sums either."""
    if width > native.vector_bytes:
        pytest.skip(f"this processor's vectors have {native.vector_bytes} bytes")
    random = torch.Generator().manual_seed(columns)
    before, after = (torch.randn(5, columns, generator=random).to(torch.bfloat16) for _ in range(2))
    after[3, columns // 2] = torch.nan
    x = torch.rand(4, columns, generator=random) * 2 - 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "vector_bytes", width)
        residue, norms, sizes = native.glance(before, after, x, few)
    D, part = after.double() - before.double(), after.double().abs()[:, :few]
    for found, terms in (
        (residue, D[:, None] * x.double()),
        (norms.square(), D[:, None].square()),
        (sizes, part[:, None] * x.double().abs()[:, :few]),
    ):
        expected, magnitudes = terms.sum(-1), terms.abs().sum(-1)
        assert torch.equal(found.isnan(), expected.isnan())
        sure = ~expected.isnan()
        assert bool(((found - expected).abs() <= (columns + 8) * 2.0**-24 * magnitudes)[sure].all())


@compiled
@settings(max_examples=60, deadline=None)
@given(
    size=st.one_of(st.integers(1, 100), st.integers(BLOCK - 40, BLOCK + 40), st.just(2 * BLOCK + 7)),
    width=st.sampled_from([1, 2, 4]),
    share=st.sampled_from([0.0, 0.001, 0.1, 0.34, 1.0]),
    escapes=st.sampled_from([0.0, 0.02, 0.5]),
    seed=st.integers(0, 2**32),
    cuts=st.integers(1, 3),
)
def test_records(
    tmp_path_factory: pytest.TempPathFactory,
    size: int,
    width: int,
    share: float,
    escapes: float,
    seed: int,
    cuts: int,
) -> None:
    """Of an undo journal, sparse or as long as the bytes themselves, however they come in pieces."""
    random = np.random.default_rng(seed)
    small = random.integers(-127, 128, size).astype(np.int8) * (random.random(size) < share)
    small[(small != 0) & (random.random(size) < escapes)] = ESCAPE
    wide = random.integers(128, 2**40, np.count_nonzero(small == ESCAPE))
    raw, step = random.bytes(size * width), -(-size // cuts)
    tensor = TensorInfo("w", {1: "U8", 2: "BF16", 4: "F32"}[width], (size,), 0, size * width)

    def written() -> bytes:
        spill = Spill(tmp_path_factory.mktemp("spill") / "spill")
        recorder = Recorder(spill, tensor)
        for at in range(0, size, step):
            before, here = np.count_nonzero(small[:at] == ESCAPE), small[at : at + step]
            these = wide[before : before + np.count_nonzero(here == ESCAPE)]
            recorder.add(memoryview(bytearray(raw))[at * width : (at + step) * width], here, these)
        recorder.finish()
        spill.close()
        return spill.path.read_bytes()

    assert written() == _by_torch(written)
