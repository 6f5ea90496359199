"""What an adapter does to one module of the model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

from loreg.digest import Digest
from loreg.errors import BadInput
from loreg.format.fields import Fields
from loreg.format.fingerprint import BaseTensor
from loreg.format.terms import BiasTerm, FormTerm, LowRankTerm, TensorRef, bias_term_from, term_from

_NO_MATRIX = ("conv", "experts", "vector")

KINDS = ("linear", "conv1d", "embedding", *_NO_MATRIX)
"""What a module is. ``conv1d`` is the GPT-2 layer that stores its weight as (in, out); ``conv`` a convolution, whose
weight (out, in / groups, …) is taken as a matrix of ``out`` rows; ``experts`` a stack of matrices; ``vector`` has but
one dimension, as a norm's weight, and is taken as a matrix of one column."""

OUT_IN, IN_OUT = "out_in", "in_out"
"""How a checkpoint stores a weight: (out, in), ΔW = s·BA; or (in, out), ΔW = s·(BA)ᵀ [M4]."""


@dataclass(frozen=True, slots=True)
class Module:
    """What an adapter does to one module of the model: a sum of terms on its weight, and on its bias [M4, M9].

    A trained adapter has one term. A composed one keeps the terms of its parents side by side, unfolded, so
    that a sum loses nothing. ``tensor`` and ``bias_tensor`` are names in the checkpoint; the module's own
    name, the key in the manifest, is its path in the model. ``stored``: the shape of the weight in the checkpoint
    where it is no matrix.
    """

    tensor: str
    kind: str
    orientation: str
    in_features: int
    out_features: int
    terms: tuple[LowRankTerm | FormTerm, ...]
    bias_tensor: str | None = None
    bias_terms: tuple[BiasTerm | FormTerm, ...] = ()
    stored: tuple[int, ...] | None = None

    @property
    def rank(self) -> int:
        return sum(term.rank for term in self.terms)

    @property
    def matrix(self) -> tuple[int, int]:
        """The weight as a matrix, of each expert where there are several, as the checkpoint orients it."""
        out_in = (self.out_features, self.in_features)
        return out_in if self.orientation == OUT_IN else out_in[::-1]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight as the checkpoint stores it."""
        return self.matrix if self.stored is None else self.stored

    @property
    def view(self) -> tuple[int, ...]:
        """The shape that its edit has: the matrix, or one for each expert."""
        if self.kind == "vector":
            return self.matrix[:1]
        return (self.shape[0], *self.matrix) if self.kind == "experts" else self.matrix

    @property
    def plain(self) -> bool:
        """Whether it is LoRA and nothing else: Σ scale·BA and vectors on the bias."""
        return not any(isinstance(term, FormTerm) for term in (*self.terms, *self.bias_terms))

    @property
    def exact(self) -> bool:
        """Whether every term is a sum of products of what is stored [A1], or some have to be computed first [A6]."""
        size = self.out_features, self.in_features
        return all(term.is_exact(size) for term in self.terms) and all(
            term.is_exact((self.out_features, 1)) for term in self.bias_terms
        )

    def tensors(self, path: str) -> Iterator[tuple[str, TensorRef]]:
        """The names [M7] and contents of its tensors in the factors blob."""
        for terms in (self.terms, self.bias_terms):
            for index, term in enumerate(terms):
                yield from term.named(path, index)

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
            **({"stored": list(self.stored)} if self.stored is not None else {}),
        }

    @classmethod
    def from_fields(cls, fields: Fields) -> Module:
        with fields as f:
            kind = f.choice("kind", *KINDS)
            module = cls(
                tensor=f.text("tensor"),
                kind=kind,
                orientation=f.choice("orientation", OUT_IN, IN_OUT),
                in_features=f.natural("in", 1),
                out_features=f.natural("out", 1),
                terms=tuple(term_from(term) for term in f.items("terms")),
                bias_tensor=f.optional_text("bias_tensor"),
                bias_terms=tuple(bias_term_from(term) for term in f.items("bias_terms")),
                stored=f.shape("stored") if kind in _NO_MATRIX else None,
            )
            rank = f.natural("rank")
        module._check(fields.path, rank)
        return module

    def _is_stored_so(self, shape: tuple[int, ...]) -> bool:
        if self.kind == "vector":
            return shape == self.view and self.orientation == OUT_IN and self.in_features == 1
        if self.kind == "experts":
            return shape == self.view
        return len(shape) > 2 and prod(shape) == prod(self.view) and shape[0] == self.view[0]

    def _check(self, path: str, rank: int) -> None:
        if not self.terms:  # [M4]
            raise BadInput(f"{path}.terms: expected at least one term.")
        for term in self.terms:
            term.check((self.out_features, self.in_features), path)
            stack = term.parameters["experts"] if isinstance(term, FormTerm) and term.form == "lora_experts" else None
            if stack != (self.view[0] if self.kind == "experts" else None):  # [F2]
                raise BadInput(
                    f"{path}: a stack of matrices is edited by terms for as many experts, and nothing else by such."
                )
        if self.rank != rank:  # [M4]
            raise BadInput(f"{path}.rank: expected {self.rank}, the sum over its terms, found {rank}.")
        if (self.bias_tensor is None) != (not self.bias_terms):  # [M4]
            raise BadInput(f"{path}: bias_tensor and bias_terms are given together, or not at all.")
        for bias in self.bias_terms:
            bias.check((self.out_features, 1), path)
        if self.stored is not None and not self._is_stored_so(self.stored):  # [M4]
            raise BadInput(
                f"{path}.stored: expected a shape of {list(self.view)} elements, found {list(self.stored)}."
            )


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
