"""``loreg.integrations.peft``: what a model computes with a version is what PEFT makes of its files, however the
version came into the model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peer_models import VOCABULARY, BaseOf, load_model, save_adapter
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils.hotswap import prepare_model_for_compiled_hotswap

import loreg
from loreg.errors import BadInput, BaseMismatch, Conflict, NotFound, UsageError
from loreg.integrations import peft as integration
from loreg.integrations.peft import load

ATTENTION = {"gpt2": ["c_attn", "c_proj"], "llama": ["q_proj", "v_proj"]}
TOKENS = torch.arange(12).reshape(2, 6) % VOCABULARY
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


class World:
    """A base of ``family`` and versions of ``sql``, and the files that PEFT wrote of each."""

    def __init__(self, registry: loreg.Registry, family: str, base: Path, folder: Path) -> None:
        self.registry, self.family, self.base, self.folder = registry, family, base, folder
        self.saved: list[Path] = []
        registry.add_base(base, "base")

    def push(self, **lora: object) -> str:
        number = len(self.saved) + 1
        given = {"r": 4, "lora_alpha": 12, "target_modules": ATTENTION[self.family], **lora}
        at = save_adapter(self.family, self.base, self.folder / f"a{number}", "fp32", seed=number, **given)
        self.saved.append(at)
        self.registry.push(at, base="base", name="sql")
        return f"sql:v{number}"

    def model(self) -> torch.nn.Module:
        return load_model(self.family, self.base, torch.float32)

    def expected(self, version: str) -> torch.Tensor:
        """By PEFT alone, from the files that it wrote."""
        return logits(PeftModel.from_pretrained(self.model(), self.saved[int(version[5:]) - 1]).eval())


@pytest.fixture(params=["gpt2", "llama"])
def world(request: pytest.FixtureRequest, registry: loreg.Registry, base_of: BaseOf, tmp_path: Path) -> World:
    return World(registry, request.param, base_of(request.param, "fp32"), tmp_path)


@pytest.fixture
def llama(registry: loreg.Registry, base_of: BaseOf, tmp_path: Path) -> World:
    return World(registry, "llama", base_of("llama", "fp32"), tmp_path)


@torch.inference_mode()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(TOKENS).logits.clone()


def same(model: torch.nn.Module, world: World, version: str) -> None:
    expected = world.expected(version)
    assert not torch.allclose(expected, logits(world.model()), **CLOSE)  # an adapter that does something
    torch.testing.assert_close(logits(model), expected, **CLOSE)


@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "PeftModel"])
def test_versions_in_turn_are_what_peft_makes_of_each(world: World, wrapped: bool) -> None:
    one = world.push()
    two = world.push(use_rslora=True, alpha_pattern={ATTENTION[world.family][0]: 3})
    small = world.push(r=2, target_modules=ATTENTION[world.family][:1])
    large = world.push(r=8)
    patterns = world.push(rank_pattern={ATTENTION[world.family][0]: 2}, use_rslora=True)
    model = world.model()
    if wrapped:  # with an adapter of its own, that does nothing
        model = get_peft_model(model, LoraConfig(target_modules=ATTENTION[world.family]), adapter_name="own").eval()
    kept = {}
    for version, action in [
        (one, "loaded"), (two, "swapped"), (small, "swapped"), (one, "swapped"), (large, "replaced"),
        (patterns, "swapped"), (one, "swapped"),
    ]:  # fmt: skip
        done = load(model, version, world.registry)
        assert (done.action, done.adapter_name) == (action, "default"), version
        assert done.digest == world.registry.find(version).digest
        same(model, world, version)
        mine = {name: value.data_ptr() for name, value in model.named_parameters() if ".default." in name}
        assert len(mine) > 0
        assert action != "swapped" or kept == mine  # in place
        kept = mine
        assert not any(value.requires_grad for name, value in model.named_parameters() if ".default." in name)


def test_a_swap_compiles_nothing(llama: World) -> None:
    one, two = llama.push(), llama.push(r=2, lora_alpha=1, use_rslora=True)
    model = llama.model()
    load(model, one, llama.registry)
    count = 0

    def backend(graph: torch.fx.GraphModule, _: object) -> object:
        nonlocal count
        count += 1
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend)
    same(compiled, llama, one)
    made = count
    assert made > 0
    for version in (two, one, two):
        assert load(compiled, version, llama.registry).action == "swapped"
        same(compiled, llama, version)
    assert count == made
    torch._dynamo.reset()


def test_peft_may_have_made_room_for_a_larger_rank(llama: World) -> None:
    small, large = llama.push(r=2), llama.push(r=8)
    model = llama.model()
    load(model, small, llama.registry)
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    assert load(model, large, llama.registry).action == "swapped"
    same(model, llama, large)
    assert load(model, small, llama.registry).action == "swapped"
    same(model, llama, small)


def test_other_adapters_are_left_alone(llama: World) -> None:
    """PEFT's own swap of "sql" fills what "sql-more" does not share with it with zeros, as its name begins so."""
    one, two = llama.push(), llama.push()
    model = llama.model()
    load(model, one, llama.registry, adapter_name="sql-more")
    load(model, one, llama.registry, adapter_name="sql")
    before = {name: value.clone() for name, value in model.named_parameters() if ".sql-more." in name}
    assert before
    assert load(model, two, llama.registry, adapter_name="sql").action == "replaced"
    now = dict(model.named_parameters())
    assert all(torch.equal(now[name], value) for name, value in before.items())
    same(model, llama, two)  # and the one that was active is


def test_an_adapter_of_peft_own_is_swapped_whole(llama: World, tmp_path: Path) -> None:
    """Also what says how it is scaled, saved and trained."""
    two = (llama.push(r=2), llama.push(r=2, use_rslora=True))
    given = {"r": 4, "lora_alpha": 12, "rank_pattern": {"v_proj": 3}, "alpha_pattern": {"q_proj": 5}}
    config = LoraConfig(target_modules=ATTENTION["llama"], use_rslora=True, **given)
    model = get_peft_model(llama.model(), config)
    for number, version in enumerate(two):
        assert load(model, version, llama.registry).action == "swapped"
        assert not any(parameter.requires_grad for parameter in model.parameters())
        same(model.eval(), llama, version)
        model.save_pretrained(str(tmp_path / str(number)))
        same(PeftModel.from_pretrained(llama.model(), str(tmp_path / str(number))).eval(), llama, version)
        for layer in model.modules():
            if isinstance(layer, LoraLayer):
                layer.scale_layer(2)
                layer.unscale_layer()
        same(model, llama, version)


def test_an_activated_lora_is_no_lora_to_swap(llama: World) -> None:
    version = llama.push()
    config = LoraConfig(r=4, target_modules=ATTENTION["llama"], alora_invocation_tokens=[VOCABULARY - 1])
    model = get_peft_model(llama.model(), config).eval()
    assert load(model, version, llama.registry).action == "replaced"
    same(model, llama, version)


def test_a_trial_takes_nobodys_name(llama: World) -> None:
    one = llama.push()
    model = get_peft_model(llama.model(), LoraConfig(target_modules=ATTENTION["llama"])).eval()
    names = [f"default-trial{number}" for number in ("", 0, 1)]
    for name in names:
        load(model, one, llama.registry, adapter_name=name)
    assert load(model, llama.push(r=16), llama.registry).action == "replaced"
    assert {"default", *names} == set(model.peft_config)
    for name in names:
        model.set_adapter(name)
        same(model, llama, one)


def test_what_is_not_active_stays_so(llama: World) -> None:
    one, two, large = llama.push(), llama.push(), llama.push(r=8)
    for wrapped in (False, True):
        model = llama.model()
        if wrapped:
            model = PeftModel.from_pretrained(model, llama.saved[0], adapter_name="first").eval()
        else:
            load(model, one, llama.registry, adapter_name="first")
        load(model, one, llama.registry, adapter_name="other")
        for name in ("first",):
            model.set_adapter(name)
        for version, action in ((two, "swapped"), (large, "replaced")):
            assert load(model, version, llama.registry, adapter_name="other").action == action
            same(model, llama, one)
        model.set_adapter("other")
        same(model, llama, large)


@pytest.mark.parametrize(
    "lora",
    [
        {"use_dora": True},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [1, 5]},
    ],
    ids=lambda lora: next(iter(lora)),
)
def test_more_than_lora_is_replaced(llama: World, lora: dict[str, object]) -> None:
    plain, more = llama.push(), llama.push(**lora)
    for order in ((plain, more), (more, plain)):
        model = llama.model()
        for version, action in zip(order, ("loaded", "replaced"), strict=True):
            if (order[0], version) == (more, plain) and "trainable_token_indices" in lora:
                # PEFT 0.21 loads nothing without trained tokens where there are some.
                with pytest.raises(BadInput, match="and nothing is loaded"):
                    load(model, version, llama.registry)
                same(model, llama, more)
                continue
            assert load(model, version, llama.registry).action == action
            same(model, llama, version)


def test_a_module_without_a_config_is_enough(registry: loreg.Registry, tmp_path: Path) -> None:
    """As diffusers' components are, to PEFT."""
    import tiny

    from loreg.tensors import TORCH

    base = tiny.write_model(tmp_path / "base", tiny.model())
    registry.add_base(base, "base")
    model = torch.nn.Module()
    for name, value in tiny.tensors_in(base).items():
        path, leaf = name.rsplit(".", 1)
        if value.dtype not in tiny.FORMATS:
            continue
        data = torch.frombuffer(bytearray(value.data), dtype=TORCH[value.dtype]).reshape(value.shape)
        at = model
        *parents, last = path.split(".")
        for part in parents:
            if part not in at._modules:
                at.add_module(part, torch.nn.Module())
            at = at.get_submodule(part)
        if last in at._modules:
            at.get_submodule(last).register_parameter(leaf, torch.nn.Parameter(data))
        elif leaf == "weight" and data.ndim == 2:
            at.add_module(last, torch.nn.Linear(*reversed(data.shape), bias=False, dtype=data.dtype))
            at.get_submodule(last).weight.data = data
        else:
            at.add_module(last, torch.nn.Module())
            at.get_submodule(last).register_parameter(leaf, torch.nn.Parameter(data))
    factors = tiny.adapter()
    registry.push(tiny.write_adapter(tmp_path / "sql", factors), base="base", name="sql")
    registry.push(tiny.write_adapter(tmp_path / "two", tiny.adapter(seed=5)), base="base", name="sql")
    layer = model.get_submodule(tiny.Q)
    x = torch.linspace(-1, 1, layer.in_features).to(layer.weight.dtype)
    for version, seed in (("sql:v1", None), ("sql:v2", 5)):
        load(model, version, registry)
        truth = tiny.adapter() if seed is None else tiny.adapter(seed=seed)
        lora = model.get_submodule(tiny.Q)
        found = lora(x).float() - lora.base_layer(x).float()
        A, B = (torch.tensor(each.values) for each in (truth[tiny.Q].A, truth[tiny.Q].B))
        expected = tiny.scale(truth[tiny.Q]) * (B @ (A @ x.float()))
        torch.testing.assert_close(found, expected.float(), rtol=0.05, atol=0.05)
        product = lora.lora_B["default"].weight @ lora.lora_A["default"].weight * lora.scaling["default"]
        torch.testing.assert_close(product, tiny.scale(truth[tiny.Q]) * (B @ A), rtol=1e-5, atol=1e-6)


def test_factors_are_wide_beside_a_narrow_base(registry: loreg.Registry, base_of: BaseOf, tmp_path: Path) -> None:
    base = base_of("llama", "bf16")
    registry.add_base(base, "base")
    at = save_adapter("llama", base, tmp_path / "a", "bf16", r=4, lora_alpha=7, target_modules=["q_proj"])
    registry.push(at, base="base", name="sql")
    for wrapped in (False, True):
        model = load_model("llama", base, torch.bfloat16)
        if wrapped:
            model = get_peft_model(model, LoraConfig(target_modules=["q_proj"]), adapter_name="own").eval()
        load(model, "sql", registry)
        mine = [value for name, value in model.named_parameters() if ".default." in name]
        assert {value.dtype for value in mine} == {torch.float32}
        expected = PeftModel.from_pretrained(load_model("llama", base, torch.bfloat16), at).eval()
        torch.testing.assert_close(logits(model), logits(expected), rtol=0.02, atol=0.02)


def test_another_base_is_refused_and_hashed_once(llama: World, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = llama.push(), llama.push()
    model = llama.model()
    hashed: list[str] = []
    leaf = integration.Leaves._leaf
    monkeypatch.setattr(integration.Leaves, "_leaf", lambda self, t: hashed.append(self._name) or leaf(self, t))
    load(model, one, llama.registry)
    assert len(hashed) == 4
    load(model, two, llama.registry)
    assert len(hashed) == 4  # nothing was changed since
    with torch.no_grad():
        layer = model.model.layers[1].self_attn.v_proj.base_layer
        layer.weight[0, 0] += 1
    before = {name: value.clone() for name, value in model.named_parameters()}
    with pytest.raises(BaseMismatch, match=r"layers\.1\.self_attn\.v_proj\.weight"):
        load(model, one, llama.registry)
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())
    load(model, one, llama.registry, check="none")


def test_what_peft_does_not_take_leaves_the_model_as_it_was(llama: World, tmp_path: Path) -> None:
    one, large = llama.push(), llama.push(r=8)
    plain = llama.model()
    short = llama.model()
    short.model.layers = short.model.layers[:1]
    for model in (plain, short):
        assert integration._layers(model) == []
    with pytest.raises(BadInput, match="and nothing is loaded"):
        load(short, one, llama.registry, check="none")
    assert "default" not in getattr(short, "peft_config", {})
    torch.testing.assert_close(logits(short), logits(_shortened(llama)), rtol=0, atol=0)
    load(plain, one, llama.registry)
    plain.model.layers[1].self_attn.q_proj = torch.nn.Identity()  # what the next one has no place for
    with pytest.raises(BadInput, match="and nothing is loaded"):
        load(plain, large, llama.registry, check="none")
    assert list(plain.peft_config) == ["default"]
    assert plain.model.layers[0].self_attn.q_proj.lora_A["default"].weight.shape[0] == 4
    assert plain.model.layers[0].self_attn.q_proj.active_adapters == ["default"]


def _shortened(world: World) -> torch.nn.Module:
    model = world.model()
    model.model.layers = model.model.layers[:1]
    return model


def test_a_merged_adapter_is_not_swapped(llama: World) -> None:
    one, two, large = llama.push(), llama.push(), llama.push(r=8)
    model = PeftModel.from_pretrained(llama.model(), llama.saved[0]).eval()
    load(model, one, llama.registry)
    model.merge_adapter()
    for version in (two, large):
        with pytest.raises(Conflict, match="unmerge it first"):
            load(model, version, llama.registry, check="none")
    model.unmerge_adapter()
    load(model, two, llama.registry, check="none")
    same(model, llama, two)


def test_errors(llama: World) -> None:
    one = llama.push()
    with pytest.raises(NotFound):
        load(llama.model(), "sq", llama.registry)
    for given in ({"check": "all"}, {"adapter_name": "a.b"}, {"adapter_name": ""}):
        with pytest.raises(UsageError):
            load(llama.model(), one, llama.registry, **given)
