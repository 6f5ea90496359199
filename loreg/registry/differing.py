"""What tells a tuned tensor from the base's: factors of the difference, where they are smaller than the tensor."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from loreg import layers
from loreg.algebra.delta import LowRank
from loreg.algebra.rounding import finite, round_to
from loreg.algebra.truncate import truncate_dense
from loreg.checkpoint import StoredTensor
from loreg.errors import BadInput, Unsupported
from loreg.format.module import IN_OUT, OUT_IN, Module
from loreg.format.recipe import DTYPES
from loreg.merge.inputs import values
from loreg.merge.workers import results, workers
from loreg.registry.pairing import Pair
from loreg.registry.room import Room
from loreg.tensors import TORCH


@dataclass(frozen=True, slots=True)
class Limits:
    """The greatest rank of a difference's factors and the least share of its square norm, and where to compute."""

    rank: int | None
    energy: float | None
    device: torch.device

    def truncated(self, matrix: torch.Tensor) -> LowRank:
        rank = None if self.rank is None else min(self.rank, *matrix.shape)
        return truncate_dense(matrix, rank=rank, energy=self.energy).delta


@dataclass(frozen=True, slots=True, eq=False)
class Factored:
    """A difference as factors in float32 on the CPU. ``module``: without its terms.

    A is (r, in) and B (out, r); of a stack of ``count`` matrices (count·r, in) and (out, r·count), as
    ``algebra.forms.low_rank.lora_experts`` has them. ``lost``: ‖D - BA‖², measured on these very factors.
    """

    module: Module
    count: int
    rank: int
    A: torch.Tensor
    B: torch.Tensor
    lost: float


@dataclass(frozen=True, slots=True)
class Made:
    """What is to be stored of a tensor: nothing unless it ``differs``; factors, or without them the tensor itself.

    ``square``: ‖D‖² of the difference D, 0 where there is none to speak of: the tensor is new, or has another shape.
    """

    differs: bool
    square: float = 0.0
    factored: Factored | None = None


def differences(pairs: Sequence[Pair], config: layers.Config, limits: Limits) -> Iterator[tuple[Pair, Made]]:
    """Each pair in its order, with what is to be stored of it.

    As many threads as torch has, one tensor each and no torch threads inside, so that the last bits do not depend on
    their number. At any time they hold no more than twice the elements of the largest tensor.

    Raises BadInput for NaN or infinity, Unsupported for tensors that have no difference.
    """
    sizes = [math.prod(pair.tuned.info.shape) for pair in pairs]
    room = Room(2 * max(sizes, default=0))
    jobs = [partial(_make, pair, config, limits, room, size) for pair, size in zip(pairs, sizes, strict=True)]
    with workers(limits.device) as pool:
        yield from zip(pairs, results(pool, jobs), strict=True)


@torch.no_grad()
def _make(pair: Pair, config: layers.Config, limits: Limits, room: Room, size: int) -> Made:
    with room.of(size):
        if pair.base is None or pair.base.info.shape != pair.tuned.info.shape or not _computable(pair):
            _require_kin(pair)
            _check_finite(pair.tuned)
            return Made(True)
        delta = _difference(pair.base, pair.tuned, limits.device)
        if delta is None:
            return Made(False)
        square = float(torch.linalg.vector_norm(delta)) ** 2
        return Made(True, square, _factored(delta, _module(pair, config), limits) if delta.ndim > 1 else None)


def _difference(base: StoredTensor, tuned: StoredTensor, device: torch.device) -> torch.Tensor | None:
    """``tuned - base`` in float64: exact for weights of 16 bits or less, else to 2⁻⁵³. None if they are equal, or
    ``tuned`` is ``base`` rounded to the narrower dtype that it has."""
    _check_finite(base)
    _check_finite(tuned)
    W, R = (values(stored).to(device).double() for stored in (base, tuned))
    dtype = TORCH[tuned.info.dtype]
    narrower = dtype.itemsize < TORCH[base.info.dtype].itemsize
    if torch.equal(W, R) or (narrower and torch.equal(round_to(W, dtype).double(), R)):
        return None
    return R.sub_(W)


def _factored(delta: torch.Tensor, module: Module, limits: Limits) -> Factored | None:
    """The truncated difference, or None where its factors are no smaller than the tensor."""
    matrices = delta.reshape(-1, *module.matrix)
    if module.orientation == IN_OUT:
        matrices = matrices.mT
    found = [limits.truncated(matrix) for matrix in matrices]
    rank = max(each.rank for each in found)
    if rank * sum(module.matrix) >= math.prod(module.matrix):
        return None
    A, B = (_padded([_single(getattr(each, end)) for each in found], rank, axis) for end, axis in _ENDS)
    lost = 0.0
    for matrix, right, left in zip(matrices, A, B, strict=True):
        lost += float(torch.linalg.vector_norm(matrix - left.double() @ right.double())) ** 2
    count = len(found)
    A, B = A.reshape(count * rank, -1), B.permute(1, 2, 0).reshape(-1, rank * count)
    return Factored(module, count, rank, A.cpu(), B.cpu(), lost)


_ENDS = (("right", 0), ("left", 1))
"""A is the right factor, with its rank in the first dimension, and B the left one, with it in the second."""


def _single(factor: torch.Tensor) -> torch.Tensor:
    return round_to(factor, torch.float32)


def _padded(factors: Sequence[torch.Tensor], rank: int, axis: int) -> torch.Tensor:
    """Factors of different ranks as one stack: those of lower rank gain zeros, which change no product."""
    shape = [len(factors), *factors[0].shape]
    shape[1 + axis] = rank
    stack = factors[0].new_zeros(shape)
    for index, factor in enumerate(factors):
        stack[index].narrow(axis, 0, factor.shape[axis]).copy_(factor)
    return stack


def _module(pair: Pair, config: layers.Config) -> Module:
    """The module whose weight it is, without terms: what kind of layer, and how its weight is stored."""
    shape, leaf = pair.tuned.info.shape, pair.path.rpartition(".")[2]
    kind, orientation = "linear", OUT_IN
    rows, columns = shape[0], math.prod(shape[1:])
    if len(shape) == 3 and pair.bare and "experts" in pair.path.split("."):
        # A parameter of its own, not the weight of a layer: a stack of matrices, each of them an expert's.
        kind, (rows, columns) = "experts", shape[1:]
    elif len(shape) > 2:
        kind = "conv"
    elif leaf in layers.LOOKUPS:
        kind, orientation = "embedding", IN_OUT
    elif layers.stores_in_out(config, leaf):
        kind, orientation = "conv1d", IN_OUT
    elif layers.may_store_in_out(leaf) and "model_type" not in config:
        raise Unsupported(
            f"{pair.name!r} may be of a layer that stores (in, out), as GPT-2's do, and the base has no config.json "
            "with a model_type that tells: give it one, or leave the tensor out with --exclude."
        )
    if orientation == IN_OUT:
        rows, columns = columns, rows
    return Module(pair.name, kind, orientation, columns, rows, (), stored=shape if len(shape) > 2 else None)


def _is_float(stored: StoredTensor) -> bool:
    return stored.info.dtype in TORCH and TORCH[stored.info.dtype].is_floating_point


def _computable(pair: Pair) -> bool:
    """Whether a merge can add to the base's tensor, and the other has numbers to subtract it from."""
    return pair.base is not None and pair.base.info.dtype in DTYPES and _is_float(pair.tuned)


def _require_kin(pair: Pair) -> None:
    """Unsupported for a tensor that no merge can put in the place of the base's: of another kind of dtype."""
    if pair.base is None or _computable(pair) or pair.base.info.dtype == pair.tuned.info.dtype:
        return
    raise Unsupported(
        f"{pair.name!r} is stored as {pair.base.info.dtype} in the base and as {pair.tuned.info.dtype} in the tuned "
        "model, which have no difference that a merge could add: convert one of them, or use --exclude."
    )


_CHUNK = 1 << 22


def _check_finite(stored: StoredTensor) -> None:
    """BadInput for NaN or infinity, naming file and tensor."""
    if not _is_float(stored):
        return
    flat = values(stored).reshape(-1)
    for start in range(0, flat.numel(), _CHUNK):
        if not bool(finite(flat[start : start + _CHUNK]).all()):
            raise BadInput(
                f"{stored.shard.path} holds NaN or infinity in {stored.info.name!r}: expected finite weights; the "
                "training diverged, or the file is damaged."
            )
