"""``serving.pack``: that what is unpacked as each engine reads it is what the adapters add, within one rounding."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

import loreg
from loreg import serving
from loreg.errors import BadInput, BaseMismatch, NotFound, Unsupported, UsageError
from loreg.serving.grouping import groups
from loreg.serving.packing import PACKED, Packed, Stacked
from tests.unit.packing_cases import HIDDEN, LAYERS, RANKS, WORDS, delta, layer, push, write_base

UNIT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24, torch.float64: 2.0**-53}
NAMES = ("one", "two", "three")
Unpacked = Iterator[tuple[str, int, torch.Tensor, torch.Tensor]]


@pytest.fixture
def packable(registry: loreg.Registry, tmp_path: Path) -> loreg.Registry:
    return push(registry, tmp_path)


@pytest.fixture
def without_embeddings(registry: loreg.Registry, tmp_path: Path) -> loreg.Registry:
    return push(registry, tmp_path, embeddings=False)


def vllm(packed: Packed, name: str, stack: Stacked) -> Unpacked:
    """Module, adapter, A (R, in), B (out, R)."""
    for path, size, A, B in zip(stack.modules, stack.sizes, stack.A, stack.B, strict=True):
        assert B.shape[:3] == (len(packed.versions), 1, size) and B.shape[3] == packed.max_rank
        for number in range(len(packed.versions)):
            embeds = A.dim() == 3
            yield path, number, A[number].mT if embeds else A[number, 0], B[number, 0]


def sglang(packed: Packed, name: str, stack: Stacked) -> Unpacked:
    (A,), (B,) = stack.A, stack.B
    slices = A.shape[1] // packed.max_rank
    assert B.shape == (len(packed.versions), sum(stack.sizes), packed.max_rank)
    for number, rank in enumerate(packed.ranks):
        assert not A[number, slices * rank :].any() and not B[number, :, rank:].any()
        first = 0
        for place, (path, size) in enumerate(zip(stack.modules, stack.sizes, strict=True)):
            yield path, number, A[number, place * rank : (place + 1) * rank], B[number, first : first + size, :rank]
            first += size


def sgmv(packed: Packed, name: str, stack: Stacked) -> Unpacked:
    (A,), (B,) = stack.A, stack.B
    assert A[0].is_contiguous() and B[0].is_contiguous()
    for number in range(len(packed.versions)):
        for place, path in enumerate(stack.modules):
            a = A[number, place]
            yield path, number, a if packed.max_rank >= 16 else a.mT, B[number, place].mT


LAYOUTS: dict[Any, Callable[[Packed, str, Stacked], Unpacked]] = {"vllm": vllm, "sglang": sglang, "sgmv": sgmv}


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("rank", [8, 16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_unpacked_is_what_the_adapters_add(
    request: pytest.FixtureRequest, layout: Any, rank: int, dtype: torch.dtype | None
) -> None:
    registry = request.getfixturevalue("without_embeddings" if layout == "sgmv" else "packable")
    names = [*NAMES, "both"] if rank == 16 else list(NAMES)
    packed = serving.pack(names, rank, layout, registry, dtype=dtype)
    assert packed.dtype == (dtype or torch.float32)
    unit, seen = UNIT[packed.dtype], set()
    for name, stack in packed.layers.items():
        for path, number, A, B in LAYOUTS[layout](packed, name, stack):
            exact, size = delta(registry, names[number], path, B.shape[0], A.shape[1])
            # 2⁻²⁵ is half the least float16, of what underflows.
            tiny_ = 2.0**-25 * (A.double().abs().amax() + B.double().abs().amax()) * rank
            bound = (2 * unit + unit**2 + 2.0**-50) * size + (tiny_ if dtype == torch.float16 else 0)
            assert ((B.double() @ A.double() - exact).abs() <= bound).all(), (path, names[number])
            seen.add((path, number))
    for number, name in enumerate(names):
        assert {(path, number) for path in registry.resolve(name).manifest.modules} <= seen
    assert packed.versions == tuple(registry.resolve(name).digest for name in names)
    assert packed.ranks[:3] == tuple(RANKS.values())
    assert packed.nbytes == sum(x.nbytes for stack in packed.layers.values() for x in (*stack.A, *stack.B))


def test_the_scale_is_folded_by_one_rounding(packable: loreg.Registry) -> None:
    """Of the float64 product: with the scale rounded to bfloat16 before, it would be others."""
    packed = serving.pack(["one"], 4, "vllm", packable, dtype=torch.bfloat16)
    B = packed.layers[layer(0, "self_attn.qkv_proj")].B[0]
    low = packable.load("one")[layer(0, "self_attn.q_proj")]
    nearest = (low.scale * low.left.double()).to(torch.float32).to(torch.bfloat16)
    assert low.scale == 7 / 3
    assert torch.equal(B[0, 0, :, :3], nearest)


def test_slices_that_no_adapter_has_are_as_large_as_in_the_base(packable: loreg.Registry) -> None:
    layers = serving.pack(["one"], 4, "vllm", packable).layers
    qkv, gate_up = layers[layer(1, "self_attn.qkv_proj")], layers[layer(2, "mlp.gate_up_proj")]
    assert qkv.modules == tuple(layer(1, f"self_attn.{name}_proj") for name in "qkv")
    assert qkv.sizes == (8, 4, 4) and gate_up.sizes == (10, 10)
    assert not qkv.B[1].any() and not qkv.A[1].any() and not gate_up.B[1].any()
    assert set(layers) == {layer(n, "self_attn.qkv_proj") for n in range(LAYERS)} | {layer(2, "mlp.gate_up_proj")}
    stacked = serving.pack(["one"], 8, "sgmv", packable).layers
    assert set(stacked) == {
        f"model.layers.*.{name}" for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.gate_proj")
    }
    gate = stacked["model.layers.*.mlp.gate_proj"]
    assert gate.modules == tuple(layer(n, "mlp.gate_proj") for n in range(LAYERS))
    assert gate.A[0].shape == (1, LAYERS, 6, 8) and gate.B[0].shape == (1, LAYERS, 8, 10)
    assert not gate.B[0][0, :2].any() and gate.B[0][0, 2].any()


def test_shapes_of_heads_and_embeddings(packable: loreg.Registry) -> None:
    for layout, shape in (("vllm", (2, WORDS, 8)), ("sglang", (2, 8, WORDS))):
        layers = serving.pack(["two", "three"], 8, layout, packable).layers  # type: ignore[arg-type]
        assert layers["model.embed_tokens"].A[0].shape == shape
        assert layers["lm_head"].B[0].shape == ((2, 1, WORDS, 8) if layout == "vllm" else (2, WORDS, 8))
        assert layers["lm_head"].A[0].shape[-1] == HIDDEN
    with pytest.raises(Unsupported, match=r"embed_tokens' is an embedding"):
        serving.pack(["three"], 8, "sgmv", packable)


def test_what_is_one_layer_is_said_by_the_caller(packable: loreg.Registry) -> None:
    apart = serving.pack(["one"], 4, "vllm", packable, packed={}).layers
    assert set(apart) == set(packable.resolve("one").manifest.modules)
    together = serving.pack(["one"], 4, "sglang", packable, packed={"qv_proj": ("q_proj", "v_proj")}).layers
    assert together[layer(0, "self_attn.qv_proj")].B[0].shape == (1, 12, 4)
    with pytest.raises(Unsupported, match=r"q_proj' in one layer with '.*x_proj', which the base 'base' does not"):
        serving.pack(["one"], 4, "vllm", packable, packed={"qx_proj": ("q_proj", "x_proj")})


def test_a_layer_that_is_fused_in_the_checkpoint(registry: loreg.Registry, tmp_path: Path) -> None:
    """SGLang gives each slice a copy of A; vLLM has one pair for all of it."""
    rng = np.random.default_rng(0)
    path = "model.layers.0.self_attn.qkv_proj"
    registry.add_base(tiny.write_model(tmp_path / "base", {f"{path}.weight": tiny.normal(rng, "F32", 16, 6)}), "base")
    registry.push(tiny.write_adapter(tmp_path / "a", {path: tiny.factors(rng, 16, 6, 2)}), base="base", name="a")
    low = registry.load("a")[path]
    (A,), (B,) = (getattr(serving.pack(["a"], 4, "sglang", registry).layers[path], end) for end in "AB")
    assert A.shape == (1, 12, 6) and torch.equal(A[0, :6], low.right.repeat(3, 1)) and not A[0, 6:].any()
    assert torch.equal(B[0, :, :2].double(), low.scale * low.left.double())
    (A,), (B,) = (getattr(serving.pack(["a"], 4, "vllm", registry).layers[path], end) for end in "AB")
    assert A.shape == (1, 1, 4, 6) and B.shape == (1, 1, 16, 4) and torch.equal(A[0, 0, :2], low.right)


@pytest.mark.parametrize(
    ("names", "rank", "layout", "error", "words"),
    [
        (["one", "two"], 7, "vllm", Unsupported, r"two:v1 has rank 8 at '.*layers.1.mlp.up_proj', and .* room for 7"),
        (["one"], 4, "rows", UsageError, r"'rows' is not a layout: expected one of vllm, sglang, sgmv"),
        ([], 4, "vllm", UsageError, "No adapters"),
        ("one", 4, "vllm", UsageError, r"'one' is one reference: expected a list"),
        (["one"], 0, "vllm", UsageError, "largest rank of 0"),
        (["one"], 12, "sgmv", UsageError, "8 or a multiple of 16, not 12"),
        (["none"], 4, "vllm", NotFound, "none"),
    ],
)
def test_what_cannot_be_packed(
    packable: loreg.Registry, names: Sequence[str], rank: int, layout: Any, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        serving.pack(names, rank, layout, packable)


def test_adapters_that_do_not_go_together(packable: loreg.Registry, tmp_path: Path) -> None:
    packable.add_base(write_base(tmp_path / "wide", o_proj=(6, 9)), "wide")
    rng = np.random.default_rng(0)
    o = {layer(0, "self_attn.o_proj"): tiny.factors(rng, 6, 9, 2)}
    packable.push(tiny.write_adapter(tmp_path / "other", o), base="wide", name="other")
    with pytest.raises(BaseMismatch, match=r"other:v1 was trained on 'wide', and one:v1 on 'base'"):
        serving.pack(["one", "other"], 8, "vllm", packable)
    values = (tiny.tensor("F32", np.full(shape, 1e5)) for shape in ((2, 8), (6, 2)))
    large = {layer(0, "self_attn.o_proj"): tiny.Factors(*values)}
    packable.push(tiny.write_adapter(tmp_path / "large", large), base="base", name="large")
    with pytest.raises(BadInput, match=r"large:v1: '.*o_proj' cannot be had in torch.float16"):
        serving.pack(["large"], 8, "vllm", packable, dtype=torch.float16)
    full = tiny.write_adapter(tmp_path / "full", {layer(0, "self_attn.q_proj"): tiny.factors(rng, 8, 6, 2)},
                              full={"lm_head.weight": tiny.normal(rng, "BF16", WORDS, HIDDEN)})  # fmt: skip
    packable.push(full, base="base", name="full")
    with pytest.raises(Unsupported, match=r"full:v1 replaces 'lm_head.weight' outright"):
        serving.pack(["one", "full"], 8, "vllm", packable)


def _pushed(registry: loreg.Registry, folder: Path, sizes: dict[str, tuple[int, int]], *adapters: list[str]) -> None:
    """A base of linear layers, and an adapter ``0``, ``1``, … for some of them each."""
    rng = np.random.default_rng(0)
    base = {f"{path}.weight": tiny.normal(rng, "F32", *size) for path, size in sizes.items()}
    registry.add_base(tiny.write_model(folder / "linears", base), "linears")
    for number, paths in enumerate(adapters):
        factors = {path: tiny.factors(rng, *sizes[path], 2) for path in paths}
        made = tiny.write_adapter(folder / f"linears{number}", factors)
        registry.push(made, base="linears", name=str(number))


def test_layers_that_no_engine_holds_so(registry: loreg.Registry, tmp_path: Path) -> None:
    whole, part, expert = "model.a.qkv_proj", "model.a.q_proj", "model.b.experts.0.up_proj"
    others = {"model.a.k_proj": (4, 6), "model.a.v_proj": (4, 6)}
    layers = {"model.layers.0.mlp.up_proj": (8, 6), "model.layers.1.mlp.up_proj": (9, 6)}
    sizes = {whole: (12, 6), part: (4, 6), expert: (8, 6), **others, **layers}
    _pushed(registry, tmp_path, sizes, [whole], [part], [expert], list(layers))
    for order in ("01", "10"):
        with pytest.raises(Unsupported, match=r"as a layer of its own, and another as a part of 'model.a.qkv_proj'"):
            serving.pack(list(order), 8, "vllm", registry)
    with pytest.raises(Unsupported, match=r"2:v1 adapts 'model.b.experts.0.up_proj', a layer of one expert"):
        serving.pack(["2"], 8, "vllm", registry)
    with pytest.raises(Unsupported, match=r"'model.layers.\*.mlp.up_proj' differ in size"):
        serving.pack(["3"], 8, "sgmv", registry)


def test_a_base_that_is_needed_and_not_registered(packable: loreg.Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packable.bases, "of_root", lambda *arguments: None)
    assert serving.pack(["one"], 4, "vllm", packable, packed={}).layers
    with pytest.raises(NotFound, match=r"The base 'base' is not registered"):
        serving.pack(["one"], 4, "vllm", packable)


def test_modules_of_one_path_and_two_shapes(packable: loreg.Registry) -> None:
    version, path = packable.resolve("one"), layer(0, "self_attn.q_proj")
    wider = {**version.manifest.modules, path: replace(version.manifest.modules[path], out_features=9)}
    other = replace(version, manifest=replace(version.manifest, modules=wider))
    with pytest.raises(BadInput, match=r"q_proj' as linear from 6 to 9, and an adapter before it as .* from 6 to 8"):
        groups(packable, [version, other], PACKED)
