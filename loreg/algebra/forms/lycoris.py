"""The forms of LyCORIS [F4] (Yeh et al. 2023, arXiv 2309.14859), which PEFT has in part.

Where the sum is a product of two factors whose elements are single products of stored values, it is exact under
``loreg-exact-1``, if those factors are not absurdly wide (:data:`~loreg.algebra.forms.term.EXPANSION`). Else a
dense delta is computed under ``loreg-f64-1`` in the order that each function states, and scaled exactly.

LyCORIS 4.1.3 multiplies LoHa and LoKr by their scale twice when it merges (`get_diff_weight` of loha.py and
lokr.py, the second time after `get_weight` has), once when it computes; what it computes is what was trained.
"""

from __future__ import annotations

import torch
from torch import Tensor

from loreg.algebra.delta import Dense, LowRank
from loreg.algebra.edits import WeightedSum
from loreg.algebra.forms.term import Term, is_worthwhile
from loreg.algebra.ordered import product


def _pairs_of_columns(x: Tensor, y: Tensor) -> Tensor:
    """(m, p) and (m, q): (m, p·q), float64, x[:, i]·y[:, j] in column i·q + j (Khatri-Rao, by rows)."""
    return (x.double()[:, :, None] * y.double()[:, None, :]).flatten(1)


def _pairs_of_rows(x: Tensor, y: Tensor) -> Tensor:
    """(p, n) and (q, n): (p·q, n), float64, x[i]·y[j] in row i·q + j."""
    return (x.double()[:, None] * y.double()).flatten(0, 1)


def _kron(x: Tensor, y: Tensor) -> Tensor:
    """The Kronecker product of two matrices, float64: each element one product."""
    return (x.double()[:, None, :, None] * y.double()[:, None, :]).flatten(2).flatten(0, 1)


def _core_rows(core: Tensor, b: Tensor) -> Tensor:
    """``core`` (p, q, k…) and ``b`` (q, n): (p·q, n·Πk), float64, core[i, j, k]·b[j, n] in row i·q + j."""
    return (core.double().flatten(2)[:, :, None, :] * b.double()[..., None]).flatten(2).flatten(0, 1)


def _tucker(core: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Σ_i a[o, i]·Σ_j core[i, j, k]·b[j, n], as (out, n·Πk), float64: the sum over j first, both ascending."""
    core = core.flatten(2)
    p, _, k = core.shape
    inner = product(core.transpose(1, 2).flatten(0, 1), b)
    return product(a, inner.reshape(p, k, -1).transpose(1, 2).flatten(1))


def loha(term: Term) -> WeightedSum:
    """scale·(w1_a·w1_b)∘(w2_a·w2_b) (Hyeon-Woo et al. 2021, FedPara, arXiv 2108.06098).

    ``w1_a`` is (out, r), ``w1_b`` (r, in…), w2 alike: exact, as a sum of rank r₁·r₂. With ``t1`` and ``t2``,
    (r, r, k…), ``w1_a`` is (r, out), ``w1_b`` (r, in/Πk), and a product is Σ t1[i, j, k]·w1_a[i, out]·w1_b[j, in].

    Scale: α/r, r = w1_b's rows (PEFT 0.21, loha/layer.py; LyCORIS 4.1.3, modules/loha.py, whose files have
    rs_lora in α already and `scalar` in w1_a).

    ``loreg-f64-1`` with t1, and where r₁·r₂ exceeds EXPANSION·min(out, in): both products as
    :func:`~loreg.algebra.ordered.product` or :func:`_tucker` sums them, then multiplied element by element.
    """
    a1, b1, a2, b2 = (term.matrix(name) for name in ("w1_a", "w1_b", "w2_a", "w2_b"))
    if "t1" in term.tensors:
        first, second = _tucker(term.tensors["t1"], a1.T, b1), _tucker(term.tensors["t2"], a2.T, b2)
    elif is_worthwhile(len(b1) * len(b2), term.shape):
        return WeightedSum((LowRank(_pairs_of_columns(a1, a2), _pairs_of_rows(b1, b2), term.scale),))
    else:
        first, second = product(a1, b1), product(a2, b2)
    return WeightedSum(dense=(Dense(first * second, term.scale),))


def locon(term: Term) -> WeightedSum:
    """scale·Σ up[out, i]·mid[i, j, k]·down[j, in]: LyCORIS' LoCon with a Tucker core, for convolutions.

    ``up`` is (out, r, 1…), ``mid`` (r, r, k…), ``down`` (r, in, 1…). Exact, as a sum of rank r². Scale: α/r, r =
    down's rows (LyCORIS 4.1.3, modules/locon.py, whose files have rs_lora in α already and `scalar` in up).

    ``loreg-f64-1`` where r² exceeds EXPANSION·min(out, in·Πk): :func:`_tucker`.
    """
    up, mid, down = term.matrix("up"), term.tensors["mid"], term.matrix("down")
    if not is_worthwhile(mid.shape[0] * mid.shape[1], term.shape):
        return WeightedSum(dense=(Dense(_tucker(mid, up, down), term.scale),))
    left = up.double().repeat_interleave(mid.shape[1], dim=1)
    return WeightedSum((LowRank(left, _core_rows(mid, down), term.scale),))


def lokr(term: Term) -> WeightedSum:
    """scale·w1⊗w2 (LyCORIS, §3; Edalati et al. 2022, KronA, arXiv 2212.10650).

    ``w1`` is (a, c), or w1_a·w1_b with ``w1_a`` (a, r) and ``w1_b`` (r, c). ``w2`` is (b, d, k…), or w2_a·w2_b with
    ``w2_a`` (b, r) and ``w2_b`` (r, d·Πk), or with ``t2`` (r, r, k…) Σ t2[i, j, k]·w2_a[i, b]·w2_b[j, d]. The weight
    is (a·b, c·d·Πk).

    ``align`` says which axes of w1 and a 3-D w2 meet. "leading": out with out, in with in, as LyCORIS does.
    "trailing": PEFT's Conv1d with a whole w2 (0.21, lokr/layer.py, `make_kron`, which adds axes to w1 only for a
    4-D w2) takes (1, a, c)⊗(b, d, k), whose (b, a·d, c·k) elements it then reads in row-major order as (out, in, k).

    Scale: PEFT α/r with the config's r, always. LyCORIS 4.1.3 (modules/lokr.py) 1 where w1 and w2 are both whole,
    else α/r, r = the rows of w1_b or w2_b, with rs_lora in α already and `scalar` in w1 or w1_a.

    Exact: both whole, each element one product; else a sum of rank (r₁ or min(a, c))·(r₂ or min(b, d·Πk)), with t2
    c·r². ``loreg-f64-1``: t2 without a whole w1, w1_a with "trailing", or a rank above EXPANSION·min(out, in):
    the products as :func:`~loreg.algebra.ordered.product` or :func:`_tucker` sums them, then multiplied by pairs.
    """
    if term.parameters["align"] == "leading":
        pairs = _kron_pairs(term)
        if pairs is not None:
            (left1, right1), (left2, right2) = pairs
            return WeightedSum((LowRank(_kron(left1, left2), _kron(right1, right2), term.scale),))
    w1, w2 = (_whole(term, name) for name in ("w1", "w2"))
    if term.parameters["align"] == "leading":
        value = _kron(w1, w2)
    else:
        b, d, k = term.tensors["w2"].shape
        value = w1.double()[None, :, None, :, None] * w2.double().reshape(b, 1, d, 1, k)
    return WeightedSum(dense=(Dense(value.reshape(term.shape), term.scale),))


def _whole(term: Term, name: str) -> Tensor:
    """w1 or w2 as a matrix: as stored, or computed from its factors."""
    if name in term.tensors:
        return term.matrix(name)
    a, b = term.matrix(f"{name}_a"), term.matrix(f"{name}_b")
    core = term.tensors.get("t2") if name == "w2" else None
    return product(a, b) if core is None else _tucker(core, a.T, b)


def _kron_pairs(term: Term) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]] | None:
    """Factors of w1 and of w2, such that products of two of their elements are exact; None if a dense delta is
    the better or the only way."""
    core = term.tensors.get("t2")
    if ("w1" in term.tensors and "w2" in term.tensors) or ("w1" not in term.tensors and core is not None):
        return None
    first = _factors(term, "w1", left_whole=core is not None)
    if core is None:
        second = _factors(term, "w2")
    else:
        left = term.matrix("w2_a").double().T.repeat_interleave(core.shape[1], dim=1)
        second = left, _core_rows(core, term.matrix("w2_b"))
    return (first, second) if is_worthwhile(len(first[1]) * len(second[1]), term.shape) else None


def _factors(term: Term, name: str, left_whole: bool = False) -> tuple[Tensor, Tensor]:
    """w1 or w2 as a product of two: its factors, or itself and an identity on the side that makes it smaller."""
    if name not in term.tensors:
        return term.matrix(f"{name}_a"), term.matrix(f"{name}_b")
    whole = term.matrix(name)
    rows, columns = whole.shape
    if left_whole or rows > columns:
        return whole, torch.eye(columns, dtype=torch.float64, device=whole.device)
    return torch.eye(rows, dtype=torch.float64, device=whole.device), whole


def dense(term: Term) -> WeightedSum:
    """scale·value, exact. ``value`` is (out, in…), or (n,) for a bias.

    Scale: 1 for the `diff` and `diff_b` of LyCORIS' full (modules/full.py) and of kohya.
    """
    return WeightedSum(dense=(Dense(term.matrix("value"), term.scale),))
