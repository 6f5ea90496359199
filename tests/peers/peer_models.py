"""Tiny models of four families, built from transformers' configs, and adapters made by PEFT with factors that show.

Nothing here is loreg's: the models and the adapters must be what transformers and PEFT write, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

BaseOf = Callable[[str, str], Path]
"""The fixture ``base_of``: (family, dtype) → the directory of a tiny model."""

VOCABULARY = 96
LABELS = 3
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

_GPT2 = {"vocab_size": VOCABULARY, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 4}
_ENCODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
    "type_vocab_size": 1,
}
_DEBERTA = {**_ENCODER, "type_vocab_size": 0, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
_LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}


@dataclass(frozen=True)
class Family:
    """A checkpoint as it lies on disk, and the class that is trained from it.

    ``saved``: the class that wrote the checkpoint; ``trained``: the class that carries the adapter. ``prefix``:
    what a name in the file lacks of the name in the trained model, ``added``: what it has instead.
    ``strip``: whether the prefix is taken off after saving. ``arguments``: for ``from_pretrained``.
    """

    config: Callable[[], Any]
    saved: Any
    trained: Any
    prefix: str = ""
    added: str = ""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    shard: str = "5GB"
    strip: bool = False

    def in_file(self, name: str) -> str:
        """The name in the file of a tensor of the trained model."""
        return self.added + name.removeprefix(self.prefix)


_HEADED = {"num_labels": LABELS}
FAMILIES = {
    "gpt2": Family(
        lambda: transformers.GPT2Config(**_GPT2), transformers.GPT2LMHeadModel, transformers.GPT2LMHeadModel
    ),
    # As on the Hub: the headless names in the file, the head in the model.
    "gpt2-hub": Family(
        lambda: transformers.GPT2Config(**_GPT2),
        transformers.GPT2LMHeadModel,
        transformers.GPT2LMHeadModel,
        prefix="transformer.",
        strip=True,
    ),
    # The other way round: a headless model is trained, and the file is of one with a head.
    "gpt2-body": Family(
        lambda: transformers.GPT2Config(**_GPT2),
        transformers.GPT2LMHeadModel,
        transformers.GPT2Model,
        added="transformer.",
    ),
    "roberta": Family(
        lambda: transformers.RobertaConfig(**_ENCODER, **_HEADED),
        transformers.RobertaForSequenceClassification,
        transformers.RobertaForSequenceClassification,
    ),
    # As on the Hub: a masked language model, that is trained as a classifier with a head of its own.
    "roberta-mlm": Family(
        lambda: transformers.RobertaConfig(**_ENCODER),
        transformers.RobertaForMaskedLM,
        transformers.RobertaForSequenceClassification,
        arguments=_HEADED,
    ),
    "roberta-headless": Family(
        lambda: transformers.RobertaConfig(**_ENCODER),
        transformers.RobertaModel,
        transformers.RobertaForSequenceClassification,
        prefix="roberta.",
        arguments=_HEADED,
    ),
    "deberta": Family(
        lambda: transformers.DebertaV2Config(**_DEBERTA, **_HEADED),
        transformers.DebertaV2ForSequenceClassification,
        transformers.DebertaV2ForSequenceClassification,
    ),
    "deberta-headless": Family(
        lambda: transformers.DebertaV2Config(**_DEBERTA),
        transformers.DebertaV2Model,
        transformers.DebertaV2ForSequenceClassification,
        prefix="deberta.",
        arguments=_HEADED,
    ),
    "llama": Family(
        lambda: transformers.LlamaConfig(**_LLAMA), transformers.LlamaForCausalLM, transformers.LlamaForCausalLM
    ),
    "llama-sharded": Family(
        lambda: transformers.LlamaConfig(**_LLAMA),
        transformers.LlamaForCausalLM,
        transformers.LlamaForCausalLM,
        shard="30KB",
    ),
}


def randomise(model: torch.nn.Module, choose: Callable[[str], bool], scale: float, seed: int) -> None:
    """Normal values for the parameters that ``choose`` names, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if choose(name):
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(noise * scale)


def save_base(family: str, dtype: str, folder: Path) -> Path:
    """Write a model of ``family`` with weights of ``dtype``; biases and norms get values too."""
    kind = FAMILIES[family]
    torch.manual_seed(0)
    model = kind.saved(kind.config())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.to(DTYPES[dtype]).save_pretrained(folder, max_shard_size=kind.shard)
    if kind.strip:
        path = folder / "model.safetensors"
        tensors = {name.removeprefix(kind.prefix): value for name, value in load_file(path).items()}
        save_file(tensors, path, metadata={"format": "pt"})
    return folder


def load_model(family: str, folder: Path, dtype: torch.dtype) -> Any:
    """The class that is trained, from the files in ``folder``, in eval mode, attention spelled out."""
    kind = FAMILIES[family]
    torch.manual_seed(7)
    arguments = {**kind.arguments, "attn_implementation": "eager"}
    return kind.trained.from_pretrained(folder, dtype=dtype, **arguments).eval()


def save_adapter(
    family: str,
    base: Path,
    folder: Path,
    dtype: str,
    seed: int = 1,
    *,
    safe: bool = True,
    wide_factors: bool = False,
    **lora: Any,
) -> Path:
    """Train nothing, but let PEFT make and save an adapter whose every trainable parameter has moved.

    ``wide_factors``: factors in float32 beside a 16-bit base, which is PEFT's default.
    """
    model = get_peft_model(
        load_model(family, base, DTYPES[dtype]), LoraConfig(**lora), autocast_adapter_dtype=wide_factors
    )
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    randomise(model, lambda name: name in trainable and "lora_" in name, 0.12, seed)
    randomise(model, lambda name: name in trainable and "lora_" not in name, 0.1, seed + 1)
    model.save_pretrained(folder, safe_serialization=safe)
    return folder


def load_peft(
    family: str, base: Path, adapters: Mapping[str, Path], dtype: torch.dtype, wide_factors: bool = False
) -> PeftModel:
    """base + adapters unmerged, as PEFT reads them back from their files; all of them active."""
    (first, folder), *others = adapters.items()
    model = PeftModel.from_pretrained(
        load_model(family, base, dtype), folder, adapter_name=first, autocast_adapter_dtype=wide_factors
    )
    for name, path in others:
        model.load_adapter(path, adapter_name=name, autocast_adapter_dtype=wide_factors)
    model.base_model.set_adapter(list(adapters))
    return model.eval()


def inputs() -> torch.Tensor:
    """Token ids (4, 16), without the ids below 4, which some models take for padding."""
    return torch.randint(4, VOCABULARY, (4, 16), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    """What the model computes of ``inputs``, in float64; the last hidden states of one without a head."""
    ids = inputs()
    output = model(input_ids=ids, attention_mask=torch.ones_like(ids))
    return output[0].double()
