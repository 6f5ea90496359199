"""``loreg.integrations.dynamo``: what Dynamo checks of a source of adapters, and of what it answers."""

from __future__ import annotations

import asyncio
import dataclasses
import importlib
import inspect
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import tiny

import loreg
from loreg import serving
from loreg.errors import CheckFailed, RemoteError, Unsupported, UsageError
from loreg.integrations.dynamo import Source


@dataclasses.dataclass(frozen=True)
class ResolvedLoRA:
    """The fields of Dynamo's, of its main branch in November 2026."""

    local_path: Path
    source_revision: str
    size_bytes: int | None = None
    metadata: Any = None


@dataclasses.dataclass(frozen=True)
class Context:
    """What Dynamo gives of a request."""

    cache_root: Path
    deadline_monotonic: float
    max_download_bytes: int = 1 << 30
    adapter_key: str = "dyn-lora-00"
    base_model_name: str = "tiny"
    request_id: str = "r"


@pytest.fixture(autouse=True)
def _dynamo(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("dynamo", "dynamo.common", "dynamo.common.lora", "dynamo.common.lora.runtime"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["dynamo.common.lora.runtime"].ResolvedLoRA = ResolvedLoRA


def asked(source: Source, uri: str, root: Path, seconds: float = 60, **given: int) -> ResolvedLoRA | None:
    async def ask() -> Any:
        context = Context(root, asyncio.get_running_loop().time() + seconds, **given)
        return await source.resolve(source_uri=uri, context=context)

    return asyncio.run(ask())


def test_the_class_is_what_dynamo_takes() -> None:
    module, _, name = "loreg.integrations.dynamo:Source".partition(":")
    source = getattr(importlib.import_module(module), name)()  # by a variable, without arguments
    assert source.protocol_version == 2
    assert isinstance(source.schemes, frozenset)
    assert source.schemes
    assert all(re.fullmatch(r"[a-z][a-z0-9+.-]*", scheme) for scheme in source.schemes)
    assert inspect.iscoroutinefunction(source.resolve)
    assert list(inspect.signature(source.resolve).parameters) == ["source_uri", "context"]
    assert all(map(inspect.iscoroutinefunction, (source.exists, source.download)))


def test_a_uri_is_the_version_that_it_means_now(pushed: loreg.Registry, tmp_path: Path) -> None:
    pushed.tag("sql:v1", "prod")
    source, root = Source(pushed), tmp_path / "cache"
    for uri in ("loreg://sql:prod", "loreg:sql:prod", "LOREG://sql:prod"):
        found = asked(source, uri, root)
        version = pushed.resolve("sql:v1")
        assert found.local_path.is_relative_to(root)
        assert found.local_path.name == version.digest.hex
        assert tiny.files_in(found.local_path) == tiny.files_in(serving.resolve("sql:v1", pushed).path)
        assert found.source_revision == str(version.digest)
        assert found.source_revision.isprintable() and len(found.source_revision) <= 512
        assert found.size_bytes == sum(map(len, tiny.files_in(found.local_path).values()))
    pushed.push(tiny.write_adapter(tmp_path / "o", tiny.adapter(seed=9)), base="base", name="sql", tags=["prod"])
    moved = asked(source, "loreg://sql:prod", root)
    assert (moved.local_path, moved.source_revision) != (found.local_path, found.source_revision)
    assert found.local_path.is_dir()


def test_what_is_not_there_is_none(pushed: loreg.Registry, tmp_path: Path) -> None:
    assert asked(Source(pushed), "loreg://sq", tmp_path) is None
    assert asked(Source(pushed), "loreg://sql:beta", tmp_path) is None
    for uri in ("loreg://", "hf://sql", "loreg", "loreg://SQL!"):
        with pytest.raises(UsageError):
            asked(Source(pushed), uri, tmp_path)


def test_the_limits_of_the_request_are_kept(pushed: loreg.Registry, tmp_path: Path) -> None:
    with pytest.raises(CheckFailed):
        asked(Source(pushed), "loreg://sql", tmp_path, max_download_bytes=10)
    with pytest.raises(RemoteError, match="after its deadline"):
        asked(Source(pushed), "loreg://humor", tmp_path, seconds=-1)
    kept = {}
    source = Source(pushed)
    source._resolved = lambda *_, **limits: kept.update(limits) or serving.resolve("sql", pushed)
    asked(source, "loreg://sql", tmp_path, seconds=7, max_download_bytes=1 << 20)
    assert 6 < kept["timeout"] <= 7
    assert kept["max_bytes"] == 1 << 20


def test_the_form_is_what_the_worker_reads_right(
    pushed: loreg.Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not asked(Source(pushed), "loreg://humor", tmp_path).local_path.name.endswith("-folded")
    assert asked(Source(pushed, "sglang"), "loreg://humor", tmp_path).local_path.name.endswith("-folded")  # rslora
    monkeypatch.setenv("LOREG_DYNAMO_ENGINE", "sglang")
    assert asked(Source(pushed), "loreg://humor", tmp_path).local_path.name.endswith("-folded")
    wide = tiny.write_adapter(tmp_path / "wide", tiny.adapter(seed=3, rank=24))
    pushed.push(wide, base="base", name="wide")
    assert serving.preflight("wide", "vllm", pushed, max_lora_rank=16).form is None
    assert asked(Source(pushed, "vllm"), "loreg://wide", tmp_path) is not None  # the worker knows its own limit
    # Of the module, not of the function that the package has under its name.
    monkeypatch.setattr(sys.modules["loreg.serving.preflight"], "preflight", _refusing)
    with pytest.raises(Unsupported, match="vllm would not serve loreg://sql"):
        asked(Source(pushed, "vllm"), "loreg://sql", tmp_path)


def _refusing(reference: str, engine: str, registry: loreg.Registry) -> serving.Preflight:
    from loreg.serving.preflight import Finding

    found = Finding("refuses", "use_dora", "It has no DoRA.", "Merge it.", False)
    return serving.Preflight(registry.find(reference).digest, engine, (found,))


def test_the_older_interface_is_the_same_core(pushed: loreg.Registry, tmp_path: Path) -> None:
    """As ``LoRAManager.download_lora`` of Dynamo 1.6.1 calls it."""
    source = Source(pushed)
    assert asyncio.run(source.exists("loreg://sql"))
    assert not asyncio.run(source.exists("loreg://sq"))
    path = asyncio.run(source.download("loreg://sql", tmp_path / "cache" / "loreg___sql"))
    assert path.is_relative_to(tmp_path / "cache")
    assert path.name == pushed.find("sql").digest.hex
    assert (path / "adapter_config.json").is_file()
