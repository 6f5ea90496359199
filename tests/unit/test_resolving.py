"""``serving.resolve``: what it promises to an engine, warm and cold, to many at once, and when something is wrong."""

from __future__ import annotations

import asyncio
import errno
import gc
import math
import os
import shutil
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny

import loreg
from loreg import serving
from loreg.digest import Digest
from loreg.errors import BadInput, BaseMismatch, CheckFailed, NotFound, RemoteError, Unsupported, UsageError
from loreg.format.fingerprint import Match
from loreg.registry.storage import Storage
from loreg.serving import directories, resolving
from loreg.serving.beside import Record
from loreg.serving.directories import Directories
from loreg.serving.flights import Flights
from loreg.serving.resolving import Resolver


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are old enough to be told from changed ones, though they were written just now."""
    monkeypatch.setattr(loreg.checkpoint, "_SETTLED_NS", 0)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is asked of the catalog, and hashed."""
    calls: list[str] = []

    def count(owner: object, name: str) -> None:
        real = getattr(owner, name)

        def counting(*given: object, **named: object) -> object:
            calls.append(name)
            return real(*given, **named)

        monkeypatch.setattr(owner, name, counting)

    count(loreg.Registry, "find")
    count(Storage, "found")
    return calls


# ---- warm ----


def test_a_warm_call_asks_and_hashes_nothing(pushed: loreg.Registry, settled: None, counted: list[str]) -> None:
    first = serving.resolve("sql", pushed)
    assert serving.resolve("sql", pushed) == first
    counted.clear()
    assert serving.resolve("sql", pushed) == first
    assert counted == []


def test_a_commit_of_another_process_is_seen_at_once(
    pushed: loreg.Registry, settled: None, tmp_path: Path, counted: list[str]
) -> None:
    before = serving.resolve("sql", pushed)
    other = tiny.write_adapter(tmp_path / "other", tiny.adapter(seed=9))
    with loreg.open(pushed.home) as another:
        version = another.push(other, base="base", name="sql")
    after = serving.resolve("sql", pushed)
    assert after.digest == version.digest != before.digest


def test_its_own_commit_is_seen_too(pushed: loreg.Registry, settled: None) -> None:
    pushed.tag("sql", "prod")
    serving.resolve("sql:prod", pushed)
    pushed.tag("sql:v1", "other")
    assert serving.resolve("sql:other", pushed) == serving.resolve("sql:prod", pushed)
    pushed.compose("2*sql", "sql2")
    assert serving.resolve("sql2", pushed).digest == pushed.resolve("sql2").digest


def test_a_catalog_that_was_put_in_place_of_another_is_seen(
    pushed: loreg.Registry, settled: None, tmp_path: Path
) -> None:
    """By its inode: the connection that looks for changes would look at the old file for ever."""
    pushed.tag("sql", "prod")
    serving.resolve("sql:prod", pushed)
    stamp = pushed.database.stamp()
    assert pushed.database.stamp() == stamp
    path = pushed.home / "catalog.db"
    copy = tmp_path / "copy.db"
    copy.write_bytes(path.read_bytes())
    copy.replace(path)
    assert pushed.database.stamp() != stamp


def test_a_changed_file_is_seen_at_once(pushed: loreg.Registry, settled: None) -> None:
    found = serving.resolve("sql", pushed)
    assert serving.resolve("sql", pushed) == found
    file = found.path / "adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.chmod(0o644)
    file.write_bytes(data)
    with pytest.raises(BadInput, match="damaged"):
        serving.resolve("sql", pushed)
    assert file.read_bytes() == data  # for whoever wants to look


@pytest.mark.parametrize("what", ["file", "directory", "record"])
def test_what_was_deleted(pushed: loreg.Registry, settled: None, what: str) -> None:
    found = serving.resolve("sql", pushed)
    assert serving.resolve("sql", pushed) == found
    if what == "file":
        (found.path / "adapter_config.json").unlink()
        with pytest.raises(BadInput, match=r"adapter_config\.json is damaged"):
            serving.resolve("sql", pushed)
        return
    if what == "directory":
        for file in found.path.iterdir():
            file.unlink()
        found.path.rmdir()
    else:
        found.path.with_name(found.path.name + ".record").unlink()
    assert serving.resolve("sql", pushed) == found
    assert (found.path / "adapter_config.json").is_file()


def test_strict_hashes_each_time(pushed: loreg.Registry, settled: None, counted: list[str]) -> None:
    with loreg.open(pushed.home, strict=True) as strict:
        serving.resolve("sql", strict)
        serving.resolve("sql", strict)
        counted.clear()
        found = serving.resolve("sql", strict)
    assert counted.count("found") == len(list(found.path.iterdir()))


def test_a_record_with_a_flipped_bit_says_nothing(pushed: loreg.Registry) -> None:
    found = serving.resolve("sql", pushed)
    path = found.path.with_name(found.path.name + ".record")
    whole = path.read_bytes()
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 4
        with pytest.raises(BadInput):
            Record.parse(bytes(damaged))
    path.write_bytes(bytes(damaged))
    assert serving.resolve("sql", pushed) == found  # compared with the store
    assert path.read_bytes() == whole


def test_a_link_in_place_of_a_file_is_refused(pushed: loreg.Registry, settled: None, tmp_path: Path) -> None:
    """Also where it leads to the same bytes: a path is always inside."""
    found = serving.resolve("sql", pushed)
    file = found.path / "adapter_config.json"
    (tmp_path / "away").write_bytes(file.read_bytes())
    file.unlink()
    file.symlink_to(tmp_path / "away")
    with pytest.raises(BadInput, match="damaged"):
        serving.resolve("sql", pushed)


# ---- many at once ----


def test_many_callers_make_one_directory(pushed: loreg.Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    real = Directories.make

    def make(self: Directories, name: str, *given: object) -> Record:
        made.append(name)
        time.sleep(0.05)
        return real(self, name, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(Directories, "make", make)
    results: list[serving.Resolved] = []
    threads = [threading.Thread(target=lambda: results.append(serving.resolve("sql", pushed))) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1 and len(results) == 16 and len(set(results)) == 1


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Blobs that come when this is set."""
    go = threading.Event()
    real = resolving._FORMS["peft"][1]

    def late(*given: object) -> object:
        go.wait(20)
        return real(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(resolving, "_FORMS", {**resolving._FORMS, "peft": ("", late)})
    yield go
    go.set()


def test_a_timeout_ends_the_wait_and_not_the_work(pushed: loreg.Registry, slow: threading.Event) -> None:
    with pytest.raises(RemoteError, match=r"sql was not ready within 0\.05 s"):
        serving.resolve("sql", pushed, timeout=0.05)
    with pytest.raises(RemoteError, match="still being made"):
        serving.resolve("sql", pushed, timeout=0)
    slow.set()
    found = serving.resolve("sql", pushed, timeout=20)
    assert found.path.is_dir()


def test_an_error_is_everybodys_and_the_next_one_tries_again(
    pushed: loreg.Registry, slow: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> object:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(directories, "sync_tree", full)
    errors: list[BaseException] = []

    def call() -> None:
        try:
            serving.resolve("sql", pushed)
        except CheckFailed as error:
            errors.append(error)

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(0.1)
    slow.set()
    for thread in threads:
        thread.join()
    assert len(errors) == 4 and "No space left" in str(errors[0])
    assert not [path for path in (pushed.home / "serving").iterdir() if path.is_dir()]
    monkeypatch.undo()
    assert serving.resolve("sql", pushed).path.is_dir()


def test_the_async_twin_lets_the_loop_go_on(pushed: loreg.Registry, slow: threading.Event) -> None:
    async def main() -> tuple[serving.Resolved, int]:
        task = asyncio.ensure_future(serving.resolve_async("sql", pushed))
        turns = 0
        while not task.done():
            await asyncio.sleep(0.001)
            turns += 1
            if turns == 20:
                slow.set()
        return await task, turns

    found, turns = asyncio.run(main())
    assert turns >= 20 and found == serving.resolve("sql", pushed)


# ---- what is refused ----


def test_a_version_that_is_too_large_writes_nothing(pushed: loreg.Registry) -> None:
    with pytest.raises(CheckFailed, match=r"sql:v1 has [\d,]+ bytes, and 100 at most"):
        serving.resolve("sql", pushed, max_bytes=100)
    assert not (pushed.home / "serving").exists()
    size = serving.resolve("sql", pushed).nbytes
    assert serving.resolve("sql", pushed, max_bytes=size).nbytes == size
    with pytest.raises(CheckFailed, match=f"{size - 1:,} at most"):
        serving.resolve("sql", pushed, max_bytes=size - 1)


@pytest.mark.parametrize(
    "given", [{"form": "onnx"}, {"timeout": -1.0}, {"timeout": math.nan}, {"max_bytes": -1}, {"max_bytes": math.nan}]
)
def test_what_makes_no_sense(pushed: loreg.Registry, given: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        serving.resolve("sql", pushed, **given)  # type: ignore[arg-type]


@pytest.mark.parametrize("reference", ["../../etc", "sql@blake3:../..", "/etc/passwd", "sql\0", "x" * 10_000, ""])
def test_no_name_leaves_the_cache(pushed: loreg.Registry, reference: str) -> None:
    with pytest.raises((UsageError, NotFound)):
        serving.resolve(reference, pushed)


def test_a_removed_version_is_not_found_and_its_directory_stays(pushed: loreg.Registry, settled: None) -> None:
    found = serving.resolve("sql", pushed)
    serving.resolve("sql", pushed)
    pushed.remove("sql:v1")
    with pytest.raises(NotFound):
        serving.resolve("sql", pushed)
    with pytest.raises(NotFound):
        serving.resolve(f"sql@{found.digest}", pushed)
    assert found.path.is_dir()


def test_a_corrupt_blob_is_named_and_nothing_is_served(pushed: loreg.Registry) -> None:
    blob = pushed.resolve("sql").manifest.blob("factors")
    assert blob is not None
    path = pushed.storage.path(blob.digest)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)
    with pytest.raises(BadInput, match=r"corrupt.*sql:v1"):
        serving.resolve("sql", pushed)
    assert not [one for one in (pushed.home / "serving").iterdir() if one.is_dir()]


def test_the_registry_is_gone(pushed: loreg.Registry, settled: None, tmp_path: Path) -> None:
    serving.resolve("sql", pushed)
    serving.resolve("sql", pushed)
    (pushed.home / "catalog.db").rename(tmp_path / "catalog.db")
    pushed.database._engine.dispose()  # a connection that is open goes on with the file that is gone
    with pytest.raises(loreg.LoregError, match=r"catalog\.db"):
        serving.resolve("sql", pushed)


# ---- the base ----


def _other_base(folder: Path) -> Path:
    return tiny.write_model(folder, tiny.model(seed=77))


def test_the_base_that_is_served(pushed: loreg.Registry, tmp_path: Path, settled: None, counted: list[str]) -> None:
    root = pushed.show_base("base").manifest.identity.weights_root
    for base in ("base", tmp_path / "base", str(tmp_path / "base"), root):
        assert serving.resolve("sql", pushed, base=base) == serving.resolve("sql", pushed)
    counted.clear()
    serving.resolve("sql", pushed, base="base")
    serving.resolve("sql", pushed, base=tmp_path / "base")
    assert counted == []
    other = _other_base(tmp_path / "other")
    with pytest.raises(BaseMismatch, match=r"sql:v1 was trained on 'base', and .*other differs .* tensors"):
        serving.resolve("sql", pushed, base=other)
    with pytest.raises(BaseMismatch, match="not registered"):
        serving.resolve("sql", pushed, base=Digest.of(b"another"))
    with pytest.raises(NotFound, match="did you mean base"):
        serving.resolve("sql", pushed, base="./bases")


def test_the_levels_of_a_match(pushed: loreg.Registry, tmp_path: Path) -> None:
    assert serving.check_base("sql", "base", pushed) == serving.Fit(Match.WEIGHTS)
    other = _other_base(tmp_path / "other")
    found = serving.check_base("sql", other, pushed)
    assert found.match is Match.STRUCTURE and not found.holds
    assert set(found.differing) == set(pushed.resolve("sql").manifest.base.touched)


# ---- the limit ----


@pytest.fixture
def many(pushed: loreg.Registry, tmp_path: Path) -> list[str]:
    for seed in range(3, 7):
        pushed.push(tiny.write_adapter(tmp_path / f"a{seed}", tiny.adapter(seed=seed)), base="base", name=f"a{seed}")
    return [f"a{seed}" for seed in range(3, 7)]


def _there(resolver: Resolver) -> set[str]:
    return {path.name for path in resolver.directories.root.iterdir() if path.is_dir()}


def test_the_least_recently_used_leave(
    pushed: loreg.Registry, many: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(directories, "_NOTED", 0.0)
    size = serving.resolve(many[0], pushed).nbytes
    resolver = Resolver(pushed, tmp_path / "cache", limit=2 * size + size // 2, spared=0.0)
    names = {name: resolver.resolve(name).digest.hex for name in many[:2]}
    time.sleep(0.02)
    resolver.resolve(many[0])  # used again
    time.sleep(0.02)
    names[many[2]] = resolver.resolve(many[2]).digest.hex
    assert _there(resolver) == {names[many[0]], names[many[2]]}
    assert resolver.directories.evicted == 1
    assert not [path for path in resolver.directories.root.iterdir() if path.name.startswith(".")]
    assert resolver.resolve(many[1]).path.is_dir()


def test_what_is_pinned_or_was_just_handed_out_stays(pushed: loreg.Registry, many: list[str], tmp_path: Path) -> None:
    size = serving.resolve(many[0], pushed).nbytes
    spared = Resolver(pushed, tmp_path / "spared", limit=size)
    for name in many:
        spared.resolve(name)
    assert len(_there(spared)) == len(many)
    resolver = Resolver(pushed, tmp_path / "cache", limit=size, spared=0.0)
    other = Resolver(pushed, tmp_path / "cache", limit=size, spared=0.0)  # as another process would
    with other.directories.pinned(other.resolve(many[0]).path.name) as path:
        for name in many[1:]:
            resolver.resolve(name)
        assert path.is_dir()
        assert _there(resolver) == {path.name, resolver.resolve(many[-1]).path.name}
    resolver.directories.sweep()
    assert not path.is_dir()


# ---- forms ----


def test_the_folded_form_is_a_directory_of_its_own(pushed: loreg.Registry, settled: None) -> None:
    plain, folded = serving.resolve("sql", pushed), serving.resolve("sql", pushed, form="folded")
    assert folded.path.name == f"{plain.path.name}-folded"
    assert folded.digest == plain.digest and folded.path != plain.path
    assert serving.resolve("sql", pushed, form="folded") == folded


def test_a_version_without_that_form_leaves_nothing(pushed: loreg.Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> object:
        raise Unsupported("no such form.")
        yield

    monkeypatch.setattr(resolving, "_FORMS", {**resolving._FORMS, "folded": ("-folded", none)})
    with pytest.raises(Unsupported):
        serving.resolve("sql", pushed, form="folded")
    assert list((pushed.home / "serving").iterdir()) == []


def test_what_the_folded_form_leaves_out_is_not_counted(
    pushed: loreg.Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A module that was saved as the base has it may be larger than all factors."""
    norm = tiny.model()[tiny.NORM]
    saved = tiny.write_adapter(tmp_path / "a", tiny.adapter(), full={tiny.NORM: norm}, modules_to_save=["norm"])
    version = pushed.push(saved, base="base", name="saved")
    blobs = {blob.role: blob.size for blob in version.manifest.blobs}
    assert blobs["full"] and not version.manifest.replaced()
    real = resolving.Resolver._refuse_large
    sizes: list[int] = []

    def refuse(self: Resolver, row: object, nbytes: int, limit: int | None) -> None:
        sizes.append(nbytes)
        real(self, row, nbytes, limit)  # type: ignore[arg-type]

    monkeypatch.setattr(Resolver, "_refuse_large", refuse)
    serving.resolve("saved", pushed, form="folded")
    assert sizes[0] == blobs["factors"]
    sizes.clear()
    serving.resolve("saved", pushed)
    assert sizes[0] == blobs["factors"] + blobs["full"]


# ---- what goes wrong between two ----


def test_a_registry_that_nobody_has_any_more_leaves_nothing(pushed: loreg.Registry) -> None:
    with loreg.open(pushed.home) as opened:
        serving.resolve("sql", opened)
        assert Resolver.of(opened) is Resolver.of(opened)
        gone = weakref.ref(opened)
    del opened
    gc.collect()
    assert gone() is None


def test_ctrl_c_ends_the_one_that_it_was_for() -> None:
    flights, go, inside = Flights[int](), threading.Event(), threading.Event()
    found: list[object] = []

    def interrupted() -> int:
        inside.set()
        go.wait(20)
        raise KeyboardInterrupt

    def call(work: object) -> None:
        try:
            found.append(flights.run("key", work, None, "it"))  # type: ignore[arg-type]
        except BaseException as error:
            found.append(type(error))

    first = threading.Thread(target=call, args=(interrupted,))
    first.start()
    inside.wait()
    others = [threading.Thread(target=call, args=(lambda: 7,)) for _ in range(3)]
    for other in others:
        other.start()
    time.sleep(0.1)
    go.set()
    for thread in (first, *others):
        thread.join()
    assert sorted(map(str, found)) == ["7", "7", "7", str(KeyboardInterrupt)]


def test_where_no_thread_can_be_begun_nobody_waits_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    flights = Flights[int]()

    def none(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", none)
        with pytest.raises(CheckFailed, match="it cannot be made in a thread of its own: can't start"):
            flights.run("key", lambda: 1, 5.0, "it")
    assert flights.run("key", lambda: 2, 5.0, "it") == 2


@pytest.mark.parametrize("timeout", [math.inf, 1e300])
def test_any_number_of_seconds(pushed: loreg.Registry, timeout: float) -> None:
    assert serving.resolve("sql", pushed, timeout=timeout).path.is_dir()


def test_who_waited_for_one_that_failed_makes_it(
    pushed: loreg.Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two processes: to the second nobody has written anything meanwhile."""
    inside, go = threading.Event(), threading.Event()
    real, found = directories.sync_tree, list[object]()

    def full_once(folder: Path) -> None:
        if not inside.is_set():
            inside.set()
            go.wait(20)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(folder)

    def call() -> None:
        try:
            found.append(Resolver(pushed, tmp_path / "cache").resolve("sql").path.is_dir())
        except loreg.LoregError as error:
            found.append(type(error))

    monkeypatch.setattr(directories, "sync_tree", full_once)
    threads = [threading.Thread(target=call) for _ in range(2)]
    threads[0].start()
    inside.wait()
    threads[1].start()
    time.sleep(0.2)
    go.set()
    for thread in threads:
        thread.join()
    assert found == [CheckFailed, True]


def test_another_versions_directory_under_its_name_is_not_served(pushed: loreg.Registry, settled: None) -> None:
    """Whole as it is, with its record."""
    sql, humor = serving.resolve("sql", pushed).path, serving.resolve("humor", pushed).path
    shutil.rmtree(sql)
    shutil.copytree(humor, sql)
    shutil.copy(f"{humor}.record", f"{sql}.record")
    with loreg.open(pushed.home) as fresh, pytest.raises(BadInput, match="damaged"):
        serving.resolve("sql", fresh)


def test_one_that_is_handed_out_during_a_sweep_stays(
    pushed: loreg.Registry, tmp_path: Path, settled: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, other = Resolver(pushed, tmp_path / "cache"), Resolver(pushed, tmp_path / "cache", limit=1)
    paths = [first.resolve(name).path for name in ("sql", "humor")]
    for path in paths:
        os.utime(f"{path}.record", (1e9, 1e9))
    real = Directories._delete

    def delete(self: Directories, name: str, used: float) -> bool:
        patch.undo()
        assert Resolver(pushed, tmp_path / "cache").resolve("sql").path == paths[0]  # as another process would
        return real(self, name, used)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Directories, "_delete", delete)
        other.directories.sweep()
    assert [path.is_dir() for path in paths] == [True, False]


def test_a_use_counts_until_spared_seconds_after_it(pushed: loreg.Registry, tmp_path: Path, settled: None) -> None:
    """Also one that was not noted, as an earlier one had been."""
    resolver = Resolver(pushed, tmp_path / "cache", limit=1 << 20, spared=30.0)
    resolver.resolve("sql")
    path = resolver.resolve("sql").path
    resolver.directories.limit = 0
    for ago, stays in ((31.0, True), (59.0, True), (61.0, False)):
        os.utime(f"{path}.record", (time.time() - ago,) * 2)
        resolver.directories.sweep()
        assert path.is_dir() is stays


def test_what_a_killed_sweep_left_is_deleted_by_the_next(
    pushed: loreg.Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolver = Resolver(pushed, tmp_path / "cache", limit=1 << 20, spared=0.0)
    resolver.resolve("sql")
    resolver.directories.limit = 0

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            resolver.directories.sweep()
    assert list((tmp_path / "cache").iterdir())
    resolver.directories.sweep()
    assert not list((tmp_path / "cache").iterdir())
