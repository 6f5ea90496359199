"""``loreg serve-push`` and a real SGLang server on a CPU: what it serves is what ``loreg merge`` makes of a version,
also after a swap and during one; and what it does with what ``preflight`` refuses. ``sglang_on_cpu.py`` stands in for
what SGLang asks for and is not there on such a machine."""

from __future__ import annotations

import importlib.util
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import loreg
from loreg import serving
from loreg.errors import BaseMismatch, Conflict, RemoteError, Unsupported

if importlib.util.find_spec("sglang") is None or importlib.util.find_spec("uvicorn") is None:
    pytest.skip("SGLang is not installed: make test-sglang", allow_module_level=True)

import sglang_server
import vllm_server
from sglang_server import NAME, Asked
from vllm_server import ADAPTED, Answer

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(1200)]

BOUND = 1e-4
"""Between logarithms of probabilities, in nats, of float32 and of 48 tokens: what differs is the order of its sums.
The most that was found is 1e-5."""
KEY = "sk-one"
RANK = 8
TARGETS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj", "embed_tokens", "lm_head")
"""What the server is started for: all but o_proj."""
LIMITS = {"max_lora_rank": RANK, "lora_target_modules": ",".join(TARGETS)}
OPTIONS = (
    "--enable-lora", "--lora-backend", "torch_native", "--max-lora-rank", str(RANK),
    "--lora-target-modules", *TARGETS,
)  # fmt: skip
ATTENTION = tuple(f"self_attn.{name}_proj" for name in "qkvo")
WIDE = dict.fromkeys(("q_proj", "v_proj", "gate_proj", "down_proj"), 16)
SMALLER = {"down_proj": 2}
CLAIMS = dict.fromkeys(WIDE, 4)
# Each: what is adapted, the ranks of its modules, and what the config says beside them.
CASES: dict[str, tuple[tuple[str, ...], dict[str, int], dict[str, Any]]] = {
    "its own": (ADAPTED, {}, {}),
    "gate alone": (("mlp.gate_proj",), {}, {}),
    "an idle rank": (ADAPTED, {}, {"rank_pattern": {"k_proj": 64}}),
    "all by a word": (ADAPTED, {}, {"target_modules": "all-linear"}),
    "rslora": (ADAPTED, {}, {"use_rslora": True}),
    "alphas": (ADAPTED, {}, {"alpha_pattern": {"q_proj": 2}}),
    "an expression": (ADAPTED, {}, {"target_modules": r".*\.(q_proj|v_proj|gate_proj|down_proj)"}),
    "a claimed rank": (ADAPTED, {}, {"r": 16, "rank_pattern": CLAIMS}),
    "wide": (ADAPTED, WIDE, {"r": 16}),
    "q without v": (("self_attn.q_proj", "self_attn.k_proj"), {}, {}),
    "not allowed": (ATTENTION, {}, {}),
}
FATAL: dict[str, tuple[tuple[str, ...], dict[str, int], dict[str, Any]]] = {
    "another rank": (ADAPTED, SMALLER, {"rank_pattern": SMALLER}),
    "v without q": (("self_attn.v_proj", "mlp.down_proj"), {}, {}),
    "all by a word, and more than allowed": (ATTENTION, {}, {"target_modules": "all-linear"}),
    "up without gate": (("mlp.up_proj", "mlp.down_proj"), {}, {}),
}


class Here(NamedTuple):
    registry: loreg.Registry
    asked: Asked
    merged: dict[str, Answer]
    folder: Path

    def push(self, reference: str, **more: Any) -> serving.Pushed:
        return serving.push(reference, "sglang", self.url, self.registry, **{"key": KEY, **LIMITS, **more})

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.asked.server.port}"


def write(folder: Path, case: tuple[tuple[str, ...], dict[str, int], dict[str, Any]]) -> Path:
    modules, ranks, said = case
    return vllm_server.write_adapter(folder, 3, ranks=ranks, modules=modules, **{"alpha": 8, **said})


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Here]:
    folder = tmp_path_factory.mktemp("sglang")
    base = vllm_server.write_base(folder / "base")
    with loreg.open(folder / "home") as registry:
        registry.add_base(base, "tiny-llama")
        for seed in (1, 2):
            registry.push(
                vllm_server.write_adapter(folder / f"a{seed}", seed, alpha=8), base="tiny-llama", name="sql"
            )
        registry.tag("sql:v1", "prod")
        names = {f"sql:v{seed}": f"sql:v{seed}" for seed in (1, 2)}
        for number, (case, what) in enumerate(CASES.items()):
            names[case] = f"case{number}"
            registry.push(write(folder / names[case], what), base="tiny-llama", name=names[case])
        registry.push(vllm_server.write_dora(folder / "dora", 4), base="tiny-llama", name="dora")
        registry.add_base(vllm_server.write_base(folder / "other", seed=7), "another")
        registry.push(vllm_server.write_adapter(folder / "stranger", 6), base="another", name="stranger")
        merged = [folder / f"merged{number}" for number in range(len(names))]
        for reference, path in zip(names.values(), merged, strict=True):
            registry.merge(reference, path)
        found = sglang_server.answers([base, *merged])
        with sglang_server.serving(base, folder, *OPTIONS, key=KEY) as server:
            yield Here(registry, Asked(server), dict(zip(("base", *names), found, strict=True)), folder)


def test_a_tag_is_loaded_moves_and_is_unloaded(here: Here) -> None:
    one, two = here.merged["sql:v1"], here.merged["sql:v2"]
    assert one.distance(two) > BOUND < one.distance(here.merged["base"])
    first = here.push("sql:prod", base="tiny-llama")
    assert (first.action, first.request) == ("loaded", {"lora_path": "sql"})
    assert Path(first.path or "").name == here.registry.resolve("sql:v1").digest.hex
    assert here.push("sql:prod").action == "present"
    assert here.asked.ask(first.request).distance(one) <= BOUND
    assert here.asked.generate(first.request).distance(one) <= BOUND
    assert here.asked.ask({"model": f"{NAME}:sql"}).distance(one) <= BOUND
    for base in ({"model": NAME}, {"model": "sql"}):  # as a name alone, SGLang takes it for one of its base
        assert here.asked.ask(base).distance(here.merged["base"]) <= BOUND
    here.registry.tag("sql:v2", "prod")
    second = here.push("sql:prod")
    assert (second.action, here.asked.server.path("sql")) == ("replaced", second.path)
    assert Path(second.path or "").name == here.registry.resolve("sql:v2").digest.hex
    assert (
        here.asked.ask(second.request).distance(two) <= BOUND
    )  # the same prompt, of which the cache has the old one
    old = here.push("sql:v1", name="team/old")
    assert here.asked.ask(old.request).distance(one) <= BOUND
    assert here.asked.ask(second.request).distance(two) <= BOUND
    assert here.push("sql", unload=True).action == "unloaded"
    assert here.push("sql", unload=True).action == "absent"
    assert here.asked.server.path("sql") is None
    assert here.asked.ask(second.request).distance(two) <= BOUND  # which SGLang has loaded again
    assert here.asked.server.path("sql") == second.path
    assert here.asked.complete({"lora_path": "never"})[0] == 400
    for name in ("sql", "team/old"):
        assert here.push("sql", name=name, unload=True).action == "unloaded"


def test_requests_are_answered_by_one_version_while_a_tag_moves(here: Here) -> None:
    """From the first token to the last; none is refused, and after the push there is the new one alone."""
    versions = {name: here.merged[name] for name in ("sql:v1", "sql:v2")}
    request = here.push("sql:v1", name="busy").request
    over, asked = threading.Event(), []

    def ask() -> None:
        while not over.is_set():
            asked.append(here.asked.ask(request))

    with ThreadPoolExecutor(3) as clients:
        asking = [clients.submit(ask) for _ in range(3)]
        try:
            for reference in ("sql:v2", "sql:v1") * 3:
                assert here.push(reference, name="busy").action == "replaced"
                assert here.asked.ask(request).distance(versions[reference]) <= BOUND
        finally:
            over.set()
        for each in asking:
            each.result()
    assert all(min(answer.distance(merged) for merged in versions.values()) <= BOUND for answer in asked)
    assert here.push("sql", name="busy", unload=True).action == "unloaded"


def test_what_is_refused_is_refused_before_and_leaves_what_was_there(here: Here) -> None:
    request = here.push("sql:v1", name="kept").request
    before = here.asked.server.said("POST", "lora_adapter")
    with pytest.raises(BaseMismatch, match="was trained on 'another'"):
        here.push("stranger", name="kept", base=here.folder / "base")
    with pytest.raises(Unsupported, match="DoRA"):
        here.push("dora", name="kept")
    with pytest.raises(Conflict, match="base model"):
        here.push("sql", name=NAME)
    with pytest.raises(RemoteError, match=r"answered 401: .*LOREG_ENGINE_KEY"):
        here.push("sql", name="kept", key="sk-another")
    assert here.asked.server.said("POST", "lora_adapter") == before
    wide = here.registry.resolve(f"case{list(CASES).index('wide')}").digest
    with pytest.raises(RemoteError, match=r"answered 400: .*rank 16 is incompatible"):
        here.push(str(wide), name="kept", max_lora_rank=16)  # in SGLang's words, as it was started otherwise
    assert here.asked.ask(request).distance(here.merged["sql:v1"]) <= BOUND
    assert here.push("sql", name="kept", unload=True).action == "unloaded"


@pytest.mark.parametrize("case", CASES)
def test_preflight_says_what_it_does(here: Here, case: str) -> None:
    """``refuses``: it does not load it. ``misreads``: it answers otherwise than the merged model. And what is free of
    findings, as it was pushed or folded, answers as that does."""
    name = f"case{list(CASES).index(case)}"
    found = serving.preflight(name, "sglang", here.registry, **LIMITS)
    if found.form is None:
        with pytest.raises(Unsupported):
            here.push(name)
    else:
        assert here.asked.ask(here.push(name).request).distance(here.merged[case]) <= BOUND
        assert here.push(name, unload=True).action == "unloaded"
    if found.ok:
        return
    status = here.asked.load("raw", serving.resolve(name, here.registry).path)
    effects = {finding.effect for finding in found.findings}
    assert status == (400 if "refuses" in effects else 200)
    if status == 200:
        assert effects == {"misreads"}
        assert here.asked.ask({"lora_path": "raw"}).distance(here.merged[case]) > BOUND
        assert here.asked.server.request("/unload_lora_adapter", {"lora_name": "raw"})[0] == 200


def test_dora_is_refused(here: Here) -> None:
    assert here.asked.load("raw", here.folder / "dora") == 400


@pytest.mark.slow
@pytest.mark.parametrize("case", FATAL)
def test_what_it_loads_and_cannot_use_is_the_end_of_it(case: str, tmp_path: Path) -> None:
    """SGLang says that it has loaded these, and ends when a request is the first to use them."""
    base = vllm_server.write_base(tmp_path / "base")
    with loreg.open(tmp_path / "home") as registry:
        registry.add_base(base, "tiny-llama")
        registry.push(write(tmp_path / "adapter", FATAL[case]), base="tiny-llama", name="fatal")
        (finding,) = serving.preflight("fatal", "sglang", registry, **LIMITS).findings
        assert finding.effect == "refuses"
        assert "ends" in finding.reason
    with sglang_server.serving(base, tmp_path, *OPTIONS, key=KEY) as server:
        asked = Asked(server)
        assert asked.load("fatal", tmp_path / "adapter") == 200
        with pytest.raises(OSError):
            asked.complete({"lora_path": "fatal"})
        deadline = time.monotonic() + 60
        while not server.said("Scheduler hit an exception"):
            assert time.monotonic() < deadline
            time.sleep(0.1)
