"""What the Hub calls things: a repository at a revision, a commit, a file of it. No network, no client."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from loreg.errors import NotFound, RemoteError, UsageError

SCHEME = "hf://"

_CHUNK = 4 << 20
_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?"
_REPO = re.compile(rf"(?:{_PART}/)?{_PART}")
_REVISION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+/-]{0,254}")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


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
        if (wrong := path_fault(self.path)) is not None:
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


def is_commit(text: str) -> bool:
    """Forty lower-case hex digits, whole; the Hub takes no shorter ones."""
    return _COMMIT.fullmatch(text) is not None


def path_fault(path: object) -> str | None:
    """What is wrong with a path in a repository, or None: relative, and without a way up or round."""
    if not isinstance(path, str) or not path:
        return "is no name"
    if not path.isprintable() or "\\" in path:
        return "holds a character that no file name should"
    if any(part in ("", ".", "..") for part in path.split("/")):
        return "does not stay inside its directory"
    return None


def _chunks(content: Path | bytes) -> Iterator[bytes]:
    if isinstance(content, bytes):
        yield content
        return
    with content.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            yield chunk
