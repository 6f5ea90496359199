"""The two kernels of ``loreg.algebra.gpu``, which says what they are for. Imported only where they are to run.

A job is one weight. ``table``: FIELDS int64 for each job, in the order of ``merge``'s loads; ``reals``: for each the
η and S of its bound, for what is rounded and for what taking back the delta gives (algebra/edits.py, Prepared).
Elements come in words of LANES neighbours of one row: what one thread loads at once, and what the lists hold.
"""

from __future__ import annotations

import triton
import triton.language as tl

FIELDS = 15
LANES = 8

BF16 = tl.constexpr(0)
F16 = tl.constexpr(1)
F32 = tl.constexpr(2)

_FIELDS = tl.constexpr(FIELDS)
_LANES = tl.constexpr(LANES)


@triton.jit
def _number(raw, DTYPE: tl.constexpr):
    """float32, exactly."""
    if DTYPE == BF16:
        x = (raw.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    elif DTYPE == F16:
        x = raw.to(tl.float16, bitcast=True).to(tl.float32)
    else:
        x = raw.to(tl.float32, bitcast=True)
    return x


@triton.jit
def _nearest(x, DTYPE: tl.constexpr, CONVERTS: tl.constexpr):
    """A float32 rounded to nearest, ties to even, as raw bits. ``CONVERTS``: whether there is an instruction of that
    for bfloat16, which Triton's interpreter rounds otherwise: half of one in place of four."""
    if DTYPE == BF16 and not CONVERTS:
        u = x.to(tl.int32, bitcast=True)
        raw = ((u + 0x7FFF + ((u >> 16) & 1)) >> 16).to(tl.int16)
    elif DTYPE == BF16:
        raw = x.to(tl.bfloat16).to(tl.int16, bitcast=True)
    elif DTYPE == F16:
        raw = x.to(tl.float16).to(tl.int16, bitcast=True)
    else:
        raw = x.to(tl.int32, bitcast=True)
    return raw


@triton.jit
def _apart(one, other, DTYPE: tl.constexpr):
    """By how many bit patterns two storage values are apart, times 2^16 if they have 16 bits. Those of two signs are
    apart by more than a byte, also modulo 2^16, if they are finite."""
    if DTYPE == F32:
        apart = one.to(tl.int64) - other.to(tl.int64)
    else:
        apart = (one.to(tl.int32) << 16) - (other.to(tl.int32) << 16)
    return apart


@triton.jit
def _byte(apart, one, DTYPE: tl.constexpr):
    """Of values of one sign, by how many of them they are apart: algebra/rounding.py, ordered()."""
    steps = tl.where(one < 0, -apart, apart)
    return (steps if DTYPE == F32 else steps >> 16).to(tl.int8)


@triton.jit
def _near(x, margin):
    """Words of float32 that are off by ``margin`` and their own rounding at most: whether in one there is any that
    may lie on the other side of the midpoint of its neighbours in bfloat16, or is beyond the largest, or no number.

    By minima and maxima, since a comparison for each element takes more instructions."""
    u = x.to(tl.int32, bitcast=True)
    middle = ((u & -65536) | 0x8000).to(tl.float32, bitcast=True)
    largest = tl.max(u & 0x7FFFFFFF, 2)
    error = margin + largest.to(tl.float32, bitcast=True) * 5.960464477539063e-08  # 2^-24
    return (tl.min(tl.abs(x - middle), 2) <= error) | (largest >= 0x7F7F0000)


@triton.jit
def _screen(x, eta, spread, DTYPE: tl.constexpr):
    """Of float64 sums: whether rounding them by way of float32 is in doubt, and whether they are where one midpoint
    decides. algebra/rounding.py, Screen and thresholds()."""
    size = tl.abs(x)
    tau = (274877906944.0 if DTYPE == F32 else 536870912.0) * 1.00000095367431640625 * eta * spread  # 2^(reach + 2)
    if DTYPE == F32:
        u = x.to(tl.int64, bitcast=True)
        middle = ((u + (131072 - 268435456)) & 0x1FFFFFFF) <= 262144
        inside = (size >= tl.maximum(tau, 1.1754943508222875e-38)) & (size < 3.4028234663852886e38)
    elif DTYPE == BF16:
        middle = (x.to(tl.float32).to(tl.int32, bitcast=True) & 0xFFFF) == 0x8000
        inside = (size >= tl.maximum(tau, 1.1754943508222875e-38)) & (size < 3.3895313892515355e38)
    else:
        middle = (x.to(tl.float32).to(tl.int32, bitcast=True) & 0x1FFF) == 0x1000
        inside = (size >= tl.maximum(tau, 6.103515625e-05)) & (size < 65504.0)
    return middle | (inside == 0), inside


@triton.jit
def _decided(x, eta, spread, DTYPE: tl.constexpr, CONVERTS: tl.constexpr):
    """Raw bits of float64 sums correctly rounded, and where that is still open.

    Within its range a doubtful sum is less than half a step from one midpoint and farther from all others than its
    error, so the side on which it lies decides, if it lies farther from that than its error (2^-23 more pays for the
    bound's own roundings). The difference is exact.
    """
    doubtful, inside = _screen(x, eta, spread, DTYPE)
    value = _nearest(x.to(tl.float32), DTYPE, CONVERTS)
    if DTYPE == F32:
        u = x.to(tl.int64, bitcast=True) & -536870912
        lower = u.to(tl.float64, bitcast=True).to(tl.float32).to(tl.int32, bitcast=True)
        middle = (u | 0x10000000).to(tl.float64, bitcast=True)
    elif DTYPE == BF16:
        u = x.to(tl.float32).to(tl.int32, bitcast=True)
        lower = (u >> 16).to(tl.int16)
        middle = ((u & -65536) | 0x8000).to(tl.float32, bitcast=True).to(tl.float64)
    else:
        u = x.to(tl.float32).to(tl.int32, bitcast=True)
        cut = (u & -8192).to(tl.float32, bitcast=True)
        lower = cut.to(tl.float16).to(tl.int16, bitcast=True)
        middle = ((u & -8192) | 0x1000).to(tl.float32, bitcast=True).to(tl.float64)
    by = x - middle
    known = inside & (tl.abs(by) > eta * (tl.abs(x) + 2 * spread) * 1.0000001192092896)
    above = lower + ((by > 0) == (x > 0)).to(lower.dtype)
    return tl.where(doubtful & known, above, value), doubtful & (known == 0)


@triton.jit
def _deltas(left, right, never, RANK: tl.constexpr, PANEL: tl.constexpr, like):
    """left·right in the precision and the shape of ``like``, from pointers to its first rows and columns."""
    if RANK <= 32:
        total = tl.zeros(like.shape, like.dtype)
        for k in tl.static_range(RANK):
            total += tl.load(left + k)[:, None, None] * tl.load(right + k * PANEL)[None]
    else:
        # Zeros that come from W, as a loop would take constants in a layout in which no thread has neighbours.
        total = tl.where(never, like, 0)
        for k in range(0, RANK, 8):
            for s in tl.static_range(8):
                total += tl.load(left + (k + s))[:, None, None] * tl.load(right + (k + s) * PANEL)[None]
    return total


@triton.jit
def _summed(
    raw, left, right, never, margin, bound,
    IN: tl.constexpr, OUT: tl.constexpr, SINGLE: tl.constexpr, CONVERTS: tl.constexpr, RANK: tl.constexpr,
    PANEL: tl.constexpr,
):  # fmt: skip
    """The delta, W' as raw bits, and which words have an element in doubt."""
    W = _number(raw, IN)
    if SINGLE:
        delta = _deltas(left, right, never, RANK, PANEL, W)
        total = W + delta
        value = _nearest(total, OUT, CONVERTS)
        doubt = _near(total, margin)
    else:
        delta = _deltas(left, right, never, RANK, PANEL, W.to(tl.float64))
        total = W.to(tl.float64) + delta
        value = _nearest(total.to(tl.float32), OUT, CONVERTS)
        some, _ = _screen(total, tl.load(bound), tl.load(bound + 1), OUT)
        doubt = tl.max(some.to(tl.int32), 2) != 0
    return delta, value, doubt


@triton.jit
def _undoing(
    raw, value, delta, margin, bound,
    IN: tl.constexpr, OUT: tl.constexpr, SINGLE: tl.constexpr, CONVERTS: tl.constexpr,
):  # fmt: skip
    """The residual, which words have one that is not zero, and which one that is in doubt or beyond a byte."""
    back = _number(value, OUT).to(delta.dtype) - delta
    predicted = _nearest(back.to(tl.float32), IN, CONVERTS)
    if SINGLE:
        doubt = _near(back, margin)
    else:
        some, _ = _screen(back, tl.load(bound + 2), tl.load(bound + 3), IN)
        doubt = tl.max(some.to(tl.int32), 2) != 0
    apart = _apart(raw, predicted, IN)
    most, least = tl.max(apart, 2), tl.min(apart, 2)
    limit = 127 if IN == F32 else 127 << 16
    return _byte(apart, raw, IN), (most != 0) | (least != 0), doubt | (most > limit) | (least < -limit)


@triton.jit
def _listed(numbers, values, number, value, slot, base, room, here):
    """Words of a tile into a list, at slots of the job's part of it, as far as they are there."""
    here &= slot < room
    slot += base
    lane = tl.arange(0, _LANES)[None, None]
    tl.store(numbers + slot, number, mask=here)
    tl.store(values + slot[:, :, None] * _LANES + lane, value, mask=here[:, :, None])


@triton.jit
def merge(
    table, reals, jobs, todo, counters, doubt_at, doubt_were, undo_at, undo_by,
    IN: tl.constexpr, OUT: tl.constexpr, SINGLE: tl.constexpr, ALIGNED: tl.constexpr,
    CONVERTS: tl.constexpr, RESIDUAL: tl.constexpr, RANK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One tile: W' stored; words with an element in doubt listed, with what W was there; of the other words those
    listed in which a residual is not zero. All of that, or, where a list has no room for it, nothing but the count of
    what it needs."""
    tile = tl.program_id(0)
    if tl.load(todo + tile) != 0:
        job = tl.load(jobs + tile)
        at = table + job.to(tl.int64) * _FIELDS
        # As whole words, since what is done with storage values is done to their bits.
        source = tl.load(at).to(tl.pointer_type(tl.int32 if IN == F32 else tl.int16))
        to = tl.load(at + 1).to(tl.pointer_type(tl.int32 if OUT == F32 else tl.int16))
        left = tl.load(at + 2).to(tl.pointer_type(tl.float32 if SINGLE else tl.float64))
        right = tl.multiple_of(tl.load(at + 4).to(tl.pointer_type(tl.float32 if SINGLE else tl.float64)), 16)
        margin = tl.load(at + 5).to(tl.pointer_type(tl.float32))
        rows, columns = tl.load(at + 6).to(tl.int32), tl.load(at + 7).to(tl.int32)
        step, to_step = tl.load(at + 8), tl.load(at + 9)
        if ALIGNED:
            source, to = tl.multiple_of(source, 16), tl.multiple_of(to, 16)
            columns = tl.multiple_of(columns, 8)
            step, to_step = tl.multiple_of(step, 8), tl.multiple_of(to_step, 8)

        across = tl.cdiv(columns, COLUMNS)
        place = tile - tl.load(at + 10).to(tl.int32)
        i = place // across * ROWS + tl.arange(0, ROWS)
        word = place % across * (COLUMNS // _LANES) + tl.arange(0, COLUMNS // _LANES)
        within = (tl.arange(0, COLUMNS // _LANES) * _LANES)[:, None] + tl.arange(0, _LANES)[None]
        j = word[:, None] * _LANES + tl.arange(0, _LANES)[None]
        inside = (i < rows)[:, None, None] & (j < columns)[None]
        left += i.to(tl.int64) * RANK
        right += place % across * (RANK * COLUMNS) + within
        raw = tl.load(source + (i.to(tl.int64) * step)[:, None, None] + j[None], mask=inside, other=0)
        off = tl.load(margin + i)[:, None] if SINGLE else 0.0
        bound = reals + 4 * job
        delta, value, doubt = _summed(
            raw, left, right, rows < 0, off, bound, IN, OUT, SINGLE, CONVERTS, RANK, COLUMNS
        )
        # A word that reaches beyond the last column is in doubt by what is there, as that has no sum.
        whole = (i < rows)[:, None] & (word * _LANES < columns)[None]
        undone = whole & False
        if RESIDUAL:
            by, undone, some = _undoing(raw, value, delta, off, bound, IN, OUT, SINGLE, CONVERTS)
            doubt |= some
            undone &= whole & (doubt == 0)
        doubt &= whole

        # Both counts in one number, so that one scan and one atomic make room in both lists: a tile has few words.
        both = (doubt.to(tl.int32) << 16) + undone.to(tl.int32)
        by_row = tl.sum(both, 1)
        count = tl.sum(by_row, 0)
        fits = count >= 0
        if count > 0:
            wanted = ((count >> 16).to(tl.int64) << 32) + (count & 0xFFFF)
            taken = tl.atomic_add(counters + job, wanted, sem="relaxed")
            doubts, undos = taken >> 32, taken & 0xFFFFFFFF
            room, undo_room = tl.load(at + 12), tl.load(at + 14)
            fits = (doubts + (count >> 16) <= room) & (undos + (count & 0xFFFF) <= undo_room)
            before = tl.cumsum(both, 1) - both + (tl.cumsum(by_row, 0) - by_row)[:, None]
            # A slot that a tile takes and cannot use holds nothing.
            number = tl.where(fits, i[:, None] * tl.cdiv(columns, _LANES) + word[None], -1)
            _listed(doubt_at, doubt_were, number, raw, doubts + (before >> 16), tl.load(at + 11), room, doubt)
            if RESIDUAL:
                slot = undos + (before & 0xFFFF)
                _listed(undo_at, undo_by, number, by, slot, tl.load(at + 13), undo_room, undone)
        tl.store(to + (i.to(tl.int64) * to_step)[:, None, None] + j[None], value, mask=inside & fits)
        tl.store(todo + tile, (fits == 0).to(tl.int8))


@triton.jit
def settle(
    table, reals, counters, doubt_at, doubt_were, sums, late, state,
    IN: tl.constexpr, OUT: tl.constexpr, SINGLE: tl.constexpr, CONVERTS: tl.constexpr, RESIDUAL: tl.constexpr,
    RANK: tl.constexpr, PANEL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The listed words of one job in float64: W' stored, its ``sums``, and in ``late`` the residual. ``state``: 1
    where W' is open, and 2 more where the residual is, or beyond a byte."""
    job = tl.program_id(0)
    at = table + job.to(tl.int64) * _FIELDS
    to = tl.load(at + 1).to(tl.pointer_type(tl.int32 if OUT == F32 else tl.int16))
    left = tl.load(at + 3).to(tl.pointer_type(tl.float64))
    right = tl.load(at + 4).to(tl.pointer_type(tl.float32 if SINGLE else tl.float64))
    columns, to_step = tl.load(at + 7), tl.load(at + 9)
    base, across = tl.load(at + 11), tl.cdiv(columns, _LANES)
    count = tl.minimum(tl.load(counters + job) >> 32, tl.load(at + 12)).to(tl.int32)
    for start in range(tl.program_id(1) * BLOCK, count, tl.num_programs(1) * BLOCK):
        place = start + tl.arange(0, BLOCK)
        number = tl.load(doubt_at + base + place, mask=place < count, other=-1)
        known = tl.where(number < 0, 0, number).to(tl.int64)
        lane = tl.arange(0, _LANES)[None]
        i, j = (known // across)[:, None], (known % across)[:, None] * _LANES + lane
        here = (number >= 0)[:, None] & (j < columns)
        slot = (base + place)[:, None] * _LANES + lane
        raw = tl.load(doubt_were + slot, mask=here, other=0)
        delta = tl.zeros([BLOCK, _LANES], tl.float64)
        for k in range(RANK):
            r = tl.load(right + j // PANEL * (RANK * PANEL) + k * PANEL + j % PANEL)
            delta += tl.load(left + i * RANK + k) * r.to(tl.float64)
        total = _number(raw, IN).to(tl.float64) + delta
        value, found = _decided(total, tl.load(reals + 4 * job), tl.load(reals + 4 * job + 1), OUT, CONVERTS)
        tl.store(to + i * to_step + j, value, mask=here)
        found &= here
        open_ = found.to(tl.int8)
        if RESIDUAL:
            back = _number(value, OUT).to(tl.float64) - delta
            bound, spread = tl.load(reals + 4 * job + 2), tl.load(reals + 4 * job + 3)
            predicted, unsure = _decided(back, bound, spread, IN, CONVERTS)
            apart = _apart(raw, predicted, IN)
            limit = 127 if IN == F32 else 127 << 16
            unsure = (unsure | found | (apart > limit) | (apart < -limit)) & here
            by = tl.where(here & (unsure == 0), _byte(apart, raw, IN), 0)
            tl.store(late + slot, by, mask=(place < count)[:, None])
            open_ += unsure.to(tl.int8) * 2
        tl.store(sums + slot, total, mask=here)
        tl.store(state + slot, open_, mask=(place < count)[:, None])


COMPILED = isinstance(merge, triton.runtime.JITFunction)
"""Or interpreted, for tests."""
