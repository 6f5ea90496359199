"""Proof that a merged model is what its recipe says, from the files alone and without the executor.

Three kinds. ``probe`` re-reads everything that was written: leaves of what was not touched; for what was,
W'x against Wx + Σ c·B(Ax) in float64 for a few x, and some rows element by element, each within the bound
that one rounding allows. ``exact`` recomputes every touched tensor and compares digests. ``forward``
(``forward.py``) does what ``probe`` does, and runs both models.

A random x alone would be weak: over n columns the allowed error grows with n and a delta's effect with √n. So
half of the x lie in the row space of A, where a delta shows whole, and in the sampled rows an error of one unit
in the last place is found. What ``probe`` can miss is a few wrong elements in rows that are not sampled; the rows
differ from recipe to recipe. ``exact`` misses nothing in the bytes. Both read the adapters as the executor does
(orientation, scale); only ``forward`` would notice a module that was understood wrongly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from loreg.algebra.edits import WeightedSum
from loreg.algebra.rounding import bits, half_ulp
from loreg.checkpoint import Advance, Checkpoint, StoredTensor, read_whole
from loreg.digest import Digest, Hasher
from loreg.errors import BadInput, UsageError
from loreg.format.base import BaseManifest
from loreg.format.fingerprint import identify
from loreg.format.recipe import MergeRecord
from loreg.merge.combining import Combining
from loreg.merge.edits import TensorEdit, edits_of, untied_of
from loreg.merge.inputs import CPU, AdapterInput, values
from loreg.merge.layout import Action, Layout, OutputTensor
from loreg.merge.workers import results, workers

KINDS = ("probe", "exact", "forward", "none")
_PROBES = 4
_ROWS = 64
_BLOCK_ELEMENTS = 1 << 18
# float64 sums of up to 2^20 terms, and the rounding of c·B: a factor far above what any order of summation needs.
_SLACK = 2.0**-30


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
    """What is verified: a merged model against the base and adapters that its record names."""

    merged: Checkpoint
    record: MergeRecord
    base: Checkpoint
    base_manifest: BaseManifest
    adapters: tuple[AdapterInput, ...]

    @classmethod
    def of(
        cls,
        folder: Path,
        record: MergeRecord,
        base: Checkpoint,
        base_manifest: BaseManifest,
        adapters: Iterable[AdapterInput],
    ) -> Subject:
        kept = tuple(adapter for adapter in adapters if adapter.weight != 0)  # in the recipe's order
        return cls(Checkpoint.open(folder), record, base, base_manifest, kept)

    @cached_property
    def layout(self) -> Layout:
        """Where the tensors of the merged model come from, by the recipe."""
        recipe, known = self.record.recipe, self.base_manifest.by_name()
        return Layout(self.base, known, untied_of(self.adapters), recipe.dtype, recipe.method)

    @cached_property
    def outputs(self) -> Mapping[str, OutputTensor]:
        """What has to be in the merged model, by name, and how each tensor is made."""
        config: dict[str, Any] = {}
        with suppress(BadInput):
            config = self.base.config()
        shards, _ = self.layout.shards(self.layout.checked(edits_of(self.adapters), config))
        return {tensor.info.name: tensor for shard in shards for tensor in shard.tensors}

    @property
    def combining(self) -> Combining:
        recipe = self.record.recipe
        return Combining(self.adapters, recipe.method, recipe.parameters)


def verify(kind: str, subject: Subject, advance: Advance) -> Verification:
    """Run the checks of ``kind`` (one of KINDS). ``advance`` is told the bytes read. Raises UsageError."""
    if kind not in KINDS:
        raise UsageError(f"{kind!r} is not a kind of verification: expected one of {', '.join(KINDS)}.")
    if kind == "none":
        return Verification(kind)
    if kind == "forward":
        from loreg.merge.forward import compare_outputs

        return Verification(kind, (*_leaves(subject, advance), _probed(subject), *compare_outputs(subject)))
    return Verification(kind, (*_leaves(subject, advance), _probed(subject) if kind == "probe" else _exact(subject)))


def check_files(merged: Checkpoint, record: MergeRecord, advance: Advance) -> Check:
    """Every byte of every tensor against ``loreg.json`` [G1]."""
    listed = {tensor.name: tensor for tensor in record.tensors}
    if strangers := sorted(set(listed) ^ set(merged.tensors)):
        place = "the files" if strangers[0] in listed else "loreg.json"
        return Check("files", False, f"{strangers[0]!r} is missing from {place}")
    found = merged.manifest(advance=advance)
    differing = [tensor.name for tensor in found.tensors if tensor != listed[tensor.name]]
    if differing:
        return Check("files", False, f"{_count(differing)} not as loreg.json says, first {differing[0]!r}")
    return Check("files", True, f"{_count(listed)} as loreg.json says, {record.weights_root}")


def _count(tensors: Sized) -> str:
    return "1 tensor is" if len(tensors) == 1 else f"{len(tensors)} tensors are"


def _leaves(subject: Subject, advance: Advance) -> list[Check]:
    """What was written is what the record says; what was not to be touched is the base's."""
    files = check_files(subject.merged, subject.record, advance)
    base = subject.base_manifest
    if identify(base.tensors).weights_root != subject.record.recipe.base:
        return [files, Check("base", False, f"the base at hand is not {subject.record.recipe.base}")]
    written = {tensor.name: tensor for tensor in subject.record.tensors}
    expected = {name: (tensor.info.dtype, tensor.info.shape) for name, tensor in subject.outputs.items()}
    found = {name: (tensor.dtype, tensor.shape) for name, tensor in written.items()}
    if found != expected:
        name = min(name for name in {*found, *expected} if found.get(name) != expected.get(name))
        detail = f"expected {name!r} as {expected.get(name)}, found {found.get(name)}"
        return [files, Check("layout", False, detail)]
    untouched = [tensor for tensor in subject.outputs.values() if tensor.action is Action.COPY]
    differing = [tensor.info.name for tensor in untouched if written[tensor.info.name].content != tensor.content]
    if differing:
        detail = f"{_count(differing)} not the base's, though no adapter touches it: first {differing[0]!r}"
        return [files, Check("untouched", False, detail)]
    return [files, Check("untouched", True, f"{_count(untouched)} the base's own, byte for byte")]


def _probed(subject: Subject) -> Check:
    return _touched(subject, _probe, f"within one rounding of the sum, {_ROWS} rows of each element by element")


def _exact(subject: Subject) -> Check:
    return _touched(subject, _recompute, "the correctly rounded sum in every element")


def _touched(subject: Subject, judge: Callable[[_Weight, int], str], found: str) -> Check:
    """``judge`` on every tensor that was edited or converted; it returns what is wrong, or nothing.

    ``found``: what is then true of them.
    """
    outputs = {name: tensor for name, tensor in sorted(subject.outputs.items()) if tensor.action is not Action.COPY}
    missing = sorted(set(outputs) - set(subject.merged.tensors))
    if missing:
        return Check("touched", False, f"{missing[0]!r} is edited by the recipe and not in the output")

    def look(seed: int, name: str) -> str:
        merged, output = subject.merged.tensors[name], outputs[name]
        stored = output.stored
        if output.action is Action.REPLACE or stored is None:
            return _replaced(merged, output.edit)
        view = output.edit.view(output.info.shape)
        edit = output.edit.load(name, stored.info.shape, partial(values, stored), subject.combining, CPU)
        return judge(_Weight(values(stored).reshape(view), values(merged).reshape(view), edit), seed)

    start = int(subject.record.recipe.digest.hex[:8], 16)
    jobs = [partial(look, seed, name) for seed, name in enumerate(outputs, start)]
    with workers(torch.device("cpu")) as pool:
        for name, wrong in zip(outputs, results(pool, jobs), strict=True):
            if wrong:
                return Check("touched", False, f"{name!r} {wrong}")
    return Check("touched", True, f"{_count(outputs)} {found}")


def _replaced(merged: StoredTensor, edit: TensorEdit) -> str:
    part = edit.replaces()
    expected = part.replacement.value.digest if part and part.replacement else None
    return "" if _content(merged) == expected else "is not the tensor that the adapter replaces it by"


def _content(stored: StoredTensor) -> Digest:
    hasher = Hasher(Hasher.ALL)
    for chunk in stored.chunks():
        hasher.update(chunk)
    return hasher.digest()


@dataclass(frozen=True, slots=True, eq=False)
class _Weight:
    """A weight before and after the merge, in the shape in which it was edited, and the edit."""

    base: torch.Tensor
    written: torch.Tensor
    edit: WeightedSum

    def matrices(self) -> Iterator[_Weight]:
        """Itself as a matrix: a vector as rows of one element, a stack one matrix after the other."""
        if self.base.ndim == 3:
            for index in range(self.base.shape[0]):
                edit = self.edit[index] if self.edit.shape else self.edit
                yield _Weight(self.base[index], self.written[index], edit)
        elif self.base.ndim == 2:
            yield self
        else:
            dense = tuple(term.reshape((-1, 1)) for term in self.edit.dense)
            yield _Weight(self.base[:, None], self.written[:, None], WeightedSum(dense=dense))


def _recompute(weight: _Weight, seed: int) -> str:
    """The whole tensor again, in one piece, through the algebra."""
    again = weight.edit.apply(weight.base, weight.written.dtype)
    wrong = int((bits(again) != bits(weight.written)).sum())
    return f"has {wrong} elements that are not the correctly rounded sums" if wrong else ""


def _probe(weight: _Weight, seed: int) -> str:
    return next((wrong for matrix in weight.matrices() if (wrong := _probe_matrix(matrix, seed))), "")


def _probe_matrix(weight: _Weight, seed: int) -> str:
    """Block by block in float64: (W' - W)x against Σ c·B(Ax) for a few x, and whole rows element by element."""
    W, written, edit = weight.base, weight.written, weight.edit
    rows, columns = W.shape
    left, right, size = _stacked(edit, rows, columns)
    vectors = _vectors(right, columns, seed)
    sizes, added, spread = vectors.abs(), right @ vectors, size @ vectors.abs()
    # One rounding moves a number by at most half a unit: eps/2 of it, or half the smallest subnormal.
    info = torch.finfo(written.dtype)
    unit, least = info.eps / 2 + _SLACK, info.tiny * info.eps / 2
    sampled = _sample(rows, seed)
    step = max(1, _BLOCK_ELEMENTS // max(1, columns))
    for first in range(0, rows, step):
        here = slice(first, min(rows, first + step))
        result = written[here].double()
        difference = result - W[here].double()
        bound = unit * (result.abs() @ sizes) + least * sizes.sum(0) + _SLACK * (left[here].abs() @ spread)
        for term in edit.dense:
            dense = term.scale * term.value[here].double()
            difference -= dense
            bound += _SLACK * (dense.abs() @ sizes)
        if bool(((difference @ vectors - left[here] @ added).abs() > bound).any()):
            return f"fails a probe in rows {first} to {here.stop}: W'x is not Wx + Σ c·B(Ax) within one rounding"
        picks = sampled[(sampled >= first) & (sampled < here.stop)]
        inside = picks - first
        wrong = (difference[inside] - left[picks] @ right).abs()
        terms = result[inside].abs() + left[picks].abs() @ size
        terms += sum((term.scale * term.value[picks].double()).abs() for term in edit.dense)
        if bool((wrong > half_ulp(written[picks]) + _SLACK * 2.0**-16 * terms).any()):
            return f"has an element in rows {first} to {here.stop} that is not the sum within one rounding"
    return ""


def _stacked(edit: WeightedSum, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """All low-rank terms as c·left (rows, R), right (R, columns) and |right|, in float64."""
    if not edit.low_rank:
        # One zero term keeps the arithmetic below free of a case of its own.
        empty = torch.zeros(1, columns, dtype=torch.float64)
        return torch.zeros(rows, 1, dtype=torch.float64), empty, empty
    left = torch.cat([delta.scale * delta.left.double() for delta in edit.low_rank], dim=1)
    right = torch.cat([delta.right.double() for delta in edit.low_rank], dim=0)
    return left, right, right.abs()


def _vectors(right: torch.Tensor, columns: int, seed: int) -> torch.Tensor:
    """(columns, _PROBES), float64: signs at random, and combinations of the rows of A scaled to the same size."""
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (columns, _PROBES // 2), generator=generator).double() * 2 - 1
    mixed = right.T @ torch.randn(len(right), _PROBES // 2, generator=generator, dtype=torch.float64)
    largest = mixed.abs().amax(dim=0, keepdim=True) if columns else mixed
    return torch.cat([signs, mixed / torch.where(largest > 0, largest, 1.0)], dim=1)


def _sample(rows: int, seed: int) -> torch.Tensor:
    """A few row numbers at random, int64."""
    return torch.randperm(rows, generator=torch.Generator().manual_seed(seed + 1))[:_ROWS]


def require_record(folder: Path) -> MergeRecord:
    """``loreg.json`` of ``folder``. Raises BadInput if there is none, or it is damaged."""
    path = folder / "loreg.json"
    if not path.is_file():
        raise BadInput(f"{folder} has no loreg.json: expected a directory that 'loreg merge' wrote.")
    return MergeRecord.parse(read_whole(path))
