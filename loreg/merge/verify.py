"""Proof that a merged model is what its recipe says, from the files alone and without the executor.

Three kinds. ``probe`` re-reads everything that was written: leaves of what was not touched; for what was,
W'x against Wx + Σ c·B(Ax) for a few x, and some rows element by element, each within the bound that one rounding
allows. ``exact`` recomputes every touched tensor and compares it bit by bit. ``forward`` (``forward.py``) does what
``probe`` does, and runs both models.

A random x alone would be weak: over n columns the allowed error grows with n and a delta's effect with √n. So
half of the x lie in the row space of A, where a delta shows whole, and in the sampled rows an error of one unit
in the last place is found. What ``probe`` can miss is a few wrong elements in rows that are not sampled; the rows
differ from recipe to recipe. ``exact`` misses nothing in the bytes. Both read the adapters as the executor does
(orientation, scale); only ``forward`` would notice a module that was understood wrongly.

A file is read as soon as it is whole, beside others that are still being written: once, in tiles (``rereading.py``).
What it holds is compared with the record when there is one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from loreg.checkpoint import Advance, Checkpoint, FileStamp, Shard, StoredTensor, describe, read_whole
from loreg.errors import BadInput, UsageError
from loreg.format.base import BaseManifest
from loreg.format.fingerprint import BaseTensor, identify
from loreg.format.recipe import MergeRecord, Recipe
from loreg.merge.combining import Combining
from loreg.merge.edits import edits_of, untied_of
from loreg.merge.inputs import CPU, AdapterInput, values
from loreg.merge.layout import Action, Layout, OutputTensor
from loreg.merge.probe import SAMPLED_ROWS, Again, Judge, Probe
from loreg.merge.rereading import Desk, content, judged
from loreg.merge.workers import results, workers
from loreg.tensors import torch_dtype

KINDS = ("probe", "exact", "forward", "none")
Job = Callable[[], None]


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at. ``detail``: what was found, in words."""

    name: str
    ok: bool
    detail: str


@dataclass(frozen=True, slots=True)
class Verification:
    """The outcome of a verification. With no checks (kind ``none``) it is ok, and says nothing."""

    kind: str
    checks: tuple[Check, ...] = ()

    @property
    def ok(self) -> bool:
        return all(check.ok for check in self.checks)

    @property
    def reason(self) -> str:
        """The first failure in words, empty if there is none."""
        return next((f"{check.name}: {check.detail}" for check in self.checks if not check.ok), "")


@dataclass(frozen=True)
class Subject:
    """What has to be there: the merge that ``recipe`` names, of a base and of adapters in the recipe's order."""

    recipe: Recipe
    base: Checkpoint
    base_manifest: BaseManifest
    adapters: tuple[AdapterInput, ...]

    @classmethod
    def of(
        cls, recipe: Recipe, base: Checkpoint, base_manifest: BaseManifest, adapters: Iterable[AdapterInput]
    ) -> Subject:
        return cls(recipe, base, base_manifest, tuple(adapter for adapter in adapters if adapter.weight != 0))

    @cached_property
    def layout(self) -> Layout:
        """Where the tensors of the merged model come from, by the recipe."""
        known = self.base_manifest.by_name()
        return Layout(self.base, known, untied_of(self.adapters), self.recipe.dtype, self.recipe.method)

    @cached_property
    def outputs(self) -> Mapping[str, OutputTensor]:
        """What has to be in the merged model, by name, and how each tensor is made."""
        config: dict[str, Any] = {}
        with suppress(BadInput):
            config = self.base.config()
        shards, _ = self.layout.shards(self.layout.checked(edits_of(self.adapters), config))
        return {tensor.info.name: tensor for shard in shards for tensor in shard.tensors}

    @cached_property
    def touched(self) -> Mapping[str, int]:
        """The tensors that are edited, converted or replaced, in order, each with a seed of its own."""
        names = sorted(name for name, tensor in self.outputs.items() if tensor.action is not Action.COPY)
        return {name: seed for seed, name in enumerate(names, int(self.recipe.digest.hex[:8], 16))}

    @property
    def combining(self) -> Combining:
        return Combining(self.adapters, self.recipe.method, self.recipe.parameters)


class Verifier:
    """Looks at the files of one merged model, each when it is whole, and then says what was found.

    ``kind``: one of KINDS. ``stage``: called once there is something to read; what it returns is told the bytes read,
    by any thread. Raises UsageError.
    """

    def __init__(self, kind: str, subject: Subject, stage: Callable[[], Advance]) -> None:
        if kind not in KINDS:
            raise UsageError(f"{kind!r} is not a kind of verification: expected one of {', '.join(KINDS)}.")
        self.kind, self._subject, self._stage, self._desk = kind, subject, stage, Desk()
        self._lock = threading.Lock()
        self._advance: Advance | None = None
        self._read: dict[str, FileStamp] = {}
        self._found: dict[str, BaseTensor] = {}
        self._wrong: dict[str, str] = {}

    def jobs(self, shards: Iterable[Shard]) -> Sequence[Job]:
        """The work on files that are whole, in independent pieces, the largest first. Any thread may call it."""
        if self.kind == "none":
            return ()
        with self._lock:
            seeds = self._subject.touched
            if self._advance is None:
                self._advance = self._stage()
            stored = []
            for shard in shards:
                self._read[shard.name] = shard.stamp
                stored += [StoredTensor(info, shard) for info in shard.header.tensors]
        stored.sort(key=lambda tensor: -tensor.info.nbytes)
        return [partial(self._look, tensor, seeds.get(tensor.info.name), self._advance) for tensor in stored]

    def _look(self, written: StoredTensor, seed: int | None, advance: Advance) -> None:
        """Into ``_found``, and ``_wrong`` if it is. ``seed``: of a tensor that is to be touched."""
        info = written.info
        output = self._subject.outputs.get(info.name)
        as_told = output is not None and (output.info.dtype, output.info.shape) == (info.dtype, info.shape)
        if output is None or seed is None or not as_told:
            digest, wrong = content(written, self._desk, advance), ""
            if seed is not None:
                wrong = f"is {info.dtype} {list(info.shape)}, and not of the dtype and shape that the recipe gives it"
        elif output.action is Action.REPLACE or output.stored is None:
            digest, part = content(written, self._desk, advance), output.edit.replaces()
            same = part is not None and part.replacement is not None and part.replacement.value.digest == digest
            wrong = "" if same else "is not the tensor that the adapter replaces it by"
        else:
            view, stored = output.edit.view(info.shape), output.stored
            edit = output.edit.load(
                info.name, stored.info.shape, partial(values, stored), self._subject.combining, CPU
            )
            dtypes = torch_dtype(stored.info.dtype, info.name), torch_dtype(info.dtype, info.name)
            judge = self._judge(dtypes, seed)
            digest = judged(written, stored, view, edit, judge, self._desk, advance)
            wrong = judge.wrong
        self._found[info.name] = describe(info, digest)
        if wrong:
            self._wrong[info.name] = wrong

    def _judge(self, dtypes: tuple[torch.dtype, torch.dtype], seed: int) -> Judge:
        space = self._desk.workspace
        return Again(dtypes, space) if self.kind == "exact" else Probe(dtypes, seed, space)

    def verification(self, folder: Path, record: MergeRecord) -> Verification:
        """Once all jobs are done, of all files in ``folder``. Raises BadInput if they are no model."""
        if self.kind == "none":
            return Verification(self.kind)
        merged = Checkpoint.open(folder)
        checks = [self._files(merged, record), *self._leaves(record), self._touched(merged)]
        if self.kind == "forward":
            from loreg.merge.forward import compare_outputs

            checks += compare_outputs(self._subject, merged.root, record)
        return Verification(self.kind, tuple(checks))

    def _files(self, merged: Checkpoint, record: MergeRecord) -> Check:
        for shard in merged.shards:
            if self._read.get(shard.name) != shard.stamp:
                return Check("files", False, f"{shard.name} was changed while it was read, or since")
        return _compared(merged, record, self._found)

    def _leaves(self, record: MergeRecord) -> list[Check]:
        """What was written is what the recipe says; what was not to be touched is the base's."""
        subject = self._subject
        if identify(subject.base_manifest.tensors).weights_root != record.recipe.base:
            return [Check("base", False, f"the base at hand is not {record.recipe.base}")]
        written = {tensor.name: tensor for tensor in record.tensors}
        expected = {name: (tensor.info.dtype, tensor.info.shape) for name, tensor in subject.outputs.items()}
        found = {name: (tensor.dtype, tensor.shape) for name, tensor in written.items()}
        if found != expected:
            name = min(name for name in {*found, *expected} if found.get(name) != expected.get(name))
            detail = f"expected {name!r} as {expected.get(name)}, found {found.get(name)}"
            return [Check("layout", False, detail)]
        untouched = [tensor for tensor in subject.outputs.values() if tensor.action is Action.COPY]
        differing = [tensor.info.name for tensor in untouched if written[tensor.info.name].content != tensor.content]
        if differing:
            detail = f"{_count(differing)} not the base's, though no adapter touches it: first {differing[0]!r}"
            return [Check("untouched", False, detail)]
        return [Check("untouched", True, f"{_count(untouched)} the base's own, byte for byte")]

    def _touched(self, merged: Checkpoint) -> Check:
        touched = self._subject.touched
        if missing := [name for name in touched if name not in merged.tensors]:
            return Check("touched", False, f"{missing[0]!r} is edited by the recipe and not in the output")
        if self._wrong:
            name = min(self._wrong)
            return Check("touched", False, f"{name!r} {self._wrong[name]}")
        found = f"within one rounding of the sum, {SAMPLED_ROWS} rows of each element by element"
        if self.kind == "exact":
            found = "the correctly rounded sum in every element"
        return Check("touched", True, f"{_count(touched)} {found}")


def verify(kind: str, subject: Subject, folder: Path, record: MergeRecord, advance: Advance) -> Verification:
    """A merged model that is there whole. ``advance`` is told the bytes read. Raises UsageError, BadInput."""
    verifier = Verifier(kind, subject, lambda: advance)
    if kind != "none":
        with workers(CPU) as pool:
            for _ in results(pool, verifier.jobs(Checkpoint.open(folder).shards)):
                pass
    return verifier.verification(folder, record)


def check_files(merged: Checkpoint, record: MergeRecord, advance: Advance) -> Check:
    """Every byte of every tensor against ``loreg.json`` [G1]."""
    listed = {tensor.name for tensor in record.tensors}
    found = () if listed ^ set(merged.tensors) else merged.manifest(advance=advance).tensors
    return _compared(merged, record, {tensor.name: tensor for tensor in found})


def _compared(merged: Checkpoint, record: MergeRecord, found: Mapping[str, BaseTensor]) -> Check:
    listed = {tensor.name: tensor for tensor in record.tensors}
    if strangers := sorted(set(listed) ^ set(merged.tensors)):
        place = "the files" if strangers[0] in listed else "loreg.json"
        return Check("files", False, f"{strangers[0]!r} is missing from {place}")
    differing = [name for name in merged.tensors if found.get(name) != listed[name]]
    if differing:
        return Check("files", False, f"{_count(differing)} not as loreg.json says, first {min(differing)!r}")
    return Check("files", True, f"{_count(listed)} as loreg.json says, {record.weights_root}")


def _count(tensors: Sized) -> str:
    return "1 tensor is" if len(tensors) == 1 else f"{len(tensors)} tensors are"


def require_record(folder: Path) -> MergeRecord:
    """``loreg.json`` of ``folder``. Raises BadInput if there is none, or it is damaged."""
    path = folder / "loreg.json"
    if not path.is_file():
        raise BadInput(f"{folder} has no loreg.json: expected a directory that 'loreg merge' wrote.")
    return MergeRecord.parse(read_whole(path))
