"""What was pushed comes back byte for byte, and what PEFT can say, PEFT can load."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peer_cases import CASES, GPT2, PAIRS, ROBERTA, Case, without_task, without_words
from peer_models import FAMILIES, BaseOf, load_model, load_peft, save_adapter
from peer_oracle import Term, Truth, truths
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.utils import load_peft_weights

from loreg.errors import Unsupported
from loreg.registry import Registry

# Folding a scale into B rounds each of its elements once to float32, and PEFT's α/r once in double.
_FOLDING = 2.0**-22


def _save(case: Case, base: Path, folder: Path, seed: int = 1, **changes: Any) -> Path:
    lora = {**case.lora, **changes}
    return save_adapter(
        case.family, base, folder, case.dtype, seed, safe=case.safe, wide_factors=case.wide_factors, **lora
    )


def _push_pair(
    registry: Registry, case: Case, second: Mapping[str, Any], base: Path, folder: Path
) -> dict[str, Path]:
    adapters = {
        "one": save_adapter(case.family, base, folder / "one", case.dtype, 1, **without_task(case.lora)),
        "two": save_adapter(case.family, base, folder / "two", case.dtype, 5, **without_task(second)),
    }
    for label, path in adapters.items():
        registry.push(path, base=base, name=label)
    return adapters


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", CASES)
def test_the_pushed_bytes_come_back(name: str, registry: Registry, base_of: BaseOf, tmp_path: Path) -> None:
    case = CASES[name]
    base = base_of(case.family, case.dtype)
    adapter = _save(case, base, tmp_path / "adapter")
    (adapter / "tokenizer_config.json").write_text('{"unused": true}\n')
    pushed = _files(adapter)
    (adapter / "optimizer.pt").write_bytes(b"\0" * 100)
    (adapter / "checkpoint-10").mkdir()
    version = registry.push(adapter, base=base, name="one")
    assert set(version.left_out) == {"optimizer.pt", "checkpoint-10/"}
    registry.export("one", tmp_path / "back")
    assert _files(tmp_path / "back") == pushed
    again = registry.push(tmp_path / "back", base=base, name="one")
    assert not again.created
    assert again.digest == version.digest


@pytest.mark.parametrize("name", CASES)
def test_a_pushed_adapter_exported_loads_in_peft(
    name: str, registry: Registry, base_of: BaseOf, tmp_path: Path
) -> None:
    case = CASES[name]
    base = base_of(case.family, case.dtype)
    adapter = _save(case, base, tmp_path / "adapter")
    registry.push(adapter, base=base, name="one")
    registry.compose("one", "copy")  # never pushed as files, so PEFT's files have to be made
    registry.export("copy", tmp_path / "exported", format="peft")
    wanted = truths(load_peft(case.family, base, {"one": adapter}, torch.float64), {"one": 1.0})
    _same_model(case, base, tmp_path / "exported", wanted)
    registry.push(tmp_path / "exported", base=base, name="again")
    merged = {label: registry.merge(label, tmp_path / f"merged-{label}", verify="none") for label in ("one", "again")}
    assert merged["one"].weights_root == merged["again"].weights_root


@pytest.mark.parametrize("method", ["linear", "svd"])
@pytest.mark.parametrize("name", PAIRS)
def test_a_composed_adapter_exported_loads_in_peft(
    name: str, method: str, registry: Registry, base_of: BaseOf, tmp_path: Path
) -> None:
    case, second = PAIRS[name]
    base = base_of(case.family, case.dtype)
    adapters = _push_pair(registry, case, without_words(second), base, tmp_path)
    # A rank that holds the whole sum: SVD must then lose nothing but the rounding of its factors.
    composed = registry.compose("0.7*one - 1.3*two", "mix", method=method, rank=16 if method == "svd" else None)
    assert composed.relative_error < 1e-7
    registry.export("mix", tmp_path / "exported", format="peft")
    wanted = truths(_both(case, base, adapters), {"one": 0.7, "two": -1.3})
    _same_model(case, base, tmp_path / "exported", wanted, exact=method == "linear")


def test_an_embedding_is_composed_at_any_weight(registry: Registry, base_of: BaseOf, tmp_path: Path) -> None:
    """PEFT saves the base's embedding beside its factors: a replacement that changes nothing."""
    case, second = PAIRS["llama"]
    base = base_of(case.family, case.dtype)
    adapters = _push_pair(registry, case, second, base, tmp_path)
    assert any("embed_tokens" in name for name in registry.resolve("two").manifest.full)
    registry.compose("one - 0.5*two", "mix")
    registry.export("mix", tmp_path / "exported", format="peft")
    wanted = truths(_both(case, base, adapters), {"one": 1.0, "two": -0.5})
    assert wanted["model.embed_tokens.weight"].terms
    _same_model(case, base, tmp_path / "exported", wanted)


def test_truncation_is_the_best_one(registry: Registry, base_of: BaseOf, tmp_path: Path) -> None:
    """By Eckart and Young: what is left out is the singular values beyond the rank, of the dense sum."""
    case, second = PAIRS["llama"]
    base = base_of(case.family, case.dtype)
    adapters = _push_pair(registry, case, second, base, tmp_path)
    composed = registry.compose("one + two", "mix", method="svd", rank=3)
    registry.export("mix", tmp_path / "exported", format="peft")
    dense = _deltas(truths(_both(case, base, adapters), {"one": 1.0, "two": 1.0}))
    found = _deltas(truths(load_peft(case.family, base, {"mix": tmp_path / "exported"}, torch.float64), {"mix": 1.0}))
    assert dense.keys() == found.keys()
    lost = whole = 0.0
    for name, delta in dense.items():
        tail = torch.linalg.svdvals(delta)[3:]
        error = torch.linalg.norm(delta - found[name])
        assert error <= torch.linalg.norm(tail) * (1 + 1e-6) + 1e-6 * torch.linalg.norm(delta), name
        lost, whole = lost + float(tail.square().sum()), whole + float(delta.square().sum())
    assert composed.relative_error == pytest.approx((lost / whole) ** 0.5, rel=1e-6)
    assert composed.relative_error > 0.01, "nothing was truncated, the test says nothing"


@pytest.mark.parametrize("family", ["gpt2", "roberta"])
def test_trained_biases_are_composed(family: str, registry: Registry, base_of: BaseOf, tmp_path: Path) -> None:
    lora = without_task({"gpt2": GPT2, "roberta": ROBERTA}[family]) | {"lora_bias": True}
    base = base_of(family, "bf16")
    case = Case(family, "bf16", lora)
    adapters = _push_pair(registry, case, {**lora, "r": 2}, base, tmp_path)
    registry.compose("0.5*one - 2*two", "mix")
    registry.export("mix", tmp_path / "exported", format="peft")
    wanted = truths(_both(case, base, adapters), {"one": 0.5, "two": -2.0})
    assert any(truth.biases for truth in wanted.values())
    _same_model(case, base, tmp_path / "exported", wanted)


def test_biases_of_some_modules_have_no_peft_form(registry: Registry, base_of: BaseOf, tmp_path: Path) -> None:
    base = base_of("gpt2", "fp32")
    with_bias = Case("gpt2", "fp32", {**GPT2, "target_modules": ["c_fc"], "lora_bias": True})
    without = Case("gpt2", "fp32", {**GPT2, "target_modules": ["c_attn"]})
    registry.push(_save(with_bias, base, tmp_path / "one"), base=base, name="one")
    registry.push(_save(without, base, tmp_path / "two"), base=base, name="two")
    registry.compose("one + two", "mix")
    with pytest.raises(Unsupported, match="lora_bias"):
        registry.export("mix", tmp_path / "exported", format="peft")
    assert not (tmp_path / "exported").exists()


def test_format_peft_of_a_pushed_peft_adapter_is_the_original(
    registry: Registry, base_of: BaseOf, tmp_path: Path
) -> None:
    base = base_of("gpt2", "bf16")
    adapter = _save(CASES["gpt2"], base, tmp_path / "adapter")
    registry.push(adapter, base=base, name="one")
    registry.export("one", tmp_path / "back", format="peft")
    assert _files(tmp_path / "back") == _files(adapter)


def _both(case: Case, base: Path, adapters: Mapping[str, Path]) -> PeftModel:
    return load_peft(case.family, base, adapters, torch.float64)


def _deltas(found: Mapping[str, Truth]) -> dict[str, torch.Tensor]:
    return {name: truth.sum - truth.start for name, truth in found.items() if truth.terms}


def _same_model(case: Case, base: Path, exported: Path, wanted: Mapping[str, Truth], *, exact: bool = True) -> None:
    """PEFT reads every tensor of ``exported`` and misses none, and means by them what is wanted.

    ``exact``: every element within what folding does to it; else each tensor within as much by its norm.
    """
    config = LoraConfig.from_pretrained(exported)
    probe = get_peft_model(load_model(case.family, base, torch.float64), config, autocast_adapter_dtype=False)
    tensors = load_peft_weights(exported)
    assert not set_peft_model_state_dict(probe, tensors).unexpected_keys
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = load_peft(case.family, base, {"found": exported}, torch.float64)
    assert not [str(warning.message) for warning in caught if "missing adapter keys" in str(warning.message)]
    found = truths(model, {"found": 1.0})
    assert found.keys() == wanted.keys()
    for name, truth in wanted.items():
        error = (found[name].sum - truth.sum).abs()
        if exact:
            assert bool((error <= _FOLDING * _magnitude(truth)).all()), name
        else:
            assert torch.linalg.norm(error) <= _FOLDING * torch.linalg.norm(_magnitude(truth)), name
        assert bool(truth.terms) == bool(found[name].terms), name
    assert FAMILIES[case.family].trained.__name__ == type(model.get_base_model()).__name__


def _magnitude(truth: Truth) -> torch.Tensor:
    """Σ |scale|·|left|·|right| + Σ |scale|·|bias| + the rounding of float64 itself."""

    def size(term: Term) -> torch.Tensor:
        return abs(term.scale) * (term.left.abs() @ term.right.abs())

    total = truth.start.abs() * 2.0**-28
    for term in truth.terms:
        total = total + size(term)
    for scale, bias in truth.biases:
        total = total + abs(scale) * bias.abs()
    return total
