"""One request to an engine's HTTP interface: bounded in time and bytes, no redirects, and no key in any message."""

from __future__ import annotations

import http.client
import io
import json
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import IO, Any
from urllib.parse import urlsplit

from loreg.errors import RemoteError, UsageError

_LARGEST = 16 << 20
"""Bytes of an answer: thousands of adapters in a listing are some MB."""
_SAID = 600
"""Characters of what a server says that are repeated."""
_LONGEST = 1e6
"""Seconds that a socket is told to wait, at most: it has no number for all that a caller may have."""
_PASSING = {408, 425, 429, 502, 503, 504}
"""Answers after which the same may succeed. 500 is not one: vLLM says so of what it refuses for good."""
_NO_HOST = {socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME)}


class Again(Exception):
    """What may pass, for the caller's loop, which it never leaves. ``reason``: what to raise when it does not."""

    def __init__(self, reason: RemoteError) -> None:
        super().__init__(str(reason))
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Answer:
    """``text``: of the body, in full. ``said``: what of it may be repeated in a message."""

    status: int
    text: str
    said: str
    headers: Mapping[str, str]

    def json(self) -> Any:
        """None if it is no JSON."""
        try:
            return json.loads(self.text)
        except (ValueError, RecursionError):
            return None


def is_nobody(error: BaseException | None) -> bool:
    """Whether the error of a connection says that nothing listens at the address, or that there is no such host:
    whatever served there has ended."""
    reason = getattr(error, "reason", error)
    if isinstance(reason, socket.gaierror):
        return reason.errno in _NO_HOST
    return isinstance(reason, ConnectionRefusedError)


class Server:
    """At ``url``, until ``deadline`` on the monotonic clock. ``shown``: its address, for messages. ``lost``: whether
    something was asked for that may have been done, and its answer did not come.

    Raises UsageError for a URL that is not plain ``http://`` or ``https://``; nothing is repeated of one with a user
    or a password in it.
    """

    def __init__(self, url: str, key: str | None, deadline: float) -> None:
        self.deadline, self._key, self.lost = deadline, key, False
        expected = "expected http:// or https://, a host, perhaps a port and a path"
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port
            (host or "").encode("idna")  # as a look-up does
        except ValueError:
            raise UsageError(f"the URL of the engine is none: {expected}.") from None
        if "@" in url or parts.username is not None:
            raise UsageError(f"the URL of the engine has a user or a password in it: {expected}, and no more.")
        if (
            parts.scheme not in ("http", "https")
            or not host
            or parts.query
            or parts.fragment
            or not url.isprintable()
            or " " in url
            or not parts.path.isascii()
        ):
            raise UsageError(f"{url!r} is no URL of an engine: {expected}.")
        if key is not None and not (key.isascii() and key.isprintable() and key.strip()):
            raise UsageError("the key of the engine is none: expected printable ASCII.")
        netloc = f"[{host}]" if ":" in host else host
        self.shown = f"{parts.scheme}://{netloc}{'' if port is None else f':{port}'}{parts.path.rstrip('/')}"
        self._opener = urllib.request.build_opener(_NoRedirects, _Plain, _Secured)

    def call(self, path: str, body: Mapping[str, Any] | list[Any] | None = None) -> Answer:
        """POST ``body`` as JSON, or GET without one; whatever the answer is, but for those that may pass.

        Raises Again for these and for a connection that fails, RemoteError for an answer that is too large.
        """
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise RemoteError(f"{self.shown} was not done in time: see what it does, and try again with more.")
        headers = {"Accept": "application/json", "User-Agent": "loreg"}
        data = None
        if body is not None:
            data, headers["Content-Type"] = json.dumps(body).encode(), "application/json"
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(self.shown + path, data, headers)
        try:
            with self._opener.open(request, timeout=min(left, _LONGEST)) as response:
                answer = self._answer(response, response.status)
        except urllib.error.HTTPError as error:
            with error:
                answer = self._answer(error, error.code)
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", None) or error
            said = self._repeatable(f"{type(reason).__name__}: {reason}")
            self.lost |= body is not None and not is_nobody(error)
            raise Again(
                RemoteError(f"{self.shown}{path} is not reached ({said}): see whether the engine runs there.")
            ) from error
        if answer.status in _PASSING:
            self.lost |= body is not None  # a proxy says 502 or 504 of what it has passed on
            raise Again(self.refusal(path, answer))
        return answer

    def refusal(self, path: str, answer: Answer, advice: str = "") -> RemoteError:
        """The error of an answer that says no."""
        said = f": {answer.said}" if answer.said else ""
        if answer.status in (401, 403):
            advice = "give it its key, in LOREG_ENGINE_KEY"
        return RemoteError(
            f"{self.shown}{path} answered {answer.status}{said}{f'; {advice}' if advice else ''}"
            f"{'' if said.endswith('.') and not advice else '.'}"
        )

    def _answer(self, response: IO[bytes], status: int) -> Answer:
        raw = response.read(_LARGEST + 1)
        if len(raw) > _LARGEST:
            raise RemoteError(f"{self.shown} sent more than {_LARGEST >> 20} MB: expected an engine's answer.")
        text = raw.decode("utf-8", "replace")
        headers = {name.lower(): value for name, value in getattr(response, "headers", {}).items()}
        return Answer(status, text, self._repeatable(_message(text)), headers)

    def _repeatable(self, text: str) -> str:
        """Without the key, should a server or a proxy repeat it, control characters, and what goes on for pages."""
        if self._key:
            for written in (self._key, json.dumps(self._key)[1:-1]):
                text = text.replace(written, "***")
        line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
        return line if len(line) <= _SAID else line[:_SAID] + " …"


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect would take the key to another host, and turn a POST into a GET: it is an answer like others."""

    def redirect_request(self, *_: Any) -> None:
        return None


class _Reader(io.RawIOBase):
    """What comes on a socket until ``deadline``. A timeout of the socket's own is for each piece: a server that sends
    one byte now and then would never be too late."""

    def __init__(self, raw: IO[bytes], sock: socket.socket, deadline: float) -> None:
        self._raw, self._sock, self._deadline = raw, sock, deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("timed out")
        self._sock.settimeout(left)
        read: int = self._raw.readinto1(buffer)  # type: ignore[attr-defined]
        return read

    def close(self) -> None:
        self._raw.close()
        super().close()


class _Response(http.client.HTTPResponse):
    def __init__(self, deadline: float, sock: socket.socket, **given: Any) -> None:
        super().__init__(sock, **given)
        self.fp = io.BufferedReader(_Reader(self.fp, sock, deadline))


class _Connection(http.client.HTTPConnection):
    """Of which ``timeout`` is for all of an answer."""

    def __init__(self, host: str, /, *, timeout: float = _LONGEST, **given: Any) -> None:
        super().__init__(host, timeout=timeout, **given)
        self.response_class: Any = partial(_Response, time.monotonic() + timeout)


class _SecuredConnection(_Connection, http.client.HTTPSConnection):
    pass


class _Plain(urllib.request.HTTPHandler):
    def http_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_Connection, request)


class _Secured(urllib.request.HTTPSHandler):
    def https_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_SecuredConnection, request)


def _message(text: str) -> str:
    """The sentence in an error's body, by the names that engines give it; else the body."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return text
    for _ in range(3):
        if not isinstance(found, dict):
            break
        found = next((found[key] for key in ("error_message", "message", "error", "detail") if found.get(key)), "")
    return found if isinstance(found, str) else json.dumps(found)
