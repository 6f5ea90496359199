"""The rotations of F7 once more, one vector and one number at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from vector_cases.ordered import Matrix, Terms, along, fold, matrix, product, turned
from vector_cases.term import Given


def norm_of(values: list[float]) -> float:
    return math.sqrt(fold(x * x for x in values))


def _flat(M: Matrix) -> list[float]:
    return [x for row in M for x in row]


def _each(M: Matrix, f: Callable[[float], float]) -> Matrix:
    return [[f(x) for x in row] for row in M]


def _skew(matrices: list[Matrix], p: dict[str, Any]) -> list[Matrix]:
    """Steps 1 to 4."""
    limit, total = p.get("block_limit"), p["total_limit"]
    made = []
    for M in matrices:
        norm = norm_of(_flat(M))
        if limit is not None and norm > limit:
            M = _each(M, lambda x, n=norm: limit * (x / n))
        made.append(matrix(len(M), len(M), lambda i, j, M=M: M[i][j] - M[j][i]))
    if total is not None:
        norm = norm_of([x for S in made for x in _flat(S)]) + 1e-8
        if norm > total:
            made = [_each(S, lambda x: x * total / norm) for S in made]
    return [_each(S, lambda x: x * p["factor"]) for S in made]


def _cayley(S: Matrix) -> Matrix:
    """Step 6."""
    size = len(S)
    a = matrix(size, size, lambda i, j: S[i][j] + (i == j))
    for k in range(size):
        row = [1 / a[k][k] if j == k else a[k][j] / a[k][k] for j in range(size)]
        for i in range(size):
            if i != k:
                taken = a[i][k]
                a[i][k] = 0.0
                a[i] = [x - taken * y for x, y in zip(a[i], row, strict=True)]
        a[k] = row
    return matrix(size, size, lambda i, j: 2 * a[i][j] - 1 if i == j else 2 * a[i][j])


def _polynomial(S: Matrix, series: list[float]) -> Matrix:
    """Step 5."""
    Q, P = matrix(len(S), len(S), lambda i, j: series[0] * (i == j)), S
    for k, c in enumerate(series[1:], 1):
        P = S if k == 1 else product(P, S)
        Q = matrix(len(S), len(S), lambda i, j, Q=Q, P=P, c=c: Q[i][j] + c * P[i][j])
    return Q


def _rotated(t: Given, rotate: Callable[[list[float]], list[float]]) -> Terms:
    out = t.parameters["side"] == "out"
    vectors = turned(t.W) if out else t.W
    made = [rotate(vector) for vector in vectors]
    made = turned(made) if out else made
    if "s" in t.tensors:
        made = [[x * s for x in row] for row, s in zip(made, t.flat("s"), strict=True)]
    return t.instead(made)


def _turn(Q: list[Matrix], v: list[float], size: int) -> list[float]:
    turn = []
    for block in range(-(-len(v) // size)):
        part, M = v[block * size : (block + 1) * size], Q[block if len(Q) > 1 else 0]
        turn += [along(M[i][j] * x for j, x in enumerate(part)) for i in range(len(part))]
    return turn


def oft(t: Given) -> Terms:
    shape, R = t.tensors["R"]["shape"], t["R"]
    size = shape[1] if len(shape) == 3 else next(s for s in range(1, 99) if s * (s - 1) // 2 == shape[1])
    if len(shape) == 3:
        blocks = [[row[i * size : (i + 1) * size] for i in range(size)] for row in R]
    else:
        blocks = []
        for row in R:
            above = iter(row)
            M = [[0.0] * size for _ in range(size)]
            for i in range(size):
                for j in range(i + 1, size):
                    M[i][j] = next(above)
                    M[j][i] = -M[i][j]
            blocks.append(M)
    S, series = _skew(blocks, t.parameters), t.parameters["series"]
    Q = [_cayley(M) if series is None else _polynomial(M, series) for M in S]
    return _rotated(t, lambda v: _turn(Q, v, size))


def boft(t: Given) -> Terms:
    m, b, size, _ = t.tensors["R"]["shape"]
    values = t.flat("R")
    cut = [values[i * size : (i + 1) * size] for i in range(m * b * size)]
    S = _skew([cut[i * size : (i + 1) * size] for i in range(m * b)], t.parameters)
    Q = [_cayley(M) for M in S]

    def rotate(v: list[float]) -> list[float]:
        for stage in range(m):
            order = [_place(x, size, stage, t.parameters["order"]) for x in range(len(v))]
            turn = _turn(Q[stage * b : (stage + 1) * b], [v[x] for x in order], size)
            v = [turn[order.index(x)] for x in range(len(v))]
        return v

    return _rotated(t, rotate)


def _place(x: int, s: int, stage: int, order: str) -> int:
    if stage == 0 and order == "halves":
        return x
    z = 2**stage * s
    u, c, y = x // z, x % z // s, x % s
    h, e = (y // (s // 2), y % (s // 2)) if order == "halves" else (y % 2, y // 2)
    return u * z + h * z // 2 + c * s // 2 + e
