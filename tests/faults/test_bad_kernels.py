"""Tensors that have the number of elements that a layer wants, in another order: refused, never reshaped."""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from loreg import adapters
from loreg.adapters.binding import bind
from loreg.adapters.bound import Binding
from loreg.digest import Digest
from loreg.errors import BadInput
from loreg.format.fingerprint import BaseTensor

Shapes = Mapping[str, tuple[int, ...]]

OUT, IN, KERNEL = 6, 4, (3, 1)
BASE = {
    f"net.{name}.weight": BaseTensor(f"net.{name}.weight", "F32", shape, 0, Digest.of(b""))
    for name, shape in {"x": (OUT, IN, *KERNEL), "y": (OUT, IN * 3)}.items()
}


def _tensors(shapes: Shapes, prefix: str) -> bytes:
    numbers = np.random.default_rng(0)
    dtypes = {"on_input": "I64"}
    return tiny.container(
        (
            (f"{prefix}{key}", tiny.tensor(dtypes.get(key, "F32"), numbers.integers(1, 2, shape)))
            for key, shape in shapes.items()
        ),
        {},
    )


def _bind(folder: Path, kind: str, shapes: Shapes, module: str = "x", **config: Any) -> Binding:
    """The adapter with tensors of these shapes, on ``net.x``, a convolution, or ``net.y``, a matrix."""
    if kind == "LYCORIS":
        data = _tensors(shapes, f"lycoris_net_{module}.")
    else:
        data = _tensors(shapes, f"base_model.model.net.{module}.")
        usual = {"peft_type": kind, "target_modules": [module]}
        (folder / "adapter_config.json").write_text(json.dumps(usual | config))
    (folder / "adapter_model.safetensors").write_bytes(data)
    return bind(adapters.read(folder), BASE, {})


LORA = {"r": 2, "lora_alpha": 4}
LOHA = {"r": 2, "alpha": 4}
CORES = {"hada_w1_a": (2, OUT), "hada_w1_b": (2, IN), "hada_w2_a": (2, OUT), "hada_w2_b": (2, IN)}
DOWN, UP = "lora_down.weight", "lora_up.weight"
IA3_IN = {"feedforward_modules": ["x"]}

# What is right, and the same with one tensor changed in a way that keeps the number of its elements.
RIGHT: dict[str, tuple[str, dict[str, Any], Shapes]] = {
    "lora": ("LORA", LORA, {"lora_A.weight": (2, IN, *KERNEL), "lora_B.weight": (OUT, 2, 1, 1)}),
    "dora": (
        "LORA",
        LORA | {"use_dora": True},
        {
            "lora_A.weight": (2, IN, *KERNEL),
            "lora_B.weight": (OUT, 2, 1, 1),
            "lora_magnitude_vector.weight": (1, OUT, 1, 1),
        },
    ),
    "adalora": (
        "ADALORA", {"init_r": 2, "lora_alpha": 4},
        {"lora_A": (2, IN * 3), "lora_B": (OUT, 2), "lora_E": (2, 1)},
    ),
    "loha cores": ("LOHA", LOHA, CORES | {"hada_t1": (2, 2, *KERNEL), "hada_t2": (2, 2, *KERNEL)}),
    "lokr": ("LOKR", LOHA, {"lokr_w1": (2, 2), "lokr_w2": (3, 2, *KERNEL)}),
    "lokr core": (
        "LOKR", LOHA,
        {"lokr_w1": (2, 2), "lokr_w2_a": (2, 3), "lokr_w2_b": (2, 2), "lokr_t2": (2, 2, *KERNEL)},
    ),
    "ia3 in": ("IA3", IA3_IN, {"ia3_l": (1, IN, 1, 1)}),
    "ia3 out": ("IA3", {"feedforward_modules": []}, {"ia3_l": (1, OUT, 1, 1)}),
    "locon": ("LYCORIS", {}, {DOWN: (2, IN, *KERNEL), UP: (OUT, 2, 1, 1)}),
    "locon core": ("LYCORIS", {}, {DOWN: (2, IN, 1, 1), UP: (OUT, 2, 1, 1), "lora_mid.weight": (2, 2, *KERNEL)}),
    "locon dora": (
        "LYCORIS", {}, {DOWN: (2, IN, *KERNEL), UP: (OUT, 2, 1, 1), "dora_scale": (OUT, 1, 1, 1)},
    ),
    "locon dora in": (
        "LYCORIS", {}, {DOWN: (2, IN, *KERNEL), UP: (OUT, 2, 1, 1), "dora_scale": (1, IN, 1, 1)},
    ),
    "full": ("LYCORIS", {}, {"diff": (OUT, IN, *KERNEL)}),
    "whole lokr": ("LYCORIS", {}, {"lokr_w1": (2, 2), "lokr_w2": (3, 2, *KERNEL)}),
    "lycoris ia3": ("LYCORIS", {}, {"weight": (1, IN, 1, 1), "on_input": ()}),
}  # fmt: skip

WRONG: list[tuple[str, str, tuple[int, ...], str]] = [
    ("lora", "lora_A.weight", (2, IN, 1, 3), r"A with a kernel of \[3, 1\].*found \[2, 4, 1, 3\]"),
    ("lora", "lora_A.weight", (2, 3, IN, 1), "A with a kernel"),
    ("lora", "lora_A.weight", (2, IN * 3, 1, 1), "A with a kernel"),
    ("lora", "lora_B.weight", (OUT, 1, 2, 1), "B has shape .6, 1, 2, 1.|B without"),
    ("dora", "lora_magnitude_vector.weight", (2, 3, 1, 1), "magnitude of one number after another"),
    ("adalora", "lora_A", (2, IN, *KERNEL), "A without a kernel"),
    ("loha cores", "hada_t1", (2, 2, 1, 3), "kernel"),
    ("loha cores", "hada_w1_b", (2, 2, 2), "w1_b without a kernel"),
    ("lokr", "lokr_w2", (3, 2, 1, 3), "w2 with a kernel"),
    ("lokr", "lokr_w2", (3, 6), "w2 with a kernel"),
    ("lokr core", "lokr_t2", (2, 2, 1, 3), "t2 with a kernel"),
    ("ia3 in", "ia3_l", (1, 1, IN, 1), "ia3_l of 4 dimensions"),
    ("ia3 in", "ia3_l", (1, IN), "ia3_l of 4 dimensions"),
    ("ia3 out", "ia3_l", (OUT, 1, 1, 1), "ia3_l of 4 dimensions"),
    ("locon", DOWN, (2, IN, 1, 3), "A with a kernel"),
    ("locon", DOWN, (2, IN * 3), "A with a kernel"),
    ("locon", UP, (OUT, 1, 2, 1), "B without a kernel"),
    ("locon core", "lora_mid.weight", (2, 2, 1, 3), "mid with a kernel"),
    ("locon core", DOWN, (2, 2, 2, 1), "down without a kernel"),
    ("locon core", UP, (OUT, 1, 2, 1), "up without a kernel"),
    ("locon dora", "dora_scale", (OUT, 1), "dora_scale' has shape .6, 1.*expected 4 dimensions"),
    ("locon dora", "dora_scale", (1, 1, OUT, 1), "dora_scale of shape"),
    ("locon dora in", "dora_scale", (1, IN, 1), "expected 4 dimensions"),
    ("full", "diff", (OUT, IN, 1, 3), "value with a kernel"),
    ("full", "diff", (OUT, 3, 1, IN), "value with a kernel"),
    ("full", "diff", (OUT, IN * 3), "value with a kernel"),
    ("whole lokr", "lokr_w2", (3, 2, 1, 3), "w2 with a kernel"),
    ("lycoris ia3", "weight", (IN, 1, 1, 1), "all but number 2 of 1"),
    ("lycoris ia3", "weight", (IN,), "expected 4 dimensions"),
]


@pytest.mark.parametrize("what", RIGHT)
def test_a_convolution_of_the_same_kernel_is_taken(tmp_path: Path, what: str) -> None:
    kind, config, shapes = RIGHT[what]
    assert _bind(tmp_path, kind, shapes, **config).modules["net.x"].stored == (OUT, IN, *KERNEL)


@pytest.mark.parametrize(("what", "key", "shape", "message"), WRONG, ids=[f"{w}-{k}-{s}" for w, k, s, _ in WRONG])
def test_a_convolution_of_another_kernel_is_refused(
    tmp_path: Path, what: str, key: str, shape: tuple[int, ...], message: str
) -> None:
    kind, config, shapes = RIGHT[what]
    assert prod(shape) == prod(shapes[key])
    with pytest.raises(BadInput, match=message):
        _bind(tmp_path, kind, {**shapes, key: shape}, **config)


def test_a_kernel_is_no_part_of_a_matrix(tmp_path: Path) -> None:
    """12 inputs, and 4 channels of a kernel of 3: as many numbers, in an order that nobody knows."""
    with pytest.raises(BadInput, match="A without a kernel"):
        _bind(tmp_path, "LORA", {"lora_A.weight": (2, 4, 3, 1), "lora_B.weight": (OUT, 2, 1, 1)}, "y", **LORA)


def test_a_kernel_of_one_is_taken_for_a_matrix(tmp_path: Path) -> None:
    """Layers that were 1×1 convolutions and are linear now, as in diffusers' attention: nothing is guessed there."""
    shapes = {"lora_A.weight": (2, 12, 1, 1), "lora_B.weight": (OUT, 2, 1, 1)}
    assert _bind(tmp_path, "LORA", shapes, "y", **LORA).modules["net.y"].out_in == (OUT, 12)


def test_ia3_of_a_convolution_is_none_of_a_matrix(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="ia3_l of 2 dimensions"):
        _bind(tmp_path, "IA3", {"ia3_l": (1, 12, 1, 1)}, "y", feedforward_modules=["y"])


def test_vera_has_no_convolution(tmp_path: Path) -> None:
    """PEFT has none; cut to the size of the weight its A would fit."""
    shapes = {"net.x.vera_lambda_b": (OUT,), "net.x.vera_lambda_d": (2,)}
    keys = {f"base_model.model.{key}": shape for key, shape in shapes.items()}
    keys |= {"base_model.vera_A": (2, IN * 3), "base_model.vera_B": (OUT, 2)}
    (tmp_path / "adapter_model.safetensors").write_bytes(_tensors(keys, ""))
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "VERA", "r": 2, "save_projection": True}))
    with pytest.raises(BadInput, match="A with a kernel"):
        bind(adapters.read(tmp_path), BASE, {})
