"""What a merge takes in: adapters with weights, and the edits that they make of each tensor."""

from __future__ import annotations

import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from loreg.algebra.delta import Dense, LowRank
from loreg.algebra.edits import WeightedSum
from loreg.checkpoint import StoredTensor, open_binary
from loreg.digest import Digest
from loreg.errors import BadInput
from loreg.format.manifest import AdapterManifest
from loreg.format.module import IN_OUT, Module
from loreg.format.safetensors import Header, read_header
from loreg.tensors import from_buffer, torch_dtype


@dataclass(frozen=True)
class AdapterInput:
    """A version to be merged, at a weight. ``blobs``: the files of its blobs, verified by whoever hands them in.

    ``label`` is what the user called it, for messages.
    """

    label: str
    weight: float
    digest: Digest
    manifest: AdapterManifest
    blobs: Mapping[Digest, Path]

    @cached_property
    def _factors(self) -> BlobReader:
        blob = self.manifest.blob("factors")
        if blob is None:
            raise BadInput(f"{self.label} has no factors: its manifest lists no such blob.")
        return BlobReader(self.blobs[blob.digest])

    def low_rank(self, path: str) -> tuple[LowRank, ...]:
        """The deltas of a module on the CPU, in the orientation of the checkpoint, weighted: cᵢ = w·sᵢ [A2]."""
        module = self.manifest.modules[path]
        deltas = []
        for index, term in enumerate(module.terms):
            A, B = (self._factors.tensor(f"{path}.lora_{part}.{index}") for part in "AB")
            left, right = (A.T, B.T) if module.orientation == IN_OUT else (B, A)
            deltas.append(LowRank(left, right, term.scale).scaled(self.weight))
        return tuple(deltas)

    def bias(self, path: str) -> tuple[Dense, ...]:
        """The deltas of a module's bias, on the CPU, weighted."""
        terms = self.manifest.modules[path].bias_terms
        return tuple(
            Dense(self._factors.tensor(f"{path}.lora_bias.{index}"), term.scale).scaled(self.weight)
            for index, term in enumerate(terms)
        )

    def full_file(self, name: str) -> Path:
        """The blob of a replaced tensor: a safetensors file that holds it alone."""
        return self.blobs[self.manifest.full[name].blob]


class BlobReader:
    """Tensors of a canonical safetensors blob, by name."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with open_binary(path) as file:
            self.header: Header = read_header(file, path.stat().st_size, what=f"blob {path.name}")
        self._infos = self.header.by_name()

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor on the CPU, over pages of the file that are private to it."""
        if name not in self._infos:
            raise BadInput(f"Blob {self.path.name} has no tensor {name!r}, which its manifest lists.")
        info = self._infos[name]
        return mapped(self.path, self.header.data_start + info.start, info.nbytes, info.dtype, info.shape, name)


def mapped(path: Path, offset: int, nbytes: int, dtype: str, shape: tuple[int, ...], name: str) -> torch.Tensor:
    """A tensor over a memory map: pages come when touched and can be dropped, whatever its size."""
    kind = torch_dtype(dtype, name)
    if nbytes == 0:
        return torch.empty(shape, dtype=kind)
    start = offset - offset % mmap.ALLOCATIONGRANULARITY
    with open_binary(path) as file:
        # A private writable map: torch wants a writable buffer, and nobody may write through to a blob.
        try:
            pages = mmap.mmap(file.fileno(), offset - start + nbytes, access=mmap.ACCESS_COPY, offset=start)
        except (OSError, ValueError) as error:
            raise BadInput(f"{path} cannot be read up to the end of {name!r}: {error}; was it cut?") from error
    return from_buffer(memoryview(pages)[offset - start :], kind, shape)


@dataclass(frozen=True, slots=True)
class TensorEdit:
    """Everything that happens to one tensor of the checkpoint, as names; ``load`` brings the tensors.

    ``low_rank``, ``bias``: (adapter, module path); ``full``: the adapters that replace it.
    """

    low_rank: tuple[tuple[AdapterInput, str], ...] = ()
    bias: tuple[tuple[AdapterInput, str], ...] = ()
    full: tuple[AdapterInput, ...] = ()

    def replaces(self) -> AdapterInput | None:
        """The adapter whose tensor is simply copied [A5]: the only edit, at weight 1."""
        if len(self.full) == 1 and self.full[0].weight == 1 and not self.low_rank and not self.bias:
            return self.full[0]
        return None

    def load(self, stored: StoredTensor) -> WeightedSum:
        """The edit as a value on the CPU. A tensor R that replaces W at weight w adds w·R - w·W [A1]."""
        info = stored.info
        low_rank = [delta for adapter, path in self.low_rank for delta in adapter.low_rank(path)]
        dense = [delta for adapter, path in self.bias for delta in adapter.bias(path)]
        for adapter in self.full:
            W = mapped(stored.shard.path, stored.offset, info.nbytes, info.dtype, info.shape, info.name)
            R = BlobReader(adapter.full_file(info.name)).tensor("tensor")
            dense += [Dense(R, adapter.weight), Dense(W, -adapter.weight)]
        return WeightedSum(tuple(low_rank), tuple(dense))


def edits_of(adapters: Sequence[AdapterInput]) -> dict[str, TensorEdit]:
    """Checkpoint tensor → what the adapters do to it. Every module and every tensor that is replaced by
    another one is in it once.
    """
    low_rank: dict[str, list[tuple[AdapterInput, str]]] = {}
    bias: dict[str, list[tuple[AdapterInput, str]]] = {}
    full: dict[str, list[AdapterInput]] = {}
    for adapter in adapters:
        for path, module in adapter.manifest.modules.items():
            low_rank.setdefault(module.tensor, []).append((adapter, path))
            if module.bias_tensor is not None:
                bias.setdefault(module.bias_tensor, []).append((adapter, path))
        for name in adapter.manifest.replaced():
            full.setdefault(name, []).append(adapter)
    return {
        name: TensorEdit(tuple(low_rank.get(name, ())), tuple(bias.get(name, ())), tuple(full.get(name, ())))
        for name in sorted({*low_rank, *bias, *full})
    }


def module_of(edit: TensorEdit) -> tuple[AdapterInput, str, Module] | None:
    """An adapted module behind the edit, for messages."""
    for adapter, path in (*edit.low_rank, *edit.bias):
        return adapter, path, adapter.manifest.modules[path]
    return None
