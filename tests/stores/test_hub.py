"""The transport to the Hub, through the unmodified client, against a server that can lie."""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hub_server import OWNER_TOKEN, STRANGER_TOKEN, HubServer
from hypothesis import given
from hypothesis import strategies as st

import loreg
from loreg import hub as transport
from loreg.errors import CheckFailed, Conflict, LoregError, NotFound, RemoteError, UsageError
from loreg.hub import HubFile, HubPin, HubRef

REPO = "alice/sql-lora"
REF = HubRef(REPO)
WEIGHTS = bytes(range(256)) * 64
FILES = {
    "adapter_config.json": b'{"r": 8}',
    "adapter_model.safetensors": WEIGHTS,
    "loreg.json": b'{"format": "loreg/1"}',
    "notes/why.txt": b"because",
}


def tree(root: Path) -> dict[str, bytes]:
    """Everything under ``root``, directories included, so that nothing left behind goes unseen."""
    found = {}
    for path in sorted(root.rglob("*")):
        assert not path.is_symlink(), path
        found[str(path.relative_to(root))] = path.read_bytes() if path.is_file() else b"<directory>"
    return found


def sentence(error: LoregError) -> str:
    text = str(error)
    assert "\n" not in text and text.endswith(".") and len(text) < 500, text
    assert OWNER_TOKEN not in text and STRANGER_TOKEN not in text
    return text


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client waits for seconds between attempts; the attempts are what is tested."""
    monkeypatch.setattr(time, "sleep", lambda _: None)


# Names.


@pytest.mark.parametrize(
    ("text", "repo", "revision"),
    [
        ("hf://alice/sql-lora", "alice/sql-lora", None),
        ("hf://alice/sql.v2_x@main", "alice/sql.v2_x", "main"),
        ("hf://a/b@refs/pr/3", "a/b", "refs/pr/3"),
        ("hf://a/b@" + "0" * 40, "a/b", "0" * 40),
    ],
)
def test_an_address_is_parsed_and_printed_back(text, repo, revision):
    ref = HubRef.parse(text)
    assert (ref.repo, ref.revision) == (repo, revision)
    assert str(ref) == text


@pytest.mark.parametrize(
    "text",
    [
        *("", "hf://", "hf://gpt2", "hf:///b", "hf://a/", "hf://a/b/c", "hf://a/../b", "hf://../b", "hf://a/b@"),
        *(
            "hf://a/..",
            "hf://a/b..c",
            "hf://a/b--c",
            "hf://a/-b",
            "hf://a/.b",
            "hf://a/b.",
            "hf://a/b c",
            "hf://a/b\n",
        ),
        *("hf://a/b@../x", "hf://a/b@x..y", "hf://a/b@-x", "hf://a/b@x?y", "hf://a/b@x//y", "hf://a/b@x/", "a/b"),
        *(
            "https://huggingface.co/a/b",
            "hf://a\\b/c",
            "hf://é/b",
            "hf://a/" + "b" * 97,
            "hf://a/b@x\n",
            "hf://a/b%2f",
        ),
    ],
)
def test_a_malformed_address_is_refused(text):
    with pytest.raises(UsageError):
        HubRef.parse(text)


def test_a_model_may_have_no_owner():
    assert HubRef.parse_id("gpt2@607a30d") == HubRef("gpt2", "607a30d")
    with pytest.raises(UsageError):
        HubRef.parse_id("../gpt2")


@given(st.text(st.characters(codec="utf-8"), max_size=12))
def test_what_is_accepted_cannot_leave_a_path(text):
    try:
        ref = HubRef.parse_id(text)
    except UsageError:
        return
    assert ".." not in str(ref) and all(part not in ("", ".") for part in ref.repo.split("/"))
    assert str(ref).isascii() and str(ref).isprintable() and not set(str(ref)) & set("?#%\\ ")


# Round trip.


def test_what_is_sent_is_fetched_byte_for_byte(hub: HubServer, tmp_path: Path):
    (tmp_path / "weights").write_bytes(WEIGHTS)
    commit = transport.send(REF, FILES | {"adapter_model.safetensors": tmp_path / "weights"}, "sql v1")
    pinned = transport.pin(REF)
    assert pinned.commit == commit
    assert pinned.sha256s.keys() == {"adapter_model.safetensors"}
    assert pinned.file("loreg.json").git_oid and pinned.file("loreg.json").sha256 is None
    assert len(hub.repos[REPO].commits) == 2  # the one that makes a repository, and ours

    transport.fetch(pinned, FILES, tmp_path / "got")
    assert tree(tmp_path / "got") == FILES | {"notes": b"<directory>"}
    assert not [request for request in hub.requests if "LEAK" in request]


def test_a_pin_is_one_request_and_no_download(hub: HubServer):
    hub.add(REPO, FILES)
    transport.pin(REF)  # the client may ask for more, once in a process
    hub.requests.clear()
    transport.pin(REF)
    assert hub.requests == [f"GET /api/models/{REPO}"]


def test_a_large_file_goes_up_in_parts(hub: HubServer, tmp_path: Path):
    hub.multipart_over = 5000
    transport.send(REF, {"a.safetensors": WEIGHTS, "b.safetensors": WEIGHTS[:5000]}, "two")
    assert sum("/upload/" in request for request in hub.requests) == 4 + 1
    transport.fetch(transport.pin(REF), None, tmp_path / "got")
    assert tree(tmp_path / "got")["a.safetensors"] == WEIGHTS


def test_sending_again_adds_one_commit_and_keeps_what_is_not_named(hub: HubServer):
    transport.send(REF, {"README.md": b"# Mine\n", "loreg.json": b"1"}, "first")
    second = transport.send(REF, {"loreg.json": b"2"}, "second")
    assert len(hub.repos[REPO].commits) == 3
    assert {"README.md", "loreg.json"} <= {file.path for file in transport.pin(REF).files}
    assert transport.send(REF, {"loreg.json": b"2"}, "nothing new") == second


def test_a_branch_is_made_where_it_is_missing(hub: HubServer):
    for ref in (HubRef("bob/new", "v2"), HubRef("bob/new", "v3")):
        commit = transport.send(ref, {"loreg.json": ref.revision.encode()}, "on a branch")
        assert transport.pin(ref).commit == commit != transport.pin(HubRef("bob/new")).commit


def test_a_pin_stays_after_the_branch_has_moved(hub: HubServer, tmp_path: Path):
    transport.send(REF, FILES, "v1")
    old = transport.pin(REF)
    transport.send(REF, {"adapter_model.safetensors": WEIGHTS[::-1], "loreg.json": b"{}"}, "v2")
    assert transport.pin(REF).commit != old.commit
    assert transport.pin(HubRef(REPO, old.commit)) == old
    transport.fetch(old, FILES, tmp_path / "got")
    assert (tmp_path / "got/adapter_model.safetensors").read_bytes() == WEIGHTS


def test_fetching_some_files_replaces_those_and_no_others(hub: HubServer, tmp_path: Path):
    hub.add(REPO, FILES)
    into = tmp_path / "got"
    into.mkdir()
    (into / "loreg.json").write_bytes(b"old")
    (into / "mine.txt").write_bytes(b"mine")
    transport.fetch(transport.pin(REF), ["loreg.json"], into)
    assert tree(into) == {"loreg.json": FILES["loreg.json"], "mine.txt": b"mine"}
    with pytest.raises(NotFound, match=r"nowhere\.bin"):
        transport.fetch(transport.pin(REF), ["nowhere.bin"], into)


def test_rotten_bytes_in_the_shared_cache_are_not_copied(hub: HubServer, tmp_path: Path):
    from huggingface_hub import hf_hub_download

    hub.add(REPO, FILES)
    pinned = transport.pin(REF)
    kept = Path(hf_hub_download(REPO, "loreg.json", revision=pinned.commit, endpoint=hub.endpoint))
    kept.resolve().write_bytes(FILES["loreg.json"][::-1])
    transport.fetch(pinned, ["loreg.json"], tmp_path / "got")
    assert tree(tmp_path / "got") == {"loreg.json": FILES["loreg.json"]}


# Faults: every one is RemoteError in one sentence, and nothing is left.


@pytest.mark.parametrize("path", ["adapter_model.safetensors", "loreg.json"])
@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ({"kind": "corrupt"}, "expected (sha256|git blob) [0-9a-f]+, found [0-9a-f]+"),
        ({"kind": "truncate"}, r"size \d+ but has size \d+ \([^ ]+; try again"),
        ({"kind": "drop"}, "did not answer"),
        ({"kind": "etag", "value": "../../../escaped"}, "ETag"),
        ({"kind": "etag", "value": "/tmp/escaped"}, "ETag"),
        ({"kind": "commit", "value": "../../../escaped"}, "commit"),
        ({"kind": "status", "method": "HEAD", "value": 503}, "503"),
        ({"kind": "status", "method": "GET", "value": 403}, "403"),
        ({"kind": "gated"}, "gated"),
        ({"kind": "echo", "method": "GET", "value": 500}, "500"),
    ],
    ids=lambda value: "-".join(map(str, value.values())).replace("/", "_") if isinstance(value, dict) else "",
)
def test_a_faulty_download_leaves_nothing(hub: HubServer, tmp_path: Path, no_waiting: None, fault, says, path):
    hub.add(REPO, FILES)
    pinned = transport.pin(REF)
    hub.fault(**fault, url=path)
    with pytest.raises(RemoteError, match=says) as refused:
        transport.fetch(pinned, FILES, tmp_path / "got")
    assert path in sentence(refused.value) and REPO in str(refused.value)
    assert not (tmp_path / "got").exists() or tree(tmp_path / "got") == {}
    assert not list(tmp_path.rglob("*escaped*")) and not Path("/tmp/escaped").exists()


def test_a_connection_that_drops_once_is_resumed(hub: HubServer, tmp_path: Path, no_waiting: None):
    hub.add(REPO, FILES)
    hub.fault("drop", "adapter_model", times=1)
    transport.fetch(transport.pin(REF), FILES, tmp_path / "got")
    assert (tmp_path / "got/adapter_model.safetensors").read_bytes() == WEIGHTS


@pytest.mark.parametrize(
    "sibling",
    [
        {"rfilename": "../evil", "size": 1, "blobId": "0" * 40},
        {"rfilename": "/etc/evil", "size": 1, "blobId": "0" * 40},
        {"rfilename": "a/./evil", "size": 1, "blobId": "0" * 40},
        {"rfilename": "a\\..\\evil", "size": 1, "blobId": "0" * 40},
        {"rfilename": "a\x1b[2Jevil", "size": 1, "blobId": "0" * 40},
        {"rfilename": "", "size": 1, "blobId": "0" * 40},
        {"rfilename": "evil", "size": -1, "blobId": "0" * 40},
        {"rfilename": "evil", "size": 1, "blobId": None},
        {"rfilename": "evil", "size": 1, "lfs": {"sha256": "0" * 63, "size": 1, "pointerSize": 1}},
        {"rfilename": "evil", "size": 1, "lfs": {"size": 1}},
        {"rfilename": "loreg.json", "size": 1, "blobId": "0" * 40},
        "evil",
        None,
    ],
)
def test_a_hostile_listing_is_refused(hub: HubServer, sibling):
    hub.add(REPO, FILES)
    hub.extra_siblings.append(sibling)
    with pytest.raises(RemoteError) as refused:
        transport.pin(REF)
    assert sentence(refused.value).isprintable()


@pytest.mark.parametrize("lie", ["f" * 40, "../x", None])
def test_a_commit_is_the_one_that_was_asked_for(hub: HubServer, lie):
    commit = hub.add(REPO, FILES)
    hub.fault("commit", "/revision/", value=lie)
    with pytest.raises(RemoteError, match="commit") as refused:
        transport.pin(HubRef(REPO, commit))
    sentence(refused.value)


def test_no_value_of_a_file_or_a_pin_escapes_its_directory():
    with pytest.raises(RemoteError, match="inside"):
        HubFile("../x", 1, "0" * 64)
    with pytest.raises(RemoteError, match="digest"):
        HubFile("x", 1, "0" * 64, "0" * 40)
    with pytest.raises(RemoteError, match="commit"):
        HubPin("a/b", "../x", ())


def test_a_size_is_compared_before_and_after_a_download(hub: HubServer, tmp_path: Path):
    hub.add(REPO, FILES)
    pinned = transport.pin(REF)
    true = pinned.file("adapter_model.safetensors")
    with pytest.raises(RemoteError, match=f"{true.size} bytes, found 3"):
        true.check(b"123", "a test")
    other = HubPin(REPO, pinned.commit, (HubFile(true.path, true.size + 1, true.sha256),))
    with pytest.raises(RemoteError, match=f"{true.size + 1} bytes, found {true.size}") as refused:
        transport.fetch(other, None, tmp_path / "got")
    sentence(refused.value)
    assert not [request for request in hub.requests if request.startswith("GET /store/")]


def test_a_link_under_the_target_is_not_followed(hub: HubServer, tmp_path: Path):
    hub.add(REPO, FILES)
    (tmp_path / "got").mkdir()
    (tmp_path / "outside").mkdir()
    (tmp_path / "got/notes").symlink_to(tmp_path / "outside")
    with pytest.raises(Conflict, match="notes"):
        transport.fetch(transport.pin(REF), None, tmp_path / "got")
    assert not list((tmp_path / "outside").iterdir())


@pytest.mark.parametrize(
    ("cause", "family"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), CheckFailed),
        (OSError(errno.EROFS, "Read-only file system", "/cache"), UsageError),
        (PermissionError(errno.EACCES, "Permission denied", "/cache"), UsageError),
        (PermissionError(errno.EACCES, "Permission denied"), RemoteError),  # of a socket
    ],
)
def test_what_the_disk_refuses_is_not_blamed_on_the_hub(hub: HubServer, tmp_path: Path, monkeypatch, cause, family):
    from huggingface_hub import HfApi

    def failing(*_: object, **__: object) -> None:
        raise RuntimeError("wrapped") from cause

    hub.add(REPO, FILES)
    pinned = transport.pin(REF)
    monkeypatch.setattr(HfApi, "hf_hub_download", failing)
    with pytest.raises(family, match=cause.strerror) as refused:
        transport.fetch(pinned, None, tmp_path / "got")
    assert sentence(refused.value) and tree(tmp_path / "got") == {}


# Who may, and what is there.


def test_what_is_not_there_is_not_found(hub: HubServer, tmp_path: Path):
    hub.add(REPO, FILES)
    gone = HubPin(REPO, "0" * 40, (HubFile("loreg.json", 1, None, "0" * 40),))
    with pytest.raises(NotFound, match="alice/nothing"):
        transport.pin(HubRef("alice/nothing"))
    with pytest.raises(NotFound, match="@v9"):
        transport.pin(HubRef(REPO, "v9"))
    with pytest.raises(NotFound, match="revision"):
        transport.fetch(gone, None, tmp_path / "got")


@pytest.mark.parametrize("token", [None, "hf_expired", STRANGER_TOKEN])
def test_a_private_repository_needs_a_login_that_may(hub: HubServer, monkeypatch: pytest.MonkeyPatch, token):
    transport.send(REF, FILES, "secret", private=True)
    assert hub.repos[REPO].private
    transport.pin(REF)
    monkeypatch.delenv("HF_TOKEN")
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(NotFound if token == STRANGER_TOKEN else RemoteError, match="hf auth login") as refused:
        transport.pin(REF)
    assert "hf_expired" not in sentence(refused.value)


@pytest.mark.parametrize("token", [None, STRANGER_TOKEN])
@pytest.mark.parametrize("exists", [False, True])
def test_writing_needs_a_login_that_may(hub: HubServer, monkeypatch: pytest.MonkeyPatch, token, exists):
    if exists:
        hub.add(REPO, FILES)
    before = dict(hub.repos[REPO].branches) if exists else None
    monkeypatch.delenv("HF_TOKEN")
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(RemoteError, match="hf auth login") as refused:
        transport.send(REF, {"loreg.json": b"mine now"}, "mine")
    sentence(refused.value)
    assert (dict(hub.repos[REPO].branches) if exists else None) == before


def test_a_public_repository_is_not_taken_for_a_private_one(hub: HubServer):
    hub.add(REPO, FILES)
    with pytest.raises(Conflict, match="public"):
        transport.send(REF, {"secret": b"x"}, "secret", private=True)


def test_a_file_that_the_hub_ignores_is_missed(hub: HubServer):
    hub.add(REPO, {".gitignore": b"loreg.json\n"})
    with pytest.raises(RemoteError, match=r"loreg\.json") as refused:
        transport.send(REF, {"loreg.json": b"{}", "x": b"1"}, "half")
    sentence(refused.value)


def test_a_hub_that_holds_other_bytes_than_were_sent_is_found_out(hub: HubServer):
    hub.lfs[hashlib.sha256(WEIGHTS).hexdigest()] = WEIGHTS[::-1]
    with pytest.raises(RemoteError, match=r"adapter_model\.safetensors .*expected sha256") as refused:
        transport.send(REF, FILES, "sql")
    sentence(refused.value)


def test_a_commit_cannot_be_written_to(hub: HubServer):
    commit = hub.add(REPO, FILES)
    with pytest.raises(UsageError, match="branch"):
        transport.send(HubRef(REPO, commit), {"a": b"1"}, "m")
    for files, message in (({}, "m"), ({"a": b""}, " "), ({"../a": b"1"}, "m"), ({"a\\b": b"1"}, "m")):
        with pytest.raises(UsageError):
            transport.send(REF, files, message)


@pytest.mark.parametrize(("status", "says"), [(500, "500"), (503, "503"), (429, "429"), (403, "hf auth login")])
def test_a_server_that_says_the_token_back_is_not_quoted(hub: HubServer, status, says, no_waiting: None):
    hub.add(REPO, FILES)
    hub.fault("echo", value=status)
    for call in (lambda: transport.pin(REF), lambda: transport.send(REF, {"a": b"1"}, "m")):
        with pytest.raises(RemoteError, match=says) as refused:
            call()
        assert "[token]" in sentence(refused.value) and "\x1b" not in str(refused.value)


def test_a_token_that_no_header_can_hold_is_not_quoted(hub: HubServer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_TOKEN", "hf_séc\x01ret")
    with pytest.raises(RemoteError) as refused:
        transport.pin(REF)
    assert "hf_s" not in sentence(refused.value)


# Endpoints and networks.


def test_the_endpoint_is_the_one_of_the_call(hub: HubServer, monkeypatch: pytest.MonkeyPatch):
    hub.add(REPO, FILES)
    with HubServer() as other:
        commit = other.add(REPO, {"loreg.json": b"another"})
        assert transport.pin(REF, endpoint=other.endpoint).commit == commit
        monkeypatch.setenv("HF_ENDPOINT", other.endpoint + "/")
        assert transport.pin(REF).commit == commit
    for bad in ("huggingface.co", "ftp://x", "http://", "http://[::1", "http://user:pass@:x"):
        monkeypatch.setenv("HF_ENDPOINT", bad)
        with pytest.raises(UsageError, match="HF_ENDPOINT") as refused:
            transport.pin(REF)
        assert "pass" not in sentence(refused.value)


def test_without_a_network_it_is_one_sentence_after_one_attempt(hub: HubServer, tmp_path, monkeypatch):
    hub.add(REPO, FILES)
    pinned = transport.pin(REF)
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    for endpoint in ("http://hub.invalid", "http://127.0.0.1:9"):
        for call in (
            lambda e: transport.pin(HubRef.parse_id("gpt2"), endpoint=e),
            lambda e: transport.snapshot(HubRef.parse_id("gpt2"), endpoint=e),
            lambda e: transport.fetch(pinned, None, tmp_path / "got", endpoint=e),
            lambda e: transport.send(REF, FILES, "m", endpoint=e),
        ):
            with pytest.raises(RemoteError, match=r"did not answer .*check the network") as refused:
                call(endpoint)
            sentence(refused.value)
    assert waits == [] and not (tmp_path / "got").exists()


def test_offline_mode_is_named(hub: HubServer, monkeypatch: pytest.MonkeyPatch):
    from huggingface_hub import constants

    hub.add(REPO, FILES)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(RemoteError, match="HF_HUB_OFFLINE is set; unset it") as refused:
        transport.pin(REF)
    sentence(refused.value)
    assert hub.requests == []


def test_a_child_process_finds_the_hub_by_its_environment(hub: HubServer, tmp_path: Path):
    """The client as anyone has it: nothing set but variables, before it is imported."""
    code = (
        "import sys, pathlib, loreg.hub as h\n"
        "assert 'huggingface_hub' not in sys.modules and 'torch' not in sys.modules\n"
        f"print(h.send(h.HubRef.parse('hf://{REPO}'), {FILES!r}, 'from a child'))\n"
        f"h.fetch(h.pin(h.HubRef.parse('hf://{REPO}@main')), {list(FILES)}, pathlib.Path('got'))\n"
    )
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | hub.environment(tmp_path / "home")
    env["PYTHONPATH"] = os.pathsep.join([str(Path(loreg.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == transport.pin(REF).commit
    assert tree(tmp_path / "got") == FILES | {"notes": b"<directory>"}


# Bases.

BASE = {
    "config.json": b"{}",
    "model-00001-of-00002.safetensors": WEIGHTS,
    "model-00002-of-00002.safetensors": WEIGHTS[::-1],
    "model.safetensors.index.json": b'{"weight_map": {}}',
    "tokenizer.json": b"[]",
}
OTHERS = {
    "pytorch_model.bin": b"pickle",
    "modeling_x.py": b"import os",
    "onnx/config.json": b"{}",
    "onnx/model.safetensors": b"x",
    "consolidated.safetensors": b"y",
    "model.fp16.safetensors": b"z",
    "README.md": b"#",
    "x.model/run.sh": b"rm",
}


def test_a_base_is_downloaded_once_and_without_code(hub: HubServer):
    commit = hub.add("gpt2", BASE | OTHERS)
    pinned, root = transport.snapshot(HubRef.parse_id("gpt2"), verify=True)
    assert pinned.commit == commit
    assert {path.name: path.read_bytes() for path in root.iterdir()} == BASE
    assert str(root).startswith(os.environ["HF_HOME"])

    hub.requests.clear()
    assert transport.snapshot(HubRef.parse_id("gpt2"), verify=True) == (pinned, root)
    assert hub.requests == ["GET /api/models/gpt2"]


def test_a_base_without_safetensors_is_refused_before_a_download(hub: HubServer):
    hub.add("old/model", OTHERS)
    with pytest.raises(NotFound, match=r"pytorch_model\.bin") as refused:
        transport.snapshot(HubRef("old/model"))
    sentence(refused.value)
    assert not [request for request in hub.requests if "/resolve/" in request]


@pytest.mark.parametrize("path", ["model-00001-of-00002.safetensors", "config.json"])
@pytest.mark.parametrize("fault", ["corrupt", "truncate"])
def test_a_rotten_base_leaves_the_cache(hub: HubServer, tmp_path: Path, path, fault):
    hub.add("gpt2", BASE)
    hub.fault(fault, path, times=1)
    with pytest.raises(RemoteError) as refused:
        transport.snapshot(HubRef.parse_id("gpt2"), verify=True)
    sentence(refused.value)
    _, root = transport.snapshot(HubRef.parse_id("gpt2"), verify=True)
    assert {file.name: file.read_bytes() for file in root.iterdir()} == BASE


def test_a_base_with_an_etag_that_climbs_is_refused_before_the_client_sees_it(hub: HubServer, tmp_path: Path):
    hub.add("gpt2", BASE)
    hub.fault("etag", "config.json", value="../../../../escaped")
    with pytest.raises(RemoteError, match="ETag") as refused:
        transport.snapshot(HubRef.parse_id("gpt2"))
    sentence(refused.value)
    assert not list(tmp_path.rglob("*escaped*"))
