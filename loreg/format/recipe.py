"""What a merged model is made of: the recipe, and the record that travels with it as ``loreg.json``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from loreg.digest import Digest
from loreg.errors import BadInput, UsageError
from loreg.format import canonical_json
from loreg.format.fields import Fields
from loreg.format.fingerprint import BaseTensor, identify
from loreg.format.methods import EXACT, LAPACK, METHODS, ORDERED, read
from loreg.format.reference import format_weight
from loreg.format.safetensors import check_name, nbytes_of

FORMAT = "loreg/1"
DTYPE_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
"""Storage dtypes that a model can be written in [R4], by the container's name, with the name that people use."""

DTYPES = (*DTYPE_NAMES, "F8_E4M3", "F8_E5M2")
"""Storage dtypes that a merge computes."""


@dataclass(frozen=True, order=True, slots=True)
class RecipeTerm:
    """A summand: the digest of an adapter's manifest, and its weight as canonical decimal text [R2]."""

    adapter: Digest
    weight: str

    @property
    def value(self) -> float:
        return float(self.weight)


@dataclass(frozen=True, slots=True)
class Recipe:
    """A merge as a value. Recipes of the same sum of the same adapters are the same bytes [R1].

    ``base``: weights_root of what is merged into. ``dtype``: the storage dtype of every floating tensor of
    the output, or None to keep each tensor's own. ``base_mismatch``: the user overrode the base check.
    """

    base: Digest
    terms: tuple[RecipeTerm, ...]
    method: str = "linear"
    parameters: Mapping[str, Any] = field(default_factory=dict)
    arithmetic: str = EXACT
    dtype: str | None = None
    base_mismatch: bool = False

    @classmethod
    def of(
        cls,
        base: Digest,
        terms: Iterable[tuple[Digest, float]],
        *,
        method: str = "linear",
        parameters: Mapping[str, Any] | None = None,
        arithmetic: str = EXACT,
        dtype: str | None = None,
        base_mismatch: bool = False,
    ) -> Recipe:
        """A recipe with its terms in canonical order, those of weight zero left out as they add nothing."""
        kept = (RecipeTerm(adapter, format_weight(weight)) for adapter, weight in terms if weight != 0)
        return cls(base, tuple(sorted(kept)), method, dict(parameters or {}), arithmetic, dtype, base_mismatch)

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "kind": "recipe",
            "base": str(self.base),
            "terms": [{"adapter": str(term.adapter), "weight": term.weight} for term in self.terms],
            "method": self.method,
            "parameters": dict(self.parameters),
            "arithmetic": self.arithmetic,
            "dtype": self.dtype,
            "base_mismatch": self.base_mismatch,
        }

    def dump(self) -> bytes:
        return canonical_json.dumps(self.to_json())

    @property
    def digest(self) -> Digest:
        return Digest.of(self.dump())

    @classmethod
    def parse(cls, data: bytes) -> Recipe:
        """From canonical bytes [J6, R1–R4]. Raises BadInput."""
        return cls.from_fields(Fields(canonical_json.loads_canonical(data, what="recipe"), "recipe"))

    @classmethod
    def from_fields(cls, fields: Fields) -> Recipe:
        with fields as f:
            f.choice("format", FORMAT)  # [M1]
            f.choice("kind", "recipe")
            recipe = cls(
                base=f.digest("base"),
                terms=tuple(_term(item) for item in f.items("terms")),
                method=f.choice("method", *METHODS),  # [R3]
                parameters=f.raw_object("parameters"),
                arithmetic=f.text("arithmetic"),
                dtype=_dtype(f),
                base_mismatch=f.flag("base_mismatch"),
            )
        if list(recipe.terms) != sorted(recipe.terms):  # [R1]
            raise BadInput(f"{fields.path}.terms: expected in the order of digest and weight, found another.")
        row = METHODS[recipe.method]
        # An exact sum is an ordered one where a form needs norms; a dense delta is truncated to be an adapter.
        other = {"exact": ORDERED, "dense": LAPACK}.get(row.space, row.arithmetic)
        if recipe.arithmetic not in (row.arithmetic, other):  # [R3]
            fields.refuse("arithmetic", f"{row.arithmetic} or {other}", recipe.arithmetic)
        truncated = row.space == "dense" and recipe.arithmetic == LAPACK
        read(recipe.method, Fields(dict(recipe.parameters), f"{fields.path}.parameters"), truncated)  # [R3]
        return recipe

    def require_merge(self, path: str) -> None:
        """BadInput unless this is how a model is merged, and not how an adapter was composed [R3]."""
        if METHODS[self.method].composes_only or self.arithmetic == LAPACK:
            raise BadInput(f"{path}: expected a method that merges to the same bits anywhere, found {self.method!r}.")


def _term(fields: Fields) -> RecipeTerm:
    with fields as f:
        term = RecipeTerm(f.digest("adapter"), f.text("weight"))
    try:
        accepted = term.weight == format_weight(term.value) and term.value != 0
    except (ValueError, UsageError):
        accepted = False
    if not accepted:  # [R2]
        raise BadInput(
            f"{fields.path}.weight: expected a finite non-zero decimal in the form of RFC 8785, "
            f"found {term.weight[:60]!r}."
        )
    return term


def _dtype(fields: Fields) -> str | None:
    value = fields.optional_text("dtype")
    if value is not None and value not in DTYPE_NAMES:  # [R4]
        fields.refuse("dtype", f"null or one of {', '.join(DTYPE_NAMES)}", value)
    return value


@dataclass(frozen=True, slots=True)
class MergeRecord:
    """``loreg.json`` of a merged model: the recipe, and every tensor of the output with its digest [G1].

    A function of (base, recipe) alone: no time, no path, no host.
    """

    recipe: Recipe
    weights_root: Digest
    tensors: tuple[BaseTensor, ...]

    def dump(self) -> bytes:
        return canonical_json.dumps(
            {
                "format": FORMAT,
                "kind": "merge",
                "recipe": self.recipe.to_json(),
                "weights_root": str(self.weights_root),
                "tensors": tensors_to_json(self.tensors),
            }
        )

    @classmethod
    def parse(cls, data: bytes) -> MergeRecord:
        """From canonical bytes. Raises BadInput, also if the root does not follow from the tensors [G1]."""
        with Fields(canonical_json.loads_canonical(data, what="loreg.json"), "loreg.json") as f:
            f.choice("format", FORMAT)
            f.choice("kind", "merge")
            record = cls(Recipe.from_fields(f.object("recipe")), f.digest("weights_root"), tensors_from(f))
        record.recipe.require_merge("loreg.json.recipe")
        if identify(record.tensors).weights_root != record.weights_root:
            raise BadInput("loreg.json: weights_root does not follow from the tensors it lists.")
        return record


def tensors_to_json(tensors: Iterable[BaseTensor]) -> dict[str, Any]:
    return {
        tensor.name: {"dtype": tensor.dtype, "shape": list(tensor.shape), "digest": str(tensor.content)}
        for tensor in tensors
    }


def tensors_from(fields: Fields) -> tuple[BaseTensor, ...]:
    """The field ``tensors`` of a base or a merge, in the order of name bytes [B6]."""
    tensors = []
    for name, entry in fields.mapping("tensors"):
        with entry as f:
            dtype, shape, content = f.text("dtype"), f.shape("shape"), f.digest("digest")
        check_name(name, fields.path)
        tensors.append(BaseTensor(name, dtype, shape, nbytes_of(dtype, shape), content))
    return tuple(sorted(tensors, key=lambda tensor: tensor.name.encode("utf-8")))
