"""What transformers calls a tensor in memory, where its checkpoints call it otherwise.

transformers 5 renames modules when it loads a model, and back when it saves one (``conversion_mapping.py``, 5.23), so
that an adapter names a module as neither the checkpoint nor an adapter of transformers 4 does. Here are the models
whose tensors it renames and leaves whole; what it stacks is in ``fusions``, and a model that is not here is refused
under the first name that is not found.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import cache

from loreg.adapters import names
from loreg.errors import BadInput
from loreg.layers import Config

Rule = tuple[re.Pattern[str], str, re.Pattern[str] | None]
"""A pattern, what is put in its place, and names that the rule is not for."""

# Models inside others whose rules with ^ are for the beginning of their own names: the field of the config that holds
# theirs, and what they are called. Others are where the rules of the whole have them.
_PLACES = {
    "vlm_config": ("vlm",),
    "codec_config": ("codec_model",),
    "backbone_config": ("backbone.conv_encoder.model", "backbone", "pixel_level_module.encoder"),
}
# What a model inside another has no part of, by the field of the config that holds it: ViT's rules are not BERT's.
_BESIDE = {
    "vision_config": re.compile(r"(?:^|\.)(?:text_model|language_model)\."),
    "backbone_config": re.compile(r"(?:^|\.)(?:text_backbone|language_model)\."),
    "encoder": re.compile(r"^decoder\."),
    "decoder": re.compile(r"^encoder\."),
}
# A class that is a model without a head, and not in another: nothing that it holds is in a "model" or in a tower.
_HEADLESS = re.compile(r"(?!\w*(LMHead|DoubleHeads))\w+Model")

# From the words of a checkpoint to those of memory, one after the other, each at its first place. Words are whole
# parts of a name: # is a number, and the same one on the right; ^ the beginning of the name, + any place but that,
# "a! b" a b that does not follow a, "a !b,c" an a that neither b nor c follows; nothing on the right leaves it out.
_ATTENTION = "attention.query > q_proj; attention.key > k_proj; attention.value > v_proj"
_DENSE = "attention.output.dense > attention.o_proj; intermediate.dense > mlp.fc1; output.dense > mlp.fc2"
_SELF = "attention.self.query > attention.q_proj; attention.self.key > attention.k_proj"
_SELF += "; attention.self.value > attention.v_proj"
_TWICE = "attention.attention.query > attention.q_proj; attention.attention.key > attention.k_proj"
_TWICE += "; attention.attention.value > attention.v_proj"
# transformers 5 writes the decoder of a ViTMAE so.
_VIT = f"encoder.layer > layers; decoder_encoder.layer > decoder_layers; {_ATTENTION}; {_DENSE}"
_DINO2 = f"{_TWICE}; attention.output.dense > attention.o_proj; mlp.weights_out > mlp.down_proj"
_FEED = "layers.#.fc1 > layers.#.mlp.fc1; layers.#.fc2 > layers.#.mlp.fc2"
_AIFI = "encoder.encoder.#.layers > encoder.aifi.#.layers"
_MIXTRAL = "block_sparse_moe > mlp"
_FORGET = "; ".join(
    f"self_attn.{name} > self_attn.forget_gate.{name}" for name in ("f_a_proj", "f_b_proj", "dt_bias", "A_log")
)
_GRANITE = "block_sparse_moe.input_linear.weight > block_sparse_moe.experts.gate_up_proj; "
_GRANITE += "block_sparse_moe.output_linear.weight > block_sparse_moe.experts.down_proj; "
_GRANITE += "block_sparse_moe.router.layer > block_sparse_moe.router"


def _inside(text: str, *others: str) -> str:
    """A model with a head, which had a model with a head inside; now the head is its own, and all else is in it."""
    rules = [f"^{text}.lm_head > lm_head", f"^{text}.model > model.{text}", f"^{text} > model.{text}"]
    # As transformers 4.51 wrote it when it saved what an older one had written.
    rules.append(f"^model.{text}.model > model.{text}")
    return "; ".join([*rules, *(f"^{other} > model.{other}" for other in others)])


_LLAVA = _inside("language_model", "vision_tower", "multi_modal_projector", "image_newline")
_AUDIO = _inside("language_model", "audio_tower", "multi_modal_projector")
_THINKER = "^thinker >; ^audio_tower > model.audio_tower; ^visual > model.visual; "
_THINKER += "^model !language_model,visual,audio_tower > model.language_model"
_DETR = f"backbone.conv_encoder > backbone; out_proj > o_proj; {_FEED}"

_FPN = "^fpn1.0 > fpn.fpn1.conv_transpose1; ^fpn1.1 > fpn.fpn1.normalization; ^fpn1.3 > fpn.fpn1.conv_transpose2; "
_FPN += "^fpn2.0 > fpn.fpn2"
_BEIT = f"{_FPN}; {_VIT}; encoder.relative_position_bias > shared_position_bias; "
_BEIT += "attention.attention.relative_position_bias > relative_position_bias; "
_BEIT += "decode_head.bottleneck > decode_head.psp_bottleneck; "
_BEIT += "decode_head.psp_modules.#.1 > decode_head.psp_modules.blocks.#.conv; bn > normalization; "
_BEIT += "conv.weight > convolution.weight"

_SEGFORMER = "encoder.patch_embeddings.# > stages.#.patch_embeddings; encoder.block.# > stages.#.blocks; "
_SEGFORMER += f"encoder.layer_norm.# > stages.#.layer_norm; {_SELF}; "
_SEGFORMER += "attention.self.sr > attention.sequence_reduction.sequence_reduction; "
_SEGFORMER += "attention.self.layer_norm > attention.sequence_reduction.layer_norm; "
_SEGFORMER += "attention.output.dense > attention.o_proj; mlp.dense1 > mlp.fc1; mlp.dense2 > mlp.fc2; "
_SEGFORMER += "layer_norm_1 > layernorm_before; layer_norm_2 > layernorm_after; "
_SEGFORMER += "decode_head.linear_c > decode_head.linear_projections"

_CONDITIONAL = f"backbone.conv_encoder > backbone; out_proj > o_proj; {_FEED}; " + "; ".join(
    f"layers.#.{old}_{what} > layers.#.{new}.{what.replace('content', '_content').replace('pos', '_pos')}"
    for old, new in (("sa", "self_attn"), ("ca", "encoder_attn"))
    for what in ("qcontent_proj", "qpos_proj", "kcontent_proj", "kpos_proj", "v_proj", "qpos_sine_proj")
)
_MASKS = "; ".join(f"bbox_attention.{part}_linear > bbox_attention.{part}_proj" for part in "qk") + "; "
_MASKS += "; ".join(
    f"mask_head.lay{at} > mask_head.{to}.conv; mask_head.gn{at} > mask_head.{to}.norm"
    for at, to in enumerate(("conv1", "conv2", *(f"fpn_stages.{stage}.refine" for stage in range(3))), 1)
)
_MASKS += "; " + "; ".join(f"mask_head.adapter{at + 1} > mask_head.fpn_stages.{at}.fpn_adapter" for at in range(3))
_MASKS += "; mask_head.out_lay > mask_head.output_conv"

_EMBEDDER = "; ".join(
    f"vision_embedder.{name} > embed_vision.{name}"
    for name in ("patch_ln1", "patch_dense", "patch_ln2", "pos_embedding", "pos_norm")
)
_EMBEDDER += "; embed_vision.embedding_projection > embed_vision.multimodal_embedder.embedding_projection"

_HUNYUAN = "mlp.dense_h_to_4h > mlp.fc1; mlp.dense_4h_to_h > mlp.fc2; vit.layers.#.input_layernorm > "
_HUNYUAN += "vit.layers.#.layer_norm1; vit.layers.#.post_attention_layernorm > vit.layers.#.layer_norm2; "
_HUNYUAN += "perceive.proj.0 > perceive.proj_conv; perceive.proj.2 > perceive.proj_out; perceive > patch_merger; "
_HUNYUAN += "^model !language_model,vit,vision_tower > model.language_model; ^model.vit > model.vision_tower; "
_HUNYUAN += "^vit > model.vision_tower"

_MIMI = "^encoder.layers > encoder.encoder.layers; ^encoder.encoder.layers > encoder.encoder_seanet.layers; "
_MIMI += "^decoder.layers > decoder.decoder.layers; ^decoder.decoder.layers > decoder.decoder_seanet.layers; "
_MIMI += "^encoder_transformer > encoder.encoder_transformer; ^downsample > encoder.downsample; "
_MIMI += "^decoder_transformer > decoder.decoder_transformer; ^upsample > decoder.upsample"

_PI0 = "^model.paligemma_with_expert > paligemma_with_expert; paligemma_with_expert.paligemma.model > model.vlm; "
_PI0 += "paligemma_with_expert.gemma_expert.model > model.dit; "
_PI0 += "paligemma_with_expert.gemma_expert.lm_head > model.dit.embed_tokens; "
_PI0 += "paligemma_with_expert.paligemma.lm_head > model.vlm.language_model.embed_tokens; "
_PI0 += "; ".join(
    f"embed_action_time! {name} > embed_action_time.{name}"
    for name in ("state_proj", "action_in_proj", "action_time_mlp_in", "action_time_mlp_out")
)

_COHERE = (
    "encoder.pre_encode.conv > encoder.subsampling.layers; encoder.pre_encode.out > encoder.subsampling.linear; "
)
_COHERE += "transf_decoder._embedding.position_embedding.pos_enc > decoder.pos_emb.weight; "
_COHERE += "transf_decoder._embedding.token_embedding > decoder.embed_tokens; "
_COHERE += "transf_decoder._embedding.layer_norm > decoder.embedding_layernorm; "
_COHERE += (
    "transf_decoder._decoder.final_layer_norm > decoder.norm; transf_decoder._decoder.layers > decoder.layers; "
)
_COHERE += "encoder_decoder_proj > decoder.proj; "
_COHERE += "; ".join(
    f"{old}.{name} > {new}.{called}"
    for old, new, words in (
        ("self_attn", "self_attn", "linear_q:q_proj linear_k:k_proj linear_v:v_proj linear_out:o_proj"),
        ("self_attn", "self_attn", "linear_pos:relative_k_proj pos_bias_u:bias_u pos_bias_v:bias_v"),
        ("first_sub_layer", "self_attn", "query_net:q_proj key_net:k_proj value_net:v_proj out_projection:o_proj"),
        (
            "second_sub_layer",
            "encoder_attn",
            "query_net:q_proj key_net:k_proj value_net:v_proj out_projection:o_proj",
        ),
    )
    for name, called in (word.split(":") for word in words.split())
)
_COHERE += "; third_sub_layer.dense_in > mlp.fc1; third_sub_layer.dense_out > mlp.fc2; "
_COHERE += "layer_norm_1 > input_layernorm; layer_norm_2 > post_attention_layernorm; "
_COHERE += "layer_norm_3 > final_layernorm; conv.batch_norm > conv.norm; log_softmax.mlp.layer0 > proj_out"

# What is joined in their checkpoints, q_proj to v_proj and for some the gate, is found under no name of memory.
_BERT = "encoder.layers > layers; emb_ln > embeddings.LayerNorm; norm1 > post_attention_layernorm; "
_BERT += "norm2 > post_mlp_layernorm"
_GTE = "encoder.layer > layers; attention.o_proj > self_attn.o_proj; attn_ln > post_attention_layernorm; "
_GTE += "mlp_ln > post_mlp_layernorm; lm_head.norm > lm_head.layer_norm; ^new >"

_TABLE: tuple[tuple[str, str], ...] = (
    ("pi0", _PI0),
    (
        "shieldgemma2",
        "^model !model,lm_head > model.model; ^model.model.language_model.model > model.model.language_model",
    ),
    ("cohere_asr", _COHERE),
    ("nomic_bert", f"{_BERT}; attn.out_proj > self_attn.o_proj; fc11 > up_proj; fc12 > gate_proj; fc2 > down_proj"),
    ("jina_embeddings_v3", f"{_BERT}; mixer.out_proj > self_attn.o_proj"),
    ("gte", _GTE),
    ("vit deit ijepa vit_mae vit_msn vivit audio-spectrogram-transformer", _VIT),
    ("beit", _BEIT),
    ("pixio", f"{_VIT}; norm1 > layernorm_before; norm2 > layernorm_after; ^encoder > pixio"),
    ("dinov2 dinov2_with_registers", _DINO2),
    ("dinov3_vit", "model! layer > model.layer"),
    ("dinov3_convnext", "model! stages > model.stages"),
    ("videomae", "attention.attention.q_bias > attention.attention.query.bias"),
    ("videomae", "attention.attention.v_bias > attention.attention.value.bias"),
    ("swin", f"{_SELF}; {_DENSE}"),
    ("swin_backbone", "^embeddings > swin.embeddings; ^encoder > swin.encoder"),
    ("beit_backbone", "^embeddings > beit.embeddings; ^layers > beit.layers"),
    (
        "swin",
        "attention.self.relative_position_bias_table > attention.relative_position_bias.relative_position_bias_table",
    ),
    ("segformer", _SEGFORMER),
    ("yolos", "encoder.mid_position_embeddings > encoder.interpolation.mid_position_embeddings"),
    ("lw_detr", f"{_TWICE}; attention.output > attention.o_proj"),
    ("detr", f"{_DETR}; {_MASKS}"),
    ("conditional_detr", f"{_CONDITIONAL}; {_MASKS}"),
    ("deformable_detr", f"backbone.conv_encoder > backbone; self_attn.out_proj > self_attn.o_proj; {_FEED}"),
    ("rt_detr rt_detr_v2 pp_doclayout_v2 pp_doclayout_v3", f"out_proj > o_proj; {_FEED}; {_AIFI}"),
    ("d_fine", f"out_proj > o_proj; {_FEED.replace('mlp.fc1', 'mlp.layers.0').replace('mlp.fc2', 'mlp.layers.1')}"),
    ("d_fine", _AIFI),
    ("maskformer", _FEED),
    ("altclip", "layer > layers"),
    # One tower alone is called so at the beginning of a name, and keeps it there where it is one of two.
    (
        "clip_vision_model altclip_vision_model chinese_clip_vision_model clipseg_vision_model "
        "metaclip_2_vision_model mlcd mlcd_vision_model siglip_vision_model siglip2_vision_model xclip_vision_model",
        "+vision_model >",
    ),
    (
        "clip_text_model clipseg_text_model metaclip_2_text_model siglip_text_model siglip2_text_model "
        "xclip_text_model",
        "+text_model >",
    ),
    ("t5gemma2", "encoder.embed_tokens > encoder.text_model.embed_tokens; encoder.norm > encoder.text_model.norm"),
    ("t5gemma2", "vision_tower! encoder.layers > encoder.text_model.layers"),
    ("llava aria paligemma aya_vision got_ocr2 gemma3 internvl vipllava mistral3 pp_chart2table", _LLAVA),
    ("llava_next llava_next_video llava_onevision", _LLAVA),
    ("video_llava", _inside("language_model", "image_tower", "video_tower", "multi_modal_projector")),
    ("fuyu", _inside("language_model", "vision_embed_tokens")),
    ("mllama", _inside("language_model", "vision_model", "multi_modal_projector")),
    ("qwen2_audio voxtral voxtral_realtime audioflamingo3 musicflamingo glmasr", _AUDIO),
    ("granite_speech granite_speech_plus", _inside("language_model", "encoder", "projector")),
    (
        "vibevoice_asr",
        _inside(
            "language_model", "acoustic_tokenizer_encoder", "semantic_tokenizer_encoder", "multi_modal_projector"
        ),
    ),
    ("emu3", _inside("text_model", "vqmodel")),
    ("qwen2_vl qwen2_5_vl", "^visual > model.visual; ^model !language_model,visual > model.language_model"),
    ("qwen2_5_omni qwen2_5_omni_thinker qwen3_omni_moe qwen3_omni_moe_thinker", _THINKER),
    ("colqwen2", "^vlm.model > vlm"),
    ("paddleocr_vl", "^mlp_AR > model.projector; ^visual > model.visual"),
    ("paddleocr_vl", "^model !visual,projector,language_model > model.language_model"),
    ("mixtral minimax minimax_m2", _MIXTRAL),
    ("kimi_linear", f"{_FORGET}; {_MIXTRAL}"),
    ("phimoe", f"{_MIXTRAL}; gate.weight > router.weight"),
    ("granitemoe granitemoeshared granitemoehybrid", _GRANITE),
    ("aria_text", "mlp.experts.fc1.weight > mlp.experts.gate_up_proj"),
    ("aria_text", "mlp.experts.fc2.weight > mlp.experts.down_proj"),
    ("hy_v3", "mlp.router.gate.weight > mlp.gate.weight; mlp.shared_mlp > mlp.shared_experts"),
    ("hy_v3", "mlp.expert_bias > mlp.e_score_correction_bias"),
    ("laguna", "mlp.experts.e_score_correction_bias > mlp.gate.e_score_correction_bias"),
    ("laguna", "mlp.shared_expert > mlp.shared_experts"),
    ("gpt_neox", "^embed_out > lm_head"),
    ("nemotron_h", "backbone > model"),
    ("ernie4_5_moe", "mlp.moe_statics > mlp.gate.moe_statics"),
    ("exaone_moe", "mlp.e_score_correction_bias > mlp.gate.e_score_correction_bias"),
    ("mimo_v2_flash", "self_attn.attention_sink_bias > self_attn.sinks"),
    ("flint", "self_attn.softmax_offset > self_attn.sinks"),
    ("lfm3", "self_attn.gate_proj > self_attn.g_proj"),
    ("gemma4_unified", _EMBEDDER),
    ("hunyuan_vl", _HUNYUAN),
    ("mimi", _MIMI),
    ("olmo_hybrid", "attention_layer_norm > input_layernorm; feedforward_layer_norm > post_attention_layernorm"),
    ("timesfm2_5", "ff0 > fc1; ff1 > fc2"),
)
"""``model_type``s, of the whole or of a model inside it, and what is renamed in all of them."""

# Of whichever model: checkpoints that were converted from TensorFlow, and weight_norm before torch had
# parametrizations.
_OLD = "LayerNorm.gamma > LayerNorm.weight; LayerNorm.beta > LayerNorm.bias; "
_OLD += "weight_g > parametrizations.weight.original0; weight_v > parametrizations.weight.original1"

KNOWN = frozenset(kind for kinds, _ in _TABLE for kind in kinds.split())


def in_memory(name: str, config: Config) -> str:
    """What transformers 5 calls the tensor ``name`` of a checkpoint with this ``config.json``."""
    return _renamed(name, _rules_of(config))


def all_in_memory(names: Iterable[str], config: Config) -> dict[str, str]:
    """``in_memory`` of all tensors of a checkpoint: of two that would be called alike, each keeps its own name."""
    rules = _rules_of(config)
    live = {name: _renamed(name, rules) for name in names}
    count = Counter(live.values())
    return {name: called if count[called] == 1 else name for name, called in live.items()}


class Known:
    """The tensors of a checkpoint, by the names that they have in it and in memory."""

    def __init__(self, tensors: Collection[str], config: Config) -> None:
        self._tensors, self._rules = tensors, _rules_of(config)
        self.memory: dict[str, list[str]] = {}
        for name in tensors:
            self.memory.setdefault(_renamed(name, self._rules), []).append(name)

    def resolve(self, wanted: Iterable[str]) -> dict[str, str]:
        """Map each wanted tensor name to one of the checkpoint. Names that fit nowhere are left out.

        By the checkpoint's own names, by those of memory, by those of memory of what transformers 4 called so; and
        all others under one shift of prefix (``names.resolve``). Raises BadInput where a name fits in two ways.
        """
        found: dict[str, str] = {}
        rest = []
        for name in wanted:
            names.check_length(name)
            fits = {name} if name in self._tensors else set()
            fits.update(self.memory.get(name, ()))
            fits.update(() if fits else self.memory.get(_renamed(name, self._rules), ()))
            if len(fits) > 1:
                raise _ambiguous(name, fits)
            if fits:
                found[name] = fits.pop()
            else:
                rest.append(name)
        return found | self._shifted(rest)

    def _shifted(self, rest: Collection[str]) -> dict[str, str]:
        ours = {name: _renamed(name, self._rules) for name in rest}
        shifted = names.resolve(ours.values(), self.memory)
        found: dict[str, str] = {}
        for name, renamed in ours.items():
            if renamed in shifted:
                if len(fits := self.memory[shifted[renamed]]) > 1:
                    raise _ambiguous(name, fits)
                found[name] = fits[0]
        left = [name for name in rest if name not in found]
        return found | names.resolve(left, self._tensors)


def resolve(wanted: Iterable[str], tensors: Collection[str], config: Config) -> dict[str, str]:
    """``Known.resolve`` for one question."""
    return Known(tensors, config).resolve(wanted)


def _ambiguous(name: str, fits: Iterable[str]) -> BadInput:
    return BadInput(
        f"{name!r} of the adapter may be {' or '.join(sorted(fits))} of the checkpoint, by the names that they have "
        "on disk and in memory: expected one; save the base again with the transformers that trained the adapter."
    )


def _renamed(name: str, rules: Iterable[Rule]) -> str:
    for pattern, replacement, beside in rules:
        if beside is None or not beside.search(name):
            name = pattern.sub(replacement, name, count=1)
    return name


def _rules_of(config: Config) -> tuple[Rule, ...]:
    return tuple(rule for text, field in _texts_of(config) for rule in _compiled(text, field))


def _texts_of(config: Config) -> Iterator[tuple[str, str]]:
    """The rules of a model and of all inside it, each with the field of the config that its model is in."""
    inside = list(_placed(config))
    for types, text in _TABLE:
        kinds = types.split()
        fields = {field for field, own in inside if not own.isdisjoint(kinds)}
        for field in [""] if "" in fields else sorted(fields):
            yield text, field
    yield _OLD, ""
    if any(field == "vlm_config" for field, _ in inside):
        yield "^model >", "vlm_config"
    classes = [str(kind) for kind in config.get("architectures") or ()]
    if classes and all(_HEADLESS.fullmatch(kind) for kind in classes):
        own = str(config.get("model_type"))
        for rule in (rule.strip() for types, text in _TABLE if own in types.split() for rule in text.split(";")):
            if rule.startswith("^") and "> model." in rule:
                yield "^model >", ""
            elif rule.startswith("+"):
                yield f"^{rule[1:]}", ""


def _placed(config: Config, field: str = "") -> Iterator[tuple[str, set[str]]]:
    """The model and those inside it: where they are, if that is known of the field of their config, and their
    ``model_type``, as a backbone too if they are one."""
    kind = str(config.get("model_type"))
    yield field, {kind, f"{kind}_backbone"} if field == "backbone_config" else {kind}
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _placed(value, key if key in _PLACES or key in _BESIDE else "")


@cache
def _compiled(rules: str, field: str) -> tuple[Rule, ...]:
    return tuple(_rule(rule, field) for rule in rules.split(";"))


def _rule(rule: str, field: str) -> Rule:
    old, _, new = (side.strip() for side in rule.partition(">"))
    before, old = old.rsplit("! ", 1) if "! " in old else ("", old)
    old, _, after = old.partition(" !")
    start, at = "^", _PLACES.get(field, ())
    if at:
        start = rf"^(?P<place>(?:.+\.)?(?:{'|'.join(map(re.escape, at))})\.)"
    pattern = {"^": start, "+": r"(?<=\.)"}.get(old[0], r"(?<![^.])") + re.escape(old.lstrip("^+"))
    pattern = pattern.replace(r"\#", r"(?P<number>\d+)")
    if before:
        pattern = rf"(?<!{re.escape(before)}\.)" + pattern
    if after:
        pattern += rf"(?!\.(?:{after.replace(',', '|')})(?![^.]))"
    pattern += r"(?![^.])" if new else r"\."
    kept = r"\g<place>" if at and old[0] == "^" else ""
    return re.compile(pattern), kept + new.replace("#", r"\g<number>"), _BESIDE.get(field)
