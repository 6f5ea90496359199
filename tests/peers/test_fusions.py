"""What ``fusions`` knows of transformers, against transformers itself; and what it refuses to guess."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from peft import LoraConfig, get_peft_model
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import MergeModulelist, WeightConverter

import loreg
from loreg.adapters import fusions
from loreg.adapters.peft import parameters
from loreg.errors import LoregError
from loreg.format.module import IN_OUT, OUT_IN
from tests import tiny

_STACKS = ("mixtral", "minimax", "phimoe", "lfm2_moe", "qwen2_moe", "qwen3_moe", "deepseek_v3", "olmoe", "glm4_moe")
_STACKS += ("jamba", "nemotron_h", "qwen3_5_moe_text", "kimi_linear", "hunyuan_v1_moe", "ernie4_5_moe")
_SOURCES = Path(transformers.__file__).parent / "models"
_CLASS = re.compile(r"^((?:@.*\n)*)class (\w+)\(.*\n((?:[ \n].*\n|\n)*)", re.MULTILINE)
_PARAMETER = re.compile(r"self\.(\w+) = nn\.Parameter\(")

EXPERTS = "model.layers.0.mlp.experts"
E, H, I, R = 3, 8, 6, 2  # noqa: E741 - the usual letters


# What transformers does


@pytest.mark.parametrize("kind", _STACKS)
def test_stacks_are_made_of_the_layers_that_transformers_makes_them_of(kind: str) -> None:
    found = {}
    for rule in get_checkpoint_conversion_mapping(kind):
        if isinstance(rule, WeightConverter) and isinstance(rule.operations[0], MergeModulelist):
            sources = [re.fullmatch(r"(.*)\.\*\.(\w+)\.weight", pattern) for pattern in rule.source_patterns]
            found[rule.target_patterns[0].rpartition(".")[2]] = tuple(match[2] for match in sources if match)
    assert found
    for parameter, pieces in found.items():
        assert pieces in fusions._PIECES[parameter]


def test_every_class_of_experts_defines_its_parameters_in_the_order_that_is_assumed() -> None:
    seen, transposed = set(), set()
    for path in _SOURCES.glob("*/modeling_*.py"):
        text = path.read_text(encoding="utf-8")
        if "down_proj" not in text or "nn.Parameter" not in text:
            continue
        for decorators, name, body in _CLASS.findall(text):
            order = [part for part in _PARAMETER.findall(body) if part in fusions._ORDER]
            if len(order) > 1:
                assert order == sorted(order, key=fusions._ORDER.index), name
                seen.add(path.parent.name)
                transposed |= {path.parent.name} if "is_transposed=True" in decorators else set()
    assert seen >= {"mixtral", "qwen3_moe", "gpt_oss", "llama4", "nemotron_h"}
    assert transposed == {"gpt_oss", "aria", "openai_privacy_filter"}
    for kind in transposed:  # a stack that transformers makes itself is never transposed
        rules = get_checkpoint_conversion_mapping(kind) or []
        assert not any(isinstance(rule, WeightConverter) for rule in rules)


@pytest.mark.parametrize(
    ("release", "expected"),
    [
        ("0.17.1", (IN_OUT, IN_OUT)),
        ("0.18.1", (IN_OUT, IN_OUT)),
        ("0.18.2.dev0@1234", (None, None)),
        ("0.19.0", (IN_OUT, OUT_IN)),
        ("0.19.1", (OUT_IN, IN_OUT)),
        ("0.21.2", (OUT_IN, IN_OUT)),
        (None, (None, None)),
    ],
)
def test_how_a_release_of_peft_takes_a_stack(release: str | None, expected: tuple[str | None, str | None]) -> None:
    assert parameters._orientations({"peft_version": release}) == expected


# What is made of it


def _stack(rng: np.random.Generator, out: int, into: int) -> tiny.Factors:
    return tiny.Factors(tiny.normal(rng, "F32", E * R, into), tiny.normal(rng, "F32", out, R * E))


def _apart(rng: np.random.Generator, prefix: str = "", intermediate: int = I) -> dict[str, tiny.Tensor]:
    shapes = {"gate_proj": (intermediate, H), "up_proj": (intermediate, H), "down_proj": (H, intermediate)}
    return {
        f"{prefix}{EXPERTS}.{expert}.{piece}.weight": tiny.normal(rng, "F32", *shape)
        for expert in range(E)
        for piece, shape in shapes.items()
    }


def _levels(rng: np.random.Generator, intermediate: int = I) -> dict[str, tiny.Factors]:
    return {
        f"{EXPERTS}.base_layer": _stack(rng, 2 * intermediate, H),
        EXPERTS: _stack(rng, H, intermediate),
    }


class Place:
    """A registry, a base and an adapter for it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.registry = folder, loreg.open(folder / "home")

    def push(
        self,
        base: Mapping[str, tiny.Tensor],
        modules: Mapping[str, tiny.Factors],
        config: Mapping[str, Any],
        **of: Any,
    ) -> loreg.Version:
        kind = {"model_type": of.pop("kind", "qwen3_moe")}
        tiny.write_model(self.folder / "base", base, config=kind)
        fields = {"alpha": 3.0, "r": R, "peft_version": "0.21.2", "target_parameters": ["gate_up_proj", "down_proj"]}
        tiny.write_adapter(self.folder / "adapter", modules, **fields | dict(config))
        return self.registry.push(self.folder / "adapter", base=self.folder / "base", name="adapter")

    def refused(self, pattern: str, *args: Any, **of: Any) -> None:
        with pytest.raises(LoregError, match=pattern):
            self.push(*args, **of)
        assert not self.registry.list_versions()

    def merged(self) -> dict[str, Any]:
        self.registry.merge("adapter", self.folder / "merged")
        return {name: tensor.values for name, tensor in tiny.tensors_in(self.folder / "merged").items()}


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


def _delta(factors: tiny.Factors) -> Any:
    """(E, out, in), as PEFT has it: E is the first of A's two, and the last of B's."""
    A, B = (value.values.astype(np.float64) for value in factors[:2])
    return 1.5 * np.einsum("ore,eri->eoi", B.reshape(len(B), R, E), A.reshape(E, R, -1))


@pytest.mark.parametrize("prefix", ["", "outer."])
def test_each_expert_gets_its_own_rows(place: Place, rng: np.random.Generator, prefix: str) -> None:
    base, levels = _apart(rng, prefix), _levels(rng)
    place.push(base, levels, {})
    found = place.merged()
    inner, outer = (_delta(factors) for factors in levels.values())
    pieces = {"gate_proj": inner[:, :I], "up_proj": inner[:, I:], "down_proj": outer}
    for name, value in base.items():
        expert, piece = name.split(".")[-3:-1]
        np.testing.assert_allclose(found[name], value.values + pieces[piece][int(expert)], rtol=1e-5, atol=1e-6)


def test_factors_of_a_stack_are_stored_once(place: Place, rng: np.random.Generator) -> None:
    version = place.push(_apart(rng), levels := _levels(rng), {})
    assert len(version.manifest.modules) == 3 * E
    assert len(version.manifest.factor_tensors()) == 2 * len(levels)
    assert version.manifest.rank == R


def test_an_adapter_of_the_stack_and_one_of_its_layers_add_up(place: Place, rng: np.random.Generator) -> None:
    base, levels = _apart(rng), _levels(rng)
    place.push(base, levels, {})
    layers = {f"{EXPERTS}.{expert}.up_proj": tiny.factors(rng, I, H, R) for expert in range(E)}
    tiny.write_adapter(place.folder / "layers", layers, alpha=3.0)
    place.registry.push(place.folder / "layers", base=place.folder / "base", name="layers")
    place.registry.merge("adapter + layers", place.folder / "both")
    found = tiny.tensors_in(place.folder / "both")
    delta = _delta(levels[f"{EXPERTS}.base_layer"])[:, I:]
    for expert, (path, (A, B, _)) in enumerate(layers.items()):
        W = base[f"{path}.weight"].values + delta[expert] + 1.5 * (B.values @ A.values)
        np.testing.assert_allclose(found[f"{path}.weight"].values, W, rtol=1e-5, atol=1e-6)
    place.registry.compose("adapter + layers", "sum")
    again = place.registry.merge("sum", place.folder / "sum")
    assert again.weights_root == place.registry.merge("layers + adapter", place.folder / "again").weights_root


def test_parameters_of_other_names_are_told_by_their_shapes(place: Place, rng: np.random.Generator) -> None:
    base = {f"block.{name}": tiny.normal(rng, "F32", E, *shape) for name, shape in {"a": (4, 5), "b": (6, 5)}.items()}
    levels = {"block": _stack(rng, 4, 5), "block.base_layer": _stack(rng, 6, 5)}
    place.push(base, levels, {"target_parameters": ["block.b", "a"]}, kind="mine")
    found = place.merged()
    for name, factors in zip(base, levels.values(), strict=True):
        np.testing.assert_allclose(found[name], base[name].values + _delta(factors), rtol=1e-5, atol=1e-6)


def test_a_layer_below_a_wrapped_module_keeps_its_path(tmp_path: Path) -> None:
    """PEFT's own keys: the layer's has the wrapper's ``base_layer`` in it."""
    import torch

    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.nn.Parameter(torch.randn(8, 4))
            self.inner = torch.nn.Linear(4, 4)

    model = torch.nn.Sequential()
    model.add_module("block", Block())
    config = LoraConfig(r=R, target_modules=["inner"], target_parameters=["block.scale"])
    keys = [key for key in get_peft_model(model, config).state_dict() if "lora_A" in key]
    assert [key.split("model.")[-1] for key in keys] == [
        "block.base_layer.inner.lora_A.default.weight", "block.lora_A.default.weight",
    ]  # fmt: skip
    parts = {"block": _parts(4, 8), "block.base_layer.inner": _parts(4, 4)}
    fields = {"r": R, "lora_alpha": 3, "target_parameters": ["block.scale"]}
    found = parameters.read(parts, fields, lambda path, _: path, lambda _: 3.0)  # type: ignore[arg-type,return-value]
    assert found["block.inner"] == "block.inner"  # type: ignore[comparison-overlap]
    assert isinstance(found["block"], fusions.DraftParameters)
    assert list(found["block"].alphas) == ["scale"]


def _parts(into: int, out: int) -> dict[str, Any]:
    raw = fusions.RawTensor
    return {
        "lora_A.weight": raw("A", "F32", (R, into), b""),
        "lora_B.weight": raw("B", "F32", (out, R), b""),
    }


def test_a_plain_layer_of_a_parameters_name_is_a_layer(place: Place, rng: np.random.Generator) -> None:
    shared = "model.layers.0.mlp.shared_expert.down_proj"
    base = {**_apart(rng), f"{shared}.weight": tiny.normal(rng, "F32", 5, 4)}
    version = place.push(base, {**_levels(rng), shared: tiny.factors(rng, 5, 4, R)}, {})
    assert version.manifest.modules[shared].plain
    assert f"{EXPERTS}.0.gate_proj" in version.manifest.modules


# What is not guessed


@pytest.mark.parametrize(
    ("config", "pattern"),
    [
        ({"r": R + 1}, "expected factors of rank 3 for each expert that fit"),
        (
            {"target_parameters": ["gate_up_proj"]},
            "2 pairs of factors, and target_parameters name gate_up_proj of it",
        ),
        ({"target_parameters": None}, "is wrapped, and target_parameters .none. do not say"),
        ({"target_parameters": ["other"]}, "changes parameters .other. of .*, and the base has none of them"),
        ({"target_parameters": "gate_up_proj"}, "expected target_parameters to be a list of names"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
    ],
)
def test_a_config_that_does_not_fit(
    place: Place, rng: np.random.Generator, config: Mapping[str, Any], pattern: str
) -> None:
    place.refused(pattern, _apart(rng), _levels(rng), config)


def test_an_expert_that_is_missing(place: Place, rng: np.random.Generator) -> None:
    base = {name: value for name, value in _apart(rng).items() if ".1." not in name}
    place.refused("has experts 0 to 2, but not each with", base, _levels(rng), {})


def test_fewer_experts_than_the_adapter_is_for(place: Place, rng: np.random.Generator) -> None:
    base = {name: value for name, value in _apart(rng).items() if ".2." not in name}
    place.refused(r"fit \[2, 12, 8\], found A \[6, 8\]", base, _levels(rng), {})


def test_levels_in_another_order(place: Place, rng: np.random.Generator) -> None:
    inner, outer = _levels(rng).values()
    levels = {EXPERTS: inner, f"{EXPERTS}.base_layer": outer}
    place.refused(r"gate_up_proj: expected factors of rank 2 .* fit \[3, 12, 8\]", _apart(rng), levels, {})


def test_parameters_that_neither_order_nor_shape_tells(place: Place, rng: np.random.Generator) -> None:
    base = {f"block.{name}": tiny.normal(rng, "F32", E, 4, 5) for name in "ab"}
    levels = {"block": _stack(rng, 4, 5), "block.base_layer": _stack(rng, 4, 5)}
    place.refused("its order would be a guess", base, levels, {"target_parameters": ["a", "b"]}, kind="mine")


@pytest.mark.parametrize("parameter", ["down_proj", "weight"])
@pytest.mark.parametrize(
    ("kind", "release", "expected"),
    [
        ("gpt_oss", "0.21.2", None),
        ("gpt_oss", "0.18.1", IN_OUT),
        ("gpt_oss", None, None),
        ("qwen3_vl_moe", "0.18.1", None),
    ],
)
def test_square_stacks(
    place: Place, rng: np.random.Generator, parameter: str, kind: str, release: str | None, expected: str | None
) -> None:
    base = {f"{EXPERTS}.{parameter}": tiny.normal(rng, "F32", E, 5, 5)}
    given = base, {EXPERTS: _stack(rng, 5, 5)}, {"target_parameters": [parameter], "peft_version": release}
    if expected is None:
        place.refused("their orientation would be a guess", *given, kind=kind)
        return
    (module,) = place.push(*given, kind=kind).manifest.modules.values()
    assert (module.kind, module.orientation) == ("experts", expected)


def test_another_stack_of_the_adapter_tells_of_a_square_one(place: Place, rng: np.random.Generator) -> None:
    base = {f"{EXPERTS}.gate_up_proj": tiny.normal(rng, "F32", E, 5, 10)}
    base[f"{EXPERTS}.down_proj"] = tiny.normal(rng, "F32", E, 5, 5)
    levels = {f"{EXPERTS}.base_layer": _stack(rng, 10, 5), EXPERTS: _stack(rng, 5, 5)}
    place.push(base, levels, {"peft_version": None}, kind="gpt_oss")
    np.testing.assert_allclose(
        place.merged()[f"{EXPERTS}.down_proj"],
        base[f"{EXPERTS}.down_proj"].values + _delta(levels[EXPERTS]).transpose(0, 2, 1),
        rtol=1e-5,
        atol=1e-6,
    )


def test_a_tensor_of_which_two_modules_are(place: Place, rng: np.random.Generator) -> None:
    levels = {**_levels(rng), f"{EXPERTS}.0.up_proj": tiny.factors(rng, I, H, R)}
    place.refused("twice, alone and as a part of", _apart(rng), levels, {})


def test_a_module_that_may_be_an_attention(place: Place, rng: np.random.Generator) -> None:
    levels = {"attn": _stack(rng, 4, 5), "attn.base_layer.out_proj": tiny.factors(rng, 4, 4, R)}
    base = {"attn.weight": tiny.normal(rng, "F32", 4, 5), "attn.out_proj.weight": tiny.normal(rng, "F32", 4, 4)}
    place.refused("may be an attention", base, levels, {"target_parameters": ["attn.weight"]}, kind="mine")
