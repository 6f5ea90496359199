"""The arithmetic of verification: what judges the rows of a written weight, given those of the base and the edit.

It shares nothing with what computed them but the adapters as they are read, ``Again`` excepted, which is the algebra:
what ``native.glance`` is compiled from has none of the other's code.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import linear

from loreg.algebra import native
from loreg.algebra.edits import WeightedSum
from loreg.algebra.rounding import Workspace, bits, half_ulp

CPU = torch.device("cpu")
TILE_ELEMENTS = 1 << 19
"""What is read and judged at once: with half of it calls took a fifth of the time, twice as much leaves the cache."""
SAMPLED_ROWS = 64
_PROBES = 4
_PART_ELEMENTS = 1 << 16
"""Of rows that are looked at in float64: eight temporaries of them are 4 MiB."""
# float64 sums of up to 2^20 terms, and the rounding of c·B: a factor far above what any order of summation needs.
_SLACK = 2.0**-30
# Where one rounding moves a number by 2^-9 and more. Of float16 it is 2^-12, which float32 over long rows comes near.
_COARSE = (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
_LONGEST = 1 << 20


class Judge(Protocol):
    """Judges one tensor, as one matrix or several. ``wrong``: what is, in words, empty so far if nothing."""

    @property
    def wrong(self) -> str: ...

    def begin(self, edit: WeightedSum, shape: tuple[int, int]) -> None:
        """The next matrix, and what was to happen to it."""

    def rows(self, first: int, W: Tensor, written: Tensor) -> None:
        """Rows from ``first`` on, before and after."""


class Again:
    """The whole tensor computed again, through the algebra, and compared bit by bit."""

    def __init__(self, dtypes: tuple[torch.dtype, torch.dtype], space: Workspace) -> None:
        self._dtypes, self._space, self._differing = dtypes, space, 0

    @property
    def wrong(self) -> str:
        return f"has {self._differing} elements that are not the correctly rounded sums" if self._differing else ""

    def begin(self, edit: WeightedSum, shape: tuple[int, int]) -> None:
        self._prepared = edit.prepare(shape, *self._dtypes, workspace=self._space)

    def rows(self, first: int, W: Tensor, written: Tensor) -> None:
        again = self._space.take("again", written.numel(), written.dtype, CPU).view(written.shape)
        self._prepared.tile(W, first, again)
        self._differing += int((bits(again) != bits(written)).sum())


class Probe:
    """W'x against Wx + Σ c·B(Ax) for a few x, and some rows element by element: each within one rounding.

    *Bound.* Of W' one rounding moved each element by at most e|W'| + t, half of a relative unit and of the smallest
    subnormal: so a row r is right only if |(W' - W)ᵣx - Σ c·Bᵣ(Ax)| ≤ Σⱼ(e|W'ᵣⱼ| + t)|xⱼ| =: β, and what float64
    itself may be off by (``_SLACK``). All |xⱼ| ≤ 1, and x holds float32 values.

    *At first sight.* Roundings go either way, so of n columns a right row has a residue near e√n where β is near e·n.
    A sum over an eighth of the columns is a lower bound of β, at an eighth of its cost; what is below that passes,
    and every other row is looked at again, in float64, with β itself: nothing passes that would not pass there. For
    storage of a unit of 2⁻⁹ and more the first sight is in float32. With D = fl(W' - W), u = 2⁻²⁴, n ≤ 2²⁰ and sums
    in any order, its residue is off by at most γ_{n+2}·Σ|Dⱼ||xⱼ| ≤ γ_{n+2}·‖D‖‖x‖, and ‖D‖ has a relative error of
    γ_{n+2} at most: (n + 8)u·9/8 covers both. What underflows, were it flushed to zero, adds at most the smallest
    normal number for each operand and product, and in ‖D‖ the root of n of them; the lower bound of β may be too
    large by (k + 4)u of k columns. For n of 4,096 that is a tenth of the bound where ‖D‖ is a tenth of the row's
    norm; where a delta is larger than that the second look decides. float16, float32 and dense terms have float64.
    """

    def __init__(self, dtypes: tuple[torch.dtype, torch.dtype], seed: int, space: Workspace) -> None:
        self._dtype, self._seed, self._space = dtypes[1], seed, space
        info = torch.finfo(self._dtype)
        self._unit, self._least = info.eps / 2 + _SLACK, info.tiny * info.eps / 2
        self.wrong = ""

    def begin(self, edit: WeightedSum, shape: tuple[int, int]) -> None:
        rows, columns = shape
        self._edit, self._enough = edit, max(1, _PART_ELEMENTS // columns)
        self._left, self._right = _stacked(edit, rows, columns)
        self._largest = self._right.abs().amax(1)
        self._x = _vectors(self._right, columns, self._seed)
        self._sizes = self._x.abs()
        self._added, self._spread = linear(self._x, self._right), linear(self._sizes, self._right.abs())
        self._sampled, self._next, self._looked_at = _sample(rows, self._seed), 0, 0
        self._rows = torch.tensor(self._sampled, dtype=torch.int64)
        self._waiting: list[tuple[Tensor, Tensor, Tensor]] = []
        self._at_first_sight(columns)

    def _at_first_sight(self, columns: int) -> None:
        narrow = self._dtype in _COARSE and columns <= _LONGEST and not self._edit.dense
        self._work = torch.float32 if narrow else torch.float64
        few = min(columns, max(512, columns // 8))
        self._narrow_x = self._x.to(self._work)
        self._few_sizes = self._narrow_x[:, :few].abs()
        info = torch.finfo(self._work)
        u = info.eps / 2
        self._share = self._unit * (1 - (few + 4) * u)
        self._allowed = (columns + 8) * u * 1.125 * torch.linalg.vector_norm(self._x, dim=1)
        self._flushed = 2 * (columns * info.tiny) ** 0.5
        self._floor = self._least * self._few_sizes.double().sum(1) - 5 * columns * info.tiny

    def rows(self, first: int, W: Tensor, written: Tensor) -> None:
        if self.wrong:
            return
        doubtful = torch.arange(len(W)) if self._edit.dense else self._doubtful(first, W, written)
        if any(self._fails(first, part, W, written) for part in self._parts(doubtful)):
            here = f"rows {first} to {first + len(W)}"
            self.wrong = f"fails a probe in {here}: W'x is not Wx + Σ c·B(Ax) within one rounding"
            return
        self._collect(first, W, written)

    def _collect(self, first: int, W: Tensor, written: Tensor) -> None:
        """Takes up the sampled rows of a tile; they are looked at when there are enough, or no more come."""
        stop = bisect_left(self._sampled, first + len(W), self._next)
        while self._next < stop:
            end = min(self._looked_at + self._enough, stop)
            rows = self._rows[self._next : end]
            self._waiting.append((rows, _rows_of(W, rows - first), _rows_of(written, rows - first)))
            self._next = end
            if end < self._looked_at + self._enough and end < len(self._sampled):
                return
            self._looked_at = end
            rows, before, after = (torch.cat(parts) for parts in zip(*self._waiting, strict=True))
            self._waiting.clear()
            if self._differs(rows, before.double(), after):
                here = f"rows {int(rows[0])} to {int(rows[-1]) + 1}"
                self.wrong = f"has an element in {here} that is not the sum within one rounding"

    def _parts(self, rows: Tensor) -> tuple[Tensor, ...]:
        return torch.split(rows, self._enough) if len(rows) else ()

    def _doubtful(self, first: int, W: Tensor, written: Tensor) -> Tensor:
        """The rows (int64) that do not pass at first sight: see the class."""
        few = self._few_sizes.shape[1]
        if native.library is not None and W.dtype == written.dtype == torch.bfloat16 and self._work == torch.float32:
            products, norms, sizes = native.glance(W, written, self._narrow_x, few)
        else:
            products, norms, sizes = self._glance(W, written, few)
        below = sizes.double().mul_(self._share).add_(self._floor)
        residue = products.double()
        residue.sub_(linear(self._left[first : first + len(W)], self._added)).abs_()
        residue.addcmul_(norms.double().add_(self._flushed), self._allowed)
        # Not what is larger: NaN and infinity, which are neither, have to be looked at.
        return (residue < below).all(1).logical_not_().nonzero()[:, 0]

    def _glance(self, W: Tensor, written: Tensor, few: int) -> tuple[Tensor, Tensor, Tensor]:
        """As ``native.glance``, of any dtype, in the one that is worked in."""
        D = self._taken("difference", W.shape).copy_(written)
        size = torch.abs(D[:, :few], out=self._taken("size", (len(D), few)))
        sizes = linear(size, self._few_sizes)
        D.sub_(self._taken("base", W.shape).copy_(W) if W.dtype.itemsize == 1 else W)
        return linear(D, self._narrow_x), torch.linalg.vector_norm(D, dim=1, keepdim=True), sizes

    def _taken(self, use: str, shape: tuple[int, ...]) -> Tensor:
        rows, columns = shape
        return self._space.take(use, rows * columns, self._work, CPU).view(shape)

    def _fails(self, first: int, rows: Tensor, W: Tensor, written: Tensor) -> bool:
        """Whether one of the ``rows`` of a tile is not within the bound, in float64."""
        left, result = self._left[first + rows], written[rows].double()
        difference = result - W[rows].double()
        bound = self._unit * linear(result.abs(), self._sizes) + self._least * self._sizes.sum(1)
        bound += _SLACK * linear(left.abs(), self._spread)
        for term in self._edit.dense:
            dense = term.scale * term.value[first + rows].double()
            difference -= dense
            bound += _SLACK * linear(dense.abs(), self._sizes)
        residue = linear(difference, self._x) - linear(left, self._added)
        return not bool(difference.isfinite().all()) or bool((residue.abs() > bound).any())

    def _differs(self, rows: Tensor, W: Tensor, written: Tensor) -> bool:
        """Whether an element of ``rows`` is not the sum within half a unit in its last place. ``W``: in float64."""
        left, result = self._left[rows], written.double()
        terms = result.abs().add_((left.abs() @ self._largest)[:, None])
        wrong = torch.sub(result, W).addmm_(left, self._right, alpha=-1)
        for term in self._edit.dense:
            dense = term.scale * term.value[rows].double()
            wrong -= dense
            terms += dense.abs_()
        allowed = half_ulp(written).add_(terms, alpha=_SLACK * 2.0**-16)
        return not bool(result.isfinite().all()) or bool((wrong.abs_() > allowed).any())


def _rows_of(x: Tensor, index: Tensor) -> Tensor:
    """By words: torch takes several times as long to index anything else, and has no such function for float8."""
    return bits(x).index_select(0, index).view(x.dtype)


def _stacked(edit: WeightedSum, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """All low-rank terms as c·left (rows, R) and right (R, columns), in float64; R is 0 for none."""
    rank = sum(term.rank for term in edit.low_rank)
    left = torch.empty(rows, rank, dtype=torch.float64)
    right = torch.empty(rank, columns, dtype=torch.float64)
    start = 0
    for term in edit.low_rank:
        here = slice(start, start + term.rank)
        left[:, here].copy_(term.left).mul_(term.scale)
        right[here].copy_(term.right)
        start = here.stop
    return left, right


def _vectors(right: Tensor, columns: int, seed: int) -> Tensor:
    """(_PROBES, columns), float64 of float32 values up to 1: signs at random, and combinations of the rows of A,
    scaled to the same size. Without an A all are signs."""
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (_PROBES, columns), generator=generator).double() * 2 - 1
    half = _PROBES // 2
    mixed = torch.randn(half, len(right), generator=generator, dtype=torch.float64) @ right
    largest = mixed.abs().amax(dim=1, keepdim=True)
    usable = largest > 0
    mixed = torch.where(usable, mixed / torch.where(usable, largest, 1.0), signs[half:])
    return torch.cat([signs[:half], mixed]).float().double()


def _sample(rows: int, seed: int) -> list[int]:
    """A few row numbers at random, in order."""
    generator = torch.Generator().manual_seed(seed + 1)
    if rows <= _PART_ELEMENTS:
        return sorted(torch.randperm(rows, generator=generator)[:SAMPLED_ROWS].tolist())
    return sorted(set(torch.randint(rows, (SAMPLED_ROWS,), generator=generator).tolist()))  # hardly one of them twice
