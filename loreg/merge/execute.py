"""Running plans: shard by shard, untouched ranges by the kernel, touched tensors tile by tile.

Several plans over one base are run as one: each tensor of the base is read once, and edited for every output that
edits it. Memory is, for each thread, a tile and the factors of one tensor; never a tensor, a shard or the model.

A shard that is on the disk is closed, and nobody writes it again: from then on it is verified, from the file, by the
threads that compute the later ones.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

from loreg.checkpoint import Advance, Checkpoint
from loreg.digest import Digest, Hasher
from loreg.errors import BadInput
from loreg.merge.computing import Computation, Sink, keep
from loreg.merge.files import OutputFile, OutputFiles, copy_range
from loreg.merge.journal import Spill
from loreg.merge.layout import Action, OutputShard
from loreg.merge.plan import MergePlan
from loreg.merge.resources import Resources
from loreg.merge.resume import Finished, Written
from loreg.merge.verify import Verifier
from loreg.merge.workers import Turns, drop, workers

_AHEAD = 1
"""Shards begun while one is not yet whole: no thread waits for the last tensor of each."""


@dataclass(frozen=True)
class Target:
    """One output: a plan, the folder that its shards are written into, and what verifies them. ``undo``: whether with
    what takes it back. ``execute`` fills ``written``, by the names of the shards."""

    plan: MergePlan
    folder: Path
    verifier: Verifier
    undo: bool = False
    written: dict[str, Written] = field(default_factory=dict)

    @cached_property
    def finished(self) -> Finished:
        return Finished(self.folder, self.plan.recipe.digest, undo=self.undo)

    @property
    def digests(self) -> dict[str, Digest]:
        """Of the contents of the tensors that changed."""
        return {name: digest for shard in self.written.values() for name, digest in shard.changed.items()}


def execute(targets: Sequence[Target], *, resources: Resources, advance: Advance) -> None:
    """Write every shard into each target's folder that is not there, each flushed to the disk, and have its verifier
    look at all of them.

    The plans are of one base. ``advance`` is told the bytes written. Raises BadInput if an input is unreadable or not
    what was planned, or an element cannot be merged; CheckFailed if the disk is full or fails.
    """
    for target in targets:
        target.finished.keep_only(target.plan.shards)
    begun: deque[_Shard] = deque()
    with (
        ExitStack() as spills,
        OutputFiles() as files,
        workers(resources.device, resources.threads) as pool,
        Turns(pool) as turns,
    ):
        for target in targets:
            spills.callback(target.finished.close)
        work = _Work(files, turns, Computation(resources), advance)
        try:
            for shards in zip(*(target.plan.shards for target in targets), strict=True):
                begun.append(_Shard(list(zip(targets, shards, strict=True)), work))
                if len(begun) > _AHEAD:
                    begun.popleft().end()
            while begun:
                begun.popleft().end()
            files.settle()  # by then all is there for the verifiers
        finally:
            drop([job for shard in begun for job in shard.jobs])


@dataclass(frozen=True)
class _Work:
    """What all shards share."""

    files: OutputFiles
    turns: Turns
    computation: Computation
    advance: Advance


class _Shard:
    """A shard of the base on its way into each output that has not finished it."""

    def __init__(self, outputs: Sequence[tuple[Target, OutputShard]], work: _Work) -> None:
        sinks: list[Sink] = []
        self._open: list[tuple[OutputFile, Callable[[], None]]] = []
        for target, shard in outputs:
            there = target.finished.found(shard, work.advance)
            if there is not None:
                target.written[shard.name] = there
                _verify(target, shard, work.turns)
                continue
            changed: dict[str, Digest] = {}
            spill, combining, base = target.finished.spill(shard), target.plan.combining, target.plan.base.tensors
            output = work.files.create(target.folder / shard.name, shard.header.file_size)
            output.write(memoryview(shard.header.raw), 0)
            sinks += (
                Sink(tensor, shard, output, combining, changed, base.get(tensor.info.name), spill)
                for tensor in shard.tensors
            )
            self._open.append((output, partial(_whole, target, shard, changed, spill, work.turns)))
        self.jobs: list[Future[None]] = [work.turns.submit(job) for job in _jobs(sinks, work)]

    def end(self) -> None:
        """Waits until all is written, and leaves it to be flushed and recorded."""
        try:
            for job in self.jobs:
                job.result()
        finally:
            drop(self.jobs)
        for output, then in self._open:
            output.finish(then)


def _whole(target: Target, shard: OutputShard, changed: dict[str, Digest], spill: Spill | None, turns: Turns) -> None:
    """A shard that is on the disk."""
    target.written[shard.name] = target.finished.record(shard, changed, spill)
    _verify(target, shard, turns)


def _verify(target: Target, shard: OutputShard, turns: Turns) -> None:
    if target.verifier.kind != "none":
        turns.urge(target.verifier.jobs(Checkpoint.open(target.folder / shard.name).shards))


def _jobs(sinks: Sequence[Sink], work: _Work) -> Iterator[Callable[[], None]]:
    """The work on one shard, in independent pieces.

    The largest tensors come first: one that was begun last would leave the other threads without work.
    """
    computed: dict[tuple[Path, int, int, tuple[int, ...]], list[Sink]] = {}
    copied: dict[tuple[Path, int, int], list[Sink]] = {}
    for sink in sinks:
        tensor, stored = sink.tensor, sink.tensor.stored
        if tensor.action is Action.REPLACE or stored is None:
            continue
        place = stored.shard.path, stored.offset, stored.info.nbytes
        if tensor.action is Action.COMPUTE:
            computed.setdefault((*place, sink.view), []).append(sink)
        else:
            copied.setdefault(place, []).append(sink)
    for key, group in computed.items():
        group += copied.pop(key[:3], [])  # what is read for one output is not read again for another
    for group in sorted(computed.values(), key=lambda group: -group[0].tensor.info.nbytes):
        yield partial(work.computation.write, group, work.advance)
    for run in _runs(copied):
        yield partial(copy_range, *run, advance=work.advance)
    for sink in sinks:
        if sink.tensor.action is Action.REPLACE:
            yield partial(_replace, sink, work.advance)
        if sink.tensor.action is not Action.COPY and not sink.edits_original:
            yield partial(keep, sink)


def _runs(
    copied: dict[tuple[Path, int, int], list[Sink]],
) -> Iterator[tuple[Path, int, int, list[tuple[OutputFile, int]]]]:
    """Untouched tensors in as few ranges as their places allow: path, offset, length, and where each goes."""
    run: tuple[Path, int, int, list[tuple[OutputFile, int]]] | None = None
    for (path, offset, size), group in sorted(copied.items(), key=lambda item: item[0]):
        to = [(sink.output, sink.position) for sink in group]
        if run is not None:
            where, begin, length, places = run
            goes_on = [(output, position + length) for output, position in places]
            if (where, begin + length, goes_on) == (path, offset, to):
                run = path, begin, length + size, places
                continue
            yield run
        run = path, offset, size, to
    if run is not None:
        yield run


def _replace(sink: Sink, advance: Advance) -> None:
    """The bytes of the one adapter's full tensor [A5]."""
    info, part = sink.tensor.info, sink.tensor.edit.replaces()
    if part is None or part.full is None:
        raise BadInput(f"{info.name!r} is to be replaced, and nothing replaces it.")
    full = part.adapter.full_tensor(part.full)
    if full.info.nbytes != info.nbytes:
        raise BadInput(f"{part.adapter.label} has {full.info.nbytes:,} bytes for it, expected {info.nbytes:,}.")
    hasher, position = Hasher(), sink.position
    for piece in full.chunks():
        hasher.update(piece)
        sink.output.write(piece, position)
        position += len(piece)
        advance(len(piece))
    sink.changed[info.name] = hasher.digest()
