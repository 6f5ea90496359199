"""A real vLLM server, the plugin, and HTTP: what is asked for by name is what ``loreg merge`` makes of it."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

pytest.importorskip("vllm.entrypoints.openai.models.serving", reason="vLLM is not installed: make test-vllm")

import vllm_server
from vllm_server import Answer, Server

import loreg

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1200)]

BOUND = 1e-4
"""Between logarithms of probabilities, in nats. All of it is float32 here, of which LoRA's dtype is the model's own
(vLLM 0.32, ``config/lora.py``, `verify_with_model_config`): what differs is the order of its sums."""
MOVED_S = 60.0
ODD = {"use_rslora": True, "rank_pattern": {"down_proj": 2}, "alpha_pattern": {"q_proj": 2, "gate_proj": 16}}
"""A rank and three scales, of which vLLM up to 0.31 reads one."""
CLAIMS = {
    "r": 16, "rank_pattern": dict.fromkeys(("q_proj", "v_proj", "gate_proj", "down_proj"), 4),
    "alpha_pattern": {"q_proj": 2}, "use_rslora": True,
}  # fmt: skip
"""A rank that no module has, and by which vLLM refuses it, and two scales."""


class Here(NamedTuple):
    registry: loreg.Registry
    server: Server
    merged: dict[str, Answer]
    folder: Path


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Here]:
    folder = tmp_path_factory.mktemp("vllm")
    base = vllm_server.write_base(folder / "base")
    with loreg.open(folder / "home") as registry:
        registry.add_base(base, "tiny")
        for name, seed in (("sql", 1), ("moved", 2)):
            path = vllm_server.write_adapter(folder / f"pushed-{name}", seed, alpha=8)
            registry.push(path, base="tiny", name=name, tags=["prod"])
        odd = vllm_server.write_adapter(folder / "pushed-odd", 3, ranks={"down_proj": 2}, alpha=4, **ODD)
        registry.push(odd, base="tiny", name="odd")
        claims = vllm_server.write_adapter(folder / "pushed-claims", 8, alpha=4, **CLAIMS)
        registry.push(claims, base="tiny", name="claims")
        registry.push(vllm_server.write_dora(folder / "pushed-dora", 4), base="tiny", name="dora")
        wide = dict.fromkeys(("q_proj", "v_proj", "gate_proj", "down_proj"), 16)
        registry.push(
            vllm_server.write_adapter(folder / "pushed-wide", 5, ranks=wide, r=16), base="tiny", name="wide"
        )
        other = vllm_server.write_base(folder / "other", seed=7)
        registry.add_base(other, "other")
        registry.push(vllm_server.write_adapter(folder / "pushed-other", 6), base="other", name="stranger")
        names = ("sql", "moved", "odd", "claims")
        for name in names:
            registry.merge(name, folder / f"merged-{name}")
        found = vllm_server.answers([base, *(folder / f"merged-{name}" for name in names)])
        merged = dict(zip(("base", *names), found, strict=True))
        options = ("--enable-lora", "--max-lora-rank", "8", "--max-loras", "4", "--max-cpu-loras", "8")
        environment = {
            "LOREG_HOME": str(folder / "home"), "VLLM_PLUGINS": "loreg", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
            "LOREG_VLLM_POLL": "0.2",
        }  # fmt: skip
        with vllm_server.serving(base, folder, *options, **environment) as server:
            yield Here(registry, server, merged, folder)


def wait(happened: Callable[[], bool], here: Here) -> None:
    deadline = time.monotonic() + MOVED_S
    while not happened():
        assert time.monotonic() < deadline, here.server.log.read_text()[-4000:]
        time.sleep(0.1)


def test_the_adapters_tell_the_answers_apart(here: Here) -> None:
    answers = list(here.merged.values())
    for i, one in enumerate(answers):
        assert all(one.distance(other) > 1000 * BOUND for other in answers[:i])


@pytest.mark.parametrize("reference", ["sql", "sql:prod", "sql:v1", "sql@{digest}", "{digest}"])
def test_a_reference_answers_as_the_merged_model(here: Here, reference: str) -> None:
    digest = here.registry.resolve("sql:v1").digest
    name = reference.format(digest=digest)
    assert here.server.ask(name).distance(here.merged["sql"]) <= BOUND
    path = here.server.path(name)
    assert path is not None
    assert Path(path).name == digest.hex


def test_the_base_is_served_beside_them(here: Here) -> None:
    assert here.server.ask(str(here.folder / "base")).distance(here.merged["base"]) <= BOUND


def test_a_moved_tag_is_served_without_a_restart(here: Here) -> None:
    """And with the same prompt: what the KV cache holds of the old weights is not used."""
    here.registry.push(here.folder / "pushed-sql", base="tiny", name="tagged", tags=["prod"])
    before = here.server.ask("tagged:prod")
    first = here.server.path("tagged:prod")
    assert before.distance(here.merged["sql"]) <= BOUND
    here.registry.push(here.folder / "pushed-moved", base="tiny", name="tagged", tags=["prod"])
    wait(lambda: here.server.path("tagged:prod") != first, here)
    assert here.server.ask("tagged:prod").distance(here.merged["moved"]) <= BOUND
    assert here.server.ask("tagged:v1").distance(here.merged["sql"]) <= BOUND
    here.registry.tag("tagged:v1", "prod")
    wait(lambda: here.server.path("tagged:prod") == first, here)
    assert here.server.ask("tagged:prod").distance(here.merged["sql"]) <= BOUND


def test_a_request_is_answered_by_one_version_while_a_tag_moves(here: Here) -> None:
    """From its first token to its last; and none finds the name missing."""
    for name in ("pushed-sql", "pushed-moved"):
        here.registry.push(here.folder / name, base="tiny", name="busy")
    here.registry.tag("busy:v1", "prod")
    over = threading.Event()

    def ask() -> list[Answer]:
        found = []
        while not over.is_set():
            found.append(here.server.ask("busy:prod"))
        return found

    with ThreadPoolExecutor(4) as pool:
        asking = [pool.submit(ask) for _ in range(4)]
        try:
            for version in (2, 1, 2, 1):
                digest = here.registry.tag(f"busy:v{version}", "prod").digest
                wait(lambda digest=digest: digest.hex in (here.server.path("busy:prod") or ""), here)
                now = here.server.ask("busy:prod")
                assert now.distance(here.merged["moved" if version == 2 else "sql"]) <= BOUND
        finally:
            over.set()
        found = [answer for each in asking for answer in each.result()]
    kinds = [[name for name in ("sql", "moved") if each.distance(here.merged[name]) <= BOUND] for each in found]
    assert all(len(kind) == 1 for kind in kinds)


def test_what_is_unloaded_stays_so_until_it_is_asked_for(here: Here) -> None:
    here.registry.push(here.folder / "pushed-sql", base="tiny", name="brief")
    assert here.server.ask("brief").distance(here.merged["sql"]) <= BOUND
    assert here.server.request("/v1/unload_lora_adapter", {"lora_name": "brief"})[0] == 200
    here.registry.push(here.folder / "pushed-moved", base="tiny", name="brief")
    time.sleep(1.0)  # five looks at the tags
    assert here.server.path("brief") is None
    assert here.server.ask("brief").distance(here.merged["moved"]) <= BOUND


def test_scales_of_its_own_for_each_module(here: Here) -> None:
    assert here.server.ask("odd").distance(here.merged["odd"]) <= BOUND


def test_what_vllm_takes_in_another_form_is_served_in_that(here: Here) -> None:
    assert here.server.ask("claims").distance(here.merged["claims"]) <= BOUND
    path = here.server.path("claims")
    assert path is not None
    assert path.endswith("-folded")
    pushed = {"lora_name": "refused", "lora_path": str(here.folder / "pushed-claims")}
    status, said = here.server.request("/v1/load_lora_adapter", pushed)
    assert status >= 400
    assert "rank 16" in str(said)


def test_what_vllm_would_misread_is_told_apart(here: Here) -> None:
    """The control of the last test: the files as they were pushed, as vLLM up to 0.31 reads their config."""
    config = json.loads((here.folder / "pushed-odd" / "adapter_config.json").read_text())
    folder = here.folder / "misread"
    folder.mkdir()
    weights = (here.folder / "pushed-odd" / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.safetensors").write_bytes(weights)
    (folder / "adapter_config.json").write_text(json.dumps(config | {"rank_pattern": {}, "alpha_pattern": {}}))
    status, said = here.server.request("/v1/load_lora_adapter", {"lora_name": "misread", "lora_path": str(folder)})
    assert status == 200, said
    assert here.server.ask("misread").distance(here.merged["odd"]) > 1000 * BOUND


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("dora", ["DoRA"]),
        ("wide", ["16", "8"]),
        ("stranger", ["other", "q_proj"]),
        ("nobody", ["nobody"]),
        ("sql:nothing", ["nothing"]),
        ("../../etc/passwd", ["etc/passwd"]),
        ("sql\x00", ["sql"]),
        ("x" * 10_000, ["xxxx"]),
        ("sql + moved", ["sql + moved"]),
    ],
    ids=["dora", "rank", "base", "unknown", "tag", "path", "nul", "long", "expression"],
)
def test_what_is_not_served_is_a_404_and_one_line(here: Here, name: str, words: list[str]) -> None:
    before = len(here.server.log.read_text().splitlines())
    status, document = here.server.complete(name)
    assert (status, document["error"]["type"]) == (404, "NotFoundError")
    lines = here.server.log.read_text().splitlines()[before:]
    said = [line for line in lines if "is not served" in line]
    assert len(said) == 1
    assert all(word in said[0] for word in words), said
    assert len(said[0]) < 1000
    assert not [line for line in lines if "Traceback" in line]


def test_the_server_is_well_after_all_that(here: Here) -> None:
    assert here.server.ask("sql:prod").distance(here.merged["sql"]) <= BOUND
