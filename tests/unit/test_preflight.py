"""``serving.preflight``: each rule of each engine, what the description of a version is, and what is asked of it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import tiny
from click.testing import CliRunner

import loreg
from loreg import serving
from loreg.cli import main
from loreg.digest import Digest
from loreg.errors import NotFound, UsageError
from loreg.format.manifest import AdapterManifest
from loreg.format.terms import FormTerm, TensorRef
from loreg.registry.storage import Storage
from loreg.serving.engines import ENGINES
from loreg.serving.engines.described import Described, Layer, Stack, Words
from loreg.serving.engines.describing import describe, words_of
from loreg.serving.preflight import Engine, Finding, Preflight

ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
PATHS = [f"model.layers.{n}.self_attn.{p}" for n in range(2) for p in ATTENTION]
PATHS += [f"model.layers.{n}.mlp.{p}" for n in range(2) for p in MLP]
Q0 = PATHS[0]
EXPERTS = "model.layers.0.mlp.experts"

Found = set[tuple[str, str, bool]]


def layer(path: str, **changes: Any) -> Layer:
    return replace(Layer(path, "linear", 16, 2.0), **changes)


def llama(*more: Layer, words: Mapping[str, Any] | None = None, **changes: Any) -> Described:
    """A LoRA of rank 16 and scale 2 on every projection of two layers. ``more``: in the place of some, or beside."""
    layers = {path: layer(path) for path in PATHS} | {each.path: each for each in more}
    said = replace(Words("LORA", 16, 32.0, targets=(*ATTENTION, *MLP)), **(words or {}))
    rank = max(each.rank for each in layers.values())
    described = Described(said, layers=tuple(layers.values()), rank=rank, foldable=True)
    return replace(described, **changes)


def only(*paths: str, **changes: Any) -> Described:
    """A LoRA of rank 16 and scale 2 on these layers, and no others."""
    words = Words("LORA", 16, 32.0, targets=tuple(path.rpartition(".")[2] for path in paths))
    described = Described(words, layers=tuple(layer(path) for path in paths), rank=16, foldable=True)
    return replace(described, **changes)


def every(**changes: Any) -> Described:
    """All layers changed so."""
    return llama(*(layer(path, **changes) for path in PATHS))


def experts(*parts: str, missing: str = "", **changes: Any) -> Described:
    """Three experts with these projections, but for one of them."""
    paths = [f"{EXPERTS}.{n}.{part}" for n in range(3) for part in parts]
    return llama(*(layer(path, **changes) for path in paths if path != f"{EXPERTS}.{missing}"))


def stack(*parts: str, whole: bool = True) -> Described:
    return llama(stacks=(Stack(EXPERTS, frozenset(parts), whole),), foldable=False)


def found(described: Described, engine: str, **limits: Any) -> Found:
    given = {name: ENGINES[engine].limits[name](name, value) for name, value in limits.items()}
    return {(f.effect, f.subject, f.folded) for f in ENGINES[engine].findings(described, given)}


ROOT = every(scale=8.0)
ROOT = replace(ROOT, words=replace(ROOT.words, root=True))
ALPHA = llama(layer(Q0, scale=4.0))
RANK = llama(layer(Q0, rank=8, scale=4.0))
DORA = replace(every(magnitude=True), foldable=False)
BIASED = replace(every(bias=True), foldable=False)
ODD_WORDS = llama(words={"bias": "all", "ranks": (64,)})
ROWS = llama(rows=("model.embed_tokens",), foldable=False)
HEAD = llama(saved=("lm_head",), foldable=False)
NORM = llama(saved=("model.norm",), foldable=False)
BIASES = llama(biases=("model.layers.0.self_attn.q_proj",), words={"bias": "all"}, foldable=False)
BENEATH = llama(layer("model.embed_tokens", kind="embedding"), beneath=("model.embed_tokens",), foldable=False)
CARRIED = llama(carried=("model.embed_tokens.weight",))
CARRIED_OTHER = llama(carried=("transformer.wte.weight",))
EMBEDDING = llama(layer("model.embed_tokens", kind="embedding"))
WTE = llama(layer("transformer.wte", kind="embedding"))
CONV = llama(layer("visual.patch_embed.proj", kind="conv"), foldable=False)
MHA = llama(layer("visual.attn", kind="attention"), foldable=False)
BLOCKS = replace(every(divided=True), foldable=False)
STRANGERS = llama(strangers="adapter_model.safetensors")
GATED, LONG = ("gate_proj", "up_proj", "down_proj"), ("gate_up_proj", "down_proj")

RULES: list[tuple[str, str, Described, dict[str, Any], Found]] = [
    # vLLM
    ("rank above the default", "vllm", every(rank=32, scale=1.0), {}, {("refuses", "rank", False)}),
    ("rank at the limit", "vllm", every(rank=32, scale=1.0), {"max_lora_rank": 32}, set()),
    ("rank above the limit", "vllm", every(), {"max_lora_rank": "8"}, {("refuses", "rank", False)}),
    ("words", "vllm", ODD_WORDS, {}, {("refuses", "rank", True), ("refuses", "bias", True)}),
    ("a broken rank", "vllm", llama(words={"ranks": (8.0,)}), {}, {("refuses", "rank_pattern", True)}),
    ("patterns are read", "vllm", RANK, {}, set()),
    ("alphas are read", "vllm", ALPHA, {}, set()),
    ("rsLoRA is read", "vllm", ROOT, {}, set()),
    ("DoRA", "vllm", DORA, {}, {("refuses", "use_dora", False)}),
    ("lora_bias", "vllm", BIASED, {}, {("refuses", "lora_bias", False)}),
    ("biases", "vllm", BIASES, {}, {("refuses", "bias", False)}),
    ("rows", "vllm", ROWS, {}, {("refuses", "trainable_token_indices", False)}),
    ("convolution", "vllm", CONV, {}, {("refuses", "conv", False)}),
    ("attention", "vllm", MHA, {}, {("refuses", "attention", False)}),
    ("blocks", "vllm", BLOCKS, {}, {("refuses", "use_bdlora", False)}),
    ("embed_tokens", "vllm", EMBEDDING, {}, set()),
    ("wte", "vllm", WTE, {}, {("refuses", "embedding", False)}),
    ("beneath", "vllm", BENEATH, {}, {("ignores", "base_layer", False)}),
    ("carried", "vllm", CARRIED, {}, {("refuses", "save_embedding_layers", True)}),
    ("lm_head", "vllm", HEAD, {}, {("refuses", "modules_to_save", False)}),
    ("score", "vllm", llama(saved=("score",), labels=3, words={"saved": ("classifier", "score")}), {}, set()),
    ("two heads", "vllm", llama(saved=("score", "classifier")), {}, {("refuses", "modules_to_save", False)}),
    ("a path", "vllm", llama(saved=("score",), words={"saved": ("m.score",)}, foldable=False), {},
     {("refuses", "modules_to_save", False)}),
    ("an idle name", "vllm", llama(words={"saved": ("lm_head",)}), {}, {("refuses", "modules_to_save", True)}),
    ("labels", "vllm", llama(saved=("score",), labels=3), {"max_lora_cls_labels": 2},
     {("refuses", "modules_to_save", False)}),
    ("fewer labels", "vllm", llama(saved=("score",), labels=3), {"max_lora_cls_labels": 3}, set()),
    ("experts", "vllm", experts(*GATED), {}, set()),
    ("ungated experts", "vllm", experts("up_proj", "down_proj"), {}, set()),
    ("an expert lacks one", "vllm", experts(*GATED, missing="1.up_proj"), {}, {("refuses", "experts", False)}),
    ("experts lack one", "vllm", experts("w1", "w3"), {}, {("refuses", "experts", False)}),
    ("an expert of another rank", "vllm", replace(experts("w1", "w2", "w3"), layers=(
        *experts("w1", "w2", "w3").layers[:-1], layer(f"{EXPERTS}.2.w3", rank=8, scale=4.0))), {},
     {("refuses", "experts", False)}),
    ("a stack", "vllm", stack(*LONG), {}, set()),
    ("half a stack", "vllm", stack("down_proj"), {}, {("refuses", "target_parameters", False)}),
    ("a stack, apart on disk", "vllm", stack(*GATED, whole=False), {}, {("refuses", "target_parameters", False)}),
    ("a stack, mixed", "vllm", stack(*GATED, whole=False), {"enable_mixed_moe_lora_format": "true"}, set()),
    ("strangers", "vllm", STRANGERS, {}, {("refuses", "tensors", True)}),
    ("all targets", "vllm", every(), {"lora_target_modules": "qkv_proj,o_proj,up_proj,down_proj"}, set()),
    ("some targets", "vllm", every(), {"lora_target_modules": ["q_proj"]}, {("ignores", "target_modules", False)}),
    ("a whole path", "vllm", only("model.x"), {"lora_target_modules": ["model.x"]}, set()),
    # SGLang
    ("no limit", "sglang", every(rank=512, scale=1 / 16), {}, {("refuses", "rank_pattern", True)}),
    ("rank above the limit", "sglang", every(), {"max_lora_rank": 8}, {("refuses", "rank", False)}),
    ("rank at the limit", "sglang", every(), {"max_lora_rank": 16}, set()),
    ("rsLoRA", "sglang", ROOT, {}, {("misreads", "use_rslora", True)}),
    ("alphas", "sglang", ALPHA, {}, {("misreads", "alpha_pattern", True)}),
    ("ranks", "sglang", RANK, {}, {("refuses", "rank_pattern", True)}),
    ("another α than all have", "sglang", llama(words={"alpha": 8.0}), {}, {("misreads", "alpha_pattern", True)}),
    ("not to be folded", "sglang", replace(ROOT, foldable=False), {}, {("misreads", "use_rslora", False)}),
    ("DoRA", "sglang", DORA, {}, {("refuses", "use_dora", False)}),
    ("lora_bias", "sglang", BIASED, {}, {("misreads", "lora_bias", False)}),
    ("biases", "sglang", BIASES, {}, {("misreads", "bias", False)}),
    ("blocks", "sglang", BLOCKS, {}, {("refuses", "use_bdlora", False)}),
    ("lm_head", "sglang", HEAD, {}, {("ignores", "modules_to_save", False)}),
    ("beneath", "sglang", BENEATH, {}, {("ignores", "base_layer", False)}),
    ("carried", "sglang", CARRIED, {}, set()),
    ("rows", "sglang", ROWS, {}, {("ignores", "trainable_token_indices", False)}),
    ("a stack", "sglang", stack(*LONG), {}, {("refuses", "target_parameters", False)}),
    ("a norm in a layer", "sglang", llama(saved=("model.norm", "model.layers.0.input_layernorm")), {},
     {("refuses", "modules_to_save", False), ("ignores", "modules_to_save", False)}),
    ("a word, and more than allowed", "sglang", llama(words={"targets": "all-linear"}),
     {"lora_target_modules": "k_proj"}, {("refuses", "target_modules", False)}),
    ("a word, and an unknown module", "sglang", llama(layer("model.layers.0.attn.dense"), words={"targets": "all"}),
     {}, {("refuses", "target_modules", False)}),
    ("a pattern, and more than allowed", "sglang", llama(words={"targets": ".*proj"}),
     {"lora_target_modules": "k_proj"}, {("refuses", "target_modules", True), ("refuses", "target_modules", False)}),
    ("embed_tokens", "sglang", EMBEDDING, {}, set()),
    ("wte", "sglang", WTE, {}, {("ignores", "embedding", False), ("refuses", "target_modules", False)}),
    ("convolution", "sglang", CONV, {}, {("ignores", "conv", False)}),
    ("attention", "sglang", MHA, {}, {("ignores", "attention", False)}),
    ("no number", "sglang", llama(layer("projector.o_proj")), {}, {("ignores", "layers", False)}),
    ("experts", "sglang", experts(*GATED), {}, set()),
    ("experts by short names", "sglang", experts("w1", "w2", "w3"), {}, {("refuses", "target_modules", False)}),
    ("an unknown module", "sglang", only("model.layers.0.attn.dense"), {}, {("refuses", "target_modules", False)}),
    ("a pattern", "sglang", llama(words={"targets": ".*proj"}), {}, {("refuses", "target_modules", True)}),
    ("all linear", "sglang", llama(words={"targets": "all-linear"}), {}, set()),
    ("all targets", "sglang", every(), {"lora_target_modules": "k_proj,o_proj,gate_proj,down_proj"}, set()),
    ("all by a word", "sglang", every(), {"lora_target_modules": "all"}, set()),
    ("some targets", "sglang", every(), {"lora_target_modules": "k_proj"}, {("refuses", "target_modules", False)}),
    ("an idle target", "sglang", llama(words={"targets": (*ATTENTION, *MLP, "lm_head")}),
     {"lora_target_modules": "k_proj,o_proj,gate_proj,down_proj"}, {("refuses", "target_modules", True)}),
    ("q alone", "sglang", only(Q0), {}, {("refuses", "target_modules", False)}),
    ("q and v", "sglang", only(Q0, PATHS[2]), {}, set()),
    ("k and v", "sglang", only(PATHS[1], PATHS[2]), {}, {("refuses", "target_modules", False)}),
    ("up alone", "sglang", only("model.layers.0.mlp.up_proj"), {}, {("refuses", "target_modules", False)}),
    ("gate alone", "sglang", only("model.layers.0.mlp.gate_proj"), {}, set()),
    ("strangers", "sglang", STRANGERS, {}, {("misreads", "tensors", True)}),
    # TensorRT-LLM
    ("rank above the default", "tensorrt-llm", every(rank=128, scale=1 / 4), {}, {("refuses", "rank", False)}),
    ("rank at the limit", "tensorrt-llm", every(rank=128, scale=1 / 4), {"max_lora_rank": 128}, set()),
    ("own ranks", "tensorrt-llm", RANK, {}, set()),
    ("rsLoRA is read", "tensorrt-llm", ROOT, {}, set()),
    ("alphas", "tensorrt-llm", ALPHA, {}, {("misreads", "alpha_pattern", True)}),
    ("DoRA", "tensorrt-llm", DORA, {}, {("misreads", "use_dora", False)}),
    ("lora_bias", "tensorrt-llm", BIASED, {}, {("refuses", "lora_bias", False)}),
    ("biases", "tensorrt-llm", BIASES, {}, {("refuses", "bias", False)}),
    ("lm_head", "tensorrt-llm", HEAD, {}, {("ignores", "modules_to_save", False)}),
    ("a norm", "tensorrt-llm", NORM, {}, {("refuses", "modules_to_save", False)}),
    ("rows", "tensorrt-llm", ROWS, {}, {("ignores", "trainable_token_indices", False)}),
    ("embed_tokens", "tensorrt-llm", EMBEDDING, {}, {("ignores", "target_modules", False)}),
    ("wte", "tensorrt-llm", WTE, {}, {("refuses", "target_modules", False)}),
    ("an unknown module", "tensorrt-llm", llama(layer("model.layers.0.attn.dense")), {},
     {("ignores", "target_modules", False)}),
    ("a shared expert", "tensorrt-llm", llama(layer("model.layers.0.mlp.shared_expert.up_proj")), {}, set()),
    ("experts", "tensorrt-llm", experts("w1", "w2", "w3"), {}, set()),
    ("experts lack one", "tensorrt-llm", experts("w1", "w2"), {}, {("refuses", "experts", False)}),
    ("a stack", "tensorrt-llm", stack(*LONG), {}, {("ignores", "target_parameters", False)}),
    ("blocks", "tensorrt-llm", BLOCKS, {}, {("refuses", "use_bdlora", False)}),
    ("carried", "tensorrt-llm", CARRIED, {}, set()),
    ("another carried", "tensorrt-llm", CARRIED_OTHER, {}, {("refuses", "save_embedding_layers", True)}),
    ("some targets", "tensorrt-llm", every(), {"lora_target_modules": "attn_q"},
     {("ignores", "target_modules", False)}),
    ("all targets", "tensorrt-llm", only(Q0), {"lora_target_modules": "attn_q,attn_k"}, set()),
    ("strangers", "tensorrt-llm", STRANGERS, {}, {("refuses", "tensors", True)}),
    # llama.cpp
    ("own ranks", "llama.cpp", RANK, {}, set()),
    ("rsLoRA", "llama.cpp", ROOT, {}, {("misreads", "use_rslora", True)}),
    ("alphas", "llama.cpp", ALPHA, {}, {("misreads", "alpha_pattern", True)}),
    ("α is 0", "llama.cpp", llama(words={"alpha": 0.0}), {}, {("misreads", "lora_alpha", True)}),
    ("DoRA", "llama.cpp", DORA, {}, {("refuses", "use_dora", False)}),
    ("lora_bias", "llama.cpp", BIASED, {}, {("refuses", "lora_bias", False)}),
    ("biases", "llama.cpp", BIASES, {}, {("refuses", "bias", False)}),
    ("lm_head", "llama.cpp", HEAD, {}, {("refuses", "modules_to_save", False)}),
    ("a norm", "llama.cpp", NORM, {}, {("ignores", "modules_to_save", False)}),
    ("another norm", "llama.cpp", llama(saved=("model.layers.0.self_attn.q_norm",)), {},
     {("refuses", "modules_to_save", False)}),
    ("beneath", "llama.cpp", BENEATH, {}, {("ignores", "base_layer", False)}),
    ("rows", "llama.cpp", ROWS, {}, {("refuses", "trainable_token_indices", False)}),
    ("a stack", "llama.cpp", stack(*LONG), {}, {("refuses", "target_parameters", False)}),
    ("convolution", "llama.cpp", CONV, {}, {("refuses", "conv", False)}),
    ("attention", "llama.cpp", MHA, {}, {("refuses", "attention", False)}),
    ("blocks", "llama.cpp", BLOCKS, {}, {("refuses", "use_bdlora", False)}),
    ("embed_tokens", "llama.cpp", EMBEDDING, {}, set()),
    ("a tied head", "llama.cpp", llama(layer("lm_head", tied=True)), {}, {("refuses", "lm_head", False)}),
    ("a tied embedding", "llama.cpp", llama(layer("model.embed_tokens", kind="embedding", tied=True)), {},
     {("refuses", "embedding", False)}),
    ("a head of its own", "llama.cpp", llama(layer("lm_head")), {}, set()),
    ("Conv1D", "llama.cpp", llama(layer("h.0.c_attn", kind="conv1d")), {}, {("refuses", "conv1d", False)}),
    ("a square Conv1D", "llama.cpp", llama(layer("h.0.c_proj", kind="conv1d", square=True)), {},
     {("misreads", "conv1d", False)}),
    ("experts lack one", "llama.cpp", experts("w1", "w2"), {}, {("refuses", "experts", False)}),
    ("carried", "llama.cpp", CARRIED, {}, {("refuses", "save_embedding_layers", True)}),
    ("strangers", "llama.cpp", STRANGERS, {}, {("refuses", "tensors", True)}),
    # LoRAX
    ("rsLoRA is read", "lorax", ROOT, {}, set()),
    ("alphas", "lorax", ALPHA, {}, {("misreads", "alpha_pattern", True)}),
    ("ranks of one kind", "lorax", RANK, {}, {("refuses", "rank_pattern", True), ("misreads", "rank_pattern", True)}),
    ("ranks of two kinds", "lorax",
     llama(*(layer(path, rank=8, scale=4.0) for path in PATHS if path.endswith("q_proj"))), {},
     {("misreads", "rank_pattern", True)}),
    ("a padded rank", "lorax", llama(*(layer(path, rank=12) for path in PATHS), words={"r": 12, "alpha": 24.0}), {},
     {("misreads", "rank", False)}),
    ("a padded rank, one kind", "lorax", replace(
        only("model.layers.0.self_attn.q_proj"), layers=(layer(Q0, rank=12),), rank=12,
        words=Words("LORA", 12, 24.0)), {}, set()),
    ("a rank with a rest", "lorax",
     llama(*(layer(path, rank=32) for path in PATHS), words={"r": 32, "alpha": 64.0}), {"num_shard": 3},
     {("misreads", "rank", False)}),
    ("a rank that is padded for GPUs", "lorax", every(), {"num_shard": 4}, {("misreads", "rank", False)}),
    ("a rank that divides", "lorax", every(), {"num_shard": 2}, set()),
    ("the first layer left out", "lorax", only(PATHS[4]), {}, {("ignores", "layers_to_transform", False)}),
    ("a layer left out", "lorax", only(*PATHS[:5]), {}, {("ignores", "layers_to_transform", False)}),
    ("DoRA", "lorax", DORA, {}, {("misreads", "use_dora", False)}),
    ("blocks", "lorax", BLOCKS, {}, {("misreads", "use_bdlora", False)}),
    ("lora_bias", "lorax", BIASED, {}, {("ignores", "lora_bias", False)}),
    ("biases", "lorax", BIASES, {}, {("ignores", "bias", False)}),
    ("lm_head", "lorax", HEAD, {}, {("ignores", "modules_to_save", False)}),
    ("rows", "lorax", ROWS, {}, {("ignores", "trainable_token_indices", False)}),
    ("a stack", "lorax", stack(*LONG), {}, {("ignores", "target_parameters", False)}),
    ("embed_tokens", "lorax", EMBEDDING, {}, {("ignores", "embedding", False)}),
    ("beneath", "lorax", BENEATH, {}, {("ignores", "base_layer", False), ("ignores", "embedding", False)}),
    ("convolution", "lorax", CONV, {}, {("ignores", "conv", False)}),
    ("attention", "lorax", MHA, {}, {("ignores", "attention", False)}),
    ("a pickle", "lorax", llama(pickled=True), {}, {("refuses", "adapter_model.bin", True)}),
    ("strangers are not looked up", "lorax", STRANGERS, {}, set()),
    # PEFT
    ("replaced tensors alone", "peft", Described(Words("LORA", 1, 1.0), saved=("lm_head",)), {},
     {("refuses", "target_modules", False)}),
    ("rows alone", "peft", Described(Words("LORA", 1, 1.0), rows=("model.embed_tokens",)), {}, set()),
    *((name, "peft", described, {}, set()) for name, described in {
        "DoRA": DORA, "rsLoRA": ROOT, "ranks": RANK, "alphas": ALPHA, "lora_bias": BIASED, "lm_head": HEAD,
        "rows": ROWS, "a stack": stack(*LONG), "blocks": BLOCKS, "attention": MHA,
    }.items()),
]  # fmt: skip


@pytest.mark.parametrize(
    ("engine", "described", "limits", "expected"),
    [rule[1:2] + rule[2:] for rule in RULES],
    ids=[f"{engine}: {name}" for name, engine, *_ in RULES],
)
def test_a_rule(engine: str, described: Described, limits: dict[str, Any], expected: Found) -> None:
    assert found(described, engine, **limits) == expected


@pytest.mark.parametrize("engine", ENGINES)
def test_a_plain_lora_is_fine_everywhere(engine: str) -> None:
    assert found(llama(), engine) == set()


@pytest.mark.parametrize("engine", ENGINES)
def test_what_has_no_directory_is_only_that(engine: str) -> None:
    assert found(replace(DORA, unsayable="'x' is adapted by 'loha'"), engine) == {("refuses", "form", False)}


@pytest.mark.parametrize("engine", ENGINES)
def test_another_method_is_only_that(engine: str) -> None:
    expected: Found = set() if engine == "peft" else {("refuses", "peft_type", False)}
    assert found(llama(words={"method": "VERA"}), engine) == expected


@pytest.mark.parametrize("engine", ENGINES)
def test_findings_are_sentences(engine: str) -> None:
    for name, of, described, limits, _ in RULES:
        given = {key: ENGINES[of].limits[key](key, value) for key, value in limits.items()}
        for finding in ENGINES[of].findings(described, given) if of == engine else ():
            assert finding.reason[0].isupper() or finding.reason[0] in "'abcdefghijklmnopqrstuvwxyz", name
            assert finding.reason.endswith(".") and len(finding.reason) < 300 and "\n" not in finding.reason, name
            assert finding.remedy and not finding.remedy.endswith("."), name


# ---- of a version ----


def test_the_form_to_serve(pushed: loreg.Registry) -> None:
    """``humor`` has rsLoRA."""
    fine, folded = serving.preflight("sql", "llama.cpp", pushed), serving.preflight("humor", "llama.cpp", pushed)
    assert (fine.ok, fine.form, fine.findings, fine.stacked) == (True, "peft", (), False)
    assert (folded.ok, folded.form) == (False, "folded")
    assert [finding.subject for finding in folded.findings] == ["use_rslora"]
    assert folded.digest == pushed.resolve("humor").digest and folded.engine == "llama.cpp"


def test_a_finding_that_folding_does_not_mend_leaves_no_form() -> None:
    mended = Finding("misreads", "use_rslora", "…", "…", folded=True)
    other = Finding("refuses", "rank", "…", "…")
    digest = Digest.of(b"")
    assert Preflight(digest, "sglang", (mended,)).form == "folded"
    assert Preflight(digest, "sglang", (mended, other)).form is None


def test_the_numbers_are_named(pushed: loreg.Registry) -> None:
    (finding,) = serving.preflight("humor", "llama.cpp", pushed).findings
    scale = tiny.scale(tiny.adapter(seed=2, rank=3)[tiny.Q], use_rslora=True)
    assert f"{scale:g}" in finding.reason and f"{16 / 3:g}" in finding.reason and tiny.Q in finding.reason
    assert "2 of 2" in finding.reason


def test_no_tensor_is_read(pushed: loreg.Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Digest] = []
    real = Storage.read

    def counting(self: Storage, digest: Digest) -> bytes:
        read.append(digest)
        return real(self, digest)

    monkeypatch.setattr(Storage, "read", counting)
    monkeypatch.setattr(Storage, "path", None)
    version = pushed.resolve("humor")
    read.clear()
    serving.preflight("humor", "vllm", pushed)
    config = next(file.blob for file in version.manifest.source.files if file.name == "adapter_config.json")
    assert read == [version.digest, config]


@pytest.mark.parametrize("engine", ENGINES)
def test_without_the_pushed_config_the_manifest_tells_the_same(pushed: loreg.Registry, engine: str) -> None:
    for name in ("sql", "humor"):
        before = serving.preflight(name, engine, pushed)
        manifest = pushed.resolve(name).manifest
        config = next(file.blob for file in manifest.source.files if file.name == "adapter_config.json")
        for path in (pushed.home / "blobs").rglob(f"{config.hex}*"):
            path.unlink()
        assert serving.preflight(name, engine, pushed) == before


def test_the_pushed_words_count(registry: loreg.Registry, tmp_path: Path) -> None:
    """Nothing was trained by them, but the config is what an engine is given."""
    tensors = {name: value for name, value in tiny.model().items() if not name.endswith("bias")}
    registry.add_base(tiny.write_model(tmp_path / "base", tensors), "base")
    odd = {"bias": "all", "rank_pattern": {"k_proj": 64}, "target_modules": ".*_proj"}
    registry.push(tiny.write_adapter(tmp_path / "odd", tiny.adapter(), **odd), base="base", name="odd")
    found = serving.preflight("odd", "vllm", registry)
    assert [finding.subject for finding in found.findings] == ["rank", "bias"]
    assert found.form == "folded"
    registry.compose("odd", "composed")
    assert serving.preflight("composed", "vllm", registry).ok


def test_a_pickle_and_a_carried_embedding_are_seen(registry: loreg.Registry, tmp_path: Path) -> None:
    import torch

    tensors = tiny.model(dtype="F32")
    registry.add_base(tiny.write_model(tmp_path / "base", tensors), "base")
    name = "model.embed_tokens.weight"
    folder = tiny.write_adapter(tmp_path / "a", tiny.adapter(), full={name: tensors[name]}, modules_to_save=None)
    carried = registry.push(folder, base="base", name="carried")
    assert describe(carried.manifest).carried == (name,)
    assert not describe(carried.manifest).saved
    factors = {
        f"base_model.model.{path}.lora_{end}.weight": torch.from_numpy(np.array(getattr(f, end).values))
        for path, f in tiny.adapter().items()
        for end in "AB"
    }
    (folder / "adapter_model.safetensors").unlink()
    torch.save(factors, folder / "adapter_model.bin")
    described = describe(registry.push(folder, base="base", name="pickled").manifest)
    assert described.pickled and described.strangers is None


@pytest.mark.parametrize("tied", [True, False])
def test_an_embedding_that_is_the_heads_weight_too_is_seen(
    tied: bool, registry: loreg.Registry, tmp_path: Path
) -> None:
    tensors = {name: value for name, value in tiny.model().items() if not tied or name != "lm_head.weight"}
    config = {**tiny.CONFIG, "tie_word_embeddings": tied}
    registry.add_base(tiny.write_model(tmp_path / "base", tensors, config=config), "base")
    vocabulary, hidden = tensors["model.embed_tokens.weight"].shape
    rng, path = np.random.default_rng(5), "model.embed_tokens"
    full = {
        f"{path}.lora_embedding_A": tiny.normal(rng, "F32", 2, vocabulary),
        f"{path}.lora_embedding_B": tiny.normal(rng, "F32", hidden, 2),
    }
    targets = ["embed_tokens", "q_proj", "v_proj"]
    folder = tiny.write_adapter(
        tmp_path / "a", tiny.adapter(), full=full, target_modules=targets, modules_to_save=None
    )
    found = describe(registry.push(folder, base="base", name="embedded").manifest)
    assert [layer.path for layer in found.layers if layer.tied] == ([path] if tied else [])
    (subject,) = [finding.subject for finding in serving.preflight("embedded", "llama.cpp", registry).findings] or [
        None
    ]
    assert subject == ("embedding" if tied else None)


def test_replaced_tensors_are_seen(registry: loreg.Registry, tmp_path: Path) -> None:
    registry.add_base(tiny.write_model(tmp_path / "base", tiny.model()), "base")
    rng = np.random.default_rng(5)
    full = {"lm_head.weight": tiny.normal(rng, "BF16", 10, 6), f"{tiny.Q}.bias": tiny.normal(rng, "BF16", 8)}
    folder = tiny.write_adapter(
        tmp_path / "a", tiny.adapter(), full=full, modules_to_save=["lm_head"], bias="lora_only"
    )
    manifest = registry.push(folder, base="base", name="full").manifest
    described = describe(manifest)
    assert (described.saved, described.biases, described.foldable) == (("lm_head",), (tiny.Q,), False)
    assert (described.words.saved, described.words.bias) == (("lm_head",), "lora_only")


# ---- odd and hostile ----

CONFIGS: list[Any] = [
    b"",
    b"{",
    b"[]",
    b'{"r": 1, "r": 2}',
    b"{" * 100_000,
    {"r": 0},
    {"r": "8"},
    {"r": True},
    {"lora_alpha": None},
    {"lora_alpha": 10**400},
    {"rank_pattern": [8]},
    {"rank_pattern": {"a": "8"}},
    {"target_modules": [1]},
    {"target_modules": {"q": 1}},
    {"modules_to_save": "lm_head"},
]


@pytest.mark.parametrize("config", CONFIGS, ids=range(len(CONFIGS)))
def test_a_config_that_nobody_can_read_is_none(config: Any) -> None:
    assert words_of(config if isinstance(config, bytes) else json.dumps(config).encode()) is None


def test_an_empty_config_is_peft_with_its_defaults() -> None:
    assert words_of(b"{}") == Words("None", 1, 1.0)


def _renamed(path: str) -> Callable[[AdapterManifest], AdapterManifest]:
    return lambda manifest: replace(manifest, modules={path: manifest.modules[tiny.Q]})


def _termed(**changes: Any) -> Callable[[AdapterManifest], AdapterManifest]:
    def change(manifest: AdapterManifest) -> AdapterManifest:
        module = manifest.modules[tiny.Q]
        term = replace(module.terms[0], **changes)
        return replace(manifest, modules={tiny.Q: replace(module, terms=(term,))})

    return change


def _of_form(manifest: AdapterManifest) -> AdapterManifest:
    module = manifest.modules[tiny.Q]
    value = TensorRef("F32", (8, 6), Digest.of(b""))
    term = FormTerm("dense", 0, None, 1.0, 1.0, {"value": value}, {})
    return replace(manifest, modules={tiny.Q: replace(module, terms=(term,))})


ODD: dict[str, Callable[[AdapterManifest], AdapterManifest]] = {
    "no path": _renamed(""),
    "dots": _renamed("..."),
    "a number without end": _renamed(f"model.layers.{'9' * 5000}.q_proj"),
    "an expert without end": _renamed(f"model.layers.0.experts.{'9' * 5000}.w1"),
    "an expert far out": _renamed("model.layers.999999999.experts.999999999.w1"),
    "an expression": _renamed("(a+)+$"),
    "a terminal's commands": _renamed("\x1b[2J\n.q_proj"),
    "no scale": _termed(scale=0.0),
    "a negative scale": _termed(scale=-2.0),
    "the largest scale": _termed(scale=1.7e308),
    "the smallest scale": _termed(scale=5e-324),
    "no alpha": _termed(alpha=None),
    "a rank beyond all": _termed(rank=2**63),
    "another form": _of_form,
}


@pytest.mark.parametrize("as_pushed", [True, False])
@pytest.mark.parametrize("odd", ODD)
def test_an_odd_manifest_is_answered_for_every_engine(pushed: loreg.Registry, odd: str, as_pushed: bool) -> None:
    manifest = ODD[odd](pushed.resolve("sql").manifest)
    described = describe(manifest if as_pushed else replace(manifest, source=None))
    for rules in ENGINES.values():
        for finding in rules.findings(described, {}):
            assert finding.effect in ("refuses", "misreads", "ignores") and len(finding.reason) < 20_000


# ---- what is asked ----


def test_every_engine_is_one_that_a_caller_can_name() -> None:
    assert set(get_args(Engine)) == set(ENGINES)


@pytest.mark.parametrize(
    ("engine", "limits", "says"),
    [
        ("vlm", {}, "expected one of vllm, sglang, tensorrt-llm, llama.cpp, lorax, peft"),
        ("vllm", {"max_rank": 8}, "'max_rank' is not a limit of vllm.*expected one of max_lora_rank, "),
        ("peft", {"max_lora_rank": 8}, "expected none"),
        ("vllm", {"max_lora_rank": 24}, "one of 1, 8, 16, 32, 64, 128, 256, 320, 512, found '24'"),
        ("sglang", {"max_lora_rank": 0}, "a whole number of at least 1, found '0'"),
        ("sglang", {"max_lora_rank": True}, "found 'True'"),
        ("sglang", {"max_lora_rank": 8.0}, "found '8.0'"),
        ("sglang", {"max_lora_rank": "-8"}, "found '-8'"),
        ("sglang", {"max_lora_rank": "²"}, "found"),
        ("sglang", {"lora_target_modules": ""}, "names with commas"),
        ("sglang", {"lora_target_modules": []}, "names with commas"),
        ("sglang", {"lora_target_modules": [1]}, "names with commas"),
        ("sglang", {"lora_target_modules": 1}, "names with commas"),
        ("vllm", {"enable_mixed_moe_lora_format": "yes"}, "true or false, found 'yes'"),
    ],
)
def test_a_question_that_makes_no_sense(
    pushed: loreg.Registry, engine: str, limits: dict[str, Any], says: str
) -> None:
    with pytest.raises(UsageError, match=says):
        serving.preflight("sql", engine, pushed, **limits)


@pytest.mark.parametrize("name", ["reference", "engine", "registry", "max_rank"])
def test_the_command_line_takes_any_name_for_a_limit(
    pushed: loreg.Registry, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOREG_HOME", str(pushed.home))
    refused = CliRunner().invoke(main, ["preflight", "sql", "--engine", "vllm", "--limit", f"{name}=8"])
    assert refused.exit_code == 2
    assert f"'{name}' is not a limit of vllm" in refused.stderr


def test_an_unknown_reference(pushed: loreg.Registry) -> None:
    with pytest.raises(NotFound, match="sqk"):
        serving.preflight("sqk", "vllm", pushed)


def test_the_registry_of_the_environment(pushed: loreg.Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOREG_HOME", str(pushed.home))
    assert serving.preflight("sql", "vllm") == serving.preflight("sql", "vllm", pushed)


# ---- what is written of it ----

SPEC = (Path(__file__).resolve().parents[2] / "spec" / "engines.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("engine", ENGINES)
def test_the_page_of_engines_is_kept(engine: str) -> None:
    """Its row has the version and every limit, its section every subject of a rule, and whether folding mends it."""
    rules = ENGINES[engine]
    (row,) = re.findall(rf"^\| {re.escape(engine)} \|.*$", SPEC, re.MULTILINE)
    assert rules.version in row
    assert set(re.findall(r"`([a-z_]+)`", row.rpartition(" | ")[2])) == set(rules.limits)
    (section,) = re.findall(rf"^## {re.escape(rules.title)}\n(.*?)(?=^## |\Z)", SPEC, re.MULTILINE | re.DOTALL)
    for _, of, _, _, expected in RULES:
        for effect, subject, folded in expected if of == engine else ():
            lines = [line for line in section.splitlines() if re.search(rf"\b{subject}\b", line)]
            assert any(effect in line.lower() or "the same" in section for line in lines), (effect, subject)
            assert not folded or any("†" in line for line in lines), (effect, subject)
