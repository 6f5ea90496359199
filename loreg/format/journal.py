"""Undo journals: what a merged model, its recipe and its adapters do not say about the base [U1–U5].

A journal is a canonical safetensors file of byte vectors. For a tensor that the merge changed it holds, block by
block, by how many storage values each element of the base lies from what taking the delta back gives; or the bytes
of the block themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from operator import lt
from struct import Struct

from loreg.digest import Digest
from loreg.errors import BadInput
from loreg.format.safetensors import Header, canonical_header

FORMAT = "loreg-undo/1"
FILE = "loreg.undo"
BLOCK = 65536
"""Elements of a block."""
RAW = 0xFFFFFFFF
ESCAPE = -128
TENSOR, HEADER, BESIDE = "tensor/", "header/", "file/"
"""What the names of entries begin with: a tensor's records; the first bytes of a shard; a file beside the weights."""

_COUNT, _WIDE = Struct("<I"), Struct("<q")


@dataclass(frozen=True, slots=True)
class Undoes:
    """What a journal belongs to: the ``recipe`` of the merge, its ``base``, and the root of what it wrote."""

    recipe: Digest
    base: Digest
    weights_root: Digest

    def header(self, sizes: dict[str, int]) -> Header:
        """The header of a journal with entries of these sizes in bytes [U1]."""
        metadata = {
            "format": FORMAT,
            "recipe": str(self.recipe),
            "base": str(self.base),
            "weights_root": str(self.weights_root),
        }
        return canonical_header([(name, "U8", (size,)) for name, size in sizes.items()], metadata)

    @classmethod
    def of(cls, header: Header, *, what: str) -> Undoes:
        """From the header of a journal. Raises BadInput unless it is canonical [U1]."""
        found = dict(header.metadata)
        if found.pop("format", None) != FORMAT:
            raise BadInput(f"{what} is no undo journal that is known here: expected the format {FORMAT}.")
        if set(found) != {"recipe", "base", "weights_root"}:
            raise BadInput(f"{what}: expected base, recipe and weights_root as metadata, found {sorted(found)}.")
        undoes = cls(*(Digest.parse(found[key]) for key in ("recipe", "base", "weights_root")))
        for tensor in header.tensors:
            if not tensor.name.startswith((TENSOR, HEADER, BESIDE)) or tensor.name in (TENSOR, HEADER, BESIDE):
                raise BadInput(f"{what} has an entry {tensor.name!r}: expected {TENSOR}…, {HEADER}… or {BESIDE}….")
        sizes = {tensor.name: tensor.nbytes for tensor in header.tensors}
        if header.raw != undoes.header(sizes).raw:
            raise BadInput(f"{what} is not in the canonical form of a journal: was it written by another program?")
        return undoes


@dataclass(frozen=True, slots=True)
class Record:
    """One block of a tensor [U3]: its ``raw`` bytes, or corrections at ascending ``offsets``, all of them there."""

    raw: bytes | None
    offsets: memoryview
    corrections: memoryview
    """int8; ESCAPE stands for the next of ``wide``."""
    wide: tuple[int, ...]


_EMPTY = memoryview(b"")


def records(read: Callable[[int], bytes], size: int, count: int, width: int, *, what: str) -> Iterator[Record]:
    """The records of an entry of ``size`` bytes, for a tensor of ``count`` elements of ``width`` bytes.

    ``read(n)`` gives the next ``n`` bytes. Raises BadInput for anything that a writer does not write [U3, U4], except
    for a block that is raw without need, which only the tensor itself would show.
    """
    left = size

    def take(length: int) -> bytes:
        nonlocal left
        left -= length
        data = read(length) if left >= 0 else b""
        if len(data) != length:
            raise BadInput(f"{what} ends within a record: expected {length:,} bytes more.")
        return data

    for first in range(0, count, BLOCK):
        elements = min(BLOCK, count - first)
        (found,) = _COUNT.unpack(take(4))
        if found == RAW:
            yield Record(take(elements * width), _EMPTY, _EMPTY, ())
        elif found > elements:
            raise BadInput(f"{what} has {found:,} corrections in a block of {elements:,} elements.")
        else:
            record = _sparse(take, found, elements, what)
            if 3 * found + 8 * len(record.wide) > elements * width:
                raise BadInput(f"{what} has a block that is longer than the bytes that it stands for.")
            yield record
    if left:
        raise BadInput(f"{what} goes on for {left:,} bytes after its last record.")


def _sparse(take: Callable[[int], bytes], count: int, elements: int, what: str) -> Record:
    offsets, raw = memoryview(take(2 * count)).cast("H"), take(count)
    corrections = memoryview(raw).cast("b")
    if not all(map(lt, offsets, offsets[1:])) or (count and offsets[-1] >= elements):
        raise BadInput(f"{what} has corrections that are not at ascending places of their block.")
    if 0 in raw:
        raise BadInput(f"{what} has a correction of nothing.")
    wide = tuple(_WIDE.unpack(take(8))[0] for _ in range(raw.count(ESCAPE & 0xFF)))
    if any(-128 < value < 128 for value in wide):
        raise BadInput(f"{what} has a long correction that would fit into a byte.")
    return Record(None, offsets, corrections, wide)
