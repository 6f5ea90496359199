"""What every reader of a foreign format yields: an adapter whose names are not yet bound to a base.

No torch here: a tensor is its dtype, its shape and a way to read its bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from loreg.checkpoint import FileStamp, open_binary, read_exactly, read_range
from loreg.digest import Digest, Hasher
from loreg.errors import BadInput, Unsupported
from loreg.format import forms
from loreg.format.fingerprint import BaseTensor
from loreg.format.safetensors import BITS, Header, read_header
from loreg.layers import Config

IN_MEMORY = 16 << 20
"""Bytes of data up to which a file is read once. A push looks at every tensor four times, and there opening a file of
hundreds of small ones for each takes longer than all hashing."""

# The exponent bits of each dtype that a factor may have: all ones means NaN or infinity.
_EXPONENT: Mapping[str, tuple[type[np.unsignedinteger[Any]], int]] = {
    "F16": (np.uint16, 0x7C00),
    "BF16": (np.uint16, 0x7F80),
    "F32": (np.uint32, 0x7F800000),
    "F64": (np.uint64, 0x7FF0000000000000),
}


@dataclass(frozen=True, slots=True)
class RawTensor:
    """A tensor as it was saved: ``key`` is its name there. Its bytes are in memory, or in a file, from ``offset``."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    data: bytes | Path
    offset: int = 0

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * BITS[self.dtype] // 8

    def chunks(self) -> Iterator[memoryview]:
        """Its raw bytes, in pieces; each is valid until the next is asked for."""
        if isinstance(self.data, bytes):
            yield memoryview(self.data)[self.offset : self.offset + self.nbytes]
        else:
            yield from read_range(self.data, self.offset, self.nbytes)

    def same_as(self, other: RawTensor) -> bool:
        """Whether both are the same tensor, byte for byte."""
        if (self.dtype, self.shape) != (other.dtype, other.shape):
            return False
        return self.digest() == other.digest()

    def content(self) -> bytes:
        """All of its raw bytes, in memory."""
        return b"".join(bytes(chunk) for chunk in self.chunks())

    def transposed(self) -> RawTensor:
        """A matrix with rows and columns exchanged, in memory, under another key: no file holds it so."""
        width = self.nbytes // max(1, prod(self.shape))
        turned = np.frombuffer(self.content(), dtype=f"V{width}").reshape(self.shape).T
        return RawTensor(f"{self.key}ᵀ", self.dtype, self.shape[::-1], np.ascontiguousarray(turned).tobytes())

    def digest(self) -> Digest:
        """The BLAKE3 of its raw bytes."""
        hasher = Hasher()
        for chunk in self.chunks():
            hasher.update(chunk)
        return hasher.digest()

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
    """A term as the trainer saved it, in the words of ``loreg.format.forms``: tensors by role, and parameters.

    ``form`` is ``lora`` for scale·B·A, ``dense`` for a vector on a bias.
    """

    form: str
    tensors: Mapping[str, RawTensor]
    scale: float
    alpha: float | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {role: tensor.shape for role, tensor in self.tensors.items()}

    @property
    def rank(self) -> int:
        return forms.FORMS[self.form].rank(self.shapes, self.parameters)

    def size(self) -> tuple[int | None, int | None]:
        """(out, in) of the weights that it fits, None where it does not say. Raises BadInput if it fits none."""
        return forms.FORMS[self.form].shape(self.shapes, self.parameters)


@dataclass(frozen=True, slots=True)
class DraftModule:
    """One adapted module. ``parameter``: which of its parameters the terms are for.

    ``embedding``: the layer looks rows up, so that its weight is (in, out). ``in_out_hint``: whether the trainer
    says that a linear layer stores its weight as (in, out). ``together``: where the model ties the weight to another,
    the trainer changed both; else that one alone. ``repeats``: the path of a module whose edit this is once more, as
    of a head that is adapted together with the embedding it is tied to.
    """

    terms: tuple[DraftTerm, ...]
    bias_terms: tuple[DraftTerm, ...] = ()
    parameter: str = "weight"
    embedding: bool = False
    in_out_hint: bool = False
    together: bool = False
    repeats: str | None = None

    @property
    def bias(self) -> str:
        """The name of the bias beside the parameter, as torch's layers have it."""
        return self.parameter.removesuffix("weight") + "bias"


@dataclass(frozen=True, slots=True)
class DraftFile:
    """A file of what was pushed. ``header``: the bytes before ``tensors``; None for one that is not looked into."""

    path: Path
    tensors: tuple[RawTensor, ...] = ()
    header: bytes | None = None


def read_tensors(path: Path) -> tuple[Header, tuple[RawTensor, ...]]:
    """What a safetensors file says of itself, and its tensors; those of a small one are in memory then.

    Raises NotFound, BadInput.
    """
    size = FileStamp.of(path).size
    with open_binary(path) as file:
        header = read_header(file, size, what=str(path))
        data: bytes | Path = path
        start = header.data_start
        if size - start <= IN_MEMORY:
            whole = bytearray(size - start)
            read_exactly(file.fileno(), memoryview(whole), start, path)
            data, start = bytes(whole), 0
    tensors = (RawTensor(info.name, info.dtype, info.shape, data, start + info.start) for info in header.tensors)
    return header, tuple(tensors)


Locate: TypeAlias = "Callable[[Draft, Mapping[str, BaseTensor], Config], Draft]"
"""The draft for a base: of these tensors by name, and this ``config.json``."""


@dataclass(frozen=True, slots=True)
class Draft:
    """An adapter in its trainer's words: ``modules`` by module path, ``full`` by tensor path.

    ``saved_modules``: names of modules that were saved whole, or ends of such names, and so may be new to the
    base. ``together``: of ``full``, what replaces a tied weight in both its places. ``left_out``: files of the
    directory that are no part of the adapter. ``locate``: of a format whose names or shapes say too little by
    themselves, what makes the draft for a base out of this one.
    """

    format: str
    base_name: str | None
    modules: Mapping[str, DraftModule]
    full: Mapping[str, RawTensor]
    saved_modules: frozenset[str]
    files: tuple[DraftFile, ...]
    together: frozenset[str] = frozenset()
    left_out: tuple[str, ...] = ()
    license: str | None = None
    training: Mapping[str, Any] = field(default_factory=dict)
    locate: Locate | None = None

    def located(self, tensors: Mapping[str, BaseTensor], config: Config) -> Draft:
        """The draft for a base of these ``tensors`` and this ``config.json``. Raises what ``locate`` does."""
        return self if self.locate is None else self.locate(self, tensors, config)
