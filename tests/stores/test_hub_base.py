"""A base that is a Hub id: downloaded, verified, known by its bytes and by its commit."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
from hub_server import HubServer

import loreg
from loreg.errors import NotFound, RemoteError
from loreg.format.fingerprint import Match


@pytest.fixture
def commit(tmp_path: Path, hub: HubServer, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The commit at which ``team/base`` on the loopback Hub is ``tiny_base``."""
    for name, value in hub.environment(tmp_path / "hf").items():
        monkeypatch.setenv(name, value)
    # The client reads this when it is imported, which may have been in another test.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    return hub.add("team/base", tiny.files_in(tiny_base))


def test_a_hub_base_has_the_identity_of_its_files(
    registry: loreg.Registry, commit: str, tiny_base: Path, tmp_path: Path
) -> None:
    base = registry.add_base("team/base", "base")
    assert base.manifest.identity == registry.add_base(tiny_base, "local").manifest.identity
    assert base.hub is not None and (base.hub.repo, base.hub.commit) == ("team/base", commit)
    assert set(base.hub.files) == {"model.safetensors"}
    assert registry.show_base("base").hub == base.hub


def test_the_pin_is_in_the_manifest_and_is_the_strongest_match(
    registry: loreg.Registry, commit: str, tiny_adapter: Path, tmp_path: Path
) -> None:
    version = registry.push(tiny_adapter, base="team/base", name="sql")
    assert version.manifest.base.hub is not None
    assert version.manifest.base.hub.commit == commit
    assert registry.merge("sql", tmp_path / "out").base_match is Match.HUB_PIN


def test_a_local_copy_matches_by_its_weights(
    registry: loreg.Registry, commit: str, tiny_adapter: Path, tiny_base: Path, tmp_path: Path
) -> None:
    registry.push(tiny_adapter, base="team/base", name="sql")
    assert registry.merge("sql", tmp_path / "out", base=tiny_base).base_match is Match.WEIGHTS


def test_a_revision_is_that_revision(registry: loreg.Registry, hub: HubServer, commit: str, tmp_path: Path) -> None:
    other = tiny.write_model(tmp_path / "other", tiny.model(seed=7))
    hub.add("team/base", tiny.files_in(other))
    old = registry.add_base(f"team/base@{commit}", "old")
    new = registry.add_base("team/base", "new")
    assert old.hub is not None and old.hub.commit == commit
    assert old.manifest.identity.weights_root != new.manifest.identity.weights_root
    assert registry.add_base("team/base", "again", revision=commit).manifest == old.manifest


def test_weights_that_arrive_damaged_are_refused(registry: loreg.Registry, hub: HubServer, commit: str) -> None:
    hub.fault("corrupt", "model.safetensors")
    with pytest.raises(RemoteError, match=r"model\.safetensors"):
        registry.add_base("team/base")
    assert registry.list_bases() == []


def test_an_id_that_is_not_there(registry: loreg.Registry, commit: str) -> None:
    with pytest.raises(NotFound, match="team/nothing"):
        registry.add_base("team/nothing")
