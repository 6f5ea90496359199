"""What can go wrong between a store and its S3 server: no half blob is ever seen, none that was acknowledged is lost,
each failure has its type, and no message holds a credential."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import timedelta

import pytest
import s3_server
from blobs import CHUNKS, DATA, DIGEST
from s3_proxy import Proxy

from loreg.digest import Digest
from loreg.errors import BadInput, Conflict, LoregError, NotFound, RemoteError, Unsupported, UsageError
from loreg.store import BlobKey, Store, client, new_generation, open_store, upload

FOREVER = 10**9
PART = 5 << 20


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few and short retries, and small parts."""
    monkeypatch.setattr(client, "MAX_RETRIES", 2)
    monkeypatch.setattr(client, "REQUEST_TIMEOUT", timedelta(seconds=10))
    monkeypatch.setattr(upload, "PART", PART)
    for name, value in s3_server.environment("").items():
        monkeypatch.setenv(name, value)


def at(endpoint: str, address: str) -> Store:
    os.environ["AWS_ENDPOINT_URL"] = endpoint
    return open_store(address)


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    with Proxy(s3_server.seaweed().endpoint) as opened:
        yield opened


@pytest.fixture
def address() -> str:
    return s3_server.fresh_prefix()


@pytest.fixture
def store(proxy: Proxy, address: str) -> Store:
    """Through the proxy, with what is asked once of a server asked already."""
    store = at(proxy.endpoint, address)
    key = BlobKey(Digest.of(b"first"), new_generation())
    store.put(key.digest, key.generation, [b"first"])
    store.delete(key)
    proxy.requests.clear()
    return store


@pytest.fixture
def direct(proxy: Proxy, address: str) -> Store:
    """The same store, with nothing in between."""
    return at(proxy.upstream, address)


def refused(family: type[LoregError], call: Callable[[], object]) -> str:
    """The message of the error. No credential is in it, nor in a traceback, nor in what a reporter of errors sees."""
    with pytest.raises(family) as caught:
        call()
    assert family is LoregError or type(caught.value) is family
    error: BaseException | None = caught.value
    said = "".join(traceback.format_exception(caught.value))
    while error is not None:
        said += repr(error) + repr(vars(error))
        error = error.__cause__ or error.__context__
    for secret in (s3_server.SECRET, s3_server.KEY_ID, "<Error>"):
        assert secret not in said
    return str(caught.value)


SMALL = (DATA, CHUNKS)
_LARGE = os.urandom(2 * PART + 1000)
LARGE = (_LARGE, [_LARGE[:PART], _LARGE[PART:]])

small_and_large = pytest.mark.parametrize(
    ("data", "chunks", "last"),
    [(*SMALL, "PUT"), (*LARGE, "POST")],
    ids=["small", "large"],
)
"""``last``: the method of the request by which the blob appears."""


def put(store: Store, data: bytes, chunks: list[bytes]) -> BlobKey:
    key = BlobKey(Digest.of(data), new_generation())
    store.put(key.digest, key.generation, chunks)
    return key


# --- writing --------------------------------------------------------------------------------------------


@small_and_large
@pytest.mark.parametrize("times", [1, 2, FOREVER])
@pytest.mark.parametrize("kind", ["lose", "belie"])
def test_an_answer_that_is_lost_is_no_failure(
    store: Store, direct: Store, proxy: Proxy, data: bytes, chunks: list[bytes], last: str, kind: str, times: int
) -> None:
    """The server has done it each time."""
    fault = proxy.add(kind, last, "uploadId" if last == "POST" else "blobs/", times=times)
    key = put(store, data, chunks)
    assert fault.hits and list(direct.keys()) == [key] and direct.read(key) == data


@pytest.mark.parametrize(("status", "code"), [(404, "NoSuchUpload"), (503, "SlowDown"), (500, "InternalError")])
def test_a_completion_that_is_asked_for_twice(
    store: Store, direct: Store, proxy: Proxy, status: int, code: str
) -> None:
    proxy.add("lose", "POST", "uploadId")
    proxy.add("refuse", "POST", "uploadId", status=status, code=code, times=FOREVER)
    key = put(store, *LARGE)
    assert list(direct.keys()) == [key] and direct.read(key) == _LARGE


@small_and_large
@pytest.mark.parametrize(
    "fault", [("refuse", {}), ("refuse", {"status": 500, "code": "InternalError"}), ("cut request", {})]
)
def test_a_burst_passes(
    store: Store, direct: Store, proxy: Proxy, data: bytes, chunks: list[bytes], last: str, fault: tuple[str, dict]
) -> None:
    kind, options = fault
    for method, pattern in (("PUT", "blobs/"), ("POST", "uploads"), ("PUT", "partNumber=2"), ("POST", "uploadId")):
        proxy.add(kind, method, pattern, **options)
    key = put(store, data, chunks)
    assert list(direct.keys()) == [key] and direct.read(key) == data


@small_and_large
@pytest.mark.parametrize("kind", ["refuse", "cut request"])
def test_a_burst_that_does_not_pass(
    store: Store, direct: Store, proxy: Proxy, data: bytes, chunks: list[bytes], last: str, kind: str
) -> None:
    for pattern in ("blobs/", "uploads", "partNumber=2", "uploadId"):
        proxy.faults.clear()
        fault = proxy.add(kind, "PUT POST", pattern, times=FOREVER)
        if pattern != "blobs/" and last == "PUT":
            continue
        said = refused(RemoteError, lambda: put(store, data, chunks))
        assert fault.hits and str(Digest.of(data)) in said and "try again" in said
        assert kind != "refuse" or "503 SlowDown" in said
    assert list(direct.keys()) == []
    proxy.faults.clear()
    assert direct.read(put(store, data, chunks)) == data


def test_what_fails_in_parts_is_aborted(store: Store, proxy: Proxy) -> None:
    def other_bytes() -> Iterator[bytes]:
        yield _LARGE
        raise ValueError("the source's own")

    proxy.add("refuse", "PUT", "partNumber=3", times=FOREVER)
    refused(RemoteError, lambda: put(store, *LARGE))
    proxy.faults.clear()
    with pytest.raises(ValueError, match="the source's own"):
        store.put(DIGEST, new_generation(), other_bytes())
    refused(BadInput, lambda: store.put(DIGEST, new_generation(), LARGE[1]))
    begun = [request for request in proxy.requests if request.startswith("POST") and request.endswith("?uploads=")]
    aborted = [request for request in proxy.requests if request.startswith("DELETE") and "uploadId=" in request]
    assert len(begun) == len(aborted) == 3


@pytest.mark.parametrize(("status", "code"), [(409, "ConditionalRequestConflict"), (412, "PreconditionFailed")])
def test_a_conflict_that_is_none(store: Store, direct: Store, proxy: Proxy, status: int, code: str) -> None:
    """Another request was under way, says the server; there is no object."""
    proxy.add("refuse", "PUT", "blobs/", status=status, code=code, times=2)
    key = put(store, *SMALL)
    assert list(direct.keys()) == [key]
    proxy.add("refuse", "PUT", "blobs/", status=status, code=code, times=FOREVER)
    assert str(status) in refused(RemoteError, lambda: put(store, *SMALL))
    assert list(direct.keys()) == [key]


@small_and_large
def test_another_writers_key_is_a_conflict_also_when_answers_are_lost(
    store: Store, direct: Store, proxy: Proxy, data: bytes, chunks: list[bytes], last: str
) -> None:
    key = put(direct, data, chunks)
    proxy.add("lose", last, "blobs/")
    refused(Conflict, lambda: store.put(key.digest, key.generation, chunks))
    assert direct.read(key) == data


@small_and_large
def test_bytes_that_change_on_their_way(
    store: Store, direct: Store, proxy: Proxy, data: bytes, chunks: list[bytes], last: str
) -> None:
    """SeaweedFS takes them; Amazon's would not."""
    proxy.add("flip request", "PUT", "blobs/")
    assert "other bytes" in refused(RemoteError, lambda: put(store, data, chunks))
    assert list(direct.keys()) == []
    assert direct.read(put(store, data, chunks)) == data


@small_and_large
def test_a_tag_that_proves_nothing_is_not_believed(
    store: Store, direct: Store, proxy: Proxy, data: bytes, chunks: list[bytes], last: str
) -> None:
    """Such as those of objects that are encrypted with the owner's key: then what was written is read back."""
    proxy.add("retag", "PUT POST HEAD GET", times=FOREVER)
    key = put(store, data, chunks)
    assert direct.read(key) == data
    assert any(request.startswith("GET") and key.name in request for request in proxy.requests)
    direct.delete(key)
    proxy.faults.insert(0, proxy.add("flip request", "PUT", "blobs/"))
    refused(RemoteError, lambda: put(store, data, chunks))
    assert list(direct.keys()) == []


def test_a_server_that_ignores_preconditions_is_refused(proxy: Proxy, address: str, direct: Store) -> None:
    bucket = address.removeprefix("s3://").partition("/")[0]
    boto = s3_server.client(proxy.upstream)

    def forget() -> None:
        """Then the condition holds, and the object is written anew, as by a server that does not look at it."""
        for name in _objects(proxy, address):
            boto.delete_object(Bucket=bucket, Key=name)

    proxy.add("call", "PUT", times=FOREVER, then=forget)
    store = at(proxy.endpoint, address)
    assert "If-None-Match" in refused(Unsupported, lambda: put(store, *SMALL))
    assert "If-None-Match" in refused(Unsupported, lambda: store.write_record(1, b"x"))
    assert list(direct.keys()) == []
    assert not any("probe/" in name for name in _objects(proxy, address))
    proxy.faults.clear()
    put(store, *SMALL)


def _objects(proxy: Proxy, address: str) -> list[str]:
    bucket, _, prefix = address.removeprefix("s3://").partition("/")
    listed = s3_server.client(proxy.upstream).list_objects_v2(Bucket=bucket, Prefix=prefix)
    return [entry["Key"] for entry in listed.get("Contents", [])]


# --- reading, listing, deleting ---------------------------------------------------------------------------


OPERATIONS: dict[str, Callable[[Store, BlobKey], object]] = {
    "size": lambda store, key: store.size(key),
    "read": lambda store, key: store.read(key),
    "keys": lambda store, _: list(store.keys()),
    "quarantine": lambda store, key: store.quarantine(key),
    "owner": lambda store, _: store.owner(),
    "quarantine_record": lambda store, _: (store.write_record(2, b"two"), store.quarantine_record(2)),
    "claim": lambda store, _: store.claim(b"mine"),
    "records": lambda store, _: list(store.records()),
    "read_record": lambda store, _: store.read_record(1),
    "write_record": lambda store, _: store.write_record(1, b"one"),
    "delete_record": lambda store, _: store.delete_record(1),
    "delete": lambda store, key: store.delete(key),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_outlasts_a_burst_and_says_when_it_cannot(
    store: Store, direct: Store, proxy: Proxy, name: str
) -> None:
    key = put(direct, *SMALL)
    fault = proxy.add("refuse", "GET HEAD PUT POST DELETE", times=FOREVER)
    assert "503" in refused(RemoteError, lambda: OPERATIONS[name](store, key))
    assert fault.hits and direct.read(key) == DATA
    proxy.faults.clear()
    fault = proxy.add("refuse", "GET HEAD PUT POST DELETE", times=2)
    expected = OPERATIONS[name](store, key)
    assert fault.hits == 2 and len(list(direct.keys())) == (name not in ("delete", "quarantine"))
    assert expected is None or name != "read" or expected == DATA
    proxy.add("lose", "GET HEAD PUT POST DELETE", times=FOREVER)
    refused(RemoteError, lambda: OPERATIONS[name](store, key))


def test_an_answer_that_is_cut_is_never_short_data(store: Store, direct: Store, proxy: Proxy) -> None:
    key = put(direct, *LARGE)
    proxy.add("cut answer", "GET", "blobs/")
    assert store.read(key) == _LARGE
    proxy.add("cut answer", "GET", "blobs/", times=FOREVER)
    refused(RemoteError, lambda: store.read(key))
    refused(RemoteError, lambda: store.read(key, verify=False))
    proxy.faults.clear()
    for location in ("blobs/", "ledger/"):
        proxy.add("cut answer", "GET", f"list-type.*{location[:-1]}", times=FOREVER)
    refused(RemoteError, lambda: list(store.keys()))
    refused(RemoteError, lambda: list(store.records()))


def test_an_answer_that_says_that_half_is_all(store: Store, direct: Store, proxy: Proxy) -> None:
    key = put(direct, *SMALL)
    proxy.add("short answer", "GET", "blobs/", times=FOREVER)
    refused(RemoteError, lambda: store.read(key, verify=False))


def test_an_answer_that_is_flipped_is_refused(store: Store, direct: Store, proxy: Proxy) -> None:
    key = put(direct, *SMALL)
    proxy.add("flip answer", "GET", "blobs/")
    refused(BadInput, lambda: store.read(key))
    assert store.read(key) == DATA


def test_a_move_that_stops_in_the_middle_loses_nothing(store: Store, direct: Store, proxy: Proxy) -> None:
    for method, pattern in (("PUT", "quarantine/"), ("HEAD", "quarantine/"), ("POST", "delete")):
        key = put(direct, *SMALL)
        for kind in ("refuse", "lose"):
            proxy.faults.clear()
            proxy.add(kind, method, pattern, times=FOREVER)
            refused(RemoteError, lambda key=key: store.quarantine(key))
            if (method, kind) != ("POST", "lose"):
                assert direct.read(key) == DATA
        proxy.faults.clear()
        if direct.size(key) is not None:
            assert store.quarantine(key).endswith(key.name)
        assert direct.size(key) is None


def test_a_delete_that_arrives_late_hits_no_other_generation(store: Store, direct: Store, proxy: Proxy) -> None:
    key = put(direct, *SMALL)
    proxy.add("hold", "POST", "delete", times=FOREVER)
    refused(RemoteError, lambda: store.delete(key))
    fresh = put(store, *SMALL)
    assert proxy.held and set(proxy.release()) == {200}
    assert list(direct.keys()) == [fresh] and direct.read(fresh) == DATA


def test_a_write_that_arrives_late(store: Store, direct: Store, proxy: Proxy) -> None:
    """It failed, nothing is there, and then it is: whole, or refused as there already."""
    proxy.add("hold", "PUT", "blobs/", times=FOREVER)
    refused(RemoteError, lambda: put(store, *SMALL))
    assert list(direct.keys()) == []
    assert sorted(set(proxy.release())) == [200, 412]
    (key,) = direct.keys()
    assert direct.read(key) == DATA


# --- the wrong server, bucket or credentials ---------------------------------------------------------------


def test_no_server(address: str) -> None:
    (port,) = s3_server._free_ports(1)
    store = at(f"http://127.0.0.1:{port}", address)
    assert "no connection" in refused(RemoteError, lambda: put(store, *SMALL))
    assert "no connection" in refused(RemoteError, lambda: list(store.keys()))


def test_a_password_in_the_endpoint(address: str) -> None:
    (port,) = s3_server._free_ports(1)
    store = at(f"http://{s3_server.KEY_ID}:{s3_server.SECRET}@127.0.0.1:{port}", address)
    refused(RemoteError, lambda: put(store, *SMALL))
    assert s3_server.SECRET not in repr(store)


def test_no_such_bucket(proxy: Proxy) -> None:
    key = BlobKey(DIGEST, new_generation())
    for name in OPERATIONS:
        if name in ("delete", "delete_record"):
            continue  # there is nothing to delete, and so nothing to refuse
        store = at(proxy.upstream, "s3://there-is-no-such-bucket/x")
        assert "NoSuchBucket" in refused(UsageError, lambda store=store, name=name: OPERATIONS[name](store, key)), (
            name
        )
    store = at(proxy.upstream, "s3://there-is-no-such-bucket/x")
    assert "LOREG_STORE" in refused(UsageError, lambda: put(store, *LARGE))


@pytest.mark.parametrize("variable", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
def test_credentials_that_are_refused(
    proxy: Proxy, address: str, variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, "another")
    key = BlobKey(DIGEST, new_generation())
    for name, operation in OPERATIONS.items():
        store = at(proxy.upstream, address)
        said = refused(UsageError, lambda store=store, operation=operation: operation(store, key))
        assert "credentials" in said and "403" in said, name


@pytest.mark.parametrize("status", [301, 400, 401, 403, 404, 405, 418, 429, 500, 501, 507])
def test_whatever_a_server_says_is_a_typed_error_without_its_words(
    address: str, proxy: Proxy, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "MAX_RETRIES", 0)
    store, key = at(proxy.endpoint, address), BlobKey(DIGEST, new_generation())
    proxy.add("refuse", "GET HEAD PUT POST DELETE", status=status, code="SignatureDoesNotMatch", times=FOREVER)
    for operation in OPERATIONS.values():
        with suppress(_Silent):
            refused(LoregError, lambda operation=operation: _or_silent(operation(store, key)))


class _Silent(Exception):
    """There was nothing to complain of."""


def _or_silent(_: object) -> None:
    raise _Silent


ADDRESSES = [
    "s3://",
    "s3:///x",
    f"s3://{s3_server.KEY_ID}:{s3_server.SECRET}@bucket/x",
    "s3://bucket/../x",
    "s3://bucket/x//y",
    "s3://bucket/x?versionId=1",
    "s3://bucket/x#y",
    "s3://bucket/x y",
    "s3://bucket/é",
    f"https://{s3_server.KEY_ID}:{s3_server.SECRET}@server/bucket",
    "gs://bucket/x",
    "relative/path",
    "file://relative/path",
    "",
]


@pytest.mark.parametrize("address", ADDRESSES)
def test_what_is_no_address(address: str) -> None:
    refused(UsageError, lambda: open_store(address))


def test_without_obstore(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "obstore.store", None)
    assert r"pip install 'loreg[s3]'" in refused(NotFound, lambda: open_store(address))


def test_ctrl_c_is_heard_while_a_server_says_nothing(address: str) -> None:
    """And not only after the two minutes that a request may take."""
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        store = at(f"http://127.0.0.1:{deaf.getsockname()[1]}", address)
        asked = threading.Event()

        def interrupt() -> None:
            deaf.accept()
            os.kill(os.getpid(), signal.SIGINT)
            asked.set()

        threading.Thread(target=interrupt, daemon=True).start()
        began = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            list(store.keys())
        assert asked.wait(5) and time.monotonic() - began < client.REQUEST_TIMEOUT.total_seconds()


# --- the server dies --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_server_that_is_killed_inside_an_upload(address: str) -> None:
    server = s3_server.new_seaweed()
    try:
        with Proxy(server.endpoint) as proxy:
            store = at(proxy.endpoint, address)
            before = [put(store, *SMALL), put(store, *LARGE)]
            proxy.add("call", "PUT", "partNumber=3", then=server.kill)
            refused(RemoteError, lambda: put(store, *LARGE))
            server.start()
            proxy.faults.clear()
            assert sorted(store.keys()) == sorted(before)
            assert [store.read(key) for key in before] == [DATA, _LARGE]
            assert store.read(put(store, *LARGE)) == _LARGE
    finally:
        server.stop()
