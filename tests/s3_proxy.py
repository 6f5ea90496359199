"""A proxy on loopback between a store and a real S3 server, in which a test can have things go wrong."""

from __future__ import annotations

import http.client
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

import s3_server

_HOP = {"connection", "transfer-encoding", "keep-alive", "proxy-connection", "content-length"}


@dataclass
class Fault:
    """What goes wrong with ``times`` requests of ``method`` whose path and query ``pattern`` is found in, after
    ``skip`` of them.

    ``refuse``: answered with ``status`` and ``code``, and not passed on. ``lose``: passed on, and the connection is
    closed instead of an answer. ``belie``: passed on, and answered with ``status`` all the same. ``cut request`` and
    ``cut answer``: half of the body, then the connection is closed. ``flip request`` and ``flip answer``: one byte is
    another. ``hold``: the connection is closed, and the request passed on when the test says so. ``call``: nothing,
    but that ``then`` is called before it is passed on. ``short answer``: half of the body, which it says is all.
    ``retag``: the object has another tag, as far as answers say.
    """

    kind: str
    method: str
    pattern: str = ""
    times: int = 1
    status: int = 503
    code: str = "SlowDown"
    skip: int = 0
    then: Callable[[], object] | None = None
    hits: int = 0

    def strikes(self, method: str, path: str) -> bool:
        if method not in self.method.split() or not re.search(self.pattern, path):
            return False
        self.skip -= 1
        if self.skip >= 0 or self.hits >= self.times:
            return False
        self.hits += 1
        return True


@dataclass
class Proxy:
    """Use as a context manager; ``requests`` are those that came, ``held`` what ``release`` passes on."""

    upstream: str
    faults: list[Fault] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    held: list[Callable[[], object]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __enter__(self) -> Self:
        handler = type("Handler", (_Handler,), {"proxy": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def add(self, kind: str, method: str, pattern: str = "", **options: Any) -> Fault:
        fault = Fault(kind, method, pattern, **options)
        self.faults.append(fault)
        return fault

    def find(self, method: str, path: str) -> Fault | None:
        with self.lock:
            self.requests.append(f"{method} {path}")
            for fault in self.faults:
                if fault.strikes(method, path):
                    return fault
        return None

    def release(self) -> list[int]:
        """Pass on what was held, in its order; the status of each."""
        found, self.held = [request() for request in self.held], []
        return found  # type: ignore[return-value]


class _Handler(BaseHTTPRequestHandler):
    proxy: Proxy
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # in one piece: head and body apart wait for each other's acknowledgement
    disable_nagle_algorithm = True

    def log_message(self, *_: object) -> None:
        pass

    def _any(self) -> None:
        fault = self.proxy.find(self.command, self.path)
        kind = fault.kind if fault is not None else ""
        length = int(self.headers.get("Content-Length") or 0)
        if kind == "cut request":
            self.rfile.read(length // 2)
            return self._drop()
        body = self.rfile.read(length)
        if fault is not None and kind == "refuse":
            return self._refuse(fault)
        if kind == "flip request":
            body = _flipped(body)
        if fault is not None and fault.then is not None:
            fault.then()
        if kind == "hold":
            self.proxy.held.append(lambda: self._pass_on(body)[0])
            return self._drop()
        try:
            status, headers, answer = self._pass_on(body)
        except (OSError, http.client.HTTPException):
            return self._drop()
        if kind == "lose":
            return self._drop()
        if fault is not None and kind == "belie":
            return self._refuse(fault)
        if kind == "flip answer":
            answer = _flipped(answer)
        if kind == "short answer":
            answer = answer[: len(answer) // 2]
        if kind == "retag" and "partNumber=" not in self.path:
            headers = [(name, '"of-another-kind"' if name.lower() == "etag" else value) for name, value in headers]
            answer = re.sub(rb"<ETag>[^<]*<", b"<ETag>of-another-kind<", answer)
        return self._answer(status, headers, answer, cut=kind == "cut answer")

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _any  # noqa: N815

    def _pass_on(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection(self.proxy.upstream.removeprefix("http://"), timeout=60)
        try:
            # The signature is over the Host that the client wrote.
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in _HOP:
                    connection.putheader(name, value)
            connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body)
            answer = connection.getresponse()
            data = answer.read()
            headers = [(name, value) for name, value in answer.getheaders() if name.lower() not in _HOP]
            if self.command == "HEAD":
                headers.append(("Content-Length", answer.getheader("Content-Length") or "0"))
            return answer.status, headers, data
        finally:
            connection.close()

    def _answer(self, status: int, headers: list[tuple[str, str]], body: bytes, *, cut: bool = False) -> None:
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        if self.command != "HEAD" and status not in (204, 304):
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if cut else body)
        if cut:
            self._drop()

    def _refuse(self, fault: Fault) -> None:
        # Some servers repeat what they were sent, and more than that.
        told = f"{s3_server.KEY_ID} with {s3_server.SECRET} is refused"
        said = f"<Error><Code>{fault.code}</Code><Message>{told}</Message></Error>"
        self._answer(fault.status, [("Content-Type", "application/xml")], said.encode())

    def _drop(self) -> None:
        self.wfile.flush()
        self.close_connection = True
        self.connection.close()


def _flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :] if data else data
