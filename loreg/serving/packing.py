"""``pack``: adapters stacked and padded as an engine holds them in memory, with every scale folded in.

What an engine's buffers look like is its own affair, and changes between its versions. The layouts here are those of
vLLM 0.32.0 (``vllm/lora/layers``), of SGLang 0.5.23 (``sglang/srt/lora/mem_pool.py``), and of the SGMV kernels of
Punica as LoRAX calls them (``lorax_server/utils/sgmv.py`` and ``adapters/lora.py``), all without tensor parallelism.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Literal, get_args

import torch
from torch import Tensor

from loreg.algebra.delta import LowRank, concatenate
from loreg.digest import Digest
from loreg.errors import BadInput, BaseMismatch, Unsupported, UsageError
from loreg.registry import Registry, Version
from loreg.registry.inputs import choose_device
from loreg.serving.defaults import default_registry
from loreg.serving.grouping import Group, groups
from loreg.serving.loading import factors_of
from loreg.serving.twins import in_thread

Layout = Literal["vllm", "sglang", "sgmv"]
PACKED: Mapping[str, Sequence[str]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
"""What engines hold as one layer, and the layers of the checkpoint that it is made of, in their order."""

_SHRINKS = range(16, 129)
"""The ranks whose A LoRAX turns (``orient_for_rank``), for the kernel ``sgmv_shrink``."""


@dataclass(frozen=True, slots=True, eq=False)
class Stacked:
    """One layer of an engine: ``A`` and ``B``, a tensor for each slice or one for all, see :func:`pack`.

    ``modules``: the paths of its slices in the model, or of what is stacked in ``sgmv``. ``sizes``: the outputs of
    each. A module that no adapter has is zeros.
    """

    A: tuple[Tensor, ...]
    B: tuple[Tensor, ...]
    modules: tuple[str, ...]
    sizes: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """Adapters as an engine holds them. ``versions``: in the order of the first dimension of all tensors; ``ranks``:
    of each its largest; ``layers``: by the name that the engine has for them. All scales are 1."""

    layout: Layout
    versions: tuple[Digest, ...]
    ranks: tuple[int, ...]
    max_rank: int
    dtype: torch.dtype
    layers: Mapping[str, Stacked]

    @property
    def nbytes(self) -> int:
        """Of all tensors."""
        return sum(tensor.nbytes for layer in self.layers.values() for tensor in (*layer.A, *layer.B))


def pack(
    references: Sequence[str],
    max_rank: int,
    layout: Layout,
    registry: Registry | None = None,
    *,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    packed: Mapping[str, Sequence[str]] = PACKED,
) -> Packed:
    """n adapters of one base, padded with zeros to R = ``max_rank``, as buffers of ``layout`` on ``device``:

    - ``vllm``: of each slice ``A`` (n, 1, R, in), ``B`` (n, 1, out, R), as ``lora_a_stacked`` and ``lora_b_stacked``
      of a layer with ``n_slices``; of an embedding ``A`` is (n, in, R).
    - ``sglang``: one ``A`` (n, c·R, in) and ``B`` (n, out, R) for all c slices, as ``A_buffer`` and ``B_buffer`` of a
      layer. Adapter i has its slices from row s·ranks[i] on, and not from s·R, for which its kernels take ``ranks``
      as ``lora_ranks`` and 1 as ``scalings``. Embeddings and heads are not sliced: (n, R, in), (n, out, R).
    - ``sgmv``: one ``A`` and ``B`` for all L layers of a kind (``model.layers.*.mlp.up_proj``), each adapter's in one
      piece, to whose first element the kernels take a pointer: ``B`` is (n, L, R, out), ``A`` (n, L, in, R), or for
      16 ≤ R ≤ 128 (n, L, R, in). R is 8, or a multiple of 16. Slices are layers of their own.

    ``packed``: what the engine holds as one layer (``vllm`` and ``sglang``): its name there, and those of its slices
    in the checkpoint. A slice that no adapter has is as large as in the base, which must be registered. ``dtype``: of
    the tensors; default is the widest that is stored.

    B is c·B rounded once from the float64 product with the scale c, A is as it is stored, rounded once where
    ``dtype`` is narrower; so an element of the product is off by at most (2u + u² + 2⁻⁵²)·|c||B||A| with u the unit
    roundoff of ``dtype``, where nothing underflows.

    Raises NotFound, UsageError; BaseMismatch for adapters of different bases; Unsupported for a rank above
    ``max_rank``, naming adapter and module, and as ``load`` does for what is no pair of factors; BadInput for modules
    that differ in shape between adapters, and for a value that ``dtype`` does not hold.
    """
    registry = registry or default_registry()
    _check(references, max_rank, layout)
    target = choose_device(device)
    versions = [registry.resolve(reference) for reference in references]
    _check_one_base(versions)
    found = [factors_of(registry, version, target) for version in versions]
    ranks = [_largest_rank(version, terms, max_rank) for version, terms in zip(versions, found, strict=True)]
    deltas = [delta for terms in found for several in terms.values() for delta in several]
    kind = dtype or reduce(torch.promote_types, (x.dtype for delta in deltas for x in (delta.left, delta.right)))
    whole = {
        (number, path): _whole(f"{version}: {path!r}", several, kind)
        for number, (version, terms) in enumerate(zip(versions, found, strict=True))
        for path, several in terms.items()
    }
    make = {"vllm": _vllm, "sglang": _sglang, "sgmv": _sgmv}[layout]
    parts = _Parts(whole, tuple(ranks), max_rank, kind, target)
    grouped = groups(registry, versions, packed if layout != "sgmv" else None)
    layers = {group.name: make(parts, group) for group in grouped}
    return Packed(layout, tuple(version.digest for version in versions), tuple(ranks), max_rank, kind, layers)


pack_async = in_thread(pack)


def _check(references: Sequence[str], max_rank: int, layout: str) -> None:
    if layout not in get_args(Layout):
        raise UsageError(f"{layout!r} is not a layout: expected one of {', '.join(get_args(Layout))}.")
    if isinstance(references, str):
        raise UsageError(f"{references!r} is one reference: expected a list of them, as in [{references!r}].")
    if not references:
        raise UsageError("No adapters to pack: expected at least one.")
    if max_rank < 1:
        raise UsageError(f"A largest rank of {max_rank} has room for no adapter: expected at least 1.")
    if layout == "sgmv" and max_rank != 8 and max_rank % 16:
        raise UsageError(f"The kernels of sgmv take a rank of 8 or a multiple of 16, not {max_rank}: give the next.")


def _check_one_base(versions: Sequence[Version]) -> None:
    first = versions[0]
    root = first.manifest.base.identity.weights_root
    for version in versions:
        if version.manifest.base.identity.weights_root != root:
            raise BaseMismatch(
                f"{version} was trained on {version.manifest.base.name!r}, and {first} on "
                f"{first.manifest.base.name!r}, which has other weights: what is packed together has one base."
            )


def _largest_rank(version: Version, terms: Mapping[str, tuple[LowRank, ...]], limit: int) -> int:
    largest = 0
    for path, deltas in terms.items():
        rank = sum(delta.rank for delta in deltas)
        if rank > limit:
            raise Unsupported(
                f"{version} has rank {rank} at {path!r}, and there is room for {limit}: pack with a larger max_rank, "
                "or make a version of a lower rank (loreg resize)."
            )
        largest = max(largest, rank)
    return largest


def _whole(what: str, deltas: tuple[LowRank, ...], dtype: torch.dtype) -> LowRank:
    try:
        return concatenate(deltas, dtype)
    except BadInput as error:
        raise type(error)(f"{what} cannot be had in {dtype}: {error}") from error


@dataclass(frozen=True, slots=True)
class _Parts:
    """What is to be placed: by adapter and path its delta in the layer's orientation, of scale 1."""

    whole: Mapping[tuple[int, str], LowRank]
    ranks: tuple[int, ...]
    max_rank: int
    dtype: torch.dtype
    device: torch.device

    def zeros(self, *shape: int) -> Tensor:
        return torch.zeros(len(self.ranks), *shape, dtype=self.dtype, device=self.device)

    def of(self, path: str) -> list[tuple[int, LowRank]]:
        """The adapters that have the module, and what they have."""
        return [(n, self.whole[n, path]) for n in range(len(self.ranks)) if (n, path) in self.whole]


def _vllm(parts: _Parts, group: Group) -> Stacked:
    A, B = [], []
    for member in group.members:
        a, b = parts.zeros(1, parts.max_rank, member.inputs), parts.zeros(1, member.outputs, parts.max_rank)
        for number, delta in parts.of(member.path):
            a[number, 0, : delta.rank], b[number, 0, :, : delta.rank] = delta.right, delta.left
        A.append(a.squeeze(1).mT.contiguous() if group.embeds else a)
        B.append(b)
    return Stacked(tuple(A), tuple(B), group.paths, group.sizes)


def _sglang(parts: _Parts, group: Group) -> Stacked:
    # A layer that is one already shares its A between the slices: ``normalize_qkv_proj`` repeats it.
    sharing = group.slices // len(group.members)
    A = parts.zeros(group.slices * parts.max_rank, group.members[0].inputs)
    B = parts.zeros(sum(group.sizes), parts.max_rank)
    first = 0
    for place, member in enumerate(group.members):
        for number, delta in parts.of(member.path):
            for copy in range(sharing):
                row = (place * sharing + copy) * parts.ranks[number]
                A[number, row : row + delta.rank] = delta.right
            B[number, first : first + member.outputs, : delta.rank] = delta.left
        first += member.outputs
    return Stacked((A,), (B,), group.paths, group.sizes)


def _sgmv(parts: _Parts, group: Group) -> Stacked:
    member, rank = group.members[0], parts.max_rank
    if group.embeds:
        raise Unsupported(f"{member.path!r} is an embedding, for which sgmv has no kernel: name no such adapter.")
    turned = rank in _SHRINKS
    A = parts.zeros(len(group.members), *((rank, member.inputs) if turned else (member.inputs, rank)))
    B = parts.zeros(len(group.members), rank, member.outputs)
    for layer, member in enumerate(group.members):
        for number, delta in parts.of(member.path):
            B[number, layer, : delta.rank] = delta.left.mT
            a = A[number, layer] if turned else A[number, layer].mT
            a[: delta.rank] = delta.right
    return Stacked((A,), (B,), group.paths, group.sizes)
