"""``adapter_config.json``: its fields, and what in them is refused before a tensor is looked at.

Fields are on an allow-list of each type: one that is not known and that is set may change what the tensors mean, so
it is refused by name.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from loreg.adapters.peft import patterns
from loreg.adapters.peft.contents import Config
from loreg.errors import BadInput, Unsupported
from loreg.format import canonical_json

CONFIG = "adapter_config.json"

# Fields that every type has, and that say how or where it was trained: they do not change what the tensors mean.
COMMON = frozenset(
    {"peft_type", "base_model_name_or_path", "revision", "inference_mode", "peft_version", "task_type"}
    | {"auto_mapping", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"}
    | {"modules_to_save"}
)

# What readers look at in any type. PEFT writes null where nothing was given. A text is true to Python whatever it
# says, so that "false" for a flag would be a yes.
_FLAGS = frozenset(
    {"use_rslora", "use_dora", "lora_bias", "fan_in_fan_out", "ensure_weight_tying", "save_projection"}
    | {"coft", "block_share", "use_cayley_neumann"}
)
_TEXTS = frozenset({"peft_type", "base_model_name_or_path", "revision", "peft_version", "task_type", "bias"})
_NAMES_OR_PATTERN = frozenset({"target_modules", "exclude_modules", "layers_pattern"})


def read_config(path: Path) -> dict[str, Any]:
    """The JSON object, in which fields that are read in any type are null or of their JSON type. Raises BadInput."""
    config = canonical_json.loads(path.read_bytes(), what=str(path))
    if not isinstance(config, dict):
        raise BadInput(f"{path}: expected a JSON object.")
    for name, value in config.items():
        expected = _expected(name, value)
        if value is not None and expected is not None:
            raise BadInput(f"{path}: {name}: expected {expected} or null, found {str(value)[:80]!r}.")
    return config


def _expected(name: str, value: object) -> str | None:
    """What the field has to be; None if it is that, or another field."""
    names = isinstance(value, list) and all(isinstance(item, str) for item in value)
    if name in _FLAGS and not isinstance(value, bool):
        return "true, false"
    if name in _TEXTS and not isinstance(value, str):
        return "text"
    if name == "modules_to_save" and not names:
        return "a list of names"
    if name in _NAMES_OR_PATTERN and not names and not isinstance(value, str):
        return "text, a list of names"
    return None


def check_known(config: Config, known: Collection[str], path: Path, refused: Mapping[str, str] | None = None) -> None:
    """Raises Unsupported for a field that is set and not in ``known`` or COMMON; ``refused`` has reasons for some."""
    for key, value in config.items():
        if key not in known and key not in COMMON and value:
            reason = (refused or {}).get(key, "it is not handled")
            raise Unsupported(f"{path}: {key} is {str(value)[:80]}: {reason}; nothing was stored.")


def check_pattern(pattern: object, where: str) -> None:
    """Raises BadInput unless it is an object from regular expressions to numbers; Unsupported for an expression that
    is not matched here."""
    if not isinstance(pattern, dict):
        raise BadInput(f"{where}: expected an object, found {str(pattern)[:80]!r}.")
    for key, value in pattern.items():
        patterns.check(key, where)
        if type(value) not in (int, float):
            raise BadInput(f"{where}: expected a number for {key[:60]!r}, found {str(value)[:80]!r}.")


def first_match(path: str, keys: Iterable[str]) -> str:
    """The first of PEFT's patterns that fits a module's path, as ``(.*\\.)?(KEY)$``; the path itself if none does.
    Raises as ``patterns.fits_end`` does."""
    return next((key for key in keys if patterns.fits_end(key, path)), path)
