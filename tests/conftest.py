from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# Before torch is loaded: tiny tensors gain nothing from a second thread, and wait for it where cores are busy.
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent))

import tiny
from hub_server import hub

import loreg

__all__ = ["hub"]


@pytest.fixture(scope="session")
def _empty_catalog(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    # Running the migrations takes longer than most tests; a closed SQLite database is one file.
    home = tmp_path_factory.mktemp("empty")
    loreg.open(home).close()
    return (home / "catalog.db").read_bytes()


@pytest.fixture
def registry(tmp_path: Path, _empty_catalog: bytes) -> Iterator[loreg.Registry]:
    """An empty registry in ``tmp_path / "home"``."""
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "catalog.db").write_bytes(_empty_catalog)
    with loreg.open(tmp_path / "home") as opened:
        yield opened


@pytest.fixture
def tiny_base(tmp_path: Path) -> Path:
    """The checkpoint ``tiny.model()`` in ``tmp_path / "base"``."""
    return tiny.write_model(tmp_path / "base", tiny.model())


@pytest.fixture
def tiny_adapter(tmp_path: Path) -> Path:
    """The adapter ``tiny.adapter()``, with a licence and a card, in ``tmp_path / "sql"``."""
    folder = tiny.write_adapter(tmp_path / "sql", tiny.adapter())
    (folder / "README.md").write_text("---\nlicense: mit\n---\nA tiny adapter.\n")
    return folder


@pytest.fixture
def pushed(registry: loreg.Registry, tiny_base: Path, tiny_adapter: Path) -> loreg.Registry:
    """``registry`` with ``tiny_base`` as ``base``, ``tiny_adapter`` as ``sql``, and another adapter ``humor``."""
    registry.add_base(tiny_base, "base")
    registry.push(tiny_adapter, base="base", name="sql")
    humor = tiny.write_adapter(tiny_adapter.parent / "humor", tiny.adapter(seed=2, rank=3), use_rslora=True)
    registry.push(humor, base="base", name="humor")
    return registry
