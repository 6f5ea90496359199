"""LoRA on parameters by PEFT: experts that transformers 5 stacks in memory, stacks on disk, and single matrices."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from tests.peers.variants import Built, Case
from tests.peers.variants.models import gpt2, llama, logits, peft_adapter, randomise, run_causal

_EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
_SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 64, "num_experts_per_tok": 2, "pad_token_id": 0,
}  # fmt: skip


def _model(config: type[Any], **sizes: Any) -> Callable[[], Any]:
    """A causal model of ``config`` with seeded random weights, none of them zero or one."""

    def make() -> Any:
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config(**_SIZES | sizes)).eval()
        randomise(model, seed=2, size=0.05)
        return model

    return make


mixtral = _model(transformers.MixtralConfig, num_local_experts=4, intermediate_size=24)
qwen2 = _model(
    transformers.Qwen2MoeConfig, num_experts=4, moe_intermediate_size=24, shared_expert_intermediate_size=40
)
qwen3 = _model(transformers.Qwen3MoeConfig, num_experts=4, moe_intermediate_size=24, head_dim=8)
olmoe = _model(transformers.OlmoeConfig, num_experts=4, intermediate_size=16)
gpt_oss = _model(transformers.GptOssConfig, num_local_experts=4, intermediate_size=32, head_dim=8)
llama4 = _model(
    transformers.Llama4TextConfig, num_local_experts=4, intermediate_size=24, intermediate_size_mlp=40, head_dim=8,
    num_experts_per_tok=1,
)  # fmt: skip
granite = _model(transformers.GraniteMoeConfig, num_local_experts=4, intermediate_size=24)
neox = _model(transformers.GPTNeoXConfig, intermediate_size=48, tie_word_embeddings=False)


def _lora(*parameters: str, **fields: Any) -> LoraConfig:
    return LoraConfig(
        **{"r": 2, "lora_alpha": 6, "target_modules": [], "target_parameters": list(parameters)} | fields
    )


def _version_4(make: Callable[[], Any], experts: str, gate: str, layers: tuple[str, ...], again: bool) -> Any:
    """An adapter as of transformers 4, where each layer of an expert was a module, with a LoRA of its own.

    The expected outputs are PEFT's, which fuses the factors as it loads them: A on top of each other, and B block
    by block. ``again``: the adapter is what PEFT then saves.
    """

    def build(folder: Path) -> Built:
        base = make()
        base.save_pretrained(folder / "base")
        stored = load_file(folder / "base" / "model.safetensors")
        generator = torch.Generator().manual_seed(1)
        tensors = {}
        for name, weight in stored.items():
            if (experts in name and name.split(".")[-2] in layers) or name.endswith((gate, "q_proj.weight")):
                for part, shape in {"A": (2, weight.shape[1]), "B": (weight.shape[0], 2)}.items():
                    key = f"base_model.model.{name.removesuffix('weight')}lora_{part}.weight"
                    tensors[key] = 0.2 * torch.randn(shape, generator=generator)
        adapter = folder / "adapter"
        targets = [*layers, gate.split(".")[-2], "q_proj"]
        LoraConfig(r=2, lora_alpha=6, target_modules=targets).save_pretrained(adapter)
        save_file(tensors, adapter / "adapter_model.safetensors")
        model = peft.PeftModel.from_pretrained(base, adapter)
        expected = logits(model)
        if again:
            adapter = folder / "saved"
            model.save_pretrained(adapter)
        return Built(folder / "base", adapter, expected, run_causal)

    return build


def _bfloat16(make: Callable[[], Any], config: LoraConfig) -> Callable[[Path], Built]:
    """A case of a bfloat16 base, whose outputs are those of the same weights in float32."""

    def run(folder: Path) -> torch.Tensor:
        return logits(transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))

    def build(folder: Path) -> Built:
        base = make().to(torch.bfloat16)
        base.save_pretrained(folder / "base")
        model = peft.get_peft_model(base, config)
        randomise(model)
        model.save_pretrained(folder / "adapter")
        return Built(folder / "base", folder / "adapter", logits(model.float()), run)

    return build


def _before_0_19(make: Callable[[], Any], release: str, *parameters: str) -> Callable[[Path], Built]:
    """An adapter as PEFT before 0.19.1 writes it, which takes a stack (E, out, in) as (experts, in, out).

    The delta is that release's own expression (lora/layer.py, `ParamWrapper.get_delta_weight`), added by hand.
    """

    def build(folder: Path) -> Built:
        base = make()
        base.save_pretrained(folder / "base")
        config = _lora(*parameters)
        config.peft_version = release
        config.save_pretrained(folder / "adapter")
        generator = torch.Generator().manual_seed(1)
        tensors = {}
        for layer, block in enumerate(base.model.layers):
            for depth, name in enumerate(reversed(parameters)):
                weight = getattr(block.mlp.experts, name)
                experts, rows, columns = weight.shape
                A, B = (
                    0.2 * torch.randn(size, generator=generator)
                    for size in ((2 * experts, rows), (columns, 2 * experts))
                )
                delta = torch.einsum("ore,eri->eio", B.reshape(columns, 2, experts), A.reshape(experts, 2, rows))
                weight.data += 3.0 * delta
                key = f"base_model.model.model.layers.{layer}.mlp.experts{'.base_layer' * depth}.lora_"
                tensors |= {f"{key}A.weight": A, f"{key}B.weight": B}
        save_file(tensors, folder / "adapter" / "adapter_model.safetensors")
        return Built(folder / "base", folder / "adapter", logits(base), run_causal)

    return build


_MIXTRAL_4 = (mixtral, ".block_sparse_moe.experts.", "block_sparse_moe.gate.weight", ("w1", "w2", "w3"))
_QWEN_4 = (qwen3, ".mlp.experts.", "mlp.gate.weight", ("gate_proj", "up_proj", "down_proj"))


def _case(variant: str, make: Callable[[], Any], config: LoraConfig, **fields: Any) -> Case:
    return Case(f"`target_parameters`: {variant}", "PEFT", peft_adapter(make, config), **fields)


_FUSED = "transformers 5 fuses the experts in memory, and writes them apart"

CASES = [
    _case("Mixtral, with attention", mixtral, _lora(*_EXPERTS, target_modules=["q_proj", "v_proj"]), note=_FUSED),
    Case("`target_parameters`: Mixtral, bfloat16 base", "PEFT", _bfloat16(mixtral, _lora(*_EXPERTS)), tolerance=1e-2),
    _case(
        "Qwen2-MoE, rsLoRA, router and shared expert",
        qwen2,
        _lora(*_EXPERTS, "gate.weight", use_rslora=True, target_modules=["shared_expert.down_proj"]),
        note=_FUSED,
    ),
    _case(
        "Qwen3-MoE, rank and alpha patterns",
        qwen3,
        _lora(
            "gate_up_proj",
            "down_proj",
            rank_pattern={"experts.down_proj": 3, r".*1\.mlp.*up_proj": 1},
            alpha_pattern={"layers.0.mlp.experts.gate_up_proj": 5},
        ),
        note="PEFT warns that it ignores the patterns, and does not",
    ),
    _case("OLMoE, square, one of two", olmoe, _lora("experts.gate_up_proj"), note=_FUSED),
    _case("GPT-OSS, (in, out) on disk", gpt_oss, _lora(*_EXPERTS, target_modules=["q_proj"])),
    _case(
        "GPT-OSS, every parameter",
        gpt_oss,
        _lora(*_EXPERTS, "gate_up_proj_bias", "down_proj_bias", "router.weight", bias="lora_only"),
    ),
    _case("GPT-OSS, square alone", gpt_oss, _lora("experts.down_proj"), refused="square matrices"),
    _case("Llama 4", llama4, _lora("gate_up_proj", "down_proj")),
    _case("Granite MoE, other names on disk", granite, _lora(*_EXPERTS, "router.weight")),
    _case("plain matrices", llama, _lora("q_proj.weight", "embed_tokens.weight", target_modules=["v_proj"])),
    _case("Conv1D (GPT-2), which is not transposed", gpt2, _lora("c_attn.weight", "attn.c_proj.weight")),
    Case(
        "`target_parameters` of PEFT 0.18: Qwen3-MoE",
        "PEFT",
        _before_0_19(qwen3, "0.18.1", "gate_up_proj", "down_proj"),
        note="it takes (out, in) for (in, out), and trains and merges so; written by hand",
    ),
    Case(
        "`target_parameters` of PEFT 0.19.0: OLMoE, square",
        "PEFT",
        _before_0_19(olmoe, "0.19.0", "gate_up_proj"),
        note="as 0.18; written by hand",
    ),
    Case("Experts as modules (transformers 4): Mixtral", "PEFT", _version_4(*_MIXTRAL_4, False)),
    Case("Experts as modules (transformers 4): Qwen3-MoE", "PEFT", _version_4(*_QWEN_4, False)),
    Case(
        "Experts as modules, fused and saved again: Mixtral",
        "PEFT",
        _version_4(*_MIXTRAL_4, True),
        note="B of gate and up is block-diagonal, of twice the rank",
    ),
    Case("Experts as modules, fused and saved again: Qwen3-MoE", "PEFT", _version_4(*_QWEN_4, True)),
    Case(
        "A head under another name on disk (GPT-NeoX)",
        "PEFT",
        peft_adapter(neox, LoraConfig(r=2, target_modules=["lm_head", "dense"])),
    ),
]
