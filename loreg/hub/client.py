"""The ``huggingface_hub`` client, bound to one Hub, and whatever it raises turned into one sentence."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from loreg.errors import CheckFailed, LoregError, NotFound, RemoteError, UsageError
from loreg.hub.names import HubRef

_PUBLIC_HUB = "https://huggingface.co"
_NOT_TRANSPORT = frozenset({"builtins", "huggingface_hub"})

# The client reports a dead network, an odd answer and a failing disk alike as OSError. These are the disk's.
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_UNUSABLE = frozenset({errno.EIO, errno.EROFS})


@dataclass(frozen=True)
class Hub:
    """The client, bound to one Hub."""

    host: str
    api: Any

    @classmethod
    def at(cls, endpoint: str | None) -> Hub:
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
