"""The plan of a merge: from headers alone, for every byte of the output where it comes from.

Everything that can be refused is refused here, before a byte is written: a base that is not the adapters' own,
a module that nothing consumes, a shape or dtype that is off, a disk that is too small.
"""

from __future__ import annotations

import enum
import json
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loreg.adapters import models
from loreg.checkpoint import Checkpoint, StoredTensor
from loreg.digest import Digest
from loreg.errors import BadInput, BaseMismatch, CheckFailed, Unsupported, UsageError
from loreg.format.base import BaseManifest, HubPin
from loreg.format.fingerprint import Match, match_base
from loreg.format.recipe import DTYPES, Recipe
from loreg.format.safetensors import Header, TensorInfo, canonical_header
from loreg.merge.copies import recognise_copy
from loreg.merge.inputs import AdapterInput, TensorEdit, edits_of, module_of

_HEADROOM = 16 << 20


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
    """A tensor of the output: ``stored`` is the base's, None if an adapter adds it."""

    info: TensorInfo
    action: Action
    stored: StoredTensor | None
    edit: TensorEdit


@dataclass(frozen=True, slots=True)
class OutputShard:
    """A file of the output; ``tensors`` in the order of their bytes."""

    name: str
    header: Header
    tensors: tuple[OutputTensor, ...]


@dataclass(frozen=True, slots=True)
class MergePlan:
    """Everything the executor needs. ``matches``: how well the base fits each adapter, in order."""

    base: Checkpoint
    base_manifest: BaseManifest
    recipe: Recipe
    adapters: tuple[AdapterInput, ...]
    matches: tuple[Match, ...]
    shards: tuple[OutputShard, ...]
    index: tuple[str, bytes] | None

    @property
    def nbytes(self) -> int:
        return sum(shard.header.file_size for shard in self.shards)

    @property
    def outputs(self) -> tuple[OutputTensor, ...]:
        return tuple(tensor for shard in self.shards for tensor in shard.tensors)

    @property
    def changed(self) -> tuple[OutputTensor, ...]:
        return tuple(tensor for tensor in self.outputs if tensor.action is not Action.COPY)


def plan_merge(
    base: Checkpoint,
    base_manifest: BaseManifest,
    adapters: Sequence[AdapterInput],
    *,
    dtype: str | None = None,
    allow_mismatch: bool = False,
    hub: HubPin | None = None,
    known: Mapping[Digest, Checkpoint] | None = None,
) -> MergePlan:
    """Plan W' = round(W + Σ wᵢΔWᵢ) for every tensor. ``dtype``: BF16, F16 or F32 for all floating ones.

    ``hub``: where the base is from, if from the Hub. ``known``: bases at hand by weights_root, to explain a
    mismatch with. Raises BaseMismatch, BadInput, Unsupported, UsageError; touches no file but headers.
    """
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"{dtype!r} is not an output dtype: expected one of {', '.join(DTYPES)}.")
    matches = tuple(
        _pinned(adapter, hub, _check_base(adapter, base, base_manifest, allow_mismatch, known or {}))
        for adapter in adapters
    )
    mismatch = any(match < Match.TOUCHED for match in matches)
    identity = base_manifest.identity
    recipe = Recipe.of(
        identity.weights_root,
        [(adapter.digest, adapter.weight) for adapter in adapters],
        dtype=dtype,
        base_mismatch=mismatch,
    )
    # In the recipe's order, so that nothing downstream can depend on the order in which the terms were given.
    kept = sorted((a for a in adapters if a.weight != 0), key=lambda a: (a.digest, a.weight))
    edits = edits_of(kept)
    config: dict[str, Any] = {}
    with suppress(BadInput):  # a broken config.json tells nothing, and so counts as unknown
        config = base.config()
    for name, edit in edits.items():
        _check_edit(name, edit, base, config)
    shards, index = _lay_out(base, edits, dtype)
    return MergePlan(base, base_manifest, recipe, tuple(kept), matches, shards, index)


def _check_base(
    adapter: AdapterInput,
    base: Checkpoint,
    manifest: BaseManifest,
    allow_mismatch: bool,
    known: Mapping[Digest, Checkpoint],
) -> Match:
    """How well the base fits the adapter. Raises BaseMismatch naming the tensors that differ, unless allowed."""
    reference = adapter.manifest.base
    match, differing = match_base(reference.identity, reference.touched, manifest.by_name())
    if match >= Match.TOUCHED or allow_mismatch:
        return match
    shown = ", ".join(differing[:3]) + (f" and {len(differing) - 3} more" if len(differing) > 3 else "")
    original = known.get(reference.identity.weights_root)
    copy = recognise_copy(base, original, reference.touched, differing)
    if copy:
        reason = f"It is a {copy} copy of that base: merge into the original, and give --dtype {copy} for the output."
    else:
        reason = _explain(adapter, manifest, differing)
    raise BaseMismatch(
        f"{adapter.label} was trained on {reference.name!r} (weights_root blake3:"
        f"{reference.identity.weights_root.short}…), and the base at {base.root} differs in {len(differing)} of the "
        f"{len(reference.touched)} tensors that it adapts: {shown}. {reason}"
    )


def _pinned(adapter: AdapterInput, hub: HubPin | None, match: Match) -> Match:
    """The level with what is known of the Hub: the same repository, commit and SHA-256 of each weight file [B5]."""
    same = hub is not None and bool(hub.files) and hub == adapter.manifest.base.hub
    return Match.HUB_PIN if same and match is Match.WEIGHTS else match


def _explain(adapter: AdapterInput, base: BaseManifest, differing: Sequence[str]) -> str:
    here = base.by_name()
    shapes = {module.tensor: module.shape for module in adapter.manifest.modules.values()}
    for name in differing:
        if name not in here:
            return f"It has no {name!r}: merge into the base that the adapter names."
        if name in shapes and here[name].shape != shapes[name]:
            return f"There {name!r} has shape {list(here[name].shape)}, expected {list(shapes[name])}: another model."
    return "Merge into the base that the adapter names, or override with --allow-base-mismatch."


def _check_edit(name: str, edit: TensorEdit, base: Checkpoint, config: Mapping[str, Any]) -> None:
    stored = base.tensors.get(name)
    if stored is None:
        if module := module_of(edit):
            raise BadInput(
                f"{module[0].label} adapts {name!r} (module {module[1]!r}), which this base does not have."
            )
        if len(edit.full) > 1 or edit.replaces() is None:
            raise Unsupported(f"{name!r} is new to the base: only one adapter, at weight 1, can add it.")
        _check_shared(name, edit, edit.full[0].manifest.full[name].value.shape, config)
        return
    shape = stored.info.shape
    for adapter, path in edit.low_rank:
        if adapter.manifest.modules[path].shape != shape:
            expected = list(adapter.manifest.modules[path].shape)
            raise BadInput(f"{adapter.label} expects {name!r} of shape {expected}, and the base has {list(shape)}.")
    for adapter, path in edit.bias:
        if (adapter.manifest.modules[path].out_features,) != shape:
            raise BadInput(f"{adapter.label} has a bias for {name!r} that does not fit its shape {list(shape)}.")
    for adapter in edit.full:
        if (found := adapter.manifest.full[name].value.shape) != shape:
            raise Unsupported(
                f"{adapter.label} replaces {name!r} of shape {list(shape)} by one of {list(found)}: resized tensors "
                "are not handled yet."
            )
    _check_shared(name, edit, shape, config)
    if stored.info.dtype not in DTYPES and edit.replaces() is None:
        raise Unsupported(f"{name!r} is stored as {stored.info.dtype}: merging handles {', '.join(DTYPES)}.")


def _check_shared(name: str, edit: TensorEdit, shape: tuple[int, ...], config: Mapping[str, Any]) -> None:
    embedding = any(adapter.manifest.modules[path].kind == "embedding" for adapter, path in edit.low_rank)
    if models.shares(config, name, shape, embedding):
        raise Unsupported(
            f"{name!r} has a row for each word, and this model may use it twice, as embedding and as head "
            "(tie_word_embeddings): tied embeddings are not handled yet."
        )


def _lay_out(
    base: Checkpoint, edits: Mapping[str, TensorEdit], dtype: str | None
) -> tuple[tuple[OutputShard, ...], tuple[str, bytes] | None]:
    added = [name for name in edits if name not in base.tensors]
    shards = []
    for position, shard in enumerate(base.shards):
        tensors = {info.name: _output(base.tensors[info.name], edits, dtype) for info in shard.header.tensors}
        if position == len(base.shards) - 1:
            tensors.update({name: _added(name, edits[name]) for name in added})
        entries = [(tensor.info.name, tensor.info.dtype, tensor.info.shape) for tensor in tensors.values()]
        if entries == [(info.name, info.dtype, info.shape) for info in shard.header.tensors]:
            header = shard.header  # byte for byte: the output of an unmerge is then the base's own file
        else:
            header = canonical_header(entries, shard.header.metadata)
        ordered = (
            OutputTensor(info, tensors[info.name].action, tensors[info.name].stored, tensors[info.name].edit)
            for info in header.tensors
        )
        shards.append(OutputShard(shard.name, header, tuple(ordered)))
    if base.index is None:
        return tuple(shards), None
    original = base.index.read_bytes()
    unchanged = not added and dtype is None
    return tuple(shards), (base.index.name, original if unchanged else _index(original, shards))


def _output(stored: StoredTensor, edits: Mapping[str, TensorEdit], dtype: str | None) -> OutputTensor:
    info = stored.info
    edit = edits.get(info.name, TensorEdit())
    target = dtype if dtype is not None and info.dtype in DTYPES else info.dtype
    replacing = edit.replaces()
    if replacing and replacing.manifest.full[info.name].value.dtype == target:
        action = Action.REPLACE
    elif target != info.dtype or info.name in edits:
        action = Action.COMPUTE
    else:
        action = Action.COPY
    return OutputTensor(TensorInfo(info.name, target, info.shape, 0, 0), action, stored, edit)


def _added(name: str, edit: TensorEdit) -> OutputTensor:
    value = edit.full[0].manifest.full[name].value
    return OutputTensor(TensorInfo(name, value.dtype, value.shape, 0, 0), Action.REPLACE, None, edit)


def _index(original: bytes, shards: Sequence[OutputShard]) -> bytes:
    document = json.loads(original)
    tensors = [(tensor.info, shard.name) for shard in shards for tensor in shard.tensors]
    metadata = document.get("metadata")
    kept = metadata if isinstance(metadata, dict) else {}
    document["metadata"] = {**kept, "total_size": sum(info.nbytes for info, _ in tensors)}
    document["weight_map"] = {info.name: file for info, file in sorted(tensors, key=lambda item: item[0].name)}
    return (json.dumps(document, indent=2) + "\n").encode()


def check_space(plan: MergePlan, folder: Path) -> None:
    """Raises CheckFailed if the file system of ``folder`` has not the room for the output."""
    free = shutil.disk_usage(folder).free
    if free < plan.nbytes + _HEADROOM:
        raise CheckFailed(
            f"{folder} has {free:,} bytes free, and the merge writes {plan.nbytes:,}: free some space, or choose "
            "another disk."
        )
