"""PEFT's directories: ``adapter_config.json`` beside ``adapter_model.safetensors`` or ``.bin``.

``config`` reads and refuses, ``directory`` finds the files, and there is one reader for each ``peft_type`` in
:data:`TYPES`: what the keys mean, and which terms they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from loreg.adapters.draft import Draft, DraftFile
from loreg.adapters.peft import adalora, ia3, lora, lycoris, orthogonal, rows, saved, targets, vera
from loreg.adapters.peft.config import CONFIG, read_config
from loreg.adapters.peft.contents import ReadContents
from loreg.adapters.peft.directory import WEIGHTS, license_of, read_weights, side_files
from loreg.adapters.peft.refused import why_refused
from loreg.errors import BadInput, Unsupported, UsageError

TYPES: Mapping[str, ReadContents] = {
    "LORA": lora.read,
    "ADALORA": adalora.read,
    "VERA": vera.read,
    "LOHA": lycoris.read_loha,
    "LOKR": lycoris.read_lokr,
    "IA3": ia3.read,
    "OFT": orthogonal.read_oft,
    "BOFT": orthogonal.read_boft,
    "TRAINABLE_TOKENS": rows.read,
}
"""``peft_type`` → its reader."""


def recognises(folder: Path) -> bool:
    return (folder / CONFIG).is_file()


def read(folder: Path, initial: Path | None = None) -> Draft:
    """Read a PEFT directory. Raises NotFound, BadInput, Unsupported; loads torch only for a ``.bin``.

    ``initial``: the directory of the same adapter as it was saved before training, see ``initial``.
    """
    config = read_config(folder / CONFIG)
    kind = str(config.get("peft_type"))
    if kind not in TYPES:
        raise Unsupported(f"{folder / CONFIG}: peft_type is {kind!r}, {why_refused(kind)}.")
    weights = read_weights(folder)
    tensors = {tensor.key: tensor for tensor in weights.tensors}
    for tensor in weights.tensors:
        if not tensor.shape and not saved.is_counter(tensor):
            raise BadInput(f"Tensor {tensor.key!r} has no dimensions: expected a vector or a matrix.")
    if initial is None:
        contents = TYPES[kind](tensors, config, folder / CONFIG)
    elif kind == "LORA":
        contents = lora.read(tensors, config, folder / CONFIG, initial)
    else:
        raise UsageError(f"{folder / CONFIG}: peft_type is {kind!r}, and only LORA can have initial factors.")
    targets.check(contents, tensors, config, folder / CONFIG)
    saved.check_values(weights.tensors, saved.Saved(contents.full, contents.together))
    kept, left_out = side_files(folder, weights.path.name)
    whole = weights.header is None or bool(contents.unused)
    return Draft(
        # What is there is not what PEFT would make of the files, so they are not given as a PEFT adapter again.
        format="peft" if initial is None else "peft-with-initial",
        base_name=config.get("base_model_name_or_path") or None,
        modules=contents.modules,
        full=contents.full,
        saved_modules=frozenset(str(name) for name in config.get("modules_to_save") or ()),
        files=(DraftFile(weights.path) if whole else weights, *kept),
        together=contents.together,
        left_out=left_out,
        license=license_of(folder / "README.md"),
        training={key: config[key] for key in ("peft_version", "task_type") if config.get(key)},
        locate=contents.locate,
    )


__all__ = ["CONFIG", "TYPES", "WEIGHTS", "read", "recognises"]
