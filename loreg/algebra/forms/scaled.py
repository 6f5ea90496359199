"""Forms that scale or replace whole rows or columns of the weight [F6]: exact, under ``loreg-exact-1``."""

from __future__ import annotations

import torch
from torch import Tensor

from loreg.algebra.delta import Dense, LowRank
from loreg.algebra.edits import WeightedSum
from loreg.algebra.forms.term import Term
from loreg.errors import BadInput

_LOW_RANK_COLUMNS = 64


def ia3(term: Term) -> WeightedSum:
    """(IA)³: each row or column of the weight times a number (Liu et al. 2022, arXiv 2205.05638, §3.3).

    ``l``, any shape, holds one number per row (``on`` "out") or per input channel ("in"). Without groups the
    columns of an input channel are consecutive, in/n of them for n numbers: one in a linear layer, the kernel's
    in a convolution. With ``groups`` g > 1 along "in", l has the channels of all groups, and the i-th of g equal
    blocks of rows has the i-th of g equal parts of l. ``groups`` and ``neutral`` are 1 where they are left out.

    ``neutral`` is the l that changes nothing: W' = l∘W for 1 (PEFT 0.21, ia3/layer.py), (1 + l)∘W for 0 (LyCORIS
    4.1.3, modules/ia3.py). A weight of shape (n,) has only "out". The result is (l∘W, -W), or l∘W alone for 0,
    each times ``term.scale``, which is 1 in both libraries. l∘W has one product an element, exact for stored
    values of at most 26 bits, as of float32 and narrower; else one IEEE double product.

    *Bias.* PEFT's layers scale their output where they are not feed-forward, bias included, and so does their
    merge: the bias gets this form too, with "out". Feed-forward ones ("in") scale the input and leave the bias.
    LyCORIS never scales it when it computes with an edited weight, its default, nor when it merges.

    The identity (l = neutral) gives W back bit for bit. Raises BadInput for a number of l that does not fit.
    """
    W, on = term.base(), term.parameters["on"]
    l, groups = term.tensors["l"].double().reshape(-1), term.parameters.get("groups", 1)  # noqa: E741
    value = W.double()
    if on == "out" and l.numel() == len(W):
        value = value * l.reshape(-1, *(1,) * (W.ndim - 1))
    elif on == "in" and W.ndim == 2 and _fits(l, W, groups):
        blocks = value.reshape(groups, W.shape[0] // groups, l.numel() // groups, -1)
        value = (blocks * l.reshape(groups, 1, -1, 1)).reshape(W.shape)
    else:
        raise BadInput(
            f"(IA)³ has {l.numel()} numbers along {on!r} in {groups} groups, which does not fit a weight of shape "
            f"{tuple(W.shape)}."
        )
    scaled = Dense(value, term.scale)
    return WeightedSum(dense=(scaled, Dense(W, -term.scale)) if term.parameters.get("neutral", 1) else (scaled,))


def _fits(l: Tensor, W: Tensor, groups: int) -> bool:  # noqa: E741
    n = l.numel()
    return n > 0 and n % groups == 0 and W.shape[0] % groups == 0 and W.shape[1] % (n // groups) == 0


def replaced(term: Term) -> WeightedSum:
    """Another tensor in the weight's place: ``value``, of the weight's elements; ``turned``: it is (in, out).

    The terms (value, -W): at an outer weight w that is w·(value - W), exactly. It says in a module what a manifest's
    ``full`` says at weight 1.
    """
    value, W = term.tensors["value"], term.base()
    matrix = value.reshape(value.shape[0], -1)
    return WeightedSum(dense=(Dense(matrix.mT if term.parameters["turned"] else matrix), Dense(W, -1.0)))


def rows(term: Term) -> WeightedSum:
    """Trained token rows: column ``indices``[i] of the weight becomes ``rows``[i].

    ``rows`` is (n, out), ``indices`` n different numbers below in, n ≥ 1: in module orientation an embedding's
    words are its inputs. The source is PEFT 0.21, trainable_tokens/layer.py, whose `trainable_tokens_delta` holds
    the rows themselves, in spite of its name, and the `token_indices` of the config say which.

    Exact: W + rows - W in those columns and W + 0 in others, so that at an outer weight of 1 each is the row
    rounded once, and other columns keep their bits. Up to 64 rows as two terms of rank n, else as two dense
    ones in the dtypes of the rows and of W. Scale: 1.

    Raises BadInput for indices that repeat or are not columns of the weight, and for rows that do not fit.
    """
    W, new, indices = term.base(), term.matrix("rows"), term.parameters["indices"]
    if tuple(new.shape) != (len(indices), W.shape[0]) or len(set(indices)) != len(indices):
        raise BadInput(
            f"{len(indices)} indices, {len(set(indices))} of them different, and rows of shape {tuple(new.shape)} do "
            f"not fit a weight of shape {tuple(W.shape)}: expected one row of {W.shape[0]} numbers for each index."
        )
    if not all(0 <= index < W.shape[1] for index in indices):
        raise BadInput(f"a row's index is not below {W.shape[1]}, the number of tokens of the base's weight.")
    columns = torch.tensor(indices, device=W.device)
    if len(indices) <= _LOW_RANK_COLUMNS:
        where = torch.zeros(len(indices), W.shape[1], dtype=W.dtype, device=W.device)
        where[torch.arange(len(indices), device=W.device), columns] = 1
        return WeightedSum((LowRank(new.T, where, term.scale), LowRank(W[:, columns], where, -term.scale)))
    terms = ((new.T, term.scale), (W[:, columns], -term.scale))
    return WeightedSum(dense=tuple(Dense(_placed(x, columns, W.shape), scale) for x, scale in terms))


def _placed(x: Tensor, columns: Tensor, shape: torch.Size) -> Tensor:
    """Zeros of ``shape`` with ``x`` in ``columns``."""
    placed = x.new_zeros(shape)
    placed[:, columns] = x
    return placed
