"""Merge, unmerge, verify and load: names to inputs, and inputs to ``loreg.merge``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from loreg.checkpoint import Advance, Checkpoint
from loreg.digest import Digest
from loreg.errors import BadInput, BaseMismatch, NotFound, UsageError
from loreg.format import canonical_json, methods
from loreg.format.base import BaseManifest, BaseReference, HubPin
from loreg.format.journal import FILE as JOURNAL
from loreg.format.recipe import DTYPE_NAMES, MergeRecord
from loreg.merge.forward import check_plan
from loreg.merge.inputs import AdapterInput
from loreg.merge.journal import Journal
from loreg.merge.output import RECORD, Composition, MergeResult, Output, write_merges
from loreg.merge.plan import MergePlan, plan_merge
from loreg.merge.resources import Resources
from loreg.merge.undo import unmerge_from_base, unmerge_from_journal
from loreg.merge.verify import KINDS, Check, Subject, Verification, Verifier, require_record
from loreg.merge.verify import verify as run_verification
from loreg.registry.bases import Base, check_files
from loreg.registry.core import Registry, silent
from loreg.registry.dequantising import dequantise, require_plain
from loreg.registry.inputs import choose_device, recipe_inputs, resolve_terms
from loreg.staging import require_free, scratch

if TYPE_CHECKING:
    from loreg.registry.bases import LeafCache

_SHORT = {"bf16": "BF16", "fp16": "F16", "f16": "F16", "fp32": "F32", "f32": "F32"}
_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()} | _SHORT

Progress = Callable[[str, int], Advance]


@dataclass(frozen=True, slots=True)
class Unmerged:
    """The outcome of an unmerge. ``method``: ``base``, from the base's own files, or ``journal``."""

    out: Path
    weights_root: Digest
    matches_base: bool
    method: str


@dataclass(frozen=True, slots=True)
class MergeOptions:
    """What ``Registry.merge`` takes besides what is merged and where to. ``threads``: None for as many as torch would
    use; ``memory``: bytes, None for what that takes."""

    base: str | Path | None = None
    method: str = "linear"
    parameters: Mapping[str, Any] = field(default_factory=dict)
    dtype: str | None = None
    device: str = "cpu"
    verify: str = "probe"
    allow_base_mismatch: bool = False
    dequantize: bool = False
    undo: bool = False
    threads: int | None = None
    memory: int | None = None
    progress: Progress | None = None

    def __post_init__(self) -> None:
        if self.verify not in KINDS:
            raise UsageError(f"{self.verify!r} is not a kind of verification: expected one of {', '.join(KINDS)}.")
        if self.dtype is not None and self.dtype.lower() not in _DTYPES:
            raise UsageError(f"{self.dtype!r} is not an output dtype: expected bfloat16, float16 or float32.")
        if self.threads is not None and self.threads < 1:
            raise UsageError(f"{self.threads} threads can merge nothing: expected at least 1.")

    def stage(self, label: str, total: int) -> Advance:
        return self.progress(label, total) if self.progress else silent


def merge_many(registry: Registry, wanted: Sequence[tuple[str, Path]], options: MergeOptions) -> list[MergeResult]:
    """See ``Registry.merge_many``."""
    outs = [out.resolve() for _, out in wanted]
    if not outs or len(set(outs)) < len(outs):
        raise UsageError(f"{len(outs)} merges into {len(set(outs))} directories: expected one for each.")
    device, stage = choose_device(options.device), options.stage
    method, row = methods.method(options.method)
    parameters = methods.parameters(method, options.parameters)
    given = [resolve_terms(registry, expression) for expression, _ in wanted]
    if not row.keeps_terms:
        for adapters in given:
            methods.check_count(method, parameters, sum(adapter.weight != 0 for adapter in adapters))
    every = [adapter for adapters in given for adapter in adapters]
    with (
        _base_for(registry, every, options.base, outs[0], stage) as stored,
        _plain(stored, outs[0], options.dequantize, stage) as found,
        ExitStack() as work,
    ):
        planned = partial(
            plan_merge,
            found.checkpoint,
            found.manifest,
            hub=found.hub,
            dtype=_DTYPES[options.dtype.lower()] if options.dtype else None,
            allow_mismatch=options.allow_base_mismatch,
            known=_known_checkpoints(registry, every),
        )
        outputs, stores = [], []
        for adapters, (_, out) in zip(given, wanted, strict=True):
            store = None
            if row.composes_only:
                planned(adapters)  # what is refused of the adapters themselves is refused before all that work
                require_free(out)
                made = work.enter_context(_composed(registry, adapters, method, parameters, options))
                plan, store = planned([made.input], method="linear", parameters={}), made.store
            else:
                plan = planned(adapters, method=method, parameters=parameters)
            if options.verify == "forward":
                check_plan(plan)
            outputs.append(Output(plan, out, _verifier(plan, options), options.undo, store or _nothing))
            stores.append(store)
        plans = [output.plan for output in outputs]
        results = write_merges(
            outputs,
            resources=Resources.of(
                device, plans, threads=options.threads, memory=options.memory, verify=options.verify != "none"
            ),
            advance=stage("merging", sum(plan.nbytes for plan in plans)),
        )
    return [
        result if store is None else replace(result, composition=store())
        for result, store in zip(results, stores, strict=True)
    ]


def _verifier(plan: MergePlan, options: MergeOptions) -> Verifier:
    subject = Subject.of(plan.recipe, plan.base, plan.base_manifest, plan.adapters)
    return Verifier(options.verify, subject, partial(options.stage, "verifying", plan.nbytes))


def _nothing() -> None:
    """Is to be done once a merge is verified."""


class _Composed(NamedTuple):
    """A composition that a merge is made of: as an input of weight 1, and how to store it, once it has worked."""

    input: AdapterInput
    store: Callable[[], Composition]


@contextmanager
def _composed(
    registry: Registry,
    adapters: Sequence[AdapterInput],
    method: str,
    parameters: Mapping[str, Any],
    options: MergeOptions,
) -> Iterator[_Composed]:
    """The factors of the adapters combined, to become a version that the recipe can name by its digest.

    LAPACK does not give the same bits everywhere: what it gave is stored, and the merge of that is reproducible. The
    version's name is the method and a digest of what it is made of, so that it is in nobody's way. Stored only when
    the merge of it is written and verified: one that is refused, or killed, leaves nothing behind.

    That any base is allowed for the merge is of no use to the version itself, which has one base.
    """
    from loreg.registry.composing import combination
    from loreg.registry.spill import spilling

    terms = [f"{'-' if a.weight < 0 else '+'} {abs(a.weight)!r}*{a.digest}" for a in adapters if a.weight != 0]
    made_of = canonical_json.dumps({"terms": sorted(terms), "method": method, "parameters": dict(parameters)})
    name, summed = f"{method}-{Digest.of(made_of).short}", " ".join(terms)
    with ExitStack() as work:
        try:
            made = work.enter_context(
                combination(registry, summed, name, method=method, parameters=parameters, device=options.device)
            )
        except BaseMismatch as error:
            if not options.allow_base_mismatch:
                raise
            raise BaseMismatch(
                f"--allow-base-mismatch does not apply to adapters of different bases with {method}, which makes one "
                f"version of them, and a version has one base: {error}"
            ) from error
        spill = work.enter_context(spilling(registry.home / "tmp"))
        *blobs, manifest = made.blobs
        files = {blob.digest: spill.file(blob) for blob in blobs}

        @cache
        def store() -> Composition:
            version = made.store(registry).version
            return Composition(made.method, made.relative_error, str(version), version.digest)

        yield _Composed(AdapterInput(name, 1.0, manifest.digest, made.manifest, files), store)


class _Found(NamedTuple):
    """A base at hand: its files, what is in them, and where on the Hub they are from."""

    checkpoint: Checkpoint
    manifest: BaseManifest
    hub: HubPin | None = None


@contextmanager
def _base_for(
    registry: Registry, adapters: Sequence[AdapterInput], base: str | Path | None, out: Path, stage: Progress
) -> Iterator[_Found]:
    """The base to merge into: the one given, else the adapters' own, which must then be one."""
    if base is not None:
        given = registry.bases.find(base, stage("hashing", 0))
        yield _open_checked(given, registry.bases.cache, stage)
        registry.bases.register(given)  # only after a merge: a base that was refused leaves no trace
        return
    weighted = [adapter for adapter in adapters if adapter.weight != 0] or adapters
    references = [adapter.manifest.base for adapter in weighted]
    first = references[0]
    if other := next((r for r in references if r.identity.weights_root != first.identity.weights_root), None):
        # To take the first one's would make a + b another model than b + a.
        raise BaseMismatch(
            f"The adapters were trained on {first.name!r} ({first.identity.weights_root}) and on {other.name!r} "
            f"({other.identity.weights_root}): say which one to merge into with --base."
        )
    with _recorded(registry, first.identity.weights_root, references, out, stage) as found:
        yield found


@contextmanager
def _plain(found: _Found, out: Path, dequantize: bool, stage: Progress) -> Iterator[_Found]:
    """The base itself, if it holds plain numbers; else its 16-bit model, made beside ``out``, if that is wanted."""
    if not dequantize:
        require_plain(found.checkpoint)
        yield found
        return
    with scratch(out, f"{found.manifest.identity.weights_root.short}.plain") as folder:
        advance = stage("dequantising", found.checkpoint.nbytes)
        manifest = dequantise(found.checkpoint, folder / "base", advance, source=found.manifest)
        yield _Found(Checkpoint.open(folder / "base"), manifest)


@contextmanager
def _recorded(
    registry: Registry, root: Digest, references: Sequence[BaseReference], out: Path, stage: Progress
) -> Iterator[_Found]:
    """The base with these weights: as registered, else made anew from the recipe that ``references`` give of it."""
    called = next((ref.name for ref in references if ref.identity.weights_root == root), None)
    known = registry.bases.of_root(root, called)
    if known is not None and known.path is not None and known.path.exists():
        yield _open_checked(known, registry.bases.cache, stage)
        return
    named = next((ref for ref in references if ref.identity.weights_root == root), None)
    if named is None or named.recipe is None:
        if known is not None:
            known.open()
        label = f"Base {named.name!r} ({root})" if named else f"Base {root}"
        raise NotFound(f"{label} is not registered here: add it with 'loreg base add', or give --base PATH.")
    # The base was itself a merge: apply that recipe first, and go on only if the result has the recorded root.
    recipe = named.recipe
    chain = recipe_inputs(registry, recipe)
    origins = [adapter.manifest.base for adapter in chain]
    with scratch(out, f"{root.short}.base") as folder:
        with _recorded(registry, recipe.base, origins, out, stage) as origin:
            plan = plan_merge(
                origin.checkpoint,
                origin.manifest,
                chain,
                dtype=recipe.dtype,
                method=recipe.method,
                parameters=recipe.parameters,
                allow_mismatch=recipe.base_mismatch,
            )
            (result,) = write_merges(
                [Output(plan, folder / "base", _verifier(plan, MergeOptions(verify="none")))],
                resources=Resources.of(torch.device("cpu")),
                advance=stage("merging the base", plan.nbytes),
            )
        if result.weights_root != root:
            raise BaseMismatch(
                f"Base {named.name!r} is a merge that could not be made again: expected {root}, found "
                f"{result.weights_root}; give --base PATH."
            )
        yield _Found(Checkpoint.open(result.out), BaseManifest(result.record.tensors))


def _open_checked(base: Base, cache: LeafCache, stage: Progress) -> _Found:
    checkpoint = base.open()
    manifest = check_files(base, checkpoint, cache, stage("hashing the base", checkpoint.nbytes))
    return _Found(checkpoint, manifest, base.hub)


def _known_checkpoints(registry: Registry, adapters: Sequence[AdapterInput]) -> dict[Digest, Checkpoint]:
    """The adapters' own bases, where their files are at hand: to explain a mismatch."""
    known = {}
    for adapter in adapters:
        root = adapter.manifest.base.identity.weights_root
        base = registry.bases.of_root(root)
        if base is not None and base.path is not None:
            with suppress(NotFound, BadInput):  # what cannot be opened explains nothing, and is not merged into
                known[root] = Checkpoint.open(base.path)
    return known


def unmerge(
    registry: Registry, merged: Path, out: Path, base: str | Path | None, journal: bool | None, advance: Advance
) -> Unmerged:
    """See ``Registry.unmerge``."""
    checkpoint, record = Checkpoint.open(merged), require_record(merged)
    there = (merged / JOURNAL).is_file()
    if journal and not there:
        raise NotFound(f"{merged} has no {JOURNAL}: merge with --undo, or give the base with --base PATH.")
    known = registry.bases.of_root(record.recipe.base)
    at_hand = known is not None and known.path is not None and known.path.exists()
    if journal or (journal is None and there and base is None and not at_hand):
        adapters, resources = recipe_inputs(registry, record.recipe), Resources.of(torch.device("cpu"))
        undo = Journal(merged / JOURNAL)
        root = unmerge_from_journal(checkpoint, record, undo, adapters, out, resources, advance)
        return Unmerged(out, root, root == record.recipe.base, "journal")
    with _base_of(registry, record, base, out, advance) as found:
        root = unmerge_from_base(checkpoint, record, found.checkpoint, found.manifest, out, advance)
    return Unmerged(out, root, root == record.recipe.base, "base")


@contextmanager
def _base_of(
    registry: Registry, record: MergeRecord, base: str | Path | None, beside: Path, advance: Advance
) -> Iterator[_Found]:
    """The base that a merge names: the given one if it is that, else the registered one, made again if need be."""
    wanted = record.recipe.base

    def stage(label: str, total: int) -> Advance:
        return advance

    if base is not None:
        given = registry.bases.find(base, advance)
        found = given.manifest.identity.weights_root
        if found != wanted:
            raise BaseMismatch(f"The merge was made from base {wanted}, and {base} is {found}: give that base.")
        yield _open_checked(given, registry.bases.cache, stage)
        return
    known = registry.bases.of_root(wanted)
    at_hand = known is not None and known.path is not None and known.path.exists()
    references: list[BaseReference] = []
    if not at_hand:
        with suppress(NotFound):  # then it is the base that is said to be missing
            references = [adapter.manifest.base for adapter in recipe_inputs(registry, record.recipe)]
    with _recorded(registry, wanted, references, beside, stage) as files:
        yield files


def verify(
    registry: Registry, subject: str | Path, kind: str, base: str | Path | None, advance: Advance
) -> Verification:
    """See ``Registry.verify``: a directory with a ``loreg.json`` is a merged model, else a reference is tried."""
    if kind not in KINDS:
        raise UsageError(f"{kind!r} is not a kind of verification: expected one of {', '.join(KINDS)}.")
    folder = Path(subject)
    if not (folder / RECORD).is_file() and (not folder.is_dir() or _is_version(registry, str(subject))):
        return _verify_version(registry, str(subject))
    record = require_record(folder)
    with _base_of(registry, record, base, registry.home / "verify", advance) as found:
        adapters = recipe_inputs(registry, record.recipe)
        merge_ = Subject.of(record.recipe, found.checkpoint, found.manifest, adapters)
        return run_verification(kind, merge_, folder, record, advance)


def _is_version(registry: Registry, text: str) -> bool:
    """Whether ``text`` is a version's reference: after a push, a directory of its name often lies beside."""
    try:
        registry.find(text)
    except (NotFound, UsageError):
        return False
    return True


def _verify_version(registry: Registry, reference: str) -> Verification:
    """Every blob of a stored version, re-read from the store and compared with its digest and its manifest."""
    version = registry.resolve(reference)
    checks = []
    for blob in version.manifest.blobs:
        name = f"{blob.role} {blob.digest.short}"
        try:
            found = len(registry.storage.read(blob.digest))
        except (BadInput, NotFound) as error:
            checks.append(Check(name, False, str(error)))
        else:
            checks.append(Check(name, found == blob.size, f"{found:,} bytes, expected {blob.size:,}"))
    return Verification("blobs", tuple(checks))
