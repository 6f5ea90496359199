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
from functools import cached_property

import torch
from torch import Tensor

from loreg.algebra import gpu, native
from loreg.algebra.deciding import Deciding
from loreg.algebra.delta import FACTOR_DTYPES, Dense, LowRank
from loreg.algebra.exact import SAFE
from loreg.algebra.passes import UNSURE, Blocks, Candidates, Done, Outcome, addable, as_rows, lefts, rights
from loreg.algebra.rounding import Screen, Workspace, check_storage, ordered, thresholds
from loreg.errors import BadInput, Unsupported

BLOCK_ELEMENTS = 2**18
"""Elements per block: 2 MiB of float64, which stays in cache; twice that cost a third of the speed."""


def _in_safe_range(x: Tensor) -> bool:
    """Whether each element is zero or of a magnitude in [1/SAFE, SAFE]."""
    if x.dtype != torch.float64:
        return True
    size = x.abs()
    return bool(((size == 0) | ((size >= 1 / SAFE) & (size <= SAFE))).all())


def _largest(x: Tensor) -> float:
    return float(x.max()) if x.numel() else 0.0


def _largest_norm(x: Tensor, dim: int) -> float:
    """Of the rows or columns, in float64; in float32 a square may overflow.

    Not by torch's norm, which takes thirteen times as long along columns.
    """
    return math.sqrt(_largest(x.double().square().sum(dim)))


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
        residual: bool = False,
    ) -> Prepared | Stacked:
        """Checks, moves to ``device`` and allocates what applying the edit to one weight needs.

        ``shape`` is the weight's, (rows, cols), (n,), or (n, rows, cols) for a stack of matrices; ``dtype_in`` in
        FACTOR_DTYPES, ``dtype_out`` in STORAGE_DTYPES. ``tile_rows_hint`` bounds the rows that are worked on at
        once; by default blocks have about BLOCK_ELEMENTS. ``residual``: whether tiles are asked for theirs. Needs
        8·R·(rows + cols) bytes for the factors, R the sum of ranks, and 16 bytes per element of a block, about 60
        with residuals; besides, about 100 bytes for each element that waits for a decision, at most BLOCK_ELEMENTS
        and one block of them. A stack needs as much as one of its matrices.
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
            given = dtype_in, dtype_out, torch.device(device), tile_rows_hint, workspace or Workspace(), residual
            return Stacked(self, shape, given)
        columns = shape[1] if len(shape) == 2 else 1
        block = min(shape[0], tile_rows_hint or BLOCK_ELEMENTS // max(1, columns))
        space = workspace or Workspace()
        where = torch.device(device)
        return Prepared(self, shape, (dtype_in, dtype_out), where, max(1, block), space, residual)

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

    *Residual.* Taking back gives P = round(y), y = W' - (x - W), of which r = W' - (acc - W) is computed. |W' - x| is
    at most |x|/8, or half the least spacing, of which W is a multiple: so |W| ≤ 2|y| + 0.15S, |acc| ≤ 2|y| + 2.2S,
    and with the roundings of acc - W, at most 2uS, and of r itself |r - y| ≤ 3η(|r| + 4S).
    """

    def __init__(
        self,
        edit: WeightedSum,
        shape: tuple[int, ...],
        dtypes: tuple[torch.dtype, torch.dtype],
        device: torch.device,
        block: int,
        workspace: Workspace,
        residual: bool,
    ) -> None:
        self._edit, self._shape, self._dtypes, self._residual = edit, shape, dtypes, residual
        columns = shape[1] if len(shape) == 2 else 1
        if not edit.dense and gpu.computes(edit.low_rank, *dtypes, device):
            # What the exact stage needs stays where it is, on the host as a rule, where that stage is computed.
            self._pass: Blocks | native.Fused | gpu.Fused = gpu.Fused(
                edit.to(device).low_rank, (shape[0], columns), dtypes, device
            )
            return
        self._edit = edit = edit.to(device)
        fused = bool(edit.low_rank) and not edit.dense and native.computes(*dtypes, device)
        narrow = fused and all(term.right.dtype.itemsize < 8 for term in edit.low_rank)
        left, rest = lefts(edit.low_rank, shape[0], device)
        right = rights(edit.low_rank, columns, torch.float32 if narrow else torch.float64, device)
        rows, largest = torch.linalg.vector_norm(left, dim=1), _largest_norm(right, dim=0)
        summands = 1 + len(edit.dense) + left.shape[1]
        eta, spread = (summands + 8) * 2.0**-53, self._magnitude(_largest(rows) * largest)
        forth, back = (dtypes[1], eta, spread), (dtypes[0], 3 * eta, 2 * spread)
        self._known = eta, spread
        if fused:
            known = all(term.left.dtype.itemsize < 8 for term in edit.low_rank)
            factors = native.Factors(left, right, rest, rows, largest, spread if known else math.inf)
            screens = thresholds(*forth), thresholds(*back)
            self._pass = native.Fused(factors, dtypes, screens, workspace)
        else:
            size = block * columns
            screens_ = [Screen(*given, size, device, workspace) for given in (forth, back)[: 1 + residual]]
            dense = [(term.scale, as_rows(term.value)) for term in edit.dense]
            self._pass = Blocks(left, right, dense, block, screens_, workspace)

    @property
    def on_gpu(self) -> gpu.Fused | None:
        """The pass, if it is one that can be launched."""
        return self._pass if isinstance(self._pass, gpu.Fused) else None

    def compiled(self, first: int) -> native.End | None:
        """The compiled pass of rows from the ``first`` on, if the edit has one, and keeps the dtype."""
        if not isinstance(self._pass, native.Fused) or self._dtypes[0] != self._dtypes[1]:
            return None
        return native.End(self._pass, first, self._shape[0] - first)

    def know(self, spread: float) -> None:
        """S of the pass ``on_gpu``, which is then not asked for it."""
        assert isinstance(self._pass, gpu.Fused)
        self._bound = self._pass.eta, spread

    @cached_property
    def _bound(self) -> tuple[float, float]:
        """η and S, for which a GPU is waited for."""
        return (self._pass.eta, float(self._pass.spread)) if isinstance(self._pass, gpu.Fused) else self._known

    @cached_property
    def _forth(self) -> Deciding:
        return Deciding(self._edit, self._shape, self._dtypes[1], *self._bound)

    @cached_property
    def _back(self) -> Deciding:
        eta, spread = self._bound
        return Deciding(-self._edit, self._shape, self._dtypes[0], 3 * eta, 2 * spread)

    def _magnitude(self, products: float) -> float:
        """S of the class's bound: at least Σ|d·X| + Σ|c·B||A| in every element, up to 2⁻²⁰ of itself. ``products``:
        what the norms say of the second sum."""
        dense, low_rank = self._edit.dense, self._edit.low_rank
        tensors = [term.value for term in dense]
        tensors += [factor for term in low_rank for factor in (term.left, term.right)]
        scales = [term.scale for term in dense] + [term.scale for term in low_rank]
        tensors.append(torch.tensor(scales, dtype=torch.float64))
        if not all(_in_safe_range(tensor) for tensor in tensors):
            return math.inf
        return sum(abs(term.scale) * _largest(addable(term.value).abs()) for term in dense) + products

    def check(self, W_rows: Tensor, row_start: int, out: Tensor) -> None:
        """Raises BadInput if these are no rows of the weight."""
        expected = (W_rows.shape[0] if W_rows.ndim else 0, *self._shape[1:])
        for name, tensor, dtype in (("W", W_rows, self._dtypes[0]), ("out", out, self._dtypes[1])):
            if tuple(tensor.shape) != expected or tensor.dtype != dtype:
                raise BadInput(
                    f"{name} of a tile is {tensor.dtype} {tuple(tensor.shape)}, expected {dtype} {expected}."
                )
        if row_start < 0 or row_start + expected[0] > self._shape[0]:
            raise BadInput(f"rows {row_start} to {row_start + expected[0]} are not in shape {self._shape}.")

    @torch.no_grad()
    def tile(self, W_rows: Tensor, row_start: int, out: Tensor, residual: Tensor | None = None) -> Outcome:
        """Rows [row_start, row_start + n) of the edited weight into ``out``.

        ``W_rows`` and ``out`` have the shape of n rows of the weight (n elements of a vector), dtype_in and
        dtype_out, on the prepared device. ``out`` may be ``W_rows`` itself, and else shares
        memory with no operand of the edit. ``residual`` (int8, contiguous, of that shape too) takes what has to be
        added, in storage values, to W' less the delta, correctly rounded to dtype_in, to get W; where a byte has no
        room for it UNSURE, and the outcome has it. Only if that was prepared for.

        Neither bytes nor the outcome depend on how a weight is cut into tiles. Raises BadInput if shapes or dtypes
        are others, if W holds NaN or infinity, or if a result exceeds the largest finite value of dtype_out,
        naming the element; ``out`` is then partly written.
        """
        self.check(W_rows, row_start, out)
        source, target = as_rows(W_rows), as_rows(out)
        small = None if residual is None else as_rows(residual)
        rows, start = len(source) if source.numel() else 0, 0
        pending, waiting = list[Done](), 0
        outcome = Outcome()
        while start < rows:
            here = slice(start, rows)
            done = self._pass.rows(
                source[here], row_start + start, target[here], None if small is None else small[here]
            )
            outcome += done.known.moved(start * target.shape[1])
            start += done.rows
            pending.append(done)
            waiting += len(done.found.near) + (0 if done.unsure is None else len(done.unsure.near))
            if waiting >= BLOCK_ELEMENTS or (waiting and start == rows):
                outcome += self._settle(pending, row_start, target, small)
                pending, waiting = [], 0
        return outcome.in_order()

    def _settle(self, pending: Sequence[Done], row_start: int, out: Tensor, small: Tensor | None) -> Outcome:
        """Writes the values of the candidates, and then what of the residual depended on them."""
        found = Candidates.all([done.found for done in pending])
        unsure = [done.unsure for done in pending if done.unsure is not None]
        if small is None or not unsure or not self._residual:
            self.decide(found, None, row_start, out)
            return Outcome(len(found.near))
        rest = Candidates.all(unsure)
        correction = self.decide(found, rest, row_start, out)
        fits = correction.abs() < -UNSURE
        rows, columns = rest.rows - row_start, rest.columns
        small[rows, columns] = torch.where(fits, correction, UNSURE).to(torch.int8)
        index = rows * out.shape[1] + columns
        return Outcome(len(found.near), index[~fits], correction[~fits])

    def decide(self, found: Candidates, unsure: Candidates | None, row_start: int, out: Tensor) -> Tensor:
        """Writes the values of ``found`` into ``out``, whose first row is ``row_start``; and returns the corrections
        (int64) of ``unsure``, none for None."""
        if len(found.near):
            out[found.rows - row_start, found.columns] = self.forth(found)
        if unsure is None or not len(unsure.near):
            return torch.empty(0, dtype=torch.int64, device=out.device)
        return self.back(unsure, out[unsure.rows - row_start, unsure.columns])

    def forth(self, found: Candidates) -> Tensor:
        """The elements of W' that they are, on their device. Raises what ``tile`` does."""
        return self._forth.values(found)

    def taken_back(self, found: Candidates) -> Tensor:
        """The elements of W' less the delta that they are; ``found`` has W', and sums as ``forth``'s."""
        return self._back.values(found)

    def back(self, unsure: Candidates, after: Tensor) -> Tensor:
        """The corrections (int64) of ``unsure``, where W' is ``after``."""
        rows, columns, delta, W = unsure
        predicted = self.taken_back(Candidates(rows, columns, after.double() - delta, after))
        return ordered(W.to(self._dtypes[0])) - ordered(predicted)


class Stacked:
    """An edit bound to a stack of matrices (n, rows, cols), such as fused experts: each is a weight of its own.

    ``tile`` counts rows through all of them, and prepares one matrix at a time.
    """

    def __init__(
        self,
        edit: WeightedSum,
        shape: tuple[int, ...],
        given: tuple[torch.dtype, torch.dtype, torch.device, int | None, Workspace, bool],
    ) -> None:
        self._edit, self._shape, self._given = edit, shape, given
        self._current: tuple[int, Prepared] | None = None

    def tile(self, W_rows: Tensor, row_start: int, out: Tensor, residual: Tensor | None = None) -> Outcome:
        """Rows [row_start, row_start + n) of the (n·rows, cols) that the stack is: as ``Prepared.tile``."""
        outcome, done, height = Outcome(), 0, self._shape[1]
        while done < W_rows.shape[0]:
            index, first = divmod(row_start + done, height)
            if index >= self._shape[0]:
                raise BadInput(f"row {row_start + done} is not in shape {self._shape}.")
            span = slice(done, min(W_rows.shape[0], done + height - first))
            here = None if residual is None else residual[span]
            found = self._matrix(index).tile(W_rows[span], first, out[span], here)
            outcome += found.moved(done * self._shape[2])
            done = span.stop
        return outcome

    def compiled(self, first: int) -> native.End | None:
        """As ``Prepared.compiled``, of the rows of one matrix."""
        index, first = divmod(first, self._shape[1])
        return self._matrix(index).compiled(first)

    @property
    def on_gpu(self) -> bool:
        """Whether its matrices can be launched."""
        return not self._edit.dense and gpu.computes(self._edit.low_rank, *self._given[:3])

    @cached_property
    def matrices(self) -> list[Prepared]:
        """All of them, prepared and kept."""
        return [self._prepared(index) for index in range(self._shape[0])]

    def _matrix(self, index: int) -> Prepared:
        if self._current is None or self._current[0] != index:
            self._current = index, self._prepared(index)
        return self._current[1]

    def _prepared(self, index: int) -> Prepared:
        edit = self._edit[index] if self._edit.shape else self._edit
        prepared = edit.prepare(self._shape[1:], *self._given)
        assert isinstance(prepared, Prepared)  # of two dimensions
        return prepared


def apply(W: Tensor, edit: WeightedSum, dtype: torch.dtype | None = None) -> Tensor:
    """``edit.apply(W, dtype)``: the whole of ``W`` edited, as a new tensor of ``dtype`` (default: W's)."""
    return edit.apply(W, dtype)
