"""How the adapters' edits of one tensor become one edit: the recipe's method."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from loreg.algebra import elementwise
from loreg.algebra.delta import Dense
from loreg.algebra.densify import dense_delta
from loreg.algebra.edits import WeightedSum
from loreg.digest import Digest
from loreg.format import methods
from loreg.format.manifest import AdapterManifest
from loreg.format.methods import EXACT, ORDERED
from loreg.merge.inputs import AdapterInput

Edits = Sequence[tuple[AdapterInput, WeightedSum]]
"""What each adapter does to one tensor, unweighted; adapters that leave it alone are not in it."""


@dataclass(frozen=True, slots=True)
class Combining:
    """A method of the recipe with its parameters, over ``adapters`` in the recipe's order."""

    adapters: tuple[AdapterInput, ...]
    method: str = "linear"
    parameters: Mapping[str, Any] = field(default_factory=dict)

    def combine(self, tensor: str, view: tuple[int, ...], edits: Edits, device: torch.device) -> WeightedSum:
        """The one edit of a tensor, seen in the shape ``view``.

        ``linear`` keeps every term, exactly [A2]. Any other method is given each adapter's delta in float64 [A6, C2],
        zero where it leaves the tensor alone: to the model that it makes, that is what it adds.
        """
        if methods.METHODS[self.method].keeps_terms:
            total = WeightedSum()
            for adapter, edit in edits:
                total += edit.scaled(adapter.weight)
            return total
        deltas = [
            (adapter, dense_delta(edit) if edit.shape else torch.zeros(view, dtype=torch.float64, device=device))
            for adapter, edit in self._complete(edits)
        ]
        given = elementwise.Deltas(
            tuple(delta for _, delta in deltas),
            tuple(adapter.weight for adapter, _ in deltas),
            tuple(mask_key(self.parameters.get("seed", 0), adapter.digest, tensor) for adapter, _ in deltas),
        )
        return WeightedSum(dense=(Dense(elementwise.METHODS[self.method](given, self.parameters)),))

    def _complete(self, edits: Edits) -> Edits:
        found = {id(adapter): edit for adapter, edit in edits}
        return [(adapter, found.get(id(adapter), WeightedSum())) for adapter in self.adapters]


def mask_key(seed: int, adapter: Digest, tensor: str) -> int:
    """The 64-bit key of an adapter's random mask for one tensor [A7]: the same whatever else is merged."""
    text = b"loreg-mask-v1\0" + seed.to_bytes(8, "little") + adapter.raw + tensor.encode("utf-8")
    return int.from_bytes(Digest.of(text).raw[:8], "little")


def arithmetic_of(method: str, manifests: Iterable[AdapterManifest]) -> str:
    """The arithmetic of a merge [R3]: exact sums, unless the method or one of the forms needs norms or roots."""
    row = methods.METHODS[method]
    if not row.keeps_terms:
        return row.arithmetic
    modules = (module for manifest in manifests for module in manifest.modules.values())
    return EXACT if all(module.exact for module in modules) else ORDERED
