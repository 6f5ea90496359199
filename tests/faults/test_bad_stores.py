"""Places that are no good, and what people and machines do to one that was: a typed error says so, or it works, and
nothing is lost either way."""

from __future__ import annotations

import os
import resource
import shutil
import sqlite3
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import tiny
from click.testing import CliRunner
from sqlalchemy import text

import loreg
from loreg.cli import main
from loreg.digest import Digest
from loreg.errors import BadInput, CheckFailed, Conflict, LoregError, NotFound, UsageError
from loreg.registry import collecting, storage, versions
from loreg.store import BlobKey, new_generation

YEAR = timedelta(days=365)


def _whole(home: Path, **where: str) -> None:
    """What was acknowledged is there, and reads back."""
    with loreg.open(home, **where) as registry:
        found = registry.fsck()
        assert found.ok, found.problems
        assert registry.resolve("sql").number == 1 and registry.resolve("humor").number == 1


def _command(*words: object, home: Path, **environment: str) -> tuple[int, str]:
    """The exit code of a command, and what it says."""
    done = CliRunner().invoke(main, [*map(str, words), "--home", str(home)], env=environment)
    assert "Traceback" not in done.stderr
    return done.exit_code, " ".join(done.stderr.split())


@contextmanager
def _seconds(most: int) -> Iterator[None]:
    """What would wait for ever fails instead."""
    import faulthandler

    faulthandler.dump_traceback_later(most, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


@contextmanager
def _read_only(folder: Path) -> Iterator[None]:
    """chmod does not stop root; a mount does."""
    try:
        bound = subprocess.run(["mount", "--bind", folder, folder], capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no mount(8) here")
    if bound.returncode:
        pytest.skip(f"a directory cannot be mounted on itself: {bound.stderr.strip()}")
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=True, capture_output=True)
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.fixture
def elsewhere(pushed: loreg.Registry, tmp_path: Path) -> Path:
    """The store of ``pushed``, apart from its catalog."""
    (tmp_path / "store").mkdir()
    for name in ("blobs", "ledger", "store.json", "tmp"):
        shutil.move(pushed.home / name, tmp_path / "store" / name)
    return tmp_path / "store"


@pytest.fixture
def third(tmp_path: Path) -> Path:
    return tiny.write_adapter(tmp_path / "third", tiny.adapter(seed=9))


# --- the place ------------------------------------------------------------------------------------------


def test_a_store_that_is_a_file(pushed: loreg.Registry, tmp_path: Path, third: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"somebody's")
    with loreg.open(pushed.home, store=f"file://{file}") as registry:
        calls: list[Callable[[], object]] = [
            lambda: registry.resolve("sql"),
            lambda: registry.export("sql", tmp_path / "out"),
            lambda: registry.push(third, base="base"),
            lambda: registry.fsck(),
            lambda: registry.collect(),
        ]
        for call in calls:
            with pytest.raises(UsageError, match=r"Not a directory at .*file; choose a writable directory"):
                call()
    code, said = _command("show", "sql", home=pushed.home, LOREG_STORE=f"file://{file}")
    assert code == UsageError.exit_code and "Not a directory" in said
    assert file.read_bytes() == b"somebody's"
    _whole(pushed.home)


def test_a_home_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"somebody's")
    with pytest.raises(UsageError, match="Not a directory; choose another place"):
        loreg.open(tmp_path / "file")
    assert _command("ls", home=tmp_path / "file")[0] == UsageError.exit_code


def test_a_store_that_is_read_only(pushed: loreg.Registry, elsewhere: Path, tmp_path: Path, third: Path) -> None:
    where = {"store": f"file://{elsewhere}"}
    with _read_only(elsewhere), loreg.open(pushed.home, **where) as registry:
        assert registry.resolve("sql").number == 1
        assert tiny.files_in(registry.export("sql", tmp_path / "out"))
        registry.merge("sql + humor", tmp_path / "merged", verify="exact")
        assert registry.fsck(repair=True).ok
        with pytest.raises(UsageError, match="Read-only file system"):
            registry.tag("sql", "prod")
        assert "prod" not in registry.tags("sql")
        with pytest.raises(UsageError, match=r"Read-only file system.*choose a writable directory"):
            registry.push(third, base="base")
        with pytest.raises(UsageError, match="Read-only file system"):
            registry.remove("humor")
        assert registry.resolve("humor").number == 1
        with pytest.raises(UsageError, match="Read-only file system"):
            registry.collect(grace=timedelta())
        code, said = _command("push", third, "--base", "base", home=pushed.home, LOREG_STORE=where["store"])
        assert code == UsageError.exit_code and "Read-only" in said
    with loreg.open(pushed.home, **where) as registry:
        registry.remove("humor")
        assert registry.collect(grace=timedelta()).copies
        registry.push(tmp_path / "humor", base="base", name="humor")
        assert registry.fsck().ok and registry.resolve("humor").number == 2


def test_damage_in_a_read_only_store(pushed: loreg.Registry, elsewhere: Path) -> None:
    key = pushed.storage.key(pushed.find("sql").digest)
    path = elsewhere / key.location
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[::-1])
    with _read_only(elsewhere), loreg.open(pushed.home, store=f"file://{elsewhere}") as registry:
        with pytest.raises(BadInput, match="is corrupt: its bytes hash to"):
            registry.resolve("sql")
        assert registry.resolve("humor").number == 1
    assert path.exists()


def test_a_catalog_that_is_read_only(pushed: loreg.Registry) -> None:
    """SQLite's log needs to be written by those who read, too."""
    pushed.close()
    with _read_only(pushed.home), pytest.raises(UsageError, match="make it writable, or choose another"):
        loreg.open(pushed.home)
    _whole(pushed.home)


def test_somebody_elses_directory(pushed: loreg.Registry, tmp_path: Path) -> None:
    store, home = pushed.storage.store, pushed.home
    digest = Digest.of(b"x")
    key = BlobKey(digest, new_generation())
    others = {
        "blobs/notes.txt": b"1",
        f"blobs/{digest.hex[:2]}/notes.txt": b"2",
        f"blobs/{digest.hex[:2]}/{digest.hex}": b"3",
        f"blobs/{digest.hex[:2]}/{key.name}.bak": b"4",
        f"blobs/{digest.hex[:2]}/{key.name.upper()}": b"5",
        f"blobs/somewhere/{key.name}": b"6",
        f"blobs/{digest.hex[:2]}/{key.name}/inside": b"7",
        "tmp/work.txt": b"8",
        f"tmp/{key.name}": b"9",
        "quarantine/mine": b"10",
        "photo.jpg": b"11",
        ".git/config": b"12",
    }
    for name, data in others.items():
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_bytes(data)
    before = set(store.keys())
    pushed.remove("humor")
    assert pushed.collect(grace=timedelta()).copies
    assert pushed.collect(grace=timedelta()).unfinished == ()
    assert set(store.keys()) < before
    assert {name: (home / name).read_bytes() for name in others} == others
    assert pushed.fsck(repair=True).ok
    assert {name: (home / name).read_bytes() for name in others} == others


ODD_NAMES = [
    "a b",
    'it\'s "so"',
    "per%20cent%",
    "hash#query?x=1&y",
    "new\nline",
    "tab\t",
    "naïve",
    os.fsdecode(b"\xff\xfe"),
    "x" * 200,
]


@pytest.mark.parametrize("name", ODD_NAMES, ids=ascii)
def test_paths_of_any_bytes(tmp_path: Path, tiny_base: Path, tiny_adapter: Path, name: str) -> None:
    home = tmp_path / name / "home"
    with loreg.open(home) as registry:
        registry.push(tiny_adapter, base=tiny_base, name="sql")
        assert tiny.files_in(registry.export("sql", tmp_path / name / "out")) == tiny.files_in(tiny_adapter)
        assert registry.fsck().ok and registry.collect().copies == ()
    with loreg.open(tmp_path / "other", catalog=str(home / "catalog.db"), store=f"file://{home}") as registry:
        assert registry.resolve("sql").number == 1
    assert _command("show", "nobody", home=home)[0] == NotFound.exit_code
    next((home / "blobs").glob("*/*")).unlink()
    code, _ = _command("fsck", home=home)
    assert code == CheckFailed.exit_code


def test_a_path_that_is_too_long(tmp_path: Path) -> None:
    home = tmp_path.joinpath(*["y" * 200] * 25)
    with pytest.raises(UsageError, match="File name too long"):
        loreg.open(home)
    assert _command("ls", home=home)[0] == UsageError.exit_code


# --- the catalog ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: b"",
        lambda data: bytes(len(data)),
        lambda data: data[:100],
        lambda data: data[:4096],
        lambda data: data[: len(data) // 2],
        lambda data: b"no catalog " * 1000,
        lambda data: data[:16] + bytes(4096) + data[4112:],
    ],
    ids=["empty", "zeros", "100 bytes", "a page", "half", "text", "a first page of zeros"],
)
def test_a_catalog_that_is_none(pushed: loreg.Registry, spoil: Callable[[bytes], bytes]) -> None:
    """Taken for a new one, the next collection would delete every blob."""
    pushed.close()
    catalog, blobs = pushed.home / "catalog.db", tiny.files_in(pushed.home / "blobs")
    with closing(sqlite3.connect(catalog)) as raw:
        raw.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    whole = catalog.read_bytes()
    spoiled = spoil(whole)
    catalog.write_bytes(spoiled)
    for call in (loreg.open, lambda home: loreg.open(home).collect(grace=timedelta())):
        with pytest.raises(BadInput, match="restore a backup"):
            call(pushed.home)
    for words in (["gc", "--grace", "0"], ["ls"], ["fsck"], ["fsck", "--rebuild-catalog"]):
        code, said = _command(*words, home=pushed.home)
        assert code == BadInput.exit_code
        assert "or move it away, with the files -wal and -shm beside it, and make it again from the store" in said
    assert catalog.read_bytes() == spoiled and tiny.files_in(pushed.home / "blobs") == blobs
    catalog.write_bytes(whole)
    _whole(pushed.home)
    catalog.write_bytes(spoiled)
    for suffix in ("", "-wal", "-shm"):  # as it says
        if (moved := pushed.home / f"catalog.db{suffix}").exists():
            moved.rename(pushed.home / f"moved{suffix}")
    assert _command("fsck", "--rebuild-catalog", home=pushed.home)[0] == 0
    _whole(pushed.home)


def test_a_log_without_its_catalog(pushed: loreg.Registry) -> None:
    pushed.close()
    (pushed.home / "catalog.db").rename(pushed.home / "moved")
    (log := pushed.home / "catalog.db-wal").write_bytes(b"of another one" * 1000)
    for words in (["ls"], ["fsck", "--rebuild-catalog"]):
        code, said = _command(*words, home=pushed.home)
        assert (
            code == BadInput.exit_code and "or move the log away, and make the catalog again from the store" in said
        )
    log.unlink()
    assert _command("fsck", "--rebuild-catalog", home=pushed.home)[0] == 0
    _whole(pushed.home)


def test_a_catalog_from_the_future(pushed: loreg.Registry) -> None:
    pushed.close()
    with closing(sqlite3.connect(pushed.home / "catalog.db", isolation_level=None)) as raw:
        raw.execute("UPDATE alembic_version SET version_num = '9999'")
        with pytest.raises(BadInput, match=r"revision 9999.*upgrade loreg"):
            loreg.open(pushed.home)
        assert _command("gc", home=pushed.home)[0] == BadInput.exit_code
        raw.execute("UPDATE alembic_version SET version_num = ?", (loreg.catalog.HEAD,))
    _whole(pushed.home)


# --- names ----------------------------------------------------------------------------------------------


def test_a_name_that_differs_only_by_case(pushed: loreg.Registry, third: Path) -> None:
    for call in (
        lambda: pushed.push(third, base="base", name="SQL"),
        lambda: pushed.resolve("SQL"),
        lambda: pushed.resolve("sql:PROD"),
        lambda: pushed.tag("sql", "Prod"),
        lambda: pushed.add_base(third.parent / "base", "BASE"),
        lambda: pushed.log("Sql"),
    ):
        with pytest.raises(UsageError, match="lower-case letters"):
            call()
    for statement in (
        "UPDATE adapters SET name = 'SQL' WHERE name = 'sql'",
        "UPDATE bases SET name = 'Base'",
        "UPDATE tags SET name = 'Latest'",
    ):
        with pytest.raises(UsageError, match="malformed"), pushed.database.write() as session:
            session.execute(text(statement))
    assert _command("push", third, "--base", "base", "--name", "SQL", home=pushed.home)[0] == UsageError.exit_code
    assert (
        pushed.push(third.rename(third.parent / "SQL"), base="base").name == "sql"
    )  # of the directory, in lower case
    assert [row.number for row in pushed.log("sql")[0]] == [1, 2]


# --- clocks ---------------------------------------------------------------------------------------------


@contextmanager
def _clock(offset: timedelta) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for module in (storage, collecting, versions):
            patch.setattr(module, "utcnow", lambda: datetime.now(UTC) + offset)
        yield


CLOCKS = {"a year behind": -YEAR, "right": timedelta(), "a year ahead": YEAR}


@pytest.mark.parametrize("mine", CLOCKS)
@pytest.mark.parametrize("theirs", CLOCKS)
def test_a_push_beside_a_collection_by_another_clock(
    pushed: loreg.Registry, third: Path, monkeypatch: pytest.MonkeyPatch, mine: str, theirs: str
) -> None:
    """At worst it is fenced, where the collector's clock says that its lease is over; then it is made again."""
    ensure = storage.Storage._ensure

    def ensure_and_collect(self: storage.Storage, blob: storage.PendingBlob, row: storage.Blob | None) -> str | None:
        generation = ensure(self, blob, row)
        with _clock(CLOCKS[theirs]), loreg.open(pushed.home) as other:
            other.collect(grace=timedelta())
        return generation

    fenced = CLOCKS[theirs] > CLOCKS[mine]
    with _clock(CLOCKS[mine]):
        with monkeypatch.context() as patch:
            patch.setattr(storage.Storage, "_ensure", ensure_and_collect)
            if fenced:
                with pytest.raises(Conflict, match="lease"):
                    pushed.push(third, base="base")
            else:
                assert pushed.push(third, base="base").number == 1
        assert fenced == (not pushed.list_versions(query="third"))
        assert pushed.push(third, base="base").number == 1
    for offset in CLOCKS.values():
        with _clock(offset):
            pushed.collect(grace=timedelta())
    _whole(pushed.home)
    assert pushed.resolve("third").number == 1


@pytest.mark.parametrize("jump", [YEAR, -YEAR])
def test_a_clock_that_jumps_during_a_push(
    pushed: loreg.Registry, third: Path, monkeypatch: pytest.MonkeyPatch, jump: timedelta
) -> None:
    """Ahead it ends the lease, and the push is fenced; back it prolongs it."""
    started = iter([timedelta()])
    monkeypatch.setattr(storage, "utcnow", lambda: datetime.now(UTC) + next(started, jump))
    if jump > timedelta():
        with pytest.raises(Conflict, match="expired"):
            pushed.push(third, base=pushed.list_bases()[0].name)
    else:
        assert pushed.push(third, base="base").number == 1
    monkeypatch.undo()
    assert pushed.push(third, base="base").number == 1
    pushed.collect(grace=timedelta())
    _whole(pushed.home)


@pytest.mark.parametrize(("removed", "collected", "goes"), [(YEAR, timedelta(), False), (-YEAR, timedelta(), True)])
def test_trash_by_a_clock_that_jumped(
    pushed: loreg.Registry, tmp_path: Path, removed: timedelta, collected: timedelta, goes: bool
) -> None:
    """It goes early or late, and nothing else does. A version that is taken back is whole."""
    with _clock(removed):
        pushed.remove("humor")
    with _clock(collected):
        assert bool(pushed.collect(grace=timedelta(days=14)).versions) == goes
    if not goes:
        pushed.restore("humor:v1")
        _whole(pushed.home)
    else:
        assert pushed.push(tmp_path / "humor", base="base", name="humor").number == 2
    assert pushed.fsck().ok and [move.seq for move in pushed.log("sql")[1]] == [1]


# --- what lies in the store -----------------------------------------------------------------------------


def _paths(registry: loreg.Registry) -> list[Path]:
    return sorted((registry.home / "blobs").glob("*/*"))


def test_a_part_of_the_store_elsewhere(pushed: loreg.Registry, tmp_path: Path, third: Path) -> None:
    """By links, as people move what is too large: read, collected and written through."""
    for number, folder in enumerate(sorted((pushed.home / "blobs").iterdir())):
        shutil.move(folder, tmp_path / f"moved{number}")
        folder.symlink_to(tmp_path / f"moved{number}")
    _whole(pushed.home)
    pushed.push(third, base="base")
    pushed.remove("third")
    assert pushed.collect(grace=timedelta()).copies
    _whole(pushed.home)


def test_a_link_instead_of_a_blob(pushed: loreg.Registry, tmp_path: Path) -> None:
    for number, path in enumerate(_paths(pushed)):
        shutil.move(path, tmp_path / f"moved{number}")
        path.symlink_to(tmp_path / f"moved{number}")
    _whole(pushed.home)
    pushed.remove("humor")
    assert pushed.collect(grace=timedelta()).copies  # the links; what they point to is not ours
    assert len([*tmp_path.glob("moved*")]) > len(_paths(pushed))
    path = _paths(pushed)[0]
    path.unlink()
    path.symlink_to(path)  # a loop
    assert not pushed.fsck().ok


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _device(path: Path) -> None:
    try:
        os.mknod(path, 0o666 | 0o020000, os.makedev(1, 5))  # zeros without end
    except PermissionError:
        pytest.skip("a device cannot be made here")


def _directory(path: Path) -> None:
    path.mkdir()


def _socket(path: Path) -> None:
    os.mknod(path, 0o140666)


@pytest.mark.parametrize("make", [_pipe, _device, _directory, _socket])
def test_no_file_instead_of_a_blob(pushed: loreg.Registry, tmp_path: Path, make: Callable[[Path], None]) -> None:
    """Nothing waits for ever, and all of it can be mended."""
    backup = Path(shutil.copytree(pushed.home, tmp_path / "backup"))
    for path in _paths(pushed):
        path.unlink()
        make(path)
    with _seconds(60):
        for call in (lambda: pushed.resolve("sql"), lambda: pushed.export("sql", tmp_path / "out"), pushed.collect):
            with pytest.raises((BadInput, NotFound, UsageError)):
                call()
        assert _command("show", "sql", home=pushed.home)[0] in (BadInput.exit_code, NotFound.exit_code, 2)
        assert len(pushed.fsck().problems) == len(_paths(pushed))
        assert pushed.fsck(repair=True, sources=[backup]).ok
        pushed.collect()
    _whole(pushed.home)


def test_modes_and_other_names_of_a_blob(pushed: loreg.Registry, tmp_path: Path) -> None:
    for path, mode in zip(_paths(pushed), [0o000, 0o777, 0o200, 0o400, 0o6755] * 9, strict=False):
        os.link(path, tmp_path / path.name)
        path.chmod(mode)
    if os.geteuid() == 0:  # a mode stops nobody else
        _whole(pushed.home)
    pushed.remove("humor")
    for path in _paths(pushed):
        path.chmod(0o444)
    assert pushed.collect(grace=timedelta()).copies
    assert len([*tmp_path.glob("*.????????????????")]) > len(_paths(pushed))  # the other name keeps its bytes


def test_a_directory_of_very_many_entries(pushed: loreg.Registry) -> None:
    folder = _paths(pushed)[0].parent
    for number in range(20_000):
        (folder / f"other{number}").touch()
    keys = set(pushed.storage.store.keys())
    assert len(keys) == len([path for path in _paths(pushed) if not path.name.startswith("other")])
    assert pushed.collect().copies == ()
    _whole(pushed.home)


# --- open files -----------------------------------------------------------------------------------------


def _limited(free: int, work: Callable[[], object]) -> str:
    """What becomes of ``work`` in a process that may open so many files more: ``whole``, or its error."""
    ours, theirs = os.pipe()
    pid = os.fork()
    if not pid:
        said = "untyped"
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
            taken = []
            with suppress(OSError):
                while True:
                    taken.append(os.open(os.devnull, os.O_RDONLY))
            for descriptor in taken[:free]:
                os.close(descriptor)
            try:
                work()
                said = "whole"
            except LoregError as error:
                said = f"{type(error).__name__} {error}"
            except BaseException as error:
                said = f"untyped {error!r}"
        finally:
            os.write(theirs, said.encode())
            os._exit(0)
    os.close(theirs)
    with os.fdopen(ours) as file:
        said = file.read()
    os.waitpid(pid, 0)
    return said


def test_too_few_open_files(pushed: loreg.Registry, third: Path, tmp_path: Path) -> None:
    """Anywhere in what a registry does, the limit is named, and nothing is lost."""
    import loreg.registry.exporting
    import loreg.registry.packing  # what is imported later needs a file, too

    pushed.close()
    home = pushed.home

    def using(call: Callable[[loreg.Registry], object]) -> Callable[[], None]:
        def work() -> None:
            with loreg.open(home) as registry:
                call(registry)

        return work

    works = {
        "open": using(lambda registry: None),
        "push": using(lambda registry: registry.push(third, base="base")),
        "gc": using(lambda registry: registry.collect()),
        "fsck": using(lambda registry: registry.fsck()),
        "export": using(lambda registry: registry.export("sql", tmp_path / "out")),
    }
    seen: set[str] = set()
    for name, work in works.items():
        for limit in range(40):
            said = _limited(limit, work)
            shutil.rmtree(tmp_path / "out", ignore_errors=True)
            if said == "whole":
                break
            assert said.split()[0] in ("CheckFailed", "UsageError", "BadInput", "NotFound"), (name, limit, said)
            assert "open files" in said, (name, limit, said)
            seen.add(name)
        else:
            raise AssertionError(f"{name} needs more than 40 files")
    assert seen == set(works)
    _whole(home)


@pytest.mark.slow
def test_many_readers_at_once(pushed: loreg.Registry, tmp_path: Path) -> None:
    """200 threads; and no file stays open, however often it was read."""
    wanted, failed = tiny.files_in(tmp_path / "sql"), []

    def read(number: int) -> None:
        try:
            for _ in range(3):
                assert pushed.resolve("sql").number == 1
            if number % 10 == 0:
                assert tiny.files_in(pushed.export("sql", tmp_path / f"out{number}")) == wanted
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=read, args=(number,)) for number in range(200)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    left = len(os.listdir("/proc/self/fd"))
    keys = [pushed.storage.key(blob.digest) for blob in pushed.resolve("sql").manifest.blobs]
    for number in range(10_000):
        pushed.storage.store.read(keys[number % len(keys)])
    for _ in range(20):
        loreg.open(pushed.home).close()
    assert len(os.listdir("/proc/self/fd")) <= left + 3  # another connection of the pool
