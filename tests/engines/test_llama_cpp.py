"""A real llama.cpp server: what a push makes it serve is what ``loreg merge`` makes of a version, in transformers; it
does what is written of it; and preflight says of a version what becomes of it there."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama_server
import numpy as np
import pytest
import tiny
import vllm_server
from click.testing import CliRunner
from llama_server import Refused
from safetensors.numpy import load_file, save_file
from vllm_server import HIDDEN, VOCABULARY

import loreg
from loreg import serving
from loreg.cli import main
from loreg.errors import NotFound, Unsupported

pytestmark = [
    pytest.mark.llama_cpp,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not llama_server.PROGRAM.is_file(), reason="llama.cpp is not built: make test-llama.cpp"),
]

BOUND = 1e-4
"""Between logarithms of probabilities, in nats: float32 with sums in another order. Found: 6.1e-6."""
FRESH = "--no-cache-prompt"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vllm_server.write_base(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def gguf(base: Path) -> Path:
    return llama_server.convert_base(base, base.parent / "model.gguf")


@pytest.fixture
def registry(base: Path, tmp_path: Path) -> Any:
    with loreg.open(tmp_path / "home") as opened:
        opened.add_base(base, "tiny")
        yield opened


@pytest.fixture
def two(registry: loreg.Registry, tmp_path: Path) -> loreg.Registry:
    """``sql:v1`` and ``sql:v2``; and ``root``, which llama.cpp reads right in the folded form alone."""
    for seed in (1, 2):
        registry.push(vllm_server.write_adapter(tmp_path / f"a{seed}", seed, alpha=8), base="tiny", name="sql")
    odd = vllm_server.write_adapter(tmp_path / "root", 3, alpha=8, use_rslora=True)
    registry.push(odd, base="tiny", name="root")
    return registry


def merged(registry: loreg.Registry, reference: str, tmp_path: Path) -> llama_server.Answer:
    out = tmp_path / f"merged-{reference.replace(':', '-')}"
    registry.merge(reference, out)
    return llama_server.transformers_answer(out)


def made(said: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    """The commands of a message, as they are written there; what the server is to be started with."""
    export, convert, options = re.findall(r"`([^`]+)`", said)
    monkeypatch.chdir(tmp_path)
    program, *words = shlex.split(export)
    assert program == "loreg" and CliRunner().invoke(main, words).exit_code == 0
    _, script, *words = shlex.split(convert.replace("BASE", str(base)))
    llama_server._run(llama_server.SOURCES / script, *words)
    return tuple(shlex.split(options))


def test_a_server_is_told_what_to_serve(
    two: loreg.Registry, base: Path, gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOREG_HOME", str(two.home))
    plain = llama_server.transformers_answer(base)
    one, other, root = (merged(two, reference, tmp_path) for reference in ("sql:v1", "sql:v2", "root"))
    files = []
    with llama_server.serving(gguf, tmp_path, FRESH) as server:
        for reference in ("sql:v1", "sql:v2", "root"):
            with pytest.raises(NotFound, match="found none") as refused:
                serving.push(reference, "llama.cpp", server.url, two)
            option, scaled, fresh = made(str(refused.value), base, tmp_path, monkeypatch)
            assert (option, fresh) == ("--lora-scaled", FRESH)
            files.append(scaled)
    with llama_server.serving(gguf, tmp_path, "--lora-scaled", ",".join(files), FRESH) as server:

        def push(reference: str, **more: Any) -> serving.Pushed:
            return serving.push(reference, "llama.cpp", server.url, two, **more)

        assert server.ask().distance(plain) <= BOUND
        first = push("sql:v1")
        assert first.action == "loaded" and push("sql:v1").action == "present"
        assert server.ask().distance(one) <= BOUND
        assert push("sql:v2").action == "replaced"
        assert server.ask().distance(other) <= BOUND
        assert server.ask(**first.request).distance(one) <= BOUND
        assert server.ask().distance(other) <= BOUND
        assert push("sql", unload=True).action == "unloaded"
        assert server.ask().distance(plain) <= BOUND
        assert push("sql", unload=True).action == "absent"
        assert push("root").action == "loaded" and server.scales() == [0, 0, 1]
        assert server.ask().distance(root) <= BOUND
        assert push("sql:v1").action == "loaded" and server.scales() == [1, 0, 1]  # another name: both
        status, answer = server.request("/v1/completions", {"prompt": [1, 17], "max_tokens": 2, **first.request})
        assert status == 200, answer
    distances = [
        each.distance(another) for each in (plain, one, other, root) for another in (plain, one, other, root)
    ]
    assert sum(distance > BOUND for distance in distances) == 12


def test_what_is_written_of_it(two: loreg.Registry, base: Path, gguf: Path, tmp_path: Path) -> None:
    files = []
    for seed in (1, 2):
        digest = two.find(f"sql:v{seed}").digest
        files.append(llama_server.convert_lora(tmp_path / f"a{seed}", base, tmp_path / f"{digest.hex}.gguf"))
    one, other = (merged(two, f"sql:v{seed}", tmp_path) for seed in (1, 2))
    plain = llama_server.transformers_answer(base)
    loras = [word for file in files for word in ("--lora", file)]
    with llama_server.serving(gguf, tmp_path, *loras, "--lora-init-without-apply") as server:
        assert server.scales() == [1, 1]
        assert server.ask().distance(plain) > BOUND
        assert server.request("/lora-adapters", [{"id": 0, "scale": 1}, {"id": 9, "scale": 1}]) == (
            200,
            {"success": True},
        )
        assert server.scales() == [1, 0]  # what is not named is 0; what there is not is accepted
        stale = server.ask()
        assert min(stale.distance(each) for each in (one, other, plain)) > BOUND  # goes on from both
        assert server.ask(cache_prompt=False).distance(one) <= BOUND
        with pytest.raises(Unsupported, match="--no-cache-prompt"):
            serving.push("sql:v2", "llama.cpp", server.url, two)
        assert server.scales() == [1, 0]
        lora = [{"id": 1, "scale": 1.0}]
        assert server.ask(lora=lora).distance(other) <= BOUND


# ---- preflight ----


def _adapter(**config: Any) -> Callable[[Path], Path]:
    return lambda folder: vllm_server.write_adapter(folder, 5, **{"alpha": 8, **config})


def _full(names: dict[str, tuple[int, ...]], **config: Any) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        rng = np.random.default_rng(6)
        full = {name: tiny.normal(rng, "F32", *shape) for name, shape in names.items()}
        return tiny.write_adapter(folder, vllm_server.factors(5, {}), alpha=8, full=full, r=4, **config)

    return write


def _on(path: str, shape: tuple[int, int]) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        modules = {path: tiny.factors(np.random.default_rng(7), *shape, 4, std=0.2)}
        return tiny.write_adapter(folder, modules, alpha=8, r=4, target_modules=[path.rpartition(".")[2]])

    return write


EMBEDDED = _full(
    {"model.embed_tokens.lora_embedding_A": (4, VOCABULARY), "model.embed_tokens.lora_embedding_B": (HIDDEN, 4)},
    target_modules=["q_proj", "v_proj", "gate_proj", "down_proj", "embed_tokens"],
    modules_to_save=None,
)


CASES: dict[str, tuple[Callable[[Path], Path], str | None]] = {
    "plain": (_adapter(), None),
    "ranks": (_adapter(ranks={"down_proj": 2}, rank_pattern={"down_proj": 2}, alpha_pattern={"down_proj": 8}), None),
    "alphas": (_adapter(alpha_pattern={"q_proj": 2}), "misreads"),
    "rsLoRA": (_adapter(use_rslora=True), "misreads"),
    "no alpha": (_adapter(alpha=0), "misreads"),
    "DoRA": (lambda folder: vllm_server.write_dora(folder, 5), "refuses"),
    "a norm": (_full({"model.norm.weight": (HIDDEN,)}, modules_to_save=["norm"]), "ignores"),
    "a head": (_full({"lm_head.weight": (VOCABULARY, HIDDEN)}, modules_to_save=["lm_head"]), "refuses"),
    "on the head": (_on("lm_head", (VOCABULARY, HIDDEN)), None),
    "an embedding": (EMBEDDED, None),
}
"""What there is, and what preflight says becomes of it."""


@pytest.mark.parametrize("case", CASES)
def test_preflight_says_what_becomes_of_it(
    case: str, registry: loreg.Registry, base: Path, gguf: Path, tmp_path: Path
) -> None:
    write, expected = CASES[case]
    folder = write(tmp_path / "adapter")
    registry.push(folder, base="tiny", name="it")
    found = serving.preflight("it", "llama.cpp", registry)
    assert {finding.effect for finding in found.findings} == ({expected} if expected else set())
    right = merged(registry, "it", tmp_path)
    forms = {"peft": folder}
    if found.form == "folded":
        registry.export("it", forms.setdefault("folded", tmp_path / "folded"), format="folded")
    for form, directory in forms.items():
        try:
            file = llama_server.convert_lora(directory, base, tmp_path / f"{form}.gguf")
            with llama_server.serving(gguf, tmp_path, "--lora", file, FRESH) as server:
                distance = server.ask().distance(right)
        except Refused:
            became = "refuses"
        else:
            became = None if distance <= BOUND else "serves another"
        said = (
            None
            if form == "folded"
            else {"ignores": "serves another", "misreads": "serves another"}.get(expected or "", expected)
        )
        assert became == said, form


@pytest.mark.parametrize(
    ("write", "subject", "says"),
    [
        (_on("lm_head", (VOCABULARY, HIDDEN)), "lm_head", r"'output\.weight' does not exist in base model"),
        (EMBEDDED, "embedding", r"GGML_ASSERT\(ggml_can_mul_mat"),
    ],
)
def test_a_head_that_is_the_embeddings_weight(
    write: Callable[[Path], Path], subject: str, says: str, tmp_path: Path
) -> None:
    """For a Llama it is the server that refuses a LoRA on either, for other models the conversion."""
    folder = vllm_server.write_base(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    tensors = load_file(folder / "model.safetensors")
    save_file({name: tensors[name] for name in tensors if name != "lm_head.weight"}, folder / "model.safetensors")
    with loreg.open(tmp_path / "home") as registry:
        registry.add_base(folder, "tied")
        registry.push(write(tmp_path / "adapter"), base="tied", name="it")
        (finding,) = serving.preflight("it", "llama.cpp", registry).findings
    assert (finding.effect, finding.subject) == ("refuses", subject)
    model = llama_server.convert_base(folder, tmp_path / "model.gguf")
    with pytest.raises(Refused, match=says):
        file = llama_server.convert_lora(tmp_path / "adapter", folder, tmp_path / "adapter.gguf")
        with llama_server.serving(model, tmp_path, "--lora", file):
            raise AssertionError("it serves it")


def test_a_module_that_the_model_has_not_is_refused(base: Path, gguf: Path, tmp_path: Path) -> None:
    """By the server; preflight does not see it, as no version can be pushed with one."""
    folder = _on("model.layers.7.self_attn.q_proj", (HIDDEN, HIDDEN))(tmp_path / "adapter")
    with pytest.raises(Refused, match=r"does not exist in base model|Can not map tensor"):
        file = llama_server.convert_lora(folder, base, tmp_path / "adapter.gguf")
        with llama_server.serving(gguf, tmp_path, "--lora", file):
            raise AssertionError("it serves it")
