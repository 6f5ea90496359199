"""Values in an adapter's config that no training writes, and shapes of nothing: refused by name on push."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from refusal import refused

import loreg
from loreg.errors import BadInput, LoregError

PREFIX = f"base_model.model.{tiny.V}"  # a layer of (6, 6)
LOHA = {"hada_w1_a": (6, 2), "hada_w1_b": (2, 6), "hada_w2_a": (6, 2), "hada_w2_b": (2, 6)}
LOKR = {"lokr_w1": (2, 2), "lokr_w2": (3, 3)}
LORA = {"lora_A.weight": (2, 6), "lora_B.weight": (6, 2)}

Shapes = dict[str, tuple[int, ...]]


def _adapter(folder: Path, kind: str, shapes: Shapes, **config: Any) -> Path:
    usual = {"r": 2, "alpha": 2, "target_modules": ["v_proj"]} if kind in ("LOHA", "LOKR") else {}
    usual = {"r": 2, "lora_alpha": 2, "target_modules": ["v_proj"]} if kind == "LORA" else usual
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": kind, **usual, **config}))
    tensors = {f"{PREFIX}.{key}": tiny.tensor("F32", np.ones(shape)) for key, shape in shapes.items()}
    (folder / "adapter_model.safetensors").write_bytes(tiny.container(tensors.items(), {}))
    return folder


def _blocks(**blocks: Any) -> dict[str, Any]:
    return {"use_bdlora": {"target_modules_bd_a": None, "target_modules_bd_b": None, "nblocks": 2, **blocks}}


BAD: dict[str, tuple[str, Shapes, dict[str, Any], str]] = {
    **{
        f"{kind}: a rank of {rank}": (
            kind,
            shapes,
            {"rank_pattern": {"v_proj": rank}},
            f"{tiny.V}.*rank_pattern of the config gives it the rank {rank}: expected a whole number of at least 1",
        )
        for kind, shapes in (("LOHA", LOHA), ("LOKR", LOKR))
        for rank in (0, -1, 1.5)
    },
    "blocks: a list": ("LORA", LORA, {"use_bdlora": [1]}, "use_bdlora: expected an object"),
    "blocks: a flag": ("LORA", LORA, {"use_bdlora": True}, "use_bdlora: expected an object"),
    "blocks: text": ("LORA", LORA, {"use_bdlora": "x"}, "use_bdlora: expected an object"),
    "blocks: none": ("LORA", LORA, _blocks(nblocks=0), "nblocks: expected a whole number of at least 1, found 0"),
    "blocks: less": ("LORA", LORA, _blocks(nblocks=-2), "nblocks: expected a whole number of at least 1"),
    "blocks: a half": ("LORA", LORA, _blocks(nblocks=0.5), "nblocks: expected a whole number of at least 1"),
    "blocks: null": ("LORA", LORA, _blocks(nblocks=None), "nblocks: expected a whole number of at least 1"),
    "blocks: names as text": (
        "LORA", LORA, _blocks(target_modules_bd_b="v_proj"), "bd_b: expected a list of parts of names",
    ),
    "blocks: names as a number": (
        "LORA", LORA, _blocks(target_modules_bd_a=5), "bd_a: expected a list of parts of names",
    ),
    "blocks: of both factors": (
        "LORA", LORA, _blocks(target_modules_bd_a=["v_proj"], target_modules_bd_b=["v_proj"]), "for both factors",
    ),
    "blocks: of both factors, by two names": (
        "LORA", LORA, _blocks(target_modules_bd_a=["v_proj"], target_modules_bd_b=["self_attn"]), "for both factors",
    ),
    "blocks: more than rows": (
        "LORA", LORA, _blocks(nblocks=5, target_modules_bd_b=["v_proj"]), "expected A .rank, in.",
    ),
    "(IA)³ of no inputs": ("IA3", {"ia3_l": (1, 0)}, {"feedforward_modules": ["v_proj"]}, "l. has shape .1, 0."),
    "(IA)³ of no outputs": ("IA3", {"ia3_l": (0, 1)}, {"feedforward_modules": []}, r"of shape .0, 'any'."),
    "layers as text": ("LORA", LORA, {"layers_to_transform": "0"}, "layers_to_transform: expected a whole number"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_a_bad_value_is_refused(registry: loreg.Registry, tiny_base: Path, tmp_path: Path, what: str) -> None:
    kind, shapes, config, message = BAD[what]
    folder = _adapter(tmp_path / "bad", kind, shapes, **config)
    with refused(registry, tmp_path / "out", BadInput, message, 5):
        registry.push(folder, base=tiny_base)


@pytest.mark.parametrize(
    ("kind", "shapes", "config"),
    [
        ("LOHA", LOHA, {"rank_pattern": {"v_proj": 2, "k_proj": 3}}),
        ("LOKR", LOKR, {"rank_pattern": {"v_proj": 3}}),
        ("LORA", LORA, {"use_bdlora": None}),
        ("LORA", LORA, _blocks()),
        ("LORA", {"lora_A.weight": (2, 3), "lora_B.weight": (6, 2)}, _blocks(target_modules_bd_a=["v_proj"])),
        ("IA3", {"ia3_l": (1, 6)}, {"feedforward_modules": ["v_proj"]}),
        ("LORA", LORA, {"layers_to_transform": 0}),
    ],
)
def test_a_good_one_is_not(
    registry: loreg.Registry, tiny_base: Path, tmp_path: Path, kind: str, shapes: Shapes, config: dict[str, Any]
) -> None:
    assert registry.push(_adapter(tmp_path / "good", kind, shapes, **config), base=tiny_base).created


def test_a_bias_of_lora_needs_one_in_the_base(registry: loreg.Registry, tiny_base: Path, tmp_path: Path) -> None:
    folder = _adapter(tmp_path / "bad", "LORA", LORA | {"lora_B.bias": (6,)}, lora_bias=True)
    message = (
        rf"'{PREFIX}\.lora_B\.bias' of the adapter is added to a bias, and the layer '{tiny.V}' of the base has none"
    )
    with pytest.raises(LoregError, match=message) as caught:
        registry.push(folder, base=tiny_base)
    assert "lora_bias=False" in str(caught.value)
    assert type(caught.value) is BadInput
    assert not registry.list_versions()
