"""What a killed merge had finished: shards that the next run of the same recipe need not write again.

A shard is finished once it is on the disk, and then its record, which says by digests what was written. What is read
back has to have these, and the header that the plan gives the shard: nothing of another recipe, of a base that was
split otherwise, or of a failing disk is taken for this merge's.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISDIR, S_ISREG

from loreg.checkpoint import Advance, FileStamp, Shard, StoredTensor
from loreg.digest import Digest, Hasher
from loreg.errors import LoregError
from loreg.merge.journal import Entry, Spill, holds
from loreg.merge.layout import Action, OutputShard, OutputTensor

_FOLDER = ".finished"


@dataclass(frozen=True, slots=True)
class Written:
    """A shard that is on the disk: the content digests of what ``changed`` in it, and what undoes that: ``undo``, the
    entries of the journal by their names, in the file ``spill``; None without."""

    changed: dict[str, Digest]
    spill: Path
    undo: dict[str, Entry] | None


class Finished:
    """The finished shards in ``folder``, of the merge of ``recipe``. ``undo``: whether with what undoes them."""

    def __init__(self, folder: Path, recipe: Digest, *, undo: bool = False) -> None:
        self._folder, self._recipe, self._undo = folder, recipe, undo
        self._records = folder / _FOLDER
        self._spills: list[Spill] = []

    def close(self) -> None:
        """The spills, those of shards that were not finished too."""
        for spill in self._spills:
            spill.close()

    def keep_only(self, shards: Iterable[OutputShard]) -> None:
        """Removes whatever else a killed merge left: what it had copied from beside the base may be stale. A link,
        and a file that has another name too, would be somebody else's to change in the output."""
        kept = {shard.name for shard in shards}
        for path in self._folder.iterdir():
            status = path.lstat()
            if S_ISDIR(status.st_mode):
                if path != self._records:
                    shutil.rmtree(path)
            elif path.name not in kept or not S_ISREG(status.st_mode) or status.st_nlink > 1:
                path.unlink()

    def spill(self, shard: OutputShard) -> Spill | None:
        """For what undoes a shard, if that is wanted."""
        if not self._undo:
            return None
        self._spills.append(Spill(self._spilled(shard)))
        return self._spills[-1]

    def _spilled(self, shard: OutputShard) -> Path:
        return self._records / f"{shard.name}.undo"

    def found(self, shard: OutputShard, advance: Advance) -> Written | None:
        """What the merge changed in a shard that is there whole, of whose bytes ``advance`` is told.

        None, and no file of its name, if it is to be written.
        """
        said, path = self._record(shard), self._folder / shard.name
        if said is not None and _holds(path, shard, said.changed) and self._undoes(shard, said):
            advance(sum(tensor.info.nbytes for tensor in shard.tensors))
            return said
        path.unlink(missing_ok=True)
        for left in (self._spilled(shard), self._records / f"{shard.name}.json"):
            left.unlink(missing_ok=True)
        return None

    def _undoes(self, shard: OutputShard, said: Written) -> bool:
        if not self._undo:
            return True
        try:
            return said.undo is not None and holds(self._spilled(shard), said.undo)
        except (OSError, ValueError, LoregError):
            return False

    def record(self, shard: OutputShard, changed: Mapping[str, Digest], spill: Spill | None) -> Written:
        """That the shard is on the disk, with tensors of these digests ``changed``."""
        self._records.mkdir(exist_ok=True)
        if spill is not None:
            spill.flush()
        entries = None if spill is None else spill.entries
        document = {
            "recipe": self._recipe.hex,
            "changed": {name: digest.hex for name, digest in changed.items()},
            "undo": None if entries is None else {name: entry.to_json() for name, entry in entries.items()},
        }
        fresh = self._records / f"{shard.name}.new"
        with fresh.open("w", encoding="utf-8") as file:
            json.dump(document, file)
            file.flush()
            os.fsync(file.fileno())
        fresh.rename(fresh.with_suffix(".json"))
        return Written(dict(changed), self._spilled(shard), entries)

    def forget(self) -> None:
        """All records: the merge is whole."""
        if self._records.exists():
            shutil.rmtree(self._records)

    def _record(self, shard: OutputShard) -> Written | None:
        try:
            document = json.loads((self._records / f"{shard.name}.json").read_bytes())
            if document["recipe"] != self._recipe.hex:
                return None
            changed = {str(name): Digest(digest) for name, digest in document["changed"].items()}
            undo = document["undo"]
            entries = None if undo is None else {str(name): Entry.from_json(entry) for name, entry in undo.items()}
            return Written(changed, self._spilled(shard), entries)
        except (
            OSError,
            ValueError,
            LookupError,
            TypeError,
            AttributeError,
            ArithmeticError,
            RecursionError,
            LoregError,
        ):
            return None  # none, or one that was not written to its end


def _holds(path: Path, shard: OutputShard, changed: Mapping[str, Digest]) -> bool:
    """Whether the file has the planned header and, for each tensor, the bytes that it is to have."""
    if {tensor.info.name for tensor in shard.tensors if tensor.action is not Action.COPY} != set(changed):
        return False
    try:
        stamp = FileStamp.of(path)
        if stamp.size != shard.header.file_size:
            return False
        with path.open("rb") as file:
            if file.read(len(shard.header.raw)) != bytes(shard.header.raw):
                return False
        there = Shard(path, shard.header, stamp)
        return all(
            _content(tensor, there) == changed.get(tensor.info.name, tensor.content) for tensor in shard.tensors
        )
    except (OSError, LoregError):
        return False


def _content(tensor: OutputTensor, shard: Shard) -> Digest:
    hasher = Hasher(threads=Hasher.ALL)
    for piece in StoredTensor(tensor.info, shard).chunks():
        hasher.update(piece)
    return hasher.digest()
