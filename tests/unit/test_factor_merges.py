"""Merges by a method on factors: what they say of the version that they make, and when they make none."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from click.testing import CliRunner

import loreg
from loreg.cli import main
from loreg.errors import BadInput, BaseMismatch, CheckFailed, LoregError, NotFound, UsageError
from loreg.format.methods import METHODS
from loreg.merge.verify import Check, Verification
from loreg.registry import packing

Q, V = tiny.Q, tiny.V


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[loreg.Registry]:
    """Adapters ``a`` and ``b`` of one base, and ``c`` of another, which differs in Q."""
    folder = tmp_path_factory.mktemp("merges")
    rng = np.random.default_rng(0)
    model = {f"{Q}.weight": tiny.normal(rng, "BF16", 12, 20), f"{V}.weight": tiny.normal(rng, "BF16", 9, 9)}
    tiny.write_model(folder / "base", model)
    tiny.write_model(folder / "other", {**model, f"{Q}.weight": model[f"{Q}.weight"].flipped(1)})
    with loreg.open(folder / "home") as registry:
        for name in ("base", "other"):
            registry.add_base(folder / name, name)
        for name in "abc":
            modules = {Q: tiny.factors(rng, 12, 20, 2), V: tiny.factors(rng, 9, 9, 2)}
            registry.push(
                tiny.write_adapter(folder / name, modules), base="other" if name == "c" else "base", name=name
            )
        yield registry


@pytest.fixture
def untouched(world: loreg.Registry) -> Iterator[None]:
    """The registry has after the test what it had before, and nothing that was in the making."""
    before = world.list_versions(all_versions=True)
    yield
    assert world.list_versions(all_versions=True) == before
    assert list((world.home / "tmp").iterdir()) == []


def refuses(error: type[LoregError], *words: str) -> Any:
    return pytest.raises(error, match=".*".join(words))


# What is said.


def test_a_merge_by_factors_says_what_it_lost_and_where_it_is_stored(world: loreg.Registry, tmp_path: Path) -> None:
    result = world.merge("a + b", tmp_path / "out", method="svd", parameters={"rank": 1})
    made = result.composition
    assert made is not None and result.method == made.method == "svd"
    version = world.resolve(made.version)
    assert version.digest == made.digest and version.name.startswith("svd-")
    assert [term.adapter for term in result.record.recipe.terms] == [made.digest]
    assert result.record.recipe.method == "linear"
    composed = world.compose("a + b", "same", method="svd", rank=1)
    assert composed.version.digest == made.digest and composed.relative_error == made.relative_error > 0.1
    assert world.unmerge(tmp_path / "out", tmp_path / "back").matches_base
    plain = world.merge("a + b", tmp_path / "plain")
    assert plain.composition is None and plain.method == "linear"


def test_the_command_says_it(world: loreg.Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOREG_HOME", str(world.home))

    def told(out: str, *options: str) -> str:
        result = CliRunner().invoke(main, ["merge", "--apply", "a + b", "--out", str(tmp_path / out), *options])
        assert result.exit_code == 0, result.stderr
        return result.stdout

    document = json.loads(told("one", "--method", "svd", "--rank", "1", "--json"))
    assert (document["method"], document["arithmetic"]) == ("svd", "loreg-exact-1")
    assert document["version"].startswith("svd-") and 0.1 < document["relative_error"] < 1
    text = told("two", "--method", "svd", "--rank", "1")
    said = f"svd, relative error {document['relative_error']:.3g}; stored as {document['version']}, merged by linear"
    assert said in " ".join(text.split())
    plain = json.loads(told("three", "--json"))
    assert (plain["method"], plain["version"], plain["relative_error"]) == ("linear", None, None)
    assert "linear, loreg-exact-1" in told("four") and "relative error" not in told("five")


# When none is made.


@pytest.mark.parametrize("method", [name for name, row in METHODS.items() if row.composes_only])
def test_a_merge_that_overflows_leaves_no_version(
    world: loreg.Registry, untouched: None, tmp_path: Path, method: str
) -> None:
    given: dict[str, Any] = {"rank": 2} if "rank" in METHODS[method].parameters else {}
    given |= {"inner": "task_arithmetic"} if "inner" in METHODS[method].parameters else {}  # ties would normalise
    with refuses(BadInput, "exceeds the largest finite"):
        world.merge("1e300*a + b", tmp_path / "out", method=method, parameters=given)
    assert list(tmp_path.iterdir()) == []


def test_a_merge_that_does_not_verify_leaves_no_version(
    world: loreg.Registry, untouched: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = Verification("probe", (Check("weights", False, "off"),))
    monkeypatch.setattr("loreg.merge.verify.Verifier.verification", lambda *_: failed)
    with refuses(CheckFailed, "does not verify"):
        world.merge("a + 0.5*b", tmp_path / "out", method="cat")
    assert list(tmp_path.iterdir()) == []


def test_any_base_is_no_base_of_a_version(world: loreg.Registry, untouched: None, tmp_path: Path) -> None:
    base = Path(world.show_base("other").path)
    first = "--allow-base-mismatch does not apply .* svd, which .* one base: "
    with refuses(BaseMismatch, first + "[ac]:v1 was trained on another base"):
        world.merge(
            "a + c", tmp_path / "out", base=base, method="svd", parameters={"rank": 2}, allow_base_mismatch=True
        )


def test_a_weight_beyond_doubles_names_adapter_and_module(world: loreg.Registry, untouched: None) -> None:
    for method in ("linear", "cat", "svd"):
        with refuses(BadInput, "a:v1 at weight 1e\\+308", "no finite scale", "q_proj"):
            world.compose("1e308*a + b", "far", method=method, rank=2 if method == "svd" else None)


def test_one_rank_is_given(world: loreg.Registry, untouched: None) -> None:
    with refuses(UsageError, "rank is given twice, as 2 and as 3"):
        world.compose("a", "x", method="svd", rank=2, parameters={"rank": 3})


@pytest.mark.parametrize("call", [lambda w, e, o: w.merge(e, o), lambda w, e, o: w.compose(e, "x")], ids=("m", "c"))
def test_a_difference_without_spaces(
    world: loreg.Registry, untouched: None, tmp_path: Path, call: Callable[..., Any]
) -> None:
    with refuses(NotFound, "no adapter is called 'a-b:v1', but 'a' and 'b' are", "'a - b:v1'"):
        call(world, "a-b:v1", tmp_path / "out")
    with pytest.raises(NotFound) as plain:
        call(world, "a-zebra", tmp_path / "out")
    assert "subtract" not in str(plain.value)


# Where factors are until they are stored.


def test_factors_wait_on_disk(world: loreg.Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[bool] = []

    def looked(tensors: Any) -> Any:
        held.extend(isinstance(raw.data, bytes) for raw in tensors.values())
        return blob(tensors)

    blob = packing.tensors_blob
    monkeypatch.setattr(packing, "tensors_blob", looked)
    for method, row in METHODS.items():
        given = {"rank": 2} if row.space == "dense" or "rank" in row.parameters else {}
        given |= {"density": 0.5} if "density" in row.parameters else {}
        world.compose("0.5*a + b" if method != "linear" else "a + 2*b", "held", method=method, parameters=given)
    world.extract("base", Path(world.show_base("other").path), "found", energy=1.0)
    world.merge("a + b", tmp_path / "out", method="tsv")
    assert held and not any(held)
    assert list((world.home / "tmp").iterdir()) == []


def test_no_room_for_factors(pushed: loreg.Registry) -> None:
    (pushed.home / "tmp").rename(pushed.home / "aside")
    (pushed.home / "tmp").touch()
    with refuses(CheckFailed, "Factors cannot be written to .*tmp: File exists"):
        pushed.compose("sql + humor", "both", method="cat")
