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
from loreg.algebra.gpu.arithmetic import (
    F32,
    as_float,
    decided,
    distance,
    in_steps,
    lift,
    moved_by,
    near_midpoint,
    rounded,
    screened,
    stored,
)

FIELDS = tl.constexpr(23)
FORWARD, BACKWARD, KEPT = tl.constexpr(12), tl.constexpr(16), tl.constexpr(20)
"""Where in a row of the table an edit, one that is taken back, and what is kept of that begin."""

_LANES = tl.constexpr(undo.LANES)
_NIBBLE, _CODED, _ELSEWHERE = tl.constexpr(undo.NIBBLE), tl.constexpr(undo.CODED), tl.constexpr(undo.ELSEWHERE)


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
    base, edit, rows, panel, within, never, bound, high,
    IN: tl.constexpr, OUT: tl.constexpr, SINGLE: tl.constexpr, CONVERTS: tl.constexpr, RANK: tl.constexpr,
    PANEL: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """The delta; what it is added to, or ``BACK`` taken from, lifted, and which words of that have an element in
    doubt; and the margins of the rows."""
    left = tl.load(edit).to(tl.pointer_type(tl.float32 if SINGLE else tl.float64)) + rows.to(tl.int64) * RANK
    right = tl.multiple_of(tl.load(edit + 2).to(tl.pointer_type(tl.float32 if SINGLE else tl.float64)), 16)
    right += panel * (RANK * PANEL) + within
    margin = tl.load(tl.load(edit + 3).to(tl.pointer_type(tl.float32)) + rows)[:, None] if SINGLE else 0.0
    W = as_float(base, IN)
    if SINGLE:
        delta = _deltas(left, right, never, RANK, PANEL, W)
        total = W - delta if BACK else W + delta
        value = rounded(total, OUT, CONVERTS)
        doubt = near_midpoint(total, margin, high)
    else:
        delta = _deltas(left, right, never, RANK, PANEL, W.to(tl.float64))
        total = W.to(tl.float64) - delta if BACK else W.to(tl.float64) + delta
        value = rounded(total.to(tl.float32), OUT, CONVERTS)
        some, _ = screened(total, tl.load(bound), tl.load(bound + 1), OUT)
        doubt = tl.max(some.to(tl.int32), 2) != 0
    return delta, value, doubt, margin


@triton.jit
def _undoing(
    base, value, delta, margin, bound, high,
    IN: tl.constexpr, OUT: tl.constexpr, SINGLE: tl.constexpr, CONVERTS: tl.constexpr,
):  # fmt: skip
    """The residual; which words have one that is not zero, in which one is beyond a nibble, and in which one is in
    doubt or beyond a byte."""
    back = as_float(value, OUT).to(delta.dtype) - delta
    predicted = rounded(back.to(tl.float32), IN, CONVERTS)
    if SINGLE:
        doubt = near_midpoint(back, margin, high)
    else:
        some, _ = screened(back, tl.load(bound + 2), tl.load(bound + 3), IN)
        doubt = tl.max(some.to(tl.int32), 2) != 0
    apart = distance(base, predicted, IN)
    # Each on its own: the least has no negative if it is the prediction of another sign.
    most, least = tl.max(apart, 2), tl.min(apart, 2)
    one: tl.constexpr = 1 if IN == F32 else 65536
    far, beyond = (most > _NIBBLE * one) | (least < -_NIBBLE * one), (most > 127 * one) | (least < -127 * one)
    return in_steps(apart, base, IN), (most != 0) | (least != 0), far, doubt | beyond


@triton.jit
def _misses(at, place, ROWS: tl.constexpr, WORDS: tl.constexpr):
    """Of a tile that was edited before, what taking that back misses (``undo.Undo``), and for each word the integers
    that say so."""
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
    far = coded & (offset != 0)
    low = tl.load(entries + offset, mask=far, other=0)
    high = tl.load(entries + offset + 1, mask=far, other=0)
    lane = tl.arange(0, _LANES)[None, None]
    four = tl.where(lane < 4, low[:, :, None], high[:, :, None])
    near = (tl.where(coded, 0, entry)[:, :, None] << (28 - 4 * lane)) >> 28
    return near + ((four << (24 - 8 * (lane & 3))) >> 24), entry, low, high


@triton.jit
def _keep(entries, slot, offset, by, undone, far, doubt):
    """The integers of a tile, the first of which is to be at ``entries``."""
    lane = tl.arange(0, _LANES)[None, None]
    entry = tl.sum((by & 15) << (4 * lane), 2)
    tl.store(entries + slot, tl.where(doubt, _ELSEWHERE, tl.where(far, _ELSEWHERE + offset, entry)), mask=undone)
    bytes_ = (by & 255) << (8 * (lane & 3))
    tl.store(entries + offset, tl.sum(tl.where(lane < 4, bytes_, 0), 2), mask=far)
    tl.store(entries + offset + 1, tl.sum(tl.where(lane < 4, 0, bytes_), 2), mask=far)


@triton.jit
def _words(address, DTYPE: tl.constexpr):
    """Storage values as whole words, since what is done with them is done to their bits."""
    return address.to(tl.pointer_type(tl.int32 if DTYPE == F32 else tl.int16))


@triton.jit
def _changed(
    at, was, i, panel, place, within, whole, never, bound,
    IN: tl.constexpr, OUT: tl.constexpr, SINGLE: tl.constexpr, CONVERTS: tl.constexpr, BACK: tl.constexpr,
    FORTH: tl.constexpr, RESIDUAL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Of a tile what it is to be, lifted, and which words are in doubt; the integers that say what taking each back
    misses; the residual, which words have one, and which one beyond a nibble."""
    high, none = tl.where(never, 0, -65536), whole & False
    base, value, by, doubt, undone, far = was, was, was, none, none, none
    entry, first, second = none.to(tl.int32), none.to(tl.int32), none.to(tl.int32)
    if BACK:
        _, predicted, open_, _ = _summed(
            was,
            at + BACKWARD,
            i,
            panel,
            within,
            never,
            bound + 4,
            high,
            IN,
            IN,
            SINGLE,
            CONVERTS,
            BACK,
            COLUMNS,
            True,
        )
        missed, entry, first, second = _misses(at, place, ROWS, COLUMNS // _LANES)
        base = moved_by(predicted, missed, high, IN)
        value, doubt = base, (open_ | (entry == _ELSEWHERE)) & whole
    if FORTH:
        delta, value, open_, margin = _summed(
            base, at + FORWARD, i, panel, within, never, bound, high,
            IN, OUT, SINGLE, CONVERTS, FORTH, COLUMNS, False,
        )  # fmt: skip
        doubt |= open_ & whole
        if RESIDUAL:
            by, undone, far, open_ = _undoing(base, value, delta, margin, bound, high, IN, OUT, SINGLE, CONVERTS)
            doubt |= open_ & whole
            undone = (undone & whole) | doubt
            far &= undone & (doubt == 0)
    return value, doubt, entry, first, second, by, undone, far


@triton.jit
def change(
    table, reals, jobs, todo, counters, starts, marks, entries,
    doubt_at, doubt_was, doubt_missed, doubt_entry,
    IN: tl.constexpr, OUT: tl.constexpr, SINGLE: tl.constexpr, ALIGNED: tl.constexpr, CONVERTS: tl.constexpr,
    BACK: tl.constexpr, FORTH: tl.constexpr, RESIDUAL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One tile: what was edited of rank BACK taken back, if that is not 0, and of what is then there the edit of rank
    FORTH stored, if that is not 0. Words with an element in doubt are listed with what W was, and left as they are if
    something is to be taken back; of the others the residual is kept where it is not zero. All of that, or, where a
    list has no room for it, nothing but the count of what it needs."""
    tile = tl.program_id(0)
    if tl.load(todo + tile) != 0:
        WORDS: tl.constexpr = COLUMNS // _LANES
        job = tl.load(jobs + tile)
        at = table + job.to(tl.int64) * FIELDS
        source = tl.load(at).to(tl.pointer_type(tl.int32 if IN == F32 else tl.int16))
        to = tl.load(at + 1).to(tl.pointer_type(tl.int32 if OUT == F32 else tl.int16))
        rows, columns = tl.load(at + 2).to(tl.int32), tl.load(at + 3).to(tl.int32)
        step, to_step = tl.load(at + 4), tl.load(at + 5)
        if ALIGNED:
            source, to = tl.multiple_of(source, 16), tl.multiple_of(to, 16)
            columns = tl.multiple_of(columns, 8)
            step, to_step = tl.multiple_of(step, 8), tl.multiple_of(to_step, 8)
        place, across = tile - tl.load(at + 6).to(tl.int32), tl.cdiv(columns, COLUMNS)
        i, panel = place // across * ROWS + tl.arange(0, ROWS), place % across
        word = panel * WORDS + tl.arange(0, WORDS)
        within = (tl.arange(0, WORDS) * _LANES)[:, None] + tl.arange(0, _LANES)[None]
        j = word[:, None] * _LANES + tl.arange(0, _LANES)[None]
        inside = (i < rows)[:, None, None] & (j < columns)[None]
        # A word that reaches beyond the last column is in doubt by what is there, as that has no sum.
        whole = (i < rows)[:, None] & (word * _LANES < columns)[None]
        was = lift(tl.load(source + (i.to(tl.int64) * step)[:, None, None] + j[None], mask=inside, other=0), IN)
        value, doubt, entry, low, high, by, undone, far = _changed(
            at, was, i, panel, place, within, whole, rows < 0, reals + 8 * job,
            IN, OUT, SINGLE, CONVERTS, BACK, FORTH, RESIDUAL, ROWS, COLUMNS,
        )  # fmt: skip

        # All counts in one number, so that one scan and one atomic make room in both lists: a tile has few words.
        both = (doubt.to(tl.int32) << 20) + (far.to(tl.int32) << 10) + undone.to(tl.int32)
        by_row = tl.sum(both, 1)
        count = tl.sum(by_row, 0)
        fits = count >= 0
        if count > 0:
            doubts, used = count >> 20, count & 1023
            all_used = used + 2 * ((count >> 10) & 1023)
            taken = tl.atomic_add(counters + job, (doubts.to(tl.int64) << 32) + all_used, sem="relaxed")
            first_doubt, first = taken >> 32, taken & 0xFFFFFFFF
            room = tl.load(at + 8)
            fits = (first_doubt + doubts <= room) & (first + all_used <= tl.load(at + 10))
            before = tl.cumsum(both, 1) - both + (tl.cumsum(by_row, 0) - by_row)[:, None]
            slot = before >> 20
            listed = doubt & (slot < room - first_doubt)
            first_doubt += tl.load(at + 7)
            # A slot that a tile takes and cannot use holds nothing.
            number = tl.where(fits, i[:, None] * tl.cdiv(columns, _LANES) + word[None], -1)
            tl.store(doubt_at + first_doubt + slot, number, mask=listed)
            lanes = slot[:, :, None] * _LANES + tl.arange(0, _LANES)[None, None]
            tl.store(doubt_was + first_doubt * _LANES + lanes, stored(was, IN), mask=listed[:, :, None])
            if BACK:
                misses = doubt_missed + first_doubt * 3 + slot * 3
                tl.store(misses, entry, mask=listed)
                tl.store(misses + 1, low, mask=listed)
                tl.store(misses + 2, high, mask=listed)
            if RESIDUAL:
                kept, offset = before & 1023, used + 2 * ((before >> 10) & 1023)
                _keep(entries + tl.load(at + 9) + first, kept, offset, by, undone & fits, far & fits, doubt)
                first = (first + tl.load(at + 11)).to(tl.int32)
                tl.store(doubt_entry + first_doubt + slot, first + kept, mask=listed)
                tl.store(starts + tile, first, mask=fits)
                mark = tl.sum(undone.to(tl.int32) << tl.arange(0, WORDS)[None], 1)
                tl.store(marks + tile * ROWS + tl.arange(0, ROWS), mark.to(tl.int16), mask=fits)
        if BACK:
            inside &= (doubt == 0)[:, :, None]
        tl.store(to + (i.to(tl.int64) * to_step)[:, None, None] + j[None], stored(value, OUT), mask=inside & fits)
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


@triton.jit(do_not_specialize=["count"])
def settle(
    table, reals, jobs, numbers, given, values, sums, late, state, count,
    IN: tl.constexpr, OUT: tl.constexpr, SINGLE: tl.constexpr, CONVERTS: tl.constexpr, RANK: tl.constexpr,
    BACK: tl.constexpr, RESIDUAL: tl.constexpr, PANEL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Listed words in float64: of what is ``given`` there the ``values`` after one edit and their ``sums``, and in
    ``late`` the residual. ``state``: 1 where a value is open, and 2 more where the residual is, or beyond a byte.
    ``BACK``: by the edit that is taken back."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    known = place < count
    job, at, i, j, _, here = _listed(table, jobs, numbers, place, known, OUT, 1)
    edit, bound = at + (BACKWARD if BACK else FORWARD), reals + (8 * job + (4 if BACK else 0))[:, None]
    L = tl.load(edit + 1).to(tl.pointer_type(tl.float64))[:, None] + i * RANK
    R = tl.load(edit + 2).to(tl.pointer_type(tl.float32 if SINGLE else tl.float64))[:, None]
    R += j // PANEL * (RANK * PANEL) + j % PANEL
    slot = place[:, None] * _LANES + tl.arange(0, _LANES)[None]
    base = lift(tl.load(given + slot, mask=here, other=0), IN)
    delta = tl.zeros([BLOCK, _LANES], tl.float64)
    for k in range(RANK):
        delta += tl.load(L + k, mask=here, other=0) * tl.load(R + k * PANEL, mask=here, other=0).to(tl.float64)
    W = as_float(base, IN).to(tl.float64)
    total = W - delta if BACK else W + delta
    value, found = decided(total, tl.load(bound), tl.load(bound + 1), OUT, CONVERTS)
    found &= here
    open_ = found.to(tl.int8)
    if RESIDUAL:
        back = as_float(value, OUT).to(tl.float64) - delta
        predicted, unsure = decided(back, tl.load(bound + 2), tl.load(bound + 3), IN, CONVERTS)
        apart = distance(base, predicted, IN)
        limit = 127 if IN == F32 else 127 << 16
        unsure = (unsure | found | (apart > limit) | (apart < -limit)) & here
        by = tl.where(here & (unsure == 0), in_steps(apart, base, IN), 0)
        tl.store(late + slot, by.to(tl.int8), mask=known[:, None])
        open_ += unsure.to(tl.int8) * 2
    tl.store(values + slot, stored(value, OUT), mask=here)
    tl.store(sums + slot, total, mask=here)
    tl.store(state + slot, open_, mask=(place < count)[:, None])


@triton.jit(do_not_specialize=["count"])
def put(table, jobs, numbers, values, count, OUT: tl.constexpr, BLOCK: tl.constexpr):
    """Listed words where they belong."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    _, _, _, _, to, here = _listed(table, jobs, numbers, place, place < count, OUT, 1)
    tl.store(to, tl.load(values + place[:, None] * _LANES + tl.arange(0, _LANES)[None], mask=here), mask=here)


COMPILED = isinstance(change, triton.runtime.JITFunction)
"""Or interpreted, for tests."""
