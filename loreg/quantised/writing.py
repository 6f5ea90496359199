"""A quantised checkpoint as the plain 16-bit model that it stands for: a directory, and a base, of its own."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from loreg.checkpoint import Advance, Checkpoint, Shard, describe, open_binary, read_exactly
from loreg.digest import Digest, Hasher
from loreg.errors import BadInput, UsageError
from loreg.format.base import BaseManifest
from loreg.format.derived import DERIVED, Derived
from loreg.format.fingerprint import BaseTensor, identify
from loreg.format.safetensors import Header, canonical_header
from loreg.quantised.scheme import BESIDE, CONFIG_KEYS, Packed, of
from loreg.quantised.values import numbers, shape_of
from loreg.staging import refuse_inside, staged, sync_tree
from loreg.tensors import from_buffer, to_memory, torch_dtype

DTYPES = {"BF16": "bfloat16", "F16": "float16"}
"""What a model can be dequantised to, with the name that config.json has for it."""

_DROPPED = ("activation_scale", "input_scale")  # what goes into a layer is scaled by these, not its weight
_DTYPE_KEYS = {"torch_dtype", "dtype"}
_Job = tuple[str, str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Dequantised:
    """A plain checkpoint that was made of a quantised one.

    ``scheme`` and ``source`` (the weights_root of what it was made of) say where it came from; ``manifest`` is its
    own, so that nobody has to read it again. ``dropped``: stored tensors that are of use to quantised inference only.
    """

    out: Path
    scheme: str
    source: Digest
    dtype: str
    manifest: BaseManifest
    dropped: tuple[str, ...]

    @property
    def weights_root(self) -> Digest:
        return self.manifest.identity.weights_root


def dequantise(
    checkpoint: Checkpoint, out: Path, dtype: str, advance: Advance, *, source: BaseManifest | None = None
) -> Dequantised:
    """Write the plain model of ``checkpoint`` to ``out``, which must not exist or be empty.

    Every packed weight becomes a tensor of ``dtype`` ("BF16" or "F16"), under the name and in the orientation that
    it has in the model, each number the one nearest to what the scheme defines (``quantised.values``). All other
    tensors keep their bytes, and so their dtype. config.json loses what it says of quantisation and states ``dtype``;
    an index is written anew. The bytes are a function of ``checkpoint`` and ``dtype``.

    ``source`` is the manifest of ``checkpoint`` where the caller has it; without, its files are read once more.
    ``advance`` is told the bytes written. One tensor at a time is in memory: its codes, and its 16-bit numbers.

    Raises Unsupported, naming the scheme, for one that cannot be dequantised; BadInput for a checkpoint that is not
    quantised or is damaged; UsageError for another dtype; Conflict if ``out`` is taken; CheckFailed if the disk is
    full.
    """
    if dtype not in DTYPES:
        raise UsageError(f"A model is dequantised to {' or '.join(DTYPES)}, not to {dtype!r}.")
    scheme = of(checkpoint)
    if scheme is None:
        raise BadInput(f"{checkpoint.root} is not quantised: use it as it is.")
    scheme.require()
    if not checkpoint.lone:
        refuse_inside(out, checkpoint.root)
    root = (source or checkpoint.manifest(advance=lambda done: None)).identity.weights_root
    packed = {one.name: one for one in scheme.packed}
    used = {part for one in scheme.packed for part in one.parts.values()}
    with staged(out, Digest.of(f"dequantise {root} {dtype}".encode())) as folder:
        model = _Model(checkpoint, packed, used, dtype)
        tensors: list[BaseTensor] = []
        shards: dict[str, Header] = {}
        for shard in checkpoint.shards:
            header = canonical_header(model.outputs(shard), {"format": "pt"})
            if header.tensors:
                tensors += model.write(folder / shard.name, header, advance)
                shards[shard.name] = header
        tensors.sort(key=lambda tensor: tensor.name.encode("utf-8"))
        record = Derived(root, scheme.name, dtype, identify(tensors).weights_root)
        (folder / DERIVED).write_bytes(record.dump())
        _write_side_files(checkpoint, folder, dtype, shards)
        checkpoint.check_unchanged()
    codes = {part for one in scheme.packed for role, part in one.parts.items() if not role.endswith(_DROPPED)}
    return Dequantised(out, scheme.name, root, dtype, BaseManifest(tuple(tensors)), tuple(sorted(used - codes)))


class _Model:
    """What is written: each packed weight in the shard of its codes, each other tensor where it was."""

    def __init__(self, checkpoint: Checkpoint, packed: dict[str, Packed], used: set[str], dtype: str) -> None:
        self._checkpoint, self._packed, self._used, self._dtype = checkpoint, packed, used, dtype
        codes = ("qweight", "weight")
        self._home = {next(one.parts[role] for role in codes if role in one.parts): one for one in packed.values()}

    def outputs(self, shard: Shard) -> list[_Job]:
        """Names, dtypes and shapes of what takes the place of a shard's tensors."""
        jobs: list[_Job] = []
        for info in shard.header.tensors:
            if one := self._home.get(info.name):
                shape = self._shape(one)
                jobs.append((one.name, self._dtype, shape[::-1] if one.transposed else shape))
            elif info.name not in self._used:
                jobs.append((info.name, info.dtype, info.shape))
        return jobs

    def write(self, path: Path, header: Header, advance: Advance) -> list[BaseTensor]:
        """One shard, flushed by whoever makes the directory. Returns its tensors with their digests."""
        written = []
        with path.open("xb") as file:
            os.posix_fallocate(file.fileno(), 0, header.file_size)  # says now if the disk is too small
            file.write(header.raw)
            for info in header.tensors:
                hasher = Hasher(threads=Hasher.ALL)
                for piece in self._pieces(info.name):
                    hasher.update(piece)
                    file.write(piece)
                    advance(len(piece))
                written.append(describe(info, hasher.digest()))
        return written

    def _pieces(self, name: str) -> Iterable[memoryview]:
        if name not in self._packed:
            return self._checkpoint.tensors[name].chunks()
        one = self._packed[name]
        values = numbers(one, self._read).rounded(name, torch_dtype(self._dtype, name))
        return (to_memory(values.T.contiguous() if one.transposed else values),)

    def _shape(self, one: Packed) -> tuple[int, ...]:
        stored = {role: self._checkpoint.tensors[name].info.shape for role, name in one.parts.items()}
        return shape_of(one, stored, self._read)

    def _read(self, name: str) -> torch.Tensor:
        """The whole of a stored tensor on the CPU; float8_e8m0fnu, with which torch cannot compute, as uint8."""
        stored = self._checkpoint.tensors[name]
        info, raw = stored.info, bytearray(stored.info.nbytes)
        with open_binary(stored.shard.path) as file:
            read_exactly(file.fileno(), memoryview(raw), stored.offset, stored.shard.path)
        return from_buffer(raw, torch_dtype("U8" if info.dtype == "F8_E8M0" else info.dtype, name), info.shape)


def _write_side_files(checkpoint: Checkpoint, folder: Path, dtype: str, shards: dict[str, Header]) -> None:
    for relative in checkpoint.side_files():
        if str(relative) in BESIDE:
            continue
        target = folder / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        if str(relative) == "config.json":
            target.write_text(json.dumps(_plain(checkpoint.config(), dtype), indent=2) + "\n", encoding="utf-8")
        else:
            shutil.copyfile(checkpoint.root / relative, target)
    if checkpoint.index is not None:
        places = {info.name: shard for shard, header in shards.items() for info in header.tensors}
        size = sum(info.nbytes for header in shards.values() for info in header.tensors)
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
        (folder / checkpoint.index.name).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    sync_tree(folder)


def _plain(config: Mapping[str, Any], dtype: str, inside: bool = False) -> dict[str, Any]:
    """``config`` without a word on quantisation, its dtype restated; where it has none, the whole model gets one."""
    plain: dict[str, Any] = {}
    for key, value in config.items():
        if key in (*CONFIG_KEYS, "_pre_quantization_dtype"):
            continue
        part = key.endswith("_config") and isinstance(value, dict)
        plain[key] = _plain(value, dtype, inside=True) if part else value
    for key in _DTYPE_KEYS & set(plain):
        plain[key] = DTYPES[dtype]
    if not inside and not _DTYPE_KEYS & set(plain):
        plain["torch_dtype"] = DTYPES[dtype]
    return plain
