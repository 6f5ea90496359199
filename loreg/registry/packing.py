"""From a bound draft, or from parts of other versions, to a manifest and the blobs it needs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from loreg.adapters.bound import Binding, BoundModule
from loreg.adapters.draft import Draft, DraftFile, DraftTerm, RawTensor
from loreg.digest import Digest, fingerprint
from loreg.errors import BadInput
from loreg.format.base import BaseManifest, BaseReference
from loreg.format.manifest import AdapterManifest, BlobRef, Provenance, Source, SourceFile, Tie, check_file_name
from loreg.format.module import FullTensor, Module
from loreg.format.safetensors import Header, canonical_header
from loreg.format.terms import BiasTerm, FormTerm, LowRankTerm, TensorRef
from loreg.registry.spill import Spill
from loreg.registry.storage import PendingBlob


@dataclass
class Package:
    """A manifest in the making: tensors go in by role, and ``finish`` gives manifest and blobs.

    ``spill``: where factors that are in memory are kept until they are stored. Their order and offsets in the blob
    are known only once all of them are.
    """

    factors: dict[str, RawTensor] = field(default_factory=dict)
    spill: Spill | None = None
    _blobs: dict[tuple[Digest, str], PendingBlob] = field(default_factory=dict)

    def put(self, name: str, tensor: RawTensor) -> None:
        """A tensor of the factors blob, under the name that it has there. Threads may call it at once."""
        self.factors[name] = self.spill.keep(tensor) if self.spill else tensor

    def add(self, blob: PendingBlob, role: str) -> Digest:
        self._blobs[blob.digest, role] = blob
        return blob.digest

    def full(self, tensor: RawTensor, module: str) -> FullTensor:
        """A replaced tensor, alone in a canonical blob under the name ``tensor`` [M6]."""
        blob = tensors_blob({"tensor": tensor})
        return FullTensor(self.add(blob, "full"), reference(tensor), module)

    def finish(
        self,
        base: BaseReference,
        modules: Mapping[str, Module],
        full: Mapping[str, FullTensor],
        source: Source | None,
        provenance: Provenance,
        ties: Mapping[str, Tie] | None = None,
    ) -> tuple[AdapterManifest, list[PendingBlob]]:
        """The manifest, checked, and every blob that it needs, the manifest itself last."""
        if self.factors:
            self.add(tensors_blob(self.factors), "factors")
        refs = [
            BlobRef(digest, blob.fingerprint.sha256, blob.fingerprint.size, role)
            for (digest, role), blob in sorted(self._blobs.items())
        ]
        manifest = AdapterManifest(base, modules, full, tuple(refs), source, provenance, ties=ties or {})
        manifest.check()
        return manifest, [*self._blobs.values(), PendingBlob.of(manifest.dump())]


def pack(draft: Draft, binding: Binding, base: BaseReference) -> tuple[AdapterManifest, list[PendingBlob]]:
    """Everything about one pushed adapter. ``base.touched`` is filled in by ``touched``."""
    package = Package()
    places: dict[str, str] = {}
    modules = {}
    for path, bound in binding.modules.items():
        module = modules[path] = _module(bound)
        raws = (raw for term in (*bound.draft.terms, *bound.draft.bias_terms) for raw in term.tensors.values())
        for (name, _), raw in zip(module.tensors(path), raws, strict=True):
            package.put(name, raw)
            places[raw.key] = f"factors:{name}"
    full = {}
    for name, replaced in binding.full.items():
        full[name] = package.full(replaced.tensor, replaced.module)
        places[replaced.tensor.key] = f"full:{name}"
    places.update((key, f"full:{name}") for key, name in binding.copies.items())
    files = tuple(_source_file(file, places, package) for file in draft.files)
    provenance = Provenance(license=draft.license, training=draft.training)
    return package.finish(base, modules, full, Source(draft.format, files), provenance, binding.ties)


def touched(base: BaseManifest, names: Iterable[str]) -> dict[str, Digest]:
    """Tensor → leaf, for tensors that are adapted or replaced [M3]."""
    tensors = base.by_name()
    return {name: tensors[name].leaf for name in names if name in tensors}  # a tied head need not be stored


def bound_tensors(binding: Binding) -> list[str]:
    """The checkpoint tensors that a binding adapts or replaces."""
    biases = [module.bias_tensor for module in binding.modules.values() if module.bias_tensor is not None]
    replaced = [name for name, full in binding.full.items() if not full.added]
    tied = [tie.to for tie in binding.ties.values()]
    return [module.tensor for module in binding.modules.values()] + biases + replaced + tied


def reference(tensor: RawTensor) -> TensorRef:
    return TensorRef(tensor.dtype, tensor.shape, tensor.digest())


def tensors_blob(tensors: Mapping[str, RawTensor]) -> PendingBlob:
    """The canonical safetensors file [S6, S7] of ``tensors``."""
    header: Header = canonical_header((name, raw.dtype, raw.shape) for name, raw in tensors.items())

    def chunks() -> Iterator[bytes | memoryview]:
        yield header.raw
        for info in header.tensors:
            yield from tensors[info.name].chunks()

    return PendingBlob(fingerprint(chunks()), chunks)


def _module(bound: BoundModule) -> Module:
    matrix = bound.stored is None
    return Module(
        tensor=bound.tensor,
        kind=bound.kind,
        orientation=bound.orientation,
        in_features=bound.out_in[1],
        out_features=bound.out_in[0],
        terms=tuple(_term(term, matrix) for term in bound.draft.terms),
        bias_tensor=bound.bias_tensor,
        bias_terms=tuple(_bias_term(term) for term in bound.draft.bias_terms),
        stored=bound.stored,
    )


def _term(term: DraftTerm, matrix: bool) -> LowRankTerm | FormTerm:
    """Plain LoRA where it is that, in the fields that all versions of the format have; else a term with a form."""
    plain = term.form == "lora" and matrix and set(term.tensors) == {"A", "B"}
    undivided = all(count == 1 for count in term.parameters.values())
    if plain and undivided and all(len(raw.shape) == 2 for raw in term.tensors.values()):
        A, B = (reference(term.tensors[role]) for role in "AB")
        return LowRankTerm(term.rank, term.alpha, term.scale, A, B)
    return _formed(term)


def _bias_term(term: DraftTerm) -> BiasTerm | FormTerm:
    return BiasTerm(term.scale, reference(term.tensors["value"])) if term.form == "dense" else _formed(term)


def _formed(term: DraftTerm) -> FormTerm:
    tensors = {role: reference(raw) for role, raw in term.tensors.items()}
    return FormTerm(term.form, term.rank, term.alpha, term.scale, 1.0, tensors, term.parameters)


def _source_file(file: DraftFile, places: Mapping[str, str], package: Package) -> SourceFile:
    """How to give a file back byte for byte [M8]: its header as a blob, its tensors from where they are kept.

    In one piece where there is no header, or where not every tensor is kept as it was.
    """
    name = check_file_name(file.path.name, "the adapter")
    if file.header is None or not all(tensor.key in places for tensor in file.tensors):
        whole = PendingBlob.of_file(file.path)
        print_ = whole.fingerprint
        return SourceFile(name, print_.size, print_.sha256, package.add(whole, "source"))
    sha256, size = hashlib.sha256(file.header), len(file.header)
    for tensor in file.tensors:
        for chunk in tensor.chunks():
            sha256.update(chunk)
        size += tensor.nbytes
    if size != file.path.stat().st_size:
        raise BadInput(f"{file.path} was changed while it was read: push again.")
    blob = package.add(PendingBlob.of(file.header), "source")
    return SourceFile(name, size, sha256.hexdigest(), blob, tuple(places[tensor.key] for tensor in file.tensors))
