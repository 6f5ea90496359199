"""The forms of section F once more: each element by its formula, from the specification, in module orientation."""

from __future__ import annotations

import math
from collections.abc import Callable

from vector_cases.ordered import (
    Dense,
    LowRank,
    Matrix,
    Refused,
    Terms,
    along,
    delta,
    identity,
    matrix,
    product,
    turned,
)
from vector_cases.rotations import boft, norm_of, oft
from vector_cases.term import Given

# F3


def lora(t: Given) -> Terms:
    A, B, g, h = t["A"], t["B"], t.parameters["groups"], t.parameters.get("groups_in", 1)
    r, out, into = len(A), t.out, t.into
    left = matrix(out, r, lambda i, k: B[i][k % (r // g)] if i * g // out == k * g // r else 0.0)
    right = matrix(r, into, lambda k, j: A[k][j % (into // h)] if k * h // r == j * h // into else 0.0)
    return t.low_rank(left, right)


def lora_merged(t: Given) -> Terms:
    A, B, enable = t["A"], t["B"], t.parameters["enable"]
    m, r, blocks = t.out // len(enable), len(B[0]), [u for u, on in enumerate(enable) if on]
    left = [[0.0] * len(A) for _ in range(t.out)]
    for v, u in enumerate(blocks):
        for i in range(m):
            for k in range(r):
                left[u * m + i][v * r + k] = B[v * m + i][k]
    return t.low_rank(left, A)


def lora_reshaped(t: Given) -> Terms:
    A, B = t["A"], t["B"]
    r, q = len(A), len(A[0])
    d = math.gcd(t.into, q)
    if t.too_wide(r * (t.into // d) * (q // d)):
        whole = product(B, A)
        return t.dense(matrix(t.out, t.into, lambda i, j: whole[(i * t.into + j) // q][(i * t.into + j) % q]))
    # One pair of factors whose inner dimension has r places for each element: products of another's are zero.
    size = t.out * t.into
    left = matrix(t.out, size * r, lambda i, k: B[k // r // q][k % r] if k // r // t.into == i else 0.0)
    right = matrix(size * r, t.into, lambda k, j: A[k % r][k // r % q] if k // r % t.into == j else 0.0)
    return t.low_rank(left, right)


def lora_expert(t: Given) -> Terms:
    N, e, rows = (t.parameters[name] for name in ("experts", "expert", "rows"))
    return t.low_rank(*_expert(t, N, e, rows[0] if rows else 0))


def _expert(t: Given, N: int, e: int, first: int) -> tuple[Matrix, Matrix]:
    A, B = t["A"], t["B"]
    r = len(A) // N
    return matrix(t.out, r, lambda i, k: B[first + i][k * N + e]), A[e * r : (e + 1) * r]


def adalora(t: Given) -> Terms:
    B, E = t["B"], t.flat("E")
    return t.low_rank(matrix(t.out, len(E), lambda i, k: B[i][k] * E[k]), t["A"])


def vera(t: Given) -> Terms:
    A, B, d, b = t["A"], t["B"], t.flat("lambda_d"), t.flat("lambda_b")
    left = matrix(t.out, len(d), lambda i, k: b[i] * B[i][k])
    return t.low_rank(left, matrix(len(d), t.into, lambda k, j: d[k] * A[k][j]))


# F4


def _tucker(t: Given, core: str, a: Matrix, b: Matrix) -> Matrix:
    """T(core, a, b)."""
    p, q, K, c = t.core(core)

    def element(i: int, j: int) -> float:
        n, kappa = divmod(j, K)
        inner = (along(c[(x * q + y) * K + kappa] * b[y][n] for y in range(q)) for x in range(p))
        return along(a[x][i] * value for x, value in enumerate(inner))

    return matrix(len(a[0]), len(b[0]) * K, element)


def _core_rows(t: Given, core: str, b: Matrix) -> Matrix:
    p, q, K, c = t.core(core)
    return matrix(p * q, len(b[0]) * K, lambda z, j: c[z * K + j % K] * b[z % q][j // K])


def loha(t: Given) -> Terms:
    a1, b1, a2, b2 = (t[role] for role in ("w1_a", "w1_b", "w2_a", "w2_b"))
    s = len(b2)
    if "t1" in t.tensors:
        P, Q = _tucker(t, "t1", a1, b1), _tucker(t, "t2", a2, b2)
    elif t.too_wide(len(b1) * s):
        P, Q = product(a1, b1), product(a2, b2)
    else:
        left = matrix(t.out, len(b1) * s, lambda i, k: a1[i][k // s] * a2[i][k % s])
        return t.low_rank(left, matrix(len(b1) * s, t.into, lambda k, j: b1[k // s][j] * b2[k % s][j]))
    return t.dense(matrix(t.out, t.into, lambda i, j: P[i][j] * Q[i][j]))


def locon(t: Given) -> Terms:
    up, down = t["up"], t["down"]
    p, q, _, _ = t.core("mid")
    if t.too_wide(p * q):
        return t.dense(_tucker(t, "mid", turned(up), down))
    return t.low_rank(matrix(t.out, p * q, lambda i, k: up[i][k // q]), _core_rows(t, "mid", down))


def lokr(t: Given) -> Terms:
    there, leading = t.tensors, t.parameters["align"] == "leading"
    core = "t2" in there
    if leading and not ("w1" in there and "w2" in there) and not (core and "w1" not in there):
        Y1, Z1 = _halves(t, "w1", core)
        Y2, Z2 = _core_halves(t) if core else _halves(t, "w2", False)
        if not t.too_wide(len(Z1) * len(Z2)):
            return t.low_rank(_kron(Y1, Y2), _kron(Z1, Z2))
    w1 = t["w1"] if "w1" in there else product(t["w1_a"], t["w1_b"])
    w2 = (
        t["w2"]
        if "w2" in there
        else _tucker(t, "t2", t["w2_a"], t["w2_b"])
        if core
        else product(t["w2_a"], t["w2_b"])
    )
    if leading:
        return t.dense(_kron(w1, w2))
    K = there["w2"]["shape"][2]
    array = [w1[x][y] * w2[u][v * K + kappa] for u in range(len(w2)) for x in range(len(w1))
             for v in range(len(w2[0]) // K) for y in range(len(w1[0])) for kappa in range(K)]  # fmt: skip
    return t.dense(matrix(t.out, t.into, lambda i, j: array[i * t.into + j]))


def _halves(t: Given, name: str, core: bool) -> tuple[Matrix, Matrix]:
    """Y and Z of w1 or w2."""
    if name not in t.tensors:
        return t[f"{name}_a"], t[f"{name}_b"]
    w = t[name]
    return (w, identity(len(w[0]))) if core or len(w) > len(w[0]) else (identity(len(w)), w)


def _core_halves(t: Given) -> tuple[Matrix, Matrix]:
    a = t["w2_a"]
    p, q, _, _ = t.core("t2")
    return matrix(len(a[0]), p * q, lambda i, z: a[z // q][i]), _core_rows(t, "t2", t["w2_b"])


def _kron(x: Matrix, y: Matrix) -> Matrix:
    m, n = len(y), len(y[0])
    return matrix(len(x) * m, len(x[0]) * n, lambda i, j: x[i // m][j // n] * y[i % m][j % n])


def dense(t: Given) -> Terms:
    value = t.flat("value")
    return t.dense(matrix(t.out, t.into, lambda i, j: value[i * t.into + j]))


# F6


def ia3(t: Given) -> Terms:
    l, g = t.flat("l"), t.parameters.get("groups", 1)  # noqa: E741
    part = len(l) // g

    def element(i: int, j: int) -> float:
        z = i if t.parameters["on"] == "out" else i * g // t.out * part + j * part // t.into
        return l[z] * t.W[i][j]

    edited = matrix(t.out, t.into, element)
    return t.instead(edited) if t.parameters.get("neutral", 1) else t.dense(edited)


def replaced(t: Given) -> Terms:
    value = t["value"]
    return [Dense(1.0, turned(value) if t.parameters["turned"] else value), Dense(-1.0, t.W)]


def rows(t: Given) -> Terms:
    indices, new = t.parameters["indices"], t["rows"]
    if len(indices) <= 64:
        where = matrix(len(indices), t.into, lambda z, j: float(indices[z] == j))
        old = matrix(t.out, len(indices), lambda i, z: t.W[i][indices[z]])
        return [LowRank(t.scale, turned(new), where), LowRank(-t.scale, old, where)]
    place = {j: z for z, j in enumerate(indices)}
    x = matrix(t.out, t.into, lambda i, j: new[place[j]][i] if j in place else 0.0)
    y = matrix(t.out, t.into, lambda i, j: t.W[i][j] if j in place else 0.0)
    return [Dense(t.scale, x), Dense(-t.scale, y)]


# F8


def decomposed(t: Given, terms: Terms) -> Terms:
    m, axis, epsilon = t.flat("magnitude"), t.parameters["axis"], t.parameters["epsilon"]
    D = delta(terms, t.out, t.into)
    V = matrix(t.out, t.into, lambda i, j: D[i][j] + t.W[i][j])

    def group(i: int, j: int) -> int:
        return i if axis == "out" else j * len(m) // t.into

    factors = []
    for g in range(len(m)):
        values = [V[i][j] for i in range(t.out) for j in range(t.into) if group(i, j) == g]
        norm = norm_of(values) + epsilon
        if norm == 0:
            raise Refused
        factors.append(m[g] / norm)
    return [Dense(1.0, matrix(t.out, t.into, lambda i, j: factors[group(i, j)] * V[i][j])), Dense(-1.0, t.W)]


FORMS: dict[str, Callable[[Given], Terms]] = {
    function.__name__: function
    for function in (
        lora, lora_merged, lora_reshaped, lora_expert, adalora, vera, loha, locon, lokr, dense, ia3, replaced, rows,
        oft, boft,
    )
}  # fmt: skip


def terms_of(form: str, t: Given) -> Terms:
    """What a term adds to one weight (F1), before the weights outside."""
    found = FORMS[form](t)
    return decomposed(t, found) if "magnitude" in t.tensors else found


def expert_of(t: Given, e: int) -> Terms:
    """``lora_experts``, for one of the stack."""
    return t.low_rank(*_expert(t, t.parameters["experts"], e, 0))


def is_exact(form: str, t: Given, terms: Terms) -> bool:
    """F5."""
    if "magnitude" in t.tensors or form in ("oft", "boft"):
        return False
    if form == "lokr" and "w1" in t.tensors and "w2" in t.tensors:
        return True
    return form in ("dense", "ia3", "replaced", "rows") or isinstance(terms[0], LowRank)
