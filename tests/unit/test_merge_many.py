"""Several merges in one pass over the base, and what a merge may take of the machine."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

import loreg
from loreg.errors import BadInput, BaseMismatch, CheckFailed, Conflict, UsageError
from loreg.merge.resume import Finished

EXPRESSIONS = ["sql", "humor", "sql + humor", "0.5*sql"]


@pytest.fixture
def sharded(pushed: loreg.Registry, tmp_path: Path) -> Path:
    model = tiny.model()
    names = sorted(model)
    return tiny.write_model(tmp_path / "sharded", model, shards=[names[part::3] for part in range(3)])


def _apart(registry: loreg.Registry, folder: Path, **options: Any) -> dict[str, dict[str, bytes]]:
    return {e: tiny.files_in(registry.merge(e, folder / f"apart {e}", **options).out) for e in EXPRESSIONS}


@pytest.mark.parametrize("options", [{}, {"dtype": "float32"}, {"verify": "exact", "threads": 1}])
def test_each_output_is_what_it_would_be_alone(
    pushed: loreg.Registry, sharded: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    results = pushed.merge_many([(e, tmp_path / f"of {e}") for e in EXPRESSIONS], base=sharded, **options)
    apart = _apart(pushed, tmp_path, base=sharded, **options)
    assert {e: tiny.files_in(result.out) for e, result in zip(EXPRESSIONS, results, strict=True)} == apart


def test_every_tensor_of_the_base_is_read_once(
    pushed: loreg.Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that is edited for one output, and as it was in another."""
    only_q = tiny.write_adapter(tmp_path / "q", {tiny.Q: tiny.adapter()[tiny.Q]})
    pushed.push(only_q, base="base", name="q")
    reads: Counter[int] = Counter()
    base = (tmp_path / "base" / "model.safetensors").stat()
    real, copy = os.preadv, os.copy_file_range

    def counted(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        if os.path.samestat(os.fstat(descriptor), base):
            reads[offset] += 1
        return real(descriptor, buffers, offset)

    def copied(source: int, target: int, count: int, offset: int, to: int) -> int:
        reads[offset] += 1
        return copy(source, target, count, offset, to)

    monkeypatch.setattr("loreg.checkpoint._SETTLED_NS", 0)  # hashed once, before the counting begins
    wanted = [(e, tmp_path / f"of {e}") for e in ("sql", "humor", "q")]
    pushed.merge_many(wanted, verify="none")
    for _, out in wanted:
        shutil.rmtree(out)
    monkeypatch.setattr(os, "preadv", counted)
    monkeypatch.setattr(os, "copy_file_range", copied)
    pushed.merge_many(wanted, verify="none")
    edited = {offset for offset, count in reads.items() if count == 1}
    assert len(edited) >= 2
    assert set(reads.values()) <= {1, 3}  # 3: a range that is copied for each, while it is in memory


def test_all_are_there_or_none(pushed: loreg.Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "precious").write_text("mine")
    with pytest.raises(Conflict):
        pushed.merge_many([("sql", tmp_path / "one"), ("humor", taken)])
    assert not (tmp_path / "one").exists()

    def no(*_: Any, **__: Any) -> Any:
        from loreg.merge.verify import Check, Verification

        return Verification("probe", (Check("probe", False, "no"),))

    monkeypatch.setattr("loreg.merge.verify.Verifier.verification", no)
    with pytest.raises(CheckFailed, match=r"(one|two) was written and does not verify"):
        pushed.merge_many([("sql", tmp_path / "one"), ("humor", tmp_path / "two")])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "home", "humor", "sql", "taken"]


def test_one_goes_on_where_it_was_and_the_other_begins(
    pushed: loreg.Registry, sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException): ...

    expected = _apart(pushed, tmp_path, base=sharded)
    record, count = Finished.record, 0

    def killing(*args: Any) -> None:
        nonlocal count
        count += 1
        if count > 2:
            raise Killed
        record(*args)

    with monkeypatch.context() as patch:
        patch.setattr(Finished, "record", killing)
        patch.setattr("loreg.staging.shutil.rmtree", lambda *args, **given: None)
        with pytest.raises(Killed):
            pushed.merge("sql", tmp_path / "sql out", base=sharded)
    (left,) = tmp_path.glob(".sql out.*.partial")
    before = {path.name: path.stat().st_ino for path in left.glob("*.safetensors")}
    recorded = {path.stem for path in (left / ".finished").iterdir()}
    assert len(recorded) == 2
    results = pushed.merge_many([("sql", tmp_path / "sql out"), ("humor", tmp_path / "humor out")], base=sharded)
    assert [tiny.files_in(result.out) for result in results] == [expected["sql"], expected["humor"]]
    assert {name for name in before if (tmp_path / "sql out" / name).stat().st_ino == before[name]} >= recorded


def test_a_failure_of_one_names_its_tensor_and_leaves_nothing(pushed: loreg.Registry, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    huge = {tiny.Q: tiny.factors(rng, 8, 6, 2, std=1e19)}
    pushed.push(tiny.write_adapter(tmp_path / "huge", huge, alpha=16e3), base="base", name="huge")
    with pytest.raises(BadInput, match="exceeds the largest finite"):
        pushed.merge_many([("sql", tmp_path / "one"), ("huge", tmp_path / "two")])
    assert not list(tmp_path.glob("*one*")) and not list(tmp_path.glob("*two*"))


@pytest.mark.parametrize(
    "wanted",
    [[], [("sql", "a"), ("humor", "a")], [("sql", "a"), ("humor", "b/../a")], [("sql", "./a"), ("sql", "a")]],
)
def test_each_has_a_directory_of_its_own(
    pushed: loreg.Registry, tmp_path: Path, wanted: list[tuple[str, str]]
) -> None:
    with pytest.raises(UsageError, match="expected one for each"):
        pushed.merge_many([(expression, tmp_path / out) for expression, out in wanted])


def test_adapters_of_two_bases_need_to_be_told_which(pushed: loreg.Registry, tmp_path: Path) -> None:
    other = tiny.write_model(tmp_path / "other", {n: t.flipped(0) for n, t in tiny.model().items()})
    pushed.push(tmp_path / "humor", base=other, name="there")
    with pytest.raises(BaseMismatch, match="say which one"):
        pushed.merge_many([("sql", tmp_path / "one"), ("there", tmp_path / "two")])


def _cli(registry: loreg.Registry, *words: str) -> tuple[int, Any, str]:
    command = [sys.executable, "-m", "loreg.cli", *words, "--json", "--home", str(registry.home)]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.returncode, json.loads(done.stdout or "null"), done.stderr


def test_the_command(pushed: loreg.Registry, tmp_path: Path) -> None:
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    code, told, _ = _cli(pushed, "merge", "--apply", "sql", "--out", one, "--apply", "humor", "--out", two)
    assert code == 0 and [merge["out"] for merge in told["merges"]] == [one, two]
    assert told["seconds"] > 0 and all(merge["verification"]["ok"] for merge in told["merges"])
    code, _, said = _cli(pushed, "merge", "--apply", "sql", "--apply", "humor", "--out", str(tmp_path / "three"))
    assert code == 2 and "2 times --apply, 1 times --out" in said


@pytest.mark.parametrize("size", ["lots", "-1", "1.5.2MB", "10 parsecs"])
def test_a_size_that_is_none(pushed: loreg.Registry, tmp_path: Path, size: str) -> None:
    code, _, said = _cli(pushed, "merge", "--apply", "sql", "--out", str(tmp_path / "out"), "--memory", size)
    assert code == 2 and "expected bytes" in said


def test_too_little_memory_is_said_and_the_least_is_enough(pushed: loreg.Registry, tmp_path: Path) -> None:
    code, _, said = _cli(pushed, "merge", "--apply", "sql", "--out", str(tmp_path / "out"), "--memory", "10MB")
    assert code == 2 and "this merge needs" in said
    least = int(said.split("this merge needs ")[1].split(", of")[0].replace(",", ""))
    enough = str(least + (4 << 20))  # what Python takes is not the same each time
    code, told, said = _cli(pushed, "merge", "--apply", "sql", "--out", str(tmp_path / "out"), "--memory", enough)
    assert code == 0, said
    assert told["peak_rss_bytes"] <= int(enough)


@pytest.mark.parametrize("kind", ["none", "probe", "exact"])
def test_memory_is_honoured_with_large_tensors(registry: loreg.Registry, tmp_path: Path, kind: str) -> None:
    """Two tensors of 64 MB: what a merge takes beyond its beginning is a few tiles, and so is what verifies it."""
    rng = np.random.default_rng(0)
    words = rng.integers(0x3C00, 0x3F80, (16384, 2048), dtype=np.uint16)
    model = {f"layers.{i}.weight": tiny.Tensor("BF16", words.shape, words.tobytes()) for i in range(2)}
    base = tiny.write_model(tmp_path / "base", model)
    factors = tiny.factors(rng, *words.shape, 8)
    registry.push(tiny.write_adapter(tmp_path / "sql", {f"layers.{i}": factors for i in range(2)}), base=base)
    registry.merge("sql", tmp_path / "warm", verify="none")
    peaks = {}
    for limit in (None, "300MB", "330MB", "360MB"):
        given = ["--memory", limit] if limit else []
        out = str(tmp_path / f"out {limit}")
        code, told, said = _cli(registry, "merge", "--apply", "sql", "--out", out, "--verify", kind, *given)
        assert code == 0 or "this merge needs" in said, said
        if code == 0:
            peaks[limit] = told["peak_rss_bytes"]
            assert tiny.files_in(Path(out)) == tiny.files_in(tmp_path / "warm")
    limits = {"300MB": 300e6, "330MB": 330e6, "360MB": 360e6}
    assert all(peak <= limits[limit] for limit, peak in peaks.items() if limit), peaks
    assert len(peaks) > 1, peaks
