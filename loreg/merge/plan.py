"""The plan of a merge, from headers alone.

Everything that can be refused is refused here, before a byte is written: a base that is not the adapters' own,
a module that nothing consumes, a shape or dtype that is off, a disk that is too small.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loreg.checkpoint import Checkpoint
from loreg.digest import Digest
from loreg.errors import BadInput, BaseMismatch, CheckFailed, UsageError
from loreg.format.base import BaseManifest, HubPin
from loreg.format.fingerprint import Match, match_base
from loreg.format.recipe import DTYPE_NAMES, Recipe
from loreg.merge.combining import Combining, arithmetic_of
from loreg.merge.copies import recognise_copy
from loreg.merge.edits import edits_of, untied_of
from loreg.merge.inputs import AdapterInput, in_recipe_order
from loreg.merge.layout import Action, Layout, OutputShard, OutputTensor

_HEADROOM = 16 << 20


@dataclass(frozen=True, slots=True)
class MergePlan:
    """Everything the executor needs.

    ``matches``: how well the base fits each adapter, in order. ``unties``: whether tensors that were one are now two.
    ``resized``: numbers of rows before → after, of tensors that gained or lost some.
    """

    base: Checkpoint
    base_manifest: BaseManifest
    recipe: Recipe
    adapters: tuple[AdapterInput, ...]
    matches: tuple[Match, ...]
    shards: tuple[OutputShard, ...]
    index: tuple[str, bytes] | None
    unties: bool
    resized: Mapping[int, int]

    @property
    def combining(self) -> Combining:
        return Combining(self.adapters, self.recipe.method, self.recipe.parameters)

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
    method: str = "linear",
    parameters: Mapping[str, Any] | None = None,
    allow_mismatch: bool = False,
    hub: HubPin | None = None,
    known: Mapping[Digest, Checkpoint] | None = None,
) -> MergePlan:
    """Plan W' = round(W + Σ wᵢΔWᵢ) for every tensor, or what another ``method`` makes of the deltas.

    ``dtype``: BF16, F16 or F32 for all floating ones. ``parameters``: all of the method's, checked. ``hub``: where
    the base is from, if from the Hub. ``known``: bases at hand by weights_root, to explain a mismatch with. Raises
    BaseMismatch, BadInput, Unsupported, UsageError; touches no file but headers.
    """
    if dtype is not None and dtype not in DTYPE_NAMES:
        raise UsageError(f"{dtype!r} is not an output dtype: expected one of {', '.join(DTYPE_NAMES)}.")
    matches = tuple(
        _pinned(adapter, hub, _check_base(adapter, base, base_manifest, allow_mismatch, known or {}))
        for adapter in adapters
    )
    mismatch = any(match < Match.TOUCHED for match in matches)
    kept = in_recipe_order(adapters)
    recipe = Recipe.of(
        base_manifest.identity.weights_root,
        [(adapter.digest, adapter.weight) for adapter in kept],
        dtype=dtype,
        base_mismatch=mismatch,
        method=method,
        parameters=parameters or {},
        arithmetic=arithmetic_of(method, [adapter.manifest for adapter in kept]),
    )
    untied = untied_of(kept)
    config: dict[str, Any] = {}
    with suppress(BadInput):  # a broken config.json tells nothing, and so counts as unknown
        config = base.config()
    layout = Layout(base, base_manifest.by_name(), untied, dtype, method)
    edits = layout.checked(edits_of(kept), config)
    shards, index = layout.shards(edits)
    return MergePlan(
        base, base_manifest, recipe, tuple(kept), matches, shards, index, bool(untied), layout.resized(edits)
    )


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


def check_space(plans: Sequence[MergePlan], folders: Sequence[Path]) -> None:
    """Raises CheckFailed if a file system has not the room for what is to be written into ``folders`` of it, beside
    what is there already."""
    needed: dict[int, int] = {}
    for plan, folder in zip(plans, folders, strict=True):
        there = sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())
        needed[folder.stat().st_dev] = needed.get(folder.stat().st_dev, _HEADROOM) + max(0, plan.nbytes - there)
    for folder in folders:
        free, size = shutil.disk_usage(folder).free, needed[folder.stat().st_dev]
        if free < size:
            raise CheckFailed(
                f"{folder} has {free:,} bytes free, and the merge writes {size:,}: free some space, or choose "
                "another disk."
            )
