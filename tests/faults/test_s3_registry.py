"""A registry whose blobs are in S3, end to end: damage is found and mended, and whatever request of a push or of a
collection fails, nothing that was acknowledged is lost and nothing is seen by halves."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import s3_server
import tampering
import tiny
from backends import PLACES, Place
from s3_proxy import Proxy

import loreg
from loreg.errors import BadInput, LoregError, NotFound, RemoteError
from loreg.store import BlobKey, client, objects

FOREVER = 10**9
ANY = "GET HEAD PUT POST DELETE"
NONE = timedelta()


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return PLACES["sqlite-s3"](tmp_path)


@pytest.fixture
def proxy(place: Place, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """Between the registries that are opened from now on and the server."""
    monkeypatch.setattr(client, "MAX_RETRIES", 0)
    monkeypatch.setattr(objects, "ATTEMPTS", 1)
    with Proxy(s3_server.seaweed().endpoint) as opened:
        monkeypatch.setenv("AWS_ENDPOINT_URL", opened.endpoint)
        yield opened


@pytest.fixture
def registry(place: Place) -> Iterator[loreg.Registry]:
    with place.open() as opened:
        yield opened


def keys(registry: loreg.Registry) -> set[BlobKey]:
    return set(registry.storage.store.keys())


def whole(registry: loreg.Registry) -> None:
    for row in registry.list_versions(all_versions=True):
        version = registry.resolve(f"{row.name}:v{row.number}")
        for blob in version.manifest.blobs:
            registry.storage.store.read(registry.storage.key(blob.digest))
    found = registry.fsck()
    assert found.ok and not found.problems


# --- damage ---------------------------------------------------------------------------------------------


def test_every_damage_is_found_and_mended(pushed: loreg.Registry, place: Place, tmp_path: Path) -> None:
    """From another registry, be it in files or in S3."""
    loreg.copy_store(
        str(place.store),
        tmp_path / "files",
        source_catalog=str(place.home / "catalog.db"),
    )
    elsewhere = s3_server.fresh_prefix()
    loreg.copy_store(str(place.store), elsewhere, catalog=False)
    store = pushed.storage.store
    before = {key: store.read(key) for key in keys(pushed)}
    for source in (tmp_path / "files", elsewhere):
        for number, (key, data) in enumerate(
            [(pushed.storage.key(key.digest), data) for key, data in before.items()]
        ):
            if number % 2:
                tampering.remove(store, key)
            else:
                tampering.overwrite(store, key, bytes([data[0] ^ 1]) + data[1:])
        found = pushed.fsck()
        assert not found.ok and len(found.problems) == len(before)
        assert all(problem.touches and problem.kind in ("corrupt", "missing") for problem in found.problems)
        found = pushed.fsck(repair=True, sources=[source])
        assert found.ok and len(found.problems) == len(before)
        whole(pushed)
        assert {key.digest: store.read(key) for key in keys(pushed)} == {
            key.digest: data for key, data in before.items()
        }
    bucket, _, prefix = str(place.store).removeprefix("s3://").partition("/")
    boto = s3_server.client(os.environ["AWS_ENDPOINT_URL"])
    aside = boto.list_objects_v2(Bucket=bucket, Prefix=f"{prefix}/quarantine/")["Contents"]
    assert len(aside) == 2 * -(-len(before) // 2)


def test_what_is_flipped_on_its_way_has_nothing_put_aside(pushed: loreg.Registry, proxy: Proxy, place: Place) -> None:
    with place.open() as beyond:
        for read in (beyond.storage.read, beyond.storage.path):
            digest = beyond.find("sql").digest
            (beyond.home / "cache" / "blobs" / digest.hex[:2] / digest.hex).unlink(missing_ok=True)
            proxy.add("flip answer", "GET", "blobs/")
            assert read(digest)
        assert len(keys(beyond)) == len(keys(pushed)) and beyond.fsck().ok


# --- faults ---------------------------------------------------------------------------------------------


def through(place: Place, work: Callable[[loreg.Registry], Any]) -> Any:
    """The result, or the error if it is a typed one; anything else fails the test."""
    try:
        with place.open() as opened:
            return work(opened)
    except LoregError as error:
        for secret in (s3_server.SECRET, s3_server.KEY_ID):
            assert secret not in str(error)
        return error


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["refuse", "lose"])
def test_a_push_that_fails_at_any_request(
    pushed: loreg.Registry, proxy: Proxy, place: Place, tmp_path: Path, kind: str
) -> None:
    """From that one on the server is gone; with ``lose`` it does what it is told, and nobody hears of it."""

    def push(registry: loreg.Registry) -> loreg.Version:
        return registry.push(folder, base="base", name="new", tags=["prod"])

    acknowledged: dict[int, Any] = {}
    refused = 0
    for step in range(100):
        folder = tiny.write_adapter(tmp_path / f"new{step}", tiny.adapter(seed=100 + step))
        proxy.faults.clear()
        fault = proxy.add(kind, ANY, skip=step, times=FOREVER)
        result = through(place, push)
        proxy.faults.clear()
        if isinstance(result, LoregError):
            assert isinstance(result, RemoteError), result
            refused += 1
        else:
            acknowledged[result.number] = result.digest
        with place.open() as after:
            there = {row.number: row.digest for row in after.list_versions(query="new", all_versions=True)}
            assert acknowledged.items() <= there.items()
            if there:
                assert after.resolve("new").number == after.resolve("new:prod").number == max(there)
        if not fault.hits:
            break
    assert refused > 15 and acknowledged
    for _ in range(2):
        whole(pushed)
        pushed.collect(grace=NONE)
        there = {row.number: row.digest for row in pushed.list_versions(query="new", all_versions=True)}
        assert acknowledged.items() <= there.items()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["refuse", "lose"])
def test_a_collection_that_fails_at_any_request(
    pushed: loreg.Registry, proxy: Proxy, place: Place, tmp_path: Path, kind: str
) -> None:
    """What it was about to delete is pushed again after that, and lacks nothing."""
    folder = tiny.write_adapter(tmp_path / "again", tiny.adapter(seed=77))
    failed = 0
    for step in range(100):
        with place.open() as before:
            version = before.push(folder, base="base", name="again")
            for blob in version.manifest.blobs:
                before.storage.store.read(before.storage.key(blob.digest))
            before.collect(grace=NONE)  # what the last one has left, lest the next has ever more to do
            before.remove("again")
        proxy.faults.clear()
        fault = proxy.add(kind, ANY, skip=step, times=FOREVER)
        result = through(place, lambda registry: registry.collect(grace=NONE))
        proxy.faults.clear()
        failed += isinstance(result, LoregError)
        assert not isinstance(result, LoregError) or isinstance(result, RemoteError | BadInput), result
        if not fault.hits:
            break
    assert failed > 5 and not isinstance(result, LoregError)
    assert {row.name for row in pushed.list_versions()} == {"sql", "humor"}
    whole(pushed)


def test_a_delete_that_arrives_after_the_next_push(
    pushed: loreg.Registry, proxy: Proxy, place: Place, tiny_adapter: Path
) -> None:
    pushed.remove("sql")
    proxy.add("hold", "POST", "delete", times=FOREVER)
    assert isinstance(through(place, lambda registry: registry.collect(grace=NONE)), RemoteError)
    proxy.faults.clear()
    with place.open() as after:
        assert after.push(tiny_adapter, base="base", name="sql").number == 2
    assert proxy.held and set(proxy.release()) == {200}
    whole(pushed)
    with pytest.raises(NotFound):
        pushed.resolve("sql:v1")


def test_a_server_that_is_gone_while_blobs_are_read(
    pushed: loreg.Registry, proxy: Proxy, place: Place, tmp_path: Path
) -> None:
    proxy.add("refuse", "GET", "blobs/", times=FOREVER)
    for work in (
        lambda registry: registry.resolve("sql"),
        lambda registry: registry.merge("sql+humor", tmp_path / "out"),
        lambda registry: registry.export("sql", tmp_path / "out"),
    ):
        assert isinstance(through(place, work), RemoteError)
    assert not (tmp_path / "out").exists()
    proxy.faults.clear()
    assert through(place, lambda registry: registry.merge("sql+humor", tmp_path / "out")).verification.ok
    whole(pushed)
