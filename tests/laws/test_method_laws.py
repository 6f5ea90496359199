"""Laws that every method keeps, through the whole of a merge: disk to disk, with the recipe that it leaves."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

import loreg
from loreg.errors import BaseMismatch, Conflict, UsageError
from loreg.format.methods import METHODS

Q, V = tiny.Q, tiny.V
NAMES = ("sql", "humor", "code")
PARAMETERS = {name: {"density": 0.5} for name, row in METHODS.items() if "density" in row.parameters}
DENSE = [name for name, row in METHODS.items() if row.space == "dense"]
FACTORS = [name for name, row in METHODS.items() if row.space == "factors" or name == "cat"]
# One adapter alone, at weight 1 and with every element kept, is itself; what the others do is in their definitions.
IDENTITY = ["linear", *(name for name in DENSE if METHODS[name].adapters[0] == 1)]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[loreg.Registry]:
    """A base in bfloat16, and three adapters that overlap in part: ``code`` adapts V alone."""
    folder = tmp_path_factory.mktemp("methods")
    rng = np.random.default_rng(7)
    model = {f"{Q}.weight": tiny.normal(rng, "BF16", 12, 20), f"{V}.weight": tiny.normal(rng, "BF16", 9, 9)}
    tiny.write_model(folder / "base", model)
    with loreg.open(folder / "home") as registry:
        registry.add_base(folder / "base", "base")
        for name, rank in zip(NAMES, (3, 2, 2), strict=True):
            modules = {V: tiny.factors(rng, 9, 9, rank)}
            if name != "code":
                modules[Q] = tiny.factors(rng, 12, 20, rank)
            registry.push(tiny.write_adapter(folder / name, modules), base="base", name=name)
        yield registry


@pytest.fixture
def merge(world: loreg.Registry, tmp_path: Path) -> Iterator[object]:
    serial = itertools.count()

    def merged(expression: str, method: str, **parameters: object) -> str:
        given = {**PARAMETERS.get(method, {}), **parameters}
        out = tmp_path / f"out{next(serial)}"
        result = world.merge(expression, out, method=method, parameters=given, verify="exact")
        assert world.unmerge(out, tmp_path / f"back{next(serial)}").matches_base
        return str(result.weights_root)

    yield merged


def names_for(method: str) -> tuple[str, ...]:
    return NAMES[: METHODS[method].adapters[1] or 3]


@pytest.mark.parametrize("method", ["linear", *DENSE])
def test_the_order_of_the_terms_does_not_show(merge, method: str) -> None:
    terms = [f"{weight}*{name}" for weight, name in zip((0.7, 0.4, 1.2), names_for(method), strict=False)]
    assert len({merge("+".join(order), method) for order in (terms, terms[::-1], terms[1:] + terms[:1])}) == 1


@pytest.mark.parametrize("method", ["linear", *DENSE])
def test_weight_zero_removes_a_term(merge, method: str) -> None:
    first, second, *rest = names_for(method)
    others = "".join(f"+0*{name}" for name in (*rest, "code" if not rest else first))
    assert merge(f"{first}+{second}{others}", method) == merge(f"{first}+{second}", method)


def everything(method: str) -> dict[str, float]:
    """Parameters by which no element is dropped."""
    whole = {"density": 1.0} if method in PARAMETERS else {}
    return whole | ({"gamma": 0.0} if "gamma" in METHODS[method].parameters else {})


@pytest.mark.parametrize("method", IDENTITY)
def test_one_adapter_is_itself(merge, method: str) -> None:
    assert merge("sql", method, **everything(method)) == merge("sql", "linear")


@pytest.mark.parametrize("method", [name for name in DENSE if "lambda" in METHODS[name].parameters])
def test_lambda_scales_what_is_added(merge, method: str) -> None:
    # Powers of two, so that nothing rounds differently.
    given = {"normalize": False, "lambda": 2.0}
    doubled = merge("sql+humor+code", method, **given)
    assert doubled == merge("2*sql+2*humor+2*code", method, normalize=False) != merge("sql+humor+code", method)
    for normalize in (False, True):
        given = {"normalize": normalize, "lambda": -2.0}
        assert merge("sql", method, **everything(method), **given) == merge("-2*sql", "linear")


@pytest.mark.parametrize("method", DENSE)
def test_threads_and_tiles_do_not_show(merge, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expression = "+".join(names_for(method))
    threads, found = torch.get_num_threads(), set()
    for count, tile in ((1, 1 << 20), (2, 40), (2, 1 << 20)):
        monkeypatch.setattr("loreg.merge.resources.TILE_BYTES", 4 * tile)
        monkeypatch.setattr("loreg.algebra.ordered._BLOCK_ELEMENTS", tile)
        torch.set_num_threads(count)
        try:
            found.add(merge(expression, method))
        finally:
            torch.set_num_threads(threads)
    assert len(found) == 1


@pytest.mark.parametrize("method", [name for name in DENSE if "seed" in METHODS[name].parameters])
def test_the_seed_is_in_the_recipe_and_decides_the_mask(world: loreg.Registry, merge, method: str, tmp_path) -> None:
    assert merge("sql+humor", method, seed=1) == merge("sql+humor", method, seed=1)
    assert merge("sql+humor", method, seed=1) != merge("sql+humor", method, seed=2)
    result = world.merge("sql+humor", tmp_path / "seeded", method=method, parameters={"density": 0.5, "seed": 5})
    assert result.record.recipe.parameters["seed"] == 5


@pytest.mark.parametrize("method", FACTORS)
def test_a_composition_does_not_depend_on_the_order_of_its_terms(world: loreg.Registry, method: str) -> None:
    if method == "peft_linear":
        terms = ["0.5*humor", "0.25*humor"]  # it asks for equal ranks and equal modules
    else:
        terms = ["0.7*sql", "0.4*humor"]
    parameters = {"rank": 3} if "rank" in METHODS[method].parameters else {}
    found = [
        world.compose(" + ".join(order), "both", method=method, parameters=parameters)
        for order in (terms, terms[::-1])
    ]
    assert found[0].version.digest == found[1].version.digest


# Of these a place in the checkpoint's order decides: whose row it is in, or what its random number is.
PLACED = {name for name in DENSE if {"seed", "filter_wise", "flatten"} & set(METHODS[name].parameters)}


@pytest.fixture(scope="module")
def stored_both_ways(tmp_path_factory: pytest.TempPathFactory) -> Iterator[loreg.Registry]:
    """One model as (out, in) and as (in, out), and the same adapters for both."""
    folder = tmp_path_factory.mktemp("turned")
    rng = np.random.default_rng(9)
    weight = tiny.normal(rng, "F32", 12, 20)
    adapters = {name: {Q: tiny.factors(rng, 12, 20, 3)} for name in ("a", "b")}
    with loreg.open(folder / "home") as registry:
        for way, matrix in (("out", weight), ("in", tiny.tensor("F32", weight.values.T.copy()))):
            registry.add_base(tiny.write_model(folder / way, {f"{Q}.weight": matrix}), way)
            for name, modules in adapters.items():
                path = tiny.write_adapter(folder / f"{name}-{way}", modules, fan_in_fan_out=way == "in")
                registry.push(path, base=way, name=f"{name}-{way}")
        yield registry


@pytest.mark.parametrize("method", ["linear", *FACTORS, *(name for name in DENSE if name not in PLACED)])
def test_how_a_weight_is_stored_does_not_show(stored_both_ways: loreg.Registry, method: str, tmp_path: Path) -> None:
    given = dict(PARAMETERS.get(method, {})) | ({"rank": 2} if "rank" in METHODS[method].parameters else {})
    weights = (0.7, 0.4) if method in ("slerp", "karcher") else (0.7, -0.4)

    def change(way: str) -> tiny.Array:
        expression = f"{weights[0]}*a-{way} + {weights[1]}*b-{way}".replace("+ -", "- ")
        stored_both_ways.merge(expression, tmp_path / way, method=method, parameters=given)
        name, base = f"{Q}.weight", Path(stored_both_ways.show_base(way).path)
        merged, before = (
            tiny.contents(folder / "model.safetensors")[name].values for folder in (tmp_path / way, base)
        )
        return merged.astype(np.float64) - before

    expected = change("out")
    assert np.abs(expected).max() > 0.01
    np.testing.assert_allclose(change("in").T, expected, atol=1e-5 * float(np.abs(expected).max()))


@pytest.mark.parametrize("method", DENSE)
def test_a_dense_method_is_composed_by_truncation(world: loreg.Registry, merge, method: str) -> None:
    # At the full rank nothing is lost but what float32 factors round.
    expression = "+".join(names_for(method))
    composed = world.compose(
        expression, "whole", method=method, parameters={"energy": 1.0, **PARAMETERS.get(method, {})}
    )
    assert composed.relative_error < 1e-6
    assert composed.version.manifest.provenance.recipe.arithmetic == "float64-lapack"
    truncated = world.compose(expression, "part", method=method, rank=1, parameters=PARAMETERS.get(method))
    assert truncated.relative_error > 0.1 and truncated.version.manifest.rank == 1


def test_refusals_name_what_is_wrong(world: loreg.Registry, merge) -> None:
    for method, parameters, message in (
        ("tie", {}, "there is no method 'tie': choose one of .*ties:peft"),
        ("ties", {"density": 0.0}, "density: expected a number above 0 and at most 1, found 0"),
        ("ties", {"density": 1.1}, "density: expected a number above 0 and at most 1, found 1.1"),
        ("ties", {"densty": 0.5}, "has no parameter 'densty'"),
        ("slerp", {}, "takes exactly 2 adapters"),
        ("magnitude_prune", {}, "needs the parameter 'density'"),
    ):
        with pytest.raises(UsageError, match=message):
            world.merge("sql+humor+code", "/nonexistent/out", method=method, parameters=parameters)
    with pytest.raises(UsageError, match="neither rank nor energy"):
        world.compose("sql+humor", "x", method="ties")
    for method in ("svd", "ties"):
        with pytest.raises(UsageError, match=r"svd\.rank|ties:mergekit\.rank"):
            world.compose("sql+humor", "x", method=method, rank=0)
        with pytest.raises(UsageError, match=r"v_proj.*rank 10 is out of range"):
            world.compose("sql+humor", "x", method=method, rank=10)


def test_iso_c_truncates_before_it_makes_singular_values_equal(world: loreg.Registry) -> None:
    composed = world.compose("sql + humor", "iso", method="iso_c", rank=2).version
    (delta, *_) = [value for path, value in world.load(str(composed)).items() if path == Q]
    total = sum(term.dense() for term in (world.load("sql")[Q], world.load("humor")[Q]))
    u, sigma, vt = torch.linalg.svd(total)
    expected = float(sigma[:2].mean()) * u[:, :2] @ vt[:2]
    torch.testing.assert_close(delta.dense(), expected, rtol=1e-5, atol=1e-6 * float(sigma[0]))


def test_adapters_of_different_bases_do_not_compose(world: loreg.Registry, tmp_path: Path) -> None:
    model = dict(tiny.contents(Path(world.show_base("base").path) / "model.safetensors").items())
    other = tiny.write_model(tmp_path / "other", {**model, f"{V}.weight": model[f"{V}.weight"].flipped(1)})
    factors = {V: tiny.factors(np.random.default_rng(1), 9, 9, 2)}
    world.push(tiny.write_adapter(tmp_path / "alien", factors), base=other, name="alien")
    only_q = {Q: tiny.factors(np.random.default_rng(2), 12, 20, 2)}
    world.push(tiny.write_adapter(tmp_path / "only-q", only_q), base="base", name="only-q")
    for method in ("linear", "task_arithmetic"):
        with pytest.raises(BaseMismatch):
            world.compose(
                "alien + sql", "mixed", method=method, parameters={"energy": 1.0} if method != "linear" else {}
            )
    # They touch nothing in common, so that each fits the other's base: the one that has both is the base.
    composed = world.compose("alien + only-q", "mixed").version.manifest.base
    assert composed.identity.weights_root == world.resolve("alien").manifest.base.identity.weights_root


@pytest.mark.parametrize("method", ["slerp", "karcher", "ties", "model_stock"])
def test_a_replaced_tensor_is_a_delta_to_every_method(world: loreg.Registry, tmp_path: Path, method: str) -> None:
    rng = np.random.default_rng(5)
    full = {f"{V}.weight": tiny.normal(rng, "BF16", 9, 9)}
    world.push(tiny.write_adapter(tmp_path / "saved", {}, full=full), base="base", name="saved")
    parameters = PARAMETERS.get(f"{method}:mergekit", {})

    def merged(expression: str, dtype: str, out: str) -> tiny.Array:
        world.merge(expression, tmp_path / out, method=method, parameters=parameters, dtype=dtype, verify="exact")
        return tiny.contents(tmp_path / out / "model.safetensors")[f"{V}.weight"].values.astype(np.float64)

    once = merged("sql + saved", "float32", "once")
    np.testing.assert_allclose(merged("sql + saved", "bfloat16", "narrow"), once, rtol=2**-8)
    assert np.abs(once - full[f"{V}.weight"].values).max() > 0.01


def test_a_refused_merge_by_factors_makes_no_version(world: loreg.Registry, tmp_path: Path) -> None:
    before = len(world.list_versions())
    other = tiny.write_model(tmp_path / "other", {f"{V}.weight": tiny.normal(np.random.default_rng(1), "BF16", 9, 9)})
    with pytest.raises(BaseMismatch):
        world.merge("sql + humor", tmp_path / "out", base=other, method="svd", parameters={"rank": 2})
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    with pytest.raises(Conflict):
        world.merge("sql + humor", tmp_path / "taken", method="svd", parameters={"rank": 2})
    assert len(world.list_versions()) == before
    world.merge("sql + humor", tmp_path / "out", method="svd", parameters={"rank": 2})
    world.merge("humor + sql", tmp_path / "again", method="svd", parameters={"rank": 2})
    assert len(world.list_versions()) == before + 1


def test_no_parameter_is_dropped_without_a_word(world: loreg.Registry, tmp_path: Path) -> None:
    for given in ({"inner": "ties", "lamda": 7}, {"density": 0.5, "inner": "nuslerpp"}, {"inner": ["ties"]}):
        with pytest.raises(UsageError, match=r"inner|lamda"):
            world.merge("sql + humor", tmp_path / "out", method="ties", parameters=given)
        with pytest.raises(UsageError, match=r"inner|lamda"):
            world.compose("sql + humor", "x", method="knots", parameters=given)
    with pytest.raises(UsageError, match="a finite number"):
        world.merge("sql", tmp_path / "out", method="ties", parameters={"lambda": 10**400})
    with pytest.raises(UsageError, match="no finite sum"):
        world.merge("1e308*sql + 1e308*humor", tmp_path / "out", method="ties")


def test_factors_beyond_float32_keep_their_error(world: loreg.Registry) -> None:
    for weight in ("1e-90", "1e60"):
        composed = world.compose(f"{weight}*sql", "far", method="svd", rank=2)
        delta, truth = world.load(str(composed.version))[Q].dense(), float(weight) * world.load("sql")[Q].dense()
        lost = float(torch.linalg.matrix_norm(truth - delta) / torch.linalg.matrix_norm(truth))
        assert abs(lost - world.compose("sql", "near", method="svd", rank=2).relative_error) < 0.5
        assert 0 < lost < 1
