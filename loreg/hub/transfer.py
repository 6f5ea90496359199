"""Files of exactly one commit: looked up, fetched, sent; each hashed again on this side of the wire."""

from __future__ import annotations

import glob
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from loreg.errors import Conflict, NotFound, RemoteError, UsageError
from loreg.hub.client import Hub
from loreg.hub.names import HubFile, HubPin, HubRef, is_commit, path_fault

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

_TIMEOUT_S = 10.0

_ETAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")


def pin(ref: HubRef, *, endpoint: str | None = None) -> HubPin:
    """What ``ref`` is now, in one request that downloads nothing. Raises NotFound, RemoteError."""
    hub = Hub.at(endpoint)
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
        found = HubPin(ref.repo, info.sha, tuple(sorted(files, key=lambda file: file.path)))
    if ref.revision is not None and is_commit(ref.revision) and found.commit != ref.revision:
        raise RemoteError(f"{ref} could not be looked up: {hub.host} answered about commit {found.commit} instead.")
    return found


def fetch(pin: HubPin, paths: Iterable[str] | None, into: Path, *, endpoint: str | None = None) -> None:
    """Put ``paths`` (all files, if None) of exactly the pinned commit under ``into``, as plain files, verified.

    No file takes its name before all of them are here and have the size and the digest of the pin. A file of the
    same name is replaced. Raises NotFound, RemoteError, Conflict if a link in ``into`` leads elsewhere, CheckFailed
    if the disk is full, and UsageError if ``into`` cannot be written.
    """
    wanted = list(pin.files) if paths is None else [pin.file(path) for path in dict.fromkeys(paths)]
    hub = Hub.at(endpoint)
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
    hub = Hub.at(endpoint)
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
    if ref.revision is not None and is_commit(ref.revision):
        raise UsageError(f"{ref} is a commit, which cannot change: name a branch, or nothing for 'main'.")
    for path in files:
        if (wrong := path_fault(path)) is not None:
            raise UsageError(f"{path!r} cannot be the name of a file on the Hub: it {wrong}.")
    if not files or not message.strip():
        raise UsageError(f"{ref}: a commit needs at least one file and a message.")
    hub = Hub.at(endpoint)
    _make_room(hub, ref, private)
    with hub.asked(ref, "could not be written"):
        from huggingface_hub import CommitOperationAdd

        operations = [CommitOperationAdd(path_in_repo=p, path_or_fileobj=content) for p, content in files.items()]
        commit = hub.api.create_commit(
            ref.repo, operations=operations, commit_message=message, revision=ref.revision
        ).oid
        sent = HubPin(ref.repo, commit, ()).ref
    held = {file.path: file for file in pin(sent, endpoint=endpoint).files}
    for path, content in files.items():
        if path not in held:  # the client drops, in silence, what a .gitignore on the Hub matches
            raise RemoteError(f"{sent} was committed without {path}: look for a .gitignore there that matches it.")
        held[path].check(content, str(sent))
    return str(commit)


def _make_room(hub: Hub, ref: HubRef, private: bool) -> None:
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


def _announced(hub: Hub, pin: HubPin, file: HubFile) -> None:
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


def _matches(path: str, pattern: str) -> bool:
    parts, patterns = path.split("/"), pattern.split("/")
    return len(parts) == len(patterns) and all(map(fnmatchcase, parts, patterns))
