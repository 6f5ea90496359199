"""Taking the edits of a merge out of one tensor again: predict, correct, write."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import prod

import torch

from loreg.algebra.edits import Prepared, Stacked
from loreg.checkpoint import Advance, Checkpoint, StoredTensor, open_binary, read_exactly
from loreg.errors import BadInput
from loreg.format.recipe import MergeRecord
from loreg.format.safetensors import Header, TensorInfo
from loreg.merge.combining import Combining
from loreg.merge.computing import Scratch
from loreg.merge.edits import TensorEdit, edits_of
from loreg.merge.files import OutputFile, copy_range
from loreg.merge.inputs import AdapterInput
from loreg.merge.journal import Journal, width_of
from loreg.merge.resources import Resources
from loreg.tensors import from_buffer, torch_dtype


class Taking:
    """What the threads of an unmerge share: the merged model, what was added to it, and the journal."""

    def __init__(
        self,
        merged: Checkpoint,
        journal: Journal,
        adapters: Sequence[AdapterInput],
        record: MergeRecord,
        resources: Resources,
    ) -> None:
        kept = tuple(adapter for adapter in adapters if adapter.weight != 0)
        self._merged, self._journal, self._edits = merged, journal, edits_of(kept)
        self._combining = Combining(kept, record.recipe.method, record.recipe.parameters)
        self._scratch = Scratch(resources)

    def write(self, base: TensorInfo, header: Header, output: OutputFile, advance: Advance) -> None:
        """The tensor ``base`` of a shard with this ``header``. Raises BadInput for a journal that does not fit."""
        merged, position = self._merged.tensors.get(base.name), header.data_start + base.start
        if base.name not in self._journal.tensors:
            if merged is None or (merged.info.dtype, merged.info.shape) != (base.dtype, base.shape):
                raise BadInput(
                    f"{self._journal.path} does not say what {base.name!r} was: give the base with --base."
                )
            copy_range(merged.shard.path, merged.offset, base.nbytes, [(output, position)], advance)
            return
        edit, width = self._edits.get(base.name, TensorEdit()), width_of(base)
        shape = edit.view(base.shape) if merged and merged.info.shape == base.shape else base.shape
        if prod(shape) * width != base.nbytes:
            shape = (base.nbytes // width,)
        row = prod(shape[-1:]) if len(shape) > 1 else 1
        step = max(1, len(self._scratch.tile) // (8 * row)) if row else 1
        corrections = self._journal.corrections(base)
        with self._scratch.context():
            predicted = _Predicted(base, merged, edit, self._combining, self._scratch)
            for first in range(0, prod(shape) // row if row else 0, step):
                count = min(step, prod(shape) // row - first)
                into = self._scratch.spare(count * row * width)
                corrections.apply(into, partial(predicted.rows, first, count, into))
                output.write(into, position)
                position += len(into)
                advance(len(into))
        corrections.finish()


class _Predicted:
    """What taking the edit back gives, by rows; prepared when it is first asked for."""

    def __init__(
        self, base: TensorInfo, merged: StoredTensor | None, edit: TensorEdit, combining: Combining, scratch: Scratch
    ) -> None:
        self._base, self._merged, self._edit, self._combining, self._scratch = base, merged, edit, combining, scratch
        self._prepared: Prepared | Stacked | None = None

    def rows(self, first: int, count: int, into: memoryview) -> None:
        merged, base, scratch = self._merged, self._base, self._scratch
        if merged is None or merged.info.shape != base.shape:
            raise BadInput(f"the journal corrects {base.name!r}, which the merged model has not in that shape.")
        dtype, target = torch_dtype(merged.info.dtype, base.name), torch_dtype(base.dtype, base.name)
        view = self._edit.view(base.shape)
        if self._prepared is None:
            edit = self._edit.load(base.name, base.shape, self._reads, self._combining, scratch.device)
            self._prepared = (-edit).prepare(view, dtype, target, scratch.device, workspace=scratch.workspace)
        columns = view[-1:] if len(view) > 1 else ()
        size = count * prod(columns) * dtype.itemsize
        raw = scratch.tile[:size] if size <= len(scratch.tile) else memoryview(bytearray(size))
        with open_binary(merged.shard.path) as file:
            at = merged.offset + first * prod(columns) * dtype.itemsize
            read_exactly(file.fileno(), raw, at, merged.shard.path)
        W = from_buffer(raw, dtype, (count, *columns)).to(scratch.device, non_blocking=True)
        out = scratch.workspace.take("out", W.numel(), target, scratch.device).view(W.shape)
        self._prepared.tile(W, first, out)
        into[:] = scratch.bytes_of(out)

    def _reads(self) -> torch.Tensor:
        raise BadInput(f"the journal corrects {self._base.name!r}, whose edit needs the base's own values.")
