"""A version to the Hub and back, through the unmodified client and a server that keeps to the Hub's contract."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
from hub_server import HubServer

import loreg
from loreg.errors import BadInput, LoregError, NotFound, RemoteError, UsageError

REMOTE = "hf://team/sql"


@pytest.fixture
def other(tmp_path: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> loreg.Registry:
    """Another person's empty registry; both talk to the loopback Hub."""
    for name, value in hub.environment(tmp_path / "hf").items():
        monkeypatch.setenv(name, value)
    return loreg.open(tmp_path / "other")


def head(hub: HubServer) -> dict[str, bytes]:
    repo = hub.repos["team/sql"]
    return {path: blob.data for path, blob in repo.commits[repo.branches["main"]].items()}


def test_one_commit_with_a_plain_peft_adapter_and_the_manifest(
    pushed: loreg.Registry, other: loreg.Registry, hub: HubServer, tiny_adapter: Path
) -> None:
    commit = pushed.sync_push("sql", REMOTE)
    assert commit == hub.repos["team/sql"].branches["main"]
    expected = {**tiny.files_in(tiny_adapter), "loreg.json": pushed.resolve("sql").manifest.dump()}
    assert {name: data for name, data in head(hub).items() if name != ".gitattributes"} == expected


def test_what_was_pushed_here_is_the_same_version_there(
    pushed: loreg.Registry, other: loreg.Registry, tiny_adapter: Path, tmp_path: Path
) -> None:
    pushed.sync_push("sql", REMOTE)
    version = other.sync_pull(REMOTE, "theirs", ["prod"])
    assert version.digest == pushed.resolve("sql").digest
    assert other.resolve("theirs:prod").digest == version.digest
    other.export("theirs", tmp_path / "again")
    assert tiny.files_in(tmp_path / "again") == tiny.files_in(tiny_adapter)
    assert other.verify("theirs:v1").ok


def test_a_composed_version_keeps_its_own_factors(
    pushed: loreg.Registry, other: loreg.Registry, tmp_path: Path, tiny_base: Path
) -> None:
    pushed.compose("0.7*sql + humor", "both")
    pushed.sync_push("both", REMOTE)
    assert other.sync_pull(REMOTE, "both").digest == pushed.resolve("both").digest
    other.add_base(tiny_base, "base")
    there = other.merge("both", tmp_path / "there").weights_root
    assert there == pushed.merge("0.7*sql + humor", tmp_path / "here").weights_root


def test_replaced_tensors_travel(
    pushed: loreg.Registry, other: loreg.Registry, tiny_base: Path, tmp_path: Path
) -> None:
    name, value = next((n, t) for n, t in tiny.model(seed=5).items() if t.dtype == "BF16" and len(t.shape) == 2)
    full = tiny.write_adapter(tmp_path / "full", {}, full={name: value})
    pushed.push(full, base="base", name="full")
    pushed.sync_push("full", REMOTE)
    assert other.sync_pull(REMOTE, "full").digest == pushed.resolve("full").digest


def test_a_pull_at_an_old_commit_gives_the_old_version(
    pushed: loreg.Registry, other: loreg.Registry, tmp_path: Path
) -> None:
    old = pushed.sync_push("sql", REMOTE)
    pushed.push(tiny.write_adapter(tmp_path / "new", tiny.adapter(seed=9)), base="base", name="sql")
    pushed.sync_push("sql", REMOTE)
    assert other.sync_pull(f"{REMOTE}@{old}", "old").digest == pushed.resolve("sql:v1").digest
    assert other.sync_pull(REMOTE, "new").digest == pushed.resolve("sql:v2").digest


def refused(other: loreg.Registry, kind: type[LoregError], match: str) -> None:
    with pytest.raises(kind, match=match):
        other.sync_pull(REMOTE, "theirs")
    assert other.list_versions() == []


def test_weights_that_are_not_the_manifests_are_refused(
    pushed: loreg.Registry, other: loreg.Registry, hub: HubServer
) -> None:
    """A file that the Hub vouches for, and that is another than the manifest says."""
    pushed.sync_push("sql", REMOTE)
    weights = bytearray(head(hub)["adapter_model.safetensors"])
    weights[-1] ^= 1
    hub.add("team/sql", {"adapter_model.safetensors": bytes(weights)})
    refused(other, RemoteError, "factors blob")


def test_a_config_that_is_not_the_manifests_is_refused(
    pushed: loreg.Registry, other: loreg.Registry, hub: HubServer
) -> None:
    pushed.sync_push("sql", REMOTE)
    config = json.loads(head(hub)["adapter_config.json"])
    hub.add("team/sql", {"adapter_config.json": json.dumps({**config, "lora_alpha": 99}).encode()})
    refused(other, RemoteError, "source blob")


def test_a_corrupt_download_is_refused(pushed: loreg.Registry, other: loreg.Registry, hub: HubServer) -> None:
    pushed.sync_push("sql", REMOTE)
    hub.fault("corrupt", "adapter_model.safetensors")
    refused(other, RemoteError, "not what the Hub announced")


def test_a_repository_without_a_manifest_says_what_to_do(other: loreg.Registry, hub: HubServer) -> None:
    hub.add("team/sql", {"adapter_config.json": b"{}"})
    refused(other, NotFound, "loreg push")


def test_a_manifest_that_is_not_canonical_is_refused(
    pushed: loreg.Registry, other: loreg.Registry, hub: HubServer
) -> None:
    pushed.sync_push("sql", REMOTE)
    hub.add("team/sql", {"loreg.json": head(hub)["loreg.json"] + b"\n"})
    refused(other, BadInput, "canonical")


def test_errors_of_names(pushed: loreg.Registry, other: loreg.Registry) -> None:
    with pytest.raises(UsageError, match="hf://"):
        pushed.sync_push("sql", "team/sql")
    with pytest.raises(NotFound):
        other.sync_pull("hf://team/nothing", "x")
    with pytest.raises(NotFound, match="nothing"):
        pushed.sync_push("nothing", REMOTE)


def test_damaged_blobs_are_fetched_again(
    pushed: loreg.Registry, other: loreg.Registry, tiny_adapter: Path, tmp_path: Path
) -> None:
    """Each of them at once, the manifest too; what the Hub has not stays damaged, and is told."""
    pushed.sync_push("sql", REMOTE)
    version = pushed.resolve("sql")
    for digest in (version.digest, *(blob.digest for blob in version.manifest.blobs)):
        path = pushed.storage.path(digest)
        path.chmod(0o644)
        path.write_bytes(b"damaged")
    assert not pushed.fsck(repair=True).ok  # from nowhere
    found = pushed.fsck(repair=True, sources=[REMOTE])
    assert found.ok and all("mended by" in str(problem.repaired) for problem in found.problems)
    assert pushed.fsck().ok
    pushed.export("sql", tmp_path / "again")
    assert tiny.files_in(tmp_path / "again") == tiny.files_in(tiny_adapter)
    pushed.storage.path(pushed.resolve("humor").digest).unlink()
    assert not pushed.fsck(repair=True, sources=[REMOTE]).ok
    with pytest.raises(NotFound):
        pushed.fsck(repair=True, sources=["hf://team/nothing"])
