"""Laws of what compose, resize and extract store: how far it is from the truth, and that threads do not show."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

import loreg
from loreg.algebra import LowRank
from loreg.algebra.truncate import distance, norm
from loreg.format.methods import METHODS

Array = tiny.Array
SHAPES = {f"model.layers.{i}.mlp.up_proj": shape for i, shape in enumerate([(40, 24), (9, 9), (16, 50)])}
SIZES = (1.0, 40.0, 3.0)  # of the modules' deltas: none is negligible, none is all
TALL = "model.layers.9.mlp.up_proj"
RANK = 4


def factors(seed: int, rows: int, columns: int, size: float, rank: int = RANK) -> tiny.Factors:
    """Singular values of all sizes, as of a trained adapter: truncation loses some, and not most."""
    rng = np.random.default_rng(seed)
    B = rng.standard_normal((rows, rank)) * size * 0.5 ** np.arange(rank)
    return tiny.Factors(tiny.tensor("F32", rng.standard_normal((rank, columns))), tiny.tensor("F32", B))


def perturbed(factors: tiny.Factors, by: float) -> tiny.Factors:
    noise = np.random.default_rng(9).standard_normal(factors.B.shape)
    return factors._replace(B=tiny.tensor("F32", factors.B.values * (1 + by * noise)))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[loreg.Registry]:
    """Three modules of different sizes; ``near`` is ``sql`` but for 1e-5, and lacks one of them."""
    folder = tmp_path_factory.mktemp("account")
    with loreg.open(folder / "home") as registry:
        tiny.write_model(folder / "base", {f"{p}.weight": tiny.tensor("F32", np.ones(s)) for p, s in SHAPES.items()})
        registry.add_base(folder / "base", "base")
        made = {
            name: {path: factors(seed + i, *SHAPES[path], SIZES[i]) for i, path in enumerate(SHAPES)}
            for seed, name in ((1, "sql"), (11, "humor"))
        }
        made["near"] = {path: perturbed(each, 1e-5) for path, each in list(made["sql"].items())[:2]}
        for name, modules in made.items():
            registry.push(tiny.write_adapter(folder / name, modules, alpha=RANK), base="base", name=name)
        yield registry


def deltas(world: loreg.Registry, reference: str) -> dict[str, Array]:
    return {path: delta.dense().numpy() for path, delta in world.load(reference).items()}


def summed(world: loreg.Registry, *terms: tuple[float, str]) -> dict[str, Array]:
    found: dict[str, Array] = {path: np.zeros(shape) for path, shape in SHAPES.items()}
    for weight, name in terms:
        for path, delta in deltas(world, name).items():
            found[path] = found[path] + weight * delta
    return found


def off(truth: dict[str, Array], stored: dict[str, Array]) -> tuple[float, dict[str, float]]:
    """‖truth - stored‖/‖truth‖ over all modules, and of each."""
    lost = {path: float(np.linalg.norm(truth[path] - stored[path])) for path in truth}
    sizes = {path: float(np.linalg.norm(truth[path])) for path in truth}
    whole = float(np.linalg.norm(list(lost.values())) / np.linalg.norm(list(sizes.values())))
    return whole, {path: lost[path] / sizes[path] for path in truth}


def check(composed: Any, truth: dict[str, Array], stored: dict[str, Array], rel: float) -> None:
    whole, each = off(truth, stored)
    assert composed.relative_error == pytest.approx(whole, rel=rel)
    assert composed.modules == pytest.approx(each, rel=rel)


LIMITED = {
    **{name: {"rank": 2} for name, row in METHODS.items() if row.composes_only and "rank" in row.parameters},
    "task_arithmetic": {"rank": 2},
    "ties:mergekit": {"rank": 2, "density": 0.5},
    "slerp": {"energy": 0.9},
}


@pytest.mark.parametrize("method", LIMITED)
def test_what_truncation_loses_is_said(world: loreg.Registry, method: str) -> None:
    """Against what the method gives without limits, in dense float64: modules of all sizes, each with its loss."""
    limits = LIMITED[method]
    whole = {key: value for key, value in limits.items() if key not in ("rank", "energy")}
    whole |= {"energy": 1.0} if METHODS[method].space == "dense" or method == "svd" else {}
    name = method.replace(":", "-").replace("_", "-")
    truth = world.compose("0.7*sql + 0.4*humor", f"{name}-whole", method=method, parameters=whole)
    assert truth.relative_error < 2e-7
    found = world.compose("0.7*sql + 0.4*humor", f"{name}-cut", method=method, parameters=limits)
    stored = deltas(world, str(found.version))
    check(found, deltas(world, str(truth.version)), stored, rel=1e-6)
    assert len({round(error, 3) for error in found.modules.values()}) == len(SHAPES)
    if METHODS[method].sums or method == "task_arithmetic":
        check(found, summed(world, (0.7, "sql"), (0.4, "humor")), stored, rel=1e-9)


@pytest.mark.parametrize(
    ("method", "parameters"),
    [("cat", {}), ("svd", {"rank": 4}), ("svd", {"energy": 1.0}), ("task_arithmetic", {"rank": 6})],
)
def test_what_cancels_shows_what_float32_lost(world: loreg.Registry, method: str, parameters: dict[str, Any]) -> None:
    found = world.compose("0.3*sql - 0.3*near", "rest", method=method, parameters=parameters)
    truth = summed(world, (0.3, "sql"), (-0.3, "near"))
    check(found, truth, deltas(world, str(found.version)), rel=1e-3)  # NumPy too knows them to 1e-11
    if method == "cat":  # of two adapters each is rounded; one alone is kept as it is
        first, _, alone = found.modules.values()
        assert first > 1e-3 and alone == 0


def test_nothing_is_lost_of_nothing(world: loreg.Registry) -> None:
    for method, parameters in (("cat", {}), ("svd", {"rank": 1}), ("task_arithmetic", {"rank": 1})):
        found = world.compose("sql - sql", "none", method=method, parameters=parameters)
        assert found.relative_error == 0 and set(found.modules.values()) == {0.0}
    assert world.compose("0.7*sql - humor", "exact").relative_error == 0


def test_sizes_beyond_squares_are_no_matter(world: loreg.Registry) -> None:
    once = world.compose("sql", "once", method="svd", rank=2)
    for power in (900, -900):
        far = world.compose(f"{2.0**power!r}*sql", "far", method="svd", rank=2)
        assert far.relative_error == pytest.approx(once.relative_error, rel=1e-6)


def test_resize_says_it_of_every_module(world: loreg.Registry) -> None:
    found = world.resize("sql", "small", rank=3)
    whole, each = off(deltas(world, "sql"), deltas(world, "small"))
    assert found.relative_error == pytest.approx(whole, rel=1e-9)
    assert {module.path: module.relative_error for module in found.modules} == pytest.approx(each, rel=1e-9)
    assert [(module.before, module.after) for module in found.modules] == [(RANK, 3)] * len(SHAPES)


# Threads.


@pytest.fixture(scope="module")
def tall(tmp_path_factory: pytest.TempPathFactory) -> Iterator[loreg.Registry]:
    """Where LAPACK on one thread and on two differ in float32: tall matrices, singular values from 1 to 1e-7, and two
    adapters that nearly cancel. ``saved`` reads the base."""
    folder = tmp_path_factory.mktemp("threads")
    model = {f"{TALL}.weight": tiny.tensor("F32", np.ones((2048, 64)))}
    model |= {f"{path}.weight": tiny.tensor("F32", np.ones(shape)) for path, shape in SHAPES.items()}
    with loreg.open(folder / "home") as registry:
        registry.add_base(tiny.write_model(folder / "base", model), "base")
        first = {TALL: factors(1, 2048, 64, 1.0, 24)}
        first |= {path: factors(2, *shape, 1.0, 24) for path, shape in SHAPES.items()}
        second = {path: perturbed(each, 1e-5) for path, each in first.items()}
        for name, modules in (("sql", first), ("near", second)):
            registry.push(tiny.write_adapter(folder / name, modules), base="base", name=name)
        full = {name: tiny.tensor("F32", tensor.values * 1.5) for name, tensor in model.items() if TALL not in name}
        registry.push(tiny.write_adapter(folder / "saved", {}, full=full), base="base", name="saved")
        grown = first[TALL].B.values.astype(float) @ first[TALL].A.values
        tiny.write_model(folder / "tuned", {**model, f"{TALL}.weight": tiny.tensor("F32", 1 + grown)})
        yield registry


def digests(work: Callable[[], Any]) -> set[str]:
    threads, found = torch.get_num_threads(), set()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.add(str(work().version.digest))
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    return found


@pytest.mark.parametrize("method", [*(name for name, row in METHODS.items() if row.composes_only), "task_arithmetic"])
def test_threads_do_not_show_in_what_is_composed(tall: loreg.Registry, method: str) -> None:
    row = METHODS[method]
    given = {"energy": 1.0} if method == "svd" or row.space == "dense" else {}
    assert len(digests(lambda: tall.compose("0.7*sql - 0.7*near", "sum", method=method, parameters=given))) == 1


def test_threads_do_not_show_in_what_is_resized_or_extracted(tall: loreg.Registry) -> None:
    assert len(digests(lambda: tall.resize("sql", "small", energy=1.0))) == 1
    base = Path(tall.show_base("base").path)
    assert len(digests(lambda: tall.extract(base, base.parent / "tuned", "found", energy=1.0))) == 1


def test_threads_read_the_base_together(tall: loreg.Registry) -> None:
    tall.compose("0.5*saved", "half")
    given = {"density": 0.5, "rank": 4}
    assert len(digests(lambda: tall.compose("half + sql", "both", method="ties", parameters=given))) == 1


# Norms, of factors alone.


def test_a_norm_knows_what_cancels() -> None:
    """B·A - (B + P)·A = -P·A, exact in float64, 2⁻²⁵ of what cancels: squares of the whole would leave 2⁻²⁷ of it."""
    rng = np.random.default_rng(3)
    b, p, a = (torch.from_numpy(rng.integers(-1000, 1000, s).astype(float)) for s in ((50, 4), (50, 4), (4, 30)))
    p *= 2.0**-25
    left = norm([LowRank(b, a), LowRank(b + p, a, -1.0)])
    assert left == pytest.approx(float((p @ a).norm()), rel=1e-6)
    assert norm([LowRank(b, a)]) == pytest.approx(float((b @ a).norm()), rel=1e-9)
    assert norm([LowRank(b, a), LowRank(b, a, -1.0)]) == 0 == norm([LowRank(0 * b, a)])
    assert distance(LowRank(b, a, 3.0), LowRank(b + p, a, 3.0)) == pytest.approx(3 * left, rel=1e-6)
