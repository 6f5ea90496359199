"""Train one of the demo's LoRA adapters with PEFT, on a CPU, in a few minutes.

    python examples/train.py demo/smollm2-135m --data examples/data/sql.jsonl --out examples/adapters/sql

The loss is the mean cross-entropy over the completion's tokens alone, in the chat template of the base. The
seed fixes initial factors and order of examples; the last bits may still differ between machines.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

BASE_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
TARGETS = ["q_proj", "v_proj"]
IGNORED = -100  # the label that cross-entropy leaves out


def read_pairs(path: Path) -> list[tuple[str, str]]:
    """(prompt, completion) for each line of a JSON Lines file."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [(row["prompt"], row["completion"]) for row in rows]


def encode(tokenizer: Any, prompt: str, completion: str) -> tuple[list[int], int]:
    """The token ids of one exchange, ended by EOS, and how many of them belong to the question."""
    question = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
    )
    asked = tokenizer(question).input_ids
    return asked + tokenizer(completion).input_ids + [tokenizer.eos_token_id], len(asked)


def batch(examples: list[tuple[list[int], int]], pad: int) -> dict[str, torch.Tensor]:
    """Right-padded ``input_ids``, ``attention_mask`` and ``labels``, each int64 of shape (examples, longest)."""
    longest = max(len(ids) for ids, _ in examples)
    ids = torch.full((len(examples), longest), pad)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, IGNORED)
    for row, (tokens, asked) in enumerate(examples):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
        labels[row, asked : len(tokens)] = torch.tensor(tokens[asked:])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def train(base: Path, pairs: list[tuple[str, str]], options: argparse.Namespace) -> tuple[Any, float]:
    """A PEFT model on ``base``, its factors trained in float32 on ``pairs``; and the last epoch's mean loss."""
    torch.manual_seed(options.seed)
    shuffle = random.Random(options.seed).shuffle
    tokenizer = AutoTokenizer.from_pretrained(base)
    config = LoraConfig(task_type="CAUSAL_LM", r=options.rank, lora_alpha=2 * options.rank, target_modules=TARGETS)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    model.train()
    examples = [encode(tokenizer, *pair) for pair in pairs]
    steps = options.epochs * -(-len(examples) // options.batch)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=options.lr)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1.0, end_factor=0.0, total_iters=steps)
    for epoch in range(options.epochs):
        shuffle(examples)
        losses = []
        for start in range(0, len(examples), options.batch):
            loss = model(**batch(examples[start : start + options.batch], tokenizer.pad_token_id)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            losses.append(loss.item())
        mean = sum(losses) / len(losses)
        print(f"epoch {epoch + 1}/{options.epochs}: loss {mean:.3f}", flush=True)
    return model, mean


CARD = """\
---
base_model: {base}
library_name: peft
license: apache-2.0
tags: [lora]
---

# {name}: a demonstration adapter of loreg

A LoRA of rank {options.rank} (α = {alpha}, on {targets}) for SmolLM2-135M-Instruct, trained for real and for one
purpose: that its effect can be seen in a few greedy tokens, alone and in a sum with another adapter. It was
trained on {pairs} short pairs that were written for this repository, and judged by eye on a handful of prompts
outside them, by no benchmark. It knows nothing that the base does not: do not use it for real work.

- base: `{base}`, as `examples/make_base.py` makes it (Q4_1 GGUF dequantised, rounded to bfloat16)
- data: `{data}`, Apache-2.0 like the rest of the repository
- training: {options.epochs} epochs in batches of {options.batch}, AdamW, learning rate {options.lr:g} falling \
linearly to 0,
  seed {options.seed}, float32 on a CPU; mean loss of the last epoch {loss:.3f}; factors stored in bfloat16
- prompt: the chat template of the base, one user message

Make it again, from the root of the repository:

    python examples/make_base.py demo/smollm2-135m
    python examples/train.py demo/smollm2-135m --data {data} --out {out}
"""


def save(model: Any, card: str, out: Path) -> None:
    """``model.save_pretrained`` in bfloat16, under the base's public name in place of a path of this machine."""
    config = model.peft_config["default"]
    config.base_model_name_or_path = BASE_NAME
    config.target_modules = sorted(config.target_modules)  # a set would be written in another order each time
    # The embeddings are not trained; without the argument PEFT asks the Hub whether their size changed.
    model.to(torch.bfloat16).save_pretrained(out, save_embedding_layers=False)
    (out / "README.md").write_text(card, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("base", type=Path, help="the checkpoint that make_base.py wrote")
    parser.add_argument("--data", type=Path, required=True, help='JSON Lines of {"prompt", "completion"}')
    parser.add_argument("--out", type=Path, required=True, help="the adapter's directory")
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    pairs = read_pairs(options.data)
    started = time.monotonic()
    model, loss = train(options.base, pairs, options)
    card = CARD.format(
        base=BASE_NAME,
        name=options.out.name,
        options=options,
        alpha=2 * options.rank,
        targets=" and ".join(f"`{target}`" for target in TARGETS),
        pairs=len(pairs),
        data=options.data,
        loss=loss,
        out=options.out,
    )
    save(model, card, options.out)
    print(f"{options.out}: trained and saved in {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
