"""LoRA and what differs from it by a shape or a diagonal [F3]: all exact, under ``loreg-exact-1``.

The weight is (out, in), A is (r, in) and B (out, r). A factor that is derived by a product has elements of one
IEEE double product each; of stored values of at most 26 bits, as of float32 and narrower, that is exact.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from loreg.algebra.delta import Dense, LowRank
from loreg.algebra.edits import WeightedSum
from loreg.algebra.forms.term import Term, is_worthwhile
from loreg.algebra.ordered import product


def _spread(blocks: Tensor, groups: int) -> Tensor:
    """``groups`` equal blocks on top of each other, (m, n): on the diagonal of a matrix (m, groups·n), float64."""
    rows, columns = blocks.shape[0] // groups, blocks.shape[1]
    spread = torch.zeros(groups, rows, groups, columns, dtype=torch.float64, device=blocks.device)
    each = torch.arange(groups, device=blocks.device)
    spread[each, :, each] = blocks.double().reshape(groups, rows, columns)
    return spread.reshape(groups * rows, groups * columns)


def lora(term: Term) -> WeightedSum:
    """scale·B·A (Hu et al. 2021, arXiv 2106.09685, §4.1).

    ``A`` is (r, in…), ``B`` (out, r/groups…). With several ``groups`` B is block-diagonal, its blocks stored on
    top of each other: output group g, of out/groups rows, has ranks of group g only. Likewise, with the optional
    ``groups_in``, A is (r, in/groups_in…), and rank group g sees inputs of group g only. So has PEFT's BD-LoRA
    either of them (0.21, lora/variants.py, `BlockDiagonalLinear`), and a LoRA of two grouped convolutions B's.

    Scale: α/r, with rsLoRA α/√r (PEFT), α/r (loralib, kohya, LyCORIS, whose files have rsLoRA in α already and
    `scalar` in B); r is A's rows. An embedding has A (r, V) and B (d, r).

    For a convolution the sum is what the layer computes where the layer's A has the geometry of the weight:
    PEFT gives its A no dilation, groups or padding mode (0.21, lora/layer.py, `_ConvNd.update_layer`). So a
    dilated one computes what no weight of the layer holds, unless its kernel is 1×1, and a grouped one too, in
    which A sees all input channels: its columns then are not the weight's, and that is refused by its shape.
    """
    A, B = term.matrix("A"), term.matrix("B")
    groups, groups_in = term.parameters["groups"], term.parameters.get("groups_in", 1)
    A, B = (x if n == 1 else _spread(x, n) for x, n in ((A, groups_in), (B, groups)))
    return WeightedSum((LowRank(B, A, term.scale),))


def lora_merged(term: Term) -> WeightedSum:
    """scale·B·A on some of n equal blocks of rows: loralib 0.1.2's MergedLinear (layers.py, `merge_AB`).

    ``enable`` is n booleans, e of them true; ``A`` is (e·r, in), ``B`` (e·out/n, r), both in blocks of the
    enabled ones in their order. Rows of the other blocks do not change. Scale: α/r, with r = B's columns.
    """
    A, B = term.matrix("A"), term.matrix("B")
    enabled = torch.tensor(term.parameters["enable"], device=B.device)
    spread = _spread(B, int(enabled.sum()))
    left = spread.new_zeros(len(enabled), spread.shape[0] // int(enabled.sum()), spread.shape[1])
    left[enabled] = spread.reshape(-1, *left.shape[1:])
    return WeightedSum((LowRank(left.flatten(0, 1), A, term.scale),))


def lora_reshaped(term: Term) -> WeightedSum:
    """scale·B·A, its elements in row-major order read as a matrix of another shape: loralib's Conv2d.

    ``A`` is (R, q…), ``B`` (p, R…), p·q = out·in. loralib 0.1.2 (layers.py, `ConvLoRA`) has A (r·k, in·k) and B
    (out/groups·k, r·k) for a weight (out, in/groups, k, k). Scale: α/r there, with r = R/k.

    A row of the weight is u = in/d pieces of a row of the product, each of one of v = q/d places in it, d =
    gcd(in, q). So the sum is of rank R·u·v, with stored values for elements; R·k for loralib without groups.
    Where that exceeds EXPANSION·min(out, in), the dense product under ``loreg-f64-1``, scaled exactly.
    """
    A, B = term.matrix("A").double(), term.matrix("B").double()
    (out, into), (R, q) = term.shape, A.shape
    d = math.gcd(into, q)
    u, v = into // d, q // d
    if not is_worthwhile(R * u * v, (out, into)):
        return WeightedSum(dense=(Dense(product(B, A).reshape(out, into), term.scale),))
    piece = torch.arange(out * u, device=B.device).reshape(out, u)
    row, column = torch.arange(out, device=B.device)[:, None], torch.arange(u, device=B.device)
    left, right = B.new_zeros(out, u, v, R), A.new_zeros(u, v, R, u, d)
    left[row, column, piece % v] = B[piece // v]
    right[column, :, :, column] = A.reshape(R, v, d).transpose(0, 1)
    return WeightedSum((LowRank(left.reshape(out, -1), right.reshape(-1, into), term.scale),))


def lora_expert(term: Term) -> WeightedSum:
    """scale·B·A of one expert of a PEFT LoRA on a stack of experts (PEFT 0.21, lora/layer.py, `ParamWrapper`).

    Of E = ``experts``, ``expert`` e has rows e·r to (e+1)·r of ``A`` (E·r, in), and of ``B`` (out, r·E) the
    columns e, e + E, …; ``rows`` [a, b] takes outputs a to b - 1 of it, null all: a fused gate and up
    projection is two tensors on disk. Scale: α/r, with rsLoRA α/√r, r = A's rows / E. "in" and "out" are those
    of the sum: where the stack is stored (E, in, out), the caller transposes.
    """
    experts, expert, rows = (term.parameters[name] for name in ("experts", "expert", "rows"))
    A, B = _stacked(term, experts)
    first, last = rows or (0, B.shape[1])
    return WeightedSum((LowRank(B[expert, first:last], A[expert], term.scale),))


def lora_experts(term: Term) -> WeightedSum:
    """:func:`lora_expert` for all of a stack: a sum of shape (E, out, in)."""
    A, B = _stacked(term, term.parameters["experts"])
    return WeightedSum((LowRank(B, A, term.scale),))


def _stacked(term: Term, experts: int) -> tuple[Tensor, Tensor]:
    """A as (E, r, in), and B as (E, out, r)."""
    A, B = term.tensors["A"], term.tensors["B"]
    return A.reshape(experts, -1, A.shape[1]), B.reshape(B.shape[0], -1, experts).permute(2, 0, 1)


def adalora(term: Term) -> WeightedSum:
    """scale·B·diag(E)·A (Zhang et al. 2023, arXiv 2303.10512, eq. 3).

    ``A`` is (r, in…), ``B`` (out, r), ``E`` (r, 1): the singular values, folded into B.

    Scale: α/(ρ + 10⁻⁵), with α = ρ where α is not positive (PEFT 0.21, adalora/layer.py, `SVDLinear`). ρ is the
    `init_r` of the config: a `rank_pattern`, of which A has the true ranks, leaves it as it was (adalora/model.py,
    `resize_modules_by_rank_pattern`). PEFT rounds ρ + 10⁻⁵ to the dtype of the parameters, in which a file is silent.
    """
    E = term.tensors["E"].double().reshape(1, -1)
    return WeightedSum((LowRank(term.matrix("B").double() * E, term.matrix("A"), term.scale),))


def vera(term: Term) -> WeightedSum:
    """scale·diag(λ_b)·B·diag(λ_d)·A (Kopiczko et al. 2023, arXiv 2310.11454, eq. 2).

    ``A`` is (r, ≥ in), ``B`` (≥ out, r): random, shared by the model's modules, and cut to the first of each.
    ``lambda_d`` is (r,), ``lambda_b`` (out,). Scale: 1 (PEFT 0.21, vera/layer.py).
    """
    out, into = term.shape
    d, b = (term.tensors[name].double().reshape(-1, 1) for name in ("lambda_d", "lambda_b"))
    A, B = term.tensors["A"][:, :into].double(), term.tensors["B"][:out].double()
    return WeightedSum((LowRank(b * B, d * A, term.scale),))
