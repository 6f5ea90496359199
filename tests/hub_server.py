"""A Hugging Face Hub on the loopback, for an unmodified ``huggingface_hub`` client.

Keeps to the Hub's HTTP contract as far as model repositories go: metadata, trees, ``resolve`` with its headers and
its redirect of large files to a store on another host, creation, preupload, git LFS (basic and multipart), commits.
Everything is in memory. It announces no Xet, which would need a second protocol.

Faults are answers that a broken or hostile Hub could give: ``hub.fault("corrupt", "adapter_model")``.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

import pytest

OWNER_TOKEN = "hf_OwnerOfEverything0123456789"
STRANGER_TOKEN = "hf_StrangerWithALogin9876543210"

_LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".gguf")
_LFS_FROM_BYTES = 1 << 20
_REPO = r"(?P<repo>[^/]+(?:/[^/]+)??)"


@dataclass(frozen=True)
class Blob:
    """A file of a commit. ``lfs`` says where the Hub keeps it, and so which digest it knows."""

    data: bytes
    lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def git_oid(self) -> str:
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.data)}\n"
        content = pointer.encode() if self.lfs else self.data
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.git_oid


@dataclass
class Repo:
    private: bool
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, Blob], message: str) -> str:
        tree = "".join(f"{path}\0{blob.git_oid}\n" for path, blob in sorted(files.items()))
        text = f"{self.branches.get(branch)}\n{len(self.commits)}\n{message}\n{tree}"
        commit = hashlib.sha1(text.encode()).hexdigest()
        self.commits[commit] = files
        self.branches[branch] = commit
        return commit


@dataclass
class Fault:
    """``kind``: corrupt, truncate, drop (a body), etag, commit (a header), status, gated, echo (an answer).

    ``times`` None is always.
    """

    kind: str
    url: str
    method: str | None
    value: Any
    times: int | None


class Refusal(Exception):
    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code = status, code


class HubServer:
    """``with HubServer() as hub``: serves at ``hub.endpoint`` until the end of the block.

    ``requests`` lists what was asked, as ``"METHOD /path"``. ``extra_siblings`` are announced beside the files of
    every repository. Uploads of more than ``multipart_over`` bytes are asked for in parts of that size.
    """

    def __init__(self, multipart_over: int = 1 << 30) -> None:
        self.repos: dict[str, Repo] = {}
        self.lfs: dict[str, bytes] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.requests: list[str] = []
        self.extra_siblings: list[dict[str, Any]] = []
        self.multipart_over = multipart_over
        self.lock = threading.RLock()
        self._faults: list[Fault] = []
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        self.store = f"http://localhost:{self._server.server_port}"

    def __enter__(self) -> HubServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def environment(self, home: Path, token: str | None = OWNER_TOKEN) -> dict[str, str]:
        """What a child process needs for its client to talk to this server, and to nothing of the user's."""
        here = {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",  # another test of this process may have gone offline
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1,localhost",
        }
        return here | ({"HF_TOKEN": token} if token else {})

    def add(self, repo: str, files: dict[str, bytes], *, private: bool = False, branch: str = "main") -> str:
        """Commit ``files`` as if somebody had pushed them, and return the commit."""
        with self.lock:
            home = self.repos.setdefault(repo, Repo(private))
            old = home.commits.get(home.branches.get(branch, ""), {})
            new = {path: Blob(data, _is_lfs(path, len(data))) for path, data in files.items()}
            self.lfs |= {blob.sha256: blob.data for blob in new.values() if blob.lfs}
            return home.commit(branch, old | new, "added by the test")

    def fault(
        self, kind: str, url: str = "", *, method: str | None = None, value: Any = None, times: int | None = None
    ) -> None:
        """From now on, ``times`` times, where ``url`` is part of the address. Bodies: corrupt, truncate, drop."""
        self._faults.append(Fault(kind, url, method, value, times))

    def faulty(self, kind: str, method: str, url: str) -> Fault | None:
        with self.lock:
            for fault in self._faults:
                if fault.kind == kind and fault.url in url and fault.method in (None, method) and fault.times != 0:
                    fault.times = None if fault.times is None else fault.times - 1
                    return fault
        return None

    def find(self, repo: str, rev: str | None) -> tuple[str, dict[str, Blob]]:
        home = self.repos[repo]
        commit = home.branches.get(rev or "main", rev or "")
        if commit not in home.commits:
            raise Refusal(404, f"Invalid rev id: {rev}", "RevisionNotFound")
        return commit, home.commits[commit]


def _is_lfs(path: str, size: int) -> bool:
    return size > 0 and (path.endswith(_LFS_SUFFIXES) or size >= _LFS_FROM_BYTES)


def _sibling(path: str, blob: Blob, blobs: bool) -> dict[str, Any]:
    if not blobs:
        return {"rfilename": path}
    lfs = {"lfs": {"sha256": blob.sha256, "size": len(blob.data), "pointerSize": 133}} if blob.lfs else {}
    return {"rfilename": path, "size": len(blob.data), "blobId": blob.git_oid, **lfs}


def _tree_entry(path: str, blob: Blob) -> dict[str, Any]:
    lfs = {"lfs": {"oid": blob.sha256, "size": len(blob.data), "pointerSize": 133}} if blob.lfs else {}
    return {"type": "file", "path": path, "size": len(blob.data), "oid": blob.git_oid, **lfs}


class _Handler(BaseHTTPRequestHandler):
    """One request: find the route, check the login, answer. Named groups of a route are the method's arguments."""

    hub: HubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are two writes, and would wait 40 ms for each other

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._serve("GET")

    def do_HEAD(self) -> None:
        self._serve("HEAD")

    def do_POST(self) -> None:
        self._serve("POST")

    def do_PUT(self) -> None:
        self._serve("PUT")

    def _serve(self, method: str) -> None:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        self.token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        body = self._body()
        self.hub.requests.append(f"{method} {url.path}")
        try:
            if (fault := self.hub.faulty("status", method, url.path)) is not None:
                raise Refusal(fault.value, "the service is not itself today")
            if self.hub.faulty("gated", method, url.path) is not None:
                raise Refusal(403, "Access to this model is restricted", "GatedRepo")
            if (fault := self.hub.faulty("echo", method, url.path)) is not None:
                raise Refusal(
                    fault.value, f"you sent\x1b[31m {self.token}, {self.headers.get('Authorization')}\nmore"
                )
            for verbs, pattern, route in _ROUTES:
                if method in verbs and (found := re.fullmatch(pattern, url.path)) is not None:
                    route(self, body, **{k: v if v is None else unquote(v) for k, v in found.groupdict().items()})
                    return
            raise Refusal(404, "Sorry, we can't find the page you are looking for.")
        except Refusal as error:
            headers = {"X-Error-Code": error.code} if error.code else {}
            message = " ".join(str(error).split())
            self._send(
                error.status, json.dumps({"error": str(error)}).encode(), {**headers, "X-Error-Message": message}
            )

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        pieces = []
        while (size := int(self.rfile.readline(), 16)) > 0:
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(pieces)

    def _send(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        fields = {"Content-Length": str(len(body)), "Content-Type": "application/json", **(headers or {})}
        for name, value in fields.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode())

    # Logins. As on the Hub, a private repository and a missing one look alike to whoever may not read.

    def _login(self) -> None:
        if self.token is None:
            raise Refusal(401, "Invalid username or password.")
        if self.token not in (OWNER_TOKEN, STRANGER_TOKEN):
            raise Refusal(401, "Invalid credentials in Authorization header")

    def _may_read(self, repo: str) -> Repo:
        if self.token is not None:
            self._login()
        home = self.hub.repos.get(repo)
        if home is None or (home.private and self.token != OWNER_TOKEN):
            if self.token is None:
                raise Refusal(401, "Invalid username or password.")
            raise Refusal(404, "Repository not found", "RepoNotFound")
        return home

    def _may_write(self, repo: str) -> Repo:
        self._login()
        home = self._may_read(repo)
        if self.token != OWNER_TOKEN:
            raise Refusal(403, f"You don't have write access to {repo}")
        return home

    # Reading.

    def model_info(self, body: bytes, repo: str, rev: str | None) -> None:
        home = self._may_read(repo)
        commit, files = self.hub.find(repo, rev)
        lie = self.hub.faulty("commit", self.command, f"/{repo}/revision/{rev}")
        commit = lie.value if lie else commit
        siblings = [_sibling(path, blob, "blobs" in self.query) for path, blob in sorted(files.items())]
        info = {"_id": "0", "id": repo, "modelId": repo, "sha": commit, "private": home.private, "tags": []}
        self._json({**info, "siblings": siblings + self.hub.extra_siblings, "downloads": 0, "likes": 0})

    def tree(self, body: bytes, repo: str, rev: str) -> None:
        self._may_read(repo)
        _, files = self.hub.find(repo, rev)
        self._json([_tree_entry(path, blob) for path, blob in sorted(files.items())])

    def paths_info(self, body: bytes, repo: str, rev: str) -> None:
        self._may_read(repo)
        _, files = self.hub.find(repo, rev)
        self._json([_tree_entry(path, files[path]) for path in json.loads(body)["paths"] if path in files])

    def resolve(self, body: bytes, repo: str, rev: str, path: str) -> None:
        self._may_read(repo)
        commit, files = self.hub.find(repo, rev)
        if path not in files:
            raise Refusal(404, "Entry not found", "EntryNotFound")
        blob = files[path]
        fault = self.hub.faulty("etag", self.command, path)
        etag = f'"{fault.value if fault else blob.etag}"'
        lie = self.hub.faulty("commit", self.command, path)
        headers = {"X-Repo-Commit": lie.value if lie else commit, "ETag": etag, "Accept-Ranges": "bytes"}
        if blob.lfs:
            away = f"{self.hub.store}/store/{blob.sha256}/{quote(path)}"
            linked = {"X-Linked-Etag": etag, "X-Linked-Size": str(len(blob.data)), "Location": away}
            self._send(302, b"", headers | linked)
        else:
            self._content(blob.data, path, headers)

    def stored(self, body: bytes, oid: str, path: str) -> None:
        if self.token is not None:
            self.hub.requests.append("LEAK: a login was sent to the store")
        self._content(self.hub.lfs[oid], path, {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"})

    def _content(self, data: bytes, path: str, headers: dict[str, str]) -> None:
        headers = {"Content-Type": "application/octet-stream", **headers}
        if self.command == "HEAD":
            self._send(200, b"", headers | {"Content-Length": str(len(data))})
            return
        status = 200
        if (asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))) is not None:
            start, stop = int(asked[1]), int(asked[2] or len(data) - 1) + 1
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
            status, data = 206, data[start:stop]
        if self.hub.faulty("corrupt", "GET", path) is not None:
            data = data[:-1] + bytes([data[-1] ^ 1])
        if self.hub.faulty("truncate", "GET", path) is not None:
            data = data[: len(data) // 2]
        if self.hub.faulty("drop", "GET", path) is not None:
            self._send(status, data[: len(data) // 2], headers | {"Content-Length": str(len(data))})
            self.close_connection = True
            return
        self._send(status, data, headers)

    # Writing.

    def create_repo(self, body: bytes) -> None:
        self._login()
        asked = json.loads(body)
        repo = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
        if self.token != OWNER_TOKEN:
            raise Refusal(403, f"You don't have the rights to create a model under the namespace of {repo}")
        with self.hub.lock:
            if repo in self.hub.repos:
                raise Refusal(409, "You already created this model repo")
            private = asked.get("private") is True or asked.get("visibility") == "private"
            self.hub.add(repo, {".gitattributes": b"*.safetensors filter=lfs\n"}, private=private)
        self._json({"url": f"{self.hub.endpoint}/{repo}", "name": repo, "id": "0"})

    def create_branch(self, body: bytes, repo: str, branch: str) -> None:
        home = self._may_write(repo)
        if branch in home.branches:
            raise Refusal(409, "Reference already exists")
        home.branches[branch] = self.hub.find(repo, json.loads(body or b"{}").get("startingPoint"))[0]
        self._json({})

    def validate_yaml(self, body: bytes) -> None:
        self._json({"errors": [], "warnings": []})

    def preupload(self, body: bytes, repo: str, rev: str) -> None:
        self._may_write(repo)
        _, files = self.hub.find(repo, rev)
        ignored = files[".gitignore"].data.decode().split() if ".gitignore" in files else []
        self._json(
            {
                "files": [
                    {
                        "path": one["path"],
                        "uploadMode": "lfs" if _is_lfs(one["path"], one["size"]) else "regular",
                        "shouldIgnore": any(fnmatch(one["path"], pattern) for pattern in ignored),
                        "oid": files[one["path"]].etag if one["path"] in files else None,
                    }
                    for one in json.loads(body)["files"]
                ]
            }
        )

    def lfs_batch(self, body: bytes, repo: str) -> None:
        self._may_write(repo)
        asked = json.loads(body)
        objects = []
        for one in asked["objects"]:
            oid, size, step = one["oid"], one["size"], self.hub.multipart_over
            if oid in self.hub.lfs:
                objects.append(one)
                continue
            upload: dict[str, Any] = {"href": f"{self.hub.store}/upload/{oid}"}
            if size > step:
                count = -(-size // step)
                parts = {str(n): f"{self.hub.store}/upload/{oid}/{n}" for n in range(1, count + 1)}
                upload = {"href": f"{self.hub.endpoint}/complete/{oid}", "header": {"chunk_size": str(step), **parts}}
            verify = {"href": f"{self.hub.endpoint}/{repo}.git/info/lfs/objects/verify"}
            objects.append({**one, "authenticated": True, "actions": {"upload": upload, "verify": verify}})
        multipart = any("header" in one.get("actions", {}).get("upload", {}) for one in objects)
        self._json({"transfer": "multipart" if multipart else "basic", "objects": objects})

    def upload(self, body: bytes, oid: str, part: str | None) -> None:
        if part is not None:
            self.hub.parts.setdefault(oid, {})[int(part)] = body
        else:
            self._keep(oid, body)
        self._send(200, b"", {"ETag": f'"{hashlib.md5(body).hexdigest()}"'})

    def complete(self, body: bytes, oid: str) -> None:
        parts = self.hub.parts.pop(oid)
        self._keep(oid, b"".join(parts[one["partNumber"]] for one in json.loads(body)["parts"]))
        self._json({})

    def _keep(self, oid: str, data: bytes) -> None:
        if hashlib.sha256(data).hexdigest() != oid:
            raise Refusal(400, "The content does not match its sha256")
        self.hub.lfs[oid] = data

    def lfs_verify(self, body: bytes, repo: str) -> None:
        asked = json.loads(body)
        if len(self.hub.lfs.get(asked["oid"], b"")) != asked["size"]:
            raise Refusal(404, "LFS object not found")
        self._json({})

    def commit(self, body: bytes, repo: str, rev: str) -> None:
        home = self._may_write(repo)
        lines = [json.loads(line) for line in body.splitlines()]
        with self.hub.lock:
            if rev not in home.branches:
                raise Refusal(404, f"Invalid rev id: {rev}", "RevisionNotFound")
            files = dict(home.commits[home.branches[rev]])
            for line in lines[1:]:
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = Blob(base64.b64decode(value["content"]), lfs=False)
                elif line["key"] == "lfsFile":
                    if value["oid"] not in self.hub.lfs:
                        raise Refusal(400, f"LFS pointer pointed to a file that does not exist: {value['path']}")
                    files[value["path"]] = Blob(self.hub.lfs[value["oid"]], lfs=True)
                else:
                    raise Refusal(400, f"unknown operation {line['key']}")
            commit = home.commit(rev, files, lines[0]["value"]["summary"])
        url = f"{self.hub.endpoint}/{repo}/commit/{commit}"
        self._json({"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""})


_API = f"/api/models/{_REPO}"
_LFS = f"/{_REPO}\\.git/info/lfs/objects"
_ROUTES: list[tuple[str, str, Callable[..., None]]] = [
    ("POST", "/api/repos/create", _Handler.create_repo),
    ("POST", "/api/validate-yaml", _Handler.validate_yaml),
    ("GET", rf"{_API}(?:/revision/(?P<rev>[^/]+))?", _Handler.model_info),
    ("GET", rf"{_API}/tree/(?P<rev>[^/]+)", _Handler.tree),
    ("POST", rf"{_API}/paths-info/(?P<rev>[^/]+)", _Handler.paths_info),
    ("POST", rf"{_API}/branch/(?P<branch>[^/]+)", _Handler.create_branch),
    ("POST", rf"{_API}/preupload/(?P<rev>[^/]+)", _Handler.preupload),
    ("POST", rf"{_API}/commit/(?P<rev>[^/]+)", _Handler.commit),
    ("POST", rf"{_LFS}/batch", _Handler.lfs_batch),
    ("POST", rf"{_LFS}/verify", _Handler.lfs_verify),
    ("POST", "/complete/(?P<oid>[0-9a-f]{64})", _Handler.complete),
    ("PUT", "/upload/(?P<oid>[0-9a-f]{64})(?:/(?P<part>[0-9]+))?", _Handler.upload),
    ("GET HEAD", "/store/(?P<oid>[0-9a-f]{64})/(?P<path>.+)", _Handler.stored),
    ("GET HEAD", rf"/{_REPO}/resolve/(?P<rev>[^/]+)/(?P<path>.+)", _Handler.resolve),
]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub of its own for the test; the client is logged in as its owner, and keeps its cache under ``tmp_path``.

    The variables reach child processes. The client reads some of them at import only: those are set there too.
    """
    from huggingface_hub import constants

    home = tmp_path / "hf-home"
    with HubServer() as server:
        for name in ("HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE", "HF_HUB_CACHE"):
            monkeypatch.delenv(name, raising=False)
        for name, value in server.environment(home).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True, raising=False)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        # An empty answer to what the client would ask of the public Hub, once a day.
        home.mkdir()
        (home / ".agent_harnesses.json").write_text('{"standardEnvVars": [], "harnesses": {}}')
        monkeypatch.setattr(constants, "AGENT_HARNESSES_PATH", str(home / ".agent_harnesses.json"), raising=False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
        yield server
