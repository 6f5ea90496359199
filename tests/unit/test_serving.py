"""What serving layers call: a verified directory named by digest, and tensors on a device."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

import loreg
from loreg import serving
from loreg.errors import BadInput, NotFound, UsageError


def test_resolve_gives_the_pushed_files_under_the_digest(pushed: loreg.Registry, tiny_adapter: Path) -> None:
    resolved = serving.resolve("sql", pushed)
    version = pushed.resolve("sql")
    assert resolved.digest == version.digest
    assert resolved.path.name == version.digest.hex
    assert resolved.base == version.manifest.base.identity.weights_root
    assert resolved.max_rank == version.manifest.rank
    assert tiny.files_in(resolved.path) == tiny.files_in(tiny_adapter)
    assert resolved.nbytes == sum(map(len, tiny.files_in(resolved.path).values()))


def test_a_moved_tag_is_a_new_path_and_the_old_one_stays(pushed: loreg.Registry) -> None:
    pushed.tag("sql:v1", "prod")
    before = serving.resolve("sql:prod", pushed)
    other = tiny.write_adapter(before.path.parent.parent / "other", tiny.adapter(seed=9))
    pushed.push(other, base="base", name="sql", tags=["prod"])
    after = serving.resolve("sql:prod", pushed)
    assert after.path != before.path
    assert before.path.is_dir()
    assert serving.resolve(f"sql@{before.digest}", pushed) == before


def test_a_second_call_writes_nothing(pushed: loreg.Registry) -> None:
    first = serving.resolve("sql", pushed)
    times = {path: path.stat().st_mtime_ns for path in first.path.iterdir()}
    assert serving.resolve("sql", pushed) == first
    assert {path: path.stat().st_mtime_ns for path in first.path.iterdir()} == times


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_damaged_file_in_the_cache_is_found(pushed: loreg.Registry, name: str) -> None:
    file = serving.resolve("sql", pushed).path / name
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(BadInput, match=f"{name}.*damaged"):
        serving.resolve("sql", pushed)


def test_many_callers_get_one_whole_directory(pushed: loreg.Registry) -> None:
    results: list[object] = []

    def call() -> None:
        with loreg.open(pushed.home) as own:
            try:
                results.append(serving.resolve("sql", own))
            except loreg.LoregError as error:
                results.append(error)

    threads = [threading.Thread(target=call) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [serving.resolve("sql", pushed)] * 8


def test_resolve_of_a_composed_version_is_a_peft_directory(pushed: loreg.Registry) -> None:
    pushed.compose("0.7*sql + humor", "both")
    resolved = serving.resolve("both", pushed)
    assert set(tiny.files_in(resolved.path)) == {"adapter_config.json", "adapter_model.safetensors"}
    assert serving.resolve("both", pushed) == resolved


def test_load_gives_the_stored_factors(pushed: loreg.Registry) -> None:
    expected = tiny.adapter()
    loaded = serving.load("sql", pushed)
    assert loaded.keys() == expected.keys()
    for path, (A, B, scale) in loaded.items():
        assert np.array_equal(A.numpy(), expected[path].A.values)
        assert np.array_equal(B.numpy(), expected[path].B.values)
        assert scale == tiny.scale(expected[path])
        assert A.is_contiguous() and B.is_contiguous()


def test_load_of_a_composed_version_is_the_sum(pushed: loreg.Registry) -> None:
    pushed.compose("0.7*sql - 2*humor", "both")
    parts = {name: serving.load(name, pushed) for name in ("sql", "humor", "both")}
    for path, (A, B, scale) in parts["both"].items():
        total = torch.zeros(B.shape[0], A.shape[1], dtype=torch.float64)
        for name, weight in (("sql", 0.7), ("humor", -2.0)):
            if path in parts[name]:
                a, b, s = parts[name][path]
                total += weight * s * (b.double() @ a.double())
        assert torch.allclose(scale * (B.double() @ A.double()), total, rtol=1e-6, atol=1e-7)


def test_load_converts_on_request(pushed: loreg.Registry) -> None:
    loaded = serving.load("sql", pushed, dtype=torch.bfloat16)
    assert {tensor.dtype for A, B, _ in loaded.values() for tensor in (A, B)} == {torch.bfloat16}


def test_errors(pushed: loreg.Registry) -> None:
    with pytest.raises(NotFound, match="sq"):
        serving.resolve("sq", pushed)
    with pytest.raises(NotFound, match="sq"):
        serving.load("sq", pushed)
    with pytest.raises(UsageError, match="gpu"):
        serving.load("sql", pushed, device="gpu")
    if not torch.cuda.is_available():
        with pytest.raises(NotFound, match="CUDA"):
            serving.load("sql", pushed, device="cuda")


def test_the_default_registry_is_the_users(pushed: loreg.Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOREG_HOME", str(pushed.home))
    assert serving.resolve("sql") == serving.resolve("sql", pushed)
    assert serving.load("sql").keys() == serving.load("sql", pushed).keys()
