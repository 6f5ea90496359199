"""llama.cpp: its conversions to GGUF, and its server, as ``make test-llama.cpp`` builds them; all of it on a CPU."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_server import PROMPT, Answer

_PLACE = Path(__file__).resolve().parents[2] / ".llama.cpp"
SOURCES = _PLACE / "sources"
PROGRAM = _PLACE / "build" / "bin" / "llama-server"
TOKENS = 24
_START_S = 120.0
# Flash attention rounds to float16, and so does the cache unless it is told: 1e-2 in the logarithms, for 6e-6 so.
_EXACT = ("--flash-attn", "off", "--cache-type-k", "f32", "--cache-type-v", "f32")


class Refused(Exception):
    """A conversion, or the start of the server, with what it said."""


def convert_base(model: Path, out: Path) -> Path:
    _run(Path(__file__).with_name("llama_base.py"), SOURCES, model, "--outtype", "f32", "--outfile", out)
    return out


def convert_lora(directory: Path, base: Path, out: Path) -> Path:
    """Raises Refused."""
    _run(SOURCES / "convert_lora_to_gguf.py", directory, "--base", base, "--outfile", out)
    return out


def _run(*words: object) -> None:
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    if done.returncode:
        raise Refused(done.stderr[-4000:])


@dataclass(frozen=True)
class Server:
    """A server that runs, on the loopback."""

    url: str
    log: Path

    def request(self, path: str, body: Any = None) -> tuple[int, Any]:
        """The status and the document of an answer: to a GET, or to a POST of ``body``."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return response.status, json.loads(response.read())
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    def ask(self, prompt: Sequence[int] = PROMPT, **fields: Any) -> Answer:
        """Greedily; ``fields``: of the request."""
        given = {"prompt": list(prompt), "n_predict": TOKENS, "temperature": 0, "n_probs": 1, "ignore_eos": True}
        status, document = self.request("/completion", {**given, "return_tokens": True, **fields})
        assert status == 200, document
        return Answer(document["tokens"], [each["logprob"] for each in document["completion_probabilities"]])

    def scales(self) -> list[float]:
        return [each["scale"] for each in self.request("/lora-adapters")[1]]


@contextmanager
def serving(model: Path, folder: Path, *options: object) -> Iterator[Server]:
    """A server of the GGUF file ``model``, started with ``options``, which writes its log into ``folder``. Raises
    Refused if it does not start."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        PROGRAM, "--model", model, "--host", "127.0.0.1", "--port", port, "--ctx-size", 512, "--threads", 1,
        "--no-warmup", *_EXACT, *options,
    ]  # fmt: skip
    log = folder / "llama-server.log"
    with log.open("wb") as out:
        process = subprocess.Popen(list(map(str, command)), cwd=folder, stdout=out, stderr=out)
    server = Server(f"http://127.0.0.1:{port}", log)
    try:
        deadline = time.monotonic() + _START_S
        while not _is_up(server):
            if process.poll() is not None:
                raise Refused(log.read_text(errors="replace"))
            assert time.monotonic() < deadline, f"llama-server does not start:\n{log.read_text()[-4000:]}"
            time.sleep(0.05)
        yield server
    finally:
        process.kill()
        process.wait()


def transformers_answer(model: Path, prompt: Sequence[int] = PROMPT) -> Answer:
    """What transformers computes of a model in float32, one token after another and without a cache."""
    import torch
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    ids, found = list(prompt), Answer([], [])
    with torch.no_grad():
        for _ in range(TOKENS):
            logprobs = torch.log_softmax(loaded(torch.tensor([ids])).logits[0, -1].double(), -1)
            token = int(logprobs.argmax())
            found.tokens.append(token)
            found.logprobs.append(float(logprobs[token]))
            ids.append(token)
    return found


def _is_up(server: Server) -> bool:
    try:
        return server.request("/health")[0] == 200
    except OSError:
        return False
