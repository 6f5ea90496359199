"""The local store: the order of its writes, and a fault at each of them."""

from __future__ import annotations

import errno
import os
import resource
import signal
import stat
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
from blobs import CHUNKS, DATA, DIGEST

from loreg.errors import BadInput, CheckFailed, Conflict, LoregError, UsageError
from loreg.store import BlobKey, LocalStore, new_generation

DISK_CALLS = ("mkdir", "open", "write", "fchmod", "fsync", "close", "link", "unlink")


def in_child(function: Callable[[], None]) -> int:
    """Run it in a forked process; its exit code, 99 for an exception."""
    pid = os.fork()
    if pid == 0:
        try:
            function()
        except BaseException:
            traceback.print_exc()
            os._exit(99)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def hook_disk_calls(monkeypatch: pytest.MonkeyPatch, root: Path, before: Callable[[str, str], None]) -> None:
    """Have ``before(call, path)`` run ahead of every call of the store that changes the disk."""

    def named(call: str, original: Callable) -> Callable:
        def hooked(*args, **options):
            target = args[1] if call == "link" else args[0]
            path = os.readlink(f"/proc/self/fd/{target}") if isinstance(target, int) else os.fspath(target)
            if Path(path).is_relative_to(root):
                before(call, str(Path(path).relative_to(root)))
            return original(*args, **options)

        return hooked

    for call in DISK_CALLS:
        monkeypatch.setattr(os, call, named(call, getattr(os, call)))


def files_below(root: Path) -> list[Path]:
    return [path for path in root.rglob("*") if not path.is_dir()]


class TestLocalStore:
    @pytest.fixture
    def store(self, tmp_path: Path) -> LocalStore:
        return LocalStore(tmp_path / "home" / "store")

    def test_a_corrupt_blob_is_refused_by_its_digest(self, store: LocalStore) -> None:
        key = BlobKey(DIGEST, new_generation())
        store.put(key.digest, key.generation, CHUNKS)
        path = store.path(key)
        path.chmod(0o600)
        path.write_bytes(DATA[:-1] + b"!")
        with pytest.raises(BadInput, match=str(DIGEST)):
            store.read(key)
        assert store.read(key, verify=False) == DATA[:-1] + b"!"

    def test_blobs_are_read_only_files_and_tmp_is_empty(self, store: LocalStore, tmp_path: Path) -> None:
        key = BlobKey(DIGEST, new_generation())
        store.put(key.digest, key.generation, CHUNKS)
        path = tmp_path / "home/store/blobs" / DIGEST.hex[:2] / f"{DIGEST.hex}.{key.generation}"
        assert store.path(key) == path
        assert stat.S_IMODE(path.stat().st_mode) == 0o444
        assert path.stat().st_nlink == 1
        assert files_below(tmp_path) == [path]

    def test_a_failed_put_leaves_no_file_at_all(self, store: LocalStore, tmp_path: Path) -> None:
        with pytest.raises(BadInput):
            store.put(DIGEST, new_generation(), [b"other"])
        assert files_below(tmp_path) == []

    def test_nothing_is_made_before_the_first_put(self, store: LocalStore, tmp_path: Path) -> None:
        list(store.keys())
        assert list(tmp_path.iterdir()) == []

    def test_foreign_files_are_not_keys(self, store: LocalStore, tmp_path: Path) -> None:
        key = BlobKey(DIGEST, new_generation())
        store.put(key.digest, key.generation, CHUNKS)
        home = tmp_path / "home/store/blobs"
        other = "00" if DIGEST.hex[:2] != "00" else "11"
        (home / other).mkdir()
        (home / other / key.name).write_bytes(b"in the wrong directory")
        (home / DIGEST.hex[:2] / f"{DIGEST.hex}.tmp").write_bytes(b"")
        (home / "README").write_bytes(b"")
        assert list(store.keys()) == [key]

    def test_the_order_of_the_writes(
        self, store: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        calls: list[tuple[str, str]] = []
        root = tmp_path / "home/store"
        hook_disk_calls(monkeypatch, root, lambda call, path: calls.append((call, path)))
        key = BlobKey(DIGEST, new_generation())
        store.put(key.digest, key.generation, CHUNKS)

        def at(call: str, path: str) -> int:
            (found,) = [i for i, c in enumerate(calls) if c == (call, path)]
            return found

        (partial,) = {path for call, path in calls if call == "write"}
        directory = f"blobs/{DIGEST.hex[:2]}"
        assert partial.startswith("tmp/")
        last_write = max(i for i, c in enumerate(calls) if c[0] == "write")
        order = [
            last_write,
            at("fchmod", partial),
            at("fsync", partial),
            at("link", key.location),
            at("fsync", directory),
            at("unlink", partial),
        ]
        assert order == sorted(order)
        # The directories are durable before anything in them is.
        assert at("mkdir", directory) < at("fsync", "blobs") < at("link", key.location)

    def test_a_directory_that_another_process_made_is_synced_all_the_same(
        self, store: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        root = tmp_path / "home/store"
        (root / "blobs" / DIGEST.hex[:2]).mkdir(parents=True)
        calls: list[tuple[str, str]] = []
        hook_disk_calls(monkeypatch, root, lambda call, path: calls.append((call, path)))
        store.put(DIGEST, new_generation(), CHUNKS)
        assert ("fsync", "blobs") in calls
        calls.clear()
        store.put(DIGEST, new_generation(), CHUNKS)
        assert ("fsync", "blobs") not in calls

    def test_short_writes_are_continued(self, store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
        write = os.write
        monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:7]))
        key = BlobKey(DIGEST, new_generation())
        store.put(key.digest, key.generation, CHUNKS)
        monkeypatch.undo()
        assert store.read(key) == DATA


def count_disk_calls(root: Path) -> list[str]:
    calls: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        hook_disk_calls(patch, root, lambda call, _path: calls.append(call))
        LocalStore(root).put(DIGEST, new_generation(), CHUNKS)
    return calls


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EROFS], ids=errno.errorcode.get)
def test_a_fault_at_any_call_leaves_no_file_under_the_final_name(tmp_path: Path, code: int) -> None:
    families = {errno.EIO: BadInput, errno.ENOSPC: CheckFailed, errno.EROFS: UsageError}
    total = count_disk_calls(tmp_path / "count")
    assert len(total) > 15
    refused = 0
    for step in range(len(total)):
        root = tmp_path / str(step)
        remaining = step

        def fail(call: str, path: str) -> None:
            nonlocal remaining
            remaining -= 1
            if remaining == -1:
                raise OSError(code, os.strerror(code), path)

        store = LocalStore(root)
        with pytest.MonkeyPatch.context() as patch:
            hook_disk_calls(patch, root, fail)
            try:
                store.put(DIGEST, new_generation(), CHUNKS)
            except LoregError as error:
                assert type(error) is families[code], total[step]
                assert str(DIGEST) in str(error)
                assert os.strerror(code) in str(error)
                refused += 1
                assert list(store.keys()) == [], total[step]
            else:
                # Only the removal of the temporary name may fail without a word: the blob is durable by then.
                assert total[step] == "unlink"
        assert all(store.read(key) == DATA for key in [*store.keys()])
        store.put(DIGEST, new_generation(), CHUNKS)
        assert all(store.read(key) == DATA for key in [*store.keys()])
    assert refused == len(total) - 1


def test_a_crash_before_any_call_leaves_no_wrong_file(tmp_path: Path) -> None:
    total = count_disk_calls(tmp_path / "count")
    for step in range(len(total)):
        root = tmp_path / str(step)
        remaining = step

        def crash(call: str, path: str) -> None:
            nonlocal remaining
            remaining -= 1
            if remaining == -1:
                os._exit(42)

        def put(root: Path = root) -> None:
            with pytest.MonkeyPatch.context() as patch:
                hook_disk_calls(patch, root, crash)
                LocalStore(root).put(DIGEST, new_generation(), CHUNKS)

        assert in_child(put) == 42
        store = LocalStore(root)
        keys = list(store.keys())
        assert len(keys) <= 1
        assert all(store.read(key) == DATA for key in keys)
        assert bool(keys) == (step > total.index("link")), total[step]
        store.put(DIGEST, new_generation(), CHUNKS)


def test_a_file_that_outgrows_the_disk_is_a_sentence(tmp_path: Path) -> None:
    def put() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        with pytest.raises(CheckFailed, match=r"free some space"):
            LocalStore(tmp_path).put(DIGEST, new_generation(), CHUNKS)

    assert in_child(put) == 0
    assert files_below(tmp_path) == []


def test_of_writers_of_one_key_exactly_one_wins(tmp_path: Path) -> None:
    generation = new_generation()
    ready, go = os.pipe()
    pids = []
    for _ in range(4):
        pid = os.fork()
        if pid == 0:
            os.close(go)
            os.read(ready, 1)  # until the parent closes its end
            try:
                LocalStore(tmp_path).put(DIGEST, generation, CHUNKS)
            except Conflict:
                os._exit(6)
            except BaseException:
                traceback.print_exc()
                os._exit(99)
            os._exit(0)
        pids.append(pid)
    os.close(ready)
    os.close(go)
    codes = sorted(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids)
    assert codes == [0, 6, 6, 6]
    assert LocalStore(tmp_path).read(BlobKey(DIGEST, generation)) == DATA
    assert len(files_below(tmp_path)) == 1


def test_a_root_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for root in (tmp_path / "file", tmp_path / "file" / "below"):
        store = LocalStore(root)
        with pytest.raises(UsageError, match="LOREG_STORE"):
            store.put(DIGEST, new_generation(), CHUNKS)
    assert list(store.keys()) == []  # below it, where nothing can be
    assert store.size(BlobKey(DIGEST, new_generation())) is None
    store, key = LocalStore(tmp_path / "file"), BlobKey(DIGEST, new_generation())
    for call in (lambda: list(store.keys()), lambda: store.size(key), lambda: store.open(key)):
        with pytest.raises(UsageError, match="Not a directory"):
            call()


def test_a_root_that_may_not_be_written() -> None:
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        key = BlobKey(DIGEST, new_generation())
        LocalStore(root).put(key.digest, key.generation, CHUNKS)
        for directory in (root, *(path for path in root.rglob("*") if path.is_dir())):
            directory.chmod(0o555)

        def put() -> None:
            if os.getuid() == 0:
                os.setgid(65534)
                os.setuid(65534)
            store = LocalStore(root)
            assert store.read(key) == DATA
            with pytest.raises(UsageError, match="Permission denied"):
                store.put(DIGEST, new_generation(), CHUNKS)
            with pytest.raises(UsageError, match="Permission denied"):
                store.delete(key)

        assert in_child(put) == 0
        for directory in (root, *(path for path in root.rglob("*") if path.is_dir())):
            directory.chmod(0o755)


def test_the_store_loads_no_database_and_no_tensors() -> None:
    unwanted = ("sqlalchemy", "alembic", "torch", "numpy", "obstore")
    code = f"import sys, loreg.store; print([m for m in {unwanted} if m in sys.modules])"
    root = Path(__file__).resolve().parents[2]
    found = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
