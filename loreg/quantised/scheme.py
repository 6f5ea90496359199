"""By what scheme a checkpoint is quantised: told from config.json and the stored tensors, which must agree."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import gcd
from typing import Any

from loreg import layers
from loreg.checkpoint import Checkpoint
from loreg.errors import BadInput, Unsupported
from loreg.format.safetensors import TensorInfo

CONFIG_KEYS = ("quantization_config", "compression_config")
BESIDE = {"quantize_config.json": "gptq", "quant_config.json": "awq", "hf_quant_config.json": "modelopt"}
"""Files that say how a model is quantised where config.json does not, and whose tool writes them."""

_FLOAT8 = ("F8_E4M3", "F8_E5M2")
_SCALES = ("F32", "F16", "BF16")
_BLOCK_SCALES = (*_SCALES, "F8_E8M0")

# quant_method in config.json → how its tensors are packed. What is not here is refused by its name.
_METHODS = {
    "bitsandbytes": ("bnb4", "bnb8"),
    "gptq": ("gptq",),
    "awq": ("awq",),
    "fp8": ("fp8",),
    "fbgemm_fp8": ("fp8",),
    "modelopt": ("fp8",),
    "compressed-tensors": ("fp8",),
}
# Last parts of the names of what only a quantised model has: one that no weight claims is refused, not copied.
_TELLTALE = frozenset(
    """qweight qzeros SCB quant_map nested_absmax weight_packed weight_scale weight_scale_inv weight_scale_2
    weight_zero_point weight_global_scale pre_quant_scale scale_weight scaled_fp8 W_q""".split()  # noqa: SIM905
)
# Not telling alone, as an ordinary model may have such names too.
_BESIDE_TELLTALE = frozenset({"scales", "g_idx", "perm", "absmax", "weight_format", "weight_scales", "weight_shape"})
_STATE = re.compile(r"(.+)\.quant_state\.bitsandbytes__(nf4|fp4)")


@dataclass(frozen=True, slots=True)
class Packed:
    """One weight as it is stored: the tensor ``name`` that it stands for, and the stored tensors by role.

    ``kind``: ``bnb4``, ``bnb8``, ``gptq``, ``awq`` or ``fp8``. ``transposed``: the model keeps this weight (in, out),
    where every scheme packs (out, in).
    """

    name: str
    kind: str
    parts: Mapping[str, str]
    transposed: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Scheme:
    """How a checkpoint is quantised. ``refusal``: why it cannot be dequantised here, empty if it can."""

    name: str
    packed: tuple[Packed, ...] = ()
    refusal: str = ""

    def require(self) -> None:
        """Raises Unsupported, with the scheme's name and the reason, if there is a reason."""
        if self.refusal:
            raise Unsupported(
                f"The base is quantised ({self.name}) and cannot be dequantised: {self.refusal}; use the model that "
                "it was quantised from."
            )


class _Refusal(Exception):
    """Why a checkpoint that is quantised cannot be read: ends in ``Scheme.refusal``."""


def of(checkpoint: Checkpoint) -> Scheme | None:
    """``quantisation`` of a checkpoint, with what a quantiser's own file beside config.json says, if that is silent.

    Raises BadInput for a file that is not JSON.
    """
    config, tensors = checkpoint.config(), {name: stored.info for name, stored in checkpoint.tensors.items()}
    scheme = quantisation(config, tensors)
    if scheme is None or announced(config):
        return scheme
    for name, method in BESIDE.items():
        path = checkpoint.root / name
        if path.is_file() and not checkpoint.lone:
            try:
                found = json.loads(path.read_bytes())
            except ValueError as error:
                raise BadInput(f"{path} cannot be read as JSON: {error}.") from error
            said = found.get("quantization", found) if isinstance(found, dict) else {}
            return quantisation({**config, CONFIG_KEYS[0]: {"quant_method": method, **said}}, tensors)
    return scheme


def announced(config: Mapping[str, Any]) -> dict[str, Any]:
    """What ``config.json`` says of quantisation, in itself or in a part of a model of several; {} if nothing."""
    for section in _sections(config):
        for key in CONFIG_KEYS:
            if isinstance(found := section.get(key), dict) and found:
                return found
    return {}


def _sections(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    yield config
    for key, value in config.items():
        if key.endswith("_config") and key not in CONFIG_KEYS and isinstance(value, dict):
            yield from _sections(value)


def quantisation(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> Scheme | None:
    """The scheme of a checkpoint with this ``config.json`` and these tensors; None if its numbers are plain.

    Reads no data. A scheme that is not one of those below is named, with a ``refusal``; so is one whose config and
    tensors disagree, or that leaves a tensor unexplained.

    bitsandbytes 4 bits (nf4, fp4, nested or not) and int8 · GPTQ, 2, 3, 4 and 8 bits, both zero-point conventions ·
    AWQ, the gemm layout · float8 with ``…_scale_inv`` or ``…_scale`` factors per tensor, row or block.
    """
    said = announced(config)
    method = _method(said)
    try:
        if method and method not in _METHODS:
            raise _Refusal(f"loreg knows {', '.join(sorted(_METHODS))}")
        packed = tuple(sorted(_found(said, tensors, config), key=lambda one: one.name))
        _no_strays(tensors, packed)
        if not said and not packed:
            return None
        _agree(method, said, packed)
        return Scheme(_name(packed, method), packed)
    except _Refusal as refusal:
        return Scheme(_described(method, said) or "by an unknown scheme", refusal=str(refusal))


def _method(said: Mapping[str, Any]) -> str:
    """``quant_method``, or empty where none is given: then the tensors alone say it."""
    method = str(said.get("quant_method") or "").lower()
    if not method and (said.get("load_in_4bit") or said.get("load_in_8bit")):
        return "bitsandbytes"  # as it was written before there was a second method
    return method


def _described(method: str, said: Mapping[str, Any]) -> str:
    details = [said.get("format"), said.get("checkpoint_format"), said.get("version"), said.get("quant_algo")]
    return " ".join([method, *(str(detail) for detail in details if detail and str(detail) != method)]).strip()


def _agree(method: str, said: Mapping[str, Any], packed: tuple[Packed, ...]) -> None:
    kinds = {one.kind for one in packed}
    if not packed:
        raise _Refusal("config.json announces it, and no tensor is stored so: if it is left over, remove it there")
    if not any(kinds <= set(known) for known in _METHODS.values()):
        raise _Refusal(f"its tensors are packed in several ways ({', '.join(sorted(kinds))})")
    if method and not kinds <= set(_METHODS[method]):
        raise _Refusal(f"its tensors are packed as {min(kinds)}, which is not what config.json says")
    if said.get("transform_config"):
        raise _Refusal("its weights are rotated (transform_config), and mean nothing without the rotation")
    sparsity = said.get("sparsity_config")
    if isinstance(sparsity, dict) and sparsity.get("format", "dense") != "dense":
        raise _Refusal(f"its weights are sparse ({sparsity['format']})")


def _name(packed: tuple[Packed, ...], method: str) -> str:
    """Short, and stable: it is recorded."""
    names = set()
    for one in packed:
        if one.kind == "bnb4":
            nested = "-nested" if "nested_absmax" in one.parts else ""
            names.add(f"bitsandbytes-{one.options['type']}{nested}")
        elif one.kind == "gptq":
            names.add("gptq-v2" if one.options["offset"] == 0 else "gptq")
        else:
            float8 = method if "fp8" in method else f"{method or 'plain'}-fp8"
            names.add({"bnb8": "bitsandbytes-int8", "awq": "awq-gemm", "fp8": float8}[one.kind])
    return "+".join(sorted(names))


def _no_strays(tensors: Mapping[str, TensorInfo], packed: tuple[Packed, ...]) -> None:
    used = {part for one in packed for part in one.parts.values()}
    for one in packed:
        if one.name in tensors and one.name not in used:
            raise _Refusal(f"{one.name!r} is stored both plain and packed")
    for name, info in tensors.items():
        if name in used:
            continue
        last = name.rpartition(".")[2]
        mxfp4 = info.dtype == "U8" and name.endswith(("_blocks", "_scales"))
        if last in _TELLTALE or mxfp4 or name.endswith("_scale_inv") or (packed and last in _BESIDE_TELLTALE):
            raise _Refusal(f"no scheme that loreg knows explains {name!r} ({info.dtype} {list(info.shape)})")
        if packed and info.dtype in _FLOAT8:
            raise _Refusal(f"{name!r} is stored as {info.dtype}, with no scale")


def _found(said: Mapping[str, Any], tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> Iterator[Packed]:
    """Every weight that is packed in a way that its own tensors show."""
    for name, info in tensors.items():
        if state := _STATE.fullmatch(name):
            yield _bnb4(name, state[1], state[2], tensors, config)
        elif name.endswith(".SCB"):
            yield _bnb8(name.removesuffix(".SCB"), tensors, config)
        elif name.endswith(".qweight"):
            yield _integers(name.removesuffix(".qweight"), said, tensors, config)
        elif info.dtype in _FLOAT8:
            scales = [f"{name}{suffix}" for suffix in ("_scale_inv", "_scale") if f"{name}{suffix}" in tensors]
            if scales:
                yield _fp8(name, scales, said, tensors)


def _transposed(name: str, config: Mapping[str, Any]) -> bool:
    """Whether the model keeps this weight (in, out): transformers' ``Conv1D``, which quantisers transpose.

    Others have ordinary layers of the same names: only the model's type tells.
    """
    leaf = name.removesuffix(".weight").rpartition(".")[2]
    if not layers.may_store_in_out(leaf, config):
        return False
    if not config.get("model_type"):
        raise _Refusal(f"the orientation of {name!r} follows from model_type in config.json, which is not there")
    return layers.stores_in_out(config, leaf)


def _part(tensors: Mapping[str, TensorInfo], name: str, *dtypes: str) -> str:
    if name not in tensors:
        raise _Refusal(f"{name!r} is missing")
    if dtypes and tensors[name].dtype not in dtypes:
        raise _Refusal(f"{name!r} is {tensors[name].dtype}, expected {' or '.join(dtypes)}")
    return name


def _bnb4(state: str, weight: str, kind: str, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> Packed:
    parts = {"weight": _part(tensors, weight), "state": _part(tensors, state, "U8")}
    parts["quant_map"] = _part(tensors, f"{weight}.quant_map", "F32")
    nested = f"{weight}.nested_absmax" in tensors
    parts["absmax"] = _part(tensors, f"{weight}.absmax", *(("U8",) if nested else _SCALES))
    if nested:
        for role in ("nested_absmax", "nested_quant_map"):
            parts[role] = _part(tensors, f"{weight}.{role}", "F32")
    return Packed(weight, "bnb4", parts, _transposed(weight, config), {"type": kind})


def _bnb8(module: str, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> Packed:
    weight = f"{module}.weight"
    parts = {"weight": _part(tensors, weight, "I8"), "SCB": _part(tensors, f"{module}.SCB", *_SCALES)}
    if f"{module}.weight_format" in tensors:
        parts["format"] = _part(tensors, f"{module}.weight_format", "U8")
    rows, found = tensors[weight].shape[:1], tensors[f"{module}.SCB"].shape
    if len(tensors[weight].shape) != 2 or found != rows:
        raise _Refusal(f"'{module}.SCB' has shape {list(found)}, expected one number for each row of the weight")
    return Packed(weight, "bnb8", parts, _transposed(weight, config))


def _integers(
    module: str, said: Mapping[str, Any], tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]
) -> Packed:
    """GPTQ packs the inputs of a weight into words, AWQ's gemm layout the outputs: the shapes say which it is."""
    parts = {role: _part(tensors, f"{module}.{role}", "I32") for role in ("qweight", "qzeros")}
    parts["scales"] = _part(tensors, f"{module}.scales", *_SCALES)
    shapes = {role: tensors[name].shape for role, name in parts.items()}
    if any(len(shape) != 2 or 0 in shape for shape in shapes.values()):
        raise _Refusal(f"{module!r} is packed in shapes {list(shapes.values())}, expected three matrices")
    (rows, columns), (groups, zeros), (scaled, outputs) = shapes["qweight"], shapes["qzeros"], shapes["scales"]
    weight = f"{module}.weight"
    bits, rest = divmod(32 * zeros, outputs)
    fits = scaled == groups and not rest
    if fits and columns == outputs and bits in (2, 3, 4, 8):
        form = str(said.get("checkpoint_format") or said.get("format") or ("gptq" if said else "")).lower()
        if form not in ("gptq", "gptq_v2") or said.get("is_marlin_format"):
            raise _Refusal(f"its checkpoint_format is {form or 'not known'}, expected gptq or gptq_v2")
        inputs, rest = divmod(32 * rows, bits)
        if f"{module}.g_idx" in tensors:
            parts["g_idx"] = _part(tensors, f"{module}.g_idx", "I32")
            if tensors[parts["g_idx"]].shape != (inputs,):
                raise _Refusal(f"'{module}.g_idx' does not have one number for each of {inputs} inputs")
        if rest or rows % run_of(bits) or zeros % run_of(bits):
            raise _Refusal(f"'{module}.qweight' does not hold whole runs of {bits} bits")
        options = {"bits": bits, "offset": int(form == "gptq"), "group": _group(module, said, inputs, groups)}
        return Packed(weight, "gptq", parts, _transposed(weight, config), options)
    if fits and bits == 4 and 8 * columns == outputs and rows % groups == 0:
        version = str(said.get("version") or said.get("format") or "gemm").lower()
        if version != "gemm":
            raise _Refusal(f"its layout is {version}, expected gemm")
        return Packed(weight, "awq", parts, _transposed(weight, config))
    raise _Refusal(f"the shapes of {module!r} are {list(shapes.values())}, of neither GPTQ nor AWQ's gemm layout")


def run_of(bits: int) -> int:
    """How many 32-bit words hold a whole number of codes of ``bits`` bits."""
    return bits // gcd(32, bits)


def _group(module: str, said: Mapping[str, Any], inputs: int, groups: int) -> int:
    """How many inputs share a scale: config.json's number if it fits (a module may have one of its own)."""
    size = said.get("group_size")
    if type(size) is int and size > 0 and -(-inputs // size) == groups:
        return size
    if inputs % groups:
        raise _Refusal(f"{module!r} has {groups} groups of {inputs} inputs, which does not say how large they are")
    return inputs // groups


def _fp8(name: str, scales: list[str], said: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> Packed:
    if len(scales) > 1:
        raise _Refusal(f"{name!r} has two scales, {' and '.join(scales)}")
    parts = {"weight": name, "scale": _part(tensors, scales[0], *_BLOCK_SCALES)}
    module = name.removesuffix("weight")
    for role in ("activation_scale", "input_scale"):  # of what goes in, not of the weight: left out
        for stem in (f"{name}_", module) if module != name else (f"{name}_",):
            if stem + role in tensors:
                parts[stem + role] = stem + role
    shape, scale = tensors[name].shape, tensors[scales[0]].shape
    block = _block(said)
    if len(shape) < 2 or 0 in shape:
        raise _Refusal(f"{name!r} has shape {list(shape)}, expected a matrix")
    *lead, rows, columns = shape
    per_row = ((*lead, rows, 1), (*lead, rows))
    if all(size == 1 for size in scale) or scale == (*lead, 1, 1):
        block = (rows, columns)
    elif scale in per_row:
        block = (1, columns)
    elif block is None or scale != (*lead, -(-rows // block[0]), -(-columns // block[1])):
        raise _Refusal(
            f"{scales[0]!r} has shape {list(scale)}, expected one number for {name!r}, for each of its {rows} rows, "
            f"or for each block of {list(block) if block else 'a size that config.json gives'}"
        )
    return Packed(name, "fp8", parts, options={"block": block})


def _block(said: Mapping[str, Any]) -> tuple[int, int] | None:
    """The block of weights that share a scale: of DeepSeek's and Qwen's config, or of compressed-tensors' groups."""
    groups = said.get("config_groups")
    weights = [group.get("weights") for group in groups.values()] if isinstance(groups, dict) else []
    sizes = [said.get("weight_block_size")]
    sizes += [one.get("block_structure") for one in weights if isinstance(one, dict)]
    blocks = {tuple(size) for size in sizes if isinstance(size, list) and len(size) == 2}
    if len(blocks) > 1:
        raise _Refusal(f"config.json gives blocks of several sizes: {sorted(blocks)}")
    for rows, columns in blocks:
        if all(type(size) is int and size > 0 for size in (rows, columns)):
            return rows, columns
    return None
