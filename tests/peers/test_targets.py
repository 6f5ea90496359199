"""Which tensors of a file PEFT loads, and that loreg merges none of the others."""

from __future__ import annotations

import itertools
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors.torch import load_file, save_file
from torch import nn

from loreg import adapters
from loreg.adapters.draft import DraftModule
from loreg.adapters.peft import attention, patterns
from loreg.adapters.peft.targets import Targets
from loreg.errors import BadInput, Unsupported
from loreg.registry import Registry

# The rules, against PEFT's own function

PATHS = (
    "model.layers.0.self_attn.q_proj",
    "model.layers.1.self_attn.q_proj",
    "model.layers.11.mlp.down_proj",
    "model.layers.1.mlp.xdown_proj",
    "model.decoder.block.1.layer.0.q",
    "lm_head",
    "score",
    "score.dense",
    "q_proj",
)
FIELDS: dict[str, list[Any]] = {
    "target_modules": [
        ["q_proj", "down_proj"],
        ["self_attn.q_proj"],
        ["model.layers.0.self_attn.q_proj", "score", "q"],
        ["dense", "lm_head", "score"],
        r".*\.(q_proj|down_proj)",
        r"model\.layers\.1\..*",
        r"(?:.*?(?:language|layers).*?(?:self_attn|mlp).*?(?:q_proj|k_proj|down_proj).*?)|(?:\bscore\.dense)",
        r"^(?!.*layers\.0).*q_proj$",
        "(?i).*Q_PROJ",
        "(?s:.*)q_proj",
        "q_proj",
        [],
    ],
    "exclude_modules": [None, [], ["q_proj"], ["layers.0.self_attn.q_proj", "q"], r".*\.1\..*"],
    "modules_to_save": [None, ["score"], ["self_attn", "lm_head"]],
    "layers": [
        (None, None), (1, None), ([0, 11], None),
        ([1], "layers"), ([1], ["block", "h"]), ([1], []), ([1], r"de\w+.block"),
    ],
}  # fmt: skip


@pytest.mark.parametrize("saved", FIELDS["modules_to_save"], ids=str)
@pytest.mark.parametrize("excluded", FIELDS["exclude_modules"], ids=str)
def test_the_rules_are_those_of_peft(excluded: object, saved: object) -> None:
    found = set()
    for targets, (layers, pattern) in itertools.product(FIELDS["target_modules"], FIELDS["layers"]):
        if isinstance(targets, str) and layers is not None:
            continue  # PEFT refuses to make such a config
        config = {
            "target_modules": targets,
            "exclude_modules": excluded,
            "modules_to_save": saved,
            "layers_to_transform": layers,
            "layers_pattern": pattern,
        }
        theirs = SimpleNamespace(**config, target_parameters=None)
        ours = Targets.of(config, Path("config"))
        for path in PATHS:
            expected = bool(check_target_module_exists(theirs, path))
            # Where a path has two numbers either may be that of the layer: see below.
            two = sum(part.isdecimal() for part in path.split(".")) == 2 and layers is not None
            assert _takes(ours, path) == expected or (two and not expected), (config, path)
            found.add(expected)
    assert found == {True, False}


def _takes(targets: Targets, path: str) -> bool:
    try:
        targets.check(path, DraftModule(()), tied=False)
    except BadInput:
        return False
    return True


@pytest.mark.parametrize(
    ("path", "layers", "takes"),
    [
        ("model.layers.1.mlp.experts.3.down_proj", [1], True),  # by the first number, as PEFT 0.21
        ("model.layers.1.mlp.experts.3.down_proj", [3], True),  # by the last, as PEFT 0.10
        ("model.layers.1.mlp.experts.3.down_proj", [2], False),
        ("model.down_proj", [1], False),
    ],
)
def test_a_layer_by_any_release(path: str, layers: list[int], takes: bool) -> None:
    config = {"target_modules": ["down_proj"], "layers_to_transform": layers}
    assert _takes(Targets.of(config, Path("config")), path) == takes


def test_a_path_is_matched_for_its_own_numbers_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"target_modules": ["q"], "layers_to_transform": list(range(3000)), "layers_pattern": ["h", "layers"]}
    targets = Targets.of(config, Path("config"))
    asked: list[str] = []
    matches = patterns.fits
    monkeypatch.setattr(patterns, "fits", lambda *given: asked.append(given[0]) or matches(*given))
    assert _takes(targets, "model.layers.0017.mlp.4000.q") and not _takes(targets, "model.layers.3000.q")
    assert len(asked) == 2


@pytest.mark.parametrize("called", [None, "layers"])
def test_a_number_without_end_is_no_layer(called: str | None) -> None:
    config = {"target_modules": ["q"], "layers_to_transform": [9], "layers_pattern": called}
    assert not _takes(Targets.of(config, Path("config")), f"layers.{'9' * 5000}.q")


@pytest.mark.parametrize("version", ["9" * 5000 + ".1", "0." + "9" * 5000])
def test_a_release_without_end_is_none(version: str) -> None:
    modules = {"attn": DraftModule(()), f"attn{attention.WRAPPED}": DraftModule(())}
    assert set(attention.joined(modules, {"peft_version": "0.21.2"})) == {"attn", "attn.out_proj"}
    with pytest.raises(Unsupported, match=r"is of PEFT 0\.22"):
        attention.joined(modules, {"peft_version": "0.22"})
    with pytest.raises(BadInput, match="peft_version: expected a release such as") as caught:
        attention.joined(modules, {"peft_version": version})
    assert len(str(caught.value)) < 200


def test_all_linear_is_no_embedding_and_no_head() -> None:
    targets = Targets.of({"target_modules": "All-Linear"}, Path("config"))
    assert _takes(targets, PATHS[0])
    assert not _takes(targets, "lm_head")
    with pytest.raises(BadInput, match="all-linear"):
        targets.check("model.embed_tokens", DraftModule((), embedding=True), tied=False)


@pytest.mark.parametrize("targets", [None, "missing"])
def test_where_peft_has_a_list_of_its_own_for_the_architecture(targets: str | None) -> None:
    config = {} if targets else {"target_modules": None}
    assert _takes(Targets.of(config, Path("config")), "h.0.attn.c_attn")
    assert not _takes(Targets.of(config | {"target_parameters": ["experts.w"]}, Path("config")), "h.0.attn.c_attn")


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"target_modules": 5}, BadInput, "target_modules: expected text, a list of names"),
        ({"exclude_modules": [5]}, BadInput, "exclude_modules: expected text, a list of names"),
        ({"target_modules": "q_proj("}, BadInput, "target_modules.*is not a regular expression"),
        ({"target_modules": r"(a)\1"}, Unsupported, "target_modules.*which is not matched"),
        ({"layers_to_transform": "1"}, BadInput, "layers_to_transform: expected a whole number"),
        ({"layers_to_transform": [True]}, BadInput, "layers_to_transform: expected a whole number"),
        ({"layers_to_transform": [1], "layers_pattern": "h("}, BadInput, "layers_pattern"),
        ({"layers_to_transform": [1], "layers_pattern": "(?i)h"}, BadInput, "layers_pattern: .*global flags not at"),
        ({"target_modules": "(?a).*"}, Unsupported, "target_modules: .*flags other than i, m, s and x"),
    ],
)
def test_fields_of_other_types(config: dict[str, Any], error: type[BadInput], message: str) -> None:
    with pytest.raises(BadInput, match=message) as caught:
        Targets.of(config, Path("config"))
    assert type(caught.value) is error


# Files, against what PEFT loads of them


class _Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.ModuleDict({"layers": nn.ModuleList([_Layer(), _Layer()])})

    def forward(self) -> torch.Tensor:
        x = torch.linspace(-1, 1, 12).reshape(3, 4)
        for layer in self.net["layers"]:
            x = layer.norm(layer.two(layer.one(x).tanh()))
        return x


PREFIX = "base_model.model."
LAYERS = f"{PREFIX}net.layers"
ONE = f"{LAYERS}.0.one"
Tensors = dict[str, torch.Tensor]


def _copied(there: str, found: str = "net.layers.0.one") -> Callable[[Tensors], Tensors]:
    """The factors of one module under the keys of another, too."""
    return lambda tensors: {k.replace(found, there): v + 1 for k, v in tensors.items() if f".{found}." in k}


IGNORED: dict[str, tuple[Callable[[Tensors], Tensors], dict[str, Any], str]] = {
    "the weight of an adapted layer": (
        lambda tensors: {f"{ONE}.weight": torch.eye(4)},
        {},
        rf"'{ONE}.weight' would replace.*'{ONE}.base_layer.weight'",
    ),
    "the bias of an adapted layer": (lambda tensors: {f"{ONE}.bias": torch.ones(4)}, {}, "would replace the bias of"),
    "the layer inside of one that is not": (
        lambda tensors: {f"{LAYERS}.0.two.base_layer.weight": torch.eye(4)},
        {},
        "inside an adapted 'net.layers.0.two'",
    ),
    "a norm as if it were": (
        lambda tensors: {f"{LAYERS}.1.norm.base_layer.weight": torch.full((4,), 2.0)}, {}, "inside an adapted",
    ),
    "a module that is no target": (_copied("net.layers.0.two"), {}, "target_modules does not name it"),
    "a layer that is left out": (lambda tensors: {}, {"layers_to_transform": [0]}, r"only \[0\]"),
    "a module that is excluded": (
        lambda tensors: {}, {"exclude_modules": ["layers.1.one"]}, "exclude_modules leaves it out",
    ),
    "an expression": (lambda tensors: {}, {"target_modules": r".*\.0\.one"}, "target_modules does not name it"),
}  # fmt: skip


def _saved(folder: Path, **config: Any) -> None:
    (folder / "base").mkdir()
    save_file(_Net().state_dict(), folder / "base" / "model.safetensors")
    (folder / "base" / "config.json").write_text("{}")
    model = peft.get_peft_model(_Net(), LoraConfig(r=2, target_modules=["one"], **config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    model.save_pretrained(folder / "adapter")


def _edited(folder: Path, change: Callable[[Tensors], Tensors], fields: dict[str, Any]) -> None:
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    tensors = load_file(weights)
    save_file(tensors | change(tensors), weights)
    config.write_text(json.dumps(json.loads(config.read_text()) | fields))


@torch.no_grad()
def _loaded(folder: Path) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(_Net(), folder).eval()()


@pytest.mark.parametrize("what", IGNORED)
def test_what_peft_ignores_is_refused(registry: Registry, tmp_path: Path, what: str) -> None:
    change, fields, message = IGNORED[what]
    _saved(tmp_path)
    adapter = tmp_path / "adapter"
    whole = _loaded(adapter)
    _edited(adapter, change, fields)
    ignores = change(load_file(adapter / "adapter_model.safetensors"))
    if ignores:
        assert torch.equal(_loaded(adapter), whole), "PEFT does use it"
    else:
        assert not torch.equal(_loaded(adapter), whole), "PEFT uses all of it"
    with pytest.raises(BadInput, match=message):
        registry.push(adapter, base=tmp_path / "base", name="new")
    assert not registry.list_versions()


USED: dict[str, tuple[Callable[[Tensors], Tensors], dict[str, Any]]] = {
    "as it is": (lambda tensors: {}, {}),
    "the layer inside an adapted one": (lambda tensors: {f"{ONE}.base_layer.weight": torch.eye(4)}, {}),
    "a tensor that nobody adapts": (lambda tensors: {f"{LAYERS}.1.norm.weight": torch.full((4,), 2.0)}, {}),
    "an expression": (
        lambda tensors: {},
        {"target_modules": r"(?:.*?(?:layers|blocks).*?(?:one|three).*?)|(?:\bx\.[\d]{1,}\.y)"},
    ),
    "whole paths": (lambda tensors: {}, {"target_modules": ["net.layers.0.one", "net.layers.1.one"]}),
    "layers by number": (lambda tensors: {}, {"layers_to_transform": [0, 1], "layers_pattern": "layers"}),
    "one left out": (
        _copied("net.layers.0.two"), {"target_modules": ["one", "two"], "exclude_modules": ["layers.1.two"]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", USED)
def test_what_peft_uses_is_merged(registry: Registry, tmp_path: Path, what: str) -> None:
    _saved(tmp_path)
    _edited(tmp_path / "adapter", *USED[what])
    registry.push(tmp_path / "adapter", base=tmp_path / "base", name="new")
    merged = registry.merge("new", tmp_path / "out").out
    net = _Net()
    net.load_state_dict(load_file(merged / "model.safetensors"))
    torch.testing.assert_close(net(), _loaded(tmp_path / "adapter"), atol=1e-5, rtol=1e-5)


def test_old_biases_keep_their_plain_names(tmp_path: Path) -> None:
    """PEFT 0.5 had no ``base_layer``: its ``lora_only`` biases are ``one.bias``, and were trained."""
    _saved(tmp_path)
    _edited(
        tmp_path / "adapter",
        lambda tensors: {f"{LAYERS}.{i}.one.bias": torch.ones(4) for i in range(2)},
        {"bias": "lora_only", "peft_version": None, "exclude_modules": None},
    )
    assert set(adapters.read(tmp_path / "adapter").full) == {"net.layers.0.one.bias", "net.layers.1.one.bias"}


@pytest.mark.parametrize("old", [True, False])
def test_old_embeddings_beside_their_lora_keep_their_plain_names(tmp_path: Path, old: bool) -> None:
    """PEFT 0.6 had no ``base_layer`` either, and could save embeddings (``save_embedding_layers``)."""
    words = f"{PREFIX}model.words"
    shapes = {"lora_embedding_A": (2, 9), "lora_embedding_B": (4, 2), "weight": (9, 4)}
    save_file({f"{words}.{k}": torch.ones(s) for k, s in shapes.items()}, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["words"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | ({} if old else {"loftq_config": {}})))
    if old:
        assert set(adapters.read(tmp_path).full) == {"model.words.weight"}
    else:
        with pytest.raises(BadInput, match=r"would replace the weight of 'model\.words'"):
            adapters.read(tmp_path)


# torch's attention


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 4)

    def forward(self) -> torch.Tensor:
        x = torch.linspace(-1, 1, 24).reshape(1, 3, 8).sin()
        return self.head(self.attn(x, x, x)[0])


@pytest.mark.parametrize("targets", [["out_proj"], ["out_proj", "head"], "all-linear"], ids=str)
def test_a_projection_that_torch_never_calls_is_refused(registry: Registry, tmp_path: Path, targets: Any) -> None:
    (tmp_path / "base").mkdir()
    save_file(_Attention().state_dict(), tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text("{}")
    model = peft.get_peft_model(_Attention(), LoraConfig(r=2, target_modules=targets))
    assert "attn.out_proj" in model.base_model.targeted_module_names
    before = model()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "out_proj.lora_" in name:
                parameter.normal_()
    assert torch.equal(model(), before), "PEFT's factors are used"
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(Unsupported, match=r"Module 'attn\.out_proj' is the projection of a torch MultiheadAttention"):
        registry.push(tmp_path / "adapter", base=tmp_path / "base", name="new")
    assert not registry.list_versions()
