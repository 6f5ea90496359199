"""A term of an adapter as the rules of section F see it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from vector_cases.ordered import Dense, LowRank, Matrix, numbers


@dataclass(frozen=True)
class Given:
    """A term: its tensors as stored, and the weight W (rows, columns) that it is for."""

    tensors: dict[str, Any]
    parameters: dict[str, Any]
    scale: float
    W: Matrix

    @property
    def out(self) -> int:
        return len(self.W)

    @property
    def into(self) -> int:
        return len(self.W[0])

    def flat(self, role: str) -> list[float]:
        return numbers(self.tensors[role])

    def __getitem__(self, role: str) -> Matrix:
        """A tensor as a matrix: what follows the first dimension is one."""
        values, rows = self.flat(role), self.tensors[role]["shape"][0]
        columns = len(values) // rows
        return [values[i * columns : (i + 1) * columns] for i in range(rows)]

    def core(self, role: str) -> tuple[int, int, int, list[float]]:
        """Sizes p, q, K of a core, and its elements."""
        shape = self.tensors[role]["shape"]
        return shape[0], shape[1], math.prod(shape[2:]), self.flat(role)

    def low_rank(self, left: Matrix, right: Matrix) -> list[LowRank | Dense]:
        return [LowRank(self.scale, left, right)]

    def dense(self, value: Matrix) -> list[LowRank | Dense]:
        return [Dense(self.scale, value)]

    def instead(self, edited: Matrix) -> list[LowRank | Dense]:
        return [Dense(self.scale, edited), Dense(-self.scale, self.W)]

    def too_wide(self, rank: int) -> bool:
        """F5."""
        return rank > 4 * min(self.out, self.into)
