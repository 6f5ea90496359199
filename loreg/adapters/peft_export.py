"""Writing a PEFT directory for any version, also one that PEFT never saw.

PEFT has one scale per module, α/r. A module of one term keeps its factors as they are, with the α that gives
its scale; a composed module's terms are stacked, their scales folded into B in float32, and α = r.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from loreg.adapters.draft import RawTensor
from loreg.adapters.peft import CONFIG, WEIGHTS
from loreg.errors import Unsupported
from loreg.format.manifest import AdapterManifest
from loreg.format.module import Module
from loreg.format.safetensors import canonical_header

Read = Callable[[str], RawTensor]
"""Brings a tensor by its name in the manifest: ``factors:NAME`` or ``full:NAME``."""


@dataclass(frozen=True, slots=True)
class _Factors:
    A: RawTensor
    B: RawTensor
    bias: RawTensor | None
    alpha: float

    @property
    def rank(self) -> int:
        return self.A.shape[0]


def peft_files(manifest: AdapterManifest, read: Read) -> Iterator[tuple[str, Iterator[bytes | memoryview]]]:
    """The files of a PEFT directory: each name with the pieces of its content.

    Raises Unsupported for what a PEFT config cannot say.
    """
    factors = {path: _factors(path, module, read) for path, module in manifest.modules.items()}
    tensors: dict[str, RawTensor] = {}
    for path, found in factors.items():
        embedding = manifest.modules[path].kind == "embedding"
        names = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")
        tensors[f"base_model.model.{path}.{names[0]}"] = found.A
        tensors[f"base_model.model.{path}.{names[1]}"] = found.B
        if found.bias is not None:
            tensors[f"base_model.model.{path}.lora_B.bias"] = found.bias
    for name, full in manifest.full.items():
        # PEFT wraps what it adapts, so that the layer's own parameters lie one level deeper there.
        owner = f"{full.module}.base_layer" if full.module in manifest.modules else full.module
        tensors[f"base_model.model.{owner}.{_parameter(name)}"] = read(f"full:{name}")
    config = _config(manifest, factors)
    yield CONFIG, iter([(json.dumps(config, indent=2, sort_keys=True) + "\n").encode()])
    yield WEIGHTS, _safetensors(tensors)


def _safetensors(tensors: Mapping[str, RawTensor]) -> Iterator[bytes | memoryview]:
    header = canonical_header(((n, t.dtype, t.shape) for n, t in tensors.items()), {"format": "pt"})
    yield header.raw
    for info in header.tensors:
        yield from tensors[info.name].chunks()


def _factors(path: str, module: Module, read: Read) -> _Factors:
    if not module.plain:
        raise Unsupported(
            f"Module {path!r} is adapted by more than plain LoRA, which PEFT's LoRA cannot say: export the adapters "
            "that it was made from with --format original, or merge it."
        )
    raws = {name: read(f"factors:{name}") for name, _ in module.tensors(path)}
    if len(module.terms) == 1 and len(module.bias_terms) <= 1:
        term = module.terms[0]
        alpha = term.scale * term.rank
        same_scale = all(bias.scale == term.scale for bias in module.bias_terms)
        # α/r must give the scale back to the bit, or the export would be another adapter.
        if same_scale and alpha / term.rank == term.scale:
            bias = raws.get(f"{path}.lora_bias.0")
            return _Factors(raws[f"{path}.lora_A.0"], raws[f"{path}.lora_B.0"], bias, alpha)
    from loreg.adapters.folding import fold

    A, B, bias = fold(path, module, raws)
    return _Factors(A, B, bias, float(A.shape[0]))


def _config(manifest: AdapterManifest, factors: Mapping[str, _Factors]) -> dict[str, Any]:
    rank = Counter(found.rank for found in factors.values()).most_common(1)[0][0] if factors else 1
    alpha = Counter(found.alpha for found in factors.values()).most_common(1)[0][0] if factors else 1.0
    with_bias = {path for path, found in factors.items() if found.bias is not None}
    if with_bias and with_bias != set(factors):
        lacking = min(set(factors) - with_bias)
        raise Unsupported(
            f"Some modules have a trained bias and {lacking!r} has none: PEFT's lora_bias is for all or none, so "
            "this version has no PEFT form."
        )
    bias, saved = _replaced(manifest)
    return {
        "peft_type": "LORA",
        # A task would have PEFT wrap modules called "classifier" and "score" besides those named below.
        "task_type": None,
        "base_model_name_or_path": manifest.base.hub.repo if manifest.base.hub else manifest.base.name,
        "revision": manifest.base.hub.commit if manifest.base.hub else None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": _number(alpha),
        "lora_dropout": 0.0,
        "bias": bias,
        "lora_bias": bool(with_bias),
        "fan_in_fan_out": any(module.kind == "conv1d" for module in manifest.modules.values()),
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "modules_to_save": saved or None,
        "target_modules": sorted(factors),
        # Whole paths, escaped: PEFT reads keys as regular expressions, and the first that matches wins.
        "rank_pattern": {re.escape(path): f.rank for path, f in sorted(factors.items()) if f.rank != rank},
        "alpha_pattern": {
            re.escape(path): _number(f.alpha) for path, f in sorted(factors.items()) if f.alpha != alpha
        },
    }


def _replaced(manifest: AdapterManifest) -> tuple[str, list[str]]:
    """What PEFT's ``bias`` and ``modules_to_save`` have to be for the replaced tensors.

    A bias alone is one that was trained in its place. Modules are named by their whole paths: PEFT compares ends
    of names, and ``dense`` would be half of an encoder.
    """
    parameters: dict[str, set[str]] = {}
    for name, full in manifest.full.items():
        parameters.setdefault(full.module, set()).add(_parameter(name))
    biases = {module for module, found in parameters.items() if found == {"bias"}}
    whole = set(parameters) - biases - set(manifest.modules)
    bias = "none" if not biases else "lora_only" if biases <= set(manifest.modules) else "all"
    return bias, sorted(whole)


def _parameter(name: str) -> str:
    return name.rpartition(".")[2]


def _number(value: float) -> float | int:
    return int(value) if value == int(value) else value
