"""The adapters that the tests against peers make: one dictionary for merging and for the round trip."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Case:
    """One adapter on one base. ``lora``: what goes into PEFT's LoraConfig."""

    family: str
    dtype: str
    lora: Mapping[str, Any] = field(default_factory=dict)
    safe: bool = True
    wide_factors: bool = False


GPT2 = {"r": 4, "lora_alpha": 10, "target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}
ENCODER = {"r": 4, "lora_alpha": 10, "task_type": "SEQ_CLS"}
ROBERTA = {**ENCODER, "target_modules": ["query", "value", "output.dense", "intermediate.dense"]}
DEBERTA = {**ENCODER, "target_modules": ["query_proj", "value_proj", "output.dense", "intermediate.dense"]}
LLAMA = {"r": 4, "lora_alpha": 10, "target_modules": ["q_proj", "v_proj", "o_proj", "down_proj", "gate_proj"]}
# Keys that overlap. PEFT writes JSON with sorted keys, so another key wins after a reload than before it.
PATTERNS = {
    "rank_pattern": {"q_proj": 3, "layers.1.mlp.down_proj": 7},
    "alpha_pattern": {
        "v_proj": 5,
        "self_attn.v_proj": 11,
        "layers.0.self_attn.v_proj": 17,
        r".*\.1\..*o_proj": 3,
        "_proj": 23,  # no whole part of a name, so this matches nothing
        "layers.0": 29,  # nor does what is not at the end
    },
}

CASES = {
    "gpt2": Case("gpt2", "bf16", GPT2),
    "gpt2-fp16-square-only": Case("gpt2", "fp16", {**GPT2, "target_modules": ["attn.c_proj"]}),
    "gpt2-hub-names": Case("gpt2-hub", "fp16", GPT2),
    "gpt2-hub-names-rslora": Case("gpt2-hub", "bf16", {**GPT2, "use_rslora": True}),
    "gpt2-positions": Case("gpt2", "fp32", {**GPT2, "target_modules": ["wpe", "c_attn"]}),
    "gpt2-all-biases-bin": Case("gpt2", "bf16", {**GPT2, "bias": "all"}, safe=False),
    "gpt2-hub-names-lora-biases": Case("gpt2-hub", "fp32", {**GPT2, "bias": "lora_only"}),
    "gpt2-hub-names-lora-bias": Case("gpt2-hub", "fp16", {**GPT2, "lora_bias": True}),
    "gpt2-body": Case("gpt2-body", "bf16", {**GPT2, "use_rslora": True}),
    "roberta": Case("roberta", "bf16", ROBERTA),
    "roberta-new-head": Case("roberta-mlm", "fp16", {**ROBERTA, "use_rslora": True}),
    "roberta-headless": Case("roberta-headless", "bf16", ROBERTA),
    "roberta-lora-bias": Case("roberta", "fp32", {**ROBERTA, "lora_bias": True}),
    "roberta-lora-biases": Case("roberta-mlm", "bf16", {**ROBERTA, "bias": "lora_only"}),
    "roberta-words": Case("roberta", "fp16", {**ROBERTA, "target_modules": ["word_embeddings", "query"]}),
    "deberta": Case("deberta", "fp16", DEBERTA),
    "deberta-headless-bin": Case("deberta-headless", "bf16", {**DEBERTA, "lora_bias": True}, safe=False),
    "deberta-words": Case("deberta", "fp32", {**DEBERTA, "target_modules": ["word_embeddings", "key_proj"]}),
    "llama": Case("llama", "bf16", LLAMA),
    "llama-patterns": Case("llama", "fp16", {**LLAMA, **PATTERNS}),
    "llama-patterns-rslora-sharded": Case("llama-sharded", "bf16", {**LLAMA, **PATTERNS, "use_rslora": True}),
    "llama-wide-factors": Case("llama", "bf16", LLAMA, wide_factors=True),
    "llama-float32-bin": Case("llama", "fp32", {**LLAMA, "use_rslora": True}, safe=False),
    "llama-embedding": Case("llama", "bf16", {**LLAMA, "target_modules": ["embed_tokens", "lm_head", "up_proj"]}),
    "llama-saved-embeddings": Case(
        "llama-sharded", "fp16", {**LLAMA, "modules_to_save": ["embed_tokens", "lm_head"]}, wide_factors=True
    ),
    "llama-some-layers": Case("llama", "fp16", {**LLAMA, "layers_to_transform": [1], "lora_bias": False}),
}

PAIRS = {
    "gpt2": (
        Case("gpt2-hub", "bf16", {**GPT2, "use_rslora": True}),
        {**GPT2, "r": 2, "target_modules": ["c_proj", "wpe"], "lora_bias": False},
    ),
    "roberta": (Case("roberta", "fp16", ROBERTA), {**ROBERTA, "r": 7, "target_modules": ["query", "key"]}),
    "deberta": (
        Case("deberta", "fp32", DEBERTA),
        {**DEBERTA, "r": 2, "lora_alpha": 3, "target_modules": ["query_proj"]},
    ),
    "llama": (
        Case("llama-sharded", "bf16", {**LLAMA, **PATTERNS}),
        {**LLAMA, "r": 6, "use_rslora": True, "target_modules": ["q_proj", "k_proj", "embed_tokens"]},
    ),
}


def without_task(lora: Mapping[str, Any]) -> dict[str, Any]:
    """No head is saved then: two heads have no unmerged form in PEFT, which uses one of them."""
    return {key: value for key, value in lora.items() if key != "task_type"}


def without_words(lora: Mapping[str, Any]) -> dict[str, Any]:
    """No word embedding is adapted then, which PEFT saves whole besides."""
    return {**lora, "target_modules": [name for name in lora["target_modules"] if name != "embed_tokens"]}
