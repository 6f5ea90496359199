"""Writing a PEFT directory for any version, also one that PEFT never saw.

PEFT has one scale per module, α/r. A module of one term keeps its factors as they are, with the α that gives
its scale; a composed module's terms are stacked, their scales folded into B in float32, and α = r.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from loreg.adapters import renames
from loreg.adapters.draft import RawTensor
from loreg.adapters.peft import CONFIG, WEIGHTS, attention, tokens
from loreg.adapters.peft.contents import PREFIX
from loreg.adapters.peft_layers import Layer, Read, Rows, layer_of
from loreg.errors import Unsupported
from loreg.format.manifest import AdapterManifest
from loreg.format.safetensors import canonical_header

# Embeddings that ``ensure_weight_tying`` knows (PEFT 0.21, ``utils/constants.py``, `EMBEDDING_LAYER_NAMES`).
_TIED_BY_PEFT = ("embed_tokens", "lm_head")


@dataclass(frozen=True)
class _Adapter:
    """A version in PEFT's words. ``layers`` and ``rows`` by path in the model; ``attentions``: those of ``layers``
    that are a MultiheadAttention, whose ``out_proj`` is one of ``layers`` too."""

    manifest: AdapterManifest
    layers: Mapping[str, Layer]
    rows: Mapping[str, Rows]
    attentions: frozenset[str]

    def wrapped(self, path: str) -> str:
        """Where PEFT keeps what a module has, without its ``base_layer``."""
        owner, _, leaf = path.rpartition(".")
        return f"{owner}{attention.WRAPPED}" if owner in self.attentions and leaf == "out_proj" else path

    def inner(self, path: str) -> str:
        """Where PEFT keeps the module's own parameters: one level deeper, in what it wraps."""
        if path in self.rows:
            return f"{path}.token_adapter.base_layer"
        return f"{self.wrapped(path)}.base_layer" if path in self.layers else path

    @property
    def targets(self) -> dict[str, Layer]:
        """The layers that a config names: an attention stands for both of its own."""
        return {path: layer for path, layer in self.layers.items() if self.wrapped(path) == path}

    @property
    def tied(self) -> dict[str, str]:
        """Layers of an embedding that the model ties to a head, and both were changed → the head's path."""
        heads = {tie.to: head for head, tie in self.manifest.ties.items() if not tie.untied}
        found = {path: heads.get(self.manifest.modules[path].tensor) for path in self.layers}
        return {path: _head_beside(path, head) for path, head in found.items() if head is not None}


def peft_files(
    manifest: AdapterManifest, read: Read, stored: Collection[str] = ()
) -> Iterator[tuple[str, Iterator[bytes | memoryview]]]:
    """The files of a PEFT directory: each name with the pieces of its content.

    ``stored``: the names of the base's tensors, where they are known. PEFT loads a module of ``modules_to_save`` only
    with all of its parameters: one of which the version has the weight and not the bias is written as its parameter
    in the model, in whose place PEFT loads it. Raises Unsupported for what a PEFT config cannot say.
    """
    adapter = _adapter(manifest, read)
    config = _config(adapter, stored)
    yield from _files(config, {f"{PREFIX}{name}": raw for name, raw in _tensors(adapter, read)})


def folded_files(manifest: AdapterManifest, read: Read) -> Iterator[tuple[str, Iterator[bytes | memoryview]]]:
    """The files of a PEFT directory in which nothing is left to misread: all scales are 1, and all ranks the same.

    Several engines compute every scale as lora_alpha/r, whatever ``use_rslora``, ``rank_pattern`` and
    ``alpha_pattern`` say, and take targets for the last parts of names. So the scale is folded into B, in float32,
    each element rounded once; A and B are padded with zeros to the largest rank; and lora_alpha is that rank.

    Raises Unsupported for what is more than LoRA of linear layers and embeddings.
    """
    replaced = manifest.replaced()
    adapter = _adapter(replace(manifest, full={}), read)  # the others are the base's own
    for path, module in manifest.modules.items():
        layer = adapter.layers.get(path)
        if layer is None or layer.magnitude is not None or layer.bias is not None or module.kind not in _FOLDED:
            raise Unsupported(
                f"Module {path!r} is more than A and B of a linear layer or an embedding: this version has no form "
                "with folded scales; merge it, and serve the merged model."
            )
    if others := (*replaced, *adapter.tied, *adapter.attentions):
        raise Unsupported(
            f"{others[0]!r} is changed otherwise than by LoRA of its own: this version has no form with folded "
            "scales; merge it, and serve the merged model."
        )
    rank = max(layer.rank for layer in adapter.layers.values())
    adapter = replace(adapter, layers={path: _folded(layer, rank) for path, layer in adapter.layers.items()})
    config = _config(adapter, ()) | {"target_modules": list(manifest.targets)}
    yield from _files(config, {f"{PREFIX}{name}": raw for name, raw in _tensors(adapter, read)})


_FOLDED = ("linear", "conv1d", "embedding")


def _folded(layer: Layer, rank: int) -> Layer:
    from loreg.adapters.folding import fold, padded

    A, B = fold([(layer.A, layer.B, layer.scale)], 1.0)
    return Layer(padded(A, 0, rank), padded(B, 1, rank), float(rank))


def _files(
    config: Mapping[str, Any], tensors: Mapping[str, RawTensor]
) -> Iterator[tuple[str, Iterator[bytes | memoryview]]]:
    yield CONFIG, iter([(json.dumps(config, indent=2, sort_keys=True) + "\n").encode()])
    yield WEIGHTS, _safetensors(tensors)


def _safetensors(tensors: Mapping[str, RawTensor]) -> Iterator[bytes | memoryview]:
    header = canonical_header(((n, t.dtype, t.shape) for n, t in tensors.items()), {"format": "pt"})
    yield header.raw
    for info in header.tensors:
        yield from tensors[info.name].chunks()


def _adapter(manifest: AdapterManifest, read: Read) -> _Adapter:
    found = {path: layer_of(path, module, read) for path, module in manifest.modules.items()}
    layers = {path: layer for path, layer in found.items() if isinstance(layer, Layer)}
    rows = {path: layer for path, layer in found.items() if isinstance(layer, Rows)}
    whole = {path for path in layers if manifest.modules[path].tensor.rpartition(".")[2] == attention.PARAMETER}
    for path in whole:
        layers |= _attention(path, layers)
    adapter = _Adapter(manifest, layers, rows, frozenset(whole))
    _check_ties(adapter)
    _check_alike(adapter)
    return adapter


def _attention(path: str, layers: Mapping[str, Layer]) -> dict[str, Layer]:
    """Both layers of a MultiheadAttention with what PEFT gives them: one rank, one α, and twice the delta of one."""
    inner, outer = layers[path], layers.get(f"{path}.out_proj")
    if outer is None or inner.rank != outer.rank or inner.bias or outer.bias:
        raise Unsupported(
            f"Module {path!r} is a MultiheadAttention, which PEFT adapts with one rank for {attention.PARAMETER} and "
            "out_proj, and without biases: this version has no PEFT form."
        )
    outer = replace(outer, alpha=outer.alpha / attention.TWICE)
    if inner.alpha != outer.alpha:
        from loreg.adapters.folding import fold

        inner, outer = (
            Layer(*fold([(layer.A, layer.B, layer.scale)], 1.0), float(layer.rank)) for layer in (inner, outer)
        )
    return {path: inner, f"{path}.out_proj": outer}


def _check_ties(adapter: _Adapter) -> None:
    """Raises Unsupported where PEFT would tie what the version does not, or cannot tie what it does."""
    manifest = adapter.manifest
    for path in adapter.tied:
        if path.rpartition(".")[2] not in _TIED_BY_PEFT or adapter.layers[path].magnitude is not None:
            raise Unsupported(
                f"Module {path!r} is changed together with the head that it is tied to, which PEFT's "
                f"ensure_weight_tying does for plain LoRA on {_TIED_BY_PEFT[0]!r} alone: this version has no PEFT "
                "form."
            )
    for head, embedding in manifest.untied.items():
        paths = {manifest.modules[path].tensor: path for path in adapter.rows}
        if embedding not in paths:
            continue
        # PEFT gives these rows to the head too, unless it has others of its own.
        if head not in paths or adapter.rows[paths[head]].indices == adapter.rows[paths[embedding]].indices:
            raise Unsupported(
                f"Module {paths[embedding]!r} has trained rows that are not of the head that it is tied to, and PEFT "
                "would give them to it: this version has no PEFT form."
            )


def _check_alike(adapter: _Adapter) -> None:
    """Raises Unsupported where PEFT has one setting for all layers, and they differ in it."""
    settings = {"bias": "lora_bias", "magnitude": "use_dora"}
    for name, option in settings.items():
        having = {path for path, layer in adapter.layers.items() if getattr(layer, name) is not None}
        if lacking := min(set(adapter.layers) - having, default=None) if having else None:
            raise Unsupported(
                f"Some modules have a trained {name} and {lacking!r} has none: PEFT's {option} is for all or none, "
                "so this version has no PEFT form."
            )
        if name == "bias" and any(adapter.manifest.modules[path].kind == "embedding" for path in having):
            raise Unsupported("PEFT has no lora_bias for embeddings, and one of this version's has a bias.")


def _tensors(adapter: _Adapter, read: Read) -> Iterator[tuple[str, RawTensor]]:
    """The tensors of the file, by name without PEFT's prefix."""
    for path, layer in adapter.layers.items():
        place = adapter.wrapped(path)
        embedding = adapter.manifest.modules[path].kind == "embedding"
        names = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")
        yield f"{place}.{names[0]}", layer.A
        yield f"{place}.{names[1]}", layer.B
        if layer.bias is not None:
            yield f"{place}.lora_B.bias", layer.bias
        if layer.magnitude is not None:
            yield f"{place}.lora_magnitude_vector", layer.magnitude
    for path, head in adapter.tied.items():
        yield f"{head}.lora_A.weight", adapter.layers[path].B.transposed()
        yield f"{head}.lora_B.weight", adapter.layers[path].A.transposed()
    for path, rows in adapter.rows.items():
        yield f"{path}.token_adapter.trainable_tokens_delta", rows.rows
    for name, full in adapter.manifest.full.items():
        yield f"{adapter.inner(full.module)}.{_parameter(name)}", read(f"full:{name}")


def _config(adapter: _Adapter, stored: Collection[str]) -> dict[str, Any]:
    manifest, targets = adapter.manifest, adapter.targets
    named = {**targets, **{head: adapter.layers[path] for path, head in adapter.tied.items()}}
    rank = Counter(layer.rank for layer in targets.values()).most_common(1)[0][0] if targets else 1
    alpha = Counter(layer.alpha for layer in targets.values()).most_common(1)[0][0] if targets else 1.0
    bias, saved = _replaced(adapter, stored)
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
        "lora_bias": any(layer.bias is not None for layer in targets.values()),
        "fan_in_fan_out": any(module.kind == "conv1d" for module in manifest.modules.values()),
        "use_rslora": False,
        "use_dora": any(layer.magnitude is not None for layer in targets.values()),
        "init_lora_weights": True,
        "modules_to_save": saved or None,
        tokens.FIELD: {path: rows.indices for path, rows in sorted(adapter.rows.items())} or None,
        "ensure_weight_tying": bool(adapter.tied),
        "target_modules": sorted(targets),
        # Whole paths, escaped: PEFT reads keys as regular expressions, and the first that matches wins.
        "rank_pattern": {re.escape(path): f.rank for path, f in sorted(named.items()) if f.rank != rank},
        "alpha_pattern": {re.escape(path): _number(f.alpha) for path, f in sorted(named.items()) if f.alpha != alpha},
    }


def _replaced(adapter: _Adapter, stored: Collection[str]) -> tuple[str, list[str]]:
    """What PEFT's ``bias`` and ``modules_to_save`` have to be for the replaced tensors.

    A bias alone is one that was trained in its place. A weight that is tied, and stays so, is the base's own in both
    places, and PEFT puts it there without being told. Modules are named by their whole paths: PEFT compares ends
    of names, and ``dense`` would be half of an encoder.
    """
    parameters: dict[str, set[str]] = {}
    tied = {tie.to for tie in adapter.manifest.ties.values() if not tie.untied}
    for name, full in adapter.manifest.full.items():
        if name not in tied:
            parameters.setdefault(full.module, set()).add(_parameter(name))
    biases = {module for module, found in parameters.items() if found == {"bias"}}
    lacking = {full.module for name, full in adapter.manifest.full.items() if _bias_of(name) in stored}
    lacking = {module for module in lacking if "bias" not in parameters.get(module, ())}
    whole = set(parameters) - biases - lacking - set(adapter.manifest.modules)
    bias = "none" if not biases else "lora_only" if biases <= set(adapter.manifest.modules) else "all"
    return bias, sorted(whole)


def _head_beside(embedding: str, head: str) -> str:
    """The path of a head, a tensor of the checkpoint, in the model whose embedding is called so: what has a "model"
    has its head beside that, also where its checkpoint has it inside."""
    path = head.removesuffix(".weight")
    return path.rpartition(".")[2] if embedding.startswith("model.") else path


def _bias_of(name: str) -> str:
    return f"{name.removesuffix('.weight')}.bias" if name.endswith(".weight") else ""


def _parameter(name: str) -> str:
    """What a tensor of the checkpoint is called in its module."""
    return renames.in_memory(name, {}).rpartition(".")[2]


def _number(value: float) -> float | int:
    return int(value) if value == int(value) else value
