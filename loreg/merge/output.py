"""From a plan to a directory: written beside its place, checked, and renamed into it whole."""

from __future__ import annotations

import json
import resource
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from loreg.adapters import models
from loreg.checkpoint import Advance, read_whole
from loreg.digest import Digest
from loreg.errors import BadInput, CheckFailed
from loreg.format.fingerprint import BaseTensor, Match, identify
from loreg.format.journal import BESIDE, HEADER, Undoes
from loreg.format.journal import FILE as JOURNAL
from loreg.format.recipe import DTYPE_NAMES, MergeRecord
from loreg.merge.execute import Target, execute
from loreg.merge.journal import write_journal
from loreg.merge.layout import OutputTensor
from loreg.merge.plan import MergePlan, check_space
from loreg.merge.resources import Resources
from loreg.merge.verify import Verification, Verifier
from loreg.staging import refuse_inside, staged, sync_tree

RECORD = "loreg.json"


@dataclass(frozen=True, slots=True)
class Composition:
    """What a merge by a method on factors merged: a version that the method made, which its recipe names.

    ``relative_error``: how far that version is from what the method gives, ‖·‖ over all modules (Frobenius).
    """

    method: str
    relative_error: float
    version: str
    digest: Digest


@dataclass(frozen=True, slots=True)
class MergeResult:
    """A finished merge.

    ``base_match``: how well the base fits the adapter that it fits least. ``touched``: the tensors whose bytes may
    differ from the base's. ``seconds``: wall time from the first byte to the rename, verification included; of all
    the outputs of one pass. ``left_out``: files of the base's directory that were not copied, as other weights may
    be stale copies of these. ``undo_bytes``: the size of the undo journal, None without one. ``composition``: the
    version that was made first, if the method that was asked for works on factors; None for the others.
    """

    out: Path
    record: MergeRecord
    base_match: Match
    touched: tuple[str, ...]
    verification: Verification
    seconds: float
    peak_rss_bytes: int
    left_out: tuple[str, ...] = ()
    undo_bytes: int | None = None
    composition: Composition | None = None

    @property
    def method(self) -> str:
        """The full name of the method that was asked for; the recipe has that of the merge itself."""
        return self.composition.method if self.composition else self.record.recipe.method

    @property
    def weights_root(self) -> Digest:
        return self.record.weights_root

    @property
    def recipe(self) -> Digest:
        return self.record.recipe.digest


@dataclass(frozen=True)
class Output:
    """One merge of several: its plan, the directory that it becomes, which must not exist or be empty, and what
    verifies it. ``undo``: whether a journal is written with it. ``verified``: called when all are, before it has its
    name.
    """

    plan: MergePlan
    out: Path
    verifier: Verifier
    undo: bool = False
    verified: Callable[[], object] = lambda: None


def write_merges(outputs: Sequence[Output], *, resources: Resources, advance: Advance) -> list[MergeResult]:
    """Run plans over one base, which is read once, and put each result in its place.

    All or nothing up to the renames: an error, or a verification that fails, leaves nothing. Raises Conflict,
    CheckFailed, BadInput.
    """
    began = time.monotonic()
    base = outputs[0].plan.base
    with ExitStack() as stack:
        folders = []
        for output in outputs:
            if not base.lone:
                refuse_inside(output.out, base.root)
            folders.append(stack.enter_context(staged(output.out, output.plan.recipe.digest, resume=True)))
        check_space([output.plan for output in outputs], folders)
        targets = [
            Target(output.plan, folder, output.verifier, output.undo)
            for output, folder in zip(outputs, folders, strict=True)
        ]
        execute(targets, resources=resources, advance=advance)
        records = [_record(target.plan, target.digests) for target in targets]
        journals = [_finish(target, record) for target, record in zip(targets, records, strict=True)]
        base.check_unchanged()
        for adapter in (adapter for output in outputs for adapter in output.plan.adapters):
            adapter.check_unchanged()
        verifications = [
            _verified(output, folder, record)
            for output, folder, record in zip(outputs, folders, records, strict=True)
        ]
        for output in outputs:
            output.verified()
    seconds, peak = time.monotonic() - began, _peak_rss()
    return [
        _result(output, record, verification, seconds, peak, journal)
        for output, record, verification, journal in zip(outputs, records, verifications, journals, strict=True)
    ]


def _verified(output: Output, folder: Path, record: MergeRecord) -> Verification:
    verification = output.verifier.verification(folder, record)
    if not verification.ok:
        raise CheckFailed(f"{output.out} was written and does not verify, so it was removed: {verification.reason}.")
    return verification


def _result(
    output: Output, record: MergeRecord, verification: Verification, seconds: float, peak: int, journal: int | None
) -> MergeResult:
    plan = output.plan
    return MergeResult(
        output.out,
        record,
        min(plan.matches, default=Match.WEIGHTS),
        tuple(sorted(tensor.info.name for tensor in plan.changed)),
        verification,
        seconds,
        peak,
        tuple(str(path) for path in plan.base.left_out()),
        journal,
    )


def _peak_rss() -> int:
    """The largest resident size of this process so far, in bytes.

    Not ``getrusage``'s, which after an exec still holds the size of the process that forked.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def _record(plan: MergePlan, digests: dict[str, Digest]) -> MergeRecord:
    """The identity of the output, from the base's known tensors and the changed ones: no second read."""
    tensors = [
        BaseTensor(
            tensor.info.name,
            tensor.info.dtype,
            tensor.info.shape,
            tensor.info.nbytes,
            digests[tensor.info.name] if tensor.info.name in digests else _unchanged(tensor),
        )
        for tensor in plan.outputs
    ]
    tensors.sort(key=lambda tensor: tensor.name.encode("utf-8"))
    return MergeRecord(plan.recipe, identify(tensors).weights_root, tuple(tensors))


def _unchanged(tensor: OutputTensor) -> Digest:
    if tensor.content is None:
        raise BadInput(f"{tensor.info.name!r} was not written, and the base does not have it.")
    return tensor.content


def _finish(target: Target, record: MergeRecord) -> int | None:
    """What stands beside the weights, all flushed; the bytes of the journal, None without one."""
    plan, folder = target.plan, target.folder
    before = _write_side_files(plan, folder, record)
    size = _write_journal(target, record, before) if target.undo else None
    target.finished.forget()
    sync_tree(folder)
    return size


def _write_side_files(plan: MergePlan, folder: Path, record: MergeRecord) -> dict[str, bytes]:
    """Config, index and record, and copies of the rest; what the base has otherwise, by name."""
    base = plan.base.root
    for relative in plan.base.side_files():
        target = folder / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(base / relative, target)
    _restate_config(plan, folder / "config.json")
    if plan.index is not None:
        name, raw = plan.index
        (folder / name).write_bytes(raw)
    (folder / RECORD).write_bytes(record.dump())
    own = ["config.json", RECORD] + ([plan.index[0]] if plan.index else [])
    before = {} if plan.base.lone else {name: read_whole(base / name) for name in own if (base / name).is_file()}
    return {name: raw for name, raw in before.items() if raw != (folder / name).read_bytes()}


def _write_journal(target: Target, record: MergeRecord, before: dict[str, bytes]) -> int:
    """What takes the merge back without the base [U1]; its size in bytes."""
    recipe, base = target.plan.recipe, target.plan.base
    short = {BESIDE + name: raw for name, raw in before.items()}
    for shard, other in zip(base.shards, target.plan.shards, strict=True):
        if shard.header.raw != other.header.raw:
            short[HEADER + shard.name] = shard.header.raw
    entries = {
        name: (shard.spill, entry) for shard in target.written.values() for name, entry in (shard.undo or {}).items()
    }
    return write_journal(
        target.folder / JOURNAL, Undoes(recipe.digest, recipe.base, record.weights_root), entries, short
    )


def _restate_config(plan: MergePlan, path: Path) -> None:
    """config.json follows the edits: dtype, tied embeddings, number of words. Left alone where none of it changed."""
    dtype = DTYPE_NAMES[plan.recipe.dtype] if plan.recipe.dtype else None
    if not path.is_file() or not (dtype or plan.unties or plan.resized):
        return
    try:
        config = json.loads(path.read_bytes())
    except ValueError as error:
        raise BadInput(f"config.json of the base is not JSON, so it cannot follow the merge: {error}.") from error
    if not isinstance(config, dict):
        raise BadInput("config.json of the base is not an object, so it cannot follow the merge.")
    restated = models.restated(config, dtype=dtype, untied=plan.unties, resized=plan.resized)
    path.write_text(json.dumps(restated, indent=2) + "\n", encoding="utf-8")
