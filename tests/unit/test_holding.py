"""What an engine was told of stays until it has let go, whatever is deleted, killed or full meanwhile."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import engine_servers
import pytest
import tiny
from click.testing import CliRunner
from engine_servers import VLLM, Engine, LoRAX, SGLang

import loreg
from loreg import serving
from loreg.cli import main
from loreg.errors import BadInput, CheckFailed, Conflict, RemoteError, Unsupported
from loreg.serving import pushing
from loreg.serving.beside import Holder
from loreg.serving.directories import Directories
from loreg.serving.pushing import held, push
from loreg.serving.resolving import Resolver

NAMED = {"vllm": VLLM, "sglang": SGLang}


@pytest.fixture
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    with engine_servers.serving((NAMED | {"lorax": LoRAX})[request.param]()) as running:
        running.kind = request.param
        yield running


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pushing, "_PAUSE", 0.01)


@pytest.fixture
def versions(pushed: loreg.Registry, tmp_path: Path) -> loreg.Registry:
    """``wide:v1`` and ``wide:v2``, which every engine takes."""
    for seed in (3, 4):
        adapter = tiny.write_adapter(tmp_path / f"wide{seed}", tiny.adapter(seed=seed, rank=8))
        pushed.push(adapter, base="base", name="wide")
    return pushed


def names(registry: loreg.Registry) -> list[str]:
    """Of the directories that are held, as often as they are."""
    return [str(hold.path) for hold in held(registry)]


def swept(registry: loreg.Registry) -> None:
    """As a cache does that allows nothing and spares nothing."""
    Directories(registry.home / "serving", limit=0, spared=0.0).sweep()


def there(registry: loreg.Registry) -> set[str]:
    return {path.name for path in (registry.home / "serving").iterdir() if path.is_dir() and path.name[0] != "."}


# ---- directories ----


def test_what_is_held_stays_and_counts(pushed: loreg.Registry, tmp_path: Path) -> None:
    resolver = Resolver(pushed, tmp_path / "cache", limit=0, spared=0.0)
    directories, holder = resolver.directories, Holder("vllm", "http://gpu1", "sql")
    resolver.directories.limit = None
    found = resolver.resolve("sql")
    name = found.path.name
    assert directories.hold(name, holder) and not directories.hold(name, holder)
    assert directories.hold(name, Holder("vllm", "http://gpu2", "sql"))
    directories.limit = 0
    assert directories.sweep() == found.nbytes
    statistics = resolver.statistics()
    assert (statistics.entries, statistics.nbytes, statistics.used, statistics.evictions) == (1, found.nbytes, 1, 0)
    assert [each.holder.url for each in directories.holds() if each.holder] == ["http://gpu1", "http://gpu2"]
    directories.release(name, holder)
    assert directories.sweep() == found.nbytes  # the other one
    directories.release(name, Holder("vllm", "http://gpu2", "sql"))
    directories.release(name, holder)  # nothing
    assert directories.sweep() == 0
    assert not list((tmp_path / "cache").iterdir())
    with pytest.raises(Conflict, match="deleted just now"):
        directories.hold(name, holder)


def test_what_was_held_counts_as_used_until_then(pushed: loreg.Registry) -> None:
    found, holder = serving.resolve("sql", pushed), Holder("vllm", "http://gpu1", "sql")
    Resolver.of(pushed).directories.hold(found.path.name, holder)
    os.utime(f"{found.path}.record", (1e9, 1e9))
    root = pushed.home / "serving"
    Directories(root).release(found.path.name, holder)
    Directories(root, limit=0).sweep()
    assert found.path.is_dir()


def test_one_that_is_held_during_a_sweep_stays(pushed: loreg.Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [serving.resolve(name, pushed).path for name in ("sql", "humor")]
    for path in paths:
        os.utime(f"{path}.record", (1e9, 1e9))
    real = Directories._delete

    def delete(self: Directories, name: str, used: float) -> bool:
        patch.undo()
        Directories(self.root)._write(self._hold(paths[0].name, Holder("vllm", "u", "sql")), b"", durable=True)
        return real(self, name, used)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Directories, "_delete", delete)
        swept(pushed)
    assert [path.is_dir() for path in paths] == [True, False]


def test_where_it_cannot_be_seen_what_is_held_nothing_is_deleted(
    pushed: loreg.Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = serving.resolve("sql", pushed).path

    def denied(*_: object) -> object:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    with monkeypatch.context() as patch:
        patch.setattr(Directories, "_holding", denied)
        with pytest.raises(CheckFailed, match="cannot be read"):
            held(pushed)
        here = Directories(pushed.home / "serving", limit=0, spared=0.0)
        used = Path(f"{path}.record").stat().st_mtime
        assert here.sweep() > 0 and not here._delete(path.name, used)
    assert path.is_dir()


@pytest.mark.parametrize("data", [b"", b"\x00" * 300, b"blake3:0\n{}", None])
def test_a_file_that_nobody_can_read_holds(pushed: loreg.Registry, data: bytes | None) -> None:
    path, holder = serving.resolve("sql", pushed).path, Holder("vllm", "http://gpu1", "sql")
    other = Holder.dump(holder).replace(b"gpu1", b"gpu2") if data is None else data
    with pytest.raises(BadInput):
        Holder.parse(other)
    Path(f"{path}.{holder.key}.hold").write_bytes(other)
    swept(pushed)
    (hold,) = held(pushed)
    assert (hold.path, hold.key, hold.holder) == (path, holder.key, None)
    assert path.is_dir()


# ---- pushes ----


@pytest.mark.parametrize("engine", NAMED, indirect=True)
def test_from_before_it_is_told_until_it_has_let_go(engine: Engine, versions: loreg.Registry) -> None:
    one, two = (serving.resolve(f"wide:v{n}", versions).path for n in (1, 2))
    seen: list[tuple[str, list[str]]] = []
    real = engine.post

    def post(path: str, body: dict[str, str], headers: object) -> object:
        seen.append((path.rpartition("/")[2], sorted(names(versions))))
        return real(path, body, headers)

    engine.post = post  # type: ignore[method-assign]
    push("wide:v1", engine.kind, engine.url, versions)
    assert seen == [("load_lora_adapter", [str(one)])]
    (hold,) = held(versions)
    assert hold.holder == Holder(engine.kind, engine.url, "wide") and time.time() - hold.since < 60
    swept(versions)
    assert there(versions) == {one.name}
    push("wide:v1", engine.kind, engine.url, versions)
    assert names(versions) == [str(one)]
    seen.clear()
    push("wide:v2", engine.kind, engine.url, versions)
    assert {told[0] for told in seen} >= {"load_lora_adapter"}
    assert all(told == sorted([str(one), str(two)]) for _, told in seen)
    assert names(versions) == [str(two)]
    push("wide:v1", engine.kind, engine.url, versions, name="other")
    assert sorted(names(versions)) == sorted([str(one), str(two)])
    push("wide", engine.kind, engine.url, versions, unload=True)
    assert names(versions) == [str(one)]
    push("wide", engine.kind, engine.url, versions, name="other", unload=True)
    assert names(versions) == []
    swept(versions)
    assert there(versions) == set()


@pytest.mark.parametrize("engine", NAMED, indirect=True)
def test_what_is_refused_is_not_held(engine: Engine, versions: loreg.Registry) -> None:
    push("wide:v1", engine.kind, engine.url, versions)
    before = names(versions)
    engine.problem = lambda path: None if path in before else "no"
    with pytest.raises(RemoteError, match="no"):
        push("wide:v2", engine.kind, engine.url, versions)
    assert names(versions) == before == list(engine.held.values())
    with pytest.raises(Conflict, match="base model"):
        push("wide:v2", engine.kind, engine.url, versions, name=engine_servers.BASE)
    assert names(versions) == before


@pytest.mark.parametrize("engine", NAMED, indirect=True)
def test_what_it_may_have_is_held(engine: Engine, versions: loreg.Registry) -> None:
    """Each answer to a load is lost, and then to everything."""
    engine.faults = [None, "lost", *["drop"] * 20]
    with pytest.raises(RemoteError, match="not reached"):
        push("wide:v1", engine.kind, engine.url, versions, retries=1)
    assert names(versions) == list(engine.held.values())
    swept(versions)
    engine.faults = []
    push("wide:v2", engine.kind, engine.url, versions)
    assert names(versions) == list(engine.held.values())


@pytest.mark.parametrize("engine", NAMED, indirect=True)
def test_who_was_told_nothing_holds_nothing(engine: Engine, versions: loreg.Registry) -> None:
    engine.faults = ["drop"] * 20
    with pytest.raises(RemoteError, match="not reached"):
        push("wide:v1", engine.kind, engine.url, versions, retries=1)
    assert names(versions) == []


@pytest.mark.parametrize("engine", ["lorax"], indirect=True)
def test_an_engine_without_names_holds_each_version_until_told(engine: Engine, versions: loreg.Registry) -> None:
    one, two = (push(f"wide:v{n}", "lorax", engine.url, versions) for n in (1, 2))
    assert sorted(names(versions)) == sorted([str(one.path), str(two.path)])
    assert push("wide:v2", "lorax", engine.url, versions, unload=True).action == "released"
    assert names(versions) == [one.path]
    with pytest.raises(Unsupported, match="cannot be told to unload"):
        push("wide:v2", "lorax", engine.url, versions, unload=True)
    push("wide:v2", "lorax", engine.url, versions)
    assert push("wide", "lorax", engine.url, versions, unload=True).action == "released"
    assert names(versions) == []
    push("wide:v1", "lorax", engine.url, versions)
    engine.problem = lambda path: "no"
    for reference in ("wide:v2", "wide:v1"):
        with pytest.raises(RemoteError, match="no"):
            push(reference, "lorax", engine.url, versions)
    assert names(versions) == [one.path]  # which it has from before
    push("wide", "lorax", engine.url, versions, unload=True)
    engine.faults = ["lost"] * 9
    with pytest.raises(RemoteError, match="not reached"):
        push("wide", "lorax", engine.url, versions)
    assert names(versions) == [two.path]


def test_of_an_engine_that_has_ended(versions: loreg.Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    with engine_servers.serving(VLLM()) as engine:
        push("wide:v1", "vllm", engine.url, versions)
        push("wide:v2", "vllm", engine.url, versions, name="other")
        engine.faults = ["hang"] * 9
        with pytest.raises(RemoteError, match=r"not reached|not done in time"):  # it may be alive
            push("wide", "vllm", engine.url, versions, unload=True, timeout=0.3)
        assert len(names(versions)) == 2
    monkeypatch.setenv("LOREG_HOME", str(versions.home))
    words = ["serve-push", "wide", "--engine", "vllm", "--url", engine.url, "--unload"]
    said = CliRunner().invoke(main, words)
    assert said.exit_code == 0, said.output
    assert said.stdout.startswith("wide is held no more; the engine was not told: it has ended")
    assert [hold.holder.name for hold in held(versions) if hold.holder] == ["other"]
    refused = CliRunner().invoke(main, words)
    assert refused.exit_code == 7 and "not reached" in refused.stderr
    done = push("wide", "vllm", engine.url, versions, name="other", unload=True, retries=0)
    assert (done.action, done.digest, done.path, done.request) == ("released", None, None, {})


def test_what_is_held_is_listed(versions: loreg.Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOREG_HOME", str(versions.home))
    assert CliRunner().invoke(main, ["held"]).stdout == "nothing is held\n"
    with engine_servers.serving(SGLang()) as engine:
        path = push("wide:v1", "sglang", engine.url, versions).path
        shown = CliRunner().invoke(main, ["held"]).stdout
        assert shown.startswith(f"wide  in sglang, {engine.url}, since ") and f"{path}." in shown
        (hold,) = json.loads(CliRunner().invoke(main, ["held", "--json"]).stdout)["held"]
        assert (hold["engine"], hold["url"], hold["name"]) == ("sglang", engine.url, "wide")
        assert (hold["directory"], hold["there"]) == (path, True)
        Path(hold["file"]).write_text("\x1b[31m")
        assert "does not name" in CliRunner().invoke(main, ["held"]).stdout
        push("wide", "sglang", engine.url, versions, unload=True)  # its file is known by its name
        assert names(versions) == []


# ---- faults ----


@pytest.mark.parametrize("step", ["open", "fsync", "replace"])
def test_no_room_to_record_it(versions: loreg.Registry, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = serving.resolve("wide", versions).path

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    real = {"open": Path.open, "replace": Path.replace}

    def for_holds(name: str) -> object:
        return lambda self, *a, **k: (full if self.suffix == ".hold" else real[name])(self, *a, **k)

    with engine_servers.serving(VLLM()) as engine:
        with monkeypatch.context() as patch:
            patch.setattr(*((os, "fsync", full) if step == "fsync" else (Path, step, for_holds(step))))
            with pytest.raises(CheckFailed, match=r"cannot be written: No space left.*free some space"):
                push("wide", "vllm", engine.url, versions)
        assert not engine.held and engine.asked == []
        assert held(versions) == [] and not list(path.parent.glob(".*"))
        assert push("wide", "vllm", engine.url, versions).action == "loaded"


@pytest.mark.parametrize("kind", NAMED)
def test_pushes_at_once(versions: loreg.Registry, kind: str) -> None:
    """Whatever comes last: what the engine has is held, and nothing else."""
    with engine_servers.serving(NAMED[kind]()) as engine:
        errors: list[BaseException] = []

        def work(reference: str) -> None:
            try:
                for _ in range(4):
                    push(reference, kind, engine.url, versions)
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=(f"wide:v{n}",)) for n in (1, 2, 1, 2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == []
        assert names(versions) == list(engine.held.values())


def test_another_push_is_waited_for_no_longer_than_there_is_time(versions: loreg.Registry) -> None:
    with engine_servers.serving(VLLM()) as engine:
        engine.faults = ["hang"]
        first = threading.Thread(target=push, args=("wide:v1", "vllm", engine.url, versions))
        first.start()
        while not engine.asked:
            time.sleep(0.01)
        with pytest.raises(Conflict, match="Another push to"):
            push("wide:v2", "vllm", engine.url, versions, timeout=0.3)
        first.join()
        assert names(versions) == list(engine.held.values())


def test_killed_between_the_record_and_the_answer(versions: loreg.Registry) -> None:
    with engine_servers.serving(VLLM()) as engine:
        engine.faults = [None, "hang"]
        words = ["serve-push", "wide:v1", "--engine", "vllm", "--url", engine.url, "--home", str(versions.home)]
        process = subprocess.Popen([sys.executable, "-m", "loreg.cli", *words])
        deadline = time.monotonic() + 60
        while len(engine.asked) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert [hold.holder.name for hold in held(versions) if hold.holder] == ["wide"]
        swept(versions)
        assert len(there(versions)) == 1
        two = push("wide:v2", "vllm", engine.url, versions)
        assert names(versions) == [two.path]
        assert not list((versions.home / "serving").glob(".*"))


def test_a_disk_without_room_is_no_reason_not_to_unload(
    versions: loreg.Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with engine_servers.serving(VLLM()) as engine:
        push("wide", "vllm", engine.url, versions)
        with monkeypatch.context() as patch:
            patch.setattr(Path, "mkdir", full)
            with pytest.raises(CheckFailed, match="cannot be made"):
                push("wide:v1", "vllm", engine.url, versions)
            assert push("wide", "vllm", engine.url, versions, unload=True).action == "unloaded"
        assert names(versions) == [] and engine.held == {}
