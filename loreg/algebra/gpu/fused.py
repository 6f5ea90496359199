"""One edit of one weight, prepared on its device: what the kernels read of it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from loreg.algebra.delta import LowRank
from loreg.algebra.exact import SAFE
from loreg.algebra.gpu import undo
from loreg.algebra.gpu.groups import Group, Job
from loreg.algebra.passes import UNSURE, Done

_SPARE = 64  # rows beyond the last, of a tile that reaches there


def single(terms: Sequence[LowRank], dtypes: tuple[torch.dtype, torch.dtype]) -> bool:
    """Whether one edit is summed up in float32 first."""
    return dtypes == (torch.bfloat16, torch.bfloat16) and all(term.right.dtype != torch.float64 for term in terms)


class Fused:
    """W + Σ c·B·A of one weight on a device, prepared without waiting for it.

    ``shape``: (rows, columns); ``dtypes``: W's and the output's. The factors take up to 16·R·(rows + columns) bytes.
    """

    def __init__(
        self,
        terms: Sequence[LowRank],
        shape: tuple[int, int],
        dtypes: tuple[torch.dtype, torch.dtype],
        device: torch.device,
    ) -> None:
        rows, columns = shape
        rank = sum(term.rank for term in terms)
        self.single = single(terms, dtypes)
        self.rank = max(8, -(-rank // 8) * 8)
        self.shape, self.dtypes, self.device = shape, dtypes, device
        double = torch.float64
        self.left = torch.zeros(rows + _SPARE, self.rank, dtype=double, device=device)
        panels = -(-columns // undo.COLUMNS)
        whole = torch.zeros(
            self.rank, panels * undo.COLUMNS, dtype=torch.float32 if self.single else double, device=device
        )
        at = 0
        for term in terms:
            span = slice(at, at := at + term.rank)
            torch.mul(term.left.to(device).double(), term.scale, out=self.left[:rows, span])
            whole[span, :columns] = term.right.to(device)
        self.right = whole.view(self.rank, panels, undo.COLUMNS).transpose(0, 1).contiguous()
        norms, largest = (
            torch.linalg.vector_norm(self.left, dim=1),
            torch.linalg.vector_norm(whole, dim=0, dtype=double),
        )
        self.eta = (9 + rank) * 2.0**-53
        self.spread = _largest(norms) * _largest(largest)
        for safe in (_in_range(x, device) for term in terms for x in (term.left, term.right, term.scale)):
            self.spread = torch.where(safe, self.spread, math.inf)
        self.spread = torch.where(self.spread.isfinite(), self.spread, math.inf)  # NaN too
        eta = torch.full_like(self.spread, self.eta)
        self.reals = torch.stack([eta, self.spread, 3 * eta, 2 * self.spread])
        self.left_single, self.margin = self.left, norms
        if self.single:
            self.left_single, self.margin = self.left.float(), _margin(norms, _largest(largest), self.spread, rank)

    def pointers(self, first: int) -> list[int]:
        """Of the kernels' table: of rows from the ``first`` on."""
        return [
            *(x.data_ptr() + first * self.rank * x.itemsize for x in (self.left_single, self.left)),
            self.right.data_ptr(), self.margin.data_ptr() + first * self.margin.itemsize,
        ]  # fmt: skip

    def rows(self, W: Tensor, first: int, out: Tensor, residual: Tensor | None = None) -> Done:
        """As ``Blocks.rows``, with all rows done."""
        to = out if out.is_contiguous() else torch.empty_like(out, memory_format=torch.contiguous_format)
        group = Group([Job(W.contiguous(), to, self, first=first, residual=residual is not None)])
        open_ = group.opened()
        group.put()
        if to is not out:
            out.copy_(to)
        found, unsure = open_.found.candidates, open_.unsure
        if residual is None:
            return Done(len(W), found, None)
        # What is unsure is not told: it is overwritten.
        (kept,) = group.undo(unsure, torch.zeros_like(unsure.slot))
        places, by = kept.flat()
        flat = residual.zero_().view(-1)
        flat[places] = by.to(torch.int8)
        flat[(unsure.rows - first) * W.shape[1] + unsure.columns] = UNSURE
        return Done(len(W), found, unsure.deltas)


def _largest(x: Tensor) -> Tensor:
    return x.max() if x.numel() else x.new_zeros(())


def _in_range(x: Tensor | float, device: torch.device) -> Tensor:
    """Whether nothing in it may make a product over- or underflow."""
    if isinstance(x, Tensor) and x.dtype != torch.float64:
        return torch.ones((), dtype=torch.bool, device=device)
    size = x.to(device).abs() if isinstance(x, Tensor) else torch.full((), abs(x), dtype=torch.float64, device=device)
    return ((size == 0) | ((size >= 1 / SAFE) & (size <= SAFE))).all()


def _margin(norms: Tensor, largest: Tensor, spread: Tensor, rank: int) -> Tensor:
    """For each row how far its sums in float32 may be off: ``native.Factors.margin``, infinite where that is None."""
    margin = (rank + 4) * 2.0**-24 * largest * norms + (rank * 2.0**-149 * (1 + largest) + 2.0**-132)
    sure = torch.maximum(torch.maximum(_largest(norms), largest), spread) < 2.0**100
    return torch.where(sure, margin * (1 + 2.0**-20), math.inf).float()
