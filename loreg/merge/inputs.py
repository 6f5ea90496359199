"""What a merge takes in: adapters with weights, and the tensors in their blobs."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from pathlib import Path

import torch

from loreg.algebra.beside import Beside
from loreg.algebra.delta import Dense, LowRank
from loreg.algebra.edits import WeightedSum
from loreg.algebra.forms import Term, beside_of, edit_of
from loreg.checkpoint import FileStamp, Shard, StoredTensor, open_binary, read_exactly, reading
from loreg.digest import Digest
from loreg.errors import BadInput, Unsupported
from loreg.format.manifest import AdapterManifest
from loreg.format.module import IN_OUT
from loreg.format.reference import format_weight
from loreg.format.safetensors import Header, TensorInfo, read_header
from loreg.format.terms import BiasTerm, FormTerm, LowRankTerm
from loreg.tensors import from_buffer, to_memory, torch_dtype

CPU = torch.device("cpu")
Base = Callable[[], torch.Tensor]
"""Brings a weight of the base, on the device on which it is computed."""

PlacedTerm = tuple[str, int, LowRankTerm]
"""A term, before it the path of its module and which of its terms it is: its tensors are called by these."""


@dataclass(frozen=True)
class AdapterInput:
    """A version to be merged, at a weight. ``blobs``: the files of its blobs, verified by whoever hands them in;
    that they stay what they were then is ``check_unchanged``'s to say.

    ``label`` is what the user called it, for messages. ``open_factors``: how the tensors of the factors blob are
    brought; ``blobs`` has others.
    """

    label: str
    weight: float
    digest: Digest
    manifest: AdapterManifest
    blobs: Mapping[Digest, Path]
    open_factors: Callable[[Path], BlobReader] = field(default_factory=lambda: BlobReader, compare=False)

    def __post_init__(self) -> None:
        _ = self._stamps  # taken now

    @cached_property
    def _stamps(self) -> dict[Path, FileStamp]:
        return {path: FileStamp.of(path) for path in self.blobs.values()}

    def check_unchanged(self) -> None:
        """BadInput if a blob is not the file that was verified, NotFound if it is gone."""
        for path, stamp in self._stamps.items():
            if FileStamp.of(path) != stamp:
                raise BadInput(
                    f"Blob {path.name} of {self.label} was changed while it was read: run the command again, which "
                    "checks it."
                )

    @cached_property
    def _factors(self) -> BlobReader:
        blob = self.manifest.blob("factors")
        if blob is None:
            raise BadInput(f"{self.label} has no factors: its manifest lists no such blob.")
        return self.open_factors(self.blobs[blob.digest])

    def weight_edit(self, path: str, base: Base, device: torch.device = CPU) -> WeightedSum:
        """What the module at ``path`` does to its weight, unweighted, on ``device``: as the checkpoint orients it.

        ``base``: brings the weight in the shape of ``module.view``; asked only by forms that read it.
        """
        module = self.manifest.modules[path]
        if module.kind == "vector":
            return self._vector_edit(path, module.terms, base, device)
        out_in = module.out_features, module.in_features
        turned = module.orientation == IN_OUT
        edit = WeightedSum()
        for index, term in enumerate(module.terms):
            if isinstance(term, LowRankTerm):
                delta = self._low_rank(path, index, term, device)
                edit += WeightedSum((delta.mT if turned else delta,))
            else:
                found = self._formed(term, out_in, (lambda: base().mT) if turned else base, device)
                edit += found.mT if turned else found
        return edit

    def plain(self, paths: Iterable[str], device: torch.device = CPU) -> dict[str, tuple[LowRank, ...]]:
        """The terms of the ``weight_edit`` of those of ``paths`` that are LoRA on a matrix and nothing else, brought
        together: of 154 modules in 3 ms instead of 6."""
        placed: dict[str, list[PlacedTerm]] = {}
        for path in paths:
            module = self.manifest.modules[path]
            terms = [(path, index, term) for index, term in enumerate(module.terms) if isinstance(term, LowRankTerm)]
            if len(terms) == len(module.terms) and module.kind != "vector":
                placed[path] = terms
        deltas = iter(self._factors.low_rank([term for terms in placed.values() for term in terms], device))
        found = {path: tuple(islice(deltas, len(terms))) for path, terms in placed.items()}
        turned = [path for path in found if self.manifest.modules[path].orientation == IN_OUT]
        return found | {path: tuple(delta.mT for delta in found[path]) for path in turned}

    def beside(self, path: str, base: Base, device: torch.device = CPU) -> Beside:
        """What ``weight_edit`` does to the weight, as what it adds to the outputs of the layer: (out, in).

        ``base`` is as there, and asked by DoRA. Raises Unsupported, naming the module, for what is no such addition.
        """
        module = self.manifest.modules[path]
        out_in, turned = (module.out_features, module.in_features), module.orientation == IN_OUT
        found = Beside()
        try:
            if module.kind == "vector":
                raise Unsupported("it is no matrix")
            for index, term in enumerate(module.terms):
                if isinstance(term, LowRankTerm):
                    found += Beside((self._low_rank(path, index, term, device),))
                else:
                    given = self._term(term, out_in, (lambda: base().mT) if turned else base, device)
                    found += beside_of(term.form, given).scaled(term.weight)
        except Unsupported as error:
            raise Unsupported(
                f"{self.label} changes {path!r} by what cannot be added to its outputs ({error}), nor served beside "
                "other adapters: merge it into a model of its own."
            ) from error
        except BadInput as error:
            raise BadInput(f"{self.label}: {path!r}: {error}") from error
        return found

    def bias_edit(self, path: str, base: Base, device: torch.device = CPU) -> WeightedSum:
        """What the module at ``path`` does to its bias (out,), unweighted, on ``device``."""
        return self._vector_edit(path, self.manifest.modules[path].bias_terms, base, device)

    def _vector_edit(
        self, path: str, terms: Sequence[LowRankTerm | BiasTerm | FormTerm], base: Base, device: torch.device
    ) -> WeightedSum:
        """Terms of a vector (n,): to a form it is a matrix of one column."""
        edit = WeightedSum()
        for index, term in enumerate(terms):
            if isinstance(term, BiasTerm):
                ((name, _),) = term.named(path, index)
                edit += WeightedSum(dense=(Dense(self._factors.tensor(name).to(device), term.scale),))
            elif isinstance(term, FormTerm):
                size = self.manifest.modules[path].out_features, 1
                found = self._formed(term, size, lambda: base()[:, None], device)
                if found.low_rank:
                    raise BadInput(f"{self.label} has factors for the vector of {path!r}: expected numbers.")
                edit += WeightedSum(dense=tuple(value.reshape((-1,)) for value in found.dense))
            else:
                raise BadInput(f"{self.label} has factors for the vector of {path!r}: expected numbers.")
        return edit

    def _low_rank(self, path: str, index: int, term: LowRankTerm, device: torch.device) -> LowRank:
        (delta,) = self._factors.low_rank([(path, index, term)], device)
        return delta

    def _formed(self, term: FormTerm, out_in: tuple[int, int], base: Base, device: torch.device) -> WeightedSum:
        return edit_of(term.form, self._term(term, out_in, base, device)).scaled(term.weight)

    def _term(self, term: FormTerm, out_in: tuple[int, int], base: Base, device: torch.device) -> Term:
        tensors = {role: self._factors.tensor(ref.content_name).to(device) for role, ref in term.tensors.items()}
        return Term(tensors, term.parameters, term.scale, out_in, base)

    def full_file(self, name: str) -> Path:
        """The blob of a replaced tensor: a safetensors file that holds it alone."""
        return self.blobs[self.manifest.full[name].blob]

    def full_tensor(self, name: str) -> StoredTensor:
        """A replaced tensor where it is stored, under the name that it has in the checkpoint."""
        reader = BlobReader(self.full_file(name))
        info = replace(reader.header.by_name()["tensor"], name=name)
        return StoredTensor(info, reader.shard)


def in_recipe_order(adapters: Iterable[AdapterInput]) -> list[AdapterInput]:
    """Those that do anything, in the recipe's order, so that nothing downstream can depend on how they were given."""
    kept = (adapter for adapter in adapters if adapter.weight != 0)
    return sorted(kept, key=lambda adapter: (adapter.digest, format_weight(adapter.weight)))


class BlobReader:
    """Tensors of a canonical safetensors blob, by name."""

    def __init__(self, path: Path) -> None:
        self.path = path
        stamp = FileStamp.of(path)
        self.header = self.read_header(stamp)
        self._infos = self.header.by_name()
        self.shard = Shard(path, self.header, stamp)

    def read_header(self, stamp: FileStamp) -> Header:
        with open_binary(self.path) as file, reading(self.path):
            return read_header(file, stamp.size, what=f"blob {self.path.name}")

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor by its name. Raises BadInput if there is none, or its bytes are not to be had."""
        if name not in self._infos:
            raise BadInput(f"Blob {self.path.name} has no tensor {name!r}, which its manifest lists.")
        return self.bring([self._infos[name]])[0]

    def bring(self, infos: Sequence[TensorInfo]) -> list[torch.Tensor]:
        """Where tensors go: here, into memory of their own on the CPU."""
        return [read_values(StoredTensor(info, self.shard)) for info in infos]

    def low_rank(self, terms: Sequence[PlacedTerm], device: torch.device) -> list[LowRank]:
        """scale·BA of each of ``terms``, on ``device``. Raises BadInput for a tensor that the blob has otherwise than
        the manifest, or not at all, and for NaN or infinity."""
        infos = []
        for path, index, term in terms:
            for name, ref in term.named(path, index):
                info = self._infos.get(name)
                if info is None or info.shape != ref.shape or info.dtype != ref.dtype:
                    raise BadInput(
                        f"Blob {self.path.name} has no tensor {name!r}, {ref.dtype} of {list(ref.shape)}, which its "
                        "manifest lists."
                    )
                infos.append(info)
        found = [tensor.to(device) for tensor in self.bring(infos)]
        return [self.delta(*each) for each in zip(terms, found[::2], found[1::2], strict=True)]

    def delta(self, term: PlacedTerm, A: torch.Tensor, B: torch.Tensor) -> LowRank:
        """scale·BA of one of the terms, of which these are the tensors."""
        return LowRank(B, A, term[2].scale)


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


def values(stored: StoredTensor) -> torch.Tensor:
    """A stored tensor over a memory map, in its own shape."""
    info = stored.info
    return mapped(stored.shard.path, stored.offset, info.nbytes, info.dtype, info.shape, info.name)


def read_values(stored: StoredTensor) -> torch.Tensor:
    """A stored tensor in memory of its own: a file that is cut meanwhile is an error, where a map would end us."""
    info = stored.info
    kind = torch_dtype(info.dtype, info.name)
    raw = torch.empty(info.nbytes, dtype=torch.uint8)
    with open_binary(stored.shard.path) as file:
        read_exactly(file.fileno(), to_memory(raw), stored.offset, stored.shard.path)
    return raw.view(kind).view(info.shape)
