"""The GPU kernels of overlaps and of suppression; the area that two outlines share is explained in
overlap/reference.py.

Areas are computed in float64, as on a CPU, so that the same boxes are kept there and here. Few pairs come near each
other, and a block without such a pair is passed over.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _cut(px, py, dx, dy, qx, qy, ex, ey, t_low, t_high, u_low, u_high):
    """Where an edge of one outline crosses an edge of the other: it cuts both."""
    away_x, away_y = px - qx, py - qy
    beside = ex * away_y - ey * away_x
    turn = ex * dy - ey * dx
    with_it = dx * ex + dy * ey
    crosses = turn != 0.0
    t = -beside / tl.where(crosses, turn, 1.0)
    u = (away_x * ex + away_y * ey + t * with_it) / tl.where(crosses, ex * ex + ey * ey, 1.0)
    enters, leaves = turn > 0.0, turn < 0.0
    t_low = tl.where(enters & (t > t_low), t, t_low)
    u_high = tl.where(enters & (u < u_high), u, u_high)
    t_high = tl.where(leaves & (t < t_high), t, t_high)
    u_low = tl.where(leaves & (u > u_low), u, u_low)
    # Parallel edges: one of the two is inside of the other, or, back to back, neither.
    same = (turn == 0.0) & (with_it > 0.0)
    apart = (turn == 0.0) & (with_it < 0.0) & (beside <= 0.0)
    t_high = tl.where((same & (beside < 0.0)) | apart, -1.0, t_high)
    u_high = tl.where((same & (beside >= 0.0)) | apart, -1.0, u_high)
    return t_low, t_high, u_low, u_high


@triton.jit
def _edge(x, y, dx, dy, low, high):
    return tl.where(high > low, (high - low) * (x * dy - y * dx), 0.0)


@triton.jit
def _shared(a, a_count, i, b, b_count, j, inside):
    """The area that outlines ``i`` share with outlines ``j``, which broadcast; ``inside``: those that are there.

    Corners are loaded where they are needed: registers are what limits this kernel.
    """
    area_a, area_b = tl.load(a + 4 * a_count + i, inside, 0.0), tl.load(b + 4 * b_count + j, inside, 0.0)
    between_x = tl.load(b + j, inside, 0.0) - tl.load(a + i, inside, 0.0)
    between_y = tl.load(b + b_count + j, inside, 0.0) - tl.load(a + a_count + i, inside, 0.0)
    # Relative to the centre of the smaller one, within which all that is shared lies.
    smaller = area_a <= area_b
    a_x, a_y = tl.where(smaller, 0.0, -between_x), tl.where(smaller, 0.0, -between_y)
    b_x, b_y = tl.where(smaller, between_x, 0.0), tl.where(smaller, between_y, 0.0)
    q0x, q0y = tl.load(b + 5 * b_count + j, inside, 0.0) + b_x, tl.load(b + 9 * b_count + j, inside, 0.0) + b_y
    q1x, q1y = tl.load(b + 6 * b_count + j, inside, 0.0) + b_x, tl.load(b + 10 * b_count + j, inside, 0.0) + b_y
    q2x, q2y = tl.load(b + 7 * b_count + j, inside, 0.0) + b_x, tl.load(b + 11 * b_count + j, inside, 0.0) + b_y
    q3x, q3y = tl.load(b + 8 * b_count + j, inside, 0.0) + b_x, tl.load(b + 12 * b_count + j, inside, 0.0) + b_y
    e0x, e0y, e1x, e1y = q1x - q0x, q1y - q0y, q2x - q1x, q2y - q1y
    e2x, e2y, e3x, e3y = q3x - q2x, q3y - q2y, q0x - q3x, q0y - q3y
    zero = tl.zeros_like(between_x + q0x)
    low0, low1, low2, low3 = zero, zero, zero, zero
    high0, high1, high2, high3 = zero + 1.0, zero + 1.0, zero + 1.0, zero + 1.0
    twice = zero
    px, py = tl.load(a + 5 * a_count + i, inside, 0.0) + a_x, tl.load(a + 9 * a_count + i, inside, 0.0) + a_y
    for k in range(4):
        following = (k + 1) % 4
        next_x = tl.load(a + (5 + following) * a_count + i, inside, 0.0) + a_x
        next_y = tl.load(a + (9 + following) * a_count + i, inside, 0.0) + a_y
        dx, dy = next_x - px, next_y - py
        low, high = zero, zero + 1.0
        low, high, low0, high0 = _cut(px, py, dx, dy, q0x, q0y, e0x, e0y, low, high, low0, high0)
        low, high, low1, high1 = _cut(px, py, dx, dy, q1x, q1y, e1x, e1y, low, high, low1, high1)
        low, high, low2, high2 = _cut(px, py, dx, dy, q2x, q2y, e2x, e2y, low, high, low2, high2)
        low, high, low3, high3 = _cut(px, py, dx, dy, q3x, q3y, e3x, e3y, low, high, low3, high3)
        twice += _edge(px, py, dx, dy, low, high)
        px, py = next_x, next_y
    twice += _edge(q0x, q0y, e0x, e0y, low0, high0)
    twice += _edge(q1x, q1y, e1x, e1y, low1, high1)
    twice += _edge(q2x, q2y, e2x, e2y, low2, high2)
    twice += _edge(q3x, q3y, e3x, e3y, low3, high3)
    shared = 0.5 * twice
    least = tl.where(smaller, area_a, area_b)
    sound = (area_a > 0.0) & (area_b > 0.0) & (shared > 0.0)
    return tl.where(sound, tl.where(shared < least, shared, least), 0.0), area_a, area_b


@triton.jit
def _ratio(shared, base):
    sound = (base > 0.0) & (base < float("inf"))
    return tl.where(sound, shared / tl.where(sound, base, 1.0), 0.0)


@triton.jit
def _near(a, a_count, i, b, b_count, j, inside):
    x = tl.abs(tl.load(a + i, inside, 0.0) - tl.load(b + j, inside, 0.0))
    y = tl.abs(tl.load(a + a_count + i, inside, 0.0) - tl.load(b + b_count + j, inside, 0.0))
    reach_x = tl.load(a + 2 * a_count + i, inside, 0.0) + tl.load(b + 2 * b_count + j, inside, 0.0)
    reach_y = tl.load(a + 3 * a_count + i, inside, 0.0) + tl.load(b + 3 * b_count + j, inside, 0.0)
    return inside & (x < reach_x) & (y < reach_y)


@triton.jit
def _place(out, b_count, column, ALIGNED: tl.constexpr):
    if ALIGNED:
        return out + column
    else:
        return out + tl.program_id(0).to(tl.int64) * b_count + column


@triton.jit
def overlap_kernel(
    a, b, out, a_count, b_count, MODE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """One box of ``a`` with ``BLOCK`` boxes of ``b``, or as many pairs; outlines are float64 ``(13, N)``."""
    column = tl.program_id(0 if ALIGNED else 1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < b_count
    first = column if ALIGNED else tl.program_id(0) + tl.zeros_like(column)
    near = _near(a, a_count, first, b, b_count, column, inside)
    value = tl.zeros((BLOCK,), tl.float64)
    if tl.max(near.to(tl.int32), 0) > 0:
        value, area_a, area_b = _shared(a, a_count, first, b, b_count, column, near)
        if MODE == 1:
            value = _ratio(value, area_a + area_b - value)
        elif MODE == 2:
            value = _ratio(value, area_a)
    tl.store(_place(out, b_count, column, ALIGNED), value.to(out.dtype.element_ty), inside)


@triton.jit
def divide(shared, base):
    """Rounded to nearest, as on a CPU: Triton's own division of float32 is not."""
    if shared.dtype == tl.float32:
        return tl.div_rn(shared, base)
    else:
        return shared / base


@triton.jit
def _box_ratio(a, a_count, i, b, b_count, j, inside, offset, MODE: tl.constexpr):
    """Of axis-aligned boxes ``(4, N)``; launched without fused multiply-add, so that it rounds as a CPU does."""
    ax1, ay1 = tl.load(a + i, inside, 0.0), tl.load(a + a_count + i, inside, 0.0)
    ax2, ay2 = tl.load(a + 2 * a_count + i, inside, 0.0), tl.load(a + 3 * a_count + i, inside, 0.0)
    bx1, by1 = tl.load(b + j, inside, 0.0), tl.load(b + b_count + j, inside, 0.0)
    bx2, by2 = tl.load(b + 2 * b_count + j, inside, 0.0), tl.load(b + 3 * b_count + j, inside, 0.0)
    width = tl.minimum(ax2, bx2) - tl.maximum(ax1, bx1) + offset
    height = tl.minimum(ay2, by2) - tl.maximum(ay1, by1) + offset
    shared = tl.maximum(width, 0.0) * tl.maximum(height, 0.0)
    base = (ax2 - ax1 + offset) * (ay2 - ay1 + offset)
    if MODE == 1:
        base = base + (bx2 - bx1 + offset) * (by2 - by1 + offset) - shared
    sound = (base > 0.0) & (base < float("inf"))
    return tl.where(sound, divide(shared, tl.where(sound, base, 1.0)), 0.0)


@triton.jit
def box_kernel(
    a, b, out, numbers, a_count, b_count, MODE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The same for axis-aligned boxes ``(4, N)``; ``numbers``: the offset."""
    column = tl.program_id(0 if ALIGNED else 1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < b_count
    first = column if ALIGNED else tl.program_id(0) + tl.zeros_like(column)
    value = _box_ratio(a, a_count, first, b, b_count, column, inside, tl.load(numbers), MODE)
    tl.store(_place(out, b_count, column, ALIGNED), value.to(out.dtype.element_ty), inside)


@triton.jit
def outline_mask_kernel(
    outlines, labels, limit, mask, count, words, SINGLE: tl.constexpr, LABELLED: tl.constexpr
):  # fmt: skip
    """Bit ``c`` of word ``w`` of a row: whether that box drops box ``64 w + c``, should it be kept itself."""
    first, second = tl.program_id(1), tl.program_id(0)
    if second < first:
        return
    row = first * 64 + tl.arange(0, 64)
    least, nothing = tl.load(limit), tl.zeros((64,), tl.float64)
    word = tl.zeros((64,), tl.int64)
    last = tl.minimum(64, count - second * 64)
    for bit in range(last):
        column = second * 64 + bit
        wanted = (row < column) & (row < count)
        if LABELLED:
            wanted = wanted & (tl.load(labels + row, wanted, 0) == tl.load(labels + column))
        columns = column + tl.zeros_like(row)
        hit = wanted & (nothing > least)  # below 0 boxes that share nothing are above it as well
        near = _near(outlines, count, row, outlines, count, columns, wanted)
        if tl.max(near.to(tl.int32), 0) > 0:
            shared, area, other = _shared(outlines, count, row, outlines, count, columns, near)
            ratio = _ratio(shared, area + other - shared)
            if SINGLE:
                ratio = ratio.to(tl.float32).to(tl.float64)
            hit = hit | (near & (ratio > least))
        word = word | (hit.to(tl.int64) << bit)
    tl.store(mask + row * words + second, word)


@triton.jit
def box_mask_kernel(boxes, labels, numbers, mask, count, words, LABELLED: tl.constexpr):
    """The same for axis-aligned boxes ``(4, N)``; ``numbers``: the threshold and the offset."""
    first, second = tl.program_id(1), tl.program_id(0)
    if second < first:
        return
    row = first * 64 + tl.arange(0, 64)
    limit, offset = tl.load(numbers), tl.load(numbers + 1)
    word = tl.zeros((64,), tl.int64)
    last = tl.minimum(64, count - second * 64)
    for bit in range(last):
        column = second * 64 + bit
        wanted = (row < column) & (row < count)
        ratio = _box_ratio(boxes, count, row, boxes, count, column + tl.zeros_like(row), wanted, offset, 1)
        hit = wanted & (ratio > limit)
        if LABELLED:
            hit = hit & (tl.load(labels + row, wanted, 0) == tl.load(labels + column))
        word = word | (hit.to(tl.int64) << bit)
    tl.store(mask + row * words + second, word)


@triton.jit
def keep_kernel(mask, keep, count, words, WORDS: tl.constexpr, GROUP: tl.constexpr):
    """One program goes through the boxes by descending score; ``dropped`` holds the fate of all.

    The fates of 64 boxes are settled one after another from their own words, whose loads do not wait for each other;
    then what those that are kept drop among the later ones is gathered, several rows at a time. ``mask`` has whole
    blocks of rows.
    """
    lane, place = tl.arange(0, WORDS), tl.arange(0, 64)
    dropped = tl.zeros((WORDS,), tl.int64)
    for block in range(words):
        fate = tl.sum(tl.where(lane == block, dropped, 0), 0)
        first = block * 64
        for bit in tl.static_range(64):
            own = tl.load(mask + (first + bit) * words + block)
            fate = fate | tl.where(((fate >> bit) & 1) == 0, own, 0)
        tl.store(keep + first + place, (((fate >> place) & 1) == 0).to(tl.int8), first + place < count)
        later, fates = (lane > block) & (lane < words), fate + tl.zeros((WORDS,), tl.int64)
        for group in range(0, 64, GROUP):
            for step in tl.static_range(GROUP):
                row = first + group + step
                wanted = later & (((fates >> (group + step)) & 1) == 0)
                dropped = dropped | tl.load(mask + row * words + lane, wanted, 0)
