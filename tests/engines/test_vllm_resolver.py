"""The plugin with vLLM's own classes for resolvers and requests, and no engine."""

from __future__ import annotations

import ast
import asyncio
import importlib.util
import json
import logging
import os
import sqlite3
import threading
import time
import tomllib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib import import_module
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny

pytest.importorskip("vllm.lora.resolver", reason="vLLM is not installed: make test-vllm or make contract-vllm")

from vllm.lora.request import LoRARequest
from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry

import loreg
from loreg.errors import UsageError
from loreg.integrations import vllm as plugin
from loreg.integrations.vllm import Follower, Following, Resolver
from loreg.serving.directories import Directories

ROOT = Path(__file__).resolve().parents[2]
HOSTILE = [
    "../../etc/passwd", "/etc/passwd", "..", "", " ", "sql\x00", "sql\nINFO forged", "x" * 10_000, "SQL",
    "sql:prod:x", "sql@blake3:zz", "sql@" + "0" * 64, "sql + humor", "0.5*sql", "\ud800", "🦙", "a/b/c", "s3://bucket/key",
]  # fmt: skip


@pytest.fixture
def log() -> Iterator[list[str]]:
    """The lines that the plugin logs. vLLM's loggers do not hand on what they get."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("vllm.loreg")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield lines
    logger.removeHandler(handler)


@pytest.fixture
def resolver(pushed: loreg.Registry, monkeypatch: pytest.MonkeyPatch) -> Resolver:
    """One for the registry ``pushed``."""
    monkeypatch.setenv("LOREG_HOME", str(pushed.home))
    for name in ("LOREG_CATALOG", "LOREG_STORE", plugin.BASE, plugin.POLL):
        monkeypatch.delenv(name, raising=False)
    return Resolver()


@pytest.fixture
def model(tiny_base: Path) -> str:
    """What vLLM serves."""
    return str(tiny_base)


def ask(resolver: Resolver, model: str, name: str) -> LoRARequest | None:
    return asyncio.run(resolver.resolve_lora(model, name))


def asked(resolver: Resolver, model: str, name: str) -> LoRARequest:
    found = ask(resolver, model, name)
    assert found is not None
    return found


def push(registry: loreg.Registry, folder: Path, seed: int, **given: Any) -> loreg.Version:
    return registry.push(tiny.write_adapter(folder, tiny.adapter(seed)), base="base", **given)


# Registration


def test_registering_again_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    plugin.register()
    monkeypatch.setattr("vllm.lora.resolver.logger.warning", lambda *said: pytest.fail(str(said)))
    plugin.register()  # vLLM would warn, and put another in the place of the one that it has asked
    assert list(LoRAResolverRegistry.get_supported_resolvers()).count("loreg") == 1
    found = LoRAResolverRegistry.get_resolver("loreg")
    assert found is plugin.RESOLVER
    assert isinstance(found, LoRAResolver)


def test_the_entry_points_are_what_vllm_calls() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = {}
    for group in ("vllm.general_plugins", "vllm.endpoint_plugins"):
        module, _, name = project["entry-points"][group]["loreg"].partition(":")
        found[group] = getattr(import_module(module), name)
    assert found == {"vllm.general_plugins": plugin.register, "vllm.endpoint_plugins": Following}
    assert Following.name == "loreg"  # by which VLLM_PLUGINS allows both


def test_it_is_an_endpoint_plugin() -> None:
    interface = pytest.importorskip("vllm.plugins.endpoint_plugins.interface", reason="make test-vllm")
    assert isinstance(Following(), interface.EndpointPlugin)


def test_what_vllm_keeps_and_the_follower_replaces() -> None:
    """Of ``OpenAIServingModels``, from its source: it takes an engine to make one."""
    tree = ast.parse(_source("entrypoints/openai/models/serving.py"))
    (models,) = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "OpenAIServingModels"]
    methods = {n.name: n for n in models.body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)}
    kept = {
        node.target.attr if isinstance(node, ast.AnnAssign) else node.targets[0].attr
        for node in ast.walk(methods["__init__"])
        if isinstance(node, ast.Assign | ast.AnnAssign)
        and isinstance(node.target if isinstance(node, ast.AnnAssign) else node.targets[0], ast.Attribute)
    }
    assert kept >= {"lora_requests", "lora_resolver_lock", "lora_id_counter", "engine_client", "model_config"}
    text = ast.unparse(methods["resolve_lora"])
    # A name that is loaded is not asked for again; another is loaded under an id of vLLM's, and kept by its name.
    assert "if lora_name in self.lora_requests:\n            return self.lora_requests[lora_name]" in text
    assert "lora_request.lora_int_id = unique_id" in text
    assert "self.lora_requests[lora_name] = lora_request" in text


def test_the_kv_cache_is_keyed_by_the_path() -> None:
    tree = ast.parse(_source("v1/core/kv_cache_utils.py"))
    (keys,) = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "_gen_lora_extra_hash_keys"]
    assert "lora_request.lora_path" in ast.unparse(keys)


def _source(path: str) -> str:
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.submodule_search_locations
    return (Path(spec.submodule_search_locations[0]) / path).read_text()


# Answers


@pytest.mark.parametrize("form", ["sql", "sql:prod", "sql:v1", "sql@{0}", "{0}", "sql@blake3:{0.hex:.8}"])
def test_a_reference_is_a_path_by_its_digest(
    resolver: Resolver, pushed: loreg.Registry, model: str, form: str, tiny_adapter: Path
) -> None:
    pushed.tag("sql", "prod")
    digest = pushed.resolve("sql").digest
    name = form.format(digest)
    found = asked(resolver, model, name)
    assert found.lora_name == name
    assert found.lora_path == str(pushed.home / "serving" / digest.hex)
    assert tiny.files_in(Path(found.lora_path)) == tiny.files_in(tiny_adapter)
    assert 0 < found.lora_int_id < 1 << 31


def test_a_moved_tag_is_another_path_and_id(
    resolver: Resolver, pushed: loreg.Registry, model: str, tmp_path: Path
) -> None:
    before = asked(resolver, model, "sql")
    push(pushed, tmp_path / "more", 5, name="sql")
    after = asked(resolver, model, "sql")
    assert after.lora_path != before.lora_path
    assert after.lora_int_id != before.lora_int_id
    assert Path(before.lora_path).is_dir()


@pytest.mark.parametrize(("digit", "number"), [("f", (1 << 31) - 1), ("0", 1), ("8", 0x44444444)])
def test_an_id_is_a_positive_integer_of_32_bits(digit: str, number: int) -> None:
    assert plugin.request_id(loreg.Digest(digit * 64)) == number


def test_eight_at_once_are_one_directory(resolver: Resolver, pushed: loreg.Registry, model: str) -> None:
    async def all_of_them() -> Sequence[LoRARequest | None]:
        return await asyncio.gather(*(resolver.resolve_lora(model, "sql") for _ in range(8)))

    found = asyncio.run(all_of_them())
    assert len({each and each.lora_path for each in found}) == 1
    made = [path for path in (pushed.home / "serving").iterdir() if path.is_dir()]
    assert made == [Path(asked(resolver, model, "sql").lora_path)]


def test_the_event_loop_goes_on(resolver: Resolver, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, done = threading.Event(), threading.Event()
    own = Resolver._answer

    def slow(self: Resolver, base: str, name: str) -> Any:
        begun.set()
        assert done.wait(60)
        return own(self, base, name)

    async def both() -> LoRARequest | None:
        task = asyncio.create_task(resolver.resolve_lora(model, "sql"))
        while not begun.is_set():
            await asyncio.sleep(0)
        done.set()  # by the loop, which would not come to this if it waited for the answer
        return await task

    monkeypatch.setattr(Resolver, "_answer", slow)
    assert asyncio.run(both()) is not None


def test_a_child_asks_by_connections_of_its_own(resolver: Resolver, model: str) -> None:
    before = asked(resolver, model, "sql")
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        try:
            os.write(
                write, json.dumps([asked(resolver, model, name).lora_path for name in ("sql", "humor")]).encode()
            )
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        paths = json.loads(pipe.read() or b"null")
    os.waitpid(child, 0)
    assert paths == [before.lora_path, asked(resolver, model, "humor").lora_path]


def test_what_is_served_is_not_deleted(
    resolver: Resolver, pushed: loreg.Registry, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loreg.serving.directories._NOTED", 0.0)
    path = Path(asked(resolver, model, "sql").lora_path)
    root, record = pushed.home / "serving", path.with_name(f"{path.name}.record")
    os.utime(record, (0, 0))  # as if it had been handed out long ago
    Directories(root, limit=0, spared=0.0).sweep()
    assert path.is_dir()
    push(pushed, tmp_path / "more", 5, name="sql")
    asked(resolver, model, "sql")
    Directories(root, limit=0).sweep()  # requests may still run
    assert path.is_dir()
    Directories(root, limit=0, spared=0.0).sweep()
    assert not path.exists()


# What is not served


@pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
def test_a_hostile_name_is_none_and_one_line(
    resolver: Resolver, pushed: loreg.Registry, model: str, log: list[str], name: str
) -> None:
    before = tiny.files_in(pushed.home)
    assert ask(resolver, model, name) is None
    assert len(log) == 1
    assert log[0].isprintable()
    assert len(log[0]) < 1000
    assert tiny.files_in(pushed.home) == before


def test_no_registry_is_none_and_none_is_made(
    resolver: Resolver, model: str, log: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOREG_HOME", str(tmp_path / "nowhere"))
    assert ask(resolver, model, "sql") is None
    assert not (tmp_path / "nowhere").exists()
    assert len(log) == 1
    assert "LOREG_HOME" in log[0]


@pytest.mark.parametrize("damage", ["catalog", "manifest", "factors"])
def test_a_damaged_registry_is_none(
    resolver: Resolver, pushed: loreg.Registry, model: str, log: list[str], damage: str
) -> None:
    version = pushed.resolve("sql")
    if damage == "catalog":
        pushed.close()
        (pushed.home / "catalog.db").write_bytes(b"no database at all" * 1000)
    else:
        blob = version.digest if damage == "manifest" else version.manifest.blob("factors").digest  # type: ignore[union-attr]
        (path,) = (pushed.home / "blobs").rglob(f"{blob.hex}.*")
        path.chmod(0o644)
        path.write_bytes(bytes(len(path.read_bytes())))
    assert ask(resolver, model, "sql") is None
    assert len(log) == 1
    assert ask(resolver, model, "humor") is None or damage != "catalog"


def test_a_locked_catalog_is_waited_for_and_then_none(
    resolver: Resolver, pushed: loreg.Registry, model: str, log: list[str]
) -> None:
    pushed.close()
    resolver.patience = 0.5
    other = sqlite3.connect(pushed.home / "catalog.db", isolation_level=None)
    other.execute("PRAGMA locking_mode=EXCLUSIVE")
    other.execute("BEGIN EXCLUSIVE")
    task = threading.Timer(2.0, other.interrupt)
    began = time.monotonic()

    async def impatient() -> LoRARequest | None:
        try:
            return await resolver.resolve_lora(model, "sql")
        finally:
            other.close()  # or the thread would keep the loop from its end for as long as SQLite waits

    assert asyncio.run(impatient()) is None
    task.cancel()
    assert time.monotonic() - began < 20
    assert len(log) == 1
    assert "ask again" in log[0]


def test_a_defect_is_none(resolver: Resolver, model: str, log: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("a\nb")

    monkeypatch.setattr(plugin, "_registry", broken)
    assert ask(resolver, model, "sql") is None
    assert log == ["'sql' is not served: RuntimeError: a b"]


def test_what_preflight_refuses_is_none_with_the_reason(
    resolver: Resolver, pushed: loreg.Registry, model: str, log: list[str], tmp_path: Path
) -> None:
    push(pushed, tmp_path / "wide", 3, name="wide")
    resolver.limits["max_lora_rank"] = 1
    assert ask(resolver, model, "wide") is None
    (line,) = log
    assert "rank" in line
    assert "--max-lora-rank" in line
    assert "Unsupported" not in line


@pytest.mark.parametrize("stacked", [True, False])
def test_vllm_is_told_of_experts_in_one_stack(
    resolver: Resolver, model: str, monkeypatch: pytest.MonkeyPatch, stacked: bool
) -> None:
    """Which one that was started with --enable-mixed-moe-lora-format refuses if it is not (model_manager.py)."""
    module = import_module("loreg.serving.preflight")
    preflight = module.preflight
    monkeypatch.setattr(module, "preflight", lambda *a, **k: replace(preflight(*a, **k), stacked=stacked))
    assert getattr(asked(resolver, model, "sql"), "is_3d_lora_weight", False) is stacked


def test_an_unknown_limit_is_left_to_vllm(
    resolver: Resolver, pushed: loreg.Registry, model: str, tmp_path: Path
) -> None:
    large = tiny.write_adapter(tmp_path / "large", tiny.adapter(4, rank=40))
    pushed.push(large, base="base", name="large")
    assert ask(resolver, model, "large") is not None


@pytest.mark.parametrize(("version", "folded"), [((0, 30, 2), True), ((0, 31, 0), True), ((0, 32, 0), False)])
def test_a_vllm_that_reads_no_patterns_gets_none(
    resolver: Resolver, model: str, monkeypatch: pytest.MonkeyPatch, version: tuple[int, ...], folded: bool
) -> None:
    monkeypatch.setattr("vllm.__version_tuple__", version)
    found = asked(resolver, model, "humor")
    config = json.loads((Path(found.lora_path) / "adapter_config.json").read_text())
    assert found.lora_path.endswith("-folded") is folded
    assert bool(config.get("use_rslora")) is not folded


# The base


def test_another_base_is_none_and_names_the_tensors(resolver: Resolver, log: list[str], tmp_path: Path) -> None:
    other = tiny.write_model(tmp_path / "other", tiny.model(seed=9))
    assert ask(resolver, str(other), "sql") is None
    (line,) = log
    assert tiny.Q in line


def test_a_base_that_differs_elsewhere_is_the_same_to_an_adapter(resolver: Resolver, tmp_path: Path) -> None:
    tensors = tiny.model()
    tensors[tiny.NORM] = tensors[tiny.NORM].flipped(0)
    assert ask(resolver, str(tiny.write_model(tmp_path / "other", tensors)), "sql") is not None


@pytest.mark.parametrize("served", ["base", "owner/model"])
def test_a_base_that_is_known_by_its_name_alone(resolver: Resolver, log: list[str], served: str) -> None:
    found = ask(resolver, served, "sql")
    assert (found is not None) is (served == "base")
    (line,) = log
    assert plugin.BASE in line


@pytest.mark.parametrize("told", ["base", "path", "root", "other"])
def test_the_base_can_be_told(
    resolver: Resolver, pushed: loreg.Registry, model: str, log: list[str], tmp_path: Path, told: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    pushed.add_base(tiny.write_model(tmp_path / "other", tiny.model(seed=9)), "other")
    root = str(pushed.show_base("base").manifest.identity.weights_root)
    monkeypatch.setenv(plugin.BASE, {"path": model, "root": root}.get(told, told))
    found = ask(resolver, "owner/quantised", "sql")
    assert (found is not None) is (told != "other")
    assert len(log) == (told == "other")


# Following


class Engine:
    """Of vLLM's engine, what the follower calls."""

    def __init__(self, *refused: str) -> None:
        self.loaded: list[tuple[int, str]] = []
        self.refused = refused

    async def add_lora(self, request: LoRARequest) -> bool:
        if any(name in request.lora_path for name in self.refused):
            raise ValueError("no")
        self.loaded.append((request.lora_int_id, request.lora_path))
        return True


@pytest.fixture
def models(model: str) -> Any:
    """An ``OpenAIServingModels`` without its engine."""
    numbers = count(100)
    return SimpleNamespace(
        lora_requests={}, lora_resolver_lock=defaultdict(asyncio.Lock), engine_client=Engine(),
        lora_id_counter=SimpleNamespace(inc=lambda by: next(numbers)), model_config=SimpleNamespace(model=model),
    )  # fmt: skip


async def load(models: Any, resolver: Resolver, name: str) -> LoRARequest:
    """As ``OpenAIServingModels.resolve_lora`` does."""
    request = await resolver.resolve_lora(models.model_config.model, name)
    assert request is not None
    request.lora_int_id = models.lora_id_counter.inc(1)
    models.lora_requests[name] = request
    return request


def test_a_moved_tag_takes_over_its_name(
    resolver: Resolver, pushed: loreg.Registry, models: Any, tmp_path: Path, log: list[str]
) -> None:
    async def run() -> None:
        follower = Follower(models, resolver)
        old, fixed = await load(models, resolver, "sql"), await load(models, resolver, "sql:v1")
        path, number = old.lora_path, old.lora_int_id
        await follower.look()
        assert models.lora_requests == {"sql": old, "sql:v1": fixed}
        assert models.engine_client.loaded == []
        for seed in (5, 6):
            version = await asyncio.to_thread(push, pushed, tmp_path / f"{seed}", seed, name="sql")
            await follower.look()
            new = models.lora_requests["sql"]
            assert Path(new.lora_path).name == version.digest.hex
            assert models.engine_client.loaded[-1] == (new.lora_int_id, new.lora_path)
        assert models.lora_requests["sql:v1"] is fixed
        numbers = [number, fixed.lora_int_id, *(each for each, _ in models.engine_client.loaded)]
        assert sorted(numbers) == [100, 101, 102, 103]  # of vLLM's counter: no two adapters have one
        assert (old.lora_path, old.lora_int_id) == (path, number)  # which requests that are running hold

    asyncio.run(run())
    assert len(log) == 2


def test_what_others_loaded_or_unloaded_is_left_alone(
    resolver: Resolver, pushed: loreg.Registry, models: Any, tmp_path: Path
) -> None:
    async def run() -> None:
        follower = Follower(models, resolver)
        await load(models, resolver, "sql")
        other = LoRARequest("sql", 7, "/elsewhere")
        for now in ({}, {"sql": other}, {"sql": other, "humor": other}):
            models.lora_requests = dict(now)
            await asyncio.to_thread(push, pushed, tmp_path / f"{len(now)}", 10 + len(now), name="sql")
            await follower.look()
            assert models.lora_requests == now
        assert models.engine_client.loaded == []
        assert len([path for path in (pushed.home / "serving").iterdir() if path.is_dir()]) == 1

    asyncio.run(run())


def test_a_look_at_an_unchanged_catalog_asks_nothing(
    resolver: Resolver, pushed: loreg.Registry, models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[str] = []
    own = loreg.Registry.find

    def counted(self: loreg.Registry, reference: str) -> Any:
        found.append(reference)
        return own(self, reference)

    async def run() -> None:
        follower = Follower(models, resolver)
        await load(models, resolver, "sql")
        monkeypatch.setattr(loreg.Registry, "find", counted)
        for _ in range(3):
            await follower.look()
        assert found == ["sql"]
        await load(models, resolver, "humor")
        found.clear()
        await follower.look()  # "humor" may have moved before the last look, and after it was answered
        assert "humor" in found
        version = await asyncio.to_thread(push, pushed, tmp_path / "new", 5, name="humor")
        await follower.look()
        assert Path(models.lora_requests["humor"].lora_path).name == version.digest.hex

    asyncio.run(run())


def test_a_later_vllm_that_keeps_its_adapters_elsewhere_is_said_once(
    resolver: Resolver, pushed: loreg.Registry, models: Any, tmp_path: Path, log: list[str]
) -> None:
    async def run() -> None:
        follower = Follower(models, resolver)
        old = await load(models, resolver, "sql")
        await asyncio.to_thread(push, pushed, tmp_path / "new", 5, name="sql")
        counter = models.__dict__.pop("lora_id_counter")
        for _ in range(2):
            await follower.look()
        assert models.lora_requests["sql"] is old
        models.lora_id_counter = counter
        del models.lora_requests
        for _ in range(2):
            await follower.look()
        assert len(log) == 2
        assert "lora_id_counter" in log[0]
        assert "lora_requests" in log[1]

    asyncio.run(run())


def test_one_that_is_unloaded_meanwhile_stays_unloaded(
    resolver: Resolver, pushed: loreg.Registry, models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        follower = Follower(models, resolver)
        await load(models, resolver, "sql")
        await asyncio.to_thread(push, pushed, tmp_path / "new", 5, name="sql")
        own = Resolver.answer

        async def unloading(self: Resolver, base: str, name: str) -> Any:
            found = await own(self, base, name)
            models.lora_requests.clear()
            return found

        monkeypatch.setattr(Resolver, "answer", unloading)
        await follower.look()
        assert models.lora_requests == {}
        assert models.engine_client.loaded == []

    asyncio.run(run())


@pytest.mark.parametrize("who", ["engine", "preflight"])
def test_what_cannot_be_served_leaves_the_old_and_is_tried_later(
    resolver: Resolver, pushed: loreg.Registry, models: Any, tmp_path: Path, log: list[str], who: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    async def run() -> None:
        follower = Follower(models, resolver)
        old = await load(models, resolver, "sql")
        version = await asyncio.to_thread(push, pushed, tmp_path / "new", 5, name="sql")
        if who == "engine":
            models.engine_client.refused = (version.digest.hex,)
        else:
            resolver.limits["max_lora_rank"] = 1
        for _ in range(3):
            await follower.look()
        assert models.lora_requests["sql"] is old
        said = [line for line in log if "is still served from" in line]
        assert len(said) == 1
        assert old.lora_path in said[0]
        models.engine_client.refused = ()
        resolver.limits["max_lora_rank"] = 8
        await follower.look()
        assert models.lora_requests["sql"] is old
        monkeypatch.setattr(plugin, "_AGAIN_S", 0.0)
        await follower.look()
        assert Path(models.lora_requests["sql"].lora_path).name == version.digest.hex

    asyncio.run(run())


def test_a_version_that_is_removed_is_served_on_and_said(
    resolver: Resolver, pushed: loreg.Registry, models: Any, log: list[str]
) -> None:
    async def run() -> None:
        follower = Follower(models, resolver)
        old = await load(models, resolver, "sql:v1")
        await asyncio.to_thread(pushed.remove, "sql:v1")
        for _ in range(2):
            await follower.look()
        assert models.lora_requests["sql:v1"] is old

    asyncio.run(run())
    (line,) = log
    assert "refers to no version any more" in line


def test_a_registry_that_is_away_is_said_once_and_followed_when_it_is_back(
    resolver: Resolver, pushed: loreg.Registry, models: Any, tmp_path: Path, log: list[str]
) -> None:
    async def run() -> None:
        follower = Follower(models, resolver)
        old = await load(models, resolver, "sql")
        await asyncio.to_thread(push, pushed, tmp_path / "new", 5, name="sql")
        pushed.home.rename(tmp_path / "away")
        for _ in range(3):
            await follower.look()
        assert models.lora_requests["sql"] is old
        assert len(log) == 1
        (tmp_path / "away").rename(pushed.home)
        await follower.look()
        assert models.lora_requests["sql"] is not old

    asyncio.run(run())


@pytest.mark.parametrize("text", ["0", "-1", "soon", "nan", "inf"])
def test_an_interval_that_is_none_ends_the_start(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(plugin.POLL, text)
    with pytest.raises(UsageError, match=f"{plugin.POLL}.*seconds"):
        asyncio.run(Following().init_state(None, SimpleNamespace(), None))


@pytest.mark.parametrize(
    ("version", "lora", "follows"), [((0, 32, 0), True, True), ((0, 30, 0), True, False), ((0, 32, 0), False, False)]
)
def test_it_follows_where_that_is_right(
    models: Any, log: list[str], monkeypatch: pytest.MonkeyPatch, version: tuple[int, ...], lora: bool, follows: bool
) -> None:
    monkeypatch.setattr("vllm.__version_tuple__", version)
    monkeypatch.setattr(plugin, "RESOLVER", Resolver())
    config = SimpleNamespace(
        max_lora_rank=64, target_modules=None, max_lora_cls_labels=None, enable_mixed_moe_lora_format=False
    )
    engine = SimpleNamespace(vllm_config=SimpleNamespace(lora_config=config if lora else None))
    state = SimpleNamespace(openai_serving_models=models)

    async def run() -> None:
        await Following().init_state(engine, state, None)
        if hasattr(state, "loreg"):
            state.loreg.cancel()

    asyncio.run(run())
    assert hasattr(state, "loreg") is follows
    assert plugin.RESOLVER.limits["max_lora_rank"] == (64 if lora else 512)
    assert len(log) == (not follows)
