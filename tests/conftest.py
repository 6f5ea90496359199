from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# Before torch is loaded: tiny tensors gain nothing from a second thread, and wait for it where cores are busy.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A job in the background ignores Ctrl-C, and so would the commands that tests send it to.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
sys.path.insert(0, str(Path(__file__).parent))

import options
import s3_server
import tiny
from hub_server import hub

import loreg

__all__ = ["hub"]


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("loreg")
    group.addoption(
        "--nightly",
        action="store_true",
        help="Try ten times as many cases, and all of them where else a sample is taken: every call to a disk is "
        "spoiled. Takes hours; every timeout is ten times as long.",
    )
    group.addoption(
        "--need-servers",
        action="store_true",
        help="Fail where PostgreSQL or an S3 server cannot be had, rather than skip what needs it.",
    )


def pytest_configure(config: pytest.Config) -> None:
    # Before any module of tests is imported, in the workers of xdist too: counts are read then.
    options.nightly, options.need_servers = config.getoption("--nightly"), config.getoption("--need-servers")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items if options.nightly else ():
        own = item.get_closest_marker("timeout")
        usual = float(own.args[0] if own else config.getini("timeout"))
        item.add_marker(pytest.mark.timeout(10 * usual), append=False)


def pytest_unconfigure() -> None:
    s3_server.stop_all()


@pytest.fixture(params=["compiled", "torch"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both that can compute an edit on a CPU."""
    from loreg.algebra import native

    if request.param == "torch":
        monkeypatch.setattr(native, "library", None)
    elif native.library is None:
        pytest.skip("loreg was installed where there was no C compiler")
    return str(request.param)


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
