"""What every reader of a foreign format yields: an adapter whose names are not yet bound to a base.

No torch here: a tensor is its dtype, its shape and a way to read its bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from loreg.checkpoint import read_range
from loreg.errors import BadInput, Unsupported
from loreg.format.safetensors import nbytes_of

# The exponent bits of each dtype that a factor may have: all ones means NaN or infinity.
_EXPONENT: Mapping[str, tuple[type[np.unsignedinteger[Any]], int]] = {
    "F16": (np.uint16, 0x7C00),
    "BF16": (np.uint16, 0x7F80),
    "F32": (np.uint32, 0x7F800000),
    "F64": (np.uint64, 0x7FF0000000000000),
}


@dataclass(frozen=True, slots=True)
class RawTensor:
    """A tensor as it was saved: ``key`` is its name there. Its bytes are in memory, or in a file at ``offset``."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    data: bytes | Path
    offset: int = 0

    @property
    def nbytes(self) -> int:
        return nbytes_of(self.dtype, self.shape)

    def chunks(self) -> Iterator[memoryview]:
        """Its raw bytes, in pieces; each is valid until the next is asked for."""
        if isinstance(self.data, bytes):
            yield memoryview(self.data)
        else:
            yield from read_range(self.data, self.offset, self.nbytes)

    def check_finite(self) -> None:
        """Refuse NaN and infinity (BadInput), and a dtype that holds no real numbers (Unsupported)."""
        if self.dtype not in _EXPONENT:
            raise Unsupported(
                f"Tensor {self.key!r} has dtype {self.dtype}: expected one of {', '.join(_EXPONENT)}; convert it."
            )
        word, mask = _EXPONENT[self.dtype]
        for chunk in self.chunks():
            if bool(np.any(np.bitwise_and(np.frombuffer(chunk, dtype=word), word(mask)) == mask)):
                raise BadInput(f"Tensor {self.key!r} holds NaN or infinity: expected finite numbers; train again.")


@dataclass(frozen=True, slots=True)
class DraftTerm:
    """scale·B·A as the trainer saved it: A (rank, in), B (out, rank)."""

    A: RawTensor
    B: RawTensor
    alpha: float | None
    scale: float

    @property
    def rank(self) -> int:
        return self.A.shape[0]


@dataclass(frozen=True, slots=True)
class DraftModule:
    """One adapted module. ``embedding``: the layer looks rows up, so that its weight is (in, out).

    ``in_out_hint``: whether the trainer says that a linear layer stores its weight as (in, out).
    """

    term: DraftTerm
    embedding: bool
    in_out_hint: bool
    bias: RawTensor | None = None


@dataclass(frozen=True, slots=True)
class DraftFile:
    """A file of what was pushed. ``header``: how many bytes precede ``tensors``; None for a plain file."""

    path: Path
    tensors: tuple[RawTensor, ...] = ()
    header: int | None = None


@dataclass(frozen=True, slots=True)
class Draft:
    """An adapter in its trainer's words: ``modules`` by module path, ``full`` by tensor path.

    ``saved_modules``: names of modules that were saved whole, or ends of such names, and so may be new to the
    base. ``left_out``: files of the directory that are no part of the adapter.
    """

    format: str
    base_name: str | None
    modules: Mapping[str, DraftModule]
    full: Mapping[str, RawTensor]
    saved_modules: frozenset[str]
    files: tuple[DraftFile, ...]
    left_out: tuple[str, ...] = ()
    license: str | None = None
    training: Mapping[str, Any] = field(default_factory=dict)
