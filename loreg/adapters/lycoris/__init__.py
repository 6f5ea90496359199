"""Files of LyCORIS and of kohya's scripts: one file of tensors, ``PREFIX_NAME.PART``.

NAME is a module's path with underscores for dots (``paths``), and the parts say which of the library's algorithms it
was trained with (``algorithms``). LyCORIS 4.1.3 is followed: what its networks compute, where it is told from a file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from loreg.adapters import one_file
from loreg.adapters.draft import Draft, RawTensor
from loreg.adapters.lycoris import algorithms, paths
from loreg.adapters.lycoris.notes import Notes
from loreg.errors import Unsupported

EXPECTED = "a file of LyCORIS or kohya with tensors such as lycoris_PATH.lora_up.weight"

_KEY = re.compile(r"(?P<prefix>lycoris|lora_(?:unet|te\d?|transformer))_(?P<name>[^.]+)\.(?P<part>.+)")


def recognises(path: Path) -> bool:
    return one_file.find(path) is not None and any(map(_KEY.fullmatch, one_file.open_weights(path).tensors))


def read(path: Path) -> Draft:
    """Read such a file, or the directory that it is alone in. Raises BadInput, Unsupported.

    The draft has no modules before it is located: without a base their paths are not known.
    """
    weights = one_file.open_weights(path)
    notes = Notes.of(weights.metadata, weights.path)
    modules = {name: algorithms.module(name, parts, notes) for name, parts in _sorted(weights.tensors).items()}
    beside = one_file.beside(path, weights)
    return Draft(
        format="lycoris",
        base_name=None,
        modules={},
        full={},
        saved_modules=frozenset(),
        files=beside.files,
        left_out=beside.left_out,
        license=beside.license,
        training=notes.kept,
        locate=partial(paths.locate, modules),
    )


def _sorted(tensors: Mapping[str, RawTensor]) -> dict[paths.Name, dict[str, RawTensor]]:
    """Module → part → tensor."""
    modules: dict[paths.Name, dict[str, RawTensor]] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise Unsupported(
                f"Tensor {key!r} is none of a module: expected names like lycoris_PATH.lora_up.weight, or with "
                "lora_unet_, lora_te_ or lora_transformer_ before the path; nothing was stored."
            )
        modules.setdefault(paths.Name(match["prefix"], match["name"]), {})[match["part"]] = tensor
    return modules
