"""loreg-f64-1 once more, in Python's own floats: one operation at a time, in the order that A6 states."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from vector_cases.primitives import FLOATS

Matrix = list[list[float]]
Element = Callable[[int, int], float]


class Refused(Exception):
    """The definition has no value here."""


def numbers(tensor: dict[str, Any]) -> list[float]:
    """The elements of a tensor as doubles, row by row."""
    kind = FLOATS[tensor["dtype"]]
    try:
        return [float(kind.value(word)) for word in kind.split(bytes.fromhex(tensor["hex"]))]
    except ValueError as error:
        raise Refused from error


def doubles(values: Iterable[float]) -> str:
    """Raw float64 in hex; a zero is +0, as its sign has no effect in a delta."""
    return b"".join(struct.pack("<d", value + 0.0) for value in values).hex()


def matrix(rows: int, columns: int, element: Element) -> Matrix:
    return [[element(i, j) for j in range(columns)] for i in range(rows)]


def identity(size: int) -> Matrix:
    return matrix(size, size, lambda i, j: float(i == j))


def turned(x: Matrix) -> Matrix:
    return [list(column) for column in zip(*x, strict=True)]


def fold(values: Iterable[float]) -> float:
    """Element i takes in element i + ⌈n/2⌉, until one is left."""
    rest = list(values)
    while len(rest) > 1:
        half = (len(rest) + 1) // 2
        rest = [rest[i] + rest[i + half] if i + half < len(rest) else rest[i] for i in range(half)]
    return rest[0] if rest else 0.0


def along(values: Iterable[float]) -> float:
    """The sum in order, from +0."""
    total = 0.0
    for value in values:
        total += value
    return total


def product(left: Matrix, right: Matrix, scale: float = 1.0) -> Matrix:
    """Each element from +0, fl(fl(scale·L)·R) added for k upwards."""

    def element(i: int, j: int) -> float:
        return along((scale * left[i][k]) * right[k][j] for k in range(len(right)))

    return matrix(len(left), len(right[0]), element)


@dataclass(frozen=True)
class LowRank:
    c: float
    left: Matrix
    right: Matrix

    def turned(self) -> LowRank:
        return LowRank(self.c, turned(self.right), turned(self.left))

    def times(self, weight: float) -> LowRank:
        return LowRank(weight * self.c, self.left, self.right)

    def exactly(self, i: int, j: int) -> Fraction:
        total = sum(Fraction(self.left[i][k]) * Fraction(row[j]) for k, row in enumerate(self.right))
        return Fraction(self.c) * total


@dataclass(frozen=True)
class Dense:
    c: float
    value: Matrix

    def turned(self) -> Dense:
        return Dense(self.c, turned(self.value))

    def times(self, weight: float) -> Dense:
        return Dense(weight * self.c, self.value)

    def exactly(self, i: int, j: int) -> Fraction:
        return Fraction(self.c) * Fraction(self.value[i][j])


Terms = Sequence[LowRank | Dense]


def delta(terms: Terms, rows: int, columns: int) -> Matrix:
    """The delta of an adapter: from +0, low-rank terms in their order, then dense ones in theirs."""
    total = matrix(rows, columns, lambda i, j: 0.0)
    parts = [product(term.left, term.right, term.c) for term in terms if isinstance(term, LowRank)]
    parts += [
        matrix(rows, columns, lambda i, j, t=term: t.c * t.value[i][j]) for term in terms if isinstance(term, Dense)
    ]
    for part in parts:
        total = matrix(rows, columns, lambda i, j, t=total, p=part: t[i][j] + p[i][j])
    return total


def finite(terms: Terms) -> None:
    """Refuses what A4 does."""
    for term in terms:
        parts = (term.left, term.right) if isinstance(term, LowRank) else (term.value,)
        if any(x - x != 0 for part in parts for row in part for x in row) or term.c - term.c != 0:
            raise Refused
