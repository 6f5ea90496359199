"""What happens to one stored weight: W' = round(W + Σ d·X + Σ c·(B A)), under ``loreg-exact-1``.

The definition names no order, precision or device: each element is the storage value nearest, ties to even,
to the exact real number. A zero has the sign of the exact sum; where that is zero it is +0, except that a W
that is itself a zero keeps its bits [A3]. What rounds beyond the largest finite value is refused [A4].

Three stages keep it fast. Nearly every element is decided by float64 and one conversion, and a
:class:`~loreg.algebra.rounding.Screen` that proves it. Of the rest most are decided by rounding both ends of
the error interval (Ziv, ACM TOMS 17(3), 1991). What remains, mostly exact ties, is decided by
:mod:`loreg.algebra.exact`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loreg.algebra import native
from loreg.algebra.delta import FACTOR_DTYPES, Dense, LowRank
from loreg.algebra.exact import SAFE, Doubles, exact_sum
from loreg.algebra.passes import Blocks, Candidates, addable
from loreg.algebra.rounding import Screen, Workspace, bits, check_storage, finite, round_to
from loreg.errors import BadInput, Unsupported

BLOCK_ELEMENTS = 2**18
"""Elements per block: 2 MiB of float64, which stays in cache; twice that cost a third of the speed."""

_FEW = 256
"""Candidates that are all decided exactly: to look at their bounds first would take longer."""
_EXACT_TERMS = 2**18  # doubles that one batch of the exact stage expands to


def _in_safe_range(x: Tensor) -> bool:
    """Whether each element is zero or of a magnitude in [1/SAFE, SAFE]."""
    if x.dtype != torch.float64:
        return True
    size = x.abs()
    return bool(((size == 0) | ((size >= 1 / SAFE) & (size <= SAFE))).all())


def _as_rows(x: Tensor) -> Tensor:
    """A vector as a matrix of one column, so that both are cut by rows."""
    return x[:, None] if x.ndim == 1 else x


def _largest(x: Tensor) -> float:
    return float(x.max()) if x.numel() else 0.0


def _doubles(x: Tensor) -> Doubles:
    """A copy on the CPU, in float64 and row-major, for NumPy."""
    copy: Doubles = x.double().cpu().contiguous().numpy()
    return copy


@dataclass(frozen=True, slots=True)
class WeightedSum:
    """An edit as a value: the terms that are added to one weight. No terms: a conversion of dtype, at most.

    Raises BadInput if the terms are for weights of different shapes.
    """

    low_rank: tuple[LowRank, ...] = ()
    dense: tuple[Dense, ...] = ()

    def __post_init__(self) -> None:
        shapes = {term.shape for term in self._terms}
        if len(shapes) > 1:
            found = ", ".join(str(shape) for shape in sorted(shapes))
            raise BadInput(f"the terms of one edit must have one shape, found {found}.")

    @property
    def _terms(self) -> tuple[LowRank | Dense, ...]:
        return (*self.low_rank, *self.dense)

    @property
    def shape(self) -> tuple[int, ...] | None:
        """The shape of the weights that this edit fits; None if it has no terms and fits all."""
        return next((term.shape for term in self._terms), None)

    @property
    def mT(self) -> WeightedSum:  # noqa: N802 - torch's name
        """The edit of the transposed weight, of each matrix of a stack."""
        return WeightedSum(tuple(term.mT for term in self.low_rank), tuple(term.mT for term in self.dense))

    def __getitem__(self, index: int) -> WeightedSum:
        """The edit of one matrix of a stack."""
        return WeightedSum(tuple(term[index] for term in self.low_rank), tuple(term[index] for term in self.dense))

    def scaled(self, weight: float) -> WeightedSum:
        """Each term times ``weight``, one IEEE double product per scale."""
        return WeightedSum(
            tuple(term.scaled(weight) for term in self.low_rank),
            tuple(term.scaled(weight) for term in self.dense),
        )

    def __neg__(self) -> WeightedSum:
        return WeightedSum(tuple(-term for term in self.low_rank), tuple(-term for term in self.dense))

    def __add__(self, other: WeightedSum) -> WeightedSum:
        return WeightedSum(self.low_rank + other.low_rank, self.dense + other.dense)

    def to(self, device: torch.device | str) -> WeightedSum:
        """The same values on another device."""
        return WeightedSum(
            tuple(term.to(device) for term in self.low_rank), tuple(term.to(device) for term in self.dense)
        )

    @torch.no_grad()
    def prepare(
        self,
        shape: Sequence[int],
        dtype_in: torch.dtype,
        dtype_out: torch.dtype,
        device: torch.device | str = "cpu",
        tile_rows_hint: int | None = None,
        workspace: Workspace | None = None,
    ) -> Prepared | Stacked:
        """Checks, moves to ``device`` and allocates what applying the edit to one weight needs.

        ``shape`` is the weight's, (rows, cols), (n,), or (n, rows, cols) for a stack of matrices; ``dtype_in`` in
        FACTOR_DTYPES, ``dtype_out`` in STORAGE_DTYPES. ``tile_rows_hint`` bounds the rows that are worked on at
        once; by default blocks have about BLOCK_ELEMENTS. Needs 8·R·(rows + cols) bytes for the factors, R the
        sum of ranks, and 16 bytes per element of a block; besides, about 100 bytes for each element that waits for
        a decision, at most BLOCK_ELEMENTS and one block of them. A stack needs as much as one of its matrices.
        Raises BadInput if shapes do not fit, Unsupported for other dtypes and for weights of more dimensions.
        """
        shape = tuple(shape)
        check_storage(dtype_out)
        if dtype_in not in FACTOR_DTYPES:
            raise Unsupported(f"weights of dtype {dtype_in} cannot be edited: choose one of {FACTOR_DTYPES}.")
        if len(shape) not in (1, 2, 3):
            raise Unsupported(f"a weight of shape {shape} cannot be edited: expected 1 to 3 dimensions.")
        if self.shape not in (None, shape):
            raise BadInput(f"an edit for shape {self.shape} does not fit a weight of shape {shape}.")
        if len(shape) == 3:
            return Stacked(self, shape, dtype_in, dtype_out, torch.device(device), tile_rows_hint, workspace)
        columns = shape[1] if len(shape) == 2 else 1
        block = min(shape[0], tile_rows_hint or BLOCK_ELEMENTS // max(1, columns))
        space = workspace or Workspace()
        return Prepared(self.to(device), shape, dtype_in, dtype_out, torch.device(device), max(1, block), space)

    def apply(self, W: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """The whole of ``W`` (1-D to 3-D, any device) edited, as a new tensor of ``dtype`` (default: W's)."""
        out = torch.empty_like(W, dtype=dtype or W.dtype, memory_format=torch.contiguous_format)
        rows = (-1, W.shape[-1]) if W.ndim == 3 else W.shape
        self.prepare(W.shape, W.dtype, out.dtype, W.device).tile(W.reshape(rows), 0, out.view(rows))
        return out


class Prepared:
    """An edit bound to one weight's shape, dtypes and device, with its workspaces: for one thread at a time.

    *Bound.* With n summands, in any order and blocking, fused or not, |acc - x| ≤ γ_{n+2}·(|W| + S), where S
    is at least the sum of the magnitudes of all terms but W, γ_k = ku/(1 - ku), u = 2⁻⁵³ (Higham, Accuracy
    and Stability, 2nd ed., §3.1; the two are the products and the rounding of c·B). By |W| ≤ |x| + S that is
    at most η(|acc| + 2S), η = (n + 8)u ≥ γ/(1 - γ) for n ≤ 2²⁴. W itself, the large one, needs no pass. S is
    one number per weight: Σ|d|·max|X| + max‖(cB)_i‖₂·max‖A_j‖₂ by Cauchy-Schwarz. Where a product might
    over- or underflow, S is infinite and all elements are decided exactly.
    """

    def __init__(
        self,
        edit: WeightedSum,
        shape: tuple[int, ...],
        dtype_in: torch.dtype,
        dtype_out: torch.dtype,
        device: torch.device,
        block: int,
        workspace: Workspace,
    ) -> None:
        self._edit, self._shape = edit, shape
        self._dtypes = dtype_in, dtype_out
        rows, columns = shape[0], shape[1] if len(shape) == 2 else 1
        none = torch.empty(0, dtype=torch.float64, device=device)
        lefts = [term.scale * term.left.double() for term in edit.low_rank]
        rights = [term.right.double() for term in edit.low_rank]
        self._left = torch.cat([none.view(rows, 0), *lefts], dim=1)
        self._right = torch.cat([none.view(0, columns), *rights], dim=0)
        low_rank_only = bool(edit.low_rank) and not edit.dense
        summands = 1 + len(edit.dense) + self._left.shape[1]
        self._eta = (summands + 8) * 2.0**-53
        self._spread = self._magnitude()
        if low_rank_only and native.computes(dtype_in, dtype_out, device):
            self._pass: Blocks | native.Fused = native.Fused(
                self._left, self._right, dtype_in, dtype_out, self._eta, self._spread, workspace
            )
        else:
            screen = Screen(dtype_out, block * columns, self._eta, self._spread, device, workspace)
            dense = [(term.scale, _as_rows(term.value)) for term in edit.dense]
            self._pass = Blocks(self._left, self._right, dense, block, screen, workspace)

    def _magnitude(self) -> float:
        """S of the class's bound: at least Σ|d·X| + Σ|c·B||A| in every element, up to 2⁻²⁰ of itself."""
        dense, low_rank = self._edit.dense, self._edit.low_rank
        tensors = [term.value for term in dense]
        tensors += [factor for term in low_rank for factor in (term.left, term.right)]
        scales = [term.scale for term in dense] + [term.scale for term in low_rank]
        tensors.append(torch.tensor(scales, dtype=torch.float64))
        if not all(_in_safe_range(tensor) for tensor in tensors):
            return math.inf
        left, right = torch.linalg.vector_norm(self._left, dim=1), torch.linalg.vector_norm(self._right, dim=0)
        spread = sum(abs(term.scale) * _largest(addable(term.value).abs()) for term in dense)
        return spread + _largest(left) * _largest(right)

    @torch.no_grad()
    def tile(self, W_rows: Tensor, row_start: int, out: Tensor) -> int:
        """Rows [row_start, row_start + n) of the edited weight into ``out``; returns how many of its elements
        one rounding left in doubt.

        ``W_rows`` and ``out`` have the shape of n rows of the weight (n elements of a vector), dtype_in and
        dtype_out, on the prepared device. ``out`` may be ``W_rows`` itself, and else shares
        memory with no operand of the edit.
        Neither bytes nor count depend on how a weight is cut into tiles. Raises BadInput if shapes or dtypes
        are others, if W holds NaN or infinity, or if a result exceeds the largest finite value of dtype_out,
        naming the element; ``out`` is then partly written.
        """
        expected = (W_rows.shape[0] if W_rows.ndim else 0, *self._shape[1:])
        for name, tensor, dtype in (("W", W_rows, self._dtypes[0]), ("out", out, self._dtypes[1])):
            if tuple(tensor.shape) != expected or tensor.dtype != dtype:
                raise BadInput(
                    f"{name} of a tile is {tensor.dtype} {tuple(tensor.shape)}, expected {dtype} {expected}."
                )
        if row_start < 0 or row_start + expected[0] > self._shape[0]:
            raise BadInput(f"rows {row_start} to {row_start + expected[0]} are not in shape {self._shape}.")
        source, target = _as_rows(W_rows), _as_rows(out)
        rows = expected[0] if source.numel() else 0
        pending, start, waiting, doubts = [], 0, 0, 0
        while start < rows:
            done, found = self._pass.rows(source[start:rows], row_start + start, target[start:rows])
            start += done
            pending.append(found)
            waiting += len(found.near)
            if waiting >= BLOCK_ELEMENTS or start == rows:
                self._settle(Candidates(*map(torch.cat, zip(*pending, strict=True))), row_start, target)
                pending, waiting, doubts = [], 0, doubts + waiting
        return doubts

    def _settle(self, found: Candidates, row_start: int, out: Tensor) -> None:
        """Writes the values of the candidates: those that the bound around them decides, and the rest exactly."""
        near = found.near
        if near.numel() <= _FEW:
            values = torch.empty(near.shape, dtype=self._dtypes[1], device=near.device)
            index = torch.arange(near.numel(), device=near.device)
        else:
            # 2^-51 and the third ηS pay for the rounding of the two ends themselves.
            margin = (self._eta + 2.0**-51) * near.abs() + 3 * self._eta * self._spread
            values, other = (round_to(near + side, self._dtypes[1]) for side in (-margin, margin))
            open_ = (bits(values) != bits(other)) | ~finite(values) | (near == 0)
            index = open_.nonzero()[:, 0]
        step = max(1, _EXACT_TERMS // (2 + 2 * len(self._edit.dense) + 4 * self._left.shape[1]))
        for start in range(0, index.numel(), step):
            batch = index[start : start + step]
            values[batch] = self._exact(Candidates(*(x[batch] for x in found)))
        out[found.rows - row_start, found.columns] = values

    def _exact(self, found: Candidates) -> Tensor:
        """The correctly rounded values of elements, decided on the CPU."""
        rows, columns, _, W = found
        weight = W.double().cpu()
        self._refuse(~weight.isfinite(), found, "is NaN or infinite in W")
        dense = [(x.scale, _doubles(_as_rows(x.value)[rows, columns])) for x in self._edit.dense]
        low_rank = [(x.scale, _doubles(x.left[rows].T), _doubles(x.right[:, columns])) for x in self._edit.low_rank]
        odd = torch.from_numpy(exact_sum(weight.numpy(), dense, low_rank))
        signed = torch.where(odd != 0, odd, torch.where(weight == 0, weight, 0.0))
        values = round_to(signed, self._dtypes[1])
        self._refuse(~finite(values), found, f"exceeds the largest finite {self._dtypes[1]}")
        return values.to(W.device)

    def _refuse(self, wrong: Tensor, found: Candidates, what: str) -> None:
        for j in wrong.nonzero()[:1, 0].tolist():
            element = [int(found.rows[j]), int(found.columns[j])][: len(self._shape)]
            raise BadInput(f"element {element} {what}: the merge is refused rather than written wrong.")


class Stacked:
    """An edit bound to a stack of matrices (n, rows, cols), such as fused experts: each is a weight of its own.

    ``tile`` counts rows through all of them, and prepares one matrix at a time.
    """

    def __init__(
        self,
        edit: WeightedSum,
        shape: tuple[int, ...],
        dtype_in: torch.dtype,
        dtype_out: torch.dtype,
        device: torch.device,
        tile_rows_hint: int | None,
        workspace: Workspace | None,
    ) -> None:
        self._edit, self._shape = edit, shape
        self._arguments = shape[1:], dtype_in, dtype_out, device, tile_rows_hint, workspace or Workspace()
        self._current: tuple[int, Prepared | Stacked] | None = None

    def tile(self, W_rows: Tensor, row_start: int, out: Tensor) -> int:
        """Rows [row_start, row_start + n) of the (n·rows, cols) that the stack is: as ``Prepared.tile``."""
        doubts, done, height = 0, 0, self._shape[1]
        while done < W_rows.shape[0]:
            index, first = divmod(row_start + done, height)
            if index >= self._shape[0]:
                raise BadInput(f"row {row_start + done} is not in shape {self._shape}.")
            span = slice(done, min(W_rows.shape[0], done + height - first))
            doubts += self._matrix(index).tile(W_rows[span], first, out[span])
            done = span.stop
        return doubts

    def _matrix(self, index: int) -> Prepared | Stacked:
        if self._current is None or self._current[0] != index:
            edit = self._edit[index] if self._edit.shape else self._edit
            self._current = index, edit.prepare(*self._arguments)
        return self._current[1]


def apply(W: Tensor, edit: WeightedSum, dtype: torch.dtype | None = None) -> Tensor:
    """``edit.apply(W, dtype)``: the whole of ``W`` edited, as a new tensor of ``dtype`` (default: W's)."""
    return edit.apply(W, dtype)
