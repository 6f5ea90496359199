"""Bad bases, arguments and places: the design's exit code, a message that names the thing, nothing left behind."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from refusal import refused

import loreg
from loreg.errors import (
    BadInput,
    BaseMismatch,
    CheckFailed,
    Conflict,
    LoregError,
    NotFound,
    UsageError,
)

MODEL = tiny.model()
Q, V, NORM = f"{tiny.Q}.weight", f"{tiny.V}.weight", tiny.NORM


def converted(dtype: str) -> dict[str, tiny.Tensor]:
    return {n: t if t.dtype == "I64" else tiny.tensor(dtype, t.values) for n, t in MODEL.items()}


# The base


WRONG_BASES: dict[str, tuple[Callable[[], dict[str, tiny.Tensor]], str]] = {
    "another checkpoint": (lambda: tiny.model(seed=9), f"differs in 2 of the 2 tensors that it adapts: {Q}, {V}"),
    "one element changed": (
        lambda: MODEL | {V: MODEL[V].flipped(3)},
        f"differs in 1 of the 2 tensors that it adapts: {V}. Merge into the base",
    ),
    "in float32": (lambda: converted("F32"), "It is a float32 copy of that base"),
    "in float16": (lambda: converted("F16"), "It is a float16 copy of that base"),
    "another shape": (lambda: tiny.model(rows=4), r"has shape \[4, 6\], expected \[8, 6\]: another model"),
    "a tensor less": (lambda: {n: t for n, t in MODEL.items() if n != V}, f"It has no '{V}'"),
    "too large for a copy": (
        lambda: MODEL | {V: tiny.tensor("BF16", np.full((6, 6), 1e30))},
        f"differs in 1 of the 2 tensors that it adapts: {V}. Merge into the base",
    ),
    "not finite": (
        lambda: MODEL | {V: tiny.Tensor("BF16", (6, 6), b"\xc0\x7f" * 36)},
        f"differs in 1 of the 2 tensors that it adapts: {V}. Merge into the base",
    ),
}


@pytest.mark.parametrize("what", WRONG_BASES)
def test_a_wrong_base_is_refused(pushed: loreg.Registry, tmp_path: Path, what: str) -> None:
    make, message = WRONG_BASES[what]
    other = tiny.write_model(tmp_path / "other", make())
    with refused(pushed, tmp_path / "out", BaseMismatch, message, 4):
        pushed.merge("sql", tmp_path / "out", base=other)


@pytest.mark.parametrize("base_is_there", [True, False])
def test_a_bfloat16_copy_of_a_float32_base_is_recognised_if_the_base_is_there(
    registry: loreg.Registry, tmp_path: Path, tiny_adapter: Path, base_is_there: bool
) -> None:
    model = tiny.model(dtype="F32")
    base = tiny.write_model(tmp_path / "base", model)
    registry.push(tiny_adapter, base=base, name="sql")
    narrow = {n: t if t.dtype == "I64" else tiny.tensor("BF16", t.values) for n, t in model.items()}
    other = tiny.write_model(tmp_path / "other", narrow)
    if not base_is_there:
        (base / "model.safetensors").unlink()
    message = "It is a bfloat16 copy of that base" if base_is_there else "Merge into the base that the adapter names"
    with refused(registry, tmp_path / "out", BaseMismatch, message, 4):
        registry.merge("sql", tmp_path / "out", base=other)


def test_the_override_merges_and_stands_in_the_recipe(pushed: loreg.Registry, tmp_path: Path) -> None:
    model = tiny.model(seed=9)
    other = tiny.write_model(tmp_path / "other", model)
    result = pushed.merge("sql", tmp_path / "out", base=other, allow_base_mismatch=True)
    assert result.record.recipe.base_mismatch
    assert json.loads((result.out / "loreg.json").read_bytes())["recipe"]["base_mismatch"] is True
    factors = tiny.adapter()[tiny.V]
    expected = tiny.merged(model[V], [(tiny.scale(factors), factors.A.values, factors.B.values)])
    assert tiny.tensors_in(result.out)[V] == expected
    plain = pushed.merge("sql", tmp_path / "plain", allow_base_mismatch=True)
    assert not plain.record.recipe.base_mismatch
    with refused(pushed, tmp_path / "new", BadInput, "expects .* of shape", 5):
        small = tiny.write_model(tmp_path.parent / f"{tmp_path.name}-small", tiny.model(rows=4))
        pushed.merge("sql", tmp_path / "new", base=small, allow_base_mismatch=True)


def test_a_base_whose_untouched_tensors_differ_is_good_enough(pushed: loreg.Registry, tmp_path: Path) -> None:
    other = tiny.write_model(tmp_path / "other", MODEL | {NORM: MODEL[NORM].flipped(0)})
    result = pushed.merge("sql", tmp_path / "out", base=other)
    assert not result.record.recipe.base_mismatch
    assert tiny.tensors_in(result.out)[NORM] == MODEL[NORM].flipped(0)


def test_adapters_of_different_bases_need_to_be_told_which(
    pushed: loreg.Registry, tmp_path: Path, tiny_adapter: Path
) -> None:
    # Both fit both, as the bases differ where neither adapts anything; so a + b and b + a would differ.
    other = tiny.write_model(tmp_path / "other", MODEL | {NORM: MODEL[NORM].flipped(0)})
    humor = tiny.write_adapter(tmp_path / "humor2", tiny.adapter(seed=5))
    pushed.push(humor, base=other)
    for expression in ("sql + humor2", "humor2 + sql"):
        with refused(pushed, tmp_path / "out", BaseMismatch, "say which one to merge into with --base", 4):
            pushed.merge(expression, tmp_path / "out")
    first = pushed.merge("sql + humor2", tmp_path / "ab", base=other)
    second = pushed.merge("humor2 + sql", tmp_path / "ba", base=other)
    assert tiny.files_in(first.out) == tiny.files_in(second.out)
    assert pushed.merge("humor2 + 0*sql", tmp_path / "b").record.recipe.base == first.record.recipe.base


@pytest.mark.parametrize("restore_mtime", [False, True])
def test_a_base_that_changed_since_it_was_added_is_refused(
    pushed: loreg.Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, restore_mtime: bool
) -> None:
    monkeypatch.setattr("loreg.checkpoint._SETTLED_NS", -(10**12))
    pushed.merge("sql", tmp_path / "good")  # and so the cache knows the file
    path = tmp_path / "base" / "model.safetensors"
    stat = path.stat()
    with path.open("r+b") as file:
        file.write(tiny.container((MODEL | {NORM: MODEL[NORM].flipped(1)}).items()))
    if restore_mtime:
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    message = f"are not base 'base' any more: 1 tensors differ, first '{NORM}'"
    with refused(pushed, tmp_path / "out", BaseMismatch, message, 4):
        pushed.merge("sql", tmp_path / "out")


@pytest.mark.parametrize("name", [V, NORM])
@pytest.mark.parametrize("restore_mtime", [False, True])
def test_a_base_that_changes_during_the_merge_is_refused(
    pushed: loreg.Registry, tmp_path: Path, name: str, restore_mtime: bool
) -> None:
    path = tmp_path / "base" / "model.safetensors"
    stat = path.stat()
    os.utime(path, ns=(0, 0))

    def progress(label: str, total: int) -> Callable[[int], None]:
        if label == "merging":  # planned and hashed, and not a byte read since
            with path.open("r+b") as file:
                file.write(tiny.container((MODEL | {name: MODEL[name].flipped(1)}).items()))
            if restore_mtime:
                os.utime(path, ns=(0, 0))
        return lambda done: None

    assert stat.st_size == path.stat().st_size
    with refused(pushed, tmp_path / "out", BadInput, "was changed", 5):
        pushed.merge("sql", tmp_path / "out", progress=progress)


def test_a_change_that_no_time_stamp_shows_is_found_by_the_digest(
    pushed: loreg.Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Clocks of file systems tick every few milliseconds: what changes within a tick keeps its stamp.
    monkeypatch.setattr("loreg.checkpoint.Checkpoint.check_unchanged", lambda self: None)
    path = tmp_path / "base" / "model.safetensors"

    def progress(label: str, total: int) -> Callable[[int], None]:
        if label == "merging":
            with path.open("r+b") as file:
                file.write(tiny.container((MODEL | {V: MODEL[V].flipped(1)}).items()))
        return lambda done: None

    message = f"Tensor '{V}': in .* it is not what it was when it was hashed"
    with refused(pushed, tmp_path / "out", BadInput, message, 5):
        pushed.merge("sql", tmp_path / "out", progress=progress, verify="none")


def test_a_base_that_is_cut_during_the_merge_is_refused(pushed: loreg.Registry, tmp_path: Path) -> None:
    path = tmp_path / "base" / "model.safetensors"

    def progress(label: str, total: int) -> Callable[[int], None]:
        if label == "merging":
            os.truncate(path, 900)
        return lambda done: None

    with refused(pushed, tmp_path / "out", BadInput, "truncated|cut", 5):
        pushed.merge("sql", tmp_path / "out", progress=progress)


def test_a_damaged_base_is_refused(pushed: loreg.Registry, tmp_path: Path) -> None:
    other = tiny.write_model(tmp_path / "other", MODEL)
    whole = (other / "model.safetensors").read_bytes()
    (other / "model.safetensors").write_bytes(whole[:-7])
    with refused(pushed, tmp_path / "out", BadInput, "is truncated", 5):
        pushed.merge("sql", tmp_path / "out", base=other)
    with refused(pushed, tmp_path / "out", BadInput, "is truncated", 5):
        pushed.push(tmp_path / "sql", base=other, name="new")
    (other / "model.safetensors").rename(other / "pytorch_model.bin")
    with refused(pushed, tmp_path / "out", BadInput, "pytorch_model.bin.*safetensors only", 5):
        pushed.merge("sql", tmp_path / "out", base=other)


# Odd tensors


def test_odd_tensors_go_through_a_conversion(registry: loreg.Registry, tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    odd = {
        "größe.重み": tiny.normal(rng, "F32", 3, 2),
        "scalar": tiny.normal(rng, "F32"),
        "vector": tiny.normal(rng, "F32", 5),
        "conv1": tiny.normal(rng, "F32", 2, 3, 4),
        "conv2": tiny.normal(rng, "F32", 2, 1, 3, 2),
        "no rows": tiny.Tensor("F32", (0, 4), b""),
        "no columns": tiny.Tensor("F32", (4, 0), b""),
        "nothing": tiny.Tensor("F32", (2, 0, 3), b""),
        "mask": tiny.tensor("BOOL", [True, False]),
        "double": tiny.normal(rng, "F64", 2),
    }
    base = tiny.write_model(tmp_path / "base", MODEL | odd)
    registry.push(tiny.write_adapter(tmp_path / "sql", tiny.adapter()), base=base)
    for dtype, name in ((None, None), ("BF16", "bfloat16"), ("F16", "float16")):
        result = registry.merge("sql", tmp_path / f"{name}", dtype=name, verify="exact")
        written = tiny.tensors_in(result.out)
        for key, value in odd.items():
            floating = dtype is not None and value.dtype == "F32"
            assert written[key] == (tiny.tensor(dtype, value.values) if dtype and floating else value), key


def test_the_config_follows_the_dtype(registry: loreg.Registry, tmp_path: Path) -> None:
    base = tiny.write_model(tmp_path / "base", MODEL, config=tiny.CONFIG | {"torch_dtype": "bfloat16"})
    registry.push(tiny.write_adapter(tmp_path / "sql", tiny.adapter()), base=base)
    registry.merge("sql", tmp_path / "same")
    assert (tmp_path / "same/config.json").read_bytes() == (base / "config.json").read_bytes()
    registry.merge("sql", tmp_path / "wide", dtype="float32")
    config = json.loads((tmp_path / "wide/config.json").read_text())
    assert config == tiny.CONFIG | {"torch_dtype": "float32"}


@pytest.mark.parametrize("text", ["{", "[]", "null", "\xff"])
def test_a_config_that_is_none_is_refused_where_it_would_have_to_change(
    registry: loreg.Registry, tmp_path: Path, tiny_base: Path, tiny_adapter: Path, text: str
) -> None:
    registry.push(tiny_adapter, base=tiny_base)
    (tiny_base / "config.json").write_text(text, encoding="latin-1")
    registry.merge("sql", tmp_path / "plain")
    with refused(registry, tmp_path / "out", BadInput, "config.json", 5):
        registry.merge("sql", tmp_path / "out", dtype="float32")


@pytest.mark.parametrize("metadata", [None, [], "x"])
def test_an_index_without_proper_metadata_is_converted(
    registry: loreg.Registry, tmp_path: Path, metadata: Any
) -> None:
    names = list(MODEL)
    base = tiny.write_model(tmp_path / "base", MODEL, shards=[names[:3], names[3:]])
    path = base / "model.safetensors.index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"metadata": metadata}))
    registry.push(tiny.write_adapter(tmp_path / "sql", tiny.adapter()), base=base)
    registry.merge("sql", tmp_path / "out", dtype="float32", verify="exact")
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(names)
    total = sum(len(tensor.data) for tensor in tiny.tensors_in(tmp_path / "out").values())
    assert index["metadata"] == {"total_size": total}


def test_a_base_that_is_one_file_of_any_name(registry: loreg.Registry, tmp_path: Path, tiny_adapter: Path) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    for name in ("weights.safetensors", "weights"):
        (folder / name).write_bytes(tiny.container(MODEL.items()))
    version = registry.push(tiny_adapter, base=folder / "weights.safetensors")
    out = registry.merge(str(version), tmp_path / "out").out
    assert tiny.tensors_in(out)[NORM] == MODEL[NORM]
    registry.unmerge(out, tmp_path / "back")
    assert (tmp_path / "back/weights.safetensors").read_bytes() == (folder / "weights.safetensors").read_bytes()


@pytest.mark.parametrize("word", [b"\xc0\x7f", b"\x80\x7f", b"\x80\xff"])
def test_a_base_that_is_not_finite_is_refused_where_it_is_touched(
    registry: loreg.Registry, tmp_path: Path, word: bytes
) -> None:
    bad = tiny.Tensor("BF16", (6,), MODEL[NORM].data[:-2] + word)
    touched = MODEL[V]._replace(data=MODEL[V].data[:-2] + word)
    adapter = tiny.write_adapter(tmp_path / "sql", tiny.adapter())
    registry.push(adapter, base=tiny.write_model(tmp_path / "aside", MODEL | {NORM: bad}), name="aside")
    registry.push(adapter, base=tiny.write_model(tmp_path / "touched", MODEL | {V: touched}), name="touched")
    assert tiny.tensors_in(registry.merge("aside", tmp_path / "kept").out)[NORM] == bad
    for expression, dtype, name in (("touched", None, V), ("aside", "float32", NORM)):
        message = f"Tensor '{name}': element .* is NaN or infinite in W"
        with refused(registry, tmp_path / "out", BadInput, message, 5):
            registry.merge(expression, tmp_path / "out", dtype=dtype)


def test_a_result_beyond_the_dtype_is_refused(registry: loreg.Registry, tmp_path: Path) -> None:
    base = tiny.write_model(tmp_path / "base", MODEL | {NORM: tiny.tensor("BF16", np.full(6, 1e5))})
    registry.push(tiny.write_adapter(tmp_path / "sql", tiny.adapter()), base=base)
    for expression, dtype, name in (
        ("sql", "float16", NORM),
        ("1e7*sql", "float16", Q),
        ("1e40*sql", None, Q),
    ):
        message = f"Tensor '{name}': element .* exceeds the largest finite"
        with refused(registry, tmp_path / "out", BadInput, message, 5):
            registry.merge(expression, tmp_path / "out", dtype=dtype)
    with refused(registry, tmp_path / "out", BadInput, "the scale of a delta is inf", 5):
        registry.merge("1.7e308*sql", tmp_path / "out")


# Names, options, places


@pytest.mark.parametrize(
    ("expression", "options", "error", "message", "code"),
    [
        ("sqi", {}, NotFound, "no adapter is called 'sqi'; did you mean 'sql'", 3),
        ("sql:v9", {}, NotFound, "no version with number 9", 3),
        ("sql:prod", {}, NotFound, "no version with tag 'prod'", 3),
        ("sql@blake3:00000000", {}, NotFound, "no version with a digest", 3),
        ("blake3:" + "0" * 64, {}, NotFound, "0000", 3),
        ("sql +", {}, UsageError, "expected", 2),
        ("", {}, UsageError, "expected", 2),
        ("sql", {"base": "nowhere/at/all"}, NotFound, "does not exist", 3),
        ("sql", {"base": "./nowhere"}, NotFound, "does not exist", 3),
        ("sql", {"dtype": "int8"}, UsageError, "'int8' is not an output dtype", 2),
        ("sql", {"verify": "perhaps"}, UsageError, "'perhaps' is not a kind of verification", 2),
        ("sql", {"device": "toaster"}, UsageError, "'toaster' is not a device", 2),
        ("sql", {"device": "meta"}, UsageError, "'meta' is not handled", 2),
    ],
)
def test_a_wrong_argument_is_refused(
    pushed: loreg.Registry,
    tmp_path: Path,
    expression: str,
    options: dict[str, Any],
    error: type[LoregError],
    message: str,
    code: int,
) -> None:
    with refused(pushed, tmp_path / "out", error, message, code):
        pushed.merge(expression, tmp_path / "out", **options)


def test_an_unknown_base_is_refused(pushed: loreg.Registry, tmp_path: Path, hub: Any) -> None:
    with refused(pushed, tmp_path / "out", NotFound, "Registered bases: base", 3):
        pushed.push(tmp_path / "sql", base="tinyy")


@pytest.mark.parametrize("kind", ["full", "file", "link", "dangling"])
def test_an_output_that_is_taken_is_refused_and_left_alone(pushed: loreg.Registry, tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out"
    if kind == "full":
        out.mkdir()
        (out / "precious").write_text("mine")
    elif kind == "file":
        out.write_text("mine")
    else:
        (tmp_path / "empty").mkdir()
        out.symlink_to(tmp_path / ("empty" if kind == "link" else "nothing"))
    for write in (
        lambda: pushed.merge("sql", out),
        lambda: pushed.export("sql", out),
    ):
        with refused(pushed, out, Conflict, "exists and is not an empty directory", 6):
            write()
    assert kind != "full" or (out / "precious").read_text() == "mine"


def test_an_empty_output_directory_is_used_and_parents_are_made(pushed: loreg.Registry, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    pushed.merge("sql", tmp_path / "out")
    pushed.merge("sql", tmp_path / "a/b/c")
    assert tiny.files_in(tmp_path / "out") == tiny.files_in(tmp_path / "a/b/c")


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(
    pushed: loreg.Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage:
        free = 1000

    monkeypatch.setattr("loreg.merge.plan.shutil.disk_usage", lambda path: Usage)
    monkeypatch.setattr("loreg.merge.output.execute", None)
    with refused(pushed, tmp_path / "out", CheckFailed, "has 1,000 bytes free, and the merge writes", 1):
        pushed.merge("sql", tmp_path / "out")
