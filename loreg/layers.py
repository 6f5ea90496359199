"""What layers are by their names, in transformers' models: those that store (in, out), and those that look rows up.

Facts that several floors need. What binding an adapter takes beyond them is in ``adapters/models.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

Config = Mapping[str, Any]

# transformers' Conv1D layers, which store (in, out): model type → last part of the module path. Needed for square
# weights, such as GPT-2's attn.c_proj, where the shape cannot tell.
_CONV1D_NAMES = frozenset({"c_attn", "c_proj", "c_fc", "q_attn"})
_CONV1D_MODELS = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp"})
# Models that have linear layers of these names. Qwen's first is not in transformers, but comes with its checkpoint.
_LINEAR_MODELS = frozenset({"gpt_bigcode", "gpt_neo", "starcoder2", "qwen"})

WORDS = frozenset({"embed_tokens", "wte", "word_embeddings", "embed_in", "embeddings", "tokens_embed"})
"""Embeddings of the words that a decoder reads."""

LOOKUPS = WORDS | frozenset(
    {"tok_embeddings", "shared", "wpe", "position_embeddings", "embed_positions", "token_type_embeddings"}
)
"""Every layer that looks rows up: PEFT's factors of such are named, and laid out, in a way of their own."""


def parts(config: Config) -> Iterator[Config]:
    """The config and those of the models inside it (``text_config``, ``decoder``, …)."""
    yield config
    for value in config.values():
        if isinstance(value, Mapping):
            yield from parts(value)


def may_store_in_out(leaf: str, config: Config | None = None) -> bool:
    """Whether a layer of this name is a Conv1D in some model, and not known to be linear in the one of ``config``."""
    kinds = {part.get("model_type") for part in parts(config or {})}
    return leaf in _CONV1D_NAMES and (kinds.isdisjoint(_LINEAR_MODELS) or not kinds.isdisjoint(_CONV1D_MODELS))


def stores_in_out(config: Config, leaf: str) -> bool:
    """Whether a layer of this name is known to be a Conv1D in this model, or in a part of it."""
    return leaf in _CONV1D_NAMES and any(part.get("model_type") in _CONV1D_MODELS for part in parts(config))
