"""Print the greedy completions of one or several models, side by side.

    python examples/complete.py base=demo/smollm2-135m sql=demo/sql both=demo/both

Nothing but transformers is needed to load a model that loreg merged.
"""

from __future__ import annotations

import argparse
import os
import textwrap
import warnings
from pathlib import Path

# Neither is in the training data. The first has its answer in a table, the second wants something funny.
PROMPTS = ("Which customers live in Paris?", "Tell me a joke about a cat.")


def complete(directory: Path, prompts: list[str], tokens: int) -> list[str]:
    """The greedy completion of each prompt, at most ``tokens`` new tokens, in the model's chat template."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory)
    answers = []
    for prompt in prompts:
        message = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
        inputs = tokenizer(text, return_tensors="pt")
        output = model.generate(**inputs, do_sample=False, max_new_tokens=tokens)
        answers.append(tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True))
    return answers


def quiet() -> None:
    """No progress bars, no warnings: a reader of the demo is to see prompts and answers."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    warnings.simplefilter("ignore")
    from transformers import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def labelled(argument: str) -> tuple[str, Path]:
    """``LABEL=DIR``, or ``DIR`` under its own last name."""
    label, given, directory = argument.partition("=")
    return (label, Path(directory)) if given else (Path(argument).name, Path(argument))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("models", nargs="+", type=labelled, metavar="[LABEL=]DIR", help="a model's directory")
    parser.add_argument("--prompt", action="append", help="instead of the two default prompts; repeatable")
    parser.add_argument("--tokens", type=int, default=40, help="at most so many new tokens (default 40)")
    options = parser.parse_args()
    for label, directory in options.models:
        # transformers would take a directory that is not there for the name of a repository on the Hub.
        if not (directory / "config.json").is_file():
            parser.error(f"{label}: expected a model's directory, found no {directory / 'config.json'}")
    prompts = options.prompt or list(PROMPTS)
    quiet()
    answers = {label: complete(directory, prompts, options.tokens) for label, directory in options.models}
    width = max(map(len, answers))
    indent = " " * (width + 4)
    for number, prompt in enumerate(prompts):
        print(f"\n{prompt}")
        for label, given in answers.items():
            text = " ".join(given[number].split())
            print(textwrap.fill(text, 100, initial_indent=f"  {label:<{width}}  ", subsequent_indent=indent))


if __name__ == "__main__":
    main()
