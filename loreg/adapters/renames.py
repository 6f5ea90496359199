"""What transformers calls a tensor in memory, where its checkpoints call it otherwise.

transformers 5 renames modules when it loads a model, and back when it saves one (``conversion_mapping.py``, 5.23), so
that an adapter names a module as neither the checkpoint nor an adapter of transformers 4 does. Here are the models
whose tensors it renames and leaves whole; what it stacks is in ``fusions``, and a model that is not here is refused
under the first name that is not found.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from functools import cache

from loreg.adapters import names
from loreg.errors import BadInput
from loreg.layers import Config, parts

Rule = tuple[re.Pattern[str], str]

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

_TABLE: tuple[tuple[str, str], ...] = (
    ("vit deit ijepa vit_mae vit_msn vivit audio-spectrogram-transformer", _VIT),
    ("beit", _BEIT),
    ("pixio", f"{_VIT}; norm1 > layernorm_before; norm2 > layernorm_after; ^encoder > pixio"),
    ("dinov2 dinov2_with_registers", _DINO2),
    ("dinov3_vit", "model! layer > model.layer"),
    ("dinov3_convnext", "model! stages > model.stages"),
    ("videomae", "attention.attention.q_bias > attention.attention.query.bias"),
    ("videomae", "attention.attention.v_bias > attention.attention.value.bias"),
    ("swin", f"{_SELF}; {_DENSE}"),
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
    for pattern, replacement in rules:
        name = pattern.sub(replacement, name, count=1)
    return name


def _rules_of(config: Config) -> tuple[Rule, ...]:
    kinds = {str(part.get("model_type")) for part in parts(config)}
    own = (rules for types, rules in _TABLE if not kinds.isdisjoint(types.split()))
    return tuple(rule for rules in (*own, _OLD) for rule in _compiled(rules))


@cache
def _compiled(rules: str) -> tuple[Rule, ...]:
    return tuple(_rule(rule) for rule in rules.split(";"))


def _rule(rule: str) -> Rule:
    old, _, new = (side.strip() for side in rule.partition(">"))
    before, old = old.rsplit("! ", 1) if "! " in old else ("", old)
    old, _, after = old.partition(" !")
    pattern = {"^": "^", "+": r"(?<=\.)"}.get(old[0], r"(?<![^.])") + re.escape(old.lstrip("^+"))
    pattern = pattern.replace(r"\#", r"(\d+)")
    if before:
        pattern = rf"(?<!{re.escape(before)}\.)" + pattern
    if after:
        pattern += rf"(?!\.(?:{after.replace(',', '|')})(?![^.]))"
    pattern += r"(?![^.])" if new else r"\."
    return re.compile(pattern), new.replace("#", r"\1")
