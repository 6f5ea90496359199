"""The files of a PEFT directory."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

from loreg.adapters.draft import DraftFile, read_tensors
from loreg.adapters.peft.config import CONFIG
from loreg.errors import NotFound
from loreg.format.manifest import is_file_name

WEIGHTS = "adapter_model.safetensors"
PICKLED_WEIGHTS = "adapter_model.bin"

# Small files that belong to an adapter; weights, optimizer states and the like do not.
_KEPT_SUFFIXES = frozenset({".json", ".md", ".txt", ".jinja", ".model", ".yaml", ".yml", ""})


_MATTER = 1 << 16  # characters of a card that may be front matter


def read_weights(folder: Path) -> DraftFile:
    """The tensors of the adapter in ``folder``. Raises NotFound, BadInput."""
    if (folder / WEIGHTS).is_file():
        header, tensors = read_tensors(folder / WEIGHTS)
        return DraftFile(folder / WEIGHTS, tensors, header.raw)
    if (folder / PICKLED_WEIGHTS).is_file():
        return _pickled(folder / PICKLED_WEIGHTS)
    raise NotFound(f"{folder} has {CONFIG} but neither {WEIGHTS} nor {PICKLED_WEIGHTS}: save the adapter again.")


def _pickled(path: Path) -> DraftFile:
    from loreg.adapters.pickled import load_tensors

    return DraftFile(path, load_tensors(path))


def side_files(folder: Path, weights: str) -> tuple[list[DraftFile], tuple[str, ...]]:
    kept, left_out = [], []
    for path in sorted(folder.iterdir()):
        if path.name == weights or path.name.startswith("."):
            continue
        if path.is_file() and path.suffix.lower() in _KEPT_SUFFIXES and is_file_name(path.name):
            kept.append(DraftFile(path))
        else:
            left_out.append(path.name + ("/" if path.is_dir() else ""))
    return kept, tuple(left_out)


def license_of(card: Path) -> str | None:
    """The licence that the front matter of a model card names."""
    if not card.is_file():
        return None
    first, *lines = card.read_text(encoding="utf-8", errors="replace")[:_MATTER].splitlines() or [""]
    if first.rstrip() != "---":
        return None
    for line in itertools.takewhile(lambda line: line.rstrip() != "---", lines):
        if found := re.match(r"license: *['\"]?([A-Za-z0-9.+-]{1,64})", line):
            return found[1]
    return None
