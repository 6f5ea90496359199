"""What is not handled is refused by name, with the right class of error, and nothing is stored."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from peer_edits import Edit, with_config, with_tensors
from peer_models import FAMILIES, BaseOf, load_model, save_adapter
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from sqlalchemy import func, select

from loreg.adapters.peft.config import COMMON
from loreg.adapters.peft.lora_fields import HANDLED, HARMLESS, REFUSED
from loreg.catalog.models import Adapter, Blob, Edge, Intent, Lease, Tag, Version
from loreg.errors import BadInput, LoregError, NotFound, Unsupported
from loreg.registry import Registry

_LORA: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]}


def _stored(registry: Registry) -> dict[str, int]:
    """How many rows of each table, and how many files in the store: a refusal must leave all as it was."""
    tables = (Blob, Edge, Version, Adapter, Tag, Lease, Intent)
    with registry.database.read() as session:
        rows = {table.__tablename__: session.scalar(select(func.count()).select_from(table)) for table in tables}
    files = sum(path.is_file() for path in (registry.home / "blobs").rglob("*"))
    return {**rows, "files": files}


def _refused(registry: Registry, base: Path, adapter: Path, kind: type[LoregError], *words: str) -> None:
    registry.add_base(base, name="tiny")
    before = _stored(registry)
    with pytest.raises(LoregError) as caught:
        registry.push(adapter, base="tiny", name="refused")
    assert type(caught.value) is kind, repr(caught.value)
    for word in words:
        assert word.lower() in str(caught.value).lower()
    assert _stored(registry) == before
    with pytest.raises(NotFound):
        registry.resolve("refused")


@dataclass(frozen=True)
class Peer:
    """A configuration of PEFT's that is not handled, and words that the refusal must say."""

    config: Callable[[], Any]
    words: tuple[str, ...]
    kind: type[LoregError] = Unsupported


PEERS = {
    "pissa": Peer(
        lambda: LoraConfig(**_LORA, init_lora_weights="pissa"), ("init_lora_weights", "pissa", "--initial")
    ),
    "olora": Peer(
        lambda: LoraConfig(**_LORA, init_lora_weights="olora"), ("init_lora_weights", "olora", "--initial")
    ),
    "layer-replication": Peer(
        lambda: LoraConfig(**_LORA, layer_replication=[[0, 2], [0, 2]]), ("layer_replication", "several times")
    ),
    "alora": Peer(
        lambda: LoraConfig(**_LORA, alora_invocation_tokens=[5, 6]), ("alora_invocation_tokens", "no weight")
    ),
    "prompts": Peer(
        lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), ("peft_type", "PROMPT_TUNING")
    ),
}

# Methods that are handled, by a config of their own.
OTHERS = {
    "dora": lambda: LoraConfig(**_LORA, use_dora=True),
    "trainable-tokens": lambda: LoraConfig(**_LORA, trainable_token_indices=[1, 2]),
    "loha": lambda: peft.LoHaConfig(r=4, target_modules=["q_proj"]),
    "lokr": lambda: peft.LoKrConfig(r=4, target_modules=["q_proj"]),
    "vera": lambda: peft.VeraConfig(r=4, target_modules=["o_proj"]),
    "ia3": lambda: peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "adalora": lambda: peft.AdaLoraConfig(target_modules=["q_proj"], total_step=10),
}


@pytest.mark.parametrize("name", PEERS)
def test_variants_that_peft_writes(name: str, registry: Registry, base_of: BaseOf, tmp_path: Path) -> None:
    peer, base = PEERS[name], base_of("llama", "fp32")
    model = get_peft_model(load_model("llama", base, torch.float32), peer.config())
    model.save_pretrained(tmp_path / "adapter")
    _refused(registry, base, tmp_path / "adapter", peer.kind, *peer.words)


@pytest.mark.parametrize("name", OTHERS)
def test_their_tensors_without_their_config(name: str, registry: Registry, base_of: BaseOf, tmp_path: Path) -> None:
    """A config that lies, or lost its fields, must not turn the tensors of another method into a plain LoRA."""
    base = base_of("llama", "fp32")
    get_peft_model(load_model("llama", base, torch.float32), OTHERS[name]()).save_pretrained(tmp_path / "adapter")
    plain = save_adapter("llama", base, tmp_path / "plain", "fp32", **_LORA)
    shutil.copyfile(plain / "adapter_config.json", tmp_path / "adapter" / "adapter_config.json")
    _refused(registry, base, tmp_path / "adapter", Unsupported)


def test_adapter_of_another_architecture(registry: Registry, base_of: BaseOf, tmp_path: Path) -> None:
    adapter = save_adapter("llama", base_of("llama", "fp32"), tmp_path / "adapter", "fp32", **_LORA)
    _refused(registry, base_of("roberta", "fp32"), adapter, BadInput, "layers.0", "another base")


def test_adapter_of_another_size(registry: Registry, base_of: BaseOf, tmp_path: Path) -> None:
    config = transformers.LlamaConfig(**{**FAMILIES["llama"].config().to_diff_dict(), "intermediate_size": 40})
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "other")
    adapter = save_adapter("llama", base_of("llama", "fp32"), tmp_path / "adapter", "fp32", **_LORA)
    _refused(registry, tmp_path / "other", adapter, BadInput, "down_proj", "40", "48")


_KEY = "base_model.model.model.layers.0.self_attn.q_proj"


def _with_nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{_KEY}.lora_B.weight"][3, 1] = float("nan")


def _with_infinity(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{_KEY}.lora_A.weight"][0, 0] = float("inf")


def _with_a_stranger(tensors: dict[str, torch.Tensor]) -> None:
    tensors["base_model.model.model.layers.0.self_attn.q_proj.gate"] = torch.ones(3)


def _with_an_unknown_part(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{_KEY}.lora_C.weight"] = torch.ones(4, 4)


def _with_an_untrained_copy(tensors: dict[str, torch.Tensor]) -> None:
    tensors["base_model.model.lm_head.original_module.bias"] = torch.ones(96)


def _with_another_copy(tensors: dict[str, torch.Tensor]) -> None:
    tensors["base_model.model.lm_head.weight"] = torch.ones(96, 32)
    tensors["base_model.model.lm_head.modules_to_save.weight"] = torch.zeros(96, 32)


def _with_a_magnitude(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{_KEY}.lora_magnitude_vector"] = torch.ones(32)


def _without_half(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[f"{_KEY}.lora_B.weight"]


def _with_another_rank(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{_KEY}.lora_B.weight"] = torch.ones(32, 5)


def _with_integers(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{_KEY}.lora_B.weight"] = torch.ones(32, 4, dtype=torch.int8)


def _without_a_prefix(tensors: dict[str, torch.Tensor]) -> None:
    tensors[_KEY.removeprefix("base_model.model.") + ".lora_A.weight"] = tensors.pop(f"{_KEY}.lora_A.weight")


def _truncated(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])


DAMAGED: dict[str, tuple[Edit, type[LoregError], tuple[str, ...]]] = {
    "unknown-field": (with_config(use_quantum_rank=True), Unsupported, ("use_quantum_rank",)),
    "no-r": (with_config(r=...), BadInput, ("r",)),
    "no-alpha": (with_config(lora_alpha=...), BadInput, ("lora_alpha",)),
    "r-is-zero": (with_config(r=0), BadInput, ("r",)),
    "alpha-is-text": (with_config(lora_alpha="8"), BadInput, ("lora_alpha",)),
    "pattern-is-no-regex": (with_config(alpha_pattern={"q_proj(": 4}), BadInput, ("alpha_pattern", "q_proj(")),
    "patterns-that-old-peft-reads-otherwise": (
        with_config(rank_pattern={"q_proj": 4}, alpha_pattern={"layers.1.self_attn.q_proj": 16}, peft_version=None),
        Unsupported,
        ("alpha_pattern", "older"),
    ),
    "pattern-is-text": (with_config(rank_pattern={"q_proj": "4"}), BadInput, ("rank_pattern",)),
    "qalora": (with_config(use_qalora=True), Unsupported, ("use_qalora",)),
    "loftq": (with_config(loftq_config={"loftq_bits": 4}), Unsupported, ("loftq_config", "quantised")),
    "dora-without-magnitudes": (with_config(use_dora=True), BadInput, ("lora_magnitude_vector", "use_dora")),
    "magnitudes-without-dora": (with_tensors(_with_a_magnitude), Unsupported, ("lora_magnitude_vector", "use_dora")),
    "tokens-without-rows": (
        with_config(trainable_token_indices=[3]),
        BadInput,
        ("trainable_token_indices", "no trained"),
    ),
    "corda": (with_config(init_lora_weights="corda"), Unsupported, ("corda",)),
    "unknown-peft-type": (with_config(peft_type="TOMORROW"), Unsupported, ("TOMORROW",)),
    "nan": (with_tensors(_with_nan), BadInput, (f"{_KEY}.lora_B.weight", "NaN")),
    "infinity": (with_tensors(_with_infinity), BadInput, (f"{_KEY}.lora_A.weight", "infinity")),
    "nobody-consumes-it": (with_tensors(_with_a_stranger), BadInput, ("q_proj.gate",)),
    "unknown-part": (with_tensors(_with_an_unknown_part), Unsupported, ("lora_C",)),
    "untrained-copy": (with_tensors(_with_an_untrained_copy), BadInput, ("original_module", "modules_to_save")),
    "two-copies": (with_tensors(_with_another_copy), BadInput, ("modules_to_save.weight", "not the same")),
    "half-a-module": (with_tensors(_without_half), BadInput, ("q_proj", "lora_B")),
    "ranks-differ": (with_tensors(_with_another_rank), BadInput, ("q_proj", "rank")),
    "integers": (with_tensors(_with_integers), Unsupported, ("I8", "lora_B")),
    "no-prefix": (with_tensors(_without_a_prefix), Unsupported, ("base_model.model.",)),
    "truncated": (_truncated, BadInput, ("adapter_model.safetensors",)),
    "no-weights": (lambda folder: (folder / "adapter_model.safetensors").unlink(), NotFound, ("adapter_model",)),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damage(name: str, registry: Registry, base_of: BaseOf, tmp_path: Path) -> None:
    edit, kind, words = DAMAGED[name]
    base = base_of("llama", "fp32")
    adapter = save_adapter("llama", base, tmp_path / "adapter", "fp32", **_LORA)
    edit(adapter)
    _refused(registry, base, adapter, kind, *words)


def test_the_same_adapter_undamaged_is_taken(registry: Registry, base_of: BaseOf, tmp_path: Path) -> None:
    """Else every refusal above could be of something else."""
    base = base_of("llama", "fp32")
    registry.add_base(base, name="tiny")
    before = _stored(registry)
    adapter = save_adapter("llama", base, tmp_path / "adapter", "fp32", **_LORA)
    with_config(use_quantum_rank=None, use_dora=False, layer_replication=None, loftq_config={})(adapter)
    assert registry.push(adapter, base="tiny", name="taken").created
    assert _stored(registry)["versions"] == before["versions"] + 1


class _Payload:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("how", ["zip", "plain"])
def test_a_pickle_that_would_run_code(how: str, registry: Registry, base_of: BaseOf, tmp_path: Path) -> None:
    base, mark = base_of("llama", "fp32"), tmp_path / "was-run"
    adapter = save_adapter("llama", base, tmp_path / "adapter", "fp32", safe=False, **_LORA)
    path = adapter / "adapter_model.bin"
    state = torch.load(path, weights_only=True) | {"payload": _Payload(mark)}
    if how == "zip":
        torch.save(state, path)
    else:
        path.write_bytes(pickle.dumps(state))
    _refused(registry, base, adapter, BadInput, "adapter_model.bin")
    assert not mark.exists()
    with path.open("rb") as file:  # the payload is live: an unpickler that trusts it does run it
        pickle.load(file) if how == "plain" else torch.load(file, weights_only=False)
    assert mark.is_dir()


@pytest.mark.parametrize("content", [b"", b"not a pickle", b"PK\x03\x04 not a zip"], ids=["empty", "text", "zip"])
def test_a_bin_that_is_nothing(content: bytes, registry: Registry, base_of: BaseOf, tmp_path: Path) -> None:
    base = base_of("llama", "fp32")
    adapter = save_adapter("llama", base, tmp_path / "adapter", "fp32", safe=False, **_LORA)
    (adapter / "adapter_model.bin").write_bytes(content)
    _refused(registry, base, adapter, BadInput, "adapter_model.bin")


def test_every_config_field_of_this_peft_is_known_or_refused(
    registry: Registry, base_of: BaseOf, tmp_path: Path
) -> None:
    """A field that PEFT adds tomorrow, and sets, must be refused until somebody has looked at it."""
    fields = {field.name for field in dataclasses.fields(LoraConfig)}
    assert fields <= HANDLED | HARMLESS | COMMON | set(REFUSED)
    base = base_of("llama", "fp32")
    registry.add_base(base, name="tiny")
    adapter = save_adapter("llama", base, tmp_path / "adapter", "fp32", **_LORA)
    config = json.loads((adapter / "adapter_config.json").read_text())
    for key in sorted(set(config) - HANDLED - HARMLESS - COMMON):
        with_config(**(config | {key: {"something": 1}}))(adapter)
        with pytest.raises(Unsupported, match=key):
            registry.push(adapter, base="tiny", name="refused")


def test_an_ambiguous_name_is_refused(registry: Registry, tmp_path: Path) -> None:
    """Two towers, and an adapter whose names fit both once a prefix is put on: a guess may be wrong."""
    family = replace(FAMILIES["llama"])
    model = family.saved(family.config())
    tensors = {f"{tower}.{key}": value.clone() for tower in ("a", "b") for key, value in model.state_dict().items()}
    (tmp_path / "base").mkdir()
    save_file(tensors, tmp_path / "base" / "model.safetensors")
    model.save_pretrained(tmp_path / "one")
    adapter = save_adapter("llama", tmp_path / "one", tmp_path / "adapter", "fp32", **_LORA)
    _refused(registry, tmp_path / "base", adapter, BadInput, "prefix", "a.model.layers", "b.model.layers")


def test_an_embedding_that_a_model_uses_twice(registry: Registry, tmp_path: Path) -> None:
    """Whatever it is called: where an embedding may be shared, and by what is not known, it is not merged into."""
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
    sizes |= {"decoder_attention_heads": 2, "pad_token_id": 0, "decoder_start_token_id": 0, "eos_token_id": 1}
    transformers.MarianMTModel(transformers.MarianConfig(vocab_size=64, **sizes)).save_pretrained(tmp_path / "base")
    model = transformers.MarianMTModel.from_pretrained(tmp_path / "base")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["shared"]))
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    registry.push(tmp_path / "adapter", base=tmp_path / "base", name="words")
    with pytest.raises(Unsupported, match="use it twice"):
        registry.merge("words", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_square_layers_whose_orientation_nobody_tells(registry: Registry, tmp_path: Path) -> None:
    """A lone weight file says nothing of its model, and PEFT's fan_in_fan_out only of the last layer it saw."""
    config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=64, tie_word_embeddings=False)
    model = transformers.GPT2LMHeadModel(config)
    model.save_pretrained(tmp_path / "base")
    lone = (tmp_path / "base" / "model.safetensors").rename(tmp_path / "lone.safetensors")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["attn.c_proj", "lm_head"]))
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(written | {"fan_in_fan_out": False}))
    with pytest.raises(Unsupported, match="orientation"):
        registry.push(tmp_path / "adapter", base=lone, name="square")
