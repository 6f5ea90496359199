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

from collections.abc import Callable, Iterable, Mapping, Sized
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path

import torch

from loreg.algebra.edits import WeightedSum
from loreg.algebra.rounding import half_ulp
from loreg.checkpoint import Advance, Checkpoint, StoredTensor
from loreg.digest import Digest, Hasher
from loreg.errors import BadInput, UsageError
from loreg.format.base import BaseManifest
from loreg.format.fingerprint import identify
from loreg.format.recipe import DTYPES, MergeRecord
from loreg.merge.inputs import AdapterInput, TensorEdit, edits_of, mapped
from loreg.merge.workers import results, workers
from loreg.tensors import to_memory

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
        kept = tuple(adapter for adapter in adapters if adapter.weight != 0)
        return cls(Checkpoint.open(folder), record, base, base_manifest, kept)

    def edits(self) -> Mapping[str, TensorEdit]:
        return edits_of(self.adapters)


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
    edits, expected = subject.edits(), _layout(subject)
    written = {tensor.name: tensor for tensor in subject.record.tensors}
    found = {name: (tensor.dtype, tensor.shape) for name, tensor in written.items()}
    if found != expected:
        name = min(name for name in {*found, *expected} if found.get(name) != expected.get(name))
        detail = f"expected {name!r} as {expected.get(name)}, found {found.get(name)}"
        return [files, Check("layout", False, detail)]
    untouched = [t for t in base.tensors if t.name not in edits and expected[t.name][0] == t.dtype]
    differing = [tensor.name for tensor in untouched if written.get(tensor.name) != tensor]
    if differing:
        detail = f"{_count(differing)} not the base's, though no adapter touches it: first {differing[0]!r}"
        return [files, Check("untouched", False, detail)]
    return [files, Check("untouched", True, f"{_count(untouched)} the base's own, byte for byte")]


def _layout(subject: Subject) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The dtype and shape of every tensor that the recipe makes of the base."""
    converted = subject.record.recipe.dtype
    layout = {
        name: (value.dtype, value.shape)
        for adapter in subject.adapters
        for name, value in ((name, full.value) for name, full in adapter.manifest.full.items())
    }
    for tensor in subject.base_manifest.tensors:
        dtype = converted if converted is not None and tensor.dtype in DTYPES else tensor.dtype
        layout[tensor.name] = dtype, tensor.shape
    return layout


def _probed(subject: Subject) -> Check:
    return _touched(subject, _probe, f"within one rounding of the sum, {_ROWS} rows of each element by element")


def _exact(subject: Subject) -> Check:
    return _touched(subject, _recompute, "the correctly rounded sum in every element")


def _touched(
    subject: Subject, judge: Callable[[StoredTensor, StoredTensor, WeightedSum, int], str], found: str
) -> Check:
    """``judge`` on every tensor that was edited or converted; it returns what is wrong, or nothing.

    ``found``: what is then true of them.
    """
    edits = subject.edits()
    names = [
        name
        for name, merged in sorted(subject.merged.tensors.items())
        if name in edits
        or (name in subject.base.tensors and subject.base.tensors[name].info.dtype != merged.info.dtype)
    ]

    def look(seed: int, name: str) -> str:
        merged, stored, edit = (
            subject.merged.tensors[name],
            subject.base.tensors.get(name),
            edits.get(name, TensorEdit()),
        )
        replacing = edit.replaces()
        if stored is None or (replacing and replacing.manifest.full[name].value.dtype == merged.info.dtype):
            return _replaced(name, merged, edit)
        return judge(merged, stored, edit.load(stored), seed)

    start = int(subject.record.recipe.digest.hex[:8], 16)
    jobs = [partial(look, seed, name) for seed, name in enumerate(names, start)]
    with workers(torch.device("cpu")) as pool:
        for name, wrong in zip(names, results(pool, jobs), strict=True):
            if wrong:
                return Check("touched", False, f"{name!r} {wrong}")
    missing = sorted(set(edits) - set(subject.merged.tensors))
    if missing:
        return Check("touched", False, f"{missing[0]!r} is edited by the recipe and not in the output")
    return Check("touched", True, f"{_count(names)} {found}")


def _replaced(name: str, merged: StoredTensor, edit: TensorEdit) -> str:
    expected = edit.full[0].manifest.full[name].value.digest
    return "" if _content(merged) == expected else "is not the tensor that the adapter replaces it by"


def _content(stored: StoredTensor) -> Digest:
    hasher = Hasher(Hasher.ALL)
    for chunk in stored.chunks():
        hasher.update(chunk)
    return hasher.digest()


def _recompute(merged: StoredTensor, stored: StoredTensor, edit: WeightedSum, seed: int) -> str:
    """The whole tensor again, in one piece, through the algebra."""
    W, written = _matrix(stored), _matrix(merged)
    dense = tuple(type(term)(term.value.reshape(W.shape), term.scale) for term in edit.dense)
    again = WeightedSum(edit.low_rank, dense).apply(W, written.dtype)
    if Digest.of(to_memory(again)) == _content(merged):
        return ""
    wrong = int((again.view(torch.int16 if again.itemsize == 2 else torch.int32)
                 != written.view(torch.int16 if again.itemsize == 2 else torch.int32)).sum())  # fmt: skip
    return f"has {wrong} elements that are not the correctly rounded sums"


def _probe(merged: StoredTensor, stored: StoredTensor, edit: WeightedSum, seed: int) -> str:
    """Block by block in float64: (W' - W)x against Σ c·B(Ax) for a few x, and whole rows element by element."""
    W, written = _matrix(stored), _matrix(merged)
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
            dense = term.scale * term.value.reshape(W.shape)[here].double()
            difference -= dense
            bound += _SLACK * (dense.abs() @ sizes)
        if bool(((difference @ vectors - left[here] @ added).abs() > bound).any()):
            return f"fails a probe in rows {first} to {here.stop}: W'x is not Wx + Σ c·B(Ax) within one rounding"
        picks = sampled[(sampled >= first) & (sampled < here.stop)]
        inside = picks - first
        wrong = (difference[inside] - left[picks] @ right).abs()
        terms = result[inside].abs() + left[picks].abs() @ size
        terms += sum((term.scale * term.value.reshape(W.shape)[picks].double()).abs() for term in edit.dense)
        if bool((wrong > half_ulp(written[picks]) + _SLACK * 2.0**-16 * terms).any()):
            return f"has an element in rows {first} to {here.stop} that is not the sum within one rounding"
    return ""


def _matrix(stored: StoredTensor) -> torch.Tensor:
    """A view of the file as (rows, columns); a vector, or anything that is no matrix, as rows of one element."""
    info = stored.info
    tensor = mapped(stored.shard.path, stored.offset, info.nbytes, info.dtype, info.shape, info.name)
    return tensor if len(info.shape) == 2 else tensor.reshape(prod(info.shape), 1)


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
    return MergeRecord.parse(path.read_bytes())
