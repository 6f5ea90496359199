"""The floors of the house (spec/architecture.md): a file imports only from lower ones. Read from the syntax tree."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "loreg"
FILES = sorted(PACKAGE.rglob("*.py"))

# Room → floor. A room may import from lower floors and from itself; `format` and `algebra` share a floor and
# therefore never import each other.
FLOORS = {
    "errors": 0,
    "addresses": 1,
    "digest": 1,
    "format": 2,
    "algebra": 2,
    "tensors": 3,
    "checkpoint": 3,
    "layers": 3,
    "staging": 3,
    "store": 3,
    "hub": 3,
    "catalog": 3,
    "quantised": 4,
    "adapters": 4,
    "merge": 5,
    "registry": 6,
    "serving": 7,
    "search": 7,
    "integrations": 8,
    "cli": 9,
}
# Heavy or foreign libraries, and the only rooms that may name them.
ALLOWED = {
    "torch": {"algebra", "tensors", "quantised", "adapters", "merge", "registry", "serving", "integrations"},
    "numpy": {"algebra", "adapters", "merge"},
    "triton": {"algebra"},
    "mpmath": {"algebra"},
    "sqlalchemy": {"catalog", "registry"},
    "alembic": {"catalog"},
    "click": {"cli"},
    "rich": {"cli"},
    "huggingface_hub": {"hub"},
    "obstore": {"store"},
    "scipy": {"search"},
    "transformers": {"merge"},
    "prometheus_client": {"serving"},
    "vllm": {"integrations"},
    "dynamo": {"integrations"},
    "peft": {"integrations"},
    "safetensors": set(),
    "blake3": {"digest", "format"},
    "rfc8785": {"format"},
}


def room(path: Path) -> str:
    parts = path.relative_to(PACKAGE).parts
    return parts[0].removesuffix(".py")


def imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide which floor they reach"
            yield node.module or ""
            if node.module == "loreg":
                yield from (f"loreg.{alias.name}" for alias in node.names)


def modules() -> list[Path]:
    return [path for path in FILES if room(path) not in ("__init__", "migrations")]


def test_every_room_has_a_floor() -> None:
    assert {room(path) for path in modules()} == set(FLOORS)


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_only_from_lower_floors(path: Path) -> None:
    here = room(path)
    for name in imports(ast.parse(path.read_text(encoding="utf-8"))):
        library, _, rest = name.partition(".")
        if library in ALLOWED:
            assert here in ALLOWED[library], f"{path.name} imports {name}"
        if library != "loreg" or not rest:
            continue
        other = rest.partition(".")[0]
        if other.startswith("__"):
            continue  # loreg.__version__ and the like: the package itself, which imports nothing
        assert other == here or FLOORS[other] < FLOORS[here], f"{here} (floor {FLOORS[here]}) imports loreg.{other}"


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_stay_readable(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert source.count("\n") <= 420
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert (node.end_lineno or 0) - node.lineno < 75, f"{path.name}: {node.name}"


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("loreg", "torch sqlalchemy huggingface_hub obstore numpy click rich alembic"),
        ("loreg.algebra", "triton"),
        ("loreg.format.manifest", "torch sqlalchemy huggingface_hub numpy"),
        ("loreg.store", "torch sqlalchemy numpy obstore"),
        ("loreg.catalog", "torch numpy huggingface_hub alembic"),
        ("loreg.hub", "torch sqlalchemy huggingface_hub"),
        ("loreg.registry", "torch huggingface_hub obstore alembic"),
        ("loreg.integrations.dynamo", "torch sqlalchemy"),
        ("loreg.integrations.vllm", "torch sqlalchemy vllm"),
        ("loreg.search", "torch sqlalchemy scipy numpy"),
        ("loreg.serving", "torch sqlalchemy numpy prometheus_client"),
        ("loreg.serving.preflight", "torch huggingface_hub"),
        ("loreg.serving.pushing", "torch huggingface_hub"),
        ("loreg.serving.resolving", "torch huggingface_hub"),
        ("loreg.serving.watching", "torch huggingface_hub numpy"),
        ("loreg.cli", "torch sqlalchemy huggingface_hub numpy rich alembic"),
    ],
)
def test_imports_are_light(module: str, unwanted: str) -> None:
    probe = f"import sys, {module}; print(*sorted(set({unwanted.split()!r}) & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert found.stdout.split() == []


@pytest.mark.parametrize("package", ["loreg", "loreg.serving"])
def test_what_is_loaded_when_it_is_used_is_what_types_say(package: str) -> None:
    """The names that a light package promises, where it finds them, and where a type checker does, are the same."""
    module = import_module(package)
    tree = ast.parse(Path(module.__file__ or "").read_text(encoding="utf-8"))
    (typed,) = (node for node in tree.body if isinstance(node, ast.If))
    lines = (node for node in typed.body if isinstance(node, ast.ImportFrom))
    seen = {alias.name: line.module for line in lines for alias in line.names}
    assert seen == module._HOMES
    assert set(seen) == set(module.__all__) - {"__version__", "signals"}
    assert module.__all__ == sorted(module.__all__) == dir(module)
    for name, home in seen.items():
        assert getattr(module, name) is getattr(import_module(home), name)
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'absent'"):
        _ = module.absent


@pytest.mark.parametrize(
    "first",
    [
        "import loreg.serving",
        "import loreg.serving.preflight, loreg.serving.unmerged",
        "from loreg.serving.preflight import limits_of; from loreg.serving.unmerged import Unmerged",
        "from loreg.serving import pushing, packing, caching, attaching",
        "from loreg.serving import *; assert callable(preflight) and callable(unmerged)",
        "import importlib as i; [i.import_module(f'loreg.serving.{name}') for name in ('unmerged', 'preflight')]",
    ],
)
def test_of_a_module_and_a_function_of_one_name_the_function_is_meant(first: str) -> None:
    probe = f"""{first}
import sys
import loreg.serving
from loreg.serving import preflight, signals, unmerged
for name, found in {{"preflight": preflight, "unmerged": unmerged}}.items():
    module = sys.modules["loreg.serving." + name]
    assert found is getattr(module, name) is getattr(loreg.serving, name)
    assert type(found).__name__ == "function", found
assert loreg.serving.signals is sys.modules["loreg.serving.signals"] is signals
"""
    subprocess.run([sys.executable, "-c", probe], check=True)
