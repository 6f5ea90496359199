"""What is known of models beyond their tensors: the layers that store (in, out), and weights used twice.

All that loreg knows about architectures by name is here. What is not known is not guessed: a merge into a weight
that the model also uses elsewhere gives no error, only wrong answers.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

# transformers' Conv1D layers, which store (in, out): model type → last part of the module path. Needed for square
# weights, such as GPT-2's attn.c_proj, where the shape cannot tell.
_CONV1D_NAMES = frozenset({"c_attn", "c_proj", "c_fc", "q_attn"})
_CONV1D_MODELS = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp"})

# Classes without a head that is tied to the embedding of the inputs. GPT2LMHeadModel and MarianMTModel have one.
_HEADLESS = re.compile(
    r"\w+For(SequenceClassification|TokenClassification|QuestionAnswering|MultipleChoice)|(?!\w*(Head|LM|MT))\w+Model"
)

# Decoders whose head, where it is tied, is the embedding of the inputs; what these are called, and the heads that are
# not called lm_head (transformers 5.23, `_tied_weights_keys` of all its causal models). Encoders that are used as
# decoders have their words in ``embeddings.word_embeddings``, and heads of several layers.
_DECODERS = ("ForCausalLM", "LMHeadModel")
_HEADS = {
    "biogpt": "output_projection.weight",
    "gpt_neox": "embed_out.weight",
    "gpt_neox_japanese": "embed_out.weight",
    "rwkv": "head.weight",
    "trocr": "output_projection.weight",
    "whisper": "proj_out.weight",
}
_HEAD = "lm_head.weight"
_EMBEDDINGS = frozenset({"embed_tokens", "wte", "word_embeddings", "embed_in", "embeddings", "tokens_embed"})
_ENCODERS = re.compile(r"(.+\.)?embeddings\.\w+\.weight")

Config = Mapping[str, Any]


def may_store_in_out(leaf: str) -> bool:
    """Whether a layer of this name is a Conv1D in some model."""
    return leaf in _CONV1D_NAMES


def stores_in_out(config: Config, leaf: str) -> bool:
    """Whether a layer of this name is known to be a Conv1D in this model, or in a part of it."""
    return leaf in _CONV1D_NAMES and any(part.get("model_type") in _CONV1D_MODELS for part in _parts(config))


def shares(config: Config, name: str, shape: tuple[int, ...], embedding: bool) -> bool:
    """Whether the weight ``name`` may be used in another place as well, as a tied head is, or T5's ``shared``.

    ``embedding``: an adapter says that it is one. Weights with a row for each word of the vocabulary are meant,
    embedding or head: without a word that it is not tied (``tie_word_embeddings`` false, or a class that has no
    such head), each is taken to be.
    """
    parts = list(_parts(config))
    sizes = {part["vocab_size"] for part in parts if isinstance(part.get("vocab_size"), int)}
    words = len(shape) == 2 and (shape[0] in sizes if sizes else embedding or "emb" in name.rpartition(".")[0])
    if not words:
        return False
    if name.removesuffix(".weight").rpartition(".")[2] == "shared":
        return True
    if any(part.get("is_encoder_decoder") for part in parts):
        return True
    ties = [part["tie_word_embeddings"] for part in parts if "tie_word_embeddings" in part]
    if ties and not any(ties):
        return False
    classes = config.get("architectures") or ()
    return not (classes and all(_HEADLESS.fullmatch(str(kind)) for kind in classes))


def words_of(config: Config, tensors: Collection[str]) -> tuple[str, str] | None:
    """(head, embedding) of a decoder, as tensors of the checkpoint; the head need not be stored."""
    classes = [str(kind) for kind in config.get("architectures") or ()]
    if not classes or not all(kind.endswith(_DECODERS) for kind in classes):
        return None
    embeddings = [name for name in tensors if name.removesuffix(".weight").rpartition(".")[2] in _EMBEDDINGS]
    if len(embeddings) != 1 or _ENCODERS.fullmatch(embeddings[0]):
        return None
    if any(part.get("is_encoder_decoder") for part in _parts(config)):
        return None
    return _HEADS.get(str(config.get("model_type")), _HEAD), embeddings[0]


def tie_of(config: Config, tensors: Collection[str]) -> tuple[str, str] | None:
    """``words_of`` a model that is known to use one weight as head and as embedding."""
    words = words_of(config, tensors)
    said = config.get("tie_word_embeddings")
    if words is None or said is False or (said is None and words[0] in tensors):
        return None
    return words


def restated(config: Config, *, dtype: str | None, untied: bool, resized: Mapping[int, int]) -> dict[str, Any]:
    """A model's config as it has to be after a merge.

    ``dtype``: of the weights, as torch calls it. ``untied``: head and embedding are two tensors now. ``resized``:
    numbers of words before → after.
    """
    changed: dict[str, Any] = {
        key: restated(value, dtype=dtype, untied=False, resized=resized) if isinstance(value, Mapping) else value
        for key, value in config.items()
    }
    if dtype is not None:
        changed.update({key: dtype for key in ("torch_dtype", "dtype") if key in changed})
    if changed.get("vocab_size") in resized:
        changed["vocab_size"] = resized[changed["vocab_size"]]
    if untied:
        changed["tie_word_embeddings"] = False
    return changed


def _parts(config: Config) -> Iterator[Config]:
    """The config and those of the models inside it (``text_config``, ``decoder``, …)."""
    yield config
    for value in config.values():
        if isinstance(value, Mapping):
            yield from _parts(value)
