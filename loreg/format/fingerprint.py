"""The identity of a base: what its tensors are, however they are sharded, ordered or annotated.

A name such as ``meta-llama/Llama-3-8B`` says what somebody called a set of weights. Two downloads of that
name can differ by a revision, a dtype or one element, and an adapter merged into the wrong one gives no
error, only wrong answers. So loreg knows a base by its bytes, at several strengths: see ``Match``.
"""

from __future__ import annotations

import enum
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from blake3 import blake3

from loreg.digest import Digest
from loreg.errors import BadInput


@dataclass(frozen=True, slots=True)
class BaseTensor:
    """One tensor of a checkpoint: dtype by its safetensors name, and the BLAKE3 of its raw bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    content: Digest

    @property
    def leaf(self) -> Digest:
        """Name, dtype, shape and content under one digest [B1]."""
        return _sealed(b"loreg-tensor-v1\0", _named(self.name) + self._described() + self.content.raw)

    @property
    def nameless_leaf(self) -> Digest:
        """The same without the name, for ``content_set`` [B4]."""
        return _sealed(b"loreg-content-v1\0", self._described() + self.content.raw)

    @property
    def structure(self) -> bytes:
        return _named(self.name) + _typed(self.dtype, self.shape)

    def _described(self) -> bytes:
        return _typed(self.dtype, self.shape) + self.nbytes.to_bytes(8, "little")


@dataclass(frozen=True, slots=True)
class BaseIdentity:
    """The three roots of a whole checkpoint."""

    weights_root: Digest
    structure_root: Digest
    content_set: Digest


def identify(tensors: Iterable[BaseTensor]) -> BaseIdentity:
    """The roots over ``tensors``, in any order [B2–B4]. Raises BadInput for a repeated name."""
    ordered = sorted(tensors, key=lambda tensor: tensor.name.encode("utf-8"))
    for first, second in itertools.pairwise(ordered):
        if first.name == second.name:
            raise BadInput(f"The checkpoint holds two tensors named {first.name!r}: expected one.")
    # A set, not a list: storing a tied head twice, or once, is the same content.
    contents = sorted({tensor.nameless_leaf.raw for tensor in ordered})
    return BaseIdentity(
        weights_root=_root(b"loreg-base-v1\0", [tensor.leaf.raw for tensor in ordered]),
        structure_root=_root(b"loreg-structure-v1\0", [tensor.structure for tensor in ordered]),
        content_set=_root(b"loreg-content-set-v1\0", contents),
    )


class Match(enum.IntEnum):
    """How a base agrees with the one that an adapter names: the strongest that holds is reported [B5].

    ``TOUCHED`` is what a merge needs: every tensor that the adapter adapts has the bytes it was trained on.
    """

    NONE = 0
    STRUCTURE = 1
    TOUCHED = 2
    CONTENT = 3
    WEIGHTS = 4
    HUB_PIN = 5

    @property
    def label(self) -> str:
        """Its name in the specification [B5]."""
        return _LABELS[self]


_LABELS = {
    Match.NONE: "none",
    Match.STRUCTURE: "structure_root",
    Match.TOUCHED: "touched",
    Match.CONTENT: "content_set",
    Match.WEIGHTS: "weights_root",
    Match.HUB_PIN: "hub_pin",
}


def match_base(
    expected: BaseIdentity, touched: Mapping[str, Digest], tensors: Mapping[str, BaseTensor]
) -> tuple[Match, tuple[str, ...]]:
    """Compare the base that an adapter names with the one at hand [B5].

    ``expected`` and ``touched`` (tensor name → leaf) come from the adapter's manifest, ``tensors`` is the base
    at hand. Returns the level, and the touched tensors that differ or are missing, in the order of their names.
    """
    here = identify(tensors.values())
    if here.weights_root == expected.weights_root:
        return Match.WEIGHTS, ()
    differing = tuple(
        sorted(name for name, leaf in touched.items() if name not in tensors or tensors[name].leaf != leaf)
    )
    if not differing and (touched or here.content_set == expected.content_set):
        return (Match.CONTENT if here.content_set == expected.content_set else Match.TOUCHED), ()
    return (Match.STRUCTURE if here.structure_root == expected.structure_root else Match.NONE), differing


def _sealed(domain: bytes, payload: bytes) -> Digest:
    return Digest(blake3(domain + payload).hexdigest())


def _root(domain: bytes, items: list[bytes]) -> Digest:
    return _sealed(domain, len(items).to_bytes(8, "little") + b"".join(items))


def _named(name: str) -> bytes:
    encoded = name.encode("utf-8")
    return len(encoded).to_bytes(4, "little") + encoded


def _typed(dtype: str, shape: tuple[int, ...]) -> bytes:
    encoded = dtype.encode("ascii")
    return (
        len(encoded).to_bytes(1, "little")
        + encoded
        + len(shape).to_bytes(4, "little")
        + b"".join(size.to_bytes(8, "little") for size in shape)
    )
