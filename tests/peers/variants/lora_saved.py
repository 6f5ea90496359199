"""LoRA by PEFT beside modules that are trained whole, and beside biases."""

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


@torch.no_grad()
def _logits(model: Any) -> torch.Tensor:
    ids = IDS + 4
    return model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.double()


def _classifier(folder: Path) -> Any:
    return transformers.RobertaForSequenceClassification.from_pretrained(folder)


def _adapted(**config: Any) -> Callable[[Path], Built]:
    """A case's ``build``: a classifier of two layers, whose head is trained whole."""

    def build(folder: Path) -> Built:
        torch.manual_seed(0)
        sizes = transformers.RobertaConfig(
            vocab_size=80, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
            max_position_embeddings=40, type_vocab_size=1, num_labels=3,
        )  # fmt: skip
        transformers.RobertaForSequenceClassification(sizes).save_pretrained(folder / "base")
        chosen = LoraConfig(r=4, lora_alpha=6, target_modules=["query", "output.dense"], **config)
        model = peft.get_peft_model(_classifier(folder / "base"), chosen)
        randomise(model)
        expected = _logits(model)
        model.save_pretrained(folder / "adapter")

        def reload(exported: Path) -> torch.Tensor:
            return _logits(peft.PeftModel.from_pretrained(_classifier(folder / "base"), exported))

        return Built(
            folder / "base", folder / "adapter", expected, lambda out: _logits(_classifier(out)), reload=reload
        )

    return build


CASES = [
    Case("`modules_to_save`", "PEFT", _adapted(task_type="SEQ_CLS")),
    Case(
        "`bias='all'` beside `modules_to_save`",
        "PEFT",
        _adapted(task_type="SEQ_CLS", bias="all"),
        note="PEFT saves the biases of a saved module three times, the base's among them; the file is kept whole",
    ),
    Case(
        "`bias='all'` beside one saved layer",
        "PEFT",
        _adapted(modules_to_save=["classifier.out_proj", "LayerNorm"], bias="all"),
    ),
    Case(
        "`bias='lora_only'`, DoRA, `modules_to_save`",
        "PEFT",
        _adapted(task_type="SEQ_CLS", bias="lora_only", use_dora=True),
    ),
]
