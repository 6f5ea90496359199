"""Where every tensor of the output comes from, and in which file it goes; and whether it can be made at all."""

from __future__ import annotations

import enum
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from loreg.adapters import models
from loreg.checkpoint import Checkpoint, StoredTensor, read_whole
from loreg.digest import Digest
from loreg.errors import BadInput, Unsupported
from loreg.format.fingerprint import BaseTensor
from loreg.format.methods import METHODS
from loreg.format.recipe import DTYPES
from loreg.format.safetensors import Header, TensorInfo, canonical_header
from loreg.merge.edits import TensorEdit


class Action(enum.Enum):
    """Where the bytes of an output tensor come from."""

    COPY = "copy"
    """The base's bytes."""
    REPLACE = "replace"
    """The bytes of an adapter's full tensor."""
    COMPUTE = "compute"
    """The base's values, edited or converted, correctly rounded."""


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """A tensor of the output.

    ``stored``: what it is made from: the base's tensor, or the replacement that others edit; None if an adapter
    adds it. ``content``: the digest that ``stored`` is known to have.
    """

    info: TensorInfo
    action: Action
    stored: StoredTensor | None
    content: Digest | None
    edit: TensorEdit


@dataclass(frozen=True, slots=True)
class OutputShard:
    """A file of the output; ``tensors`` in the order of their bytes."""

    name: str
    header: Header
    tensors: tuple[OutputTensor, ...]


@dataclass(frozen=True)
class Layout:
    """Where the output's tensors come from and go to. ``known``: the base's tensors with their digests."""

    base: Checkpoint
    known: Mapping[str, BaseTensor]
    untied: Mapping[str, str]
    dtype: str | None
    method: str = "linear"

    def checked(self, edits: Mapping[str, TensorEdit], config: Mapping[str, Any]) -> dict[str, TensorEdit]:
        """The edits of what is stored, each with the origin that it needs. Raises BadInput, Unsupported."""
        twins = {name for edit in edits.values() for part in edit.parts for name in part.adapter.manifest.ties}
        wanted = {*self.base.tensors, *self.untied}
        return {
            name: self._checked(name, edit, config)
            for name, edit in edits.items()
            if name in wanted or name not in twins  # a tied head that is not stored follows its embedding
        }

    def resized(self, edits: Mapping[str, TensorEdit]) -> dict[int, int]:
        """Numbers of rows before → after, of the tensors that are replaced by one of another shape."""
        found = {}
        for name, edit in edits.items():
            stored = self.source(name)
            if edit.origin is not None and edit.origin.replacement is not None and stored is not None:
                found[stored.info.shape[0]] = edit.origin.replacement.value.shape[0]
        return found

    def source(self, name: str) -> StoredTensor | None:
        """What holds a tensor's value before the merge: itself, or the one that it is tied to; None if it is new."""
        stored = self.base.tensors
        return stored.get(name) or stored.get(self.untied.get(name, ""))

    def _checked(self, name: str, edit: TensorEdit, config: Mapping[str, Any]) -> TensorEdit:
        stored = self.source(name)
        if stored is None:
            return self._check_new(name, edit, config)
        edit = _resizing(name, edit, stored.info.shape, self.method)
        resized = edit.origin.replacement if edit.origin else None
        shape = resized.value.shape if resized else stored.info.shape
        for part in edit.parts:
            if wrong := sorted(part.shapes() - {shape}):
                raise BadInput(
                    f"{part.adapter.label} expects {name!r} of shape {list(wrong[0])}, and it has {list(shape)}."
                )
            if part.weight and part.adapter.manifest.modules[part.weight].view != edit.view(shape):
                raise BadInput(f"{part.adapter.label} takes {name!r} for another kind of layer than the others do.")
        if edit.parts or edit.origin:
            self._check_shared(name, edit, shape, config)
        copied = edit.replaces() is not None and METHODS[self.method].keeps_terms
        if stored.info.dtype not in DTYPES and edit.parts and not copied:
            raise Unsupported(f"{name!r} is stored as {stored.info.dtype}: merging handles {', '.join(DTYPES)}.")
        return edit

    def _check_new(self, name: str, edit: TensorEdit, config: Mapping[str, Any]) -> TensorEdit:
        if module := edit.module():
            raise BadInput(
                f"{module[0].label} adapts {name!r} (module {module[1]!r}), which this base does not have."
            )
        adding = edit.replaces()
        if adding is None or adding.replacement is None:
            raise Unsupported(f"{name!r} is new to the base: only one adapter, at weight 1, can add it.")
        self._check_shared(name, edit, adding.replacement.value.shape, config)
        return edit

    def _check_shared(self, name: str, edit: TensorEdit, shape: tuple[int, ...], config: Mapping[str, Any]) -> None:
        """Refuse to guess: a weight that the model may use twice, unless each adapter was bound to know of it."""
        module = edit.module()
        embedding = module is not None and module[2].kind == "embedding"
        parts = (*edit.parts, *([edit.origin] if edit.origin else []))
        known = all(
            name in {*ties, *(tie.to for tie in ties.values())} for ties in (p.adapter.manifest.ties for p in parts)
        )
        if not known and models.shares(config, name, shape, embedding):
            raise Unsupported(
                f"{name!r} has a row for each word, and this model may use it twice, as embedding and as head "
                "(tie_word_embeddings), in a way that loreg does not know: untie it in the base first."
            )

    def shards(self, edits: Mapping[str, TensorEdit]) -> tuple[tuple[OutputShard, ...], tuple[str, bytes] | None]:
        """The files of the output, and the index beside them."""
        base = self.base
        added = [name for name in edits if name not in base.tensors]
        shards = []
        for position, shard in enumerate(base.shards):
            names = [info.name for info in shard.header.tensors] + (added if position == len(base.shards) - 1 else [])
            tensors = {name: self._output(name, edits.get(name, TensorEdit())) for name in names}
            entries = [(tensor.info.name, tensor.info.dtype, tensor.info.shape) for tensor in tensors.values()]
            if entries == [(info.name, info.dtype, info.shape) for info in shard.header.tensors]:
                header = shard.header  # byte for byte: the output of an unmerge is then the base's own file
            else:
                header = canonical_header(entries, shard.header.metadata)
            ordered = (replace(tensors[info.name], info=info) for info in header.tensors)
            shards.append(OutputShard(shard.name, header, tuple(ordered)))
        if base.index is None:
            return tuple(shards), None
        original = read_whole(base.index)
        sizes = {tensor.info.name: tensor.info.nbytes for shard in shards for tensor in shard.tensors}
        unchanged = sizes == {name: stored.info.nbytes for name, stored in base.tensors.items()}
        return tuple(shards), (base.index.name, original if unchanged else _index(original, shards))

    def _output(self, name: str, edit: TensorEdit) -> OutputTensor:
        stored = self.source(name)
        # To another method than a sum a replacement is a delta like any other, whatever its weight.
        replacing = edit.replaces() if stored is None or METHODS[self.method].keeps_terms else None
        replacement = replacing.replacement if replacing else None
        if stored is None:
            if replacement is None:
                raise BadInput(f"{name!r} is neither in the base nor in an adapter.")
            value = replacement.value
            return OutputTensor(TensorInfo(name, value.dtype, value.shape, 0, 0), Action.REPLACE, None, None, edit)
        content = self.known[stored.info.name].content
        target = self.dtype if self.dtype is not None and stored.info.dtype in DTYPES else stored.info.dtype
        if edit.origin is not None and edit.origin.replacement is not None:
            stored = edit.origin.adapter.full_tensor(edit.origin.full or name)
            content = edit.origin.replacement.value.digest
        if replacement and replacement.value.dtype == target:
            action = Action.REPLACE
        elif target != stored.info.dtype or edit.parts:
            action = Action.COMPUTE
        else:
            action = Action.COPY
        return OutputTensor(TensorInfo(name, target, stored.info.shape, 0, 0), action, stored, content, edit)


def _resizing(name: str, edit: TensorEdit, shape: tuple[int, ...], method: str) -> TensorEdit:
    """The edit with the one replacement of another shape, such as an embedding with more words, as its origin."""
    changing = [part for part in edit.parts if part.replacement and part.replacement.value.shape != shape]
    if not changing or changing[0].replacement is None:
        return edit
    adapter, found = changing[0].adapter, changing[0].replacement.value.shape
    if (
        len(changing) > 1
        or adapter.weight != 1
        or len(found) != len(shape)
        or not shape[1:]
        or found[1:] != shape[1:]
    ):
        raise Unsupported(
            f"{adapter.label} replaces {name!r} of shape {list(shape)} by one of {list(found)}: a matrix can gain or "
            "lose rows, by one adapter at weight 1."
        )
    if not METHODS[method].keeps_terms:
        raise Unsupported(f"{adapter.label} resizes {name!r}, for which {method} is not defined: merge by linear.")
    return edit.starting_from(changing[0])


def _index(original: bytes, shards: Sequence[OutputShard]) -> bytes:
    document = json.loads(original)
    tensors = [(tensor.info, shard.name) for shard in shards for tensor in shard.tensors]
    metadata = document.get("metadata")
    kept = metadata if isinstance(metadata, dict) else {}
    document["metadata"] = {**kept, "total_size": sum(info.nbytes for info, _ in tensors)}
    document["weight_map"] = {info.name: file for info, file in sorted(tensors, key=lambda item: item[0].name)}
    return (json.dumps(document, indent=2) + "\n").encode()
