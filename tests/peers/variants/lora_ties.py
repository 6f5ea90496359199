"""LoRA by PEFT on weights that a model uses in several places, other than head and embedding of a decoder.

What PEFT computes is that of its forward pass, in which a layer that it adapts is no more the one that the model
ties to it; what it saves by two names is one tensor, or two.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft import LoraConfig

from tests.peers.variants import Built, Case
from tests.peers.variants.models import IDS, randomise

_SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_ENCODER = {**_SIZES, "intermediate_size": 48, "max_position_embeddings": 64}
_T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
_BART = {
    "vocab_size": 64, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64,
}  # fmt: skip
_ZAMBA = {
    **_SIZES, "num_hidden_layers": 4, "intermediate_size": 48, "num_key_value_heads": 4, "num_mem_blocks": 1,
    "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"], "mamba_d_state": 8, "mamba_headdim": 16,
    "mamba_ngroups": 1, "n_mamba_heads": 4, "adapter_rank": 4, "use_mem_eff_path": False, "chunk_size": 8,
    "mamba_expand": 2, "use_shared_attention_adapter": False,
}  # fmt: skip
_PAIR = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
_TWO = {"input_ids": IDS, "decoder_input_ids": IDS}
_ENTITIES = {
    **_PAIR,
    "entity_ids": torch.tensor([[1, 2], [3, 4]]),
    "entity_attention_mask": torch.ones(2, 2, dtype=torch.long),
    "entity_position_ids": torch.tensor([[[1, 2], [3, 4]]] * 2),
}


def _bert() -> Any:
    return transformers.BertForMaskedLM(transformers.BertConfig(**_ENCODER))


def _roberta() -> Any:
    return transformers.RobertaForMaskedLM(transformers.RobertaConfig(**_ENCODER))


def _modernbert() -> Any:
    return transformers.ModernBertForMaskedLM(transformers.ModernBertConfig(pad_token_id=0, **_ENCODER))


def _xlm() -> Any:
    sizes = {"vocab_size": 64, "emb_dim": 32, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 64}
    return transformers.XLMWithLMHeadModel(transformers.XLMConfig(**sizes, n_langs=1, pad_index=0, eos_index=1))


def _luke() -> Any:
    return transformers.LukeForMaskedLM(transformers.LukeConfig(entity_vocab_size=40, entity_emb_size=32, **_ENCODER))


def _t5() -> Any:
    return transformers.T5ForConditionalGeneration(transformers.T5Config(decoder_start_token_id=0, **_T5))


def _t5_untied() -> Any:
    """As version 1.1 is: the config says no such thing, and a head of its own is stored."""
    model = _t5()
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    return model


def _t5_encoder() -> Any:
    return transformers.T5EncoderModel(transformers.T5Config(**_T5))


def _bart() -> Any:
    return transformers.BartForConditionalGeneration(transformers.BartConfig(**_BART))


def _zamba2() -> Any:
    return transformers.Zamba2ForCausalLM(transformers.Zamba2Config(**_ZAMBA))


_INPUTS = {_t5: _TWO, _t5_untied: _TWO, _bart: _TWO, _luke: _ENTITIES, _zamba2: {"input_ids": IDS}}


@torch.no_grad()
def outputs(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits of words and of entities; of a model without a head its last states. Float64, in one row."""
    found = model.eval()(**inputs)
    names = ("logits", "entity_logits") if "logits" in found else ("last_hidden_state",)
    return torch.cat([found[name].double().flatten() for name in names if name in found])


def _lora(make: Callable[[], Any], *targets: str, **config: Any) -> Callable[[Path], Built]:
    """A case's ``build``. All weights of the base are moved, so that no bias is zero."""

    def build(folder: Path) -> Built:
        torch.manual_seed(0)
        base = make().eval()
        randomise(base, seed=2, size=0.05)
        base.save_pretrained(folder / "base")
        base = type(base).from_pretrained(folder / "base").eval()
        inputs = _INPUTS.get(make, _PAIR)
        before = outputs(base, inputs)
        model = peft.get_peft_model(base, LoraConfig(r=3, lora_alpha=5, target_modules=[*targets], **config))
        randomise(model)
        model.save_pretrained(folder / "adapter")
        expected = outputs(model, inputs)
        assert not torch.equal(expected, before)

        def run(merged: Path) -> torch.Tensor:
            return outputs(type(base).from_pretrained(merged), inputs)

        def reload(exported: Path) -> torch.Tensor:
            clean = type(base).from_pretrained(folder / "base")
            return outputs(peft.PeftModel.from_pretrained(clean, exported), inputs)

        return Built(folder / "base", folder / "adapter", expected, run, reload=reload)

    return build


_UNTIED = "untied by the merge, in files and config"

CASES = [
    Case("Head of BERT, tied", "PEFT", _lora(_bert, "predictions.decoder"), note=_UNTIED),
    Case("Head of BERT, tied, `lora_bias`", "PEFT", _lora(_bert, "predictions.decoder", lora_bias=True)),
    Case("Head of BERT, tied, DoRA", "PEFT", _lora(_bert, "predictions.decoder", use_dora=True)),
    Case("Head of BERT, tied, `bias`: all", "PEFT", _lora(_bert, "predictions.decoder", bias="all")),
    Case("Head of BERT, tied, `bias`: lora_only", "PEFT", _lora(_bert, "predictions.decoder", bias="lora_only")),
    Case("Embedding of BERT, tied", "PEFT", _lora(_bert, "word_embeddings"), note=_UNTIED),
    Case("Embedding and head of BERT, tied", "PEFT", _lora(_bert, "word_embeddings", "predictions.decoder")),
    Case(
        "Inside of BERT, `bias`: all",
        "PEFT",
        _lora(_bert, "query", bias="all"),
        note="stays tied; PEFT saves the bias of the head twice",
    ),
    Case("Inside of BERT, `modules_to_save`: head", "PEFT", _lora(_bert, "query", modules_to_save=["cls"])),
    Case(
        "Rows of the embedding of BERT, tied",
        "PEFT",
        _lora(_bert, "query", trainable_token_indices=[3, 5]),
        refused="decoder.bias.*another model",
        note="PEFT leaves out the bias of a head that it ties the rows to",
    ),
    Case("Head of RoBERTa, tied", "PEFT", _lora(_roberta, "lm_head.decoder", bias="all")),
    Case("Inside of RoBERTa, `modules_to_save`: head", "PEFT", _lora(_roberta, "query", modules_to_save=["lm_head"])),
    Case("Embedding of ModernBERT, tied", "PEFT", _lora(_modernbert, "tok_embeddings")),
    Case("Head of XLM, tied", "PEFT", _lora(_xlm, "pred_layer.proj")),
    Case("Embedding of XLM, tied", "PEFT", _lora(_xlm, "transformer.embeddings", "q_lin")),
    Case("Embedding of LUKE's entities, tied", "PEFT", _lora(_luke, "entity_embeddings.entity_embeddings")),
    Case(
        "Head of T5, tied", "PEFT", _lora(_t5, "q", "lm_head"), note="the config cannot say so: untied in the files"
    ),
    Case("Head of T5, not tied", "PEFT", _lora(_t5_untied, "q", "lm_head")),
    Case("Inside and embedding of T5, not tied", "PEFT", _lora(_t5_untied, "q", "encoder.embed_tokens")),
    Case("`modules_to_save`: head of T5, tied", "PEFT", _lora(_t5, "q", modules_to_save=["lm_head"])),
    Case("Embeddings of T5, tied", "PEFT", _lora(_t5, "embed_tokens"), note="of encoder and decoder, each its own"),
    Case("Embedding of T5's encoder alone", "PEFT", _lora(_t5_encoder, "embed_tokens")),
    Case(
        "Shared embedding of T5",
        "PEFT",
        _lora(_t5, "q", "shared"),
        refused="'shared.weight' is changed.*'encoder.embed_tokens.weight'",
        note="trained idly: the model uses the weight by its other names",
    ),
    Case("Head and embeddings of BART, tied", "PEFT", _lora(_bart, "lm_head", "embed_tokens")),
    Case(
        "Blocks of Zamba 2",
        "PEFT",
        _lora(_zamba2, "q_proj", "down_proj"),
        refused="shared_transformer.*tied to others",
        note="each is used in several layers",
    ),
    Case(
        "One layer of Zamba 2",
        "PEFT",
        _lora(_zamba2, "q_proj", layers_to_transform=[1], layers_pattern="layers"),
        refused="shared_transformer.*tied to others",
        note="each is used in several layers",
    ),
]
