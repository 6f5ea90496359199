"""The Hugging Face Hub as a transport: files of exactly one commit, by name and digest.

Everything goes through ``huggingface_hub`` (its login, its proxies, its cache, its ``HF_*`` variables), and
nothing that it hands back is believed: it compares sizes only, so every file is hashed again after a download.
This module sees bytes and digests, never tensors.

Each function takes ``endpoint``, the address of the Hub; without it, ``HF_ENDPOINT`` as it is at the call, and
without that, the public Hub. Whatever goes wrong on the way is one sentence: NotFound if the Hub says that there
is no such thing, UsageError for a malformed name, RemoteError for all the rest. No login token is ever in it.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from loreg.errors import CheckFailed, Conflict, LoregError, NotFound, RemoteError, UsageError

SCHEME = "hf://"

_WEIGHTS = ("model", "diffusion_pytorch_model")
_BESIDE = (
    *("config.json", "generation_config.json", "tokenizer*.json", "*.model", "*.tiktoken", "vocab.json", "vocab.txt"),
    *("merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template.*", "*processor_config.json"),
)
BASE_FILES: tuple[str, ...] = (
    *(n + end for n in _WEIGHTS for end in (".safetensors", "-*-of-*.safetensors", ".safetensors.index.json")),
    *_BESIDE,
)
"""What is downloaded of a base: weights that need no unpickling, and what reads its inputs; no code.

Many repositories hold the same weights several times (``*.bin``, ``onnx/``, ``original/``,
``consolidated.safetensors``): the names are those that ``save_pretrained`` writes, at the top.
"""

_PUBLIC_HUB = "https://huggingface.co"
_TIMEOUT_S = 10.0
_CHUNK = 4 << 20

_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?"
_REPO = re.compile(rf"(?:{_PART}/)?{_PART}")
_REVISION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+/-]{0,254}")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_ETAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")

# The client reports a dead network, an odd answer and a failing disk alike as OSError. These are the disk's.
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_UNUSABLE = frozenset({errno.EIO, errno.EROFS})


@dataclass(frozen=True)
class HubRef:
    """A model repository, and perhaps a revision of it: a branch, a tag, or a commit of 40 hex digits.

    Raises UsageError for a name that the Hub would not allow. No part of one can leave a directory or a URL's path.
    """

    repo: str
    revision: str | None = None

    def __post_init__(self) -> None:
        if not _REPO.fullmatch(self.repo) or any(bad in self.repo for bad in ("..", "--")):
            raise UsageError(
                f"{self.repo!r} is not a repository of the Hub: expected 'owner/name', of letters, digits, "
                "'-', '_' and '.'."
            )
        rev = self.revision
        if rev is not None and (not _REVISION.fullmatch(rev) or ".." in rev or "//" in rev or rev.endswith("/")):
            raise UsageError(f"{rev!r} is not a revision of {self.repo}: expected a branch, a tag or a commit.")

    @classmethod
    def parse(cls, text: str) -> HubRef:
        """From ``hf://owner/name[@revision]``. Raises UsageError."""
        if not text.startswith(SCHEME) or "/" not in text[len(SCHEME) :].partition("@")[0]:
            raise UsageError(f"{text!r} is not an address on the Hub: expected 'hf://owner/name[@revision]'.")
        return cls.parse_id(text[len(SCHEME) :])

    @classmethod
    def parse_id(cls, text: str) -> HubRef:
        """From ``owner/name[@revision]``, or a name without an owner as in ``gpt2``. Raises UsageError."""
        repo, at, revision = text.partition("@")
        return cls(repo, revision if at else None)

    def __str__(self) -> str:
        return f"{SCHEME}{self.repo}" + (f"@{self.revision}" if self.revision else "")


@dataclass(frozen=True)
class HubFile:
    """One file of a commit: its path in the repository, its size in bytes, and its digest, 64 or 40 hex digits.

    The Hub knows the sha256 of a file that it keeps in LFS, and of the small others only the SHA-1 of their git
    blob. Exactly one of the two is here. Raises RemoteError if it is neither, or if the path could leave a directory.
    """

    path: str
    size: int
    sha256: str | None
    git_oid: str | None = None

    def __post_init__(self) -> None:
        if (wrong := _path_fault(self.path)) is not None:
            raise RemoteError(f"The Hub announced a file named {self.path!r}, which {wrong}: it is not downloaded.")
        known = [p.fullmatch(d) for p, d in ((_SHA256, self.sha256), (_COMMIT, self.git_oid)) if isinstance(d, str)]
        if not isinstance(self.size, int) or self.size < 0 or len(known) != 1 or known[0] is None:
            raise RemoteError(
                f"The Hub announced {self.path} without a size and a digest to check it by (size {self.size!r}, "
                f"sha256 {self.sha256!r}, git blob {self.git_oid!r}): it is not downloaded."
            )

    def check(self, content: Path | bytes, origin: str) -> None:
        """Raise RemoteError unless ``content`` has this size and this digest. ``origin`` names where it came from."""
        size = len(content) if isinstance(content, bytes) else content.stat().st_size
        if size != self.size:
            raise self.mismatch(origin, f"{self.size} bytes", f"{size}")
        if self.sha256 is not None:
            kind, expected, hasher = "sha256", self.sha256, hashlib.sha256()
        else:
            # git hashes this header before the content of a blob
            kind, expected, hasher = "git blob", str(self.git_oid), hashlib.sha1(b"blob %d\0" % size)
        for chunk in _chunks(content):
            hasher.update(chunk)
        if hasher.hexdigest() != expected:
            raise self.mismatch(origin, f"{kind} {expected}", hasher.hexdigest())

    def mismatch(self, origin: str, expected: str, found: str) -> RemoteError:
        """The error that says so."""
        return RemoteError(
            f"{self.path} of {origin} is not what the Hub announced: expected {expected}, found {found}; try again."
        )


@dataclass(frozen=True)
class HubPin:
    """A repository at one commit (40 hex digits), and every file in it: what a branch meant at a moment."""

    repo: str
    commit: str
    files: tuple[HubFile, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.commit, str) or not _COMMIT.fullmatch(self.commit):
            raise RemoteError(
                f"The Hub announced {self.commit!r} as a commit of {self.repo}: expected 40 hex digits."
            )
        if len({file.path for file in self.files}) != len(self.files):
            raise RemoteError(f"The Hub announced a file of {self.repo} twice: it cannot be told which is meant.")

    @property
    def ref(self) -> HubRef:
        return HubRef(self.repo, self.commit)

    @property
    def sha256s(self) -> dict[str, str]:
        """path → sha256, of the files that have one: the weights."""
        return {file.path: file.sha256 for file in self.files if file.sha256 is not None}

    def file(self, path: str) -> HubFile:
        """Raises NotFound, which names what there is."""
        for file in self.files:
            if file.path == path:
                return file
        names = ", ".join(file.path for file in self.files[:8])
        raise NotFound(f"{self.ref} holds no file {path!r}: found {names or 'no files'}.")


def pin(ref: HubRef, *, endpoint: str | None = None) -> HubPin:
    """What ``ref`` is now, in one request that downloads nothing. Raises NotFound, RemoteError."""
    hub = _Hub.at(endpoint)
    with hub.asked(ref, "could not be looked up"):
        info = hub.api.model_info(ref.repo, revision=ref.revision, files_metadata=True, timeout=_TIMEOUT_S)
        files = (
            HubFile(
                sibling.rfilename,
                sibling.size,
                sibling.lfs["sha256"] if sibling.lfs else None,
                # of a file in LFS, the blob is its pointer, which nobody downloads
                None if sibling.lfs else sibling.blob_id,
            )
            for sibling in info.siblings
        )
        return HubPin(ref.repo, info.sha, tuple(sorted(files, key=lambda file: file.path)))


def fetch(pin: HubPin, paths: Iterable[str] | None, into: Path, *, endpoint: str | None = None) -> None:
    """Put ``paths`` (all files, if None) of exactly the pinned commit under ``into``, as plain files, verified.

    No file takes its name before all of them are here and have the size and the digest of the pin. A file of the
    same name is replaced. Raises NotFound, RemoteError, Conflict if a link in ``into`` leads elsewhere, CheckFailed
    if the disk is full, and UsageError if ``into`` cannot be written.
    """
    wanted = list(pin.files) if paths is None else [pin.file(path) for path in dict.fromkeys(paths)]
    hub = _Hub.at(endpoint)
    for file in wanted:
        _refuse_links(into, file.path)
        _announced(hub, pin, file)
    try:
        into.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=".hub-", dir=into))
    except OSError as error:
        raise UsageError(f"{into} cannot be written: {error.strerror}; choose another directory.") from error
    try:
        for file in wanted:
            with hub.asked(pin.ref, f"could not be downloaded ({file.path})"):
                hub.api.hf_hub_download(
                    pin.repo,
                    file.path,
                    revision=pin.commit,
                    local_dir=staging / "files",
                    cache_dir=staging / "cache",  # the shared one may hold rotten bytes, and would be copied from
                    etag_timeout=_TIMEOUT_S,
                )
            file.check(staging / "files" / file.path, str(pin.ref))
        for file in wanted:
            (into / file.path).parent.mkdir(parents=True, exist_ok=True)
            (staging / "files" / file.path).replace(into / file.path)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def snapshot(
    ref: HubRef,
    *,
    patterns: Sequence[str] = BASE_FILES,
    verify: bool = False,
    cache_dir: Path | None = None,
    endpoint: str | None = None,
) -> tuple[HubPin, Path]:
    """A base in the Hub's own cache (``cache_dir``, or the client's), where other programs find it too.

    Downloads what is missing of the files that match ``patterns``, part by part of the path as the shell matches,
    and returns the pin and the directory, whose files may be links. Sizes are always compared with the pin, digests
    if ``verify``; a file that fails leaves the cache. Raises NotFound if no safetensors file matches, RemoteError.
    """
    pinned = pin(ref, endpoint=endpoint)
    wanted = [file for file in pinned.files if any(_matches(file.path, pattern) for pattern in patterns)]
    if not any(file.path.endswith(".safetensors") for file in wanted):
        others = ", ".join(file.path for file in pinned.files[:8]) or "no files"
        raise NotFound(f"{pinned.ref} holds no safetensors weights: expected {patterns[0]}, found {others}.")
    hub = _Hub.at(endpoint)
    with hub.asked(pinned.ref, "could not be downloaded"):
        from huggingface_hub import try_to_load_from_cache

        for file in wanted:
            kept = try_to_load_from_cache(pinned.repo, file.path, cache_dir=cache_dir, revision=pinned.commit)
            if not isinstance(kept, str):
                _announced(hub, pinned, file)
        root = Path(
            hub.api.snapshot_download(
                pinned.repo,
                revision=pinned.commit,
                allow_patterns=[glob.escape(file.path) for file in wanted],
                cache_dir=cache_dir,
                etag_timeout=_TIMEOUT_S,
            )
        )
    for file in wanted:
        _check_cached(root / file.path, file, pinned, verify)
    return pinned, root


def send(
    ref: HubRef,
    files: Mapping[str, Path | bytes],
    message: str,
    private: bool = False,
    *,
    endpoint: str | None = None,
) -> str:
    """Add or replace ``files`` in one commit, and return its id, 40 hex digits. Other files there stay.

    Makes the repository (``private`` or not) and the branch ``ref.revision`` if they are missing. Afterwards the Hub
    is asked what it holds, and the digests are compared. Raises UsageError, RemoteError, and Conflict if ``private``
    is asked of a repository that is public.
    """
    if ref.revision is not None and _COMMIT.fullmatch(ref.revision):
        raise UsageError(f"{ref} is a commit, which cannot change: name a branch, or nothing for 'main'.")
    for path in files:
        if (wrong := _path_fault(path)) is not None:
            raise UsageError(f"{path!r} cannot be the name of a file on the Hub: it {wrong}.")
    if not files or not message.strip():
        raise UsageError(f"{ref}: a commit needs at least one file and a message.")
    hub = _Hub.at(endpoint)
    _make_room(hub, ref, private)
    with hub.asked(ref, "could not be written"):
        from huggingface_hub import CommitOperationAdd

        operations = [CommitOperationAdd(path_in_repo=p, path_or_fileobj=content) for p, content in files.items()]
        commit = hub.api.create_commit(
            ref.repo, operations=operations, commit_message=message, revision=ref.revision
        ).oid
        sent = HubRef(ref.repo, str(commit))
    held = {file.path: file for file in pin(sent, endpoint=endpoint).files}
    for path, content in files.items():
        if path not in held:  # the client drops, in silence, what a .gitignore on the Hub matches
            raise RemoteError(f"{sent} was committed without {path}: look for a .gitignore there that matches it.")
        held[path].check(content, str(sent))
    return str(commit)


@dataclass(frozen=True)
class _Hub:
    """The client, bound to one Hub."""

    host: str
    api: Any

    @classmethod
    def at(cls, endpoint: str | None) -> _Hub:
        address = endpoint or os.environ.get("HF_ENDPOINT") or _PUBLIC_HUB
        try:
            parts = urlsplit(address)
            host = f"{parts.hostname}:{parts.port}" if parts.port else parts.hostname
        except ValueError:
            parts, host = urlsplit(""), None
        if parts.scheme not in ("http", "https") or not host:
            # not quoted: an address may hold a password
            raise UsageError("The address of the Hub (HF_ENDPOINT) is malformed: expected 'https://host'.")
        from huggingface_hub import HfApi

        return cls(host, HfApi(endpoint=address.rstrip("/"), library_name="loreg"))

    @contextmanager
    def asked(self, ref: HubRef, failed: str) -> Iterator[None]:
        """Turn whatever the client raises into one sentence that begins with ``ref`` and ``failed``."""
        from huggingface_hub.errors import HfHubHTTPError

        # requests, httpx or httpx2, by the version of the client: its own HTTP error derives from the root of theirs
        transport = [c for c in HfHubHTTPError.__mro__ if c.__module__.split(".")[0] not in _NOT_TRANSPORT][-1]
        try:
            yield
        # The client takes the shape of an answer for granted: the last four are what another shape looks like.
        except (transport, OSError, RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise self._sentence(list(_causes(error)), transport, f"{ref} {failed}") from error

    def _sentence(self, chain: Sequence[BaseException], transport: type, failed: str) -> LoregError:
        from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

        for error in chain:
            if isinstance(error, OSError) and error.errno in _FULL:
                return CheckFailed(f"{failed}: {error.strerror}; free some space, or choose another place.")
            if isinstance(error, OSError) and (error.errno in _UNUSABLE or _forbidden(error)):
                return UsageError(f"{failed}: {error.strerror} at {error.filename}; choose another place.")
            if isinstance(error, OfflineModeIsEnabled):
                return RemoteError(f"{failed}: HF_HUB_OFFLINE is set; unset it, or give a local path.")
            if isinstance(error, HfHubHTTPError):
                return self._refusal(error, failed)
        last = chain[-1]
        kind, detail = type(last).__name__, _plain(str(last))
        if any(isinstance(error, (transport, ConnectionError, TimeoutError)) for error in chain):
            return RemoteError(
                f"{failed}: {self.host} did not answer ({detail or kind}); check the network, the proxy and "
                "HF_ENDPOINT, or give a local path."
            )
        return RemoteError(f"{failed}: {self.host} did not answer as the Hub does ({kind}: {detail}); try again.")

    def _refusal(self, error: Any, failed: str) -> LoregError:
        from huggingface_hub.errors import GatedRepoError, RevisionNotFoundError

        status = error.response.status_code
        secret = error.response.request.headers.get("authorization", "").rpartition(" ")[2]
        # A server may say back what it was sent.
        said = _plain(error.server_message or "", secret)
        said = f" ({said})" if said else ""
        if isinstance(error, GatedRepoError):
            return RemoteError(f"{failed}: it is gated; accept its terms on {self.host}, then `hf auth login`.")
        if isinstance(error, RevisionNotFoundError):
            return NotFound(f"{failed}: {self.host} has no such revision of it; check the part after '@'.")
        if status == 404:
            return NotFound(
                f"{failed}: {self.host} has no such thing{said}; check the name, or `hf auth login` if it is private."
            )
        if status in (401, 403):
            return RemoteError(
                f"{failed}: {self.host} refuses, HTTP {status}{said}; `hf auth login` with a token that "
                "may, or check the name, since a Hub refuses alike what is private and what does not exist."
            )
        return RemoteError(f"{failed}: {self.host} answered HTTP {status}{said}; try again later.")


def _forbidden(error: OSError) -> bool:
    """By the file system: a firewall's refusal has no file."""
    return isinstance(error, PermissionError) and error.filename is not None


_NOT_TRANSPORT = frozenset({"builtins", "huggingface_hub"})


def _make_room(hub: _Hub, ref: HubRef, private: bool) -> None:
    """The repository and the branch exist afterwards."""
    from huggingface_hub.errors import HfHubHTTPError, RevisionNotFoundError

    with hub.asked(ref, "could not be written"):
        try:
            info = hub.api.model_info(ref.repo, revision=ref.revision, timeout=_TIMEOUT_S)
        except RevisionNotFoundError:
            info = hub.api.model_info(ref.repo, timeout=_TIMEOUT_S)
            hub.api.create_branch(ref.repo, branch=ref.revision, exist_ok=True)
        except HfHubHTTPError as error:
            if error.response.status_code not in (401, 404):
                raise
            hub.api.create_repo(ref.repo, private=private, exist_ok=True)
            if ref.revision is not None:
                hub.api.create_branch(ref.repo, branch=ref.revision, exist_ok=True)
            return
        if private and not info.private:
            raise Conflict(f"{ref} exists and is public, but was to be private: make it private on {hub.host} first.")


def _announced(hub: _Hub, pin: HubPin, file: HubFile) -> None:
    """Ask for the headers of a file before the client does, and refuse those that it would trip over.

    It makes paths in its cache from the ETag and the commit that the server names, and an ETag of ``../../x`` writes
    outside. It would also repeat a request to a dead network for most of a minute; this one is made once.
    """
    from huggingface_hub import hf_hub_url

    with hub.asked(pin.ref, f"could not be downloaded ({file.path})"):
        url = hf_hub_url(pin.repo, file.path, revision=pin.commit, endpoint=hub.api.endpoint)
        found = hub.api.get_hf_file_metadata(url=url, timeout=_TIMEOUT_S)
    if found.commit_hash != pin.commit or not _ETAG.fullmatch(found.etag or ""):
        raise RemoteError(
            f"{file.path} of {pin.ref} could not be downloaded: {hub.host} calls it commit {found.commit_hash!r}, "
            f"ETag {found.etag!r}; expected that commit, and an ETag of letters and digits."
        )
    if found.size not in (None, file.size):
        raise file.mismatch(str(pin.ref), f"{file.size} bytes", f"{found.size}")


def _check_cached(path: Path, file: HubFile, pin: HubPin, verify: bool) -> None:
    try:
        if verify or path.stat().st_size != file.size:
            file.check(path, str(pin.ref))
    except FileNotFoundError as error:
        raise RemoteError(f"{file.path} of {pin.ref} was not downloaded: the cache has no {path}.") from error
    except RemoteError:
        # The client would find it there the next time, and download nothing.
        path.resolve().unlink(missing_ok=True)
        raise


def _refuse_links(into: Path, path: str) -> None:
    place = into
    for part in path.split("/")[:-1]:
        place = place / part
        if place.is_symlink() or (place.exists() and not place.is_dir()):
            raise Conflict(f"{place} is not a plain directory, and {path} is to go into it: remove it first.")
    if (into / path).is_dir() and not (into / path).is_symlink():
        raise Conflict(f"{into / path} is a directory, and a file of that name is to go there: remove it first.")


def _path_fault(path: object) -> str | None:
    """What is wrong with a path in a repository, or None: relative, and without a way up or round."""
    if not isinstance(path, str) or not path:
        return "is no name"
    if not path.isprintable() or "\\" in path:
        return "holds a character that no file name should"
    if any(part in ("", ".", "..") for part in path.split("/")):
        return "does not stay inside its directory"
    return None


def _matches(path: str, pattern: str) -> bool:
    parts, patterns = path.split("/"), pattern.split("/")
    return len(parts) == len(patterns) and all(map(fnmatchcase, parts, patterns))


def _chunks(content: Path | bytes) -> Iterator[bytes]:
    if isinstance(content, bytes):
        yield content
        return
    with content.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            yield chunk


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An exception, and what it came from, back to the first."""
    link: BaseException | None = error
    seen: set[int] = set()
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or link.__context__


def _plain(text: str, secret: str = "") -> str:
    """One short line of somebody else's text, fit for a terminal and without a login token."""
    if secret:
        text = text.replace(secret, "[token]")
    text = next(iter(text.strip().splitlines()), "")
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split()).rstrip(".")
    return text if len(text) <= 200 else text[:199] + "…"
