"""Jobs in processes that may be killed, or whose disk fails: what the tests hold of the fork server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shim import compiled

import loreg

HERE = Path(__file__).parent


class Forks:
    """The server, and what it is asked. ``shim``: whether the calls of its forks can be counted and spoiled."""

    def __init__(self, process: subprocess.Popen[str], home: Path, shim: bool) -> None:
        self._process, self._home, self.shim = process, home, shim

    def __call__(self, job: dict[str, Any], **more: Any) -> dict[str, Any]:
        """What became of a job: ``killed``, ``seconds``; and of one that ended its ``root``, or ``error`` and
        ``said``."""
        assert self._process.stdin is not None and self._process.stdout is not None
        line = json.dumps({"home": self._home, **job, **more}, default=str)
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._process.stdout.readline() or '{"error": "the server has ended"}')
        assert "killed" in answer, answer
        return answer


@contextmanager
def forks(
    home: Path, folder: Path, program: str = "fork_server.py", variables: Mapping[str, str] | None = None
) -> Iterator[Forks]:
    """``folder``: where the compiled shim is put. ``program``: the server. ``variables``: of its environment."""
    environment = {**os.environ, **(variables or {}), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    root = str(Path(loreg.__file__).parent.parent)
    environment["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    library = compiled(folder)
    if library is not None:
        environment["LD_PRELOAD"] = str(library)
    command = [sys.executable, str(HERE / program)]
    with subprocess.Popen(command, env=environment, stdin=-1, stdout=-1, text=True) as process:
        assert process.stdin is not None
        yield Forks(process, home, library is not None)
        process.stdin.close()
        process.wait(60)
