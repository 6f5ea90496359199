"""What is known of models beyond their tensors, and beyond ``loreg.layers``: weights used twice, and configs.

What is not known is not guessed: a merge into a weight
that the model also uses elsewhere gives no error, only wrong answers.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from loreg import layers
from loreg.adapters import ties
from loreg.adapters.renames import in_memory
from loreg.format.fingerprint import BaseTensor
from loreg.layers import Config, parts

# Classes without a head that is tied to the embedding of the inputs. GPT2LMHeadModel and MarianMTModel have one.
_HEADLESS = re.compile(
    r"\w+For((Sequence|Token|Image|Video|Audio|AudioFrame)Classification|QuestionAnswering|MultipleChoice|CTC|XVector|"
    r"SemanticSegmentation)|(?!\w*(Head|LM|MT))\w+Model"
)
# But these have a whole model with a head inside, or are such models (transformers 5.23).
_WITH_HEAD = frozenset({"BlipForQuestionAnswering", "Blip2Model", "EncoderDecoderModel", "RagModel"})
_WITH_HEAD |= {"SeamlessM4TModel", "SeamlessM4Tv2Model", "ShieldGemma2ForImageClassification"}
_WITH_HEAD |= {"SpeechEncoderDecoderModel", "VisionEncoderDecoderModel"}

# Sizes of vocabularies: of words, of entities, of units of speech.
_WORDS = re.compile(r"(?!type_)(\w+_)?vocab_size")

# What is no embedding of words and no head, though it may have as many rows: embeddings of positions and segments,
# and the layers of a stack, such as ``h.3.mlp.c_fc``.
_POSITIONS = re.compile(r"(?:.*\.)?(wpe|\w*positions?(al)?(_embed\w*)?|pos_embed\w*|token_type_embeddings)")
_LAYER = re.compile(r".+\.\d+\.(?!.*(emb|wte|word|head|shared|vocab|token)).+")

# Decoders whose head, where it is tied, is the embedding of the inputs; what these are called, and the heads that are
# not called lm_head (transformers 5.23, `_tied_weights_keys` of all its causal models). Encoders that are used as
# decoders have their words in ``embeddings.word_embeddings``, and heads of several layers.
_DECODERS = ("ForCausalLM", "LMHeadModel")
_MULTIMODAL = "ForConditionalGeneration"
_HEADS = {
    "biogpt": "output_projection.weight",
    "gpt_neox": "embed_out.weight",
    "gpt_neox_japanese": "embed_out.weight",
    "rwkv": "head.weight",
    "trocr": "output_projection.weight",
    "whisper": "proj_out.weight",
}
_HEAD = "lm_head.weight"

# What the ends of a tie are called, in all of them.
_TIED = re.compile(
    r"(?:.*\.)?(lm_head|lm_head\.decoder|cls\.predictions\.decoder|shared|embed_tokens|output_projection|proj_out|"
    r"embed_out|word_embeddings?)\.weight"
)

# A model of text within another, as the models have it that see or hear: what their embedding is called in memory.
# Their head is beside it, and transformers ties it by the config of the whole; of some it never does.
_WITHIN = re.compile(r"model\.((language|text)_model\.)?embed_tokens\.weight")
_NEVER_TIED = frozenset({"audioflamingo3", "cosmos3_edge", "glm_image", "inkling_mm_model", "inkling2", "molmo2"})
_NEVER_TIED |= {"muse_spark", "musicflamingo", "nemotron3_5_transcribe", "qwen2_audio", "vibevoice_asr", "voxtral"}
_ENCODERS = re.compile(r"(.+\.)?embeddings\.\w+\.weight")


def shares(config: Config, name: str, shape: tuple[int, ...], embedding: bool) -> bool:
    """Whether the weight ``name`` may be used in another place as well, as a tied head is, or T5's ``shared``.

    ``embedding``: an adapter says that it is one. Weights with a row for each word of the vocabulary are meant,
    embedding or head: without a word that it is not tied (``tie_word_embeddings`` false, or a class that has no
    such head), each is taken to be. Positions, and layers of a stack, are no words, however many rows they have.
    Of other weights those are meant that ``ties`` knows to be used so; a vector changes in both places at once.
    """
    if ties.stack_of(config, name) or (len(shape) > 1 and ties.has(config, name)):
        return True
    inner = list(parts(config))
    sizes = {size for part in inner for key, size in part.items() if _WORDS.fullmatch(key) and isinstance(size, int)}
    words = len(shape) == 2 and (shape[0] in sizes if sizes else embedding or "emb" in name.rpartition(".")[0])
    path = name.removesuffix(".weight")
    if not words or _POSITIONS.fullmatch(path) or _LAYER.fullmatch(path):
        return False
    if path.rpartition(".")[2] == "shared" or any(part.get("is_encoder_decoder") for part in inner):
        return True
    said = [part["tie_word_embeddings"] for part in inner if "tie_word_embeddings" in part]
    if said and not any(said):
        return False
    classes = ties.classes(config)
    return not (classes and all(_HEADLESS.fullmatch(kind) and kind not in _WITH_HEAD for kind in classes))


def words_of(config: Config, tensors: Collection[str]) -> tuple[str, str] | None:
    """(head, embedding) of a decoder, as tensors of the checkpoint; the head need not be stored.

    A decoder within a model that sees or hears is one too, if the model has the head.
    """
    classes = ties.classes(config)
    if ties.is_known(config):
        return None
    within = bool(classes) and all(kind.endswith(_MULTIMODAL) for kind in classes)
    if not classes or not (within or all(kind.endswith(_DECODERS) for kind in classes)):
        return None
    embeddings = [name for name in tensors if name.removesuffix(".weight").rpartition(".")[2] in layers.WORDS]
    if len(embeddings) != 1 or _ENCODERS.fullmatch(embeddings[0]):
        return None
    if any(part.get("is_encoder_decoder") for part in parts(config)):
        return None
    if within and not _WITHIN.fullmatch(in_memory(embeddings[0], config)):
        return None
    if head := _HEADS.get(str(config.get("model_type"))):
        return head, embeddings[0]
    # As transformers 4 wrote it, the head is in the model of text.
    owner, _, rest = embeddings[0].partition(".")
    old = f"{owner}.{_HEAD}"
    is_old = old in tensors or (rest.startswith("model.") and _HEAD not in tensors)
    return (old if is_old and in_memory(old, config) == _HEAD else _HEAD), embeddings[0]


def ties_of(config: Config, tensors: Mapping[str, BaseTensor]) -> list[ties.Pair]:
    """Every two names of the checkpoint that are one weight in the model, as far as is known: (name, the one that it
    is). The first need not be stored; the second is, and is none that is tied to another."""
    pair = tie_of(config, tensors)
    return [pair] if pair is not None else ties.pairs(config, tensors)


def tie_of(config: Config, tensors: Collection[str]) -> tuple[str, str] | None:
    """``words_of`` a model that is known to use one weight as head and as embedding."""
    words = words_of(config, tensors)
    said = config.get("tie_word_embeddings")
    if words is None or said is False or (said is None and words[0] in tensors):
        return None
    return None if config.get("model_type") in _NEVER_TIED else words


def may_be_tied(config: Config, name: str) -> bool:
    """Whether a weight that a checkpoint does not have may be one that it has by another name: a head, an embedding
    or a bias of one, of a model that is not known to tie nothing."""
    if ties.has(config, name):
        return True
    said = [part["tie_word_embeddings"] for part in parts(config) if "tie_word_embeddings" in part]
    return bool(_TIED.fullmatch(name)) and (not said or any(said))


def restated(config: Config, *, dtype: str | None, untied: bool, resized: Mapping[int, int]) -> dict[str, Any]:
    """A model's config as it has to be after a merge.

    ``dtype``: of the weights, as torch calls it. ``untied``: what was tied is stored twice now. (A config that cannot
    say so is left: transformers 5 sees that the two differ.) ``resized``: numbers of words before → after.
    """
    changed: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            # transformers 4 ties by the config of the model of text, 5 by that of the whole.
            said = untied and bool(value.get("tie_word_embeddings"))
            value = restated(value, dtype=dtype, untied=said, resized=resized)
        changed[key] = value
    if dtype is not None:
        changed.update({key: dtype for key in ("torch_dtype", "dtype") if key in changed})
    if changed.get("vocab_size") in resized:
        changed["vocab_size"] = resized[changed["vocab_size"]]
    if untied and not ties.forced(config):
        changed[ties.setting(config)] = False
    return changed
