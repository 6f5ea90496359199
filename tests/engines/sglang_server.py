"""An SGLang server on a CPU, for the models and adapters of ``vllm_server``, and what transformers says to them."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import vllm_server
from vllm_server import PROMPT, TOKENS, Answer, Server

NAME = "tiny"


@dataclass(frozen=True)
class Asked:
    """``server``, by the fields that choose a model of it."""

    server: Server

    def complete(self, fields: Mapping[str, Any], prompt: Sequence[int] = PROMPT) -> tuple[int, Any]:
        """The status and the document of OpenAI's interface."""
        greedy = {"prompt": list(prompt), "max_tokens": TOKENS, "temperature": 0, "logprobs": 1, "ignore_eos": True}
        return self.server.request("/v1/completions", {**greedy, **fields})

    def ask(self, fields: Mapping[str, Any], prompt: Sequence[int] = PROMPT) -> Answer:
        status, document = self.complete(fields, prompt)
        assert status == 200, document
        found = document["choices"][0]["logprobs"]
        return Answer([number(word) for word in found["tokens"]], found["token_logprobs"])

    def generate(self, fields: Mapping[str, Any], prompt: Sequence[int] = PROMPT) -> Answer:
        """By SGLang's own interface."""
        greedy = {"temperature": 0, "max_new_tokens": TOKENS, "ignore_eos": True}
        body = {"input_ids": list(prompt), "sampling_params": greedy, "return_logprob": True, **fields}
        status, document = self.server.request("/generate", body)
        assert status == 200, document
        found = document["meta_info"]["output_token_logprobs"]
        assert [token for _, token, _ in found] == document["output_ids"]
        return Answer(document["output_ids"], [logprob for logprob, _, _ in found])

    def load(self, name: str, path: Path) -> int:
        """The status of the answer to a load that loreg has no part in."""
        return self.server.request("/load_lora_adapter", {"lora_name": name, "lora_path": str(path)})[0]


def number(word: str) -> int:
    """Of a word in the tokenizer of ``vllm_server.write_base``."""
    special = ["<unk>", "<s>", "</s>"]
    return special.index(word) if word in special else int(word.removeprefix("w")) + len(special)


@contextmanager
def serving(base: Path, folder: Path, *options: str, key: str) -> Iterator[Server]:
    """An SGLang server for ``base`` under the name of ``NAME``, which writes its log into ``folder``."""
    command = [
        sys.executable, str(Path(__file__).with_name("sglang_on_cpu.py")), "--model-path", str(base),
        "--served-model-name", NAME, "--device", "cpu", "--dtype", "float32", "--attention-backend", "torch_native",
        "--grammar-backend", "none", "--context-length", "64", "--max-running-requests", "8",
        "--max-total-tokens", "1024", "--skip-server-warmup", "--api-key", key, *options,
    ]  # fmt: skip
    fixed = {"SGLANG_USE_CPU_ENGINE": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with vllm_server.running("SGLang", command, folder, {**os.environ, **fixed}, key) as server:
        yield server


def answers(models: Sequence[Path], prompt: Sequence[int] = PROMPT) -> list[Answer]:
    """What transformers generates, greedily, with each of ``models``."""
    import torch
    from transformers import AutoModelForCausalLM

    found = []
    for path in models:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        tokens, logprobs = list(prompt), list[float]()
        with torch.no_grad():
            for _ in range(TOKENS):
                scores = torch.log_softmax(model(torch.tensor([tokens])).logits[0, -1].double(), -1)
                token = int(scores.argmax())
                tokens.append(token)
                logprobs.append(float(scores[token]))
        found.append(Answer(tokens[len(prompt) :], logprobs))
    return found
