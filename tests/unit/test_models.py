"""What is known of models by their config: words that are used twice, layers that store (in, out)."""

from __future__ import annotations

from typing import Any

import pytest

from loreg import layers
from loreg.adapters import models

GPT2 = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": 32, "n_positions": 32}
WAV2VEC2 = {"model_type": "wav2vec2", "architectures": ["Wav2Vec2ForPreTraining"], "vocab_size": 32}
NEOMME: dict[str, Any] = {"model_type": "neomme", "architectures": ["NeoMMEForMaskedLM"], "vocab_size": 64}
GEMMA3: dict[str, Any] = {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"]}
OLD, NEW = "language_model.model.embed_tokens.weight", "model.language_model.embed_tokens.weight"


@pytest.mark.parametrize(
    ("config", "name", "expected"),
    [
        (GPT2, "wte.weight", True),
        (GPT2, "transformer.wte.weight", True),
        (GPT2, "lm_head.weight", True),
        (GPT2, "some.custom_projection.weight", True),
        (GPT2, "transformer.wpe.weight", False),
        (GPT2, "model.embed_positions.weight", False),
        (GPT2, "bert.embeddings.position_embeddings.weight", False),
        (GPT2, "bert.embeddings.token_type_embeddings.weight", False),
        (GPT2, "bert.embeddings.word_embeddings.weight", True),
        (GPT2, "h.0.attn.c_proj.weight", False),
        (WAV2VEC2, "wav2vec2.encoder.layers.0.attention.out_proj.weight", False),
        # A number is no sign of a layer where what follows is called as words are, or nothing follows.
        (GPT2, "lm_heads.0.weight", True),
        (GPT2, "0.auto_model.embeddings.word_embeddings.weight", True),
        (GPT2, "model.0.shared.weight", True),
        (GPT2 | {"tie_word_embeddings": False}, "wte.weight", False),
        (GPT2 | {"architectures": ["Wav2Vec2ForCTC"]}, "lm_head.weight", False),
        # Other vocabularies than that of the words; and segments, which are none.
        (GPT2 | {"vocab_size": 9, "t2u_vocab_size": 32}, "t2u_model.lm_head.weight", True),
        (GPT2 | {"vocab_size": 9, "type_vocab_size": 32}, "cls.seq_relationship.weight", False),
        # Headless by their names.
        (GPT2 | {"architectures": ["GPT2Model"]}, "wte.weight", False),
        (GPT2 | {"architectures": ["Blip2Model"]}, "language_model.model.decoder.embed_tokens.weight", True),
        # Of no vocabulary.
        (NEOMME, "model.embed_tokens.embedding_projection.weight", True),
        (NEOMME, "model.layers.0.mlp.up_proj.weight", False),
        (NEOMME | {"tie_word_embeddings": False}, "unembedding_projection.weight", False),
        (GPT2 | {"architectures": ["DeformableDetrForObjectDetection"]}, "class_embed.weight", True),
    ],
)
def test_which_weights_may_be_words(config: dict[str, Any], name: str, expected: bool) -> None:
    assert models.shares(config, name, (32, 8), False) is expected


def test_names_that_a_tied_weight_may_have() -> None:
    for name in ("lm_head.weight", "model.decoder.embed_tokens.weight", "shared.weight"):
        assert models.may_be_tied(GPT2, name)
        assert not models.may_be_tied(GPT2 | {"tie_word_embeddings": False}, name)
    assert not models.may_be_tied(GPT2, "model.layers.7.self_attn.q_proj.weight")
    assert models.may_be_tied(NEOMME, "unembedding_projection.weight")


def test_a_weight_of_another_size_is_no_words() -> None:
    assert not models.shares(GPT2, "wte.weight", (31, 8), False)


@pytest.mark.parametrize("leaf", ["c_attn", "c_proj", "c_fc", "q_attn"])
def test_models_whose_layers_are_linear_under_the_names_of_conv1d(leaf: str) -> None:
    for kind in ("gpt_bigcode", "gpt_neo", "starcoder2"):
        assert not layers.may_store_in_out(leaf, {"model_type": kind})
    for config in ({}, {"model_type": "gpt2"}, {"model_type": "unheard_of"}, None):
        assert layers.may_store_in_out(leaf, config)
    both = {"model_type": "vision-encoder-decoder", "encoder": {"model_type": "starcoder2"}, "decoder": GPT2}
    assert layers.may_store_in_out(leaf, both)
    assert not layers.may_store_in_out("q_proj", {})


@pytest.mark.parametrize(
    ("stored", "head"),
    [
        ([OLD], "language_model.lm_head.weight"),
        ([NEW], "lm_head.weight"),
        ([OLD, "lm_head.weight"], "lm_head.weight"),
        ([OLD, "language_model.lm_head.weight"], "language_model.lm_head.weight"),
    ],
)
def test_the_head_of_a_model_of_text_within_another(stored: list[str], head: str) -> None:
    embedding = stored[0]
    assert models.words_of(GEMMA3, stored) == (head, embedding)
    assert models.tie_of(GEMMA3 | {"tie_word_embeddings": True}, stored) == (head, embedding)
    assert models.tie_of(GEMMA3 | {"tie_word_embeddings": False}, stored) is None
    assert models.tie_of(GEMMA3, stored) == (None if head in stored else (head, embedding))


@pytest.mark.parametrize(
    ("config", "embedding"),
    [
        (GEMMA3 | {"is_encoder_decoder": True}, OLD),
        (GEMMA3 | {"text_config": {"is_encoder_decoder": True}}, OLD),
        # The model of text has the head and ties it by its own config.
        ({"model_type": "blip-2", "architectures": ["Blip2ForConditionalGeneration"]}, OLD),
        ({"model_type": "clip", "architectures": ["CLIPModel"]}, "text_model.embeddings.token_embedding.weight"),
    ],
)
def test_other_heads_are_not_known(config: dict[str, Any], embedding: str) -> None:
    assert models.words_of(config, [embedding]) is None


def test_what_transformers_never_ties_is_not_tied() -> None:
    config = {"model_type": "qwen2_audio", "architectures": ["Qwen2AudioForConditionalGeneration"]}
    assert models.words_of(config, [OLD]) is not None
    assert models.tie_of(config | {"tie_word_embeddings": True}, [OLD]) is None


def test_untying_says_so_of_the_model_of_text_too() -> None:
    config = {"tie_word_embeddings": True, "text_config": {"tie_word_embeddings": True}, "vision_config": {}}
    changed = models.restated(config, dtype=None, untied=True, resized={})
    assert changed == {
        "tie_word_embeddings": False,
        "text_config": {"tie_word_embeddings": False},
        "vision_config": {},
    }
    assert models.restated(config, dtype=None, untied=False, resized={}) == config
