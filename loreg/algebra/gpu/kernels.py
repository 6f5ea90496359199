"""The kernels of ``loreg.algebra.gpu``, which says what they are for. Imported only where they are to run.

A job is one weight. ``table``: FIELDS int64 for each (groups.py, Job.row); ``reals``: for each the η and S of the
bound of what is rounded, then of what taking back the delta gives (algebra/edits.py, Prepared), and from the fifth on
those of the edit that is taken back.
Elements come in words of LANES neighbours of one row: what one thread loads at once, and what the lists hold.
"""

from __future__ import annotations

import triton
import triton.language as tl

from loreg.algebra.gpu import undo

FIELDS = tl.constexpr(23)
FORWARD, BACKWARD, KEPT = tl.constexpr(12), tl.constexpr(16), tl.constexpr(20)
"""Where in a row of the table an edit, one that is taken back, and what is kept of that begin."""

BF16 = tl.constexpr(0)
F16 = tl.constexpr(1)
F32 = tl.constexpr(2)

_LANES = tl.constexpr(undo.LANES)
_NIBBLE, _CODED, _ELSEWHERE = tl.constexpr(undo.NIBBLE), tl.constexpr(undo.CODED), tl.constexpr(undo.ELSEWHERE)


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
def _steps(apart, one, DTYPE: tl.constexpr):
    """Of values of one sign that are not far apart, by how many they are: algebra/rounding.py, ordered()."""
    steps = tl.where(one < 0, -apart, apart)
    return steps.to(tl.int32) if DTYPE == F32 else steps >> 16


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
    """The residual; which words have one that is not zero, in which one is beyond a nibble, and in which one is in
    doubt or beyond a byte."""
    back = _number(value, OUT).to(delta.dtype) - delta
    predicted = _nearest(back.to(tl.float32), IN, CONVERTS)
    if SINGLE:
        doubt = _near(back, margin)
    else:
        some, _ = _screen(back, tl.load(bound + 2), tl.load(bound + 3), IN)
        doubt = tl.max(some.to(tl.int32), 2) != 0
    apart = _apart(raw, predicted, IN)
    size = tl.maximum(tl.max(apart, 2), -tl.min(apart, 2))
    one: tl.constexpr = 1 if IN == F32 else 65536
    return _steps(apart, raw, IN), size != 0, size > _NIBBLE * one, doubt | (size > 127 * one)


@triton.jit
def _misses(at, place, ROWS: tl.constexpr, WORDS: tl.constexpr):
    """Of a tile that was edited before, what taking that back misses (``undo.Undo``): its integers, and which words
    have theirs elsewhere."""
    entries = tl.load(at + KEPT).to(tl.pointer_type(tl.int32))
    starts = tl.load(at + KEPT + 1).to(tl.pointer_type(tl.int32))
    marks = tl.load(at + KEPT + 2).to(tl.pointer_type(tl.int16))
    mark = tl.load(marks + place * ROWS + tl.arange(0, ROWS)).to(tl.int32)
    here = (mark[:, None] >> tl.arange(0, WORDS)[None]) & 1
    by_row = tl.sum(here, 1)
    entries += tl.load(starts + place)
    slot = tl.cumsum(here, 1) - here + (tl.cumsum(by_row, 0) - by_row)[:, None]
    entry = tl.load(entries + slot, mask=here != 0, other=0)
    coded = entry < _CODED
    offset = entry - _ELSEWHERE
    lane = tl.arange(0, _LANES)[None, None]
    bytes_ = entries.to(tl.pointer_type(tl.int8)) + (offset * 4)[:, :, None] + lane
    far = tl.load(bytes_, mask=(coded & (offset != 0))[:, :, None], other=0)
    near = (tl.where(coded, 0, entry)[:, :, None] << (28 - 4 * lane)) >> 28
    return near + far.to(tl.int32), coded & (offset == 0)


@triton.jit
def _moved(raw, by, DTYPE: tl.constexpr):
    """The storage value that is ``by`` values away, and of the same sign."""
    sign = raw.to(tl.int32) >> 31
    return (raw.to(tl.int32) + (by ^ sign) - sign).to(raw.dtype)


@triton.jit
def _words(address, DTYPE: tl.constexpr):
    """Storage values as whole words, since what is done with them is done to their bits."""
    return address.to(tl.pointer_type(tl.int32 if DTYPE == F32 else tl.int16))


@triton.jit
def _edit(at, rows, panel, within, SINGLE: tl.constexpr, RANK: tl.constexpr, PANEL: tl.constexpr):
    """Pointers to some rows of an edit's left and to a panel of its right, and the margins of those rows."""
    left = tl.load(at).to(tl.pointer_type(tl.float32 if SINGLE else tl.float64))
    right = tl.multiple_of(tl.load(at + 2).to(tl.pointer_type(tl.float32 if SINGLE else tl.float64)), 16)
    margin = tl.load(tl.load(at + 3).to(tl.pointer_type(tl.float32)) + rows)[:, None] if SINGLE else 0.0
    return left + rows.to(tl.int64) * RANK, right + panel * (RANK * PANEL) + within, margin


@triton.jit
def change(
    table, reals, jobs, todo, counters, starts, marks, entries,
    doubt_at, doubt_was, doubt_base, doubt_by, doubt_left, doubt_entry,
    IN: tl.constexpr, OUT: tl.constexpr, SINGLE: tl.constexpr, ALIGNED: tl.constexpr, CONVERTS: tl.constexpr,
    BACK: tl.constexpr, FORTH: tl.constexpr, RESIDUAL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One tile: what was edited of rank BACK taken back, if that is not 0, and of what is then there the edit of rank
    FORTH stored, if that is not 0. Words with an element in doubt are listed, those that could not be taken back
    being left as they are; of the others the residual is kept where it is not zero. All of that, or, where a list has
    no room for it, nothing but the count of what it needs."""
    tile = tl.program_id(0)
    if tl.load(todo + tile) != 0:
        WORDS: tl.constexpr = COLUMNS // _LANES
        job = tl.load(jobs + tile)
        at = table + job.to(tl.int64) * FIELDS
        # As whole words, since what is done with storage values is done to their bits.
        source = tl.load(at).to(tl.pointer_type(tl.int32 if IN == F32 else tl.int16))
        to = tl.load(at + 1).to(tl.pointer_type(tl.int32 if OUT == F32 else tl.int16))
        rows, columns = tl.load(at + 2).to(tl.int32), tl.load(at + 3).to(tl.int32)
        step, to_step = tl.load(at + 4), tl.load(at + 5)
        if ALIGNED:
            source, to = tl.multiple_of(source, 16), tl.multiple_of(to, 16)
            columns = tl.multiple_of(columns, 8)
            step, to_step = tl.multiple_of(step, 8), tl.multiple_of(to_step, 8)

        across = tl.cdiv(columns, COLUMNS)
        place = tile - tl.load(at + 6).to(tl.int32)
        i, panel = place // across * ROWS + tl.arange(0, ROWS), place % across
        word = panel * WORDS + tl.arange(0, WORDS)
        within = (tl.arange(0, WORDS) * _LANES)[:, None] + tl.arange(0, _LANES)[None]
        j = word[:, None] * _LANES + tl.arange(0, _LANES)[None]
        inside = (i < rows)[:, None, None] & (j < columns)[None]
        # A word that reaches beyond the last column is in doubt by what is there, as that has no sum.
        whole = (i < rows)[:, None] & (word * _LANES < columns)[None]
        was = tl.load(source + (i.to(tl.int64) * step)[:, None, None] + j[None], mask=inside, other=0)
        bound = reals + 8 * job
        base, doubt, left = was, whole & False, whole & False
        if BACK:
            L, R, margin = _edit(at + BACKWARD, i, panel, within, SINGLE, BACK, COLUMNS)
            _, predicted, left = _summed(
                was, L, R, rows < 0, margin, bound + 4, IN, IN, SINGLE, CONVERTS, BACK, COLUMNS
            )
            missed, elsewhere = _misses(at, place, ROWS, WORDS)
            base = _moved(predicted, missed, IN)
            left = (left | elsewhere) & whole
            doubt = left
            value = base
        far, undone = whole & False, whole & False
        if FORTH:
            L, R, margin = _edit(at + FORWARD, i, panel, within, SINGLE, FORTH, COLUMNS)
            delta, value, open_ = _summed(
                base, L, R, rows < 0, margin, bound, IN, OUT, SINGLE, CONVERTS, FORTH, COLUMNS
            )
            doubt |= open_ & whole
            if RESIDUAL:
                by, undone, far, open_ = _undoing(base, value, delta, margin, bound, IN, OUT, SINGLE, CONVERTS)
                doubt |= open_ & whole
                undone = (undone & whole) | doubt
                far &= undone & (doubt == 0)
        if BACK:
            value = tl.where(left[:, :, None], was, value)

        # All counts in one number, so that one scan and one atomic make room in both lists: a tile has few words.
        both = (doubt.to(tl.int32) << 20) + (far.to(tl.int32) << 10) + undone.to(tl.int32)
        by_row = tl.sum(both, 1)
        count = tl.sum(by_row, 0)
        fits = count >= 0
        if count > 0:
            doubts, used = count >> 20, count & 1023
            entries_ = used + 2 * ((count >> 10) & 1023)
            taken = tl.atomic_add(counters + job, (doubts.to(tl.int64) << 32) + entries_, sem="relaxed")
            first_doubt, first = taken >> 32, taken & 0xFFFFFFFF
            room = tl.load(at + 8)
            fits = (first_doubt + doubts <= room) & (first + entries_ <= tl.load(at + 10))
            before = tl.cumsum(both, 1) - both + (tl.cumsum(by_row, 0) - by_row)[:, None]
            lane = tl.arange(0, _LANES)[None, None]
            slot = before >> 20
            listed = doubt & (slot < room - first_doubt)
            first_doubt += tl.load(at + 7)
            # A slot that a tile takes and cannot use holds nothing.
            number = tl.where(fits, i[:, None] * tl.cdiv(columns, _LANES) + word[None], -1)
            tl.store(doubt_at + first_doubt + slot, number, mask=listed)
            lanes, all_ = slot[:, :, None] * _LANES + lane, listed[:, :, None]
            tl.store(doubt_was + first_doubt * _LANES + lanes, was, mask=all_)
            if BACK:
                tl.store(doubt_base + first_doubt * _LANES + lanes, base, mask=all_)
                tl.store(doubt_by + first_doubt * _LANES + lanes, missed.to(tl.int8), mask=all_)
                tl.store(doubt_left + first_doubt + slot, left.to(tl.int8) + elsewhere.to(tl.int8), mask=listed)
            if RESIDUAL:
                kept, offset = before & 1023, used + 2 * ((before >> 10) & 1023)
                entry = tl.sum((by & 15) << (4 * lane), 2)
                entry = tl.where(far, _ELSEWHERE + offset, tl.where(doubt, _ELSEWHERE, entry))
                here = entries + tl.load(at + 9) + first
                tl.store(here + kept, entry, mask=undone & fits)
                bytes_ = here.to(tl.pointer_type(tl.int8)) + 4 * offset[:, :, None] + lane
                tl.store(bytes_, by.to(tl.int8), mask=(far & fits)[:, :, None])
                first = (first + tl.load(at + 11)).to(tl.int32)
                tl.store(doubt_entry + first_doubt + slot, first + kept, mask=listed)
                tl.store(starts + tile, first, mask=fits)
                mark = tl.sum(undone.to(tl.int32) << tl.arange(0, WORDS)[None], 1)
                tl.store(marks + tile * ROWS + tl.arange(0, ROWS), mark.to(tl.int16), mask=fits)
        tl.store(to + (i.to(tl.int64) * to_step)[:, None, None] + j[None], value, mask=inside & fits)
        tl.store(todo + tile, (fits == 0).to(tl.int8))


@triton.jit
def _listed(table, jobs, numbers, place, known, DTYPE: tl.constexpr, WHERE: tl.constexpr):
    """Of listed words: their jobs, rows and columns, pointers to their elements, and which of these there are."""
    number = tl.load(numbers + place, mask=known, other=0).to(tl.int64)
    job = tl.load(jobs + place, mask=known, other=0)
    at = table + job.to(tl.int64) * FIELDS
    columns, step = tl.load(at + 3), tl.load(at + (4 if WHERE == 0 else 5))
    across = tl.cdiv(columns, _LANES)
    i = (number // across)[:, None]
    j = (number % across)[:, None] * _LANES + tl.arange(0, _LANES)[None]
    to = _words(tl.load(at + WHERE), DTYPE)[:, None] + i * step[:, None] + j
    return job, at, i, j, to, known[:, None] & (j < columns[:, None])


@triton.jit
def settle(
    table, reals, jobs, numbers, left, given, values, sums, late, state, count,
    IN: tl.constexpr, OUT: tl.constexpr, SINGLE: tl.constexpr, CONVERTS: tl.constexpr, RANK: tl.constexpr,
    BACK: tl.constexpr, RESIDUAL: tl.constexpr, PANEL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Listed words in float64: of what is ``given`` there the ``values`` after one edit and their ``sums``, and in
    ``late`` the residual. ``state``: 1 where a value is open, and 2 more where the residual is, or beyond a byte.
    ``BACK``: those that are ``left``, by the edit that is taken back."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    known = place < count
    if BACK:
        known &= tl.load(left + place, mask=known, other=0) != 0
    job, at, i, j, _, here = _listed(table, jobs, numbers, place, known, OUT, 1)
    edit, bound = at + (BACKWARD if BACK else FORWARD), reals + (8 * job + (4 if BACK else 0))[:, None]
    L = tl.load(edit + 1).to(tl.pointer_type(tl.float64))[:, None] + i * RANK
    R = tl.load(edit + 2).to(tl.pointer_type(tl.float32 if SINGLE else tl.float64))[:, None]
    R += j // PANEL * (RANK * PANEL) + j % PANEL
    slot = place[:, None] * _LANES + tl.arange(0, _LANES)[None]
    raw = tl.load(given + slot, mask=here, other=0)
    delta = tl.zeros([BLOCK, _LANES], tl.float64)
    for k in range(RANK):
        delta += tl.load(L + k, mask=here, other=0) * tl.load(R + k * PANEL, mask=here, other=0).to(tl.float64)
    total = _number(raw, IN).to(tl.float64) + delta
    value, found = _decided(total, tl.load(bound), tl.load(bound + 1), OUT, CONVERTS)
    found &= here
    open_ = found.to(tl.int8)
    if RESIDUAL:
        back = _number(value, OUT).to(tl.float64) - delta
        predicted, unsure = _decided(back, tl.load(bound + 2), tl.load(bound + 3), IN, CONVERTS)
        apart = _apart(raw, predicted, IN)
        limit = 127 if IN == F32 else 127 << 16
        unsure = (unsure | found | (apart > limit) | (apart < -limit)) & here
        by = tl.where(here & (unsure == 0), _steps(apart, raw, IN), 0)
        tl.store(late + slot, by.to(tl.int8), mask=known[:, None])
        open_ += unsure.to(tl.int8) * 2
    tl.store(values + slot, value, mask=here)
    tl.store(sums + slot, total, mask=here)
    tl.store(state + slot, open_, mask=(place < count)[:, None])


@triton.jit
def put(table, jobs, numbers, values, count, OUT: tl.constexpr, BLOCK: tl.constexpr):
    """Listed words where they belong."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    _, _, _, _, to, here = _listed(table, jobs, numbers, place, place < count, OUT, 1)
    tl.store(to, tl.load(values + place[:, None] * _LANES + tl.arange(0, _LANES)[None], mask=here), mask=here)


COMPILED = isinstance(change, triton.runtime.JITFunction)
"""Or interpreted, for tests."""
