"""A program: reads models, a prompt and a number of tokens as JSON, and prints what vLLM generates with each."""

from __future__ import annotations

import json
import sys
from typing import Any


def main() -> None:
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    given, found = json.load(sys.stdin), list[Any]()
    greedy = SamplingParams(temperature=0, max_tokens=given["tokens"], logprobs=0, ignore_eos=True)
    for model in given["models"]:
        llm = LLM(model, dtype="float32", enforce_eager=True, max_model_len=64, max_num_seqs=8)
        (result,) = llm.generate([{"prompt_token_ids": given["prompt"]}], greedy, use_tqdm=False)
        (output,) = result.outputs
        steps = zip(output.token_ids, output.logprobs, strict=True)
        found.append([list(output.token_ids), [each[token].logprob for token, each in steps]])
        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()  # or the next model would find this one's place taken
    print(json.dumps(found))


if __name__ == "__main__":
    main()
