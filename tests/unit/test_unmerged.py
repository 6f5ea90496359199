"""``serving.unmerged`` on small plain models: each row is what the model would give with its adapter's weights."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from live_models import bytes_of

import loreg
from loreg import serving
from loreg.errors import BadInput, BaseMismatch, NotFound, Unsupported, UsageError
from loreg.tensors import TORCH

Q, V = tiny.Q, tiny.V
EMBEDDING = "model.embed_tokens"


class Net(torch.nn.Module):
    """The layers of ``tiny.model()``, under their names: ids (n, t) to (n, t, 8)."""

    def __init__(self, tensors: Mapping[str, tiny.Tensor], dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        layers = {
            EMBEDDING: torch.nn.Embedding(10, 6),
            Q: torch.nn.Linear(6, 8),
            V: torch.nn.Linear(6, 6, bias=False),
        }
        for path, layer in layers.items():
            *parents, last = path.split(".")
            module: torch.nn.Module = self
            for parent in parents:
                if parent not in module._modules:
                    module.add_module(parent, torch.nn.Module())
                module = module.get_submodule(parent)
            module.add_module(last, layer)
        for name, parameter in self.named_parameters():
            value = tensors[name]
            data = torch.frombuffer(bytearray(value.data), dtype=TORCH[value.dtype]).reshape(value.shape)
            parameter.data = data.to(dtype)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.get_submodule(EMBEDDING)(ids)
        hidden = hidden + self.get_submodule(V)(torch.tanh(hidden))
        return self.get_submodule(Q)(input=hidden)  # type: ignore[no-any-return]


def ids(rows: int, positions: int = 5, seed: int = 0) -> torch.Tensor:
    return torch.randint(10, (rows, positions), generator=torch.Generator().manual_seed(seed))


NAMES = ("sql", "humor", "wide", "words")
GIVEN = {
    V: torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(1)),
    EMBEDDING: torch.arange(12).reshape(3, 4) % 10,
}
"""What three rows are for a layer."""


@pytest.fixture
def served(pushed: loreg.Registry, tmp_path: Path) -> loreg.Registry:
    """``pushed``, and ``wide``, of a higher rank for one layer, ``words``, for the embedding, ``both``, composed."""
    rng = np.random.default_rng(7)
    wide = {V: tiny.factors(rng, 6, 6, 5)}
    pushed.push(tiny.write_adapter(tmp_path / "wide", wide), base="base", name="wide")
    folder = tiny.write_adapter(tmp_path / "words", {}, r=2, target_modules=["embed_tokens"])
    prefix = f"base_model.model.{EMBEDDING}.lora_embedding_"
    factors = {f"{prefix}A": tiny.normal(rng, "F32", 2, 10), f"{prefix}B": tiny.normal(rng, "F32", 6, 2)}
    (folder / "adapter_model.safetensors").write_bytes(tiny.container(factors.items(), {"format": "pt"}))
    pushed.push(folder, base="base", name="words")
    pushed.compose("0.7*sql - 2*humor", "both")
    return pushed


def edited(registry: loreg.Registry, reference: str | None) -> Net:
    """The model with the dense deltas of an adapter in its weights, in float64."""
    model = Net(tiny.model())
    if reference is not None:
        for path, delta in registry.load(reference).items():
            model.get_submodule(path).weight.data += delta.dense()  # type: ignore[operator]
    return model


@torch.no_grad()
def test_every_mix_of_rows_is_what_each_adapter_gives_alone(served: loreg.Registry) -> None:
    references = [*NAMES, None, "both"]
    apart = [edited(served, reference) for reference in references]
    model = Net(tiny.model())
    before = bytes_of(model)
    with serving.unmerged(model, references, served, check="none") as mixed:

        @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
        @given(
            rows=st.lists(st.integers(0, len(references) - 1), min_size=1, max_size=9),
            times=st.integers(1, 3),
            positions=st.integers(1, 4),
        )
        def check(rows: list[int], times: int, positions: int) -> None:
            given_ids = ids(len(rows) * times, positions, seed=sum(rows))
            with mixed.rows(rows):
                found = model(given_ids)
            expected = torch.cat([apart[row](given_ids[n * times : (n + 1) * times]) for n, row in enumerate(rows)])
            assert (found - expected).abs().max() <= 1e-12 * expected.abs().max()

        check()
    assert bytes_of(model) == before


@torch.no_grad()
def test_rows_by_name_index_or_none(served: loreg.Registry) -> None:
    model = Net(tiny.model())
    batch = ids(5)
    with serving.unmerged(model, ["sql", None, "humor"], served, check="none") as mixed:
        with mixed.rows(["humor", "sql", None, 1, 2]):
            one = model(batch)
        with mixed.rows([2, 0, 1, None, "humor"]):
            assert torch.equal(model(batch), one)
        with mixed.rows([None] * 5):
            alone = model(batch)
        assert mixed.nbytes > 0
    assert torch.equal(alone, model(batch))
    assert torch.equal(one[2:4], alone[2:4]) and not torch.isclose(one[4], alone[4]).any()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_an_output_is_rounded_once(served: loreg.Registry, dtype: torch.dtype) -> None:
    """Of a layer, beside what the base gives; the base's weights are bfloat16, and the factors float32."""
    layer = (model := Net(tiny.model(), dtype)).get_submodule(V)
    x = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(1)).to(dtype)
    base = layer(x)
    delta = served.load("wide")[V].dense()
    check: Any = "touched" if dtype in (torch.bfloat16, torch.float32) else "none"
    with serving.unmerged(model, ["wide"], served, check=check) as mixed, mixed.rows([0, None, 0]):
        found = layer(x)
    exact = base.double() + (x.double() @ delta.T) * torch.tensor([1, 0, 1])[:, None, None]
    assert found.dtype == dtype
    step = exact.abs() * torch.finfo(dtype).eps / 2
    assert ((found.double() - exact).abs() <= step + 1e-6 * exact.abs().max()).all()
    assert torch.equal(found[1], base[1])


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_factors_in_less_than_the_base_round_nothing_of_it(served: loreg.Registry, dtype: torch.dtype) -> None:
    model = Net(tiny.model(), torch.float32)
    before = {name: model.get_submodule(name)(x) for name, x in GIVEN.items()}
    mixed = serving.unmerged(model, ["wide", "words"], served, check="none", dtype=dtype)
    with mixed, mixed.rows([0, None, 1]):
        found = {name: model.get_submodule(name)(x) for name, x in GIVEN.items()}
    assert torch.equal(found[V][1:], before[V][1:]) and not torch.equal(found[V][0], before[V][0])
    assert torch.equal(found[EMBEDDING][:2], before[EMBEDDING][:2])
    assert not torch.equal(found[EMBEDDING][2], before[EMBEDDING][2])


@torch.no_grad()
def test_autocast_rounds_nothing_of_it_either(served: loreg.Registry) -> None:
    """What the base gives under autocast, and beside it the product in the dtype of the factors."""
    model = Net(tiny.model(), torch.float32)
    exact = served.load("words")[EMBEDDING].dense()[GIVEN[EMBEDDING][2]].double()
    with torch.autocast("cpu", torch.bfloat16):
        before = model.get_submodule(EMBEDDING)(GIVEN[EMBEDDING])
        with serving.unmerged(model, ["words"], served, check="none") as mixed, mixed.rows([None, None, 0]):
            found = model.get_submodule(EMBEDDING)(GIVEN[EMBEDDING])
    assert torch.equal(found[:2], before[:2])
    assert torch.allclose(found[2].double(), before[2].double() + exact, rtol=1e-6, atol=1e-6)


def test_nothing_stays_whatever_is_raised(served: loreg.Registry) -> None:
    model = Net(tiny.model())
    before, batch = bytes_of(model), ids(2)
    plain = model(batch)
    mixed = serving.unmerged(model, ["sql"], served, check="none")
    with pytest.raises(KeyboardInterrupt), mixed, mixed.rows([0, 0]):
        assert not torch.equal(model(batch), plain)
        raise KeyboardInterrupt
    assert not any(module._forward_hooks for module in model.modules())
    assert torch.equal(model(batch), plain) and bytes_of(model) == before
    with mixed, mixed.rows([0, 0]):  # again
        assert not torch.equal(model(batch), plain)
        with pytest.raises(UsageError, match="already"), mixed:
            raise AssertionError("entered twice")
        assert not torch.equal(model(batch), plain)


def test_a_hook_that_cannot_be_set_leaves_none(served: loreg.Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Net(tiny.model())
    made = serving.unmerged(model, ["sql"], served, check="none")

    def refuse(*args: object, **options: object) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr(model.get_submodule(V), "register_forward_hook", refuse)
    with pytest.raises(RuntimeError), made:
        raise AssertionError("entered")
    assert not any(module._forward_hooks for module in model.modules())


def test_what_another_hook_kept_is_not_changed(served: loreg.Registry) -> None:
    model, kept = Net(tiny.model()), []
    model.get_submodule(V).register_forward_hook(lambda module, args, output: kept.append((output, output.clone())))
    with serving.unmerged(model, ["sql"], served, check="none") as mixed, mixed.rows([0]):
        model(ids(1))
    assert torch.equal(*kept[0])


def test_gradients_go_through(served: loreg.Registry) -> None:
    model, layer = edited(served, "wide"), Net(tiny.model())
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    one, two = x.clone().requires_grad_(), x.clone().requires_grad_()
    model.get_submodule(V)(one).sum().backward()
    with serving.unmerged(layer, ["wide"], served, check="none") as mixed, mixed.rows([0, 0]):
        layer.get_submodule(V)(two).sum().backward()
    assert one.grad is not None and two.grad is not None
    assert torch.allclose(one.grad, two.grad, rtol=1e-12)


def test_threads_that_share_a_model_do_not_mix(served: loreg.Registry) -> None:
    model, failed = Net(tiny.model()), list[object]()
    apart = [edited(served, reference) for reference in ("sql", "humor")]
    with serving.unmerged(model, ["sql", "humor"], served, check="none") as mixed:
        barrier = threading.Barrier(4)

        def serve(number: int) -> None:
            batch = ids(3, seed=number)
            with torch.inference_mode():
                barrier.wait()
                for turn in range(20):
                    rows = [(number + turn + n) % 2 for n in range(3)]
                    with mixed.rows(rows):
                        barrier.wait()
                        found = model(batch)
                    expected = torch.stack([apart[row](batch[n : n + 1])[0] for n, row in enumerate(rows)])
                    if not torch.allclose(found, expected, rtol=1e-12, atol=1e-12):
                        failed.append((number, turn))

        threads = [threading.Thread(target=serve, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert failed == []


def test_tasks_that_take_turns_do_not_mix(served: loreg.Registry) -> None:
    model = Net(tiny.model())
    apart = [edited(served, reference) for reference in ("sql", "humor")]
    with torch.no_grad(), serving.unmerged(model, ["sql", "humor"], served, check="none") as mixed:

        async def serve(number: int) -> bool:
            with mixed.rows([number]):
                for _ in range(3):
                    await asyncio.sleep(0)
                    found = model(ids(1, seed=number))
            return torch.allclose(found, apart[number](ids(1, seed=number)), rtol=1e-12, atol=1e-12)

        async def both() -> list[bool]:
            return await asyncio.gather(serve(0), serve(1))

        assert asyncio.run(both()) == [True, True]


def test_two_that_are_entered_add_up(served: loreg.Registry) -> None:
    model, batch = Net(tiny.model()), ids(1)
    layer, x = model.get_submodule(V), torch.randn(1, 2, 6, dtype=torch.float64)
    base = layer(x)
    with serving.unmerged(model, ["sql"], served, check="none") as one, one.rows([0]):
        sql = layer(x) - base
        with serving.unmerged(model, ["humor"], served, check="none") as two:
            with two.rows([0]):
                both = layer(x) - base
            with pytest.raises(UsageError, match="nothing says which adapter"):
                model(batch)
    humor = x @ served.load("humor")[V].dense().T
    assert torch.allclose(both, sql + humor, rtol=1e-12, atol=1e-14)


def test_what_does_not_fit_a_batch_is_said(served: loreg.Registry) -> None:
    model = Net(tiny.model())
    with serving.unmerged(model, ["sql", None], served, check="none") as mixed:
        with pytest.raises(UsageError, match=r"v_proj' was called, and nothing says which adapter"):
            model(ids(2))
        with mixed.rows([0, 0]), pytest.raises(UsageError, match=r"v_proj' was given 3 rows, .* named for 2"):
            model(ids(3))
        with mixed.rows([0, 0]), pytest.raises(UsageError, match=r"given 1 rows, .* named for 2"):
            model(ids(1))
        with mixed.rows([0, 0]), pytest.raises(UsageError, match=r"given 1 rows, .* named for 2"):
            model.get_submodule(V)(torch.zeros(6, dtype=torch.float64))
        with mixed.rows([0]):
            assert model.get_submodule(V)(torch.zeros(6, dtype=torch.float64)).shape == (6,)
        for rows, words in (
            ([2], "2 is no index"),
            ([-1], "-1 is no index"),
            (["humor"], "'humor' is none"),
            ([], "No"),
        ):
            with pytest.raises(UsageError, match=words), mixed.rows(rows):  # type: ignore[arg-type]
                raise AssertionError("accepted")
        seen: list[type[BaseException]] = []

        def other() -> None:
            try:
                model(ids(2))
            except UsageError as error:
                seen.append(type(error))

        with mixed.rows([0, 0]):  # another thread has no rows
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()
    assert seen == [UsageError]


@torch.no_grad()
def test_an_embedding_that_is_given_one_row_for_all(served: loreg.Registry) -> None:
    model, batch = Net(tiny.model()), ids(1)
    layer = model.get_submodule(EMBEDDING)
    expected = [edited(served, name).get_submodule(EMBEDDING)(batch)[0] for name in ("words", None, "words")]
    with serving.unmerged(model, ["words"], served, check="none") as mixed, mixed.rows([0, None, 0]):
        found = layer(batch)
    assert torch.allclose(found, torch.stack(expected), rtol=1e-12)


@pytest.fixture
def strange(served: loreg.Registry, tmp_path: Path) -> Iterator[loreg.Registry]:
    rng = np.random.default_rng(9)
    plain = tiny.adapter()
    full = {"lm_head.weight": tiny.normal(rng, "BF16", 10, 6)}
    served.push(tiny.write_adapter(tmp_path / "full", plain, full=full), base="base", name="full")
    yield served


def test_what_cannot_be_served_is_refused_by_name(strange: loreg.Registry) -> None:
    model = Net(tiny.model())

    def refused(error: type[Exception], words: str, *references: str, **options: Any) -> None:
        with pytest.raises(error, match=words):
            serving.unmerged(model, references, strange, **{"check": "none", **options})
        assert not any(module._forward_hooks for module in model.modules())

    refused(Unsupported, r"full:v1 replaces 'lm_head.weight'", "sql", "full")
    refused(NotFound, "nothing", "nothing")
    refused(UsageError, "'all' is not a kind of check", "sql", check="all")
    refused(Unsupported, r"sql:v1: .*_proj' cannot be had in torch.int8", "sql", dtype=torch.int8)
    parent = model.get_submodule(V.rpartition(".")[0])

    class Scaled(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    for other in (Scaled(6, 6), torch.nn.Bilinear(6, 1, 6)):
        parent.v_proj = other
        if isinstance(other, torch.nn.Bilinear):
            other.weight = torch.nn.Parameter(torch.zeros(6, 6))
        refused(Unsupported, rf"v_proj.weight' of the model, of a {type(other).__name__}, .*expected", "sql")
    parent.v_proj = torch.nn.Linear(6, 7)
    refused(BadInput, r"sql:v1: .*v_proj' is for a weight of shape \[6, 6\], and the model's .* has \[7, 6\]", "sql")
    del parent.v_proj
    refused(BadInput, r"sql:v1 has '.*v_proj.weight', and the model has no such parameter", "sql")


def test_the_base_is_checked(served: loreg.Registry) -> None:
    model = Net(tiny.model(), torch.bfloat16)
    serving.unmerged(model, ["sql", "words"], served)
    with torch.no_grad():
        model.get_submodule(V).weight[1, 1] += 1  # type: ignore[operator]
    with pytest.raises(BaseMismatch, match=r"differs from it in 1 of the .*v_proj"):
        serving.unmerged(model, ["sql", "words"], served)
    serving.unmerged(model, ["words"], served)


def test_the_default_registry_is_the_users(served: loreg.Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOREG_HOME", str(served.home))
    model = Net(tiny.model())
    with serving.unmerged(model, ["sql"], check="none") as mixed, mixed.rows([0]):
        assert torch.allclose(model(ids(1)), edited(served, "sql")(ids(1)), rtol=1e-12)


def test_the_async_twin(pushed: loreg.Registry, tmp_path: Path) -> None:
    async def main() -> serving.Unmerged:
        return await serving.unmerged_async(torch.nn.Module(), [None], pushed)

    assert asyncio.run(main()).references == (None,)
