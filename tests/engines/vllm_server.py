"""A tiny Llama with a tokenizer of its own, adapters for it, and a vLLM server that serves it; all of it on a CPU."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tiny

VOCABULARY, HIDDEN, INNER, LAYERS = 256, 64, 128, 2
PROMPT = [1, 17, 99, 4, 210, 33]
TOKENS = 48
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "float32",
    "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": LAYERS,
    "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
    "hidden_act": "silu", "rope_theta": 10000.0, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (HIDDEN, HIDDEN), "self_attn.v_proj": (HIDDEN, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN), "mlp.gate_proj": (INNER, HIDDEN), "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}  # fmt: skip
ADAPTED = ("self_attn.q_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.down_proj")
_START_S = 600.0


def write_base(folder: Path, seed: int = 0) -> Path:
    """A Llama of two layers in float32, and a tokenizer of the words w0, w1, …"""
    from tokenizers import Tokenizer, models, pre_tokenizers

    rng = np.random.default_rng(seed)
    tensors = {
        "model.embed_tokens.weight": tiny.normal(rng, "F32", VOCABULARY, HIDDEN),
        "lm_head.weight": tiny.normal(rng, "F32", VOCABULARY, HIDDEN, std=0.3),
        "model.norm.weight": tiny.tensor("F32", np.ones(HIDDEN)),
    }
    for layer in range(LAYERS):
        for name, shape in SHAPES.items():
            tensors[f"model.layers.{layer}.{name}.weight"] = tiny.normal(rng, "F32", *shape, std=0.2)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{name}.weight"] = tiny.tensor("F32", np.ones(HIDDEN))
    tiny.write_model(folder, tensors, config=CONFIG)
    words = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(VOCABULARY - 3))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def factors(seed: int, ranks: Mapping[str, int], modules: Sequence[str] = ADAPTED) -> dict[str, tiny.Factors]:
    """Of every layer's ``modules``; ``ranks``: by the last part of a name, else 4."""
    rng, found = np.random.default_rng(seed), {}
    for layer in range(LAYERS):
        for name in modules:
            rank = ranks.get(name.rpartition(".")[2], 4)
            found[f"model.layers.{layer}.{name}"] = tiny.factors(rng, *SHAPES[name], rank, std=0.2)
    return found


def write_adapter(
    folder: Path,
    seed: int,
    *,
    ranks: Mapping[str, int] | None = None,
    modules: Sequence[str] = ADAPTED,
    **config: Any,
) -> Path:
    """A PEFT directory that adapts ``modules``. Its config names them as people do, by their last part."""
    targets = sorted(name.rpartition(".")[2] for name in modules)
    given = {"r": 4, "target_modules": targets, "bias": "none", "init_lora_weights": True, **config}
    return tiny.write_adapter(folder, factors(seed, ranks or {}, modules), **given)


def write_dora(folder: Path, seed: int) -> Path:
    """The same with DoRA's magnitudes."""
    modules = factors(seed, {})
    sizes = {f"{path}.lora_magnitude_vector": np.ones(len(f.B.values)) for path, f in modules.items()}
    magnitudes = {name: tiny.tensor("F32", values) for name, values in sizes.items()}
    given = {"r": 4, "use_dora": True, "modules_to_save": None}
    return tiny.write_adapter(folder, modules, full=magnitudes, **given)


class Answer(NamedTuple):
    """The tokens that were generated, greedily, and the logarithm of the probability of each."""

    tokens: list[int]
    logprobs: list[float]

    def distance(self, other: Answer) -> float:
        """The largest difference of two logarithms; infinite if the tokens differ."""
        if self.tokens != other.tokens:
            return float("inf")
        return max(abs(one - two) for one, two in zip(self.logprobs, other.logprobs, strict=True))


@dataclass(frozen=True)
class Server:
    """A server that runs, on the loopback."""

    port: int
    log: Path
    key: str | None = None

    def request(self, path: str, body: Any = None) -> tuple[int, Any]:
        """The status and the document of an answer: to a GET, or to a POST of ``body``."""
        data = None if body is None else json.dumps(body).encode()
        url, headers = f"http://127.0.0.1:{self.port}{path}", {"Content-Type": "application/json"}
        if self.key is not None:
            headers["Authorization"] = f"Bearer {self.key}"
        try:
            with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=120) as response:
                text, status = response.read(), response.status
        except urllib.error.HTTPError as error:
            text, status = error.read(), error.code
        try:
            return status, json.loads(text)
        except ValueError:
            return status, text.decode()

    def complete(self, model: str, prompt: Sequence[int] = PROMPT) -> tuple[int, Any]:
        wanted = {
            "model": model, "prompt": list(prompt), "max_tokens": TOKENS, "temperature": 0, "logprobs": 0,
            "return_token_ids": True, "ignore_eos": True,
        }  # fmt: skip
        return self.request("/v1/completions", wanted)

    def ask(self, model: str, prompt: Sequence[int] = PROMPT) -> Answer:
        status, document = self.complete(model, prompt)
        assert status == 200, document
        choice = document["choices"][0]
        return Answer(choice["token_ids"], choice["logprobs"]["token_logprobs"])

    def path(self, name: str) -> str | None:
        """Whence the server says that it has an adapter."""
        _, document = self.request("/v1/models")
        return next((card["root"] for card in document["data"] if card["id"] == name), None)

    def said(self, *words: str) -> list[str]:
        """The lines of the log that have all of ``words``."""
        return [line for line in self.log.read_text().splitlines() if all(word in line for word in words)]


@contextmanager
def serving(base: Path, folder: Path, *options: str, **environment: str) -> Iterator[Server]:
    """A vLLM server for ``base`` with ``options``, which writes its log into ``folder``."""
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(base), "--dtype", "float32",
        "--enforce-eager", "--max-model-len", "64", "--max-num-seqs", "8", *options,
    ]  # fmt: skip
    with running("vLLM", command, folder, _environment(**environment)) as server:
        yield server


@contextmanager
def running(
    engine: str, command: Sequence[str], folder: Path, environment: Mapping[str, str], key: str | None = None
) -> Iterator[Server]:
    """What ``command`` starts, on a free port of the loopback, which writes its log into ``folder``."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = folder / f"{engine.lower()}.log"
    placed = [*command, "--host", "127.0.0.1", "--port", str(port)]
    with log.open("wb") as out:
        process = subprocess.Popen(
            placed, cwd=folder, env=environment, stdout=out, stderr=out, start_new_session=True
        )
    server = Server(port, log, key)
    try:
        deadline = time.monotonic() + _START_S
        while not _is_up(server):
            assert process.poll() is None, f"{engine} ended:\n{log.read_text()[-8000:]}"
            assert time.monotonic() < deadline, f"{engine} does not start:\n{log.read_text()[-8000:]}"
            time.sleep(0.5)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # what it started may outlive it


def answers(models: Sequence[Path], prompt: Sequence[int] = PROMPT) -> list[Answer]:
    """What the same engine answers with each of ``models`` and no adapter, in a process of its own."""
    given = json.dumps({"models": list(map(str, models)), "prompt": list(prompt), "tokens": TOKENS})
    script = Path(__file__).with_name("offline.py")
    # In one process, as a process for each model takes most of the time to import vLLM again.
    environment = _environment(VLLM_PLUGINS="", VLLM_ENABLE_V1_MULTIPROCESSING="0")
    run = subprocess.run([sys.executable, str(script)], input=given, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-8000:]
    return [Answer(*each) for each in json.loads(run.stdout.splitlines()[-1])]


def _environment(**given: str) -> dict[str, str]:
    fixed = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "OMP_NUM_THREADS": "1"}
    return {**os.environ, **fixed, **given}


def _is_up(server: Server) -> bool:
    try:
        return server.request("/health")[0] == 200
    except OSError:
        return False
