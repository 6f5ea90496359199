"""Merged checkpoints against PEFT, transformers and rational numbers, element for element."""

from __future__ import annotations

import random
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from peer_cases import CASES, PAIRS, ROBERTA, Case, without_task
from peer_models import DTYPES, FAMILIES, BaseOf, load_model, load_peft, logits, save_adapter
from peer_oracle import Truth, distance_to_boundary, rounded, rounded_exactly, truths
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file

from loreg.registry import Registry

_SAMPLE, _HARDEST = 300, 60
_NOISE = 2.0


@pytest.mark.parametrize("name", CASES)
def test_merge_of_one_adapter(name: str, registry: Registry, base_of: BaseOf, tmp_path: Path) -> None:
    case = CASES[name]
    base = base_of(case.family, case.dtype)
    adapter = save_adapter(
        case.family,
        base,
        tmp_path / "adapter",
        case.dtype,
        safe=case.safe,
        wide_factors=case.wide_factors,
        **case.lora,
    )
    registry.add_base(base, name="tiny")
    registry.push(adapter, base="tiny", name="one")
    result = registry.merge("one", tmp_path / "merged", verify="exact")
    _check(case, base, {"one": adapter}, {"one": 1.0}, tmp_path / "merged", set(result.touched))


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.7, -0.3)], ids=["sum", "difference"])
@pytest.mark.parametrize("name", PAIRS)
def test_merge_of_two_adapters(
    name: str, weights: tuple[float, float], registry: Registry, base_of: BaseOf, tmp_path: Path
) -> None:
    case, second = PAIRS[name]
    base = base_of(case.family, case.dtype)
    adapters = {
        "one": save_adapter(case.family, base, tmp_path / "one", case.dtype, seed=1, **without_task(case.lora)),
        "two": save_adapter(case.family, base, tmp_path / "two", case.dtype, seed=5, **without_task(second)),
    }
    registry.add_base(base, name="tiny")
    for label, folder in adapters.items():
        registry.push(folder, base="tiny", name=label)
    first, other = weights
    result = registry.merge(f"{first}*one {'+' if other > 0 else '-'} {abs(other)}*two", tmp_path / "merged")
    weighted = dict(zip(adapters, weights, strict=True))
    _check(case, base, adapters, weighted, tmp_path / "merged", set(result.touched))


def test_saved_heads_are_mixed_by_weight(registry: Registry, base_of: BaseOf, tmp_path: Path) -> None:
    """W + Σ wᵢ(Rᵢ - W) for a head that both adapters replace, each element rounded once."""
    base = base_of("roberta", "bf16")
    heads = {}
    registry.add_base(base, name="tiny")
    for seed, label in ((1, "one"), (5, "two")):
        folder = save_adapter("roberta", base, tmp_path / label, "bf16", seed=seed, **ROBERTA)
        heads[label] = load_file(folder / "adapter_model.safetensors")
        registry.push(folder, base="tiny", name=label)
    registry.merge("0.75*one + 0.5*two", tmp_path / "merged")
    before, after = _tensors(base), _tensors(tmp_path / "merged")
    for part in ("dense.weight", "dense.bias", "out_proj.weight", "out_proj.bias"):
        W = before[f"classifier.{part}"].double()
        R, S = (heads[label][f"base_model.model.classifier.{part}"].double() for label in ("one", "two"))
        # Few bits and near exponents: float64 holds this sum exactly.
        assert torch.equal(after[f"classifier.{part}"], rounded(W + 0.75 * (R - W) + 0.5 * (S - W), torch.bfloat16))


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(file))
    return tensors


def _check(
    case: Case, base: Path, adapters: Mapping[str, Path], weights: Mapping[str, float], out: Path, touched: set[str]
) -> None:
    wide = load_peft(case.family, base, adapters, torch.float64)
    _check_elements(case, base, truths(wide, weights, FAMILIES[case.family].in_file), out, touched)
    unmerged = load_peft(case.family, base, adapters, DTYPES[case.dtype], case.wide_factors)
    _check_logits(case, base, _weighted(unmerged, weights), _weighted(wide, weights), out)


def _weighted(model: Any, weights: Mapping[str, float]) -> torch.Tensor:
    for module in model.modules():
        if isinstance(module, LoraLayer):
            for adapter in module.scaling:
                module.scaling[adapter] *= weights[adapter]
    return logits(model)


def _check_elements(case: Case, base: Path, expected: Mapping[str, Truth], out: Path, touched: set[str]) -> None:
    before, after = _tensors(base), _tensors(out)
    adapted = {name for name, truth in expected.items() if truth.terms or truth.biases}
    assert adapted, "the oracle found no adapted module"
    assert adapted <= touched
    new = set(after) - set(before)
    assert set(before) <= set(after) and new <= set(expected)
    assert new == {name for name in expected if "classifier" in name} - set(before)
    for name, tensor in after.items():
        if name not in touched:
            assert torch.equal(tensor, before[name]), name
        if name in expected:
            assert tensor.dtype == DTYPES[case.dtype]
            _check_tensor(name, tensor, expected[name])
    for name in adapted:
        assert not torch.equal(after[name], before[name]), f"{name}: the delta does not show, the test says nothing"
    _check_sample({name: (after[name], expected[name]) for name in sorted(adapted)})


def _check_tensor(name: str, merged: torch.Tensor, truth: Truth) -> None:
    """Equal to the float64 sum rounded once, but where that lies on a boundary: there the exact sum decides."""
    wanted = rounded(truth.sum, merged.dtype)
    differing = (wanted != merged).nonzero()
    if len(differing):
        close = distance_to_boundary(truth.sum, merged.dtype) < 1e-12
        assert bool(close[wanted != merged].all()), f"{name}: {len(differing)} elements differ from float64"
        assert len(differing) <= 3, f"{name}: more ties than chance allows"
        for index in map(tuple, differing.tolist()):
            assert merged[index].item() == rounded_exactly(truth.exact(index), merged.dtype), f"{name}{index}"


def _check_sample(tensors: Mapping[str, tuple[torch.Tensor, Truth]]) -> None:
    """The rational sum, at random places and at those that lie nearest to a rounding boundary."""
    draw = random.Random(11)
    places = [(name, index) for name, (merged, _) in tensors.items() for index in _indices(merged.shape)]
    chosen = draw.sample(places, min(_SAMPLE, len(places)))
    per_tensor = max(1, _HARDEST // len(tensors))
    for name, (merged, truth) in tensors.items():
        nearest = distance_to_boundary(truth.sum, merged.dtype).flatten().argsort()[:per_tensor]
        chosen += [(name, tuple(int(i) for i in torch.unravel_index(k, merged.shape))) for k in nearest]
    for name, index in chosen:
        merged, truth = tensors[name]
        assert Fraction(merged[index].item()) == Fraction(rounded_exactly(truth.exact(index), merged.dtype)), name


def _indices(shape: torch.Size) -> list[tuple[int, ...]]:
    return [
        tuple(index) for index in torch.cartesian_prod(*map(torch.arange, shape)).reshape(-1, len(shape)).tolist()
    ]


def _check_logits(case: Case, base: Path, unmerged: torch.Tensor, wide: torch.Tensor, out: Path) -> None:
    """Plain ``from_pretrained`` of the merge against PEFT unmerged, within twice what the dtype itself does."""
    merged = logits(load_model(case.family, out, DTYPES[case.dtype]))
    noise = (unmerged - wide).abs().max()
    difference = (merged - unmerged).abs().max()
    assert difference <= _NOISE * noise, f"{difference:.3g} against a noise of {noise:.3g}"
    plain = logits(load_model(case.family, base, torch.float64))
    assert (plain - wide).abs().max() > 3 * noise, "the adapter does not show in the logits, the test says nothing"
