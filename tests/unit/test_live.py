"""Merges in a live model: the bytes that a merge on disk writes, and the way back bit for bit."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import live_models
import numpy as np
import pytest
import steps
import tiny
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from live_models import module_of

import loreg
from loreg import serving
from loreg.algebra import LowRank, WeightedSum
from loreg.algebra.corrections import Corrections
from loreg.algebra.passes import UNSURE
from loreg.algebra.rounding import Workspace, bits
from loreg.errors import BadInput, BaseMismatch, Conflict, LoregError, NotFound, Unsupported, UsageError
from loreg.serving import applying
from loreg.serving.live import Merged, prepare

Bytes = dict[str, tuple[str, bytes]]
BIAS = f"{tiny.Q}.bias"


def bytes_of(model: torch.nn.Module) -> Bytes:
    return {name: (dtype, data) for name, (dtype, _, data) in live_models.bytes_of(model).items()}


def on_disk(folder: Path) -> Bytes:
    return {name: (t.dtype, t.data) for name, t in tiny.tensors_in(folder).items()}


def parameter(model: torch.nn.Module, name: str) -> torch.Tensor:
    return dict(model.named_parameters(remove_duplicate=False))[name]


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    steps.make_small(monkeypatch)


def check(
    registry: loreg.Registry,
    base: Path,
    tmp_path: Path,
    expression: str,
    *,
    live: torch.nn.Module | None = None,
    **options: Any,
) -> serving.Merged:
    """Merges in memory and on disk, compares, and takes back."""
    model = live or module_of(tiny.tensors_in(base))
    before = bytes_of(model)
    merged = serving.merge_(model, expression, registry, **options)
    out = tmp_path / f"out{len(list(tmp_path.glob('out*')))}"
    result = registry.merge(expression, out, base=base, verify="none", **options)
    after = bytes_of(model)
    assert after == {name: value for name, value in on_disk(out).items() if name in after}
    assert set(merged.tensors) == set(result.touched)
    assert after != before
    serving.unmerge_(model, merged)
    assert bytes_of(model) == before
    return merged


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("expression", ["sql", "sql + humor", "0.3*sql - 2*humor"])
@pytest.mark.usefixtures("engine", "small_tiles")
def test_the_bytes_are_those_of_a_merge_on_disk(
    registry: loreg.Registry, tmp_path: Path, dtype: str, expression: str
) -> None:
    base = tiny.write_model(tmp_path / "base", tiny.model(dtype=dtype))
    registry.add_base(base, "base")
    for seed, name in enumerate(("sql", "humor"), 1):
        registry.push(tiny.write_adapter(tmp_path / name, tiny.adapter(seed, rank=seed + 1)), base="base", name=name)
    check(registry, base, tmp_path, expression)


@pytest.mark.parametrize("method", ["ties", "dare_linear", "slerp"])
def test_other_methods(pushed: loreg.Registry, tmp_path: Path, method: str) -> None:
    """In the recipe's order, whatever the one that was given."""
    parameters = {} if method == "slerp" else {"density": 0.5}
    for expression in ("0.7*sql + 0.3*humor", "0.3*humor + 0.7*sql"):
        check(pushed, tmp_path / "base", tmp_path, expression, method=method, parameters=parameters)
        model = module_of(tiny.tensors_in(tmp_path / "base"))
        ready = prepare(model, expression, pushed, method=method, parameters=parameters)
        terms = [(adapter.digest, adapter.weight) for adapter in ready.edits[0].combining.adapters]
        assert terms == sorted(terms) and len(terms) == 2


@pytest.mark.usefixtures("small_tiles")
def test_replaced_tensors_biases_and_what_reads_the_base(pushed: loreg.Registry, tmp_path: Path) -> None:
    """A norm that is replaced, one that is interpolated, a bias, and DoRA, of which the originals are kept."""
    base, rng = tmp_path / "base", np.random.default_rng(5)
    norm = tiny.model()[tiny.NORM]
    modules = tiny.adapter(seed=3)
    modules[tiny.Q] = modules[tiny.Q]._replace(bias=tiny.normal(rng, "F32", 8, std=0.1))
    saved = tiny.write_adapter(
        tmp_path / "saved",
        modules,
        full={tiny.NORM: tiny.tensor(norm.dtype, norm.values + 1)},
        modules_to_save=["norm"],
        lora_bias=True,
    )
    pushed.push(saved, base="base", name="saved")
    dora = tiny.write_adapter(tmp_path / "dora", tiny.adapter(seed=4), use_dora=True)
    file = dora / "adapter_model.safetensors"
    tensors = tiny.contents(file)
    for path, rows in ((tiny.Q, 8), (tiny.V, 6)):
        tensors[f"base_model.model.{path}.lora_magnitude_vector"] = tiny.normal(rng, "F32", rows)
    file.write_bytes(tiny.container(tensors.items(), {"format": "pt"}))
    pushed.push(dora, base="base", name="dora")
    merged = check(pushed, base, tmp_path, "saved")
    assert BIAS in merged.tensors and tiny.NORM in merged.tensors
    check(pushed, base, tmp_path, "0.5*saved + sql")
    check(pushed, base, tmp_path, "dora")
    check(pushed, base, tmp_path, "dora - 0.5*humor")


def test_it_can_be_applied_again_and_a_base_in_a_wider_dtype_is_known(pushed: loreg.Registry, tmp_path: Path) -> None:
    model = module_of(tiny.tensors_in(tmp_path / "base")).float()
    pushed.merge("sql", tmp_path / "wide", dtype="float32", verify="none")
    ready, before = prepare(model, "sql", pushed), bytes_of(model)
    for _ in range(3):
        merged = ready.apply()
        assert bytes_of(model) == on_disk(tmp_path / "wide")
        serving.unmerge_(model, merged)
        assert bytes_of(model) == before


def test_what_is_kept_is_small(registry: loreg.Registry, tmp_path: Path) -> None:
    """At |ΔW|/|W| = 1 % less than 4 % of the bytes."""
    rng = np.random.default_rng(1)
    base = tiny.write_model(tmp_path / "base", {f"{tiny.Q}.weight": tiny.normal(rng, "BF16", 256, 512, std=0.02)})
    registry.add_base(base, "base")
    std = (0.01 * 0.02 / (2 * 4)) ** 0.5
    modules = {tiny.Q: tiny.Factors(*(tiny.normal(rng, "F32", *size, std=std) for size in ((16, 512), (256, 16))))}
    registry.push(tiny.write_adapter(tmp_path / "sql", modules, alpha=32), base="base", name="sql")
    model = module_of(tiny.tensors_in(base))
    merged = serving.merge_(model, "sql", registry)
    assert merged.touched_bytes == 2 * 256 * 512
    assert 0 < merged.undo_bytes < 0.04 * merged.touched_bytes


def test_a_stack_of_merges_is_taken_back_from_the_top(pushed: loreg.Registry, tmp_path: Path) -> None:
    model = module_of(tiny.tensors_in(tmp_path / "base"))
    states, merges = [bytes_of(model)], []
    for expression in ("sql", "humor", "sql - humor"):
        merges.append(serving.merge_(model, expression, pushed, check="none"))
        states.append(bytes_of(model))
    with pytest.raises(Conflict, match="changed since 'humor'"):
        serving.unmerge_(model, merges[1])
    for merged, state in zip(reversed(merges), reversed(states[:-1]), strict=True):
        serving.unmerge_(model, merged)
        assert bytes_of(model) == state
        with pytest.raises(UsageError, match="already"):
            serving.unmerge_(model, merged)


def test_what_was_changed_since_is_not_taken_back(pushed: loreg.Registry, tmp_path: Path) -> None:
    tensors = tiny.tensors_in(tmp_path / "base")
    model, other = module_of(tensors), module_of(tensors)
    merged = serving.merge_(model, "sql", pushed)
    with pytest.raises(UsageError, match="not the tensor"):
        serving.unmerge_(other, merged)
    with torch.no_grad():
        parameter(model, f"{tiny.V}.weight")[0, 0] += 1
    after = bytes_of(model)
    with pytest.raises(Conflict, match=f"{tiny.V}.weight.*changed since"):
        serving.unmerge_(model, merged)
    assert bytes_of(model) == after
    wide = module_of(tensors)
    merged = serving.merge_(wide, "sql", pushed)
    with pytest.raises(Conflict):
        serving.unmerge_(wide.float(), merged)


def test_inference_tensors(pushed: loreg.Registry, tmp_path: Path) -> None:
    with torch.inference_mode():
        model = module_of(tiny.tensors_in(tmp_path / "base"))
    check(pushed, tmp_path / "base", tmp_path, "sql", live=model)


def test_the_default_registry_is_the_users(
    pushed: loreg.Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOREG_HOME", str(pushed.home))
    model = module_of(tiny.tensors_in(tmp_path / "base"))
    before = bytes_of(model)
    serving.unmerge_(model, serving.merge_(model, "sql"))
    assert bytes_of(model) == before


# ---- refused, and nothing touched ----


def refused(
    registry: loreg.Registry,
    model: torch.nn.Module,
    error: type[BaseException],
    match: str,
    expression: str = "sql",
    **options: Any,
) -> None:
    before = bytes_of(model)
    with pytest.raises(error, match=match):
        serving.merge_(model, expression, registry, **options)
    assert bytes_of(model) == before


def test_what_is_refused(pushed: loreg.Registry, tmp_path: Path) -> None:
    tensors = tiny.tensors_in(tmp_path / "base")
    model = module_of(tensors)
    refused(pushed, model, NotFound, "sqll", "sqll")
    refused(pushed, model, UsageError, "touched", check="all")
    refused(pushed, model, UsageError, "0 threads", threads=0)
    refused(pushed, model, Unsupported, "compose a version", method="svd", parameters={"rank": 1})
    refused(pushed, model, LoregError, "density", method="ties", parameters={"densty": 1})
    without = {name: value for name, value in tensors.items() if name != f"{tiny.V}.weight"}
    refused(pushed, module_of(without), BadInput, rf"sql:?\S* has '{tiny.V}.weight', and the model has no such")
    changed = {**tensors, f"{tiny.V}.weight": tensors[f"{tiny.V}.weight"].flipped(0)}
    refused(pushed, module_of(changed), BaseMismatch, f"'base', and the model differs.*1 of the 2.*{tiny.V}.weight")
    refused(pushed, module_of(tensors).half(), BaseMismatch, "2 of the 2")
    shape = {**tensors, f"{tiny.V}.weight": tiny.model(cols=7)[f"{tiny.V}.weight"]}
    refused(pushed, module_of(shape), BadInput, r"of shape \[6, 6\], and .* has \[7, 7\]")
    refused(pushed, module_of(tensors).double(), Unsupported, "float64: merging handles")
    twice = module_of(tensors)
    merged = serving.merge_(twice, "sql", pushed)
    refused(pushed, twice, BaseMismatch, "nothing merged into it", "humor")
    serving.unmerge_(twice, merged)
    meta = module_of(tensors).to("meta")
    with pytest.raises(Unsupported, match="device meta"):
        serving.merge_(meta, "sql", pushed)


class Shard(torch.nn.Parameter):
    pass


def test_parameters_that_are_no_plain_memory(pushed: loreg.Registry, tmp_path: Path) -> None:
    tensors = tiny.tensors_in(tmp_path / "base")
    model = module_of(tensors)
    attention = model.get_submodule(tiny.V)
    weight = attention.weight
    attention.weight = Shard(weight.data.clone())
    refused(pushed, model, Unsupported, "is a Shard")
    attention.weight = torch.nn.Parameter(weight.data.t())
    refused(pushed, model, Unsupported, "not contiguous")
    model = module_of(tensors)
    model.config = {"model_type": "llama", "quantization_config": {"quant_method": "fp8"}}
    refused(pushed, model, Unsupported, "quantised")


def test_one_parameter_under_two_names(pushed: loreg.Registry, tmp_path: Path) -> None:
    model = module_of(tiny.tensors_in(tmp_path / "base"))
    model.other = torch.nn.Module()
    model.other.weight = model.get_submodule(tiny.V).weight
    refused(pushed, model, Unsupported, "'other.weight' are one parameter|one parameter")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3.38e38])
@pytest.mark.usefixtures("engine", "small_tiles")
def test_an_error_half_way_leaves_nothing(registry: loreg.Registry, tmp_path: Path, value: float) -> None:
    """In the last row of the tensor that is edited last."""
    tensors = tiny.model()
    name = f"{tiny.V}.weight"
    base = tiny.write_model(tmp_path / "base", tensors)
    registry.add_base(base, "base")
    modules = tiny.adapter()
    B = np.zeros((6, 2))
    B[-1] = 1e30
    modules[tiny.V] = tiny.Factors(tiny.tensor("F32", np.full((2, 6), 1e8)), tiny.tensor("F32", B))
    registry.push(tiny.write_adapter(tmp_path / "sql", modules), base="base", name="sql")
    model = module_of(tensors)
    with torch.no_grad():
        parameter(model, name)[-1, -1] = value
    done: list[str] = []
    original = applying.Editing.apply

    def apply(self: applying.Editing, space: applying.Space) -> None:
        original(self, space)
        done.append(self.edit.target.name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(applying.Editing, "apply", apply)
        refused(registry, model, BadInput, f"{name}.*element", check="none", threads=1)
    assert done == [f"{tiny.Q}.weight"], "the other one was edited, and put back"


@pytest.mark.usefixtures("engine", "small_tiles")
def test_an_interrupt_leaves_nothing_even_a_second_one(pushed: loreg.Registry, tmp_path: Path) -> None:
    model = module_of(tiny.tensors_in(tmp_path / "base"))
    with steps.failing(
        KeyboardInterrupt(), {4, 5}.__contains__
    ) as count:  # the second while the first is cleared away
        refused(pushed, model, KeyboardInterrupt, "^$", threads=1)
    assert count[0] > 5


@pytest.mark.usefixtures("engine", "small_tiles")
def test_a_way_back_that_fails_is_not_taken_for_one(pushed: loreg.Registry, tmp_path: Path) -> None:
    """For example for want of memory, twice: an earlier merge is then not taken back as if nothing had happened."""
    model = module_of(tiny.tensors_in(tmp_path / "base"))
    merged = serving.merge_(model, "sql", pushed)
    with steps.failing(MemoryError(), (4).__le__), pytest.raises(MemoryError):
        serving.merge_(model, "humor", pushed, check="none", threads=1)
    with pytest.raises(Conflict, match="was changed since"):
        serving.unmerge_(model, merged)


@pytest.mark.usefixtures("engine", "small_tiles")
def test_an_interrupted_unmerge_goes_on(pushed: loreg.Registry, tmp_path: Path) -> None:
    model = module_of(tiny.tensors_in(tmp_path / "base"))
    before = bytes_of(model)
    merged = serving.merge_(model, "sql", pushed)
    with steps.failing(KeyboardInterrupt(), (3).__eq__), pytest.raises(KeyboardInterrupt):
        serving.unmerge_(model, merged)
    assert bytes_of(model) != before
    serving.unmerge_(model, merged)
    assert bytes_of(model) == before


@pytest.mark.parametrize(
    "laid", [lambda x: x.t().contiguous().t(), lambda x: torch.cat([x, x], dim=1)[:, : x.shape[1]]]
)
@pytest.mark.parametrize("live", [False, True])
@pytest.mark.usefixtures("engine")
def test_parameters_that_were_laid_out_otherwise_since(
    pushed: loreg.Registry, tmp_path: Path, laid: Callable[[torch.Tensor], torch.Tensor], live: bool
) -> None:
    model = module_of(tiny.tensors_in(tmp_path / "base"))
    before = {name: one.detach().clone() for name, one in model.named_parameters()}
    attached = serving.attach(model, pushed)
    merged = attached.apply("sql") if live else serving.merge_(model, "sql", pushed)
    for one in model.parameters():
        if one.ndim == 2:
            one.data = laid(one.data)
            assert not one.is_contiguous()
    if live:
        attached.restore()
    else:
        assert isinstance(merged, Merged)
        serving.unmerge_(model, merged)
    for name, one in model.named_parameters():
        assert torch.equal(one.detach(), before[name]), name


def test_threads_and_torchs_own_number_of_them(pushed: loreg.Registry, tmp_path: Path) -> None:
    usual, seen = torch.get_num_threads(), set[str]()
    original = applying.Editing.apply

    def apply(self: applying.Editing, space: applying.Space) -> None:
        seen.add(threading.current_thread().name)
        original(self, space)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(applying.Editing, "apply", apply)
        check(pushed, tmp_path / "base", tmp_path, "sql", threads=3)
    assert torch.get_num_threads() == usual
    assert threading.main_thread().name not in seen


# ---- laws ----


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn]),
    rows=st.integers(1, 300),
    columns=st.sampled_from([1, 7, 64, 300]),
    scale=st.sampled_from([1.0, 2.0**-8, 16.0]),  # no sum leaves float8
    seed=st.integers(0, 2**32),
)
def test_corrections_give_back_what_was_there(
    engine: str, dtype: torch.dtype, rows: int, columns: int, scale: float, seed: int
) -> None:
    random = torch.Generator().manual_seed(seed)
    W = torch.randn(rows, columns, generator=random).mul(0.5).to(dtype)
    edit = WeightedSum(
        (LowRank(torch.randn(rows, 3, generator=random), torch.randn(3, columns, generator=random), scale),)
    )
    small, out = torch.empty(W.shape, dtype=torch.int8), torch.empty_like(W)
    outcome = edit.prepare(W.shape, dtype, dtype, residual=True, workspace=Workspace()).tile(W, 0, out, small)
    count = int((small != 0).sum())
    kept = Corrections.of(small.view(-1), outcome)
    assert torch.equal(kept.wide_index, outcome.index) and not bool((kept.by == 0).any() | (kept.by == UNSURE).any())
    assert len(kept.by) + len(kept.wide) == count
    predicted = (-edit).apply(out)
    kept.to(torch.device("cpu")).add_to(predicted.view(-1))
    assert torch.equal(bits(predicted), bits(W))


@pytest.fixture
def adapted(pushed: loreg.Registry, tmp_path: Path) -> Iterator[Callable[[str], Bytes]]:
    def merged(expression: str) -> Bytes:
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        pushed.merge(expression, out, verify="none")
        return on_disk(out)

    yield merged


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(weights=st.lists(st.integers(-300, 300), min_size=2, max_size=2), threads=st.integers(1, 3))
def test_any_sum_is_merged_and_taken_back(
    pushed: loreg.Registry, tmp_path: Path, adapted: Callable[[str], Bytes], weights: list[int], threads: int
) -> None:
    expression = f"{weights[0] / 100}*sql + {weights[1] / 100}*humor".replace("+ -", "- ")
    model = module_of(tiny.tensors_in(tmp_path / "base"))
    before = bytes_of(model)
    merged = serving.merge_(model, expression, pushed, threads=threads)
    assert bytes_of(model) == adapted(expression)
    serving.unmerge_(model, merged)
    assert bytes_of(model) == before
