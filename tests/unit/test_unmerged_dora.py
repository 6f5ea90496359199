"""``serving.unmerged`` with DoRA and trained biases, on small plain models: against the weights by their formulas."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import tiny
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from live_models import bytes_of

import loreg
from loreg import serving
from loreg.algebra.delta import LowRank
from loreg.algebra.edits import WeightedSum
from loreg.algebra.forms import decomposed
from loreg.errors import BadInput, Conflict, Unsupported, UsageError
from tests.unit.test_unmerged import EMBEDDING, GIVEN, Net, Q, V, edited, ids

PREFIX = "base_model.model."
DORA = {"use_dora": True}


class Served(NamedTuple):
    """A registry, and by each adapter's name the model with its weights, in float64."""

    registry: loreg.Registry
    models: Mapping[str | None, Net]

    def expected(self, names: list[str | None], batch: torch.Tensor) -> torch.Tensor:
        times = len(batch) // len(names)
        return torch.cat([self.models[n](batch[row * times : (row + 1) * times]) for row, n in enumerate(names)])


def write(folder: Path, tensors: Mapping[str, tiny.Tensor], **config: Any) -> Path:
    """A PEFT directory of exactly these tensors."""
    tiny.write_adapter(folder, {}, **{"target_modules": ["q_proj", "v_proj"], "r": 2, "lora_alpha": 3, **config})
    named = {f"{PREFIX}{name}": value for name, value in tensors.items()}
    (folder / "adapter_model.safetensors").write_bytes(tiny.container(named.items(), {"format": "pt"}))
    return folder


def matrices(rng: np.random.Generator, path: str, *, dora: bool = True) -> dict[str, tiny.Tensor]:
    """Of rank 2, for a linear layer of ``tiny.model()``."""
    out = 8 if path == Q else 6
    found = {
        f"{path}.lora_A.weight": tiny.normal(rng, "F32", 2, 6),
        f"{path}.lora_B.weight": tiny.normal(rng, "F32", out, 2),
    }
    return found | ({f"{path}.lora_magnitude_vector": tiny.normal(rng, "F32", out)} if dora else {})


def of(tensor: tiny.Tensor) -> torch.Tensor:
    return torch.from_numpy(np.array(tensor.values, dtype=np.float64))


def decomposed_weight(W: torch.Tensor, tensors: Mapping[str, tiny.Tensor], path: str) -> torch.Tensor:
    """m · V/‖V‖ of rows, V = W + 3/2·BA, by the paper: (out, in)."""
    V = W + 1.5 * of(tensors[f"{path}.lora_B.weight"]) @ of(tensors[f"{path}.lora_A.weight"])
    return of(tensors[f"{path}.lora_magnitude_vector"])[:, None] * V / V.norm(dim=1, keepdim=True)


@pytest.fixture
def served(pushed: loreg.Registry, tmp_path: Path) -> Served:
    """``sql`` and ``humor``, which are plain; ``dora`` of both layers, ``words`` of the embedding; ``biased`` with
    ``lora_bias``, ``only`` with DoRA and another bias in the place of the base's; ``both`` of two at odd weights."""
    rng = np.random.default_rng(11)
    models: dict[str | None, Net] = {name: edited(pushed, name) for name in ("sql", "humor", None)}

    def push(name: str, tensors: Mapping[str, tiny.Tensor], **config: Any) -> Net:
        pushed.push(write(tmp_path / name, tensors, **config), base="base", name=name)
        return models.setdefault(name, Net(tiny.model()))

    layers = {**matrices(rng, Q), **matrices(rng, V)}
    model = push("dora", layers, **DORA)
    for path in (Q, V):
        model.get_submodule(path).weight.data = decomposed_weight(weight(model, path), layers, path)

    found = {f"{EMBEDDING}.lora_embedding_A": (2, 10), f"{EMBEDDING}.lora_embedding_B": (6, 2)}
    found |= {f"{EMBEDDING}.lora_magnitude_vector": (6,)}
    words = {name: tiny.normal(rng, "F32", *shape) for name, shape in found.items()}
    model = push("words", words, target_modules=["embed_tokens"], **DORA)
    renamed = {
        name.replace("embedding_A", "A.weight").replace("embedding_B", "B.weight"): t for name, t in words.items()
    }
    model.get_submodule(EMBEDDING).weight.data = decomposed_weight(weight(model, EMBEDDING).T, renamed, EMBEDDING).T

    bias = {**matrices(rng, Q, dora=False), f"{Q}.lora_B.bias": tiny.normal(rng, "F32", 8)}
    model = push("biased", bias, target_modules=["q_proj"], lora_bias=True)
    layer: Any = model.get_submodule(Q)
    layer.weight.data += 1.5 * of(bias[f"{Q}.lora_B.weight"]) @ of(bias[f"{Q}.lora_A.weight"])
    layer.bias.data += 1.5 * of(bias[f"{Q}.lora_B.bias"])

    only = {**matrices(rng, Q), f"{Q}.bias": tiny.normal(rng, "BF16", 8)}
    model = push("only", only, target_modules=["q_proj"], bias="lora_only", **DORA)
    layer = model.get_submodule(Q)
    layer.weight.data, layer.bias.data = decomposed_weight(layer.weight.data, only, Q), of(only[f"{Q}.bias"])

    pushed.compose("0.7*dora - 2*biased + 0.5*words + sql", "both")
    base = Net(tiny.model())
    sum_of = {"dora": 0.7, "biased": -2.0, "words": 0.5, "sql": 1.0}
    models["both"] = Net(tiny.model())
    for name, parameter in models["both"].named_parameters():
        W = base.get_parameter(name).data
        parameter.data = W + sum(w * (models[n].get_parameter(name).data - W) for n, w in sum_of.items())
    return Served(pushed, models)


def weight(model: torch.nn.Module, path: str) -> torch.Tensor:
    return model.get_submodule(path).weight.data  # type: ignore[union-attr, return-value]


BENT = ("dora", "words", "biased", "only", "both")


@torch.no_grad()
def test_every_mix_of_rows_is_what_each_adapter_gives_alone(served: Served) -> None:
    """And rows of others are, to the bit, what they are without."""
    model, names = Net(tiny.model()), list(served.models)
    before = bytes_of(model)
    with serving.unmerged(model, names, served.registry, check="none") as mixed:

        @settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
        @given(
            rows=st.lists(st.sampled_from(names), min_size=1, max_size=9),
            times=st.integers(1, 3),
            positions=st.integers(1, 4),
        )
        def check(rows: list[str | None], times: int, positions: int) -> None:
            batch = ids(len(rows) * times, positions, seed=len(rows))
            with mixed.rows(rows):
                found = model(batch)
            expected = served.expected(rows, batch)
            assert (found - expected).abs().max() <= 1e-12 * expected.abs().max()
            with mixed.rows([None if name in BENT else name for name in rows]):
                plain = model(batch)
            others = torch.tensor([name not in BENT for name in rows]).repeat_interleave(times)
            assert torch.equal(found[others], plain[others])

        check()
    assert bytes_of(model) == before


@torch.no_grad()
def test_others_are_to_the_bit_what_they_are_where_no_such_adapter_is_loaded(served: Served) -> None:
    for dtype, factors in ((torch.float64, None), (torch.float32, None), (torch.bfloat16, torch.bfloat16)):
        model, batch, found = Net(tiny.model(), dtype), ids(4, 300), []
        rows: list[str | None] = ["sql", None, "humor", "sql"]
        for more in ([], ["dora", "words", "biased", "only"]):
            mixed = serving.unmerged(model, ["sql", "humor", *more], served.registry, check="none", dtype=factors)
            with mixed, mixed.rows([*rows, *more[:1]]):
                found.append(model(torch.cat([batch, ids(len(more[:1]), 300, seed=3)]))[:4])
        assert torch.equal(*found)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_what_is_scaled_is_rounded_once_after_the_base(served: Served, dtype: torch.dtype) -> None:
    """Beside what the base gives, rounded, of which an error is scaled as the output is."""
    layer: Any = (model := Net(tiny.model(), dtype)).get_submodule(Q)
    x = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(1)).to(dtype)
    base, W = layer(x), layer.weight.double()
    scale = of(tiny.contents(served_file(served, "only"))[f"{PREFIX}{Q}.lora_magnitude_vector"])
    with serving.unmerged(model, ["only"], served.registry, check="none") as mixed, mixed.rows([0, None, 0]):
        found = layer(x)
    alone: Any = served.models["only"].get_submodule(Q)
    # The norms are of the weight as the model has it, which in float16 is not the base's to the bit.
    tensors = {n.removeprefix(PREFIX): t for n, t in tiny.contents(served_file(served, "only")).items()}
    truth = decomposed_weight(W, tensors, Q)
    V = W + 1.5 * of(tensors[f"{Q}.lora_B.weight"]) @ of(tensors[f"{Q}.lora_A.weight"])
    factor = scale / V.norm(dim=1)
    exact = x.double() @ truth.T + alone.bias + factor * (base.double() - x.double() @ W.T - layer.bias.double())
    exact[1] = base[1]
    assert found.dtype == dtype
    step = exact.abs() * torch.finfo(dtype).eps / 2
    assert ((found.double() - exact).abs() <= step + 4e-6 * exact.abs().max()).all()
    assert torch.equal(found[1], base[1])


@torch.no_grad()
def test_factors_in_less_than_the_base_round_no_norm(served: Served, tmp_path: Path) -> None:
    """Nor a bias: they are of all outputs."""
    rng = np.random.default_rng(2)
    tensors = {**matrices(rng, Q), f"{Q}.lora_B.weight": tiny.tensor("F32", np.zeros((8, 2)))}
    tensors[f"{Q}.bias"] = tiny.normal(rng, "F32", 8)
    folder = write(tmp_path / "norms", tensors, target_modules=["q_proj"], bias="lora_only", **DORA)
    served.registry.push(folder, base="base", name="norms")
    model, x = Net(tiny.model(), torch.float32), torch.randn(2, 3, 6)
    truth = decomposed_weight(weight(model, Q).double(), tensors, Q)
    mixed = serving.unmerged(model, ["norms"], served.registry, check="none", dtype=torch.bfloat16)
    with mixed, mixed.rows([0, 0]):
        found = model.get_submodule(Q)(x)
    assert torch.allclose(found.double(), x.double() @ truth.T + of(tensors[f"{Q}.bias"]), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_layer_with_a_bias_beside_one_without(served: Served, tmp_path: Path) -> None:
    """By the same adapter, which is nothing more than a LoRA in the layer that is called first."""
    rng = np.random.default_rng(3)
    tensors = {
        **matrices(rng, Q, dora=False),
        **matrices(rng, V, dora=False),
        f"{Q}.bias": tiny.normal(rng, "F32", 8),
    }
    served.registry.push(write(tmp_path / "one", tensors, bias="lora_only"), base="base", name="one")
    model, alone = Net(tiny.model()), Net(tiny.model())
    for path in (Q, V):
        B, A = (of(tensors[f"{path}.lora_{end}.weight"]) for end in "BA")
        alone.get_submodule(path).weight.data += 1.5 * B @ A  # type: ignore[operator, union-attr]
    alone.get_submodule(Q).bias.data = of(tensors[f"{Q}.bias"])  # type: ignore[union-attr]
    with serving.unmerged(model, ["one"], served.registry, check="none") as mixed, mixed.rows([0, None]):
        found = model(ids(2))
    assert torch.allclose(found, torch.cat([alone(ids(2)[:1]), Net(tiny.model())(ids(2)[1:])]), rtol=1e-12)


def served_file(served: Served, name: str) -> Path:
    return served.registry.home.parent / name / "adapter_model.safetensors"


@torch.no_grad()
@pytest.mark.parametrize("name", ["dora", "biased", "only", "words", "both"])
def test_a_layer_is_what_it_is_with_the_merged_weights(served: Served, name: str) -> None:
    """Which are rounded to float32 once, so that an output is off by at most 2⁻²⁴ of Σ|W'||x| + |b'|."""
    merged, model = Net(tiny.model(), torch.float32), Net(tiny.model())
    serving.merge_(merged, name, served.registry)
    merged.double()
    x = {**GIVEN, Q: GIVEN[V]}
    with serving.unmerged(model, [name], served.registry, check="none") as mixed, mixed.rows([0, 0, 0]):
        for path, given in x.items():
            given = given if path == EMBEDDING else given.double()
            layer: Any = merged.get_submodule(path)
            found, expected, bound = model.get_submodule(path)(given), layer(given), layer.weight.abs()
            size = bound[given] if path == EMBEDDING else given.abs() @ bound.T
            if getattr(layer, "bias", None) is not None:
                size = size + layer.bias.abs()
            assert ((found - expected).abs() <= 2**-24 * size + 1e-12).all()


@torch.no_grad()
def test_a_weight_that_is_another_by_now_is_refused(served: Served) -> None:
    """Until it is back: norms are not had again for each row. What reads no weight goes on with any."""
    model, batch = Net(tiny.model(), torch.float32), ids(2)
    live = serving.attach(model, served.registry)
    mixed = serving.unmerged(model, ["dora", "sql"], served.registry)
    with mixed:
        with mixed.rows([0, 1]):
            first = model(batch)
        live.apply("humor")
        with mixed.rows([0, 1]), pytest.raises(Conflict, match=r"v_proj.weight was changed since .*norms of DoRA"):
            model(batch)
        with mixed.rows([1, None]):
            assert model(batch).isfinite().all()
    with pytest.raises(Conflict, match=r"_proj.weight was changed since"), mixed:
        raise AssertionError("entered")
    assert not any(module._forward_hooks for module in model.modules())
    live.swap("0.5*sql")
    live.restore()
    with mixed, mixed.rows([0, 1]):
        assert torch.equal(model(batch), first)


@torch.no_grad()
@pytest.mark.parametrize("change", ["in place", "another", "another dtype", "another bias", "moved", "gone"])
def test_whatever_changes_it_is_seen(served: Served, change: str) -> None:
    model = Net(tiny.model(), torch.float32)
    layer: Any = model.get_submodule(Q)
    with serving.unmerged(model, ["only"], served.registry) as mixed, mixed.rows([0]):
        model(ids(1))
        if change == "in place":
            layer.weight[0, 0] += 1
        elif change == "another":
            layer.weight = torch.nn.Parameter(layer.weight.clone())
        elif change == "another dtype":
            model.double()
        elif change == "another bias":
            layer.bias.zero_()
        elif change == "moved":
            layer.weight.data = layer.weight.data.clone()
        else:
            layer.bias = None
        words = rf"{Q}.{'bias' if change in ('another bias', 'gone') else 'weight'} was changed"
        with pytest.raises(Conflict, match=words):
            model(ids(1))


@torch.no_grad()
def test_a_model_that_is_elsewhere_by_now(served: Served) -> None:
    model = Net(tiny.model())
    with serving.unmerged(model, ["sql"], served.registry, check="none") as mixed, mixed.rows([0]):
        model.to("meta")
        with pytest.raises(UsageError, match=r"v_proj' was given inputs on meta, and its factors are on cpu"):
            model(ids(1).to("meta"))


@torch.no_grad()
@pytest.mark.parametrize("turn", [1, -1])
def test_two_that_are_entered_add_up_in_any_order(served: Served, turn: int) -> None:
    """What is scaled is what the layer itself gives. Two that scale one layer are refused."""
    model, x = Net(tiny.model()), torch.randn(1, 2, 6, dtype=torch.float64)
    layer = model.get_submodule(V)
    base = layer(x)
    both = [serving.unmerged(model, [name], served.registry, check="none") for name in ("dora", "sql")]
    expected = sum(served.models[name].get_submodule(V)(x) - base for name in ("dora", "sql"))
    first, second = both[::turn]
    with first, second, first.rows([0]), second.rows([0]):
        assert torch.allclose(layer(x) - base, expected, rtol=1e-12, atol=1e-13)
    other = serving.unmerged(model, ["both"], served.registry, check="none")
    with both[0]:
        with pytest.raises(UsageError, match=r"another serving.unmerged with DoRA there.*together"), other:
            raise AssertionError("entered")
        with both[0].rows([0]):
            assert torch.allclose(layer(x), served.models["dora"].get_submodule(V)(x), rtol=1e-12)
    with other, other.rows([0]):
        assert torch.allclose(layer(x), served.models["both"].get_submodule(V)(x), rtol=1e-12)
    assert not any(module._forward_hooks for module in model.modules())


def test_gradients_go_through(served: Served) -> None:
    x = torch.randn(3, 3, 6, dtype=torch.float64)
    layer = Net(tiny.model()).get_submodule(Q)
    model = Net(tiny.model())
    one, two = x.clone().requires_grad_(), x.clone().requires_grad_()
    names: list[str | None] = ["dora", None, "biased"]
    torch.cat([served.models[name].get_submodule(Q)(one[n : n + 1]) for n, name in enumerate(names)]).sum().backward()
    with serving.unmerged(model, names, served.registry, check="none") as mixed, mixed.rows([0, 1, 2]):
        model.get_submodule(Q)(two).sum().backward()
    assert layer is not None and one.grad is not None and two.grad is not None
    assert torch.allclose(one.grad, two.grad, rtol=1e-12)


@torch.no_grad()
def test_what_another_hook_kept_is_not_changed(served: Served) -> None:
    model, kept = Net(tiny.model()), list[Any]()
    mixed = serving.unmerged(model, ["dora", "sql"], served.registry, check="none")
    with mixed:
        hook: Callable[..., None] = lambda module, args, output: kept.append((output, output.clone()))  # noqa: E731
        model.get_submodule(V).register_forward_hook(hook, prepend=True)
        for rows in ([0, 0], [0, 1]):
            with mixed.rows(rows):
                model(ids(2))
    assert all(torch.equal(*pair) for pair in kept) and len(kept) == 2


@torch.no_grad()
def test_what_the_base_overflows_in_stays_with_its_row(served: Served) -> None:
    model = Net(tiny.model())
    x = torch.ones(2, 1, 6, dtype=torch.float64)
    x[1] = torch.inf
    layer = model.get_submodule(Q)
    base = layer(x)
    with serving.unmerged(model, ["dora"], served.registry, check="none") as mixed, mixed.rows([0, None]):
        found = layer(x)
    assert torch.allclose(found[0], served.models["dora"].get_submodule(Q)(x)[0], rtol=1e-12)
    assert base[1].isinf().any() or base[1].isnan().any()
    assert torch.equal(found[1].isnan(), (base[1] + 0 * x[1].sum()).isnan())


@torch.no_grad()
def test_a_bias_of_a_norm_is_added_where_it_is(pushed: loreg.Registry, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    base = {
        "norm.weight": tiny.normal(rng, "F32", 6), "norm.bias": tiny.normal(rng, "F32", 6),
        "inner.weight": tiny.normal(rng, "F32", 6, 6), "inner.bias": tiny.normal(rng, "F32", 6),
    }  # fmt: skip
    pushed.add_base(tiny.write_model(tmp_path / "other", base, config={}), "other")
    trained = {name: tiny.normal(rng, "F32", 6) for name in ("norm.bias", "inner.bias")}
    parts = {"inner.lora_A.weight": (2, 6), "inner.lora_B.weight": (6, 2)}
    tensors = trained | {name: tiny.normal(rng, "F32", *shape) for name, shape in parts.items()}
    pushed.push(write(tmp_path / "all", tensors, target_modules=["inner"], bias="all"), base="other", name="all")
    model = torch.nn.ModuleDict({"norm": torch.nn.LayerNorm(6), "inner": torch.nn.Linear(6, 6)})
    model.load_state_dict({name: of(t) for name, t in base.items()})
    other = torch.nn.ModuleDict({"norm": torch.nn.LayerNorm(6), "inner": torch.nn.Linear(6, 6)})
    other.load_state_dict(model.state_dict() | {name: of(t) for name, t in trained.items()})
    other["inner"].weight += 1.5 * of(tensors["inner.lora_B.weight"]) @ of(tensors["inner.lora_A.weight"])
    x = torch.randn(3, 2, 6, generator=torch.Generator().manual_seed(0))
    with serving.unmerged(model, ["all"], pushed) as mixed, mixed.rows([0, None, 0]):
        for name in model:
            found, base_gives = model[name](x), torch.nn.Module.__call__(other[name], x)
            assert torch.allclose(found[[0, 2]], base_gives[[0, 2]], rtol=1e-5, atol=1e-6)
            assert not torch.isclose(found[1], base_gives[1]).all()
    model["norm"] = torch.nn.GroupNorm(2, 6)
    with pytest.raises(Unsupported, match=r"'norm.bias' is 'norm.bias' of the model, of a GroupNorm, .*LayerNorm"):
        serving.unmerged(model, ["all"], pushed, check="none")


def test_what_still_cannot_be_served_is_refused_by_name(served: Served, tmp_path: Path) -> None:
    registry, rng = served.registry, np.random.default_rng(5)
    model = Net(tiny.model())
    before = bytes_of(model)

    def refused(error: type[Exception], words: str, *names: str, **options: Any) -> None:
        with pytest.raises(error, match=words):
            serving.unmerged(model, ["sql", *names], registry, **{"check": "none", **options})
        assert not any(module._forward_hooks for module in model.modules())

    name = "lycoris_model_layers_0_self_attn_v_proj"
    inputs = {f"{name}.lora_down.weight": (2, 6), f"{name}.lora_up.weight": (6, 2), f"{name}.dora_scale": (1, 6)}
    file = tmp_path / "inputs.safetensors"
    file.write_bytes(tiny.container([(n, tiny.normal(rng, "F32", *shape)) for n, shape in inputs.items()]))
    registry.push(file, base="base", name="inputs")
    refused(Unsupported, r"inputs:v1 changes '.*v_proj' by .*\(its DoRA has norms of inputs.*merge it", "inputs")

    none = {**matrices(rng, V), f"{V}.lora_A.weight": tiny.tensor("F32", np.zeros((2, 6)))}
    registry.push(write(tmp_path / "zero", none, target_modules=["v_proj"], **DORA), base="base", name="zero")
    weight(model, V)[2] = 0
    refused(BadInput, r"zero:v1: '.*v_proj': group 2 along 'out' of W \+ D is zero", "zero")
    model = Net(tiny.model())

    none[f"{V}.lora_B.weight"] = none[f"{V}.lora_A.weight"]._replace(shape=(6, 2))
    large = {**none, f"{V}.lora_magnitude_vector": tiny.tensor("F32", np.full(6, 3e38))}
    registry.push(write(tmp_path / "large", large, target_modules=["v_proj"], **DORA), base="base", name="large")
    weight(model, V).mul_(1e-9)
    refused(BadInput, r"large:v1: .*v_proj' cannot be had in torch.float32", "large", dtype=torch.float32)
    model = Net(tiny.model())
    model.get_submodule(Q).bias = torch.nn.Parameter(torch.zeros(7))
    refused(BadInput, r"only:v1: '.*q_proj.bias' is for a bias of shape \[8\], and the model's .* has \[7\]", "only")
    model = Net(tiny.model())
    model.get_submodule("model").embed_tokens = torch.nn.Linear(6, 10, bias=False)  # a head that is the embedding
    refused(Unsupported, r"words:v1 scales the outputs of '.*embed_tokens' \(DoRA\), and so the inputs of", "words")
    model = Net(tiny.model()).to("meta")
    refused(Unsupported, r"'.*q_proj.weight' of the model is on the device meta", "dora")
    model = Net(tiny.model())
    assert bytes_of(model) == before


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("block", [1, 20, 2**18])
def test_norms_by_blocks_are_those_of_the_merge(turned: bool, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(decomposed._NORM_ELEMENTS, "cpu", block)
    draw = torch.Generator().manual_seed(3)
    W = torch.randn((5, 9) if turned else (9, 5), generator=draw).to(torch.bfloat16)
    W = W.T if turned else W
    deltas = tuple(LowRank(torch.randn(9, r, generator=draw), torch.randn(r, 5, generator=draw), 0.3) for r in (2, 1))
    m = torch.randn(9, generator=draw)
    before = W.clone()
    found = decomposed.beside(WeightedSum(deltas), W, m, 0.25)
    edited, minus = decomposed.decompose(WeightedSum(deltas), W, m, "out", 0.25).dense
    assert found.gain is not None and torch.equal(W, before)
    made = W.double() + found.gain[:, None] * W.double() + sum(delta.dense() for delta in found.low_rank)
    assert torch.allclose(made, edited.value, rtol=1e-13, atol=1e-14) and minus.scale == -1
    with pytest.raises(BadInput, match="has 8 numbers"):
        decomposed.beside(WeightedSum(deltas), W, m[:8], 0.0)
