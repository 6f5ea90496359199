"""``adapter_config.json``: its fields, and what in them is refused before a tensor is looked at.

Fields are on an allow-list of each type: one that is not known and that is set may change what the tensors mean, so
it is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

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

# A stranger's regular expressions are run on every module path: what can take exponential time is refused.
_PATTERN_LENGTH = 512
_GROUPS = 8
_GROUP = re.compile(r"(?<!\\)\(")
_QUANTIFIERS = 3
_QUANTIFIER = re.compile(r"(?<!\\)[*+{?]")
_REPEATED_GROUP = re.compile(r"(?<!\\)\)\s*[*+{]")


def read_config(path: Path) -> dict[str, Any]:
    """The JSON object. Raises BadInput."""
    config = canonical_json.loads(path.read_bytes(), what=str(path))
    if not isinstance(config, dict):
        raise BadInput(f"{path}: expected a JSON object.")
    return config


def check_known(config: Config, known: Collection[str], path: Path, refused: Mapping[str, str] | None = None) -> None:
    """Raises Unsupported for a field that is set and not in ``known`` or COMMON; ``refused`` has reasons for some."""
    for key, value in config.items():
        if key not in known and key not in COMMON and value:
            reason = (refused or {}).get(key, "it is not handled")
            raise Unsupported(f"{path}: {key} is {str(value)[:80]}: {reason}; nothing was stored.")


def check_pattern(pattern: object, where: str) -> None:
    if not isinstance(pattern, dict):
        raise BadInput(f"{where}: expected an object, found {pattern!r}.")
    for key, value in pattern.items():
        if len(key) > _PATTERN_LENGTH or len(_GROUP.findall(key)) > _GROUPS:
            raise Unsupported(
                f"{where}: {key[:60]!r} has over {_PATTERN_LENGTH} characters or {_GROUPS} groups, and "
                "such an expression can take for ever to match: write it with fewer."
            )
        try:
            re.compile(rf"(.*\.)?({key})$")  # as it is used: flags, for one, are no more at its beginning
        except (re.error, OverflowError, RecursionError) as error:
            raise BadInput(f"{where}: {key!r} is not a regular expression: {error}.") from error
        if len(_QUANTIFIER.findall(key)) > _QUANTIFIERS or _REPEATED_GROUP.search(key):
            raise Unsupported(
                f"{where}: {key[:60]!r} repeats a group, or more than {_QUANTIFIERS} times something else, and "
                "such an expression can take for ever to match: write it with fewer repetitions."
            )
        if type(value) not in (int, float):
            raise BadInput(f"{where}: expected a number for {key!r}, found {value!r}.")


def first_match(path: str, keys: Iterable[str]) -> str:
    """The first of PEFT's patterns that fits a module's path; the path itself if none does."""
    return next((key for key in keys if re.match(rf"(.*\.)?({key})$", path)), path)
