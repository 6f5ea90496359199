"""What each kind of verification finds, and what it lets pass.

A wrong merge is made by patching the written file and restating ``loreg.json`` to match, so that no digest gives
it away and only the mathematics can.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

import loreg
from loreg.checkpoint import Checkpoint
from loreg.errors import BadInput, BaseMismatch, CheckFailed, NotFound, UsageError
from loreg.format.recipe import MergeRecord
from loreg.merge.computing import Computation
from loreg.merge.resume import Finished
from loreg.merge.verify import Verification, Verifier

ROWS, COLS = 24, 16
W = f"{tiny.V}.weight"  # square, so that a transposed delta has the right shape
MODEL = tiny.model(rows=ROWS, cols=COLS)
FACTORS = {
    "sql": tiny.adapter(seed=1, rank=4, rows=ROWS, cols=COLS),
    "humor": tiny.adapter(2, 4, rows=ROWS, cols=COLS),
}
S = tiny.scale(FACTORS["sql"][tiny.V])


def delta(name: str, scale: float = S) -> tiny.Array:
    factors = FACTORS[name][tiny.V]
    product: tiny.Array = scale * (factors.B.values.astype(float) @ factors.A.values.astype(float))
    return product


@pytest.fixture
def sum_of_two(registry: loreg.Registry, tmp_path: Path) -> Path:
    """The merge of ``sql + humor``."""
    tiny.write_model(tmp_path / "base", MODEL)
    for name, factors in FACTORS.items():
        registry.push(tiny.write_adapter(tmp_path / name, factors), base=tmp_path / "base")
    return registry.merge("sql+humor", tmp_path / "out", verify="exact").out


def patch(out: Path, name: str, value: tiny.Tensor) -> None:
    """Put ``value`` in the place of a tensor, and let ``loreg.json`` tell of it."""
    path = out / "model.safetensors"
    path.write_bytes(tiny.container((tiny.contents(path) | {name: value}).items()))
    restate(out)


def restate(out: Path) -> None:
    record = MergeRecord.parse((out / "loreg.json").read_bytes())
    manifest = Checkpoint.open(out).manifest()
    record = replace(record, tensors=manifest.tensors, weights_root=manifest.identity.weights_root)
    (out / "loreg.json").write_bytes(record.dump())


def nudged(value: tiny.Tensor, row: int, column: int) -> tiny.Tensor:
    """One element moved by one unit in the last place, away from zero."""
    width = len(value.data) // value.values.size
    words = np.frombuffer(value.data, f"<u{width}").copy().reshape(value.shape)
    words[row, column] += 1
    return value._replace(data=words.tobytes())


base_values = MODEL[W].values
WRONG: dict[str, Callable[[], tiny.Array]] = {
    "delta missing": lambda: base_values,
    "delta transposed": lambda: base_values + delta("sql").T + delta("humor").T,
    "scale doubled": lambda: base_values + 2 * delta("sql") + 2 * delta("humor"),
    "scale of rsLoRA": lambda: base_values + delta("sql", 16 / 4**0.5) + delta("humor", 16 / 4**0.5),
    "one adapter dropped": lambda: base_values + delta("sql"),
    "one adapter twice": lambda: base_values + 2 * delta("sql") + delta("humor"),
    "sign lost": lambda: base_values - delta("sql") - delta("humor"),
    "rounded between": lambda: tiny.tensor("BF16", base_values + delta("sql")).values + delta("humor"),
}


@pytest.mark.parametrize("kind", ["probe", "exact"])
@pytest.mark.parametrize("mistake", WRONG)
def test_a_wrong_sum_is_found(registry: loreg.Registry, sum_of_two: Path, mistake: str, kind: str) -> None:
    patch(sum_of_two, W, tiny.tensor("BF16", WRONG[mistake]()))
    verification = registry.verify(sum_of_two, kind=kind)
    assert not verification.ok
    assert [check.name for check in verification.checks if not check.ok] == ["touched"]
    assert W in verification.reason


def test_the_right_sum_patched_in_passes(registry: loreg.Registry, sum_of_two: Path) -> None:
    # That WRONG fails for its content, not for having been patched.
    patch(sum_of_two, W, tiny.tensor("BF16", base_values + delta("sql") + delta("humor")))
    assert registry.verify(sum_of_two, kind="probe").ok


def test_the_probe_finds_one_unit_in_the_last_place_of_a_sampled_row(
    registry: loreg.Registry, tmp_path: Path
) -> None:
    model = tiny.model(rows=12, cols=COLS)  # of at most 16 rows every one is sampled
    tiny.write_model(tmp_path / "base", model)
    factors = tiny.adapter(rank=4, rows=12, cols=COLS)
    registry.push(tiny.write_adapter(tmp_path / "sql", factors), base=tmp_path / "base")
    out = registry.merge("sql", tmp_path / "out").out
    name = f"{tiny.Q}.weight"
    good = tiny.tensors_in(out)[name]
    for row, column in ((0, 0), (5, 7), (11, COLS - 1)):
        patch(out, name, nudged(good, row, column))
        assert name in registry.verify(out, kind="probe").reason
    patch(out, name, good)
    assert registry.verify(out, kind="probe").ok


def test_the_probe_samples_rows_of_every_part_of_a_tall_matrix(registry: loreg.Registry, sum_of_two: Path) -> None:
    good = tiny.tensors_in(sum_of_two)[f"{tiny.Q}.weight"]
    found = 0
    for row in range(ROWS):
        patch(sum_of_two, f"{tiny.Q}.weight", nudged(good, row, 3))
        found += not registry.verify(sum_of_two, kind="probe").ok
    assert found >= 16


def test_the_probe_finds_one_row_without_its_delta_sampled_or_not(registry: loreg.Registry, sum_of_two: Path) -> None:
    name = f"{tiny.Q}.weight"
    good, row_bytes = tiny.tensors_in(sum_of_two)[name], 2 * COLS
    for row in range(ROWS):
        start, end = row * row_bytes, (row + 1) * row_bytes
        bare = good.data[:start] + MODEL[name].data[start:end] + good.data[end:]
        patch(sum_of_two, name, good._replace(data=bare))
        assert name in registry.verify(sum_of_two, kind="probe").reason, row


def test_exact_finds_any_flipped_bit_of_a_touched_tensor(registry: loreg.Registry, sum_of_two: Path) -> None:
    good = tiny.tensors_in(sum_of_two)[W]
    for index in range(0, len(good.data), 37):
        patch(sum_of_two, W, good.flipped(index, index % 7))
        verification = registry.verify(sum_of_two, kind="exact")
        assert "has 1 elements that are not the correctly rounded sums" in verification.reason
    patch(sum_of_two, W, good)
    assert registry.verify(sum_of_two, kind="exact").ok


@pytest.mark.parametrize("kind", ["probe", "exact"])
@pytest.mark.parametrize("name", [name for name in MODEL if name not in (W, f"{tiny.Q}.weight")])
def test_a_flipped_bit_of_an_untouched_tensor_is_found(
    registry: loreg.Registry, sum_of_two: Path, name: str, kind: str
) -> None:
    patch(sum_of_two, name, tiny.tensors_in(sum_of_two)[name].flipped(-1))
    verification = registry.verify(sum_of_two, kind=kind)
    assert [check.name for check in verification.checks if not check.ok] == ["untouched"]
    assert repr(name) in verification.reason


def test_an_untouched_tensor_is_compared_where_the_output_dtype_is_its_own(
    registry: loreg.Registry, sum_of_two: Path, tmp_path: Path
) -> None:
    out = registry.merge("sql", tmp_path / "same dtype", dtype="bfloat16").out
    patch(out, tiny.NORM, MODEL[tiny.NORM].flipped(0))
    assert repr(tiny.NORM) in registry.verify(out).reason


def test_a_tensor_that_nothing_explains_is_found(registry: loreg.Registry, sum_of_two: Path) -> None:
    patch(sum_of_two, "stranger", MODEL[tiny.NORM])
    assert "expected 'stranger' as None" in registry.verify(sum_of_two).reason


@pytest.mark.parametrize("kind", ["probe", "exact"])
def test_a_file_that_is_not_what_its_record_says_is_found(
    registry: loreg.Registry, sum_of_two: Path, kind: str
) -> None:
    path = sum_of_two / "model.safetensors"
    good = path.read_bytes()
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    reason = registry.verify(sum_of_two, kind=kind).reason
    assert reason.startswith("files: 1 tensor") and "'lm_head.weight'" in reason
    path.write_bytes(good[:-1])
    with pytest.raises(BadInput, match="truncated"):
        registry.verify(sum_of_two, kind=kind)
    path.write_bytes(tiny.container(list(MODEL.items())[1:]))
    assert "is missing from the files" in registry.verify(sum_of_two, kind=kind).reason
    path.write_bytes(tiny.container([*MODEL.items(), ("extra", MODEL[tiny.NORM])]))
    assert "'extra' is missing from loreg.json" in registry.verify(sum_of_two, kind=kind).reason


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace(b'"weight":"1"', b'"weight":"2"', 1),
        lambda text: text.replace(b'"dtype":null', b'"dtype":"F32"', 1),
        lambda text: text.replace(b"[10,16]", b"[16,10]", 1),
        lambda text: text.replace(b"blake3:a", b"blake3:b").replace(b"blake3:0", b"blake3:c"),
        lambda text: text[:-2],
        lambda text: text + b"\n",
        lambda text: b"",
    ],
)
def test_an_altered_record_is_found(
    registry: loreg.Registry, sum_of_two: Path, change: Callable[[bytes], bytes]
) -> None:
    path = sum_of_two / "loreg.json"
    before = path.read_bytes()
    path.write_bytes(change(before))
    assert path.read_bytes() != before
    try:
        verification = registry.verify(sum_of_two)
    except (BadInput, NotFound):
        return
    assert not verification.ok


def test_a_directory_without_a_record_is_refused(registry: loreg.Registry, tiny_base: Path) -> None:
    with pytest.raises(BadInput, match=r"has no loreg.json: expected a directory that 'loreg merge' wrote"):
        registry.verify(tiny_base)


def test_a_merge_is_not_verified_against_another_base(
    registry: loreg.Registry, sum_of_two: Path, tmp_path: Path
) -> None:
    other = tiny.write_model(tmp_path / "other", MODEL | {tiny.NORM: MODEL[tiny.NORM].flipped(0)})
    with pytest.raises(BaseMismatch, match="give that base"):
        registry.verify(sum_of_two, base=other)


def test_kinds(registry: loreg.Registry, sum_of_two: Path) -> None:
    assert registry.verify(sum_of_two, kind="none") == Verification("none")
    for folder in (sum_of_two, "sql"):
        with pytest.raises(UsageError, match="is not a kind of verification"):
            registry.verify(folder, kind="thorough")


GOOD: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"lora_bias": True},
    "replaced": {"full": {"lm_head.weight": 1, tiny.NORM: 1}},
    "replaced only": {"full": {"lm_head.weight": 1}, "modules": False},
    "added": {"full": {"classifier.weight": 1}},
}


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("what", GOOD)
def test_a_good_merge_passes(registry: loreg.Registry, tmp_path: Path, what: str, dtype: str) -> None:
    model = tiny.model(dtype=dtype)
    base, rng, options = tiny.write_model(tmp_path / "base", model), np.random.default_rng(5), dict(GOOD[what])
    modules = tiny.adapter() if options.pop("modules", True) else {}
    if options.get("lora_bias"):
        modules[tiny.Q] = modules[tiny.Q]._replace(bias=tiny.normal(rng, "F32", 8))
    if "full" in options:
        shapes = {name: model[name].shape if name in model else (3, 6) for name in options["full"]}
        options["full"] = {name: tiny.normal(rng, dtype, *shape) for name, shape in shapes.items()}
    registry.push(tiny.write_adapter(tmp_path / "sql", modules, **options), base=base)
    weights = (1,) if what == "added" else (1, 0.5)
    for weight, output in itertools.product(weights, (None, "bfloat16", "float16", "float32")):
        out = registry.merge(f"{weight}*sql", tmp_path / f"{output}-{weight}", dtype=output).out
        for kind in ("probe", "exact"):
            verification = registry.verify(out, kind=kind)
            assert verification.ok, verification.reason
        written = tiny.tensors_in(out)
        for name, R in options.get("full", {}).items():
            if output is None and weight == 1:
                assert written[name] == R
            elif weight == 0.5:
                W, R64 = model[name].values.astype(float), R.values.astype(float)
                assert written[name] == tiny.tensor(written[name].dtype, 0.5 * W + 0.5 * R64)


def test_a_replaced_tensor_that_is_another_is_found(registry: loreg.Registry, tmp_path: Path) -> None:
    model = tiny.model()
    base = tiny.write_model(tmp_path / "base", model)
    head = tiny.normal(np.random.default_rng(5), "BF16", 10, 6)
    registry.push(tiny.write_adapter(tmp_path / "sql", {}, full={"lm_head.weight": head}), base=base)
    out = registry.merge("sql", tmp_path / "out").out
    patch(out, "lm_head.weight", model["lm_head.weight"])
    assert "is not the tensor that the adapter replaces it by" in registry.verify(out).reason


@pytest.mark.parametrize("kind", ["probe", "exact"])
def test_a_wrong_conversion_is_found(registry: loreg.Registry, tmp_path: Path, kind: str) -> None:
    base = tiny.write_model(tmp_path / "base", tiny.model(dtype="F32"))
    registry.push(tiny.write_adapter(tmp_path / "sql", tiny.adapter()), base=base)
    out = registry.merge("sql", tmp_path / "out", dtype="bfloat16").out
    good = tiny.tensors_in(out)[tiny.NORM]
    patch(out, tiny.NORM, nudged(good._replace(shape=(1, 6)), 0, 2)._replace(shape=(6,)))
    assert repr(tiny.NORM) in registry.verify(out, kind=kind).reason


def test_a_stored_version_is_verified_blob_by_blob(pushed: loreg.Registry) -> None:
    assert pushed.verify("sql").ok
    blob = pushed.resolve("sql").manifest.blob("factors")
    assert blob is not None
    path = pushed.storage.path(blob.digest)
    data = path.read_bytes()
    path.chmod(0o644)
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    verification = pushed.verify("sql")
    assert [check.name for check in verification.checks if not check.ok] == [f"factors {blob.digest.short}"]
    assert not path.exists()  # put aside
    assert "is not in the store" in pushed.verify("sql").reason


# While it is being written


NAMES = [f"layers.{number}.weight" for number in range(4)]


@pytest.fixture
def in_four_files(registry: loreg.Registry, tmp_path: Path) -> Path:
    """A base of four files, and ``sql`` for a tensor of each."""
    rng = np.random.default_rng(0)
    model = {name: tiny.normal(rng, "BF16", 64, 48, std=0.1) for name in NAMES}
    base = tiny.write_model(tmp_path / "base", model, shards=[[name] for name in NAMES])
    factors = {name.removesuffix(".weight"): tiny.factors(rng, 64, 48, 2) for name in NAMES}
    registry.push(tiny.write_adapter(tmp_path / "sql", factors), base=base, name="sql")
    return base


def _after_each_file(monkeypatch: pytest.MonkeyPatch, then: Callable[[Path], object]) -> None:
    """``then``, with the file, once it is on the disk and recorded."""
    record = Finished.record

    def recorded(self: Finished, shard: Any, *rest: Any) -> Any:
        found = record(self, shard, *rest)
        then(self._folder / shard.name)
        return found

    monkeypatch.setattr(Finished, "record", recorded)


@pytest.mark.parametrize("kind", ["probe", "exact"])
@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_what_is_verified_is_the_written_file(
    registry: loreg.Registry,
    in_four_files: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    kind: str,
) -> None:
    count = itertools.count(1)

    def damage(path: Path) -> None:
        if next(count) == number:
            raw = bytearray(path.read_bytes())
            raw[-2] ^= 1
            path.write_bytes(raw)

    _after_each_file(monkeypatch, damage)
    with pytest.raises(
        CheckFailed, match=r"does not verify, so it was removed: files: 1 tensor is not as loreg\.json"
    ):
        registry.merge("sql", tmp_path / "out", verify=kind, base=in_four_files)
    assert not list(tmp_path.glob("*out*"))


def test_what_changes_once_it_was_verified_is_found(
    registry: loreg.Registry, in_four_files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = Checkpoint.check_unchanged

    def touching(base: Checkpoint) -> None:
        check(base)
        (written,) = tmp_path.glob(".out*/model-00002*.safetensors")
        os.utime(written, ns=(0, 0))

    monkeypatch.setattr(Checkpoint, "check_unchanged", touching)
    with pytest.raises(CheckFailed, match=r"model-00002.* was changed while it was read, or since"):
        registry.merge("sql", tmp_path / "out", base=in_four_files)


@pytest.mark.parametrize("kind", ["probe", "exact"])
def test_a_file_is_verified_before_the_last_is_written(
    registry: loreg.Registry, in_four_files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """And never before it is closed and recorded; those that a killed merge had finished are, too."""
    seen: list[tuple[str, str]] = []
    look, write = Verifier._look, Computation.write

    def looking(self: Verifier, written: Any, *rest: Any) -> None:
        seen.append(("verified", written.info.name))
        look(self, written, *rest)

    def writing(self: Computation, sinks: Any, *rest: Any) -> None:
        if sinks[0].tensor.info.name == NAMES[-1]:
            # Another thread has the disk's time to record the first ones.
            for _ in range(2000):
                if ("verified", NAMES[0]) in seen:
                    break
                time.sleep(0.01)
        seen.append(("written", sinks[0].tensor.info.name))
        write(self, sinks, *rest)

    monkeypatch.setattr(Verifier, "_look", looking)
    monkeypatch.setattr(Computation, "write", writing)
    _after_each_file(monkeypatch, lambda path: seen.append(("recorded", f"layers.{int(path.name[6:11]) - 1}.weight")))
    assert registry.merge("sql", tmp_path / "out", verify=kind, base=in_four_files, threads=2).verification.ok
    at = {event: place for place, event in enumerate(seen)}
    assert len(seen) == len(at) == 3 * len(NAMES)
    for name in NAMES:
        assert at["written", name] < at["recorded", name] < at["verified", name]
    assert at["verified", NAMES[0]] < at["written", NAMES[-1]]
