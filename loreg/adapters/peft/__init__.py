"""PEFT's directories: ``adapter_config.json`` beside ``adapter_model.safetensors`` or ``.bin``.

``config`` reads and refuses, ``directory`` finds the files, and there is one reader for each ``peft_type`` in
:data:`TYPES`: what the keys mean, and which terms they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from loreg.adapters.draft import Draft, DraftFile
from loreg.adapters.peft import lora
from loreg.adapters.peft.config import CONFIG, read_config
from loreg.adapters.peft.contents import ReadContents
from loreg.adapters.peft.directory import WEIGHTS, license_of, read_weights, side_files
from loreg.errors import Unsupported

TYPES: Mapping[str, ReadContents] = {"LORA": lora.read}
"""``peft_type`` → its reader."""


def recognises(folder: Path) -> bool:
    return (folder / CONFIG).is_file()


def read(folder: Path) -> Draft:
    """Read a PEFT directory. Raises NotFound, BadInput, Unsupported; loads torch only for a ``.bin``."""
    config = read_config(folder / CONFIG)
    kind = str(config.get("peft_type"))
    if kind not in TYPES:
        raise Unsupported(f"{folder / CONFIG}: peft_type is {kind!r}; handled are {', '.join(sorted(TYPES))}.")
    weights = read_weights(folder)
    contents = TYPES[kind]({tensor.key: tensor for tensor in weights.tensors}, config, folder / CONFIG)
    for tensor in weights.tensors:
        tensor.check_finite()
    kept, left_out = side_files(folder, weights.path.name)
    return Draft(
        format="peft",
        base_name=config.get("base_model_name_or_path") or None,
        modules=contents.modules,
        full=contents.full,
        saved_modules=frozenset(str(name) for name in config.get("modules_to_save") or ()),
        files=(weights if weights.header is not None else DraftFile(weights.path), *kept),
        together=contents.together,
        left_out=left_out,
        license=license_of(folder / "README.md"),
        training={key: config[key] for key in ("peft_version", "task_type") if config.get(key)},
    )


__all__ = ["CONFIG", "TYPES", "WEIGHTS", "read", "recognises"]
