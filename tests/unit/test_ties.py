"""Which weights are used twice: what loreg knows of it, against every class of the transformers that is installed.

The classes are read from the text of its files, as importing all of them would take minutes.
"""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import transformers

from loreg.adapters import models, ties
from loreg.digest import Digest
from loreg.errors import Unsupported
from loreg.format.fingerprint import BaseTensor

ROOT = Path(transformers.__file__).parent / "models"

# Classes that make their ties when they are made.
MADE = {
    "BarkFineModel", "DebertaForMaskedLM", "DebertaV2ForMaskedLM", "DeformableDetrForObjectDetection",
    "Deimv2ForObjectDetection", "GroundingDinoForObjectDetection", "IdeficsForVisionText2Text",
    "MMGroundingDinoForObjectDetection", "MarianModel", "MarianMTModel", "Zamba2Model", "ZambaModel",
}  # fmt: skip

# Headless by its name, with a classifier of sounds inside.
WITHOUT_WORDS = {"Nemotron3_5TranscribeAudioModel"}


class Class(NamedTuple):
    name: str
    types: tuple[str, ...]
    """The ``model_type``s of its folder."""
    own: dict[str, str]
    inner: dict[str, str]
    """Attribute → class of the models inside."""
    heads: bool
    made: bool
    encoder_decoder: bool
    folder: Path


@cache
def classes() -> dict[str, Class]:
    found = {}
    for path in sorted(ROOT.glob("*/modeling_*.py")):
        text = path.read_text(encoding="utf-8", errors="replace")
        if "_tied_weights_keys" not in text and not re.search(r"AutoModelFor|For\w+\(config|LMHeadModel\(", text):
            continue
        configs = "".join(p.read_text(encoding="utf-8") for p in path.parent.glob("configuration_*.py"))
        types = tuple(re.findall(r'^    model_type = "([^"]+)"', configs, re.M))
        encoder_decoder = bool(re.search(r"is_encoder_decoder: bool = True|is_encoder_decoder = True", configs))
        for part in re.split(r"^(?=class )", text, flags=re.M)[1:]:
            kind = _class(part, types, encoder_decoder, path.parent)
            found[kind.name] = kind
    return found


_OWN = re.compile(r"^    _tied_weights_keys = (\{.*?\})$", re.M | re.S)
_HEAD = re.compile(
    r"\b(?:AutoModelFor(?!TextEncoding)\w+|\w+For[A-Z]\w+(?<!Output)(?<!Head)(?<!Loss)|\w+LMHeadModel)"
    r"(?:\._?from_config)?\("
)


def _class(text: str, types: tuple[str, ...], encoder_decoder: bool, folder: Path) -> Class:
    text = re.split(r"^(?=[^\s)])", text, flags=re.M)[1]  # without the decorators of the next
    name = re.match(r"class (\w+)", text)
    own = _OWN.search(text)
    made = re.search(r"^ +self\._tied_weights_keys(\[.+\])? = (?!None)|def _tied_weights_keys", text, re.M)
    assert name is not None
    return Class(
        name[1],
        types,
        ast.literal_eval(own[1]) if own else {},
        dict(re.findall(r"^ +self\.(\w+) = (\w+)(?:\._?from_config)?\(", text, re.M)),
        bool(_HEAD.search(text.partition("def __init__")[2])),
        bool(made),
        encoder_decoder,
        folder,
    )


def _all(kind: Class) -> set[tuple[str, str]]:
    """The ties of a class and of the models that it has inside."""
    found = {(name, one.rstrip("$")) for name, one in kind.own.items()}
    for attribute, called in kind.inner.items():
        if called in classes() and called != kind.name:
            found |= {(f"{attribute}.{name}", f"{attribute}.{one}") for name, one in _all(classes()[called])}
    return found


def _how(kind: Class) -> str:
    """By what loreg knows of the ties of a class; "" if by nothing."""
    if ties.of_class(kind.name):
        return "table"
    configs: list[dict[str, Any]] = [{"architectures": [kind.name], "model_type": each} for each in kind.types]
    (first,) = (kind.own.items()) if len(kind.own) == 1 else (None,)
    if first and any(models.words_of(config, [first[1]]) == first for config in configs):
        return "decoder"
    plain = [side.replace("\\", "").lstrip("^") for tie in kind.own.items() for side in tie]
    if all(any(ties.stack_of(config, f"{side}.weight") for config in configs) for side in plain):
        return "stack"
    sized = [{**config, "vocab_size": 64, "is_encoder_decoder": kind.encoder_decoder} for config in configs]
    if all(any(models.shares(config, side, (64, 8), True) for config in sized) for side in plain):
        return "size"
    return ""


def test_every_tie_of_transformers_is_known_or_refused() -> None:
    tied = [kind for kind in classes().values() if kind.own]
    found = {kind.name: _how(kind) for kind in tied}
    assert len(tied) > 300
    assert not {name for name, how in found.items() if not how}
    assert set(found.values()) == {"table", "decoder", "stack", "size"}


def test_the_table_is_what_transformers_says() -> None:
    wrong = {}
    for names, _ in ties._TABLE:
        for name in names.split():
            if (theirs := _all(classes()[name])) != set(ties.of_class(name)):
                wrong[name] = theirs
    assert not wrong


def test_classes_that_make_their_ties_are_those_that_were_looked_at() -> None:
    assert {kind.name for kind in classes().values() if kind.made} == MADE


def test_models_with_a_head_inside_are_not_headless() -> None:
    headless = {name for name, kind in classes().items() if kind.heads and models._HEADLESS.fullmatch(name)}
    assert headless - WITHOUT_WORDS == models._WITH_HEAD


def test_configs_that_cannot_say_that_nothing_is_tied() -> None:
    always = set()
    pattern = re.compile(r"self\.tie_word_embeddings = True|^        if self\.config\.tie_word_embeddings:", re.M)
    for folder in {classes()[name].folder for names, _ in ties._TABLE for name in names.split()}:
        texts = [path.read_text(encoding="utf-8") for path in folder.glob("*.py")]
        if any(map(pattern.search, texts)):
            always |= set(re.findall(r'^    model_type = "([^"]+)"', "".join(texts), re.M))
    assert always == ties.ALWAYS


def _tensors(*names: str) -> dict[str, BaseTensor]:
    return {name: BaseTensor(name, "F32", (64, 8), 2048, Digest("0" * 64)) for name in names}


BERT: dict[str, Any] = {"model_type": "bert", "architectures": ["BertForMaskedLM"]}
T5: dict[str, Any] = {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}
WORDS, BIAS = "bert.embeddings.word_embeddings.weight", "cls.predictions.bias"
DECODER = "cls.predictions.decoder"


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        ([WORDS, BIAS], {(f"{DECODER}.weight", WORDS), (f"{DECODER}.bias", BIAS)}),
        ([WORDS.removeprefix("bert.")], {(f"{DECODER}.weight", WORDS.removeprefix("bert."))}),
        # What is stored is what the other is, whichever transformers calls the source.
        ([f"{DECODER}.weight"], {(WORDS, f"{DECODER}.weight")}),
        ([], set()),
    ],
)
def test_pairs_of_what_a_checkpoint_has(stored: list[str], expected: set[ties.Pair]) -> None:
    assert set(ties.pairs(BERT, _tensors(*stored))) == expected
    assert not ties.pairs(BERT | {"tie_word_embeddings": False}, _tensors(*stored))


def test_a_model_whose_config_cannot_say_that_it_is_not_tied() -> None:
    expected = {
        (f"{name}.weight", "shared.weight") for name in ("encoder.embed_tokens", "decoder.embed_tokens", "lm_head")
    }
    for config in (T5, T5 | {"tie_word_embeddings": False}):
        assert set(ties.pairs(config, _tensors("shared.weight", "lm_head.weight"))) == expected
    # T5 scales what its head reads by what its config says of ties.
    assert models.restated(T5, dtype=None, untied=True, resized={}) == T5
    assert models.restated(BERT, dtype=None, untied=True, resized={}) == BERT | {"tie_word_embeddings": False}
    csm = {"model_type": "csm", "architectures": ["CsmForConditionalGeneration"]}
    assert models.restated(csm, dtype=None, untied=True, resized={})["tie_codebooks_embeddings"] is False


@pytest.mark.parametrize(
    ("kind", "name", "part"),
    [
        ("zamba", "model.layers.13.shared_transf.self_attn.q_proj.weight", "layers.13.shared_transf"),
        ("zamba", "model.layers.13.mamba.q_proj.weight", None),
        ("zamba2", "layers.1.shared_transformer.feed_forward.down_proj.weight", "layers.1.shared_transformer"),
        ("llama", "model.layers.1.shared_transformer.down_proj.weight", None),
        ("bark", "fine_acoustics.lm_heads.0.weight", "lm_heads.0"),
        ("d_fine", "model.decoder.bbox_embed.1.layers.0.weight", "bbox_embed"),
        ("d_fine", "model.decoder.my_bbox_embedding.weight", None),
    ],
)
def test_stacks(kind: str, name: str, part: str | None) -> None:
    config = {"model_type": kind, "vocab_size": 64}
    assert ties.stack_of(config, name) == part
    assert models.shares(config, name, (8, 8), False) == (part is not None)
    assert ties.stack_of(config | {"tie_word_embeddings": False}, name) is None
    if part is not None:
        with pytest.raises(Unsupported, match=f"{part}.* tied to others"):
            ties.check_stacks(config, {f"base.{name}": name})
