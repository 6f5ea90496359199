"""Tiny checkpoints and PEFT adapters, and the slow truth about their merge: NumPy, JSON and fractions alone.

Shares no code with loreg: files are laid out by hand, and a merged element is a ``Fraction`` rounded by the
definition of round-to-nearest-even.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from math import sqrt
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": False}
Q, V = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"
NORM = "model.norm.weight"

# p: bits of the significand with the hidden one; emin, emax: exponents of the smallest normal and largest finite.
FORMATS = {"BF16": (8, -126, 127), "F16": (11, -14, 15), "F32": (24, -126, 127)}
_NUMPY = {"F16": "<f2", "F32": "<f4", "F64": "<f8", "I64": "<i8", "U8": "u1", "BOOL": "?"}


class Tensor(NamedTuple):
    """A stored tensor: its safetensors dtype, shape and raw little-endian bytes."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes

    @property
    def values(self) -> Array:
        """The elements; float64 for bfloat16."""
        if self.dtype == "BF16":
            words = np.frombuffer(self.data, "<u2").astype("<u4") << 16
            return words.view("<f4").astype(np.float64).reshape(self.shape)
        return np.frombuffer(self.data, _NUMPY[self.dtype]).reshape(self.shape)

    def flipped(self, index: int, bit: int = 0) -> Tensor:
        """The same with one bit of byte ``index`` flipped."""
        data = bytearray(self.data)
        data[index] ^= 1 << bit
        return self._replace(data=bytes(data))


Tensors = Mapping[str, Tensor]


def tensor(dtype: str, values: Any) -> Tensor:
    """A tensor of ``values``, each rounded to ``dtype``."""
    array = np.asarray(values)
    if dtype != "BF16":
        return Tensor(dtype, array.shape, array.astype(_NUMPY[dtype]).tobytes())
    words = b"".join(encode(rounded(Fraction(float(x)), "BF16"), "BF16") for x in array.reshape(-1))
    return Tensor(dtype, array.shape, words)


def rounded(x: Fraction, dtype: str) -> Fraction:
    """The value of ``dtype`` nearest to ``x``, ties to even; OverflowError beyond the largest finite one."""
    p, emin, emax = FORMATS[dtype]
    if x == 0:
        return x
    size = abs(x)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    if Fraction(2) ** exponent > size:
        exponent -= 1
    unit = Fraction(2) ** (max(exponent, emin) - p + 1)
    nearest = round(size / unit) * unit
    if nearest >= Fraction(2) ** (emax + 1):
        raise OverflowError(dtype)
    return nearest if x > 0 else -nearest


def encode(x: Fraction, dtype: str, negative_zero: bool = False) -> bytes:
    """The little-endian bytes of a value that ``dtype`` holds."""
    value = -0.0 if negative_zero and x == 0 else float(x)
    if dtype == "F16":
        return struct.pack("<e", value)
    word = struct.pack("<f", value)
    return word if dtype == "F32" else word[2:]


def merged(W: Tensor, terms: Iterable[tuple[float, Array, Array]], dtype: str | None = None) -> Tensor:
    """round(W + Σ c·(B A)) for (c, A, B) in float64 arrays, element by element in exact arithmetic."""
    target, terms = dtype or W.dtype, list(terms)
    out = []
    for (i, j), w in np.ndenumerate(W.values if len(W.shape) == 2 else W.values.reshape(-1, 1)):
        exact = Fraction(float(w))
        for c, A, B in terms:
            for b, a in zip(B[i], A[:, j], strict=True):
                exact += Fraction(c) * Fraction(float(b)) * Fraction(float(a))
        negative = exact < 0 or (exact == 0 and w == 0 and bool(np.signbit(w)))
        out.append(encode(rounded(exact, target), target, negative))
    return Tensor(target, W.shape, b"".join(out))


def container(
    tensors: Iterable[tuple[str, Tensor]], metadata: Mapping[str, str] | None = None, pad: int = 0
) -> bytes:
    """A safetensors file with the tensors in this order, and ``pad`` spaces behind its header."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position, body = 0, b""
    for name, value in tensors:
        header[name] = {"dtype": value.dtype, "shape": list(value.shape)}
        header[name]["data_offsets"] = [position, position + len(value.data)]
        position, body = position + len(value.data), body + value.data
    text = json.dumps(header, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8 + pad)
    return struct.pack("<Q", len(text)) + text + body


def contents(path: Path) -> dict[str, Tensor]:
    """The tensors of one safetensors file."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header, body = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    header.pop("__metadata__", None)
    return {
        name: Tensor(entry["dtype"], tuple(entry["shape"]), body[slice(*entry["data_offsets"])])
        for name, entry in header.items()
    }


def tensors_in(folder: Path) -> dict[str, Tensor]:
    """The tensors of all safetensors files of a directory."""
    return {name: t for path in sorted(folder.glob("*.safetensors")) for name, t in contents(path).items()}


def files_in(folder: Path) -> dict[str, bytes]:
    """Every file below ``folder``, by relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def write_model(
    folder: Path,
    tensors: Tensors,
    *,
    shards: Sequence[Sequence[str]] | None = None,
    config: Mapping[str, Any] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """A model directory; ``shards``: the names in each file, in order, with an index. Default: one file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG if config is None else config))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "None"}')
    if shards is None:
        (folder / "model.safetensors").write_bytes(container(tensors.items(), metadata))
        return folder
    weight_map = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        (folder / file).write_bytes(container([(name, tensors[name]) for name in names], metadata))
        weight_map.update(dict.fromkeys(names, file))
    total = sum(len(value.data) for value in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


class Factors(NamedTuple):
    """What is trained of one module: A (r, in), B (out, r), and a bias (out,) of ``lora_bias``."""

    A: Tensor
    B: Tensor
    bias: Tensor | None = None


def write_adapter(
    folder: Path,
    modules: Mapping[str, Factors],
    *,
    alpha: float = 16,
    full: Tensors | None = None,
    metadata: Mapping[str, str] | None = None,
    **config: Any,
) -> Path:
    """A PEFT LoRA directory. ``full``: tensors of modules_to_save, by their names in the model."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    for path, factors in modules.items():
        tensors[f"base_model.model.{path}.lora_A.weight"] = factors.A
        tensors[f"base_model.model.{path}.lora_B.weight"] = factors.B
        if factors.bias is not None:
            tensors[f"base_model.model.{path}.lora_B.bias"] = factors.bias
    tensors.update({f"base_model.model.{name}": value for name, value in (full or {}).items()})
    (folder / "adapter_model.safetensors").write_bytes(container(tensors.items(), metadata or {"format": "pt"}))
    ranks = [factors.A.shape[0] for factors in modules.values()] or [1]
    document = {"peft_type": "LORA", "r": ranks[0], "lora_alpha": alpha, "target_modules": sorted(modules)}
    document["modules_to_save"] = sorted({name.split(".")[-2] for name in full or {}}) or None
    (folder / "adapter_config.json").write_text(json.dumps(document | config))
    return folder


def scale(factors: Factors, alpha: float = 16, use_rslora: bool = False) -> float:
    """PEFT's scale: α/r, or α/√r."""
    rank = factors.A.shape[0]
    return alpha / sqrt(rank) if use_rslora else alpha / rank


def normal(rng: np.random.Generator, dtype: str, *shape: int, std: float = 1.0) -> Tensor:
    return tensor(dtype, rng.normal(0, std, shape))


def model(seed: int = 0, dtype: str = "BF16", rows: int = 8, cols: int = 6) -> dict[str, Tensor]:
    """A small checkpoint: a (rows, cols) matrix with a bias, a square one, vectors, and a buffer of integers."""
    rng = np.random.default_rng(seed)
    return {
        "model.embed_tokens.weight": normal(rng, dtype, 10, cols),
        f"{Q}.weight": normal(rng, dtype, rows, cols),
        f"{Q}.bias": normal(rng, dtype, rows),
        f"{V}.weight": normal(rng, dtype, cols, cols),
        NORM: normal(rng, dtype, cols),
        "model.positions": tensor("I64", np.arange(5)[None]),
        "lm_head.weight": normal(rng, dtype, 10, cols),
    }


def factors(
    rng: np.random.Generator, rows: int, cols: int, rank: int, dtype: str = "F32", std: float = 0.1
) -> Factors:
    return Factors(normal(rng, dtype, rank, cols, std=std), normal(rng, dtype, rows, rank, std=std))


def adapter(seed: int = 1, rank: int = 2, dtype: str = "F32", rows: int = 8, cols: int = 6) -> dict[str, Factors]:
    """Factors for the two matrices of ``model``."""
    rng = np.random.default_rng(seed)
    return {Q: factors(rng, rows, cols, rank, dtype), V: factors(rng, cols, cols, rank, dtype)}
