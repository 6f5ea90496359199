"""Taking a merge back: the base again, bit for bit.

From the base, where it is at hand: its files are copied and hashed again. Else from the journal that the merge left:
what taking the deltas back gives, each element correctly rounded, is the base but for the few that the journal
corrects. Without it that would drift, as a rounded sum does not remember what it was rounded from.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from loreg.checkpoint import Advance, Checkpoint
from loreg.digest import Digest
from loreg.errors import BadInput, BaseMismatch, CheckFailed
from loreg.format.base import BaseManifest
from loreg.format.journal import BESIDE, HEADER
from loreg.format.recipe import MergeRecord
from loreg.format.safetensors import Header, parse_header
from loreg.merge.files import OutputFiles, copy_range
from loreg.merge.inputs import AdapterInput
from loreg.merge.journal import Journal
from loreg.merge.output import RECORD
from loreg.merge.resources import Resources
from loreg.merge.taking import Taking
from loreg.merge.verify import check_files
from loreg.merge.workers import results, workers
from loreg.staging import refuse_inside, staged, sync_tree


def unmerge_from_base(
    merged: Checkpoint, record: MergeRecord, base: Checkpoint, manifest: BaseManifest, out: Path, advance: Advance
) -> Digest:
    """Put the base at ``out``, having checked that ``merged`` still is what its record says.

    Returns the weights_root of what was written, read back from it. Raises BadInput if the merged model was
    changed since (its changes would be lost), CheckFailed if what was written is not the base, Conflict.
    """
    _require_unchanged(merged, record, advance)
    for source in (merged.root, base.root):
        refuse_inside(out, source)
    with staged(out, manifest.identity.weights_root) as folder:
        with OutputFiles() as files:
            for shard in base.shards:
                output = files.create(folder / shard.name, shard.stamp.size)
                copy_range(shard.path, 0, shard.stamp.size, [(output, 0)], advance)
                output.finish()
        beside = base.side_files() + ([base.index.relative_to(base.root)] if base.index else [])
        if (base.root / RECORD).is_file():  # a base that is itself a merge keeps saying so
            beside.append(Path(RECORD))
        _copy_beside(base.root, beside, folder)
        return _written(folder, record, f"the base at {base.root} was changed, or the disk is failing", (), advance)


def unmerge_from_journal(
    merged: Checkpoint,
    record: MergeRecord,
    journal: Journal,
    adapters: Sequence[AdapterInput],
    out: Path,
    resources: Resources,
    advance: Advance,
) -> Digest:
    """As ``unmerge_from_base``, of the merged model, its journal and its adapters, in the recipe's order.

    Raises BaseMismatch if the journal is another merge's, BadInput if it is damaged or the adapters are others.
    """
    of = journal.undoes
    # [U5]
    if (of.recipe, of.base, of.weights_root) != (record.recipe.digest, record.recipe.base, record.weights_root):
        raise BaseMismatch(f"{journal.path} belongs to another merge than {merged.root}: give the base with --base.")
    _require_unchanged(merged, record, advance)
    refuse_inside(out, merged.root)
    headers, beside = journal.named(HEADER), journal.named(BESIDE)
    with staged(out, record.recipe.base) as folder:
        taking = Taking(merged, journal, adapters, record, resources)
        with ExitStack() as stack:
            files = stack.enter_context(OutputFiles())
            pool = stack.enter_context(workers(resources.device, resources.threads))
            for shard in merged.shards:
                header = _header(headers.get(shard.name), shard.header, f"{journal.path}, {HEADER}{shard.name}")
                output = files.create(folder / shard.name, header.file_size)
                output.write(memoryview(header.raw), 0)
                jobs = [partial(taking.write, info, header, output, advance) for info in header.tensors]
                for _ in results(pool, jobs):
                    pass
                output.finish()
        index = [merged.index.relative_to(merged.root)] if merged.index else []
        _copy_beside(merged.root, merged.side_files() + index, folder)
        for name, raw in beside.items():
            if Path(name).name != name:
                raise BadInput(f"{journal.path} has a file {name!r}: expected a name in the directory of the model.")
            (folder / name).write_bytes(raw)
        for adapter in adapters:
            adapter.check_unchanged()
        known = [tensor for adapter in adapters for tensor in adapter.manifest.base.touched.items()]
        reason = f"{journal.path} is damaged, or not of this merge"
        return _written(folder, record, reason, known, advance)


def _require_unchanged(merged: Checkpoint, record: MergeRecord, advance: Advance) -> None:
    check = check_files(merged, record, advance)
    if not check.ok:
        raise BadInput(
            f"{merged.root} is not what its loreg.json says: {check.detail}. It was changed after the merge, and "
            "unmerging would lose that."
        )


def _header(raw: bytes | None, merged: Header, what: str) -> Header:
    """The base's header of a shard: the merged one's, unless the journal has another."""
    if raw is None:
        return merged
    if len(raw) < 8 or int.from_bytes(raw[:8], "little") != len(raw) - 8:
        raise BadInput(f"{what} is not the header of a safetensors file: its length is not what it says.")
    return parse_header(raw, None, what=what)


def _copy_beside(root: Path, names: Sequence[Path], folder: Path) -> None:
    for relative in names:
        (folder / relative).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(root / relative, folder / relative)


def _written(
    folder: Path, record: MergeRecord, reason: str, known: Sequence[tuple[str, Digest]], advance: Advance
) -> Digest:
    """Flushes what was written and reads it back: the root, which has to be the base's."""
    sync_tree(folder)
    manifest = Checkpoint.open(folder).manifest(advance=advance)
    root = manifest.identity.weights_root
    if root != record.recipe.base:  # [U5]
        leaves = {tensor.name: tensor.leaf for tensor in manifest.tensors}
        wrong = sorted({name for name, leaf in known if leaves.get(name) != leaf})
        where = f", for example in {wrong[0]!r}" if wrong else ""
        raise CheckFailed(
            f"What was written is not the base: expected {record.recipe.base}, found {root}{where}; {reason}."
        )
    return root
