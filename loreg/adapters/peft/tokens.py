"""Trained token rows, as PEFT's ``trainable_token_indices`` has them (0.21, ``tuners/trainable_tokens/layer.py``).

``trainable_tokens_delta`` holds the rows themselves, in spite of its name; which rows they are is in the config
alone. Where the model ties the embedding to its head, PEFT replaces the rows of both, unless the config gives the
head rows of its own (``utils/other.py``, `set_additional_trainable_modules`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from loreg.adapters.draft import DraftModule, DraftTerm, RawTensor
from loreg.adapters.peft.contents import Config
from loreg.errors import BadInput, Unsupported

FIELD = "trainable_token_indices"


class _Rows(NamedTuple):
    rows: RawTensor
    indices: list[int]

    def same_as(self, other: _Rows) -> bool:
        return self.indices == other.indices and self.rows.same_as(other.rows)


def read(rows: Mapping[str, RawTensor], config: Config, path: Path) -> dict[str, DraftModule]:
    """The modules whose rows were trained; ``rows`` by module path. Raises BadInput, Unsupported.

    Of two modules with the same rows, as PEFT saves tied ones that were resized, the second repeats the first.
    """
    said = config.get(FIELD)
    if not said and rows:
        raise Unsupported(
            f"{path}: {FIELD} is missing, and the adapter has rows of {min(rows)!r}: which, nobody tells."
        )
    if said and not rows:
        raise BadInput(f"{path}: {FIELD} is {str(said)[:80]}, and the weights hold no trained rows: save them again.")
    found = {name: _Rows(tensor, _indices(name, tensor, said, path)) for name, tensor in rows.items()}
    firsts: dict[str, str] = {}
    for name, these in found.items():
        firsts[name] = next(first for first in found if found[first].same_as(these))
    return {
        name: DraftModule(
            (DraftTerm("rows", {"rows": these.rows}, 1.0, None, {"indices": these.indices}),),
            embedding=True,
            together=True,  # of the head with its own rows too, which are then all that it has
            repeats=None if firsts[name] == name else firsts[name],
        )
        for name, these in found.items()
    }


def _indices(name: str, rows: RawTensor, said: object, path: Path) -> list[int]:
    """Which rows of a module were trained: those of the keys that its name ends with, or the one list."""
    if isinstance(said, dict):
        fitting = [value for key, value in said.items() if name.endswith(str(key))]
        # PEFT takes the first of several, and writes them in another order than they were given in.
        if not fitting or any(value != fitting[0] for value in fitting):
            raise BadInput(f"{path}: {FIELD} has {len(fitting)} different entries for {name!r}, expected one.")
        indices = fitting[0]
    else:
        indices = said
    if not isinstance(indices, list) or not all(type(index) is int and index >= 0 for index in indices):
        raise BadInput(f"{path}: {FIELD}: expected a list of row numbers for {name!r}, found {str(indices)[:80]}.")
    if len(rows.shape) != 2 or rows.shape[0] != len(indices):
        raise BadInput(
            f"{path}: {FIELD} has {len(indices)} rows of {name!r}, and {rows.key!r} is of shape {list(rows.shape)}."
        )
    return indices
