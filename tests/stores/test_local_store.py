"""One suite for every store, and for the local one the order of its writes and a fault at each of them."""

from __future__ import annotations

import array
import errno
import os
import resource
import signal
import stat
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from loreg.digest import Digest, fingerprint
from loreg.errors import BadInput, CheckFailed, Conflict, LoregError, NotFound, UsageError
from loreg.store import BlobKey, LocalStore, Store, new_generation

DATA = b"a blob of some length, written in several pieces" * 50
CHUNKS = [DATA[:100], memoryview(DATA)[100:1500], b"", DATA[1500:]]
DIGEST = Digest.of(DATA)
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


class StoreContract:
    """What every backend keeps. A new one brings a fixture ``store``, and no new tests."""

    def test_what_is_put_is_read(self, store: Store) -> None:
        key = BlobKey(DIGEST, new_generation())
        assert store.put(key.digest, key.generation, CHUNKS) == fingerprint([DATA])
        assert store.read(key) == DATA
        assert store.size(key) == len(DATA)
        with store.open(key) as file:
            assert file.read() == DATA
        assert list(store.keys()) == [key]

    @pytest.mark.parametrize("data", [b"", b"x"])
    def test_the_shortest_blobs(self, store: Store, data: bytes) -> None:
        key = BlobKey(Digest.of(data), new_generation())
        assert store.put(key.digest, key.generation, [data] if data else []).size == len(data)
        assert store.read(key) == data

    @pytest.mark.parametrize(
        "view",
        [
            memoryview(array.array("d", [1.5, -2.5])),
            memoryview(b"abcdef").cast("B", (2, 3)),
            memoryview(array.array("I")),
        ],
        ids=["float64", "two dimensions", "empty"],
    )
    def test_views_of_any_element_type_are_their_bytes(self, store: Store, view: memoryview) -> None:
        key = BlobKey(Digest.of(view.tobytes()), new_generation())
        assert store.put(key.digest, key.generation, [view]).size == view.nbytes
        assert store.read(key) == view.tobytes()

    def test_other_bytes_are_refused_and_leave_nothing(self, store: Store) -> None:
        with pytest.raises(BadInput, match=str(DIGEST)):
            store.put(DIGEST, new_generation(), [DATA[:-1]])
        assert list(store.keys()) == []

    def test_a_key_is_written_once(self, store: Store) -> None:
        generation = new_generation()
        store.put(DIGEST, generation, CHUNKS)
        with pytest.raises(Conflict, match=str(DIGEST)):
            store.put(DIGEST, generation, CHUNKS)
        assert store.read(BlobKey(DIGEST, generation)) == DATA

    def test_delete_takes_one_generation_and_may_be_repeated(self, store: Store) -> None:
        old, fresh = BlobKey(DIGEST, new_generation()), BlobKey(DIGEST, new_generation())
        for key in (old, fresh):
            store.put(key.digest, key.generation, CHUNKS)
        store.delete(old)
        store.delete(old)
        assert list(store.keys()) == [fresh]
        assert store.read(fresh) == DATA
        assert store.size(old) is None

    def test_absent_is_not_found_by_its_digest(self, store: Store) -> None:
        key = BlobKey(DIGEST, new_generation())
        assert store.size(key) is None
        assert list(store.keys()) == []
        store.delete(key)
        for reading in (store.open, store.read):
            with pytest.raises(NotFound, match=str(DIGEST)):
                reading(key)

    def test_what_the_source_raises_passes_unchanged(self, store: Store) -> None:
        def failing() -> Iterator[bytes]:
            yield DATA[:10]
            raise OSError(errno.EIO, "the source's own")

        with pytest.raises(OSError, match="the source's own"):
            store.put(DIGEST, new_generation(), failing())
        assert list(store.keys()) == []


class TestLocalStore(StoreContract):
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
        assert list(store.keys()) == []
        assert store.size(BlobKey(DIGEST, new_generation())) is None


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


HOSTILE = ["", "..", "../../etc/passwd", "a" * 63, "A" * 64, "a" * 64 + "\n", "a" * 63 + "/", "\0" * 64, "é" * 64]


@pytest.mark.parametrize("text", HOSTILE)
def test_a_hostile_digest_or_generation_never_becomes_a_path(text: str) -> None:
    with pytest.raises(BadInput):
        Digest(text)
    with pytest.raises(BadInput):
        BlobKey(DIGEST, text[-17:])
    with pytest.raises(BadInput):
        BlobKey.parse(f"{text}.{new_generation()}")
    with pytest.raises(BadInput):
        BlobKey.parse(f"{DIGEST.hex}.{text}")


@given(st.binary(min_size=32, max_size=32), st.binary(min_size=8, max_size=8))
def test_a_key_is_its_name(digest: bytes, generation: bytes) -> None:
    key = BlobKey(Digest(digest.hex()), generation.hex())
    assert BlobKey.parse(key.name) == key
    assert Path(key.location).parts == ("blobs", digest.hex()[:2], key.name)


def test_generations_differ() -> None:
    assert len({new_generation() for _ in range(1000)}) == 1000


class StoreAgainstADict(RuleBasedStateMachine):
    """Any sequence of operations does to the store what it does to a dict."""

    keys = Bundle("keys")

    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.TemporaryDirectory()
        self.store = LocalStore(Path(self.directory.name) / "store")
        self.model: dict[BlobKey, bytes] = {}

    @rule(target=keys, data=st.sampled_from([b"", b"one", b"two"]), size=st.integers(1, 4))
    def put(self, data: bytes, size: int) -> BlobKey:
        key = BlobKey(Digest.of(data), new_generation())
        self.store.put(key.digest, key.generation, (data[i : i + size] for i in range(0, len(data), size)))
        self.model[key] = data
        return key

    @rule(key=keys)
    def put_again(self, key: BlobKey) -> None:
        with pytest.raises(Conflict):
            self.store.put(key.digest, key.generation, [self.model[key]])

    @rule(data=st.sampled_from([b"one", b"two"]))
    def put_wrong(self, data: bytes) -> None:
        with pytest.raises(BadInput):
            self.store.put(DIGEST, new_generation(), [data])

    @rule(key=consumes(keys))
    def delete(self, key: BlobKey) -> None:
        self.store.delete(key)
        del self.model[key]
        assert self.store.size(key) is None

    @invariant()
    def same(self) -> None:
        assert {key: self.store.read(key) for key in [*self.store.keys()]} == self.model

    def teardown(self) -> None:
        self.directory.cleanup()


StoreAgainstADict.TestCase.settings = settings(max_examples=15, stateful_step_count=12, deadline=None)
TestStoreAgainstADict = StoreAgainstADict.TestCase


def test_the_store_loads_no_database_and_no_tensors() -> None:
    code = (
        "import sys, loreg.store; print([m for m in ('sqlalchemy', 'alembic', 'torch', 'numpy') if m in sys.modules])"
    )
    root = Path(__file__).resolve().parents[2]
    found = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
