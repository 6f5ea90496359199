"""What an adapter does to one module of the model, and the tensors that it does it with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from loreg.digest import Digest
from loreg.errors import BadInput
from loreg.format.fields import Fields
from loreg.format.fingerprint import BaseTensor
from loreg.format.safetensors import nbytes_of

KINDS = ("linear", "conv1d", "embedding")
"""What a module is. ``conv1d`` is the GPT-2 layer that stores its weight as (in, out)."""

OUT_IN, IN_OUT = "out_in", "in_out"
"""How a checkpoint stores a weight: (out, in), ΔW = s·BA; or (in, out), ΔW = s·(BA)ᵀ [M4]."""


@dataclass(frozen=True, slots=True)
class TensorRef:
    """A tensor inside a blob: dtype by its safetensors name, and the BLAKE3 of its raw bytes."""

    dtype: str
    shape: tuple[int, ...]
    digest: Digest

    @property
    def nbytes(self) -> int:
        return nbytes_of(self.dtype, self.shape)

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

    def to_json(self) -> dict[str, Any]:
        return {"scale": self.scale, "value": self.value.to_json()}

    @classmethod
    def from_fields(cls, fields: Fields) -> BiasTerm:
        with fields as f:
            return cls(f.real("scale"), TensorRef.from_fields(f.object("value")))


@dataclass(frozen=True, slots=True)
class Module:
    """What an adapter does to one module of the model: Σ scaleᵢ·Bᵢ·Aᵢ on its weight, and a bias [M4].

    A trained adapter has one term. A composed one keeps the terms of its parents side by side, unfolded, so
    that a sum loses nothing. ``tensor`` and ``bias_tensor`` are names in the checkpoint; the module's own
    name, the key in the manifest, is its path in the model.
    """

    tensor: str
    kind: str
    orientation: str
    in_features: int
    out_features: int
    terms: tuple[LowRankTerm, ...]
    bias_tensor: str | None = None
    bias_terms: tuple[BiasTerm, ...] = ()

    @property
    def rank(self) -> int:
        return sum(term.rank for term in self.terms)

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the weight as the checkpoint stores it."""
        out_in = (self.out_features, self.in_features)
        return out_in if self.orientation == OUT_IN else out_in[::-1]

    def tensors(self, path: str) -> Iterator[tuple[str, TensorRef]]:
        """The names [M7] and contents of its tensors in the factors blob."""
        for index, term in enumerate(self.terms):
            yield f"{path}.lora_A.{index}", term.A
            yield f"{path}.lora_B.{index}", term.B
        for index, bias in enumerate(self.bias_terms):
            yield f"{path}.lora_bias.{index}", bias.value

    def to_json(self) -> dict[str, Any]:
        return {
            "tensor": self.tensor,
            "kind": self.kind,
            "orientation": self.orientation,
            "in": self.in_features,
            "out": self.out_features,
            "rank": self.rank,
            "terms": [term.to_json() for term in self.terms],
            "bias_tensor": self.bias_tensor,
            "bias_terms": [term.to_json() for term in self.bias_terms],
        }

    @classmethod
    def from_fields(cls, fields: Fields) -> Module:
        with fields as f:
            module = cls(
                tensor=f.text("tensor"),
                kind=f.choice("kind", *KINDS),
                orientation=f.choice("orientation", OUT_IN, IN_OUT),
                in_features=f.natural("in", 1),
                out_features=f.natural("out", 1),
                terms=tuple(LowRankTerm.from_fields(term) for term in f.items("terms")),
                bias_tensor=f.optional_text("bias_tensor"),
                bias_terms=tuple(BiasTerm.from_fields(term) for term in f.items("bias_terms")),
            )
            rank = f.natural("rank", 1)
        module._check(fields.path, rank)
        return module

    def _check(self, path: str, rank: int) -> None:
        for term in self.terms:
            expected = ((term.rank, self.in_features), (self.out_features, term.rank))
            if (term.A.shape, term.B.shape) != expected:  # [M4]
                found = (term.A.shape, term.B.shape)
                raise BadInput(f"{path}: expected A and B of shapes {expected}, found {found}.")
        if self.rank != rank:  # [M4]
            raise BadInput(f"{path}.rank: expected {self.rank}, the sum over its terms, found {rank}.")
        if (self.bias_tensor is None) != (not self.bias_terms):  # [M4]
            raise BadInput(f"{path}: bias_tensor and bias_terms are given together, or not at all.")
        for bias in self.bias_terms:
            if bias.value.shape != (self.out_features,):  # [M4]
                raise BadInput(f"{path}: expected a bias of {self.out_features}, found {bias.value.shape}.")


@dataclass(frozen=True, slots=True)
class FullTensor:
    """A checkpoint tensor that is replaced outright, or added [M6]; alone in its blob, so versions share it.

    ``module``: the path in the model, as the trainer wrote it.
    """

    blob: Digest
    value: TensorRef
    module: str

    def leaf(self, name: str) -> Digest:
        """The leaf [B1] that the tensor has under ``name`` in a checkpoint."""
        value = self.value
        return BaseTensor(name, value.dtype, value.shape, value.nbytes, value.digest).leaf

    def to_json(self) -> dict[str, Any]:
        return {"blob": str(self.blob), "module": self.module, "value": self.value.to_json()}

    @classmethod
    def from_fields(cls, fields: Fields) -> FullTensor:
        with fields as f:
            return cls(f.digest("blob"), TensorRef.from_fields(f.object("value")), f.text("module"))
