"""What PEFT's LoRA can be and a weight cannot."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
from peft import LoraConfig
from peft.tuners.lora.config import KasaConfig

from tests.peers.variants import Built, Case
from tests.peers.variants.models import gpt2, llama, run_causal


def _lora(
    says: Mapping[str, Any] | None = None,
    make: Callable[[], Any] = llama,
    targets: tuple[str, ...] = ("q_proj", "down_proj"),
    **config: Any,
) -> Callable[[Path], Built]:
    """A case's ``build``: the adapter as PEFT makes it, untrained; its outputs are not looked at.

    ``says``: what the config says, where PEFT makes such an adapter only with libraries that are not here.
    """

    def build(folder: Path) -> Built:
        base = make()
        base.save_pretrained(folder / "base")
        model = peft.get_peft_model(base, LoraConfig(r=4, target_modules=list(targets), **config))
        model.save_pretrained(folder / "adapter")
        path = folder / "adapter" / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | dict(says or {})))
        return Built(folder / "base", folder / "adapter", base.lm_head.weight, run_causal)

    return build


CASES = [
    Case(
        "aLoRA",
        "PEFT",
        _lora(alora_invocation_tokens=[5, 6], task_type="CAUSAL_LM"),
        refused="alora_invocation_tokens.*follows its invocation tokens",
    ),
    Case("KaSA", "PEFT", _lora(kasa_config=KasaConfig()), refused="kasa_config.*smallest singular values"),
    Case(
        "`layer_replication`", "PEFT", _lora(layer_replication=[[0, 2], [0, 2]]), refused="layers of the base several"
    ),
    Case(
        "LoftQ",
        "PEFT",
        _lora({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4, "loftq_iter": 1}}),
        refused="LoftQ.*quantised base",
    ),
    Case("Arrow", "PEFT", _lora({"arrow_config": {"top_k": 2}}), refused="arrow_config.*for every token"),
    Case("QA-LoRA", "PEFT", _lora(use_qalora=True), refused="use_qalora.*averages groups"),
    Case("Megatron", "PEFT", _lora({"megatron_config": {"hidden_size": 32}}), refused="megatron_config.*split"),
    Case(
        "`bias='lora_only'`, saved without the biases (0.13, 0.19)",
        "PEFT",
        _lora({"bias": "lora_only"}, gpt2, ("c_attn",)),
        refused="bias is 'lora_only', but the trained .* is not in the file",
    ),
    Case(
        "An initialisation of tomorrow",
        "PEFT",
        _lora({"init_lora_weights": "tomorrow"}),
        refused="'tomorrow'.*not known",
    ),
]
