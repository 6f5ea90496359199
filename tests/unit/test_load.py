"""``serving.load`` and ``Registry.load``: which modules, of which dtype, and as views of what is stored."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

import loreg
from loreg import serving
from loreg.adapters.draft import RawTensor
from loreg.algebra import delta
from loreg.catalog import queries
from loreg.digest import Digest
from loreg.errors import BadInput, NotFound, Unsupported, UsageError
from loreg.format.safetensors import TensorInfo
from loreg.format.terms import LowRankTerm, TensorRef
from loreg.merge import blobs
from loreg.store import new_generation
from loreg.tensors import TORCH, to_memory

Q, V = tiny.Q, tiny.V


def blob_of(registry: loreg.Registry, name: str) -> Path:
    blob = registry.resolve(name).manifest.blob("factors")
    assert blob is not None
    return registry.storage.path(blob.digest)


def mappings() -> Iterator[str]:
    with open("/proc/self/maps") as maps:
        yield from maps


def test_tensors_are_views_of_one_private_mapping(pushed: loreg.Registry) -> None:
    path = blob_of(pushed, "sql")
    before = path.read_bytes()
    loaded = serving.load("sql", pushed)
    found = [line.split() for line in mappings() if line.split()[-1] == str(path)]
    (low, high), access = (int(end, 16) for end in found[0][0].split("-")), found[0][1]
    assert len(found) == 1 and access == "rw-p"
    for A, B, _ in loaded.values():
        for factor in (A, B):
            assert low <= factor.data_ptr() and factor.data_ptr() + factor.nbytes <= high
            factor.zero_()  # in this process alone
    assert path.read_bytes() == before
    assert all(A.any() and B.any() for A, B, _ in serving.load("sql", pushed).values())


def test_what_registry_load_gives_is_mapped_too(pushed: loreg.Registry) -> None:
    deltas = pushed.load("sql")
    path = str(blob_of(pushed, "sql"))
    spans = [[int(end, 16) for end in line.split()[0].split("-")] for line in mappings() if line.split()[-1] == path]
    for found in deltas.values():
        assert any(low <= found.left.data_ptr() < high for low, high in spans)


def test_they_outlive_the_version_and_the_registry(pushed: loreg.Registry) -> None:
    path = blob_of(pushed, "sql")
    loaded = serving.load("sql", pushed)
    expected = {name: (A.clone(), B.clone()) for name, (A, B, _) in loaded.items()}
    pushed.remove("sql")
    os.unlink(path)  # as a collection does in the end
    pushed.close()
    for name, (A, B, _) in loaded.items():
        assert torch.equal(A, expected[name][0]) and torch.equal(B, expected[name][1])


@pytest.mark.parametrize(
    ("modules", "expected"),
    [
        (["q_proj"], [Q]),
        (["self_attn.v_proj", Q], [Q, V]),
        ([V], [V]),
        (("layers.0.self_attn.q_proj",), [Q]),
        (r".*\.(q|v)_proj", [Q, V]),
        (r"model\.layers\.0\..*v_proj", [V]),
        ([], []),
    ],
)
def test_modules_are_chosen_as_peft_chooses_targets(pushed: loreg.Registry, modules: Any, expected: Any) -> None:
    loaded = serving.load("sql", pushed, modules=modules)
    assert list(loaded) == expected
    for path, (A, B, scale) in loaded.items():
        whole = serving.load("sql", pushed)[path]
        assert torch.equal(A, whole[0]) and torch.equal(B, whole[1]) and scale == whole[2]


@pytest.mark.parametrize(
    ("modules", "error", "words"),
    [
        (["k_proj"], NotFound, r"no module 'k_proj': it has 2, called q_proj, v_proj"),
        (["q_proj", "proj"], NotFound, "no module 'proj'"),
        ("q_proj", NotFound, "no module that the expression 'q_proj' matches as a whole"),
        ("(", UsageError, "modules: "),
    ],
)
def test_modules_that_are_not_there(pushed: loreg.Registry, modules: Any, error: Any, words: str) -> None:
    with pytest.raises(error, match=words):
        serving.load("sql", pushed, modules=modules)


def test_nothing_is_dropped_silently(pushed: loreg.Registry, tmp_path: Path) -> None:
    """What is no (A, B, scale) is refused by name, unless other modules are asked for."""
    rng = np.random.default_rng(5)
    plain = tiny.adapter()
    biased = {Q: plain[Q]._replace(bias=tiny.normal(rng, "F32", 8)), V: plain[V]}
    pushed.push(tiny.write_adapter(tmp_path / "biased", biased, lora_bias=True), base="base", name="biased")
    full = {"lm_head.weight": tiny.normal(rng, "BF16", 10, 6)}
    pushed.push(tiny.write_adapter(tmp_path / "full", plain, full=full), base="base", name="full")
    with pytest.raises(Unsupported, match=r"biased:v1 has a trained bias at .*q_proj"):
        serving.load("biased", pushed)
    with pytest.raises(Unsupported, match=r"bias at .*q_proj"):
        serving.load("biased", pushed, modules=["q_proj"])
    assert list(serving.load("biased", pushed, modules=["v_proj"])) == [V]
    with pytest.raises(Unsupported, match=r"full:v1 replaces 'lm_head.weight' outright"):
        serving.load("full", pushed)
    with pytest.raises(Unsupported, match=r"full:v1 replaces 'lm_head.weight' outright"):
        serving.load("full", pushed, modules=["lm_head"])
    assert list(serving.load("full", pushed, modules=["q_proj"])) == [Q]


def test_what_depends_on_the_base_is_refused_by_name(pushed: loreg.Registry, tmp_path: Path) -> None:
    folder = tiny.write_adapter(tmp_path / "dora", tiny.adapter(), use_dora=True)
    file = folder / "adapter_model.safetensors"
    tensors = tiny.contents(file)
    rng = np.random.default_rng(6)
    for path, rows in ((Q, 8), (V, 6)):
        tensors[f"base_model.model.{path}.lora_magnitude_vector"] = tiny.normal(rng, "F32", rows)
    file.write_bytes(tiny.container(tensors.items(), {"format": "pt"}))
    pushed.push(folder, base="base", name="dora")
    with pytest.raises(Unsupported, match=r"dora:v1 changes .*q_proj.* depends on the base's weight"):
        serving.load("dora", pushed)


def test_a_convolution_is_refused_by_name(registry: loreg.Registry, tmp_path: Path) -> None:
    rng = np.random.default_rng(8)
    base = {"body.conv.weight": tiny.normal(rng, "F32", 4, 3, 3, 3), "body.fc.weight": tiny.normal(rng, "F32", 5, 4)}
    registry.add_base(tiny.write_model(tmp_path / "base", base), "base")
    conv = tiny.Factors(tiny.normal(rng, "F32", 2, 3, 3, 3), tiny.normal(rng, "F32", 4, 2, 1, 1))
    made = tiny.write_adapter(tmp_path / "a", {"body.conv": conv, "body.fc": tiny.factors(rng, 5, 4, 2)})
    registry.push(made, base="base", name="a")
    with pytest.raises(Unsupported, match=r"a:v1 adapts 'body.conv', conv of shape \[4, 3, 3, 3\]"):
        serving.load("a", registry)
    assert list(serving.load("a", registry, modules=["fc"])) == ["body.fc"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e5m2])
@pytest.mark.parametrize("stored", ["F32", "BF16", "F16"])
def test_each_value_is_rounded_once(pushed: loreg.Registry, tmp_path: Path, stored: str, dtype: torch.dtype) -> None:
    adapter = tiny.adapter(seed=3, dtype=stored)
    pushed.push(tiny.write_adapter(tmp_path / "other", adapter), base="base", name="other")
    loaded = serving.load("other", pushed, dtype=dtype)
    for path, (A, B, _) in loaded.items():
        for factor, given in ((A, adapter[path].A), (B, adapter[path].B)):
            assert factor.dtype == dtype and factor.is_contiguous()
            exact = torch.frombuffer(bytearray(given.data), dtype=TORCH[stored]).view(given.shape).double()
            nearest = exact.to(torch.float32).to(dtype)  # each stored value is a float32
            assert bytes(to_memory(factor)) == bytes(to_memory(nearest))


def test_a_float64_factor_is_rounded_once(pushed: loreg.Registry, tmp_path: Path) -> None:
    """By way of float32 it would be 1: half a step of bfloat16 above it, and a little more."""
    adapter = tiny.adapter()
    values = np.full((2, 6), 1 + 2.0**-8 + 2.0**-40)
    adapter[Q] = adapter[Q]._replace(A=tiny.tensor("F64", values))
    pushed.push(tiny.write_adapter(tmp_path / "other", adapter), base="base", name="other")
    A = serving.load("other", pushed, dtype=torch.bfloat16, modules=["q_proj"])[Q][0]
    assert (A == 1 + 2.0**-7).all()


def test_a_value_that_the_dtype_cannot_hold(pushed: loreg.Registry, tmp_path: Path) -> None:
    adapter = tiny.adapter()
    for stored in ("F32", "BF16"):
        adapter[V] = adapter[V]._replace(B=tiny.tensor(stored, np.full((6, 2), 1e6)))
        pushed.push(tiny.write_adapter(tmp_path / stored, adapter), base="base", name=stored.lower())
        with pytest.raises(BadInput, match=r"v_proj' has a value that torch.float16 cannot hold"):
            serving.load(stored.lower(), pushed, dtype=torch.float16)


def test_a_blob_that_is_cut_or_replaced(pushed: loreg.Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between its check and its reading: an error, never a signal."""
    path = blob_of(pushed, "sql")
    whole = path.read_bytes()
    honest = pushed.storage.path

    def then(change: Any) -> Any:
        def changed(digest: Any) -> Path:
            found = honest(digest)
            if found == path:
                os.chmod(path, 0o644)
                change()
            return found

        return changed

    for cut in (0, 100, len(whole) - 1):
        monkeypatch.setattr(pushed.storage, "path", then(lambda cut=cut: os.truncate(path, cut)))
        with pytest.raises(BadInput, match=r"truncated|too short|end|cut|header|bytes|changed"):
            serving.load("sql", pushed)
        path.write_bytes(whole)
    monkeypatch.setattr(pushed.storage, "path", honest)
    assert serving.load("sql", pushed).keys() == {Q, V}


@pytest.mark.parametrize("size", [0, 4096, 8192])
def test_a_file_that_is_cut_under_its_mapping(tmp_path: Path, size: int) -> None:
    """What touching a page would end the process for, is an error when a tensor is brought."""
    values = tiny.tensor("F32", np.ones((4, 2048)))
    path = tmp_path / "blob"
    path.write_bytes(tiny.container([("one", values), ("two", values)]))
    reader = blobs.MappedBlob(path, blobs.Content())
    assert reader.tensor("one").sum() == 4 * 2048
    os.truncate(path, size)
    with pytest.raises(BadInput, match=r"cannot be read up to the end of 'two': was it cut\?"):
        reader.tensor("two")


def test_pages_are_brought_of_what_is_asked_for_and_in_one_call(
    pushed: loreg.Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    brought = list[tuple[int, int]]()
    honest = blobs.MappedBlob._populate

    def populate(self: Any, start: int, end: int, name: str) -> None:
        brought.append((start, end))
        honest(self, start, end, name)

    monkeypatch.setattr(blobs.MappedBlob, "_populate", populate)
    serving.load("sql", pushed)
    path = blob_of(pushed, "sql")
    ((start, end),) = brought
    assert end == path.stat().st_size and 0 < start < end
    brought.clear()
    nbytes = sum(x.nbytes for A, B, _ in serving.load("sql", pushed, modules=["q_proj"]).values() for x in (A, B))
    assert sum(end - start for start, end in brought) == nbytes


def test_tensors_beside_each_other_are_one_run() -> None:
    def info(name: str, start: int, end: int) -> TensorInfo:
        return TensorInfo(name, "U8", (end - start,), start, end)

    a, empty, b, c, d = info("a", 0, 4), info("empty", 4, 4), info("b", 4, 8), info("c", 12, 13), info("d", 13, 20)
    assert list(blobs._neighbours([])) == list(blobs._neighbours([empty])) == []
    assert list(blobs._neighbours([d, b, empty, a, b, c])) == [(a, b), (c, d)]


@pytest.mark.parametrize(("dtype", "shape"), [("F32", (2, 6)), ("BF16", (6, 2)), ("BF16", (2, 6))])
def test_a_tensor_that_is_not_as_the_manifest_has_it(tmp_path: Path, dtype: str, shape: tuple[int, int]) -> None:
    """By what a factors blob was made of: a push stores none that differs, another tool may."""
    A, B = tiny.tensor("BF16", np.ones((2, 6))), tiny.tensor("BF16", np.ones((4, 2)))
    path = tmp_path / "blob"
    path.write_bytes(tiny.container([("m.lora_A.0", A), ("m.lora_B.0", B)]))
    reader = blobs.MappedBlob(path, blobs.Content())
    digest = Digest.of(b"")
    term = LowRankTerm(2, None, 1.0, TensorRef(dtype, shape, digest), TensorRef("BF16", (4, 2), digest))
    if (dtype, shape) == ("BF16", (2, 6)):
        (delta,) = reader.low_rank([("m", 0, term)], torch.device("cpu"))
        assert delta.shape == (4, 6)
        return
    with pytest.raises(BadInput, match=r"has no tensor 'm.lora_A.0', \w+ of \[., .\], which its"):
        reader.low_rank([("m", 0, term)], torch.device("cpu"))


def test_a_file_that_is_cut_before_it_is_mapped(tmp_path: Path) -> None:
    path = tmp_path / "blob"
    path.write_bytes(tiny.container([("one", tiny.tensor("F32", np.ones((4, 2048))))]))
    reader = blobs.MappedBlob(path, blobs.Content())
    os.truncate(path, 4096)
    with pytest.raises(BadInput, match=r"cannot be mapped.*was it cut\?"):
        reader.tensor("one")


def test_a_blob_that_changes_while_it_is_loaded(pushed: loreg.Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    path = blob_of(pushed, "sql")
    bring = blobs.MappedBlob.bring

    def touching(self: Any, stored: Any) -> torch.Tensor:
        os.utime(path, ns=(1, 1))
        return bring(self, stored)

    monkeypatch.setattr(blobs.MappedBlob, "bring", touching)
    with pytest.raises(BadInput, match="was changed while it was read"):
        serving.load("sql", pushed)


def test_a_damaged_blob_is_found(pushed: loreg.Registry) -> None:
    path = blob_of(pushed, "sql")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    os.chmod(path, 0o644)
    path.write_bytes(data)
    with pytest.raises(BadInput, match=r"corrupt.*sql:v1"):
        serving.load("sql", pushed)


def test_what_is_not_finite_is_refused_every_time(
    pushed: loreg.Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values are looked at once, and those that were found wrong, again. No push stores them; others' tools may."""
    monkeypatch.setattr(RawTensor, "check_finite", lambda tensor: None)
    adapter = tiny.adapter()
    values = adapter[V].B.values.copy()
    values[3, 1] = np.inf
    made = tiny.write_adapter(tmp_path / "bad", {**adapter, V: adapter[V]._replace(B=tiny.tensor("F32", values))})
    pushed.push(made, base="base", name="bad")
    for _ in range(2):
        assert list(serving.load("bad", pushed, modules=["q_proj"])) == [Q]
        with pytest.raises(BadInput, match="left factor of a delta holds NaN or infinity"):
            serving.load("bad", pushed)


def test_a_second_load_looks_at_no_value_again(pushed: loreg.Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    looked = list[torch.Tensor]()
    honest = delta._all_finite
    monkeypatch.setattr(delta, "_all_finite", lambda tensor: looked.append(tensor) or honest(tensor))
    blobs.content_of.cache_clear()
    first = serving.load("sql", pushed)
    assert len(looked) == 4
    again = serving.load("sql", pushed)
    assert len(looked) == 4
    for path, (A, B, scale) in first.items():
        assert torch.equal(A, again[path][0]) and torch.equal(B, again[path][1]) and scale == again[path][2]


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files count as settled at once; otherwise a test would wait two seconds for its own."""
    monkeypatch.setattr("loreg.checkpoint._SETTLED_NS", -(10**12))


def test_a_second_load_asks_nothing_of_the_catalog(
    pushed: loreg.Registry, settled: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = list[object]()
    honest = pushed.database.read
    monkeypatch.setattr(pushed.database, "read", lambda: asked.append(None) or honest())
    first = serving.load("sql", pushed)
    assert asked
    asked.clear()
    assert serving.load("sql", pushed).keys() == first.keys() and not asked


def test_a_load_is_of_what_the_reference_means_now(pushed: loreg.Registry, settled: None, tmp_path: Path) -> None:
    """As another process moves it, removes it, collects it, and pushes it again."""
    Qs = serving.load("sql", pushed)[Q]
    with loreg.open(pushed.home) as other:
        other.push(tiny.write_adapter(tmp_path / "v2", tiny.adapter(seed=7)), base="base", name="sql")
        assert not torch.equal(serving.load("sql", pushed)[Q][0], Qs[0])
        assert torch.equal(serving.load("sql:v1", pushed)[Q][0], Qs[0])
        other.remove("sql:v1")
        with pytest.raises(NotFound, match="trash"):
            serving.load("sql:v1", pushed)
        other.collect(grace=timedelta(0))
        with pytest.raises(NotFound):
            serving.load("sql:v1", pushed)
        other.push(tmp_path / "sql", base="base", name="again")
        assert torch.equal(serving.load("again", pushed)[Q][0], Qs[0])


@pytest.mark.parametrize("role", ["manifest", "factors"])
@pytest.mark.parametrize("change", ["moved", "gone", "other bytes"])
def test_a_blob_that_is_not_where_it_was(pushed: loreg.Registry, settled: None, role: str, change: str) -> None:
    """The place that a process remembers is one to look at first, and what lies there is believed for its bytes."""
    version = pushed.resolve("sql")
    blob = version.manifest.blob("factors")
    assert blob is not None
    digest = blob.digest if role == "factors" else version.digest
    expected = serving.load("sql", pushed)[Q]
    path = pushed.storage.store.path(pushed.storage.key(digest))
    assert path is not None
    data = path.read_bytes()
    if change == "moved":  # as a repair writes another copy, and puts the one that was there aside
        generation = new_generation()
        pushed.storage.store.put(digest, generation, [data])
        with pushed.storage.writing() as session:
            found = queries.find_blob(session, digest)
            assert found is not None
            found.generation = generation
        path.unlink()
        assert torch.equal(serving.load("sql", pushed)[Q][0], expected[0])
        return
    path.unlink()
    if change == "other bytes":
        path.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    with pytest.raises(BadInput if change == "other bytes" else NotFound, match=r"corrupt|not in the store"):
        serving.load("sql", pushed)


class Event:
    """What a CUDA event is asked; ``pending``: whether the buffer's copy may not be over."""

    def __init__(self) -> None:
        self.pending, self.waits = False, 0

    def synchronize(self) -> None:
        self.pending, self.waits = False, self.waits + 1

    def record(self) -> None:
        assert not self.pending, "a buffer was filled before what was in it had left"
        self.pending = True


def test_pieces_that_go_through_two_buffers_are_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is streamed to a device, with a device of ordinary memory in its place."""
    rng = np.random.default_rng(0)
    given = {f"t{n}": tiny.normal(rng, "F32", n) for n in (1, 15, 16, 17, 32, 100)}
    path = tmp_path / "blob"
    path.write_bytes(tiny.container(given.items()))
    stages = tuple(blobs._Stage(torch.empty(64, dtype=torch.uint8), Event()) for _ in range(2))  # type: ignore[arg-type]
    monkeypatch.setattr(blobs, "_STAGE", 64)
    monkeypatch.setattr(blobs.StreamedBlob, "_stages", itertools.cycle(stages))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    reader = blobs.StreamedBlob(path, blobs.Content(), torch.device("cpu"))
    for name, value in given.items():
        assert bytes(to_memory(reader.tensor(name))) == value.data
    assert [stage.copied.waits for stage in stages] == [7, 7]  # type: ignore[attr-defined]
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(BadInput, match="truncated"):
        reader.tensor("t100")
