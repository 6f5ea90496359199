"""From a plan to a directory: written beside its place, checked, and renamed into it whole."""

from __future__ import annotations

import json
import resource
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from loreg.adapters import models
from loreg.checkpoint import Advance
from loreg.digest import Digest
from loreg.errors import BadInput, CheckFailed
from loreg.format.fingerprint import BaseTensor, Match, identify
from loreg.format.recipe import DTYPE_NAMES, MergeRecord
from loreg.merge.execute import execute
from loreg.merge.layout import OutputTensor
from loreg.merge.plan import MergePlan, check_space
from loreg.merge.verify import Verification
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
    differ from the base's. ``seconds``: wall time from the first byte to the rename, verification included.
    ``left_out``: files of the base's directory that were not copied, as other weights may be stale copies of
    these. ``undo_bytes``: the size of the undo journal, None without one. ``composition``: the version that was made
    first, if the method that was asked for works on factors; None for the others.
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


def write_merge(
    plan: MergePlan,
    out: Path,
    *,
    device: torch.device,
    advance: Advance,
    verify: Callable[[Path, MergeRecord], Verification],
) -> MergeResult:
    """Run ``plan`` and put the result at ``out``, which must not exist or be empty.

    ``verify`` is called on the finished, not yet renamed directory; a verification that fails leaves nothing.
    Raises Conflict, CheckFailed, BadInput.
    """
    began = time.monotonic()
    if not plan.base.lone:
        refuse_inside(out, plan.base.root)
    with staged(out, plan.recipe.digest, resume=True) as folder:
        check_space(plan, folder)
        digests = execute(plan, folder, device=device, advance=advance)
        record = _record(plan, digests)
        _write_side_files(plan, folder, record)
        plan.base.check_unchanged()
        verification = verify(folder, record)
        if not verification.ok:
            raise CheckFailed(f"The merge was written and does not verify, so it was removed: {verification.reason}.")
    left_out = tuple(str(path) for path in plan.base.left_out())
    weakest = min(plan.matches, default=Match.WEIGHTS)
    touched = tuple(sorted(tensor.info.name for tensor in plan.changed))
    return MergeResult(out, record, weakest, touched, verification, time.monotonic() - began, _peak_rss(), left_out)


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


def _write_side_files(plan: MergePlan, folder: Path, record: MergeRecord) -> None:
    for relative in plan.base.side_files():
        target = folder / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(plan.base.root / relative, target)
    _restate_config(plan, folder / "config.json")
    if plan.index is not None:
        name, raw = plan.index
        (folder / name).write_bytes(raw)
    (folder / RECORD).write_bytes(record.dump())
    sync_tree(folder)


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
