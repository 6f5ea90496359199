"""Every variant from one end to the other, against the library that defines it; and the table of what was found."""

from __future__ import annotations

import re
from pathlib import Path

import live_models
import pytest
import torch

import loreg
from loreg import serving
from loreg.errors import LoregError, Unsupported
from tests.peers.variants import Built, Case, cases
from tests.peers.variants.table import COLUMNS, PATH, Row, parse

CASES = cases()
_found: dict[str, Row] = {}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_variant(case: Case, tmp_path: Path) -> None:
    registry = loreg.open(tmp_path / "home")
    built = case.build(tmp_path)
    if case.refused is not None:
        with pytest.raises(LoregError) as caught:
            registry.push(built.adapter, base=built.base, name="adapter", **built.push)
        assert re.search(case.refused, str(caught.value)), str(caught.value)
        assert not registry.list_versions()
        _found[case.id] = Row.refused(case, str(caught.value))
        return
    version = registry.push(built.adapter, base=built.base, name="adapter", **built.push)
    merged = registry.merge("adapter", tmp_path / "merged", verify="probe")
    _close(built.run(tmp_path / "merged"), built.expected, case)
    assert registry.verify(tmp_path / "merged", kind="exact").ok
    unmerged = registry.unmerge(tmp_path / "merged", tmp_path / "unmerged")
    assert unmerged.matches_base
    _in_memory(registry, built, tmp_path / "merged")
    _found[case.id] = Row(
        case,
        merge="yes",
        unmerge="yes",
        compose=_composed(registry, merged.weights_root, tmp_path),
        export=_exported(registry, version, built, case, tmp_path),
    )


def _in_memory(registry: loreg.Registry, built: Built, merged: Path) -> None:
    """The live model becomes the one that is loaded from the merge, and the base again; or it is left as it was, for
    what no live model can become."""
    model = live_models.load(built.base)
    base = live_models.bytes_of(model)
    try:
        done = serving.merge_(model, "adapter", registry)
    except Unsupported as error:
        assert re.search("not untied|not resized", str(error))
    else:
        assert live_models.bytes_of(model) == live_models.bytes_of(live_models.load(merged))
        serving.unmerge_(model, done)
    assert live_models.bytes_of(model) == base


def _composed(registry: loreg.Registry, expected: object, folder: Path) -> str:
    """One adapter at weight 1 is itself, to the bit; and composing halves is composing the whole."""
    try:
        registry.compose("adapter", "same")
    except LoregError as error:
        return f"refused: {error}"
    again = registry.merge("same", folder / "again")
    assert again.weights_root == expected, "the composed adapter is another than the one it was made from"
    try:
        registry.compose("0.5*adapter", "half")
    except LoregError as error:
        return f"at weight 1; else refused: {error}"
    half = registry.merge("half", folder / "half")
    assert half.weights_root == registry.merge("0.5*adapter", folder / "other-half").weights_root
    assert half.weights_root != expected
    return "yes"


def _exported(registry: loreg.Registry, version: loreg.Version, built: Built, case: Case, folder: Path) -> str:
    out = registry.export("adapter", folder / "original")
    for path in out.iterdir():
        assert (
            path.read_bytes() == (built.adapter / path.name if built.adapter.is_dir() else built.adapter).read_bytes()
        )
    try:
        registry.export("adapter", folder / "peft", format="peft")
    except LoregError as error:
        return f"original; PEFT refused: {error}"
    if built.reload is None:
        return "original"
    _close(built.reload(folder / "peft"), built.expected, case)
    return "original and PEFT"


def _close(found: torch.Tensor, expected: torch.Tensor, case: Case) -> None:
    assert found.shape == expected.shape
    largest = float(expected.abs().max())
    off = float((found.double() - expected.double()).abs().max())
    assert off <= case.tolerance * largest, f"off by {off / largest:.2e} of the largest output"


def test_the_table_in_the_specification_is_what_was_found() -> None:
    if len(_found) != len(CASES):
        pytest.skip("only some of the cases ran, so the table cannot be compared")
    rows = parse(PATH.read_text(encoding="utf-8"))
    assert list(COLUMNS) == rows[0]
    assert rows[1:] == [_found[case.id].cells() for case in CASES], "run python -m tests.peers.variants.table"
