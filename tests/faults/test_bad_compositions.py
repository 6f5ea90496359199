"""What has no form as one adapter is refused: the message names it, says why, and what to do, which then works."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

import loreg
from loreg.errors import LoregError, Unsupported
from loreg.format.methods import METHODS

Q, V, NORM, WORDS = tiny.Q, tiny.V, tiny.NORM, "model.embed_tokens"
ELSE = "merge the expression by linear or by a method on dense deltas"


def _needed(method: str) -> dict[str, Any]:
    """Parameters with which a method composes: a density, a rank."""
    row = METHODS[method]
    given = {"density": 0.5} if "density" in row.parameters else {}
    return given | ({"rank": 2} if "rank" in row.parameters or row.space == "dense" else {})


def _with(folder: Path, extra: Mapping[str, tiny.Tensor]) -> Path:
    """An adapter's directory with these tensors beside its own."""
    path = folder / "adapter_model.safetensors"
    named = {**tiny.contents(path), **{f"base_model.model.{name}": value for name, value in extra.items()}}
    path.write_bytes(tiny.container(named.items()))
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[loreg.Registry]:
    """``tiny.model``, and adapters of it: plain ones, and what methods may have no answer for."""
    folder = tmp_path_factory.mktemp("compositions")
    rng, plain = np.random.default_rng(4), tiny.adapter()
    full = {"saved": {NORM: tiny.tensor("BF16", np.ones(6))}}
    full["more"] = dict.fromkeys((f"{WORDS}.weight", "lm_head.weight"), tiny.tensor("BF16", np.ones((12, 6))))
    biased = {Q: plain[Q]._replace(bias=tiny.tensor("F32", np.ones(8)))}
    made = {
        "sql": tiny.write_adapter(folder / "sql", plain),
        "dora": tiny.write_adapter(folder / "dora", {Q: plain[Q]}, use_dora=True),
        "biased": tiny.write_adapter(folder / "biased", biased, lora_bias=True),
        **{name: tiny.write_adapter(folder / name, {}, full=tensors) for name, tensors in full.items()},
        "product": tiny.write_adapter(folder / "product", {WORDS: tiny.factors(rng, 10, 6, 2)}),
        "lookup": tiny.write_adapter(folder / "lookup", {}, r=2, target_modules=[WORDS]),
    }
    _with(made["dora"], {f"{Q}.lora_magnitude_vector": tiny.tensor("F32", np.full(8, 2.0))})
    turned = {"A": tiny.normal(rng, "F32", 2, 10), "B": tiny.normal(rng, "F32", 6, 2)}
    _with(made["lookup"], {f"{WORDS}.lora_embedding_{part}": value for part, value in turned.items()})
    with loreg.open(folder / "home") as registry:
        registry.add_base(tiny.write_model(folder / "base", tiny.model()), "base")
        for name, path in made.items():
            registry.push(path, base="base", name=name)
        yield registry


def refused(world: loreg.Registry, out: Path, expression: str, method: str, *words: str) -> None:
    """``compose`` says ``words``, as does a merge by a method that composes; nothing is stored then."""
    before = [row.digest for row in world.list_versions(all_versions=True)]
    said = []
    with pytest.raises(LoregError) as caught:
        world.compose(expression, "made", method=method, parameters=_needed(method))
    said.append(caught.value)
    if METHODS[method].composes_only:
        with pytest.raises(LoregError) as caught:
            world.merge(expression, out, method=method, parameters=_needed(method))
        said.append(caught.value)
    for error in said:
        assert type(error) is Unsupported
        assert all(word in str(error) for word in words), error
    assert [row.digest for row in world.list_versions(all_versions=True)] == before
    assert not out.exists()


@pytest.mark.parametrize("method", [name for name, row in METHODS.items() if row.composes_only])
def test_factors_of_what_has_none(world: loreg.Registry, tmp_path: Path, method: str) -> None:
    words = ("dora:v1", repr(Q), "has no factors", "linear", "dense deltas", "loreg methods")
    refused(world, tmp_path / "out", "dora + sql", method, *words)


def test_what_the_refusal_advises_works(world: loreg.Registry, tmp_path: Path) -> None:
    world.compose("dora + sql", "both")
    world.compose("dora + sql", "near", method="task_arithmetic", rank=4)
    world.merge("dora + sql", tmp_path / "linear")
    world.merge("dora + sql", tmp_path / "dense", method="ties")


def test_a_version_without_factors_is_not_loaded_as_such(world: loreg.Registry) -> None:
    with pytest.raises(Unsupported, match=f"dora:v1 changes '{Q}'.*has no factors.*linear"):
        world.load("dora")


@pytest.mark.parametrize("method", METHODS)
def test_trained_biases_add_in_sums_and_count_in_dense_deltas(
    world: loreg.Registry, tmp_path: Path, method: str
) -> None:
    row = METHODS[method]
    if row.space == "factors" and not row.sums:
        words = ("biased:v1", "a trained bias", repr(Q), method, "linear, cat, svd", "dense deltas")
        refused(world, tmp_path / "out", "biased + sql", method, *words)
    else:
        made = world.compose("biased + sql", "made", method=method, parameters=_needed(method)).version
        assert made.manifest.modules[Q].bias_tensor == f"{Q}.bias"


@pytest.mark.parametrize("method", METHODS)
def test_replaced_tensors_compose_in_sums(world: loreg.Registry, tmp_path: Path, method: str) -> None:
    if METHODS[method].sums:
        made = world.compose("saved + sql", "made", method=method, parameters=_needed(method)).version
        assert list(made.manifest.full) == [NORM]
    else:
        words = ("saved:v1", repr(NORM), method, "linear, cat, svd", ELSE)
        refused(world, tmp_path / "out", "saved + sql", method, *words)


def test_the_methods_that_give_the_sum_give_it(world: loreg.Registry) -> None:
    """What ``sums`` says of a row, by the product: untruncated, such a method loses nothing."""
    truth = {path: delta.dense() for path, delta in world.load("sql").items()}
    for method, row in METHODS.items():
        if row.sums:
            given = {"rank": 6} if "rank" in row.parameters else {}
            made = world.compose("sql - 3*sql", "twice", method=method, parameters=given).version
            for path, delta in world.load(str(made)).items():
                np.testing.assert_allclose(delta.dense(), -2 * truth[path], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", [name for name, row in METHODS.items() if row.space != "dense"])
def test_a_method_that_composes_only_gives_one_pair_of_factors(
    world: loreg.Registry, tmp_path: Path, method: str
) -> None:
    made = world.compose("sql + 2*sql", "pair", method=method, parameters=_needed(method)).version
    module = made.manifest.modules[Q]
    assert (len(module.terms), module.rank) == ((2, 4) if method == "linear" else (1, 4 if method == "cat" else 2))
    merged = world.merge("sql + 2*sql", tmp_path / "out", method=method, parameters=_needed(method)).record.recipe
    assert merged.method == "linear"
    assert len(merged.terms) == (2 if method == "linear" else 1)


def test_a_replaced_tensor_of_another_size(world: loreg.Registry, tmp_path: Path) -> None:
    words = ("more:v1 resizes", "only one adapter can, at weight 1")
    refused(world, tmp_path / "out", "0.5*more + sql", "linear", *words)
    world.compose("more + sql", "made")


def test_layers_of_different_kinds(world: loreg.Registry, tmp_path: Path) -> None:
    words = (repr(WORDS), "linear of shape [10, 6], out_in", "embedding of shape [10, 6], in_out", "of one model")
    refused(world, tmp_path / "out", "product + lookup", "linear", *words)
