"""Which weights transformers' models use in more than one place, by class: a checkpoint stores each once.

Facts from the ``_tied_weights_keys`` of transformers 5.23 (``models/*/modeling_*.py``) and from what its loader makes
of them (``modeling_utils.py``, ``tie_weights``): of two weights that it would tie and that a checkpoint holds with
different values, it ties neither. Decoders whose one tie is that of head and embedding are in ``models``, and what is
in neither of the two is refused there by its size. ``tests/unit/test_ties.py`` walks the installed transformers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cache

from loreg.adapters.renames import in_memory
from loreg.errors import Unsupported
from loreg.format.fingerprint import BaseTensor
from loreg.layers import Config, parts

Pair = tuple[str, str]
"""(name, the name of the weight that it is)."""

_CLS = "cls.predictions.decoder.bias = cls.predictions.bias; cls.predictions.decoder.weight = "
_HEAD = "lm_head.decoder.bias = lm_head.bias; lm_head.decoder.weight = "
_WORDS = ".embeddings.word_embeddings.weight"
_ENCODER, _DECODER = "encoder.embed_tokens.weight = shared.weight", "decoder.embed_tokens.weight = shared.weight"
_BART = "model.encoder.embed_tokens.weight = model.shared.weight; "
_BART += "model.decoder.embed_tokens.weight = model.shared.weight; lm_head.weight = model.shared.weight"
_T5 = "T5{0} MT5{0} UMT5{0} LongT5{0} SwitchTransformers{0}"
_PATCH = "encoder.embed_patches.proj.weight = patch_embed.proj.weight; "
_PATCH += "encoder.embed_patches.proj.bias = patch_embed.proj.bias"
_BIASES = "{0}.relative_bias.biases.0.relative_attention_bias.weight = "
_BIASES += "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"

# Names of memory: each is the weight on its right. By class, as config.json's ``architectures`` has it.
_TABLE: tuple[tuple[str, str], ...] = (
    (
        "BertForPreTraining BertLMHeadModel BertForMaskedLM BigBirdForPreTraining BigBirdForMaskedLM "
        "BigBirdForCausalLM MegatronBertForPreTraining MegatronBertForCausalLM MegatronBertForMaskedLM",
        f"{_CLS}bert{_WORDS}",
    ),
    ("RoCBertForPreTraining RoCBertForMaskedLM RoCBertForCausalLM", f"{_CLS}roc_bert{_WORDS}"),
    ("DebertaForMaskedLM DebertaV2ForMaskedLM", f"{_CLS}deberta{_WORDS}"),
    ("ErnieForPreTraining ErnieForMaskedLM ErnieForCausalLM", f"{_CLS}ernie{_WORDS}"),
    ("FNetForPreTraining FNetForMaskedLM", f"{_CLS}fnet{_WORDS}"),
    ("MobileBertForPreTraining MobileBertForMaskedLM", f"{_CLS}mobilebert{_WORDS}"),
    ("RoFormerForMaskedLM RoFormerForCausalLM", f"{_CLS}roformer{_WORDS}"),
    ("VisualBertForPreTraining VisualBertForRegionToPhraseAlignment", f"{_CLS}visual_bert{_WORDS}"),
    ("YosoForMaskedLM", f"{_CLS}yoso{_WORDS}"),
    ("TapasForMaskedLM", f"{_CLS}tapas{_WORDS}"),
    ("NomicBertForMaskedLM", f"{_CLS}nomic_bert{_WORDS}"),
    ("SqueezeBertForMaskedLM", f"{_CLS}transformer{_WORDS}"),
    ("LayoutLMForMaskedLM", f"{_CLS}layoutlm{_WORDS}"),
    ("MraForMaskedLM", f"{_CLS}mra{_WORDS}"),
    ("NystromformerForMaskedLM", f"{_CLS}nystromformer{_WORDS}"),
    ("LxmertForPreTraining", f"cls.predictions.decoder.weight = lxmert{_WORDS}"),
    (
        "RobertaForCausalLM RobertaForMaskedLM CamembertForCausalLM CamembertForMaskedLM XLMRobertaForCausalLM "
        "XLMRobertaForMaskedLM XLMRobertaXLForCausalLM XLMRobertaXLForMaskedLM XmodForCausalLM XmodForMaskedLM "
        "JinaEmbeddingsV3ForMaskedLM",
        f"{_HEAD}roberta{_WORDS}",
    ),
    ("Data2VecTextForCausalLM Data2VecTextForMaskedLM", f"{_HEAD}data2vec_text{_WORDS}"),
    (
        "RobertaPreLayerNormForCausalLM RobertaPreLayerNormForMaskedLM",
        f"{_HEAD}roberta_prelayernorm{_WORDS}",
    ),
    ("BertGenerationDecoder", f"{_HEAD}bert{_WORDS}"),
    ("MPNetForMaskedLM", f"{_HEAD}mpnet{_WORDS}"),
    ("IBertForMaskedLM", f"{_HEAD}ibert{_WORDS}"),
    ("LongformerForMaskedLM", f"{_HEAD}longformer{_WORDS}"),
    ("GteForMaskedLM", f"lm_head.decoder.weight = gte{_WORDS}"),
    ("EsmForMaskedLM", f"lm_head.decoder.weight = esm{_WORDS}"),
    (
        "AlbertForPreTraining AlbertForMaskedLM",
        f"predictions.decoder.weight = albert{_WORDS}; predictions.decoder.bias = predictions.bias",
    ),
    ("ElectraForMaskedLM ElectraForCausalLM", f"generator_lm_head.weight = electra{_WORDS}"),
    ("ConvBertForMaskedLM", f"generator_lm_head.weight = convbert{_WORDS}"),
    ("DistilBertForMaskedLM", f"vocab_projector.weight = distilbert{_WORDS}"),
    ("FunnelForMaskedLM", f"lm_head.weight = funnel{_WORDS}"),
    ("GitForCausalLM", f"output.weight = git{_WORDS}"),
    ("ViltForMaskedLM", "mlm_score.decoder.weight = vilt.embeddings.text_embeddings.word_embeddings.weight"),
    ("BridgeTowerForMaskedLM", f"mlm_score.decoder.weight = bridgetower.text_model{_WORDS}"),
    ("ModernBertForMaskedLM ModernBertDecoderForCausalLM", "decoder.weight = model.embeddings.tok_embeddings.weight"),
    ("ModernVBertForMaskedLM", "lm_head.weight = model.text_model.embeddings.tok_embeddings.weight"),
    ("UltraVBertForMaskedLM", "lm_head.weight = model.text_model.embed_tokens.weight"),
    ("UltrabertForMaskedLM", "head.decoder.weight = model.embed_tokens.weight"),
    ("XLMWithLMHeadModel FlaubertWithLMHeadModel", "pred_layer.proj.weight = transformer.embeddings.weight"),
    ("XLNetLMHeadModel", "lm_loss.weight = transformer.word_embedding.weight"),
    ("CTRLLMHeadModel", "lm_head.weight = transformer.w.weight"),
    ("OpenAIGPTDoubleHeadsModel", "transformer.tokens_embed.weight = lm_head.weight"),
    ("BltForCausalLM", "model.local_encoder.embed_tokens.weight = lm_head.weight"),
    ("KyutaiSpeechToTextForConditionalGeneration", "lm_head.weight = model.embed_tokens.embed_tokens.weight"),
    (
        "NeoMMEForMaskedLM",
        "lm_head.weight = model.embed_tokens.word_embeddings.weight; "
        "unembedding_projection.weight = model.embed_tokens.embedding_projection.weight",
    ),
    (
        "LukeForMaskedLM",
        "entity_predictions.decoder.weight = luke.entity_embeddings.entity_embeddings.weight; "
        "lm_head.bias = lm_head.decoder.bias",
    ),
    (
        "FlavaForPreTraining",
        "mmm_text_head.bias = mmm_text_head.decoder.bias; mim_head.bias = mim_head.decoder.bias; "
        "mlm_head.bias = mlm_head.decoder.bias; mmm_image_head.bias = mmm_image_head.decoder.bias",
    ),
    ("GraniteSpeech5ForCTC", "ctc_head.weight = encoder.out.weight; ctc_head.bias = encoder.out.bias"),
    (
        "CsmForConditionalGeneration",
        "backbone_model.embed_tokens.embed_audio_tokens.weight = depth_decoder.model.embed_tokens.weight",
    ),
    (
        "SamModel SamHQModel",
        "prompt_encoder.shared_embedding.positional_embedding = shared_image_embedding.positional_embedding",
    ),
    (_T5.format("EncoderModel"), _ENCODER),
    (_T5.format("Model"), f"{_ENCODER}; {_DECODER}"),
    ("T5ForQuestionAnswering MT5ForQuestionAnswering UMT5ForQuestionAnswering", f"{_ENCODER}; {_DECODER}"),
    (_T5.format("ForConditionalGeneration"), f"{_ENCODER}; {_DECODER}; lm_head.weight = shared.weight"),
    (
        "BartModel PegasusModel MBartModel M2M100Model PegasusXModel MvpModel BigBirdPegasusModel BlenderbotModel "
        "NllbMoeModel PLBartModel BlenderbotSmallModel LEDModel Pop2PianoForConditionalGeneration",
        f"{_ENCODER}; {_DECODER}",
    ),
    (
        "PegasusForConditionalGeneration BartForConditionalGeneration MBartForConditionalGeneration "
        "M2M100ForConditionalGeneration PegasusXForConditionalGeneration MvpForConditionalGeneration "
        "BigBirdPegasusForConditionalGeneration BlenderbotForConditionalGeneration "
        "NllbMoeForConditionalGeneration PLBartForConditionalGeneration "
        "BlenderbotSmallForConditionalGeneration",
        _BART,
    ),
    ("LEDForConditionalGeneration", _BART.replace("model.", "led.")),
    ("UdopModel", f"{_ENCODER}; {_DECODER}; {_PATCH}"),
    ("UdopEncoderModel", f"{_ENCODER}; {_PATCH}; {_BIASES.format('encoder')}"),
    (
        "UdopForConditionalGeneration",
        f"{_ENCODER}; {_DECODER}; {_PATCH}; {_BIASES.format('encoder')}; {_BIASES.format('decoder')}; "
        "lm_head.weight = shared.weight",
    ),
)

# ``model_type``s whose config cannot say that nothing is tied: it is, whatever the config says, or the models scale
# what the head reads where ``tie_word_embeddings`` is true, as T5 does.
ALWAYS = frozenset({"t5", "mt5", "umt5", "longt5", "pop2piano", "switch_transformers", "udop", "vilt"})
# What CSM ties by.
_CODEBOOKS = "tie_codebooks_embeddings"

# Stacks of layers that are one, and heads that are a layer of the decoder: which of them are one depends on the
# config, and what an adapter has trained in one is trained for all, or for one alone. By ``model_type``; a whole
# part of a name.
_HEADS_OF_LAYERS = "class_embed bbox_embed bbox_predictor enc_score_head enc_bbox_head"
_STACKS: tuple[tuple[str, str], ...] = (
    ("zamba", "layers.#.shared_transf"),
    ("zamba2", "layers.#.shared_transformer"),
    ("deformable_detr rt_detr_v2 d_fine deimv2 dab-detr pp_doclayout_v3 grounding-dino", _HEADS_OF_LAYERS),
    ("mm-grounding-dino", _HEADS_OF_LAYERS),
    ("bark fine_acoustics", "lm_heads.# input_embeds_layers.#"),
    ("idefics", "additional_fc additional_embedding"),
    ("pe_audio_video", "text_model audio_encoder video_encoder"),
    ("diffusion_gemma", "encoder.language_model decoder.layers decoder.norm decoder.embed_tokens"),
)


def classes(config: Config) -> list[str]:
    return [str(kind) for kind in config.get("architectures") or ()]


def of_class(name: str) -> tuple[Pair, ...]:
    """The ties of a class of transformers, in names of memory; empty for one that is not known."""
    return _by_class().get(name, ())


def is_known(config: Config) -> bool:
    """Whether the one class that ``architectures`` names is one whose ties are all known."""
    kinds = classes(config)
    return len(kinds) == 1 and bool(of_class(kinds[0]))


def pairs(config: Config, tensors: Mapping[str, BaseTensor]) -> list[Pair]:
    """The ties of a known class, in names of the checkpoint; the first of each pair need not be stored. Those that
    the config does not want are left out."""
    if not is_known(config) or not _wants(config):
        return []
    stored = {in_memory(name, config): name for name in tensors}
    found = []
    for one, others in _groups(of_class(classes(config)[0])):
        # A checkpoint of the model without its head has the name without the model's.
        places = {one: stored.get(one) or stored.get(one.partition(".")[2])}
        places |= {name: stored.get(name) for name in others}
        held = [place for place in places.values() if place is not None]
        found += [(place or name, held[0]) for name, place in places.items() if held and place != held[0]]
    return found


def has(config: Config, name: str) -> bool:
    """Whether ``name``, a tensor of the checkpoint, is one of a known class that is tied, or is tied to."""
    if not is_known(config) or not _wants(config):
        return False
    called = in_memory(name, config)
    sides = {side for pair in of_class(classes(config)[0]) for side in pair}
    return called in sides or any(side.partition(".")[2] == called for side in sides)


def forced(config: Config) -> bool:
    """Whether the config of the model cannot say that its weights are not tied."""
    return config.get("model_type") in ALWAYS


def setting(config: Config) -> str:
    """The key of config.json by which the model ties its weights."""
    return _CODEBOOKS if config.get("model_type") == "csm" else "tie_word_embeddings"


def check_stacks(config: Config, names: Mapping[str, str]) -> None:
    """Raises Unsupported for a weight of a stack that the model may use several times.

    ``names``: what the adapter calls it → the name in the checkpoint, or the same where it has none.
    """
    for wanted, name in names.items():
        if part := stack_of(config, name) or stack_of(config, wanted):
            raise Unsupported(
                f"{wanted!r} is in a part of the model ({part}) that is tied to others, so that a checkpoint stores "
                "it once for all of them, and what an adapter does to one of them has no form here: adapt other "
                "layers, or untie the base before training (tie_word_embeddings false, each stored on its own)."
            )


def stack_of(config: Config, name: str) -> str | None:
    """The part of the model that ``name``, a tensor, is in, if it may be used several times."""
    kinds = {str(part.get("model_type")) for part in parts(config)}
    if config.get("tie_word_embeddings") is False:
        return None
    for types, patterns in _STACKS:
        if kinds.isdisjoint(types.split()):
            continue
        for pattern in patterns.split():
            found = re.search(rf"(?<![^.]){re.escape(pattern).replace(chr(92) + '#', r'[0-9]+')}(?![^.])", name)
            if found:
                return found[0]
    return None


def _wants(config: Config) -> bool:
    if config.get("legacy") is False and any(kind.startswith("Deberta") for kind in classes(config)):
        return False  # the head of that one has another name, and is not tied
    return forced(config) or config.get(setting(config)) is not False


def _groups(ties: tuple[Pair, ...]) -> Iterator[tuple[str, list[str]]]:
    """Each weight with all other names of it."""
    found: dict[str, list[str]] = {}
    for name, one in ties:
        found.setdefault(one, []).append(name)
    yield from found.items()


@cache
def _by_class() -> dict[str, tuple[Pair, ...]]:
    found: dict[str, tuple[Pair, ...]] = {}
    for names, ties in _TABLE:
        sides = [tie.split(" = ") for tie in ties.split("; ")]
        found.update(dict.fromkeys(names.split(), tuple((name, one) for name, one in sides)))
    return found
