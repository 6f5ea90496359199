"""Taking a merge back: the base again, bit for bit.

From the base, where it is at hand: its files are copied and hashed again. Subtracting the deltas instead would
drift, as a rounded sum does not remember what it was rounded from.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from loreg.checkpoint import Advance, Checkpoint
from loreg.digest import Digest
from loreg.errors import BadInput, CheckFailed
from loreg.format.base import BaseManifest
from loreg.format.recipe import MergeRecord
from loreg.merge.files import OutputFiles, copy_range
from loreg.merge.output import RECORD
from loreg.merge.verify import check_files
from loreg.staging import refuse_inside, staged, sync_tree


def unmerge_from_base(
    merged: Checkpoint, record: MergeRecord, base: Checkpoint, manifest: BaseManifest, out: Path, advance: Advance
) -> Digest:
    """Put the base at ``out``, having checked that ``merged`` still is what its record says.

    Returns the weights_root of what was written, read back from it. Raises BadInput if the merged model was
    changed since (its changes would be lost), CheckFailed if what was written is not the base, Conflict.
    """
    check = check_files(merged, record, advance)
    if not check.ok:
        raise BadInput(
            f"{merged.root} is not what its loreg.json says: {check.detail}. It was changed after the merge, and "
            "unmerging would lose that."
        )
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
        for relative in beside:
            (folder / relative).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(base.root / relative, folder / relative)
        sync_tree(folder)
        root = Checkpoint.open(folder).manifest(advance=advance).identity.weights_root
        if root != manifest.identity.weights_root:
            raise CheckFailed(
                f"What was written is not the base: expected {manifest.identity.weights_root}, found {root}; the "
                f"base at {base.root} was changed, or the disk is failing."
            )
    return root
