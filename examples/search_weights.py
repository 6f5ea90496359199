"""Find the weights of a sum of adapters for a task that none of them was made for, from a few examples of it.

    python examples/search_weights.py

A tiny Llama, three adapters of it, and eight examples of a new task are made on the spot, at random, in a temporary
directory: nothing is downloaded, and nothing is left behind. With models and adapters of your own, what changes is
``loss``, any number that says how good a sum is. Needs ``pip install 'loreg[peft,search]'``.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from complete import quiet

import loreg
from loreg.search import Trial, expression, search_weights

NAMES = ("sql", "humor", "poems")
# What the search is to find. The task is made of it, so that the example can tell how near it came.
TRUTH = {"sql": 0.8, "humor": 0.0, "poems": -0.4}
WORDS = 64


def make(folder: Path) -> None:
    """A base in ``folder``/base, and beside it an adapter in PEFT's format for each of NAMES."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": WORDS}
    config = LlamaConfig(**sizes, num_attention_heads=4, tie_word_embeddings=False, initializer_range=0.3)
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder / "base")
    for name in NAMES:
        model = LlamaForCausalLM.from_pretrained(folder / "base")
        # Without PEFT's initialisation B is random, and not 0: as if it had been trained.
        lora = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "up_proj"], init_lora_weights=False)
        get_peft_model(model, lora).save_pretrained(folder / name, save_embedding_layers=False)


class Live:
    """The base in memory, with a sum of adapters added to its weights: for scoring many sums without writing one."""

    def __init__(self, registry: loreg.Registry, base: Path) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(base).eval()
        self.deltas = {name: registry.load(name) for name in NAMES}
        paths = {path for delta in self.deltas.values() for path in delta}
        self.weights = {path: self.model.get_submodule(path).weight for path in sorted(paths)}
        self.plain = {path: weight.detach().double() for path, weight in self.weights.items()}

    @torch.no_grad()
    def __call__(self, weights: Mapping[str, float], inputs: torch.Tensor) -> torch.Tensor:
        """The logits for ``inputs`` of the base + Σ weight·adapter."""
        for path, weight in self.weights.items():
            added = (weights[name] * delta[path].dense() for name, delta in self.deltas.items() if path in delta)
            weight.copy_(self.plain[path] + sum(added))
        return logits(self.model, inputs)


@torch.no_grad()
def logits(model: Any, inputs: torch.Tensor) -> torch.Tensor:
    return model(input_ids=inputs).logits.double()


def show(trial: Trial) -> None:
    print(f"  {trial.score:8.4f}  {trial.expression}")


def run(folder: Path, budget: int, seed: int) -> None:
    from transformers import AutoModelForCausalLM

    make(folder)
    with loreg.open(folder / "home") as registry:
        registry.add_base(folder / "base", "base")
        for name in NAMES:
            registry.push(folder / name, base="base", name=name)
        live = Live(registry, folder / "base")
        inputs = torch.randint(WORDS, (8, 12), generator=torch.Generator().manual_seed(seed))
        answers = live(TRUTH, inputs).argmax(-1)

        def loss(weights: Mapping[str, float]) -> float:
            """The mean cross-entropy of the answers, in nats: lower is better."""
            found = live(weights, inputs)
            return float(torch.nn.functional.cross_entropy(found.flatten(0, 1), answers.flatten()))

        alone = {name: loss({**dict.fromkeys(NAMES, 0.0), name: 1.0}) for name in NAMES}
        print(f"the task is {expression(TRUTH)}; what was tried:\n")
        best = search_weights(loss, NAMES, budget=budget, seed=seed, regularisation=0.01, watch=show)
        print(f"\nbefore    {best.history[0].score:.4f}")
        for name, value in alone.items():
            print(f"{name:<8}  {value:.4f}")
        print(f"after     {best.score:.4f}  {best.expression}")
        registry.merge(best.expression, folder / "merged")
        merged = AutoModelForCausalLM.from_pretrained(folder / "merged").eval()
        found = logits(merged, inputs)
        value = float(torch.nn.functional.cross_entropy(found.flatten(0, 1), answers.flatten()))
        right = float((found.argmax(-1) == answers).double().mean())
        print(f"merged    {value:.4f}  {right:.0%} of the answers are those of the task")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--budget", type=int, default=40, help="how many sums may be tried (default 40)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    quiet()
    with tempfile.TemporaryDirectory() as folder:
        run(Path(folder), options.budget, options.seed)


if __name__ == "__main__":
    main()
