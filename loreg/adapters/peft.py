"""PEFT's LoRA directories: ``adapter_config.json`` beside ``adapter_model.safetensors`` or ``.bin``.

Scale (PEFT, ``tuners/lora/layer.py``): α/r, or α/√r with ``use_rslora``; α from the first key of
``alpha_pattern``, in the order of the file, that matches as ``(.*\\.)?(KEY)$``. The rank is that of the tensor,
whatever the config says. Fields of the config are on an allow-list: one that this file does not know and that
is set may change what the tensors mean, so it is refused by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from loreg.adapters.draft import Draft, DraftFile, DraftModule, DraftTerm, RawTensor
from loreg.checkpoint import FileStamp, open_binary
from loreg.errors import BadInput, NotFound, Unsupported
from loreg.format import canonical_json
from loreg.format.fields import Fields
from loreg.format.manifest import is_file_name
from loreg.format.safetensors import read_header

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLED_WEIGHTS = "adapter_model.bin"

_UNGROUPED = {"groups": 1}
_PREFIX = "base_model.model."
_KEY = re.compile(r"(?P<path>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_embedding_[AB])")

# How a key of a variant that is not handled yet looks, and what to call it.
_REFUSED_KEYS = {
    "lora_magnitude_vector": "DoRA",
    "trainable_tokens": "trainable tokens",
    "lora_E": "AdaLoRA",
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "vera_lambda": "VeRA",
    "ia3_l": "(IA)³",
    "oft_": "OFT",
    # PEFT saves the biases of a saved module three times then, the untrained ones among them.
    ".original_module.": "bias='all' beside modules_to_save",
    ".modules_to_save.": "bias='all' beside modules_to_save",
}

# Fields that say how it was trained, or where; they do not change what the saved tensors mean.
_HARMLESS = frozenset(
    {"peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "bias"}
    | {"lora_bias", "modules_to_save", "base_model_name_or_path", "revision", "inference_mode", "peft_version"}
    | {"task_type", "auto_mapping", "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform"}
    | {"layers_pattern", "init_lora_weights", "runtime_config", "megatron_core", "eva_config", "qalora_group_size"}
)
# Initialisations that leave the base as it is. PiSSA, OLoRA, CorDA, LoRA-GA and LoftQ train against another.
_PLAIN_INITS = (True, False, "gaussian", "orthogonal", "eva")

# A stranger's regular expressions are run on every module path: what can take exponential time is refused.
_PATTERN_LENGTH = 512
_QUANTIFIERS = 3
_QUANTIFIER = re.compile(r"(?<!\\)[*+{]")
_REPEATED_GROUP = re.compile(r"(?<!\\)\)\s*[*+{]")

# Small files that belong to an adapter; weights, optimizer states and the like do not.
_KEPT_SUFFIXES = frozenset({".json", ".md", ".txt", ".jinja", ".model", ".yaml", ".yml", ""})


def recognises(folder: Path) -> bool:
    return (folder / CONFIG).is_file()


def read(folder: Path) -> Draft:
    """Read a PEFT LoRA directory. Raises NotFound, BadInput, Unsupported; loads torch only for a ``.bin``."""
    config = _config(folder / CONFIG)
    if (folder / WEIGHTS).is_file():
        weights = _safetensors(folder / WEIGHTS)
    elif (folder / PICKLED_WEIGHTS).is_file():
        weights = _pickled(folder / PICKLED_WEIGHTS)
    else:
        raise NotFound(f"{folder} has {CONFIG} but neither {WEIGHTS} nor {PICKLED_WEIGHTS}: save the adapter again.")
    tensors = {tensor.key: tensor for tensor in weights.tensors}
    modules, full = _group(tensors, config)
    for tensor in tensors.values():
        tensor.check_finite()
    kept, left_out = _side_files(folder, weights.path.name)
    training = {key: config[key] for key in ("peft_version", "task_type") if config.get(key)}
    return Draft(
        format="peft",
        base_name=config.get("base_model_name_or_path") or None,
        modules=modules,
        full=full,
        saved_modules=frozenset(str(name) for name in config.get("modules_to_save") or ()),
        files=(weights if weights.header is not None else DraftFile(weights.path), *kept),
        left_out=left_out,
        license=_license(folder / "README.md"),
        training=training,
    )


def _config(path: Path) -> dict[str, Any]:
    config = canonical_json.loads(path.read_bytes(), what=str(path))
    if not isinstance(config, dict):
        raise BadInput(f"{path}: expected a JSON object.")
    kind = config.get("peft_type")
    if kind != "LORA":
        raise Unsupported(f"{path}: peft_type is {kind!r}, and only 'LORA' is handled yet.")
    fields = Fields(config, str(path))
    fields.natural("r", 1)
    fields.real("lora_alpha")
    for pattern in ("rank_pattern", "alpha_pattern"):
        _check_pattern(config.get(pattern) or {}, f"{path}: {pattern}")
    for key, value in config.items():
        if key not in _HARMLESS and value:
            raise Unsupported(f"{path}: {key} is {str(value)[:80]}, which is not handled yet; nothing was stored.")
    if (init := config.get("init_lora_weights", True)) not in _PLAIN_INITS:
        raise Unsupported(
            f"{path}: init_lora_weights is {init!r}, which changes the base that the adapter is for; this is not "
            "handled yet. Convert it to a plain LoRA with PEFT (path_initial_model_for_weight_conversion)."
        )
    return config


def _check_pattern(pattern: object, where: str) -> None:
    if not isinstance(pattern, dict):
        raise BadInput(f"{where}: expected an object, found {pattern!r}.")
    for key, value in pattern.items():
        try:
            re.compile(key)
        except re.error as error:
            raise BadInput(f"{where}: {key!r} is not a regular expression: {error}.") from error
        if len(key) > _PATTERN_LENGTH or len(_QUANTIFIER.findall(key)) > _QUANTIFIERS or _REPEATED_GROUP.search(key):
            raise Unsupported(
                f"{where}: {key[:60]!r} repeats a group, or more than {_QUANTIFIERS} times something else, and "
                "such an expression can take for ever to match: write it with fewer repetitions."
            )
        if type(value) not in (int, float):
            raise BadInput(f"{where}: expected a number for {key!r}, found {value!r}.")


def _safetensors(path: Path) -> DraftFile:
    size = FileStamp.of(path).size
    with open_binary(path) as file:
        header = read_header(file, size, what=str(path))
    start = header.data_start
    tensors = (RawTensor(t.name, t.dtype, t.shape, path, start + t.start) for t in header.tensors)
    return DraftFile(path, tuple(tensors), header=start)


def _pickled(path: Path) -> DraftFile:
    from loreg.adapters.pickled import load_tensors

    return DraftFile(path, load_tensors(path))


def _group(
    tensors: Mapping[str, RawTensor], config: Mapping[str, Any]
) -> tuple[dict[str, DraftModule], dict[str, RawTensor]]:
    parts: dict[str, dict[str, RawTensor]] = {}
    full: dict[str, RawTensor] = {}
    for key, tensor in tensors.items():
        if not key.startswith(_PREFIX):
            raise Unsupported(f"Tensor {key!r} does not begin with {_PREFIX!r}, as PEFT writes it.")
        name = key.removeprefix(_PREFIX)
        if match := _KEY.fullmatch(name):
            parts.setdefault(match["path"], {})[match["part"]] = tensor
        elif refused := next((what for part, what in _REFUSED_KEYS.items() if part in name), None):
            raise Unsupported(f"Tensor {key!r} belongs to {refused}, which is not handled yet; nothing was stored.")
        elif "lora_" in name:
            raise Unsupported(f"Tensor {key!r} is none of the parts of a LoRA that are handled yet.")
        else:
            plain = name.replace(".base_layer.", ".")
            if plain in full:
                raise BadInput(f"Tensors {full[plain].key!r} and {key!r} both mean {plain!r}: expected one.")
            full[plain] = tensor
    return {path: _module(path, found, config) for path, found in parts.items()}, full


def _module(path: str, parts: Mapping[str, RawTensor], config: Mapping[str, Any]) -> DraftModule:
    def refuse(reason: str) -> NoReturn:
        raise BadInput(f"Module {path!r} of the adapter is not acceptable: {reason}.")

    embedding = "lora_embedding_A" in parts or "lora_embedding_B" in parts
    names = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")
    if set(parts) - {*names, "lora_B.bias"} or not set(names) <= set(parts):
        refuse(f"expected {' and '.join(names)}, found {', '.join(sorted(parts))}")
    A, B = parts[names[0]], parts[names[1]]
    if len(A.shape) in (3, 4, 5) and len(A.shape) == len(B.shape):
        raise Unsupported(f"Module {path!r} is a convolution (A has shape {list(A.shape)}): not handled yet.")
    if len(A.shape) != 2 or len(B.shape) != 2 or A.shape[0] != B.shape[1] or not A.shape[0]:
        refuse(f"expected A (rank, in) and B (out, rank), found {list(A.shape)} and {list(B.shape)}")
    bias = parts.get("lora_B.bias")
    if bias is not None and bias.shape != (B.shape[0],):
        refuse(f"expected a bias of shape [{B.shape[0]}], found {list(bias.shape)}")
    rank = A.shape[0]
    alpha = _alpha(path, config)
    scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    return DraftModule(
        terms=(DraftTerm("lora", {"A": A, "B": B}, scale, alpha, _UNGROUPED),),
        bias_terms=(DraftTerm("dense", {"value": bias}, scale),) if bias is not None else (),
        embedding=embedding,
        in_out_hint=bool(config.get("fan_in_fan_out")),
    )


def _alpha(path: str, config: Mapping[str, Any]) -> float:
    alphas: Mapping[str, float] = config.get("alpha_pattern") or {}
    alpha = float(alphas.get(_first_match(path, alphas), config["lora_alpha"]))
    # Older PEFT (0.13, for one) looked for one key in both patterns, those of the ranks first, and took α from that.
    older = _first_match(path, [*(config.get("rank_pattern") or {}), *alphas])
    if not config.get("peft_version") and float(alphas.get(older, config["lora_alpha"])) != alpha:
        raise Unsupported(
            f"Module {path!r}: rank_pattern and alpha_pattern overlap, by which α is {alpha:g} in today's PEFT and "
            f"another in older ones, and the adapter does not say which wrote it; give whole paths in {CONFIG}."
        )
    return alpha


def _first_match(path: str, keys: Iterable[str]) -> str:
    """The first of PEFT's patterns that fits a module's path; the path itself if none does."""
    return next((key for key in keys if re.match(rf"(.*\.)?({key})$", path)), path)


def _side_files(folder: Path, weights: str) -> tuple[list[DraftFile], tuple[str, ...]]:
    kept, left_out = [], []
    for path in sorted(folder.iterdir()):
        if path.name == weights or path.name.startswith("."):
            continue
        if path.is_file() and path.suffix.lower() in _KEPT_SUFFIXES and is_file_name(path.name):
            kept.append(DraftFile(path))
        else:
            left_out.append(path.name + ("/" if path.is_dir() else ""))
    return kept, tuple(left_out)


def _license(card: Path) -> str | None:
    """The licence that the front matter of a model card names."""
    if not card.is_file():
        return None
    matter = re.match(r"---\s*\n(.*?)\n---", card.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    found = re.search(r"^license:\s*['\"]?([A-Za-z0-9.+-]{1,64})", matter[1], re.MULTILINE) if matter else None
    return found[1] if found else None
