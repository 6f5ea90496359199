"""Extracting: an adapter from two checkpoints, by truncated SVD tensor by tensor. The inverse of a merge."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from loreg.adapters.draft import RawTensor
from loreg.adapters.folding import raw_of
from loreg.checkpoint import Advance
from loreg.errors import UsageError
from loreg.format import methods
from loreg.format.manifest import Provenance
from loreg.format.module import FullTensor, Module
from loreg.format.reference import check_name, check_tag
from loreg.format.terms import FormTerm, LowRankTerm
from loreg.registry import packing
from loreg.registry.bases import Base, check_files
from loreg.registry.core import Registry, silent
from loreg.registry.dequantising import require_plain
from loreg.registry.differing import Factored, Limits, Made, differences
from loreg.registry.inputs import choose_device
from loreg.registry.merging import Progress
from loreg.registry.pairing import Model, Pair, Selection, pair_up
from loreg.registry.spill import spilling
from loreg.registry.versions import Version


@dataclass(frozen=True, slots=True)
class ExtractedTensor:
    """A tensor of the checkpoint that an extraction holds.

    ``rank``: that of its factors; None where it is replaced outright, exactly. ``relative_error``: ‖D - D'‖/‖D‖ in
    the Frobenius norm, D the difference and D' what was stored of it, float32 factors included; measured.
    """

    name: str
    rank: int | None
    relative_error: float


@dataclass(frozen=True, slots=True)
class Extracted:
    """An extracted version. ``relative_error``: as of a tensor, over all that have a difference to the base.

    ``left_out``: tensors that differ, or that one of the models lacks, and that were not asked for.
    """

    version: Version
    relative_error: float
    tensors: tuple[ExtractedTensor, ...]
    left_out: tuple[str, ...]


def extract(
    registry: Registry,
    base: str | Path,
    tuned: str | Path,
    name: str,
    *,
    rank: int | None = None,
    energy: float | None = None,
    targets: Iterable[str] = (),
    exclude: Iterable[str] = (),
    device: str = "cpu",
    tags: Iterable[str] = (),
    note: str | None = None,
    progress: Progress | None = None,
) -> Extracted:
    """Store what tells ``tuned`` from ``base`` as a version of ``name``.

    The difference of a matrix, of a convolution as one, or of each expert of a stack becomes float32 factors of at
    most ``rank``, or of the least rank that holds ``energy``, in (0, 1], of its square norm; with both, the smaller
    rank holds. They are the optimal ones, see ``loreg.algebra.truncate.truncate_dense``. A tensor that is a vector,
    new, of another shape, or no larger than its factors is stored as it is: a merge gives back its bytes. So does it
    each element of which the factors miss the difference by less than half the spacing of the storage values there.
    A tensor in which only the signs of zeros differ, or which is the base's in a wider dtype, or rounded to a
    narrower one, does not count as different.

    ``targets`` and ``exclude``: patterns as of ``Selection``. ``progress(label, total bytes)`` gives the callback of
    one stage. Memory: for two tensors of the size of the largest some five float64 copies.

    Raises UsageError without rank and energy, or where nothing differs; BadInput for NaN, infinity, or a tensor that
    ``tuned`` lacks; Unsupported for tensors that have no difference, as of quantised models; NotFound.
    """
    check_name(name)
    wanted = [check_tag(tag) for tag in tags]
    given = methods.parameters("svd", {"rank": rank, "energy": energy})
    limits = Limits(given["rank"], given["energy"], choose_device(device))
    selection = Selection(tuple(targets), tuple(exclude))
    stage = progress or (lambda label, total: silent)
    known = registry.bases.find(base, stage("hashing the base", 0))
    before = _model(registry, known, stage("hashing the base", 0))
    other = registry.bases.find(tuned, stage("hashing the tuned model", 0))
    after = _model(registry, other, stage("hashing the tuned model", 0))
    pairs = pair_up(before, after, selection)
    with spilling(registry.home / "tmp") as spill:
        work = _Work(packing.Package(spill=spill))
        advance = stage("extracting", sum(pair.tuned.info.nbytes for pair in pairs.selected))
        for pair, made in differences(pairs.selected, before.config, limits):
            work.take(pair, made)
            advance(pair.tuned.info.nbytes)
        if not work.modules and not work.full:
            raise UsageError(_nothing(known, other, bool(pairs.left_out)))
        _check_rank(limits.rank, [pair.tuned.info.shape for pair in pairs.selected])
        ties = {head: tie for head, tie in pairs.ties.items() if {head, tie.to} & work.changed}
        names = [*work.changed, *(tie.to for tie in ties.values())]
        reference = replace(known.reference(), touched=packing.touched(known.manifest, sorted(names)))
        # A recipe has no word for it, as its terms are adapters.
        asked = {**given, "targets": list(selection.targets), "exclude": list(selection.exclude)}
        training = {"method": "extract", "tuned": str(other.manifest.identity.weights_root), **asked}
        manifest, blobs = work.package.finish(
            reference, work.modules, work.full, None, Provenance(training=training), ties
        )
        for model in (before, after):
            model.checkpoint.check_unchanged()
        registry.bases.register(known)
        version = registry.commit_version(name, manifest, blobs, wanted, note)
    error = math.sqrt(work.error / work.total) if work.total else 0.0
    return Extracted(version, error, tuple(work.tensors), pairs.left_out)


def _check_rank(rank: int | None, shapes: Sequence[tuple[int, ...]]) -> None:
    """UsageError for a rank that no tensor can have; one above that of some is their own greatest."""
    largest = max((min(shape[0], math.prod(shape[1:])) for shape in shapes if len(shape) > 1), default=1)
    if rank is not None and rank > largest:
        raise UsageError(f"rank {rank} is above that of any of the tensors: expected at most {largest}.")


def _model(registry: Registry, found: Base, advance: Advance) -> Model:
    checkpoint = found.open()
    require_plain(checkpoint)
    manifest = check_files(found, checkpoint, registry.bases.cache, advance)
    return Model(found.name, checkpoint, manifest.by_name(), checkpoint.config())


def _nothing(base: Base, tuned: Base, left_out: bool) -> str:
    if left_out:
        return (
            f"{tuned.name!r} differs from {base.name!r} only in what was not asked for: there is nothing to extract."
        )
    return (
        f"{tuned.name!r} has the values of {base.name!r} in every tensor: there is nothing to extract; expected the "
        "fine-tuned model."
    )


@dataclass
class _Work:
    """Puts what is to be stored of each pair of tensors into ``package``.

    ``error`` and ``total``: the squares of the Frobenius norms of what was lost so far, and of all differences.
    """

    package: packing.Package
    modules: dict[str, Module] = field(default_factory=dict)
    full: dict[str, FullTensor] = field(default_factory=dict)
    tensors: list[ExtractedTensor] = field(default_factory=list)
    changed: set[str] = field(default_factory=set)
    error: float = 0.0
    total: float = 0.0

    def take(self, pair: Pair, made: Made) -> None:
        if not made.differs:
            return
        self.total += made.square
        if pair.base is not None:
            self.changed.add(pair.name)
        if made.factored is None:
            info = pair.tuned.info
            raw = RawTensor(pair.name, info.dtype, info.shape, pair.tuned.shard.path, pair.tuned.offset)
            self.full[pair.name] = self.package.full(raw, pair.module)
            self.tensors.append(ExtractedTensor(pair.name, None, 0.0))
        else:
            self.error += made.factored.lost
            self.modules[pair.path] = self._module(pair.path, made.factored)
            error = math.sqrt(made.factored.lost / made.square)
            self.tensors.append(ExtractedTensor(pair.name, made.factored.rank, error))

    def _module(self, path: str, made: Factored) -> Module:
        raws = [raw_of(f"{path}.lora_{end}.0", factor) for end, factor in (("A", made.A), ("B", made.B))]
        A, B = (packing.reference(raw) for raw in raws)
        term: LowRankTerm | FormTerm = LowRankTerm(made.rank, None, 1.0, A, B)
        if made.module.stored is not None:
            experts = made.module.kind == "experts"
            form, parameters = ("lora_experts", {"experts": made.count}) if experts else ("lora", {"groups": 1})
            term = FormTerm(form, made.rank, None, 1.0, 1.0, {"A": A, "B": B}, parameters)
        for (key, _), raw in zip(term.named(path, 0), raws, strict=True):
            self.package.put(key, raw)
        return replace(made.module, terms=(term,))
