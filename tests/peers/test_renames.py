"""What ``renames`` knows of transformers, against transformers itself; and what it refuses to guess."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from transformers import conversion_mapping
from transformers.core_model_loading import PrefixChange, WeightRenaming, revert_weight_conversion
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from loreg.adapters import names, renames
from loreg.errors import BadInput

# What transformers renames and loreg does not know. An adapter of such a model is refused under the first name that
# is not found, and not merged elsewhere.
NOT_KNOWN = {
    "also cuts or turns tensors (Chunk, PermuteForRope, Interleave, …), which no edit of one tensor follows": (
        "axk2 hrm_text radio qianfan_ocr sapiens2 gradium_phonon_tts nemo_speechlm "
        "Sapiens2ForSemanticSegmentation Sapiens2ForPoseEstimation Sapiens2ForNormalEstimation "
        "Sapiens2ForPointmapEstimation Sapiens2ForImageMatting "
        "inkling_mm_model inkling2 inkling2_text Molmo2TextModel molmo2 mistral_large4 mistral_large4_text "
        "step3p7 step3p5_vision ernie4_5_vl_moe RfDetrModel RfDetrForObjectDetection RfDetrForInstanceSegmentation "
        "UnlimitedOcrVisionEncoder UnlimitedOcrSamVisionEncoder unlimited_ocr tipsv2 Tipsv2TextModel "
        "Tipsv2VisionModel Tipsv2VisionBackbone tipsv2_dpt Tipsv2DptForDepthEstimation Tipsv2DptForNormalEstimation "
        "Tipsv2DptForSemanticSegmentation glm5_next glm5_next_text bailing_hybrid minimax_m3_vl deepseek_v4"
    ),
    "moves names on top of each other (mlp.fc0 → fc1 → fc2), and one alone does not tell which it is": "kimi_k25",
    "its checkpoint is that of other software, which nobody trains by these names": (
        "deepseek_ocr2 cosmos3_edge cosmos3_omni dots3_note_audio_encoder dots3_note_vision_encoder "
        "Dots3NoteForConditionalGeneration Dots3NoteModel MtpModel jev hy_v4 NemotronH_Omni_Reasoning_V3 "
        "lfm3_vl_vision hyperclovax_vision_v2 kolibri1 axk1 pp_doclayout_v4 UltrabertForMaskedLM "
        "UltrabertForSequenceClassification UltrabertForTokenClassification UltrabertForQuestionAnswering "
        "UltraVBertForMaskedLM"
    ),
    "its rules are for parts of larger checkpoints, of which no adapter is": (
        "sam3_tracker sam3_tracker_video t5gemma2_encoder"
    ),
}
# Of every model, or of halves of one that is known; and what classes are for that no table of transformers lists.
KNOWN_CLASSES = {
    "legacy": None,
    "esm": None,
    "MimiEncoderModel": None,
    "MimiDecoderModel": None,
    "PPChart2TableModel": "pp_chart2table",
    "MaskFormerDetrDecoder": "detr",
    "ConditionalDetrForSegmentation": "conditional_detr",
}


@cache
def _rules() -> Mapping[str, list[WeightRenaming]]:
    """Class or model_type → its renamings, without those of a whole prefix, which ``names`` finds by itself."""
    every = conversion_mapping._build_checkpoint_conversion_mapping()
    return {
        key: [rule for rule in rules if isinstance(rule, WeightRenaming) and not isinstance(rule, PrefixChange)]
        for key, rules in every.items()
    }


@cache
def _types() -> Mapping[str, set[str]]:
    """Class → the model_types that it is for."""
    found: dict[str, set[str]] = {}
    for table in dir(modeling_auto):
        if table.startswith("MODEL_") and table.endswith("MAPPING_NAMES"):
            for kind, classes in getattr(modeling_auto, table).items():
                for name in [classes] if isinstance(classes, str) else classes:
                    found.setdefault(name, set()).add(kind)
    return found


def _kinds(key: str) -> set[str]:
    return (_types().get(key, set()) | {key, str(KNOWN_CLASSES.get(key))}) & renames.KNOWN


def test_every_model_that_transformers_renames_is_known_or_said_not_to_be() -> None:
    unknown = {key for keys in NOT_KNOWN.values() for key in keys.split()}
    left = {key for key, rules in _rules().items() if rules and not _kinds(key) and key not in KNOWN_CLASSES}
    assert left == unknown
    assert {key for key in renames.KNOWN if not any(key in _kinds(each) for each in _rules())} <= {
        # By the class of a tower alone, and of the whole, where transformers has the rule under another class.
        "altclip_vision_model", "chinese_clip_vision_model", "clip_text_model", "clip_vision_model", "colqwen2",
        "clipseg_text_model", "clipseg_vision_model", "metaclip_2_text_model", "metaclip_2_vision_model",
        "mlcd_vision_model", "qwen2_5_omni", "siglip2_text_model", "siglip2_vision_model", "siglip_text_model",
        "siglip_vision_model", "xclip_text_model", "xclip_vision_model", "video_llava", "qwen3_omni_moe",
        # Of a model as the backbone of another; and where only a class within has the rules.
        "beit_backbone", "swin_backbone", "t5gemma2", "shieldgemma2",
    }  # fmt: skip


def _samples(pattern: str) -> Iterator[str]:
    """Names that a source pattern of transformers is for."""
    plain = re.sub(r"\(\?<?[!=][^)]*\)+", "", pattern).replace(r"(\d+)", "3").replace("\\", "")
    start = "" if plain.startswith("^") else "x.0."
    plain = plain.removeprefix("^")
    stop = "" if plain.endswith((".weight", ".bias")) else "weight" if plain.endswith(".") else ".weight"
    choice = re.search(r"\(([^()]*\|[^()]*)\)", plain)
    for chosen in choice[1].split("|") if choice else [""]:
        yield (start + (plain.replace(choice[0], chosen) if choice else plain) + stop).strip(".")


@pytest.mark.parametrize("key", sorted(key for key, rules in _rules().items() if rules and _kinds(key)))
def test_what_transformers_renames_is_renamed_so(key: str) -> None:
    config = {"model_type": min(_kinds(key))}
    for rule in _rules()[key]:
        for pattern in rule.source_patterns:
            for name in _samples(pattern):
                theirs, matched = name, None
                for each in _rules()[key]:
                    theirs, by = each.rename_source_key(theirs)
                    matched = matched or by
                assert matched, f"{pattern} is not for {name}: the sample is wrong"
                # A prefix is put in front for some class; ``names`` does so where it fits.
                same = renames.in_memory(name, config) == renames.in_memory(theirs, config)
                assert same or theirs.endswith(f".{name}"), (pattern, name, theirs)


# Names of whole models


def _shrunk(config: Any, shallow: bool = True) -> Any:
    for key, value in vars(config).items():
        if isinstance(value, transformers.PreTrainedConfig):
            _shrunk(value)
        elif isinstance(value, int) and re.fullmatch(r"(num_(hidden_)?layers|(en|de)coder_layers|depth)", key):
            setattr(config, key, 2)
        elif key == "layer_types" and value:
            config.layer_types = value[:2]
    return config


def _model(kind: str, name: str) -> Any:
    with torch.device("meta"):
        return getattr(transformers, name)(_shrunk(CONFIG_MAPPING[kind]()))


def _stored(model: Any, as_on_the_hub: bool) -> dict[str, str]:
    """Name in the checkpoint that transformers would write → name in memory. ``as_on_the_hub``: as it writes what it
    has read from the Hub, and not what it has made; there, some models have a prefix more."""
    rules = conversion_mapping.get_model_conversion_mapping(model, add_legacy=False)
    kinds = WeightRenaming if as_on_the_hub else _Plain
    model._weight_conversions = [rule for rule in rules if isinstance(rule, kinds)]
    own = {name: torch.tensor(number) for number, name in enumerate(model.state_dict())}
    back = {int(number): name for name, number in own.items()}
    return {name: back[int(number)] for name, number in revert_weight_conversion(model, own).items()}


class _PlainMeta(type):
    def __instancecheck__(cls, rule: object) -> bool:
        return isinstance(rule, WeightRenaming) and not isinstance(rule, PrefixChange)


class _Plain(metaclass=_PlainMeta):
    """A renaming that is not of a whole prefix."""


MODELS = (
    ("vit", "ViTForImageClassification"),
    ("vit", "ViTModel"),
    ("deit", "DeiTForImageClassification"),
    ("beit", "BeitForImageClassification"),
    ("audio-spectrogram-transformer", "ASTForAudioClassification"),
    ("vit_mae", "ViTMAEForPreTraining"),
    ("vit_msn", "ViTMSNForImageClassification"),
    ("vivit", "VivitForVideoClassification"),
    ("pixio", "PixioModel"),
    ("dinov2", "Dinov2ForImageClassification"),
    ("dinov2_with_registers", "Dinov2WithRegistersModel"),
    ("dinov3_vit", "DINOv3ViTModel"),
    ("swin", "SwinForImageClassification"),
    ("segformer", "SegformerForImageClassification"),
    ("segformer", "SegformerForSemanticSegmentation"),
    ("altclip", "AltCLIPModel"),
    ("clip", "CLIPModel"),
    ("clip_vision_model", "CLIPVisionModel"),
    ("siglip", "SiglipModel"),
    ("llava", "LlavaForConditionalGeneration"),
    ("llava", "LlavaModel"),
    ("llava_next", "LlavaNextForConditionalGeneration"),
    ("llava_onevision", "LlavaOnevisionForConditionalGeneration"),
    ("gemma3", "Gemma3ForConditionalGeneration"),
    ("paligemma", "PaliGemmaForConditionalGeneration"),
    ("mistral3", "Mistral3ForConditionalGeneration"),
    ("internvl", "InternVLForConditionalGeneration"),
    ("aria", "AriaForConditionalGeneration"),
    ("video_llava", "VideoLlavaForConditionalGeneration"),
    ("mllama", "MllamaForConditionalGeneration"),
    ("fuyu", "FuyuForCausalLM"),
    ("qwen2_vl", "Qwen2VLForConditionalGeneration"),
    ("qwen2_vl", "Qwen2VLModel"),
    ("qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration"),
    ("qwen2_audio", "Qwen2AudioForConditionalGeneration"),
    ("voxtral", "VoxtralForConditionalGeneration"),
    ("granite_speech", "GraniteSpeechForConditionalGeneration"),
    ("paddleocr_vl", "PaddleOCRVLForConditionalGeneration"),
    ("mimi", "MimiModel"),
    ("rt_detr", "RTDetrForObjectDetection"),
    ("d_fine", "DFineForObjectDetection"),
    ("maskformer", "MaskFormerForInstanceSegmentation"),
    ("gpt_neox", "GPTNeoXForCausalLM"),
    ("granitemoe", "GraniteMoeForCausalLM"),
    ("phimoe", "PhimoeForCausalLM"),
    ("kimi_linear", "KimiLinearForCausalLM"),
    ("nemotron_h", "NemotronHForCausalLM"),
    ("olmo_hybrid", "OlmoHybridForCausalLM"),
    # Models within models, whose rules are for the beginning of their own names.
    ("colpali", "ColPaliForRetrieval"),
    ("colqwen2", "ColQwen2ForRetrieval"),
    ("csm", "CsmForConditionalGeneration"),
    ("kyutai_speech_to_text", "KyutaiSpeechToTextForConditionalGeneration"),
    ("zoedepth", "ZoeDepthForDepthEstimation"),
    ("mask2former", "Mask2FormerForUniversalSegmentation"),
    ("oneformer", "OneFormerModel"),
    ("grounding-dino", "GroundingDinoForObjectDetection"),
    ("pi0", "PI0ForConditionalGeneration"),
    ("pi0", "PI0Model"),
    ("t5gemma2", "T5Gemma2ForConditionalGeneration"),
    ("shieldgemma2", "ShieldGemma2ForImageClassification"),
    ("vision-text-dual-encoder", "VisionTextDualEncoderModel"),
    ("cohere_asr", "CohereAsrForConditionalGeneration"),
    ("nomic_bert", "NomicBertForMaskedLM"),
    ("jina_embeddings_v3", "JinaEmbeddingsV3Model"),
    ("gte", "GteForMaskedLM"),
)
# transformers itself writes a ViTMSN without its prefix, and has no rule for it; π₀'s is one of its own that it takes
# off what it reads.
OTHERWISE = {("ViTMSNForImageClassification", False), ("ViTMSNForImageClassification", True)}
OTHERWISE |= {("PI0ForConditionalGeneration", True), ("PI0Model", True)}


@pytest.mark.parametrize(("kind", "name"), MODELS)
def test_the_names_of_a_model_are_found_in_its_checkpoint(kind: str, name: str) -> None:
    model = _model(kind, name)
    config = {**model.config.to_dict(), "architectures": [name]}
    for as_on_the_hub in (False, True):
        stored = _stored(model, as_on_the_hub)
        exact = {disk: renames.in_memory(disk, config) for disk in stored}
        assert (exact == stored) is ((name, as_on_the_hub) not in OTHERWISE)
        known = renames.Known(list(stored), config)
        assert known.resolve(stored.values()) == {memory: disk for disk, memory in stored.items()}
        # An adapter that was trained when memory had the checkpoint's names; and a checkpoint with those of memory.
        assert known.resolve(stored) == {disk: disk for disk in stored}
        if not as_on_the_hub:
            new = renames.Known(list(stored.values()), config)
            found = new.resolve(disk for disk in stored if disk not in new.memory)
            assert all(stored[disk] == memory for disk, memory in found.items())


# What it refuses, and what is left to prefixes


VIT = {"model_type": "vit"}
OLD = "vit.encoder.layer.{}.attention.attention.query.weight"
NEW = "vit.layers.{}.attention.q_proj.weight"


def _resolve(wanted: Collection[str], tensors: Collection[str], config: Mapping[str, Any]) -> dict[str, str]:
    return renames.Known(tensors, config).resolve(wanted)


def test_both_layouts_serve_adapters_of_both() -> None:
    for stored in (OLD, NEW):
        for wanted in (OLD, NEW):
            assert _resolve([wanted.format(1)], [stored.format(0), stored.format(1)], VIT) == {
                wanted.format(1): stored.format(1)
            }


def test_a_headless_adapter_is_shifted_after_it_is_renamed() -> None:
    for wanted in (OLD, NEW):
        name = wanted.removeprefix("vit.").format(0)
        assert _resolve([name], [OLD.format(0)], VIT) == {name: OLD.format(0)}


def test_a_rename_is_of_the_models_that_have_it() -> None:
    assert not _resolve([NEW.format(0)], [OLD.format(0)], {"model_type": "bert"})
    within = {"model_type": "vision-encoder-decoder", "encoder": VIT}
    prefixed = [f"encoder.{layout.removeprefix('vit.').format(0)}" for layout in (NEW, OLD)]
    assert _resolve(prefixed[:1], prefixed[1:], within) == {prefixed[0]: prefixed[1]}


def test_one_of_two_towers_keeps_its_name() -> None:
    config = {"model_type": "clip", "vision_config": {"model_type": "clip_vision_model"}}
    assert renames.in_memory("vision_model.post_layernorm.weight", config) == "vision_model.post_layernorm.weight"
    assert renames.in_memory("tower.vision_model.post_layernorm.weight", config) == "tower.post_layernorm.weight"


def test_a_tower_alone_has_no_name_in_memory() -> None:
    tower = {"model_type": "clip_vision_model", "architectures": ["CLIPVisionModel"]}
    assert renames.in_memory("vision_model.post_layernorm.weight", tower) == "post_layernorm.weight"
    projected = {**tower, "architectures": ["CLIPVisionModelWithProjection"]}
    assert renames.in_memory("vision_model.post_layernorm.weight", projected) == "vision_model.post_layernorm.weight"


def test_rules_of_an_encoder_are_not_of_its_decoder() -> None:
    within = {"model_type": "vision-encoder-decoder", "encoder": VIT, "decoder": {"model_type": "bert"}}
    name = "{}.encoder.layer.0.output.dense.weight"
    assert renames.in_memory(name.format("encoder"), within) == "encoder.layers.0.mlp.fc2.weight"
    assert renames.in_memory(name.format("decoder.bert"), within) == name.format("decoder.bert")


def test_two_tensors_that_would_be_called_alike_keep_their_names() -> None:
    stored = [OLD.format(0), NEW.format(0), OLD.format(1)]
    live = renames.all_in_memory(stored, VIT)
    assert live == dict(zip(stored, [*stored[:2], NEW.format(1)], strict=True))


@pytest.mark.parametrize("known", [["a.weight"], []])
def test_a_name_of_very_many_parts_is_refused_before_it_is_looked_for(known: list[str]) -> None:
    long = "a." * names.PATH_LENGTH + "weight"
    for resolve in (names.resolve, lambda wanted, tensors: _resolve(wanted, tensors, VIT)):
        with pytest.raises(BadInput, match=r"a name of 1,030 characters.*at most 512") as error:
            resolve([long], known)
        assert len(str(error.value)) < 300
    exact = "a" * (names.PATH_LENGTH - len(".weight")) + ".weight"
    assert names.resolve([exact], [f"x.{exact}"]) == {exact: f"x.{exact}"}


def test_names_of_no_model_within_a_model_have_one_shift() -> None:
    stored = ["language_model.lm_head.weight", "body.layers.0.q_proj.weight"]
    with pytest.raises(BadInput, match="no single prefix"):
        names.resolve(["lm_head.weight", "layers.0.q_proj.weight"], stored)


@pytest.mark.parametrize("wanted", [NEW, OLD])
def test_a_checkpoint_that_has_a_tensor_in_both_layouts_is_refused(wanted: str) -> None:
    tensors = [OLD.format(0), NEW.format(0)]
    if wanted == OLD:  # the exact name alone: nothing else is called so in memory
        assert _resolve([wanted.format(0)], tensors, VIT) == {wanted.format(0): OLD.format(0)}
        tensors = ["a." + OLD.format(0), "a." + NEW.format(0)]
    with pytest.raises(BadInput, match=r"may be .* or .* of the checkpoint"):
        _resolve([wanted.format(0)], tensors, VIT)


def test_models_within_a_model_are_shifted_each_by_itself() -> None:
    stored = ["language_model.model.layers.0.q_proj.weight", "vision_tower.layers.0.q_proj.weight"]
    stored.append("language_model.lm_head.weight")
    wanted = ["model.language_model.layers.0.q_proj.weight", "model.vision_tower.layers.0.q_proj.weight"]
    wanted.append("lm_head.weight")
    assert names.resolve(wanted, stored) == dict(zip(wanted, stored, strict=True))


def test_two_models_within_a_model_are_not_put_into_one() -> None:
    wanted = ["text_model.encoder.layers.0.q_proj.weight", "vision_model.encoder.layers.0.q_proj.weight"]
    with pytest.raises(BadInput, match="no single prefix"):
        names.resolve(wanted, ["encoder.layers.0.q_proj.weight"])


def test_two_shifts_of_one_model_within_a_model_are_an_ambiguity() -> None:
    stored = ["a.lm_head.weight", "b.lm_head.weight", "vision_tower.layers.0.q_proj.weight"]
    with pytest.raises(BadInput, match="no single prefix"):
        names.resolve(["lm_head.weight", "model.vision_tower.layers.0.q_proj.weight"], stored)
