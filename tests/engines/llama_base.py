"""A program: llama.cpp's convert_hf_to_gguf.py, with a vocabulary for models whose tokenizer it does not know.

python llama_base.py SOURCES …  # what convert_hf_to_gguf.py takes
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

_NORMAL, _UNKNOWN, _CONTROL = 1, 2, 3


def vocabulary(model: Any) -> None:
    """Three special tokens, a space and ASCII, by which any such prompt has tokens, and words for the rest."""
    size = model.hparams["vocab_size"]
    tokens = ["<unk>", "<s>", "</s>", "▁", *map(chr, range(33, 127))]
    tokens += [f"w{number}" for number in range(len(tokens), size)]
    writer = model.gguf_writer
    writer.add_tokenizer_model("llama")
    writer.add_token_list([token.encode() for token in tokens])
    writer.add_token_scores([0.0] * size)
    writer.add_token_types([_UNKNOWN, _CONTROL, _CONTROL, *[_NORMAL] * (size - 3)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)


def main() -> None:
    sources = Path(sys.argv[1])
    sys.path[:0] = [str(sources), str(sources / "gguf-py")]
    from conversion.llama import LlamaModel

    LlamaModel.set_vocab = vocabulary
    script = str(sources / "convert_hf_to_gguf.py")
    sys.argv[:2] = [script]
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
