"""The combining methods of section C once more: element by element, on lists of floats, from the specification."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from decimal import Decimal
from itertools import combinations
from typing import Any

from blake3 import blake3

from vector_cases import reals
from vector_cases.ordered import Refused, along, fold

Flat = list[float]
Method = Callable[["Given", dict[str, Any]], Flat]
_WORD = 2**64 - 1


class Given:
    """Deltas of ``shape``, flat and row by row, in the order of the recipe; weights; keys of masks."""

    def __init__(self, deltas: list[Flat], weights: list[float], keys: list[int], shape: Sequence[int]) -> None:
        self.deltas, self.weights, self.keys = deltas, weights, keys
        self.n, self.vector = len(deltas[0]), len(shape) == 1
        self.rows = 1 if self.vector else shape[0]

    def weighed(self, parts: Sequence[Flat]) -> list[Flat]:
        return [[x * w for x in part] for part, w in zip(parts, self.weights, strict=True)]


def mask_key(seed: int, adapter: str, tensor: str) -> int:
    """A7."""
    text = b"loreg-mask-v1\0" + seed.to_bytes(8, "little") + bytes.fromhex(adapter.removeprefix("blake3:"))
    return int.from_bytes(blake3(text + tensor.encode()).digest()[:8], "little")


def uniform(key: int, i: int) -> float:
    """C3."""
    z = (key + (i + 1) * 0x9E3779B97F4A7C15) & _WORD
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _WORD
    z ^= z >> 31
    return float(z >> 11) * 2.0**-53


# C4: which elements are kept


def _order(values: Sequence[float]) -> list[int]:
    """Places by magnitude, the larger first, and the lower index first where they are equal."""
    return sorted(range(len(values)), key=lambda i: (-abs(values[i]), i))


def _only(values: Flat, kept: set[int]) -> Flat:
    return [x if i in kept else 0.0 for i, x in enumerate(values)]


def _first(given: Given, index: int, p: dict[str, Any], least: int) -> set[int]:
    return set(_order(given.deltas[index])[: max(least, math.floor(p["density"] * given.n))])


def _drawn(given: Given, index: int, p: dict[str, Any]) -> set[int]:
    return {i for i in range(given.n) if uniform(given.keys[index], i) < p["density"]}


def _by_rank(given: Given, index: int, p: dict[str, Any]) -> set[int]:
    density, epsilon, columns = p["density"], p["epsilon"], given.n // given.rows
    kept = set()
    for row in range(given.rows):
        values = given.deltas[index][row * columns : (row + 1) * columns]
        for place, column in enumerate(_order(values)):
            after = columns - 1 - place
            chance = density if columns == 1 else ((after / (columns - 1)) * 2) * epsilon + (density - epsilon)
            i = row * columns + column
            if uniform(given.keys[index], i) < chance:
                kept.add(i)
    return kept


def _without_outliers(given: Given, index: int, p: dict[str, Any]) -> set[int]:
    count = math.floor(p["density"] * given.n)
    top = min(math.floor(p["gamma"] * given.n), given.n - count)
    return set(_order(given.deltas[index])[top : top + count])


Keep = Callable[[Given, int, dict[str, Any]], "set[int]"]


def _kept(given: Given, p: dict[str, Any], keep: Keep) -> list[Flat]:
    if p["density"] == 1:
        return given.deltas
    return [_only(delta, keep(given, index, p)) for index, delta in enumerate(given.deltas)]


# C5: sums of what is kept


def _sign(x: float) -> float:
    return float((x > 0) - (x < 0))


def _agreeing(ys: Sequence[float], count_signs: bool) -> list[int]:
    t = along(_sign(y) for y in ys) if count_signs else along(ys)
    return [i for i, y in enumerate(ys) if y != 0 and (y > 0) == (t >= 0)]


def _peft(keep: Keep, drawn: bool = False, elect: bool = False) -> Method:
    def method(given: Given, p: dict[str, Any]) -> Flat:
        ys = _kept(given, p, keep)
        if drawn and p["density"] < 1:
            ys = [[x / p["density"] for x in y] for y in ys]
        out = []
        for column in zip(*ys, strict=True):
            if not elect:
                out.append(along(y * w for y, w in zip(column, given.weights, strict=True)))
                continue
            agreeing = _agreeing(column, p["majority_sign"] == "frequency")
            out.append(along(column[i] * given.weights[i] for i in agreeing) / max(1, len(agreeing)))
        return out

    return method


def _mergekit(keep: Keep | None = None, elect: bool = False) -> Method:
    def factor(delta: Flat, x: Flat) -> float:
        below = fold(map(abs, x))
        return fold(map(abs, delta)) / below if below else 1.0

    def method(given: Given, p: dict[str, Any]) -> Flat:
        xs = _kept(given, p, keep) if keep else given.deltas
        if keep and p["rescale"] and p["density"] < 1:
            pairs = [(x, factor(delta, x)) for delta, x in zip(given.deltas, xs, strict=True)]
            xs = [[value * f for value in x] for x, f in pairs]
        out = []
        for column in zip(*given.weighed(xs), strict=True):
            chosen = _agreeing(column, p["consensus"] == "count") if elect else range(len(column))
            m, u = along(column[i] for i in chosen), along(given.weights[i] for i in chosen)
            if p["normalize"] and abs(u) >= 1e-8:
                m = m / u
            out.append(m * p["lambda"])
        return out

    return method


# C6


def _variance(ys: Sequence[float]) -> float:
    v = m = 0.0
    for i, y in enumerate(ys, 1):
        off = y - m
        m = m + off / i
        v = v + off * (y - m)
    return v


def sce(given: Given, p: dict[str, Any]) -> Flat:
    xs = given.deltas
    if p["select_topk"] < 1:
        v = [_variance(column) for column in zip(*given.weighed(xs), strict=True)]
        kept = set(_order(v)[: math.floor(sum(x != 0 for x in v) * p["select_topk"])])
        xs = [_only(x, kept) for x in xs]
    ys = given.weighed(xs)
    energies = [fold(y * y for y in part) for part in ys]
    whole = along(energies)
    shares = [e / whole if whole else 1 / len(ys) for e in energies]
    out = []
    for column in zip(*ys, strict=True):
        agreeing = _agreeing(column, False)
        total = along(shares[i] for i in agreeing)
        out.append(along(column[i] * shares[i] for i in agreeing) / max(total, 1e-6))
    return out


# C7: angles


def _inner(x: Flat, y: Flat) -> float:
    return fold(a * b for a, b in zip(x, y, strict=True))


def _cos(xy: float, xx: float, yy: float) -> Decimal:
    if not xx or not yy:
        return Decimal(0)
    value = Decimal(xy) / (Decimal(xx).sqrt() * Decimal(yy).sqrt())
    return max(Decimal(-1), min(Decimal(1), value))


def _combined(given: Given, coefficients: Sequence[Decimal | float]) -> Flat:
    cs = [float(c) for c in coefficients]
    return [along(c * x for c, x in zip(cs, column, strict=True)) for column in zip(*given.deltas, strict=True)]


def _arc(cos: Decimal, shares: Sequence[Decimal]) -> list[Decimal]:
    angle = reals.acos(cos)
    return [reals.sin(share * angle) / reals.sin(angle) for share in shares]


def _two(given: Given) -> None:
    if len(given.deltas) != 2:
        raise Refused


def _shares(given: Given) -> list[Decimal]:
    weights = [Decimal(w) for w in given.weights]
    if sum(weights) <= 0:
        raise Refused
    return [w / sum(weights) for w in weights]


@reals.precise
def slerp(given: Given, p: dict[str, Any]) -> Flat:
    _two(given)
    x, y = given.deltas
    shares = _shares(given)
    cos = _cos(_inner(x, y), _inner(x, x), _inner(y, y))
    return _combined(given, shares if abs(cos) > Decimal.from_float(0.9995) else _arc(cos, shares))


@reals.precise
def nuslerp(given: Given, p: dict[str, Any]) -> Flat:
    _two(given)
    first, second = given.weights
    share = Decimal("0.5")
    if abs(first + second) >= 1e-6:
        share = Decimal(second) / (Decimal(first) + Decimal(second))
    shares = [1 - share, share]

    def coefficients(x: Flat, y: Flat) -> list[Decimal]:
        cos = _cos(_inner(x, y), _inner(x, x), _inner(y, y))
        return shares if 1 - cos * cos <= Decimal.from_float(1e-14) else _arc(cos, shares)

    if p["flatten"]:
        return _combined(given, coefficients(*given.deltas))
    columns = given.n // given.rows
    by_column = p["row_wise"] and not given.vector
    group = (lambda i: i % columns) if by_column else (lambda i: i // columns)
    out = [0.0] * given.n
    for g in range(columns if by_column else given.rows):
        places = [i for i in range(given.n) if group(i) == g]
        x, y = ([delta[i] for i in places] for delta in given.deltas)
        a, b = map(float, coefficients(x, y))
        for i in places:
            out[i] = given.deltas[0][i] * a + given.deltas[1][i] * b
    return out


@reals.precise
def karcher(given: Given, p: dict[str, Any]) -> Flat:
    shares = _shares(given)
    squares = [_inner(x, x) for x in given.deltas]
    if len(squares) == 1:
        return _combined(given, [1.0])
    lengths = [Decimal(s).sqrt() for s in squares]
    scale = sum((s * length for s, length in zip(shares, lengths, strict=True)), Decimal(0))
    some = [i for i, s in enumerate(squares) if s > 0]
    whole = sum((shares[i] for i in some), Decimal(0))
    if some and whole <= 0:
        raise Refused
    out: list[Decimal] = [Decimal(0)] * len(squares)
    if some:
        gram = [[Decimal(1) if i == j else _between(given, squares, i, j) for j in some] for i in some]
        mean = _karcher(gram, [shares[i] / whole for i in some], p["max_iter"], Decimal(p["tol"]))
        for i, a in zip(some, mean, strict=True):
            out[i] = scale * a / lengths[i]
    return _combined(given, out)


def _between(given: Given, squares: Sequence[float], i: int, j: int) -> Decimal:
    return _cos(_inner(given.deltas[i], given.deltas[j]), squares[i], squares[j])


def _karcher(gram: list[list[Decimal]], q: list[Decimal], steps: int, tol: Decimal) -> list[Decimal]:
    k = range(len(q))

    def length(a: Sequence[Decimal]) -> Decimal:
        return max(Decimal(0), sum((a[i] * a[j] * gram[i][j] for i in k for j in k), Decimal(0))).sqrt()

    m = [Decimal(i == 0) for i in k] if length(q) < tol else [x / length(q) for x in q]
    for _ in range(steps):
        g = [Decimal(0)] * len(q)
        for i in k:
            cos = max(Decimal(-1), min(Decimal(1), sum((m[j] * gram[i][j] for j in k), Decimal(0))))
            angle = reals.acos(cos)
            if angle < tol or reals.pi() - angle < tol:
                continue
            pull = q[i] * angle / reals.sin(angle)
            g = [g[j] + pull * (Decimal(i == j) - cos * m[j]) for j in k]
        step = length(g)
        if step < tol:
            break
        m = [reals.cos(step) * m[j] + reals.sin(step) / step * g[j] for j in k]
        if length(m) > tol:
            m = [x / length(m) for x in m]
    return m


def model_stock(given: Given, p: dict[str, Any]) -> Flat:
    k = len(given.deltas)
    if k < 2:
        raise Refused
    rows = given.rows if p["filter_wise"] else 1
    size = given.n // rows
    out = []
    for row in range(rows):
        xs = [delta[row * size : (row + 1) * size] for delta in given.deltas]
        norms = [math.sqrt(_inner(x, x)) for x in xs]
        cosines = []
        for i, j in combinations(range(k), 2):
            below = norms[i] * norms[j]
            cos = max(-1.0, min(1.0, _inner(xs[i], xs[j]) / below)) if below else 0.0
            cosines.append(-cos if (given.weights[i] < 0) != (given.weights[j] < 0) else cos)
        c = along(cosines) / len(cosines)
        b = c * (k - 1) + 1
        t = 0.0 if abs(b) < 1e-6 else (c * k) / b
        out += [(t / k) * along(column) for column in zip(*given.weighed(xs), strict=True)]
    return out


METHODS: dict[str, Method] = {
    "task_arithmetic": _mergekit(),
    "magnitude_prune": _peft(lambda g, i, p: _first(g, i, p, 0)),
    "ties:peft": _peft(lambda g, i, p: _first(g, i, p, 0), elect=True),
    "ties:mergekit": _mergekit(lambda g, i, p: _first(g, i, p, 1), elect=True),
    "dare_linear:peft": _peft(_drawn, drawn=True),
    "dare_linear:mergekit": _mergekit(_drawn),
    "dare_ties:peft": _peft(_drawn, drawn=True, elect=True),
    "dare_ties:mergekit": _mergekit(_drawn, elect=True),
    "della": _mergekit(_by_rank, elect=True),
    "della_linear": _mergekit(_by_rank),
    "breadcrumbs": _mergekit(_without_outliers),
    "breadcrumbs_ties": _mergekit(_without_outliers, elect=True),
    "sce": sce,
    "slerp": slerp,
    "nuslerp": nuslerp,
    "karcher": karcher,
    "model_stock": model_stock,
}
