"""Batch norms in ``modules_to_save``: statistics, and the number of batches seen, which is a whole number alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from refusal import refused

import loreg
from loreg.errors import BadInput, LoregError, Unsupported

COUNTER = "norm.num_batches_tracked"
NUMBERS = tuple(f"norm.{name}" for name in ("weight", "bias", "running_mean", "running_var"))
BASE = {
    **tiny.model(),
    **dict.fromkeys(NUMBERS, tiny.tensor("F32", np.full(4, 0.5))),
    COUNTER: tiny.tensor("I64", 0),
    "norm.mask": tiny.tensor("BOOL", [True, False, True]),
}
SAVED = {
    **dict.fromkeys(NUMBERS, tiny.tensor("F32", np.arange(4.0))),
    COUNTER: tiny.tensor("I64", 2**53 + 1),  # which no double holds
    "norm.mask": tiny.tensor("BOOL", [False, False, True]),
}


@pytest.fixture
def stocked(registry: loreg.Registry, tmp_path: Path) -> loreg.Registry:
    registry.add_base(tiny.write_model(tmp_path / "base", BASE), "base")
    _push(registry, tmp_path, "norms")
    return registry


def _push(registry: loreg.Registry, folder: Path, name: str, **changed: Any) -> None:
    full = {**SAVED, **{key.replace("__", "."): value for key, value in changed.items()}}
    adapter = tiny.write_adapter(folder / name, tiny.adapter(), full=full, modules_to_save=["norm"])
    registry.push(adapter, base="base", name=name)


def test_all_of_a_batch_norm_is_replaced(stocked: loreg.Registry, tmp_path: Path) -> None:
    for dtype in (None, "F16"):
        merged = stocked.merge("norms", tmp_path / f"out{dtype}", dtype=dtype, verify="exact")
        found = tiny.tensors_in(merged.out)
        kept = SAVED if dtype is None else {key: SAVED[key] for key in (COUNTER, "norm.mask")}
        assert {key: found[key] for key in kept} == kept
    stocked.unmerge(tmp_path / "outNone", tmp_path / "again")
    assert tiny.tensors_in(tmp_path / "again") == BASE


def test_it_is_given_back_and_exported(stocked: loreg.Registry, tmp_path: Path) -> None:
    stocked.export("norms", tmp_path / "exported")
    given, exported = tiny.tensors_in(tmp_path / "norms"), tiny.tensors_in(tmp_path / "exported")
    assert exported[f"base_model.model.{COUNTER}"] == SAVED[COUNTER] and exported == given


@pytest.mark.parametrize("expression", ["0.5*norms", "norms + 0.5*others", "norms + others"])
def test_whole_numbers_are_not_mixed(stocked: loreg.Registry, tmp_path: Path, expression: str) -> None:
    _push(stocked, tmp_path, "others", norm__num_batches_tracked=tiny.tensor("I64", 7))
    with refused(stocked, tmp_path / "out", Unsupported, "is stored as (I64|BOOL): merging handles", 5):
        stocked.merge(expression, tmp_path / "out")


P = "base_model.model."
BAD: dict[str, tuple[dict[str, tiny.Tensor], type[LoregError], str]] = {
    "whole numbers for a weight": ({"norm.weight": tiny.tensor("I64", np.ones(4))}, Unsupported, "has dtype I64"),
    "whole numbers for a bias": ({"norm.bias": tiny.tensor("U8", np.ones(4))}, Unsupported, "has dtype U8"),
    "a number for statistics": ({"norm.running_mean": tiny.tensor("F32", 1.0)}, BadInput, "has no dimensions"),
    "a real counter": ({COUNTER: tiny.tensor("F32", 3.0)}, BadInput, "has no dimensions"),
    "buffers of another module": ({"model.positions": tiny.tensor("I64", np.ones(5))}, Unsupported, "has dtype I64"),
}


@pytest.mark.parametrize("what", BAD)
def test_other_whole_numbers_are_refused(stocked: loreg.Registry, tmp_path: Path, what: str) -> None:
    tensors, error, message = BAD[what]
    changed = {key.replace(".", "__"): value for key, value in tensors.items()}
    with pytest.raises(error, match=message):
        _push(stocked, tmp_path, "bad", **changed)


def test_a_buffer_of_another_dtype_is_refused(stocked: loreg.Registry, tmp_path: Path) -> None:
    _push(stocked, tmp_path, "bad", norm__running_mean=tiny.tensor("I64", np.ones(4)))
    with refused(stocked, tmp_path / "out", Unsupported, "norm.running_mean", 5):
        stocked.merge("bad", tmp_path / "out")
    _push(stocked, tmp_path, "worse", norm__mask=tiny.tensor("F32", np.ones(3)))
    with refused(stocked, tmp_path / "out", Unsupported, "norm.mask", 5):
        stocked.merge("worse", tmp_path / "out")


def test_compositions_keep_them_or_are_refused(stocked: loreg.Registry, tmp_path: Path) -> None:
    stocked.compose("norms", "one")
    stocked.merge("one", tmp_path / "out")
    assert {key: tiny.tensors_in(tmp_path / "out")[key] for key in SAVED} == SAVED
    with pytest.raises(Unsupported, match=r"which is (I64|BOOL), and has no fractions"):
        stocked.compose("0.5*norms", "two")
