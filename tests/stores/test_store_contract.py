"""One suite for every store, against the real thing: files, SeaweedFS, and moto as a second opinion on S3."""

from __future__ import annotations

import array
import errno
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import s3_server
from blobs import CHUNKS, DATA, DIGEST
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule, run_state_machine_as_test

from loreg.digest import Digest
from loreg.errors import BadInput, Conflict, NotFound
from loreg.store import BlobKey, Store, new_generation, open_store, upload

MEBIBYTE = 1 << 20


def _files(directory: Path) -> str:
    return f"file://{directory / os.urandom(6).hex()}"


def _seaweed(_: Path) -> str:
    os.environ.update(s3_server.environment(s3_server.seaweed().endpoint))
    return s3_server.fresh_prefix()


def _moto(_: Path) -> str:
    os.environ.update(s3_server.environment(s3_server.moto().endpoint))
    return s3_server.fresh_prefix()


BACKENDS: dict[str, Callable[[Path], str]] = {"files": _files, "seaweed": _seaweed, "moto": _moto}
"""By name: the address of a fresh store, with the variables set that lead to it. Raises Skipped."""


@pytest.fixture(autouse=True)
def _variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that a backend sets are gone at the end."""
    for name in s3_server.environment(""):
        monkeypatch.setenv(name, "")


@pytest.fixture(params=list(BACKENDS))
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return open_store(BACKENDS[request.param](tmp_path))


class TestEveryStore:
    """What every backend keeps. A new one brings a line in ``BACKENDS``, and no new tests."""

    def test_what_is_put_is_read(self, store: Store) -> None:
        key = BlobKey(DIGEST, new_generation())
        store.put(key.digest, key.generation, CHUNKS)
        assert store.read(key) == DATA
        assert store.size(key) == len(DATA)
        with store.open(key) as file:
            assert file.read() == DATA
        assert list(store.keys()) == [key]

    @pytest.mark.parametrize("data", [b"", b"x"])
    def test_the_shortest_blobs(self, store: Store, data: bytes) -> None:
        key = BlobKey(Digest.of(data), new_generation())
        store.put(key.digest, key.generation, [data] if data else [])
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
        store.put(key.digest, key.generation, [view])
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

    def test_quarantined_is_no_key_and_not_lost(self, store: Store) -> None:
        old, fresh = BlobKey(DIGEST, new_generation()), BlobKey(DIGEST, new_generation())
        for key in (old, fresh):
            store.put(key.digest, key.generation, CHUNKS)
        where = store.quarantine(old)
        assert list(store.keys()) == [fresh] and store.size(old) is None
        assert where.endswith(f"/quarantine/{old.name}") and _bytes_at(where) == DATA
        with pytest.raises(NotFound, match=str(DIGEST)):
            store.quarantine(old)
        assert _bytes_at(where) == DATA

    def test_reading_in_pieces(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("loreg.store.objects.READ", 1000)
        for size in (999, 1000, 1001, 2000, 2400):
            key = BlobKey(Digest.of(DATA[:size]), new_generation())
            store.put(key.digest, key.generation, [DATA[:size]])
            with store.open(key) as file:
                pieces = iter(lambda file=file: file.read(700), b"")
                assert [len(piece) for piece in pieces] == [700] * (size // 700) + [size % 700] * (size % 700 > 0)
            assert store.read(key) == DATA[:size]

    def test_a_blob_that_is_deleted_while_it_is_read(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        """All of it, or an error; never less."""
        monkeypatch.setattr("loreg.store.objects.READ", 1000)
        key = BlobKey(DIGEST, new_generation())
        store.put(key.digest, key.generation, CHUNKS)
        with store.open(key) as file:
            begun = file.read(10)
            store.delete(key)
            try:
                assert begun + file.read() == DATA
            except NotFound as error:
                assert str(DIGEST) in str(error)

    @pytest.mark.parametrize("beyond", [-1, 0, 1, 5 * MEBIBYTE, 5 * MEBIBYTE + 1])
    def test_large_blobs(self, store: Store, beyond: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """Around the sizes from which on a blob is written in parts, and of which a part is."""
        monkeypatch.setattr(upload, "PART", 5 * MEBIBYTE)
        data = os.urandom(5 * MEBIBYTE + beyond)
        key = BlobKey(Digest.of(data), new_generation())
        chunks = [data[at : at + 700_001] for at in range(0, len(data), 700_001)]
        store.put(key.digest, key.generation, chunks)
        assert store.read(key) == data and store.size(key) == len(data)
        with pytest.raises(Conflict, match=str(key.digest)):
            store.put(key.digest, key.generation, chunks)
        assert list(store.keys()) == [key]

    def test_large_blobs_of_other_bytes_leave_nothing(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(upload, "PART", 5 * MEBIBYTE)

        def failing() -> Iterator[bytes]:
            yield bytes(12 * MEBIBYTE)
            raise OSError(errno.EIO, "the source's own")

        with pytest.raises(BadInput, match=str(DIGEST)):
            store.put(DIGEST, new_generation(), [bytes(12 * MEBIBYTE)])
        with pytest.raises(OSError, match="the source's own"):
            store.put(DIGEST, new_generation(), failing())
        assert list(store.keys()) == []

    def test_of_writers_of_one_key_exactly_one_wins(self, store: Store) -> None:
        generation, outcomes = new_generation(), list[str]()
        store.put(Digest.of(b""), new_generation(), [])  # so that what is asked once of a server is asked
        ready = threading.Barrier(8)

        def write() -> None:
            ready.wait()
            try:
                store.put(DIGEST, generation, CHUNKS)
                outcomes.append("written")
            except Conflict:
                outcomes.append("conflict")

        threads = [threading.Thread(target=write) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(outcomes) == ["conflict"] * 7 + ["written"]
        assert store.read(BlobKey(DIGEST, generation)) == DATA

    def test_many_keys(self, store: Store) -> None:
        blobs = {BlobKey(Digest.of(b"%d" % n), new_generation()): b"%d" % n for n in range(30)}
        for key, data in blobs.items():
            store.put(key.digest, key.generation, [data])
        assert sorted(store.keys()) == sorted(blobs)

    def test_it_is_the_first_ones_who_claims_it(self, store: Store) -> None:
        assert store.owner() is None
        assert store.claim(b"mine") == b"mine"
        assert store.claim(b"theirs") == b"mine" == store.claim(b"mine")
        assert store.owner() == b"mine" and list(store.keys()) == []

    def test_of_many_claims_one_holds(self, store: Store) -> None:
        found: list[bytes] = []
        threads = [threading.Thread(target=lambda n=n: found.append(store.claim(b"%d" % n))) for n in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == 6 and set(found) == {store.owner()}

    def test_records(self, store: Store) -> None:
        assert list(store.records()) == [] and store.read_record(1) is None
        for seq, data in ((1, b"one"), (2, b""), (10**15, b"large")):
            store.write_record(seq, data)
            store.write_record(seq, data)
            with pytest.raises(Conflict, match=str(seq)):
                store.write_record(seq, data + b"!")
            assert store.read_record(seq) == data
        assert sorted(store.records()) == [1, 2, 10**15]
        assert [sorted(store.records(beyond)) for beyond in (1, 2, 10**15)] == [[2, 10**15], [10**15], []]
        store.delete_record(2)
        store.delete_record(2)
        assert sorted(store.records()) == [1, 10**15] and store.read_record(2) is None
        where = store.quarantine_record(1)
        assert _bytes_at(where) == b"one" and list(store.records()) == [10**15]
        with pytest.raises(NotFound, match="record 1"):
            store.quarantine_record(1)
        store.write_record(1, b"another one")
        assert store.quarantine_record(1) != where and _bytes_at(where) == b"one"
        assert list(store.keys()) == [] == list(store.unfinished())

    def test_nothing_is_unfinished_that_ended(self, store: Store) -> None:
        store.put(DIGEST, new_generation(), CHUNKS)
        assert list(store.unfinished()) == []

    def test_it_says_where_it_is(self, store: Store) -> None:
        assert s3_server.SECRET not in repr(store) and s3_server.KEY_ID not in repr(store)


def _bytes_at(where: str) -> bytes:
    """What is there, by other code than the store's."""
    if not where.startswith("s3://"):
        return Path(where).read_bytes()
    bucket, _, key = where.removeprefix("s3://").partition("/")
    boto = s3_server.client(os.environ["AWS_ENDPOINT_URL"])
    return bytes(boto.get_object(Bucket=bucket, Key=key)["Body"].read())


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

    place: Callable[[], str]

    def __init__(self) -> None:
        super().__init__()
        self.store = open_store(self.place())
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
    def quarantine(self, key: BlobKey) -> None:
        assert key.name in self.store.quarantine(key)
        del self.model[key]

    @rule(key=consumes(keys))
    def delete(self, key: BlobKey) -> None:
        self.store.delete(key)
        del self.model[key]
        assert self.store.size(key) is None

    @invariant()
    def same(self) -> None:
        assert {key: self.store.read(key) for key in [*self.store.keys()]} == self.model


@pytest.mark.parametrize("backend", list(BACKENDS))
def test_a_store_is_a_dict(backend: str, tmp_path: Path) -> None:
    machine = type("Machine", (StoreAgainstADict,), {"place": lambda self: BACKENDS[backend](tmp_path)})
    BACKENDS[backend](tmp_path)  # skipped, not failed, where it cannot be
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=15, stateful_step_count=12, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
