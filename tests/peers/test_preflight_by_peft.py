"""``preflight`` over adapters that PEFT made: what it says of a directory, against the directory, and PEFT itself."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

from loreg import serving
from loreg.errors import Unsupported
from loreg.registry import Registry
from loreg.serving.engines import ENGINES
from loreg.serving.engines.described import Words
from loreg.serving.engines.describing import describe, words_of
from tests.peers.variants import Built, Case


def _cases(*modules: str, most: int | None = None) -> dict[str, Case]:
    found = [importlib.import_module(f"tests.peers.variants.{name}").CASES[:most] for name in modules]
    return {case.variant: case for cases in found for case in cases if case.refused is None}


_LORA = _cases("lora", "lora_initial", "lora_layers", "lora_words", "lora_saved", "lora_ties", "tokens", "experts")
_LORA = {variant: case for variant, case in _LORA.items() if "bfloat16" not in variant}
_OTHERS = _cases("adalora", "hadamard", "ia3", "orthogonal", "vera", most=1)
_FOREIGN = _cases("lycoris", "loralib", most=4)


def _built(case: Case, registry: Registry, folder: Path) -> Built:
    """Pushed as ``adapter``, and composed as ``same``: that adapter with no files, so that an export is written."""
    built = case.build(folder)
    registry.push(built.adapter, base=built.base, name="adapter", **built.push)
    registry.compose("adapter", "same")
    return built


def _said(folder: Path) -> Words:
    words = words_of((folder / "adapter_config.json").read_bytes())
    assert words is not None
    return words


@pytest.mark.parametrize("variant", _LORA | _OTHERS | _FOREIGN)
def test_directories_are_foreseen(variant: str, registry: Registry, tmp_path: Path) -> None:
    case = (_LORA | _OTHERS | _FOREIGN)[variant]
    built = _built(case, registry, tmp_path)
    _check_export(registry)
    _check_folded(registry)
    found = serving.preflight("adapter", "peft", registry)
    if not found.ok:
        with pytest.raises(Unsupported):
            serving.resolve("adapter", registry)
    elif built.reload is not None:
        off = (built.reload(serving.resolve("adapter", registry).path) - built.expected).abs().max()
        assert float(off / built.expected.abs().max()) <= case.tolerance


def _check_export(registry: Registry) -> None:
    described = describe(registry.resolve("same").manifest)
    if described.unsayable is not None:
        assert serving.preflight("same", "peft", registry).form is None
        with pytest.raises(Unsupported):
            serving.resolve("same", registry)
        return
    mine, real = described.words, _said(serving.resolve("same", registry).path)
    assert (mine.method, mine.r, mine.alpha, mine.root) == (real.method, real.r, real.alpha, real.root)
    assert (sorted(mine.ranks), mine.bias, set(mine.saved)) == (sorted(real.ranks), real.bias, set(real.saved))


def _check_folded(registry: Registry) -> None:
    described = describe(registry.resolve("adapter").manifest)
    if not described.foldable:
        with pytest.raises(Unsupported):
            serving.resolve("adapter", registry, form="folded")
        return
    words = _said(serving.resolve("adapter", registry, form="folded").path)
    assert (words.r, words.alpha) == (described.rank, described.rank)
    assert (words.root, words.ranks, words.bias, words.saved) == (False, (), "none", ())


def test_parameters_are_no_layers_to_an_engine(registry: Registry, tmp_path: Path) -> None:
    """The manifest may have what was trained as a parameter as if it were a layer, and the config tells."""
    _built(_LORA["`target_parameters`: Conv1D (GPT-2), which is not transposed"], registry, tmp_path)
    found = serving.preflight("adapter", "llama.cpp", registry)
    assert {finding.subject for finding in found.findings} == {"target_parameters"} and found.form is None
    assert found.stacked


def test_initial_factors_double_the_rank(registry: Registry, tmp_path: Path) -> None:
    built = _LORA["PiSSA"].build(tmp_path)
    registry.push(built.adapter, base=built.base, name="adapter", **built.push)
    r = _said(built.adapter).r
    assert serving.preflight("adapter", "tensorrt-llm", registry, max_lora_rank=2 * r).findings == ()
    (finding,) = serving.preflight("adapter", "tensorrt-llm", registry, max_lora_rank=2 * r - 1).findings
    assert finding.subject == "rank" and f"rank is {2 * r}," in finding.reason


def test_a_scale_that_would_be_misread_is_another_model(registry: Registry, tmp_path: Path) -> None:
    """As llama.cpp reads it: α/r whatever use_rslora says. PEFT, told the same, gives other outputs than trained."""
    built = _LORA["rsLoRA"].build(tmp_path)
    registry.push(built.adapter, base=built.base, name="adapter")
    (finding,) = serving.preflight("adapter", "llama.cpp", registry).findings
    assert (finding.effect, finding.subject, finding.folded) == ("misreads", "use_rslora", True)

    def off(form: str) -> float:
        registry.export("adapter", tmp_path / form, format=form)
        config = tmp_path / form / "adapter_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"use_rslora": False}))
        assert built.reload is not None
        return float((built.reload(tmp_path / form) - built.expected).abs().max() / built.expected.abs().max())

    assert off("peft") > 1e-3
    assert off("folded") <= 1e-6


@pytest.mark.parametrize("variant", _OTHERS)
def test_other_methods_of_peft_are_refused_by_name(variant: str, registry: Registry, tmp_path: Path) -> None:
    built = _OTHERS[variant].build(tmp_path)
    registry.push(built.adapter, base=built.base, name="adapter", **built.push)
    method = json.loads((built.adapter / "adapter_config.json").read_text())["peft_type"]
    for engine in set(ENGINES) - {"peft"}:
        (finding,) = serving.preflight("adapter", engine, registry).findings
        assert finding.subject == "peft_type" and method in finding.reason
