"""What ``preflight`` says of vLLM, and what vLLM's own classes do with the same directories; no engine is started."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

pytest.importorskip("vllm.lora.lora_model", reason="vLLM is not installed: make test-vllm or make contract-vllm")

import torch
from vllm.config.lora import LoRAConfig
from vllm.lora.lora_model import LoRAModel
from vllm.lora.peft_helper import PEFTHelper

import loreg
from loreg import serving
from loreg.serving.engines import ENGINES

RNG = np.random.default_rng(0)
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
MODULES = {"q_proj", "v_proj", "embed_tokens", "lm_head"}
BASE = {**{k: v for k, v in tiny.model(dtype="F32").items() if not k.endswith("bias")}}
WIDE = {tiny.Q: tiny.factors(RNG, 8, 6, 32), tiny.V: tiny.factors(RNG, 6, 6, 32)}
MIXED = {tiny.Q: tiny.factors(RNG, 8, 6, 4), tiny.V: tiny.factors(RNG, 6, 6, 2)}


def normal(*shape: int) -> tiny.Tensor:
    return tiny.normal(RNG, "F32", *shape)


CASES: Mapping[str, dict[str, Any]] = {
    "plain": {},
    "rsLoRA": {"use_rslora": True},
    "patterns": {"modules": MIXED, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"v_proj": 3}},
    "a wide rank": {"modules": WIDE},
    "an idle rank": {"rank_pattern": {"k_proj": 64}},
    "an idle bias": {"bias": "all"},
    "an idle module": {"modules_to_save": ["nothing"]},
    "lora_bias": {"modules": {**tiny.adapter(), tiny.Q: tiny.adapter()[tiny.Q]._replace(bias=normal(8)),
                              tiny.V: tiny.adapter()[tiny.V]._replace(bias=normal(6))}, "lora_bias": True},
    "DoRA": {"use_dora": True, "more": {f"{tiny.Q}.lora_magnitude_vector": normal(8),
                                        f"{tiny.V}.lora_magnitude_vector": normal(6)}},
    "a head": {"more": {f"{HEAD}.weight": normal(10, 6)}, "modules_to_save": [HEAD]},
    "a classifier": {"more": {"score.weight": normal(3, 6)}, "modules_to_save": ["score"]},
    "two classifiers": {"more": {"score.weight": normal(3, 6), "classifier.weight": normal(3, 6)},
                        "modules_to_save": ["score", "classifier"]},
    "a norm": {"more": {tiny.NORM: normal(6)}, "modules_to_save": ["norm"]},
    "rows": {"more": {f"{EMBEDDING}.token_adapter.trainable_tokens_delta": normal(2, 6)},
             "trainable_token_indices": [1, 2]},
    "an embedding": {"target_modules": ["q_proj", "v_proj", "embed_tokens"],
                     "more": {f"{EMBEDDING}.lora_embedding_A": normal(2, 10),
                              f"{EMBEDDING}.lora_embedding_B": normal(6, 2)}},
    "a carried embedding": {"more": {f"{EMBEDDING}.weight": BASE[f"{EMBEDDING}.weight"]}},
    "more than the adapter": {"velora_config": {"num_groups": 1},
                              "more": {f"{tiny.Q}.lora_velora_embed": normal(2, 2)}},
}  # fmt: skip


def pushed(registry: loreg.Registry, folder: Path, case: Mapping[str, Any]) -> None:
    biased = {f"{tiny.Q}.bias": normal(8), f"{tiny.V}.bias": normal(6)} if case.get("lora_bias") else {}
    registry.add_base(tiny.write_model(folder / "base", {**BASE, **biased}), "base")
    said = {key: value for key, value in case.items() if key not in ("modules", "more")}
    tiny.write_adapter(folder / "adapter", case.get("modules") or tiny.adapter(), **said)
    weights = folder / "adapter" / "adapter_model.safetensors"
    more = {f"base_model.model.{name}": value for name, value in case.get("more", {}).items()}
    weights.write_bytes(tiny.container({**tiny.contents(weights), **more}.items(), {"format": "pt"}))
    registry.push(folder / "adapter", base="base", name="sql")


def loaded(folder: Path, rank: int) -> LoRAModel:
    """As ``WorkerLoRAManager._load_adapter`` does, for a model that has these layers. Raises what vLLM does."""
    helper = PEFTHelper.from_local_dir(str(folder), None)
    helper.validate_legal(LoRAConfig(max_lora_rank=rank))
    return LoRAModel.from_local_checkpoint(
        str(folder), MODULES, helper, lora_model_id=1, device="cpu", dtype=torch.float64, model_vocab_size=10
    )


@pytest.mark.parametrize("rank", [16, 32])
@pytest.mark.parametrize("name", CASES)
def test_vllm_refuses_what_it_is_said_to_and_reads_the_rest_as_it_is(
    name: str, rank: int, registry: loreg.Registry, tmp_path: Path
) -> None:
    pushed(registry, tmp_path, CASES[name])
    said = serving.preflight("sql", "vllm", registry, max_lora_rank=rank)
    folder = serving.resolve("sql", registry).path
    if said.ok:
        check_products(loaded(folder, rank), registry)
    else:
        assert {finding.effect for finding in said.findings} == {"refuses"}
        with pytest.raises(ValueError):
            loaded(folder, rank)
    if said.form == "folded":
        check_products(loaded(serving.resolve("sql", registry, form="folded").path, rank), registry)


def check_products(found: LoRAModel, registry: loreg.Registry) -> None:
    modules = list(registry.resolve("sql").manifest.modules)
    expected = serving.load("sql", registry, dtype=torch.float64, modules=modules)
    assert set(found.loras) == set(expected)
    for path, (A, B, scale) in expected.items():
        theirs = found.loras[path]
        product = theirs.scaling * theirs.lora_b @ theirs.lora_a
        torch.testing.assert_close(product, scale * B @ A, rtol=1e-6, atol=1e-8, msg=path)


def test_its_ranks_are_these() -> None:
    allowed = LoRAConfig.__annotations__["max_lora_rank"].__args__
    for rank in range(1, 1025):
        check = ENGINES["vllm"].limits["max_lora_rank"]
        if rank in allowed:
            assert check("max_lora_rank", rank) == rank
        else:
            with pytest.raises(loreg.LoregError):
                check("max_lora_rank", rank)
    assert json.dumps(LoRAConfig().max_lora_rank) == "16"
