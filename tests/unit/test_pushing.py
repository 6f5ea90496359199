"""``push``: engines get the right directory under the right name, once, whatever happens on the way."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import engine_servers
import pytest
import tiny
from click.testing import CliRunner
from engine_servers import BASE, VLLM, Engine, LlamaCpp, LoRAX, SGLang, TensorRTLLM

import loreg
from loreg import serving
from loreg.cli import main
from loreg.errors import BaseMismatch, Conflict, NotFound, RemoteError, Unsupported, UsageError
from loreg.serving import pushing
from loreg.serving.pushing import push
from loreg.serving.speaking import SPEAKERS

NAMED = {"vllm": VLLM, "sglang": SGLang}
BY_REQUEST = {"lorax": LoRAX, "tensorrt-llm": TensorRTLLM}
LOADS = {"/v1/load_lora_adapter", "/load_lora_adapter", "/v1/unload_lora_adapter", "/unload_lora_adapter"}

IN, OUT = "/load_lora_adapter", "/unload_lora_adapter"


@pytest.fixture
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    kinds = NAMED | BY_REQUEST
    with engine_servers.serving(kinds[request.param]()) as running:
        running.kind = request.param
        yield running


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pushing, "_PAUSE", 0.01)


@pytest.fixture
def two(pushed: loreg.Registry, tmp_path: Path) -> tuple[serving.Resolved, serving.Resolved]:
    """``sql:v1``, which is ``prod``, and ``sql:v2``."""
    pushed.tag("sql:v1", "prod")
    pushed.push(tiny.write_adapter(tmp_path / "other", tiny.adapter(seed=9)), base="base", name="sql")
    return serving.resolve("sql:v1", pushed), serving.resolve("sql:v2", pushed)


@pytest.fixture
def wide(pushed: loreg.Registry, tmp_path: Path) -> tuple[serving.Resolved, serving.Resolved]:
    """``wide:v1`` and ``wide:v2``, of a rank for which LoRAX does not pad."""
    for seed in (3, 4):
        adapter = tiny.write_adapter(tmp_path / f"wide{seed}", tiny.adapter(seed=seed, rank=8))
        pushed.push(adapter, base="base", name="wide")
    return serving.resolve("wide:v1", pushed), serving.resolve("wide:v2", pushed)


def told(engine: Engine) -> list[str]:
    return [path for path, _ in engine.asked if path in LOADS]


def wait_until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("engine", NAMED, indirect=True)
def test_a_version_is_loaded_once_swapped_and_unloaded(engine: Engine, two, pushed: loreg.Registry) -> None:
    one, other = two
    done = push("sql:prod", engine.kind, engine.url + "/", pushed)
    assert (done.action, done.name, done.digest, done.path) == ("loaded", "sql", one.digest, str(one.path))
    assert done.request == {"vllm": {"model": "sql"}, "sglang": {"lora_path": "sql"}}[engine.kind]
    assert done.url == engine.url
    assert engine.held == {"sql": str(one.path)}
    before = len(told(engine))
    assert push("sql:prod", engine.kind, engine.url, pushed).action == "present"
    assert len(told(engine)) == before
    assert push("sql:v2", engine.kind, engine.url, pushed).action == "replaced"
    assert engine.held == {"sql": str(other.path)}
    assert push("sql:v1", engine.kind, engine.url, pushed, name="team/sql-one").action == "loaded"
    assert engine.held == {"sql": str(other.path), "team/sql-one": str(one.path)}
    gone = push("sql", engine.kind, engine.url, pushed, unload=True)
    assert (gone.action, gone.digest, gone.path, gone.request) == ("unloaded", None, None, {})
    assert engine.held == {"team/sql-one": str(one.path)}
    assert push("sql", engine.kind, engine.url, pushed, unload=True).action == "absent"


@pytest.mark.parametrize("engine", NAMED, indirect=True)
@pytest.mark.parametrize("place", range(4))  # of the requests that a swap is
@pytest.mark.parametrize("fault", ["drop", "lost", 503, 429])
def test_what_passes_is_tried_again_from_what_is_there(
    engine: Engine, place: int, fault: int | str, two, pushed: loreg.Registry
) -> None:
    _, other = two
    push("sql:v1", engine.kind, engine.url, pushed)
    engine.faults = [None] * place + [fault]
    assert push("sql:v2", engine.kind, engine.url, pushed).action == "replaced"
    assert engine.held == {"sql": str(other.path)}


@pytest.mark.parametrize("engine", NAMED, indirect=True)
def test_a_refusal_leaves_what_was_there(engine: Engine, two, pushed: loreg.Registry) -> None:
    one, _ = two
    push("sql:v1", engine.kind, engine.url, pushed)
    engine.most = 1
    # As it was started otherwise than preflight is told, the engine is the first to say no.
    engine.problem = lambda path: None if path == str(one.path) else "LoRA rank 4 is greater than max_lora_rank 1."
    before = len(told(engine))
    with pytest.raises(RemoteError, match="rank 4 is greater than max_lora_rank 1"):
        push("sql:v2", engine.kind, engine.url, pushed)
    assert engine.held == {"sql": str(one.path)}
    assert len(told(engine)) - before == {"vllm": 1, "sglang": 3}[engine.kind]  # and nothing was tried again


@pytest.mark.parametrize("engine", ["sglang"], indirect=True)
def test_what_cannot_be_taken_back_is_said(engine: Engine, two, pushed: loreg.Registry) -> None:
    push("sql:v1", "sglang", engine.url, pushed)
    engine.problem = lambda path: f"no memory for {path}"
    with pytest.raises(RemoteError, match=r"no memory.*Nor is what it had there again"):
        push("sql:v2", "sglang", engine.url, pushed)


@pytest.mark.parametrize("engine", ["sglang"], indirect=True)
def test_requests_that_come_during_a_swap_get_the_new_one(engine: Engine, two, pushed: loreg.Registry) -> None:
    """They stand behind the load, which is sent while the unload waits for those that run."""
    _, other = two
    push("sql:v1", "sglang", engine.url, pushed)
    engine.drain = 1.0
    with ThreadPoolExecutor(2) as beside:
        swap = beside.submit(push, "sql:v2", "sglang", engine.url, pushed)
        wait_until(lambda: engine.line == 3)  # of the first load, the unload and the load
        assert beside.submit(engine.use, "sql").result() == str(other.path)
        assert swap.result().action == "replaced"
    assert told(engine) == [IN, OUT, IN]


@pytest.mark.parametrize("engine", ["sglang"], indirect=True)
def test_a_request_that_has_the_old_one_loaded_again_is_outdone(
    engine: Engine, two, pushed: loreg.Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, other = two
    monkeypatch.setattr(SPEAKERS["sglang"], "_AHEAD", 30)  # so that the load comes after it
    push("sql:v1", "sglang", engine.url, pushed)
    does, again = engine.post, [True, True]

    def post(path: str, body: dict[str, Any], headers: Any) -> engine_servers.Reply:
        answer = does(path, body, headers)
        if path == OUT and again and again.pop():
            engine.use("sql")
        return answer

    engine.post = post
    assert push("sql:v2", "sglang", engine.url, pushed).action == "replaced"
    assert engine.held == {"sql": str(other.path)}
    assert told(engine) == [IN, OUT, IN, OUT, IN, OUT, IN]
    again.append(True)
    with pytest.raises(RemoteError, match="still lists it; a request that names it loads it again"):
        push("sql", "sglang", engine.url, pushed, unload=True)


@pytest.mark.parametrize("engine", ["sglang"], indirect=True)
def test_what_a_request_has_brought_back_is_there(engine: Engine, two, pushed: loreg.Registry) -> None:
    """After a refusal, of the new one alone."""
    one, _ = two
    push("sql:v1", "sglang", engine.url, pushed)
    post = engine.post

    def refuses(path: str, body: dict[str, Any], headers: Any) -> engine_servers.Reply:
        if path == IN and body["lora_path"] != str(one.path):
            engine.use("sql")
            engine.refuse("no memory")
        return post(path, body, headers)

    engine.post = refuses
    with pytest.raises(RemoteError, match=r"no memory\.$"):
        push("sql:v2", "sglang", engine.url, pushed)
    assert engine.held == {"sql": str(one.path)}


@pytest.mark.parametrize("engine", ["sglang"], indirect=True)
@pytest.mark.parametrize("ahead", [30, 0])
def test_an_unload_that_is_refused_is_what_is_said(
    engine: Engine, ahead: float, two, pushed: loreg.Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the load was sent beside it."""
    one, _ = two
    monkeypatch.setattr(SPEAKERS["sglang"], "_AHEAD", ahead)
    push("sql:v1", "sglang", engine.url, pushed)
    engine.enabled = False
    with pytest.raises(RemoteError, match=r"unload_lora_adapter answered 400: LoRA is not enabled[^;]*--enable-lora"):
        push("sql:v2", "sglang", engine.url, pushed)
    assert engine.held == {"sql": str(one.path)}
    assert sorted(told(engine)) == sorted([IN, OUT] if ahead else [IN, OUT, IN])


@pytest.mark.parametrize("engine", ["sglang"], indirect=True)
def test_a_version_of_another_base_is_not_loaded(engine: Engine, pushed: loreg.Registry, tmp_path: Path) -> None:
    other = tiny.write_model(tmp_path / "another", tiny.model(seed=9))
    pushed.add_base(other, "another")
    for base in ("another", other):
        with pytest.raises(BaseMismatch, match=r"was trained on 'base', and .*another differs"):
            push("sql", "sglang", engine.url, pushed, base=base)
    assert engine.asked == []
    assert push("sql", "sglang", engine.url, pushed, base="base").action == "loaded"


@pytest.mark.parametrize("engine", BY_REQUEST, indirect=True)
def test_engines_without_names_load_with_a_request(engine: Engine, wide, pushed: loreg.Registry) -> None:
    one, other = wide
    first, second = (push(f"wide:v{n}", engine.kind, engine.url, pushed) for n in (1, 2))
    assert (first.path, second.path) == (str(one.path), str(other.path))
    if engine.kind == "lorax":
        assert first.request == {"parameters": {"adapter_id": str(one.path), "adapter_source": "local"}}
        assert set(engine.held) == {str(one.path), str(other.path)}
    else:
        number = first.request["lora_request"]["lora_int_id"]
        assert number == int(one.digest.hex[:13], 16) < 2**53
        assert engine.cached == {
            number: str(one.path),
            second.request["lora_request"]["lora_int_id"]: str(other.path),
        }
        assert engine.asked[1] == (
            "/v1/completions",
            {"model": BASE, "prompt": "a", "max_tokens": 1, **first.request},
        )
    with pytest.raises(Unsupported, match="cannot be told to unload"):
        push("sql", engine.kind, engine.url, pushed, unload=True)
    engine.problem = lambda path: "the adapter does not fit"
    with pytest.raises(RemoteError, match="the adapter does not fit"):
        push("wide", engine.kind, engine.url, pushed)


@pytest.mark.parametrize("engine", ["lorax"], indirect=True)
def test_lorax_has_no_names_and_has_to_name_the_adapter(engine: Engine, wide, pushed: loreg.Registry) -> None:
    with pytest.raises(Unsupported, match="by no name"):
        push("wide", "lorax", engine.url, pushed, name="sql")
    assert engine.asked == []
    engine.post = lambda *_: (200, {"generated_text": "b"}, {})
    with pytest.raises(RemoteError, match="generated without the adapter"):
        push("wide", "lorax", engine.url, pushed)


def llama(*files: str) -> AbstractContextManager[LlamaCpp]:
    return engine_servers.serving(LlamaCpp(*files))


def test_llama_cpp_has_its_scales_set(two, pushed: loreg.Registry) -> None:
    one, other = (each.digest for each in two)
    humor = pushed.find("humor").digest
    with llama(
        "/g/x.gguf", f"/g/sql-{one.short}.gguf", f"/g/{other.hex}/a.gguf", f"h/{humor.hex}-folded.gguf"
    ) as server:
        server.scales = [0.5, 0.0, 0.0, 0.25]
        done = push("sql:prod", "llama.cpp", server.url, pushed)
        assert (done.action, done.name, done.digest) == ("loaded", "sql", one)
        assert (done.path, done.request) == (f"/g/sql-{one.short}.gguf", {"lora": [{"id": 1, "scale": 1.0}]})
        assert server.scales == [0.5, 1.0, 0.0, 0.25]
        assert push("sql:prod", "llama.cpp", server.url, pushed).action == "present"
        replaced = push(str(other), "llama.cpp", server.url, pushed)
        assert (replaced.action, replaced.name) == ("replaced", "sql")
        assert replaced.request == {"lora": [{"id": 2, "scale": 1.0}]}
        assert server.scales == [0.5, 0.0, 1.0, 0.25]
        server.scales[2] = 0.75
        assert push("sql:v2", "llama.cpp", server.url, pushed).action == "loaded"
        pushed.remove("sql:v2")
        gone = push("sql", "llama.cpp", server.url, pushed, unload=True)
        assert (gone.action, gone.digest, gone.path, gone.request) == ("unloaded", None, None, {})
        assert server.scales == [0.5, 0.0, 0.0, 0.25]
        assert push("sql", "llama.cpp", server.url, pushed, unload=True).action == "absent"
        assert push("humor", "llama.cpp", server.url, pushed).request == {"lora": [{"id": 3, "scale": 1.0}]}
        assert serving.held(pushed) == []
        with pytest.raises(Unsupported, match="by no name"):
            push("sql", "llama.cpp", server.url, pushed, name="other")


@pytest.mark.parametrize("place", range(5))  # of the requests that a swap is
@pytest.mark.parametrize("fault", ["drop", "lost", 503])
def test_what_passes_is_tried_again_by_llama_cpp(place: int, fault: int | str, two, pushed: loreg.Registry) -> None:
    one, other = (each.digest for each in two)
    with llama(f"{one.hex}.gguf", f"{other.hex}.gguf", "more.gguf") as server:
        server.scales = [1.0, 0.0, 0.5]
        server.faults = [None] * place + [fault]
        assert push("sql:v2", "llama.cpp", server.url, pushed).action == "replaced"
        assert server.scales == [0.0, 1.0, 0.5]
        server.faults = [None] * place + [fault]
        assert push("sql", "llama.cpp", server.url, pushed, unload=True).action == "unloaded"
        assert server.scales == [0.0, 0.0, 0.5]


FILES = [  # of a digest that begins with 12 digits D; whether it is recognised, and as the folded form
    ("/loras/{D}.gguf", True, False),
    ("{D}.gguf", True, False),
    ("C:\\loras\\sql-{D}-F32-LoRA.gguf", True, False),
    ("/loras/team.sql@blake3:{D}.gguf", True, False),
    ("/serving/{H}-folded/A-F16-LoRA.gguf", True, True),
    ("/serving/sql_{D}_folded.gguf", True, True),
    ("/loras/folded/{D}.gguf", True, False),
    ("/loras/folded-{D}.gguf", True, False),
    ("/loras/x{D}.gguf", False, False),
    ("/loras/{D}x.gguf", False, False),
    ("/loras/{D}0.gguf", False, False),
    ("/loras/{S}.gguf", False, False),  # too few
    ("/loras/{U}.gguf", False, False),  # in capitals
    ("/loras/sql.gguf", False, False),
    ("", False, False),
]


@pytest.mark.parametrize(("file", "known", "folded"), FILES)
@pytest.mark.parametrize("name", ["sql", "humor"])
def test_a_file_is_known_by_the_digest_in_its_name(
    file: str, known: bool, folded: bool, name: str, pushed: loreg.Registry
) -> None:
    """``humor`` is served in its folded form alone."""
    digest = pushed.find(name).digest
    digits = digest.hex[:12]
    digits_and_another = {"D": digits, "H": digest.hex, "S": digits[:11], "U": "A" + digits[1:].upper()}
    assert digest.hex[12] != "0"
    with llama("other.gguf", file.format(**digits_and_another)) as server:
        if known and (folded or name == "sql"):
            assert push(name, "llama.cpp", server.url, pushed).request["lora"][0]["id"] == 1
        else:
            form, ending = ("folded", "-folded") if name == "humor" else ("peft", "")
            with pytest.raises(NotFound) as refused:
                push(name, "llama.cpp", server.url, pushed)
            made = f"{name}-{digits}{ending}"
            assert f"`loreg export blake3:{digits} --format {form} --out {made}`" in str(refused.value)
            assert f"`python convert_lora_to_gguf.py {made} --base BASE --outfile {made}.gguf`" in str(refused.value)
            assert f"`--lora-scaled {made}.gguf:0 --no-cache-prompt`" in str(refused.value)
            assert "found other.gguf" in str(refused.value)
            assert server.scales == [0.0, 0.0]


def test_a_llama_cpp_that_reuses_prompts_is_refused(pushed: loreg.Registry) -> None:
    with llama(f"{pushed.find('sql').digest.hex}.gguf") as server:
        server.reuses = True
        with pytest.raises(Unsupported, match=r"from the adapter that it had; start it with --no-cache-prompt"):
            push("sql", "llama.cpp", server.url, pushed)
        assert server.scales == [0.0]
        server.scales = [1.0]  # since it was started
        assert push("sql", "llama.cpp", server.url, pushed).action == "present"
        with pytest.raises(Unsupported, match="--no-cache-prompt"):
            push("sql", "llama.cpp", server.url, pushed, unload=True)


@pytest.mark.parametrize(
    "answer", [(200, {"content": "b"}), (200, {"timings": {}}), (400, {"timings": {"cache_n": 0}})]
)
def test_a_llama_cpp_that_does_not_say_whether_it_reuses(answer, pushed: loreg.Registry) -> None:
    with llama(f"{pushed.find('sql').digest.hex}.gguf") as server:
        real = server.post
        server.post = lambda path, body, headers: (
            (*answer, {}) if path == "/completion" else real(path, body, headers)
        )
        with pytest.raises(RemoteError, match=r"expected it to say in timings\.cache_n"):
            push("sql", "llama.cpp", server.url, pushed)
        assert server.scales == [0.0]


@pytest.mark.parametrize("listing", [{}, "<html>", [1], [{"id": "x", "path": "", "scale": 0}], [{"id": 0}]])
def test_what_is_no_listing_of_llama_cpps(listing: object, pushed: loreg.Registry) -> None:
    with llama() as server:
        server.get = lambda path: (200, listing, {})
        with pytest.raises(RemoteError, match=r"expected the LoRA files that llama\.cpp was started with"):
            push("sql", "llama.cpp", server.url, pushed)


def test_llama_cpps_listing_is_believed_and_not_its_answer(two, pushed: loreg.Registry) -> None:
    one, _ = (each.digest for each in two)
    with llama(f"{one.hex}.gguf") as server:
        real = server.post
        done = (200, {"success": True}, {})
        server.post = lambda path, body, headers: done if path == "/lora-adapters" else real(path, body, headers)
        with pytest.raises(
            RemoteError, match=r"said that it has set its scales: expected \{0: 1.0\}, found \{0: 0.0\}"
        ):
            push("sql:v1", "llama.cpp", server.url, pushed)


def test_what_llama_cpp_would_misread_is_refused(pushed: loreg.Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    finding = serving.preflight("humor", "llama.cpp", pushed).findings[0]
    found = serving.Preflight(pushed.find("sql").digest, "llama.cpp", (dataclasses.replace(finding, folded=False),))
    monkeypatch.setattr(pushing, "preflight", lambda *_, **__: found)
    with llama() as server:
        with pytest.raises(Unsupported, match=r"llama\.cpp would not serve sql as it was trained"):
            push("sql", "llama.cpp", server.url, pushed)
        assert server.asked == []


@pytest.mark.parametrize("engine", ["vllm"], indirect=True)
def test_preflight_decides_whether_and_in_which_form(engine: Engine, pushed: loreg.Registry) -> None:
    with pytest.raises(Unsupported, match=r"(?s)vllm would not serve sql .*rank"):
        push("sql", "vllm", engine.url, pushed, max_lora_rank=1)
    assert engine.asked == []
    assert serving.preflight("humor", "sglang", pushed).form == "folded"  # rslora
    with engine_servers.serving(SGLang()) as sglang:
        done = push("humor", "sglang", sglang.url, pushed)
    assert done.path == str(serving.resolve("humor", pushed, form="folded").path)
    assert done.path.endswith("-folded")
    assert json.loads((Path(done.path) / "adapter_config.json").read_text())["use_rslora"] is False


@pytest.mark.parametrize("engine", NAMED, indirect=True)
@pytest.mark.parametrize("stacked", [True, False])
def test_vllm_is_told_of_experts_in_one_stack(
    engine: Engine, stacked: bool, pushed: loreg.Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = dataclasses.replace(serving.preflight("sql", engine.kind, pushed), stacked=stacked)
    monkeypatch.setattr(pushing, "preflight", lambda *_, **__: found)
    push("sql", engine.kind, engine.url, pushed)
    (body,) = [body for path, body in engine.asked if path in LOADS]
    assert body.get("is_3d_lora_weight", False) is (stacked and engine.kind == "vllm")


@pytest.mark.parametrize("engine", NAMED, indirect=True)
def test_the_base_models_name_is_not_taken(engine: Engine, pushed: loreg.Registry) -> None:
    for unload in (False, True):
        with pytest.raises(Conflict, match="base model"):
            push("sql", engine.kind, engine.url, pushed, name=BASE, unload=unload)
    assert told(engine) == []


@pytest.mark.parametrize("engine", ["vllm"], indirect=True)
def test_an_engine_that_does_not_load_while_it_runs_says_how(engine: Engine, pushed: loreg.Registry) -> None:
    engine.updating = False
    with pytest.raises(RemoteError, match="VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"):
        push("sql", "vllm", engine.url, pushed)


@pytest.mark.parametrize("engine", ["vllm"], indirect=True)
def test_a_vllm_whose_cache_keeps_the_old_one_is_not_swapped(engine: Engine, two, pushed: loreg.Registry) -> None:
    one, other = two
    engine.version = "0.30.2"
    push("sql:v1", "vllm", engine.url, pushed)
    with pytest.raises(Unsupported, match=r"runs vLLM 0\.30\.2.*--name"):
        push("sql:v2", "vllm", engine.url, pushed)
    assert engine.held == {"sql": str(one.path)}
    for newer in ("0.31.0", "1.0.0", "0.1.dev1+gabc"):
        engine.version = newer
        push("sql:v2", "vllm", engine.url, pushed)
        assert engine.held == {"sql": str(other.path)}
        push("sql:v1", "vllm", engine.url, pushed)


@pytest.mark.parametrize("engine", ["vllm"], indirect=True)
def test_it_believes_the_listing_and_not_the_answer(engine: Engine, pushed: loreg.Registry) -> None:
    engine.post = lambda *_: (200, "Success: LoRA adapter 'sql' added successfully.", {})
    with pytest.raises(RemoteError, match=r"expected it to list .*found no such model"):
        push("sql", "vllm", engine.url, pushed)
    engine.held["sql"] = "/other"
    with pytest.raises(RemoteError, match="still lists it"):
        push("sql", "vllm", engine.url, pushed, unload=True)


@pytest.mark.parametrize("engine", ["vllm", "sglang"], indirect=True)
def test_the_key_is_given_and_never_repeated(engine: Engine, pushed: loreg.Registry) -> None:
    engine.key = "sk-one"
    with pytest.raises(RemoteError, match=r"answered 401.*LOREG_ENGINE_KEY") as refused:
        push("sql", engine.kind, engine.url, pushed, key="sk-secret")
    assert "secret" not in str(refused.value)
    assert "***" in str(refused.value)  # the server had repeated it
    assert push("sql", engine.kind, engine.url, pushed, key="sk-one").action == "loaded"


@pytest.mark.parametrize("engine", ["vllm"], indirect=True)
def test_a_redirect_is_not_followed(engine: Engine, pushed: loreg.Registry) -> None:
    engine.faults = [307]
    with pytest.raises(RemoteError, match="answered 307"):
        push("sql", "vllm", engine.url, pushed, key="sk-secret")


@pytest.mark.parametrize("engine", ["vllm"], indirect=True)
def test_what_a_server_says_is_bounded(engine: Engine, pushed: loreg.Registry, monkeypatch) -> None:
    engine.get = lambda path: (400, {"error": {"message": "no\x1b[31m\n" + "x" * 5000}}, {})
    with pytest.raises(RemoteError) as refused:
        push("sql", "vllm", engine.url, pushed)
    assert len(str(refused.value)) < 900
    assert str(refused.value).isprintable()
    monkeypatch.setattr("loreg.serving.calling._LARGEST", 1000)
    with pytest.raises(RemoteError, match="sent more than"):
        push("sql", "vllm", engine.url, pushed)


@pytest.mark.parametrize("engine", ["vllm"], indirect=True)
@pytest.mark.parametrize("fault", ["hang", "drip"])
def test_it_ends_in_time(engine: Engine, fault: str, pushed: loreg.Registry) -> None:
    serving.resolve("sql", pushed)
    engine.faults = [fault] * 10
    began = time.monotonic()
    with pytest.raises(RemoteError, match=r"not reached|not done in time"):
        push("sql", "vllm", engine.url, pushed, timeout=0.5)
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("engine", ["vllm"], indirect=True)
@pytest.mark.parametrize("timeout", [1e300, float("inf")])
def test_it_may_have_all_the_time(engine: Engine, timeout: float, pushed: loreg.Registry) -> None:
    assert push("sql", "vllm", engine.url, pushed, timeout=timeout).action == "loaded"


@pytest.mark.parametrize("timeout", [0.0, -1.0, float("nan")])
def test_a_timeout_that_is_none(timeout: float, pushed: loreg.Registry) -> None:
    with pytest.raises(UsageError, match="expected seconds, above 0"):
        push("sql", "vllm", "http://127.0.0.1:1", pushed, timeout=timeout)


@pytest.mark.parametrize("engine", ["vllm"], indirect=True)
@pytest.mark.parametrize("body", ["[" * 200_000, '{"data":' * 100_000, "<html>"])
def test_what_is_no_answer_is_said(engine: Engine, body: str, pushed: loreg.Registry) -> None:
    engine.get = lambda path: (200, body, {})
    with pytest.raises(RemoteError, match="expected the models that vllm serves"):
        push("sql", "vllm", engine.url, pushed)


@pytest.mark.parametrize("engine", ["vllm"], indirect=True)
def test_a_key_in_an_answers_json_is_not_repeated(engine: Engine, pushed: loreg.Registry) -> None:
    key = 'sk-"sec\\ret'
    engine.get = lambda path: (400, {"detail": [{"input": f"Bearer {key}"}]}, {})
    with pytest.raises(RemoteError) as refused:
        push("sql", "vllm", engine.url, pushed, key=key)
    assert "ret" not in str(refused.value)
    assert "***" in str(refused.value)


def test_nobody_there_is_tried_as_often_as_asked(pushed: loreg.Registry) -> None:
    with engine_servers.serving(VLLM()) as engine:
        engine.faults = ["drop"] * 100
        with pytest.raises(RemoteError, match="see whether the engine runs there"):
            push("sql", "vllm", engine.url, pushed, retries=2)
        assert len(engine.asked) == 3
        gone = engine.url
    with pytest.raises(RemoteError, match=r"not reached \(ConnectionRefusedError"):
        push("sql", "vllm", gone, pushed, retries=0)


@pytest.mark.parametrize(
    "url",
    [
        *("localhost:8000", "ftp://host", "http://", "http://u:secret@host", "http://host?secret", "http://host:x"),
        *("http://a..b", f"http://{'a' * 64}.de", "http://host/\u00e4", "http://ho st", "http://host/a b"),
    ],
)
def test_urls_that_are_none(url: str, pushed: loreg.Registry) -> None:
    with pytest.raises(UsageError) as refused:
        push("sql", "vllm", url, pushed)
    assert "@" not in url or "secret" not in str(refused.value)


def test_errors_before_anything_is_sent(pushed: loreg.Registry) -> None:
    with engine_servers.serving(VLLM()) as engine:
        with pytest.raises(NotFound):
            push("sq", "vllm", engine.url, pushed)
        with pytest.raises(UsageError, match="no engine that can be pushed to"):
            push("sql", "peft", engine.url, pushed)
        with pytest.raises(UsageError, match="no name"):
            push(str(pushed.find("sql").digest), "vllm", engine.url, pushed)
        with pytest.raises(UsageError, match="'max_rank' is not a limit of vllm"):
            push("sql", "vllm", engine.url, pushed, unload=True, max_rank=8)
        assert engine.asked == []


def test_asynchronously(pushed: loreg.Registry) -> None:
    with engine_servers.serving(VLLM()) as engine:
        assert asyncio.run(serving.push_async("sql", "vllm", engine.url, pushed)).action == "loaded"


def test_what_is_pushed_is_counted(pushed: loreg.Registry) -> None:
    counted = serving.signals.Signals()
    before = serving.signals.replace_default(counted)
    try:
        with engine_servers.serving(VLLM()) as engine:
            push("sql", "vllm", engine.url, pushed)
            with pytest.raises(NotFound):
                push("sq", "vllm", engine.url, pushed)
    finally:
        serving.signals.replace_default(before)
    timings = {series: timing for series, timing in counted.snapshot().timings.items() if series.name == "push"}
    found = {dict(series.labels)["outcome"]: timing.count for series, timing in timings.items()}
    assert found == {"loaded": 1, "failed": 1}


def test_no_torch_is_imported_to_push(pushed: loreg.Registry) -> None:
    code = """
import sys
from loreg import serving
serving.push("sql", "vllm", sys.argv[1])
assert "torch" not in sys.modules
"""
    with engine_servers.serving(VLLM()) as engine:
        environment = {**os.environ, "LOREG_HOME": str(pushed.home)}
        subprocess.run([sys.executable, "-c", code, engine.url], env=environment, check=True)
        assert list(engine.held) == ["sql"]


def test_the_command_line(pushed: loreg.Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOREG_HOME", str(pushed.home))
    monkeypatch.setenv("LOREG_ENGINE_KEY", "sk-one")
    with engine_servers.serving(SGLang()) as engine:
        engine.key = "sk-one"
        words = ["serve-push", "sql", "--engine", "sglang", "--url", engine.url]
        result = CliRunner().invoke(main, [*words, "--json"])
        assert result.exit_code == 0, result.output
        document = json.loads(result.stdout)
        assert document["action"] == "loaded"
        assert document["digest"] == str(pushed.find("sql").digest)
        assert document["request"] == {"lora_path": "sql"}
        assert engine.held == {"sql": document["path"]}
        assert "was loaded already, as sql" in CliRunner().invoke(main, words).stdout
        assert "nothing is sql any more" in CliRunner().invoke(main, [*words, "--unload"]).stdout
        assert engine.held == {}
        for word in ("name", "retries", "registry", "max_rank"):  # also what a parameter of push is called
            refused = CliRunner().invoke(main, [*words, "--unload", "--limit", f"{word}=1"])
            assert refused.exit_code == 2
            assert f"'{word}' is not a limit of sglang" in refused.stderr
        monkeypatch.delenv("LOREG_ENGINE_KEY")
        refused = CliRunner().invoke(main, [*words, "--timeout", "5", "--json"])
        assert refused.exit_code == 7
        assert json.loads(refused.stdout)["error"]["type"] == "RemoteError"
