"""The terms of an edit: the tensors that an adapter brings, and what is done with them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from loreg.digest import Digest
from loreg.errors import BadInput
from loreg.format import forms
from loreg.format.fields import Fields
from loreg.format.fingerprint import BaseTensor
from loreg.format.safetensors import nbytes_of


@dataclass(frozen=True, slots=True)
class TensorRef:
    """A tensor inside a blob: dtype by its safetensors name, and the BLAKE3 of its raw bytes."""

    dtype: str
    shape: tuple[int, ...]
    digest: Digest

    @property
    def nbytes(self) -> int:
        return nbytes_of(self.dtype, self.shape)

    @property
    def content_name(self) -> str:
        """The name by content alone [B4, M7]: tensors that are the same are then stored once."""
        return BaseTensor("", self.dtype, self.shape, self.nbytes, self.digest).nameless_leaf.hex

    def to_json(self) -> dict[str, Any]:
        return {"dtype": self.dtype, "shape": list(self.shape), "digest": str(self.digest)}

    @classmethod
    def from_fields(cls, fields: Fields) -> TensorRef:
        with fields as f:
            ref = cls(f.text("dtype"), f.shape("shape"), f.digest("digest"))
        nbytes_of(ref.dtype, ref.shape)
        return ref


@dataclass(frozen=True, slots=True)
class LowRankTerm:
    """scale·B·A with A of shape (rank, in) and B of shape (out, rank).

    ``alpha`` is what the trainer wrote, or None; ``scale`` is what counts.
    """

    rank: int
    alpha: float | None
    scale: float
    A: TensorRef
    B: TensorRef

    def is_exact(self, out_in: tuple[int, int]) -> bool:
        """Whether it is a sum of products of what is stored, and nothing in it has to be rounded [A1]."""
        return True

    def scaled(self, weight: float) -> LowRankTerm:
        """The term ``weight`` times: one IEEE double product. What the trainer wrote as α is then no more true."""
        return replace(self, alpha=None, scale=weight * self.scale)

    def named(self, path: str, index: int) -> Iterator[tuple[str, TensorRef]]:
        """The names [M7] and contents of its tensors in the factors blob, as term ``index`` of ``path``."""
        yield f"{path}.lora_A.{index}", self.A
        yield f"{path}.lora_B.{index}", self.B

    def check(self, out_in: tuple[int, int], path: str) -> None:
        """BadInput unless it fits a weight of ``out_in`` [M4]."""
        expected, found = ((self.rank, out_in[1]), (out_in[0], self.rank)), (self.A.shape, self.B.shape)
        if found != expected:
            raise BadInput(f"{path}: expected A and B of shapes {expected}, found {found}.")

    def to_json(self) -> dict[str, Any]:
        ends = {"A": self.A.to_json(), "B": self.B.to_json()}
        return {"rank": self.rank, "alpha": self.alpha, "scale": self.scale, **ends}

    @classmethod
    def from_fields(cls, fields: Fields) -> LowRankTerm:
        with fields as f:
            return cls(
                rank=f.natural("rank", 1),
                alpha=f.optional_real("alpha"),
                scale=f.real("scale"),  # [M5]
                A=TensorRef.from_fields(f.object("A")),
                B=TensorRef.from_fields(f.object("B")),
            )


@dataclass(frozen=True, slots=True)
class BiasTerm:
    """scale·value, added to a bias of shape (out,)."""

    scale: float
    value: TensorRef

    def is_exact(self, out_in: tuple[int, int]) -> bool:
        """As of a term of a weight."""
        return True

    def scaled(self, weight: float) -> BiasTerm:
        """The term ``weight`` times: one IEEE double product."""
        return replace(self, scale=weight * self.scale)

    def named(self, path: str, index: int) -> Iterator[tuple[str, TensorRef]]:
        """The name [M7] and content of its tensor in the factors blob, as bias term ``index`` of ``path``."""
        yield f"{path}.lora_bias.{index}", self.value

    def check(self, out_in: tuple[int, int], path: str) -> None:
        """BadInput unless it fits a bias of that many outputs [M4]."""
        if self.value.shape != out_in[:1]:
            raise BadInput(f"{path}: expected a bias of {out_in[0]}, found {self.value.shape}.")

    def to_json(self) -> dict[str, Any]:
        return {"scale": self.scale, "value": self.value.to_json()}

    @classmethod
    def from_fields(cls, fields: Fields) -> BiasTerm:
        with fields as f:
            return cls(f.real("scale"), TensorRef.from_fields(f.object("value")))


@dataclass(frozen=True, slots=True)
class FormTerm:
    """weight·(what the form makes of the tensors, and of W where it reads it) [M9].

    ``scale`` counts inside the form, ``weight`` outside: for a form that reads W they differ. ``tensors`` are by
    role; modules may share one. ``rank`` is what the trainer calls so, 0 where there is none.
    """

    form: str
    rank: int
    alpha: float | None
    scale: float
    weight: float
    tensors: Mapping[str, TensorRef]
    parameters: Mapping[str, Any]

    @property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {role: ref.shape for role, ref in self.tensors.items()}

    def is_exact(self, out_in: tuple[int, int]) -> bool:
        """Whether it is a sum of products of what is stored; else it is computed in a stated order [A6]."""
        return forms.is_exact(self.form, self._shapes, self.parameters, out_in)

    def scaled(self, weight: float) -> FormTerm:
        """The term ``weight`` times: one IEEE double product, outside the form."""
        return replace(self, weight=weight * self.weight)

    def named(self, path: str, index: int) -> Iterator[tuple[str, TensorRef]]:
        """The names [M7] and contents of its tensors in the factors blob."""
        return ((ref.content_name, ref) for ref in self.tensors.values())

    def check(self, out_in: tuple[int, int], path: str) -> None:
        """BadInput unless tensors and parameters are those of the form, and fit a weight of ``out_in`` [M9]."""
        forms.check(self.form, self._shapes, self.parameters, out_in, path)

    def to_json(self) -> dict[str, Any]:
        return {
            "form": self.form,
            "rank": self.rank,
            "alpha": self.alpha,
            "scale": self.scale,
            "weight": self.weight,
            "tensors": {role: ref.to_json() for role, ref in self.tensors.items()},
            "parameters": dict(self.parameters),
        }

    @classmethod
    def from_fields(cls, fields: Fields) -> FormTerm:
        with fields as f:
            return cls(
                form=f.choice("form", *forms.FORMS),
                rank=f.natural("rank"),
                alpha=f.optional_real("alpha"),
                scale=f.real("scale"),  # [M5]
                weight=f.real("weight"),
                tensors={role: TensorRef.from_fields(entry) for role, entry in f.mapping("tensors")},
                parameters=f.raw_object("parameters"),
            )


def term_from(fields: Fields) -> LowRankTerm | FormTerm:
    """A term of a weight: plain LoRA, or with a ``form``."""
    return FormTerm.from_fields(fields) if fields.has("form") else LowRankTerm.from_fields(fields)


def bias_term_from(fields: Fields) -> BiasTerm | FormTerm:
    """A term of a bias: a vector that is added, or with a ``form``."""
    return FormTerm.from_fields(fields) if fields.has("form") else BiasTerm.from_fields(fields)
