"""The CPU kernels of boxes, compiled by numba; the area that two outlines share is explained in overlap/reference.py.

They are in one file because numba looks for what it has compiled under the source of a kernel's own file only. They
divide by ``np.divide``: "/" would ask whether it is by 0, to raise what nobody catches.
"""

from __future__ import annotations

import functools
from typing import Any

import numba
import numpy as np

from kernelgraft_core.runtime.native import cpu_kernel, pointer

# As in outlines.py: numba compiles these as constants.
CENTER_X, CENTER_Y, HALF_X, HALF_Y, AREA, CORNER_X, CORNER_Y, ROWS = 0, 1, 2, 3, 4, 5, 9, 13
AREA_OF_OVERLAP, IOU = 0, 1
# Rows of what _shared keeps, four numbers each: corners and edges of the second outline, and what is left of the edges.
BX, BY, EX, EY, U_LOW, U_HIGH = range(6)
WORK = 6, 4
CHUNK = 64  # kept boxes that are looked at together


@numba.njit
def _shared(a: Any, n: int, i: int, b: Any, m: int, j: int, work: Any) -> Any:
    """The area that outline ``i`` of ``n`` shares with outline ``j`` of ``m``; at most that of either."""
    area_a, area_b = a[AREA * n + i], b[AREA * m + j]
    if not (area_a > 0.0 and area_b > 0.0):
        return 0.0
    between_x = b[CENTER_X * m + j] - a[CENTER_X * n + i]
    between_y = b[CENTER_Y * m + j] - a[CENTER_Y * n + i]
    # Relative to the centre of the smaller one, within which all that is shared lies.
    a_shift_x, a_shift_y, b_shift_x, b_shift_y = 0.0, 0.0, between_x, between_y
    if area_a > area_b:
        a_shift_x, a_shift_y, b_shift_x, b_shift_y = -between_x, -between_y, 0.0, 0.0
    for k in range(4):
        work[BX, k] = b[(CORNER_X + k) * m + j] + b_shift_x
        work[BY, k] = b[(CORNER_Y + k) * m + j] + b_shift_y
        work[U_LOW, k] = 0.0
        work[U_HIGH, k] = 1.0
    for k in range(4):
        work[EX, k] = work[BX, (k + 1) & 3] - work[BX, k]
        work[EY, k] = work[BY, (k + 1) & 3] - work[BY, k]
    twice = 0.0
    ax, ay = a[CORNER_X * n + i] + a_shift_x, a[CORNER_Y * n + i] + a_shift_y
    for k in range(4):
        following = (k + 1) & 3
        next_x, next_y = a[(CORNER_X + following) * n + i] + a_shift_x, a[(CORNER_Y + following) * n + i] + a_shift_y
        dx, dy = next_x - ax, next_y - ay
        t_low, t_high = 0.0, 1.0
        for edge in range(4):
            ex, ey, px, py = work[EX, edge], work[EY, edge], ax - work[BX, edge], ay - work[BY, edge]
            beside = ex * py - ey * px
            turn = ex * dy - ey * dx
            with_it = dx * ex + dy * ey
            if turn != 0.0:
                t = np.divide(-beside, turn)
                u = np.divide(px * ex + py * ey + t * with_it, ex * ex + ey * ey)
                if turn > 0.0:
                    t_low = max(t_low, t)
                    work[U_HIGH, edge] = min(work[U_HIGH, edge], u)
                else:
                    t_high = min(t_high, t)
                    work[U_LOW, edge] = max(work[U_LOW, edge], u)
            elif with_it > 0.0:  # parallel: one of the two is inside of the other
                if beside < 0.0:
                    t_high = -1.0
                else:
                    work[U_HIGH, edge] = -1.0
            elif with_it < 0.0 and beside <= 0.0:  # back to back
                t_high = -1.0
                work[U_HIGH, edge] = -1.0
        if t_high > t_low:
            twice += (t_high - t_low) * (ax * dy - ay * dx)
        ax, ay = next_x, next_y
    for edge in range(4):
        left = work[U_HIGH, edge] - work[U_LOW, edge]
        if left > 0.0:
            twice += left * (work[BX, edge] * work[EY, edge] - work[BY, edge] * work[EX, edge])
    shared = 0.5 * twice
    if not shared > 0.0:
        return 0.0
    return min(shared, area_a, area_b)


@numba.njit(inline="always")
def _ratio(shared: float, base: float) -> Any:
    return np.divide(shared, base) if base > 0.0 and base < np.inf else 0.0


# What a launch tells the kernel of overlaps: one int64 array, in this order, after the launch's own number.
(_, A, A_COUNT, B, B_COUNT, MODE, ALIGNED, OUT) = range(8)


@functools.cache
def overlap_kernel(dtype: Any) -> Any:
    """For results of a NumPy dtype; an item is a row of the result, or one number of it where ``ALIGNED``."""

    @cpu_kernel()
    def overlap(start: int, stop: int, args: Any) -> None:
        n, m, mode = args[A_COUNT], args[B_COUNT], args[MODE]
        a = numba.carray(pointer(args[A]), (ROWS * n,), np.float64)
        b = numba.carray(pointer(args[B]), (ROWS * m,), np.float64)
        columns = 1 if args[ALIGNED] else m
        out = numba.carray(pointer(args[OUT]), (n * columns,), dtype)
        work = np.empty(WORK, np.float64)
        near = np.empty(columns, np.bool_)
        for i in range(start, stop):
            first = i if args[ALIGNED] else 0
            x, y, half_x, half_y = a[i], a[n + i], a[2 * n + i], a[3 * n + i]
            row = out[i * columns : (i + 1) * columns]
            # Nearly all pairs are apart: many are told at a time, without a branch.
            to_x, to_y = b[first : first + columns], b[m + first : m + first + columns]
            reach_x = b[2 * m + first : 2 * m + first + columns]
            reach_y = b[3 * m + first : 3 * m + first + columns]
            for column in range(columns):
                near_x = abs(to_x[column] - x) < reach_x[column] + half_x
                near[column] = near_x & (abs(to_y[column] - y) < reach_y[column] + half_y)
                row[column] = dtype(0)
            for column in range(columns):
                if near[column]:
                    j = first + column
                    value = _shared(a, n, i, b, m, j, work)
                    if mode != AREA_OF_OVERLAP:
                        base = a[AREA * n + i]
                        if mode == IOU:
                            base += b[AREA * m + j] - value
                        value = _ratio(value, base)
                    row[column] = dtype(value)

    return overlap


# The same for axis-aligned boxes; A and B are four rows each, OFFSET points at one number.
OFFSET = 8


@functools.cache
def box_kernel(dtype: Any) -> Any:
    """For boxes and results of a NumPy dtype; an item is a row of the result, or one number of it where ``ALIGNED``."""

    @cpu_kernel()
    def box_iou(start: int, stop: int, args: Any) -> None:
        n, m, mode = args[A_COUNT], args[B_COUNT], args[MODE]
        a = numba.carray(pointer(args[A]), (4 * n,), dtype)
        b = numba.carray(pointer(args[B]), (4 * m,), dtype)
        offset = numba.carray(pointer(args[OFFSET]), (1,), dtype)[0]
        columns = 1 if args[ALIGNED] else m
        out = numba.carray(pointer(args[OUT]), (n * columns,), dtype)
        zero, largest = dtype(0), dtype(np.inf)
        for i in range(start, stop):
            first = i if args[ALIGNED] else 0
            x1, y1, x2, y2 = a[i], a[n + i], a[2 * n + i], a[3 * n + i]
            area = (x2 - x1 + offset) * (y2 - y1 + offset)
            left, top = b[first : first + columns], b[m + first : m + first + columns]
            right = b[2 * m + first : 2 * m + first + columns]
            bottom = b[3 * m + first : 3 * m + first + columns]
            row = out[i * columns : (i + 1) * columns]
            for column in range(columns):
                width = min(x2, right[column]) - max(x1, left[column]) + offset
                height = min(y2, bottom[column]) - max(y1, top[column]) + offset
                shared = max(width, zero) * max(height, zero)
                other = (right[column] - left[column] + offset) * (bottom[column] - top[column] + offset)
                base = area + other - shared if mode == IOU else area
                sound = (base > zero) & (base < largest)
                value = np.divide(shared, base)
                row[column] = value if sound else zero

    return box_iou


# What a launch tells the kernels that suppress: one int64 array, in this order, after the launch's own number. Boxes
# come by descending score. LABELS is 0 where all are alike, LIMIT points at the threshold and the offset. WINNER is
# what suppressed each box, or itself.
(_, S_BOXES, S_COUNT, S_LABELS, S_LIMIT, S_WINNER, S_SINGLE) = range(7)


@cpu_kernel()
def suppress_outlines(start: int, stop: int, args: Any) -> None:
    """One task does it all: each box is compared with those that were kept before it, the best first.

    An upper bound of the ratio, that of the boxes around the outlines, spares most of the exact ones.
    """
    n = args[S_COUNT]
    boxes = numba.carray(pointer(args[S_BOXES]), (ROWS * n,), np.float64)
    labelled = args[S_LABELS] != 0
    labels = numba.carray(pointer(args[S_LABELS]), (n,), np.int64)
    limit = numba.carray(pointer(args[S_LIMIT]), (1,), np.float64)[0]
    winner = numba.carray(pointer(args[S_WINNER]), (n,), np.int64)
    single = args[S_SINGLE] != 0
    # Without a bound that is surely enough rounding could hide a pair at the very threshold.
    sure = limit - 1e-6
    work = np.empty(WORK, np.float64)
    kept_row = np.empty(n, np.int64)
    kept = np.zeros((n // CHUNK + 1, 5, CHUNK), np.float64)  # places that are still free are near nothing
    count = 0
    near = np.empty(CHUNK, np.bool_)
    for i in range(n):
        x, y, half_x, half_y, area = boxes[i], boxes[n + i], boxes[2 * n + i], boxes[3 * n + i], boxes[AREA * n + i]
        winner[i] = i
        for chunk in range((count + CHUNK - 1) // CHUNK):
            some = 0
            for k in range(CHUNK):
                its_half_x, its_half_y, its_area = kept[chunk, 2, k], kept[chunk, 3, k], kept[chunk, 4, k]
                width = min(kept[chunk, 0, k] + its_half_x, x + half_x) - max(
                    kept[chunk, 0, k] - its_half_x, x - half_x
                )
                height = min(kept[chunk, 1, k] + its_half_y, y + half_y) - max(
                    kept[chunk, 1, k] - its_half_y, y - half_y
                )
                most = min(max(width, 0.0) * max(height, 0.0), min(its_area, area))
                # NaN is never less: it is left to the exact area, which is 0 then.
                far = most * (1.0 + sure) < sure * (its_area + area)
                near[k] = not far
                some += not far
            if some == 0:
                continue
            for k in range(min(CHUNK, count - chunk * CHUNK)):
                if not near[k]:
                    continue
                row = kept_row[chunk * CHUNK + k]
                if labelled and labels[row] != labels[i]:
                    continue
                value = _shared(boxes, n, row, boxes, n, i, work)
                value = _ratio(value, kept[chunk, 4, k] + area - value)
                if single:
                    value = np.float64(np.float32(value))
                if value > limit:
                    winner[i] = row
                    break
            if winner[i] != i:
                break
        if winner[i] == i:
            kept_row[count] = i
            chunk, k = count // CHUNK, count % CHUNK
            kept[chunk, 0, k], kept[chunk, 1, k], kept[chunk, 4, k] = x, y, area
            kept[chunk, 2, k], kept[chunk, 3, k] = half_x, half_y
            count += 1


@functools.cache
def suppress_kernel(dtype: Any) -> Any:
    """For axis-aligned boxes of a NumPy dtype, ``(4, N)``; the rest as for :func:`suppress_outlines`."""

    @cpu_kernel()
    def suppress_boxes(start: int, stop: int, args: Any) -> None:
        n = args[S_COUNT]
        boxes = numba.carray(pointer(args[S_BOXES]), (4 * n,), dtype)
        labelled = args[S_LABELS] != 0
        labels = numba.carray(pointer(args[S_LABELS]), (n,), np.int64)
        told = numba.carray(pointer(args[S_LIMIT]), (2,), dtype)
        limit, offset, zero = told[0], told[1], dtype(0)
        winner = numba.carray(pointer(args[S_WINNER]), (n,), np.int64)
        kept_row = np.empty(n, np.int64)
        kept = np.zeros((n // CHUNK + 1, 5, CHUNK), dtype)
        count = 0
        over = np.empty(CHUNK, np.bool_)
        for i in range(n):
            x1, y1, x2, y2 = boxes[i], boxes[n + i], boxes[2 * n + i], boxes[3 * n + i]
            area = (x2 - x1 + offset) * (y2 - y1 + offset)
            winner[i] = i
            for chunk in range((count + CHUNK - 1) // CHUNK):
                some = 0
                for k in range(CHUNK):
                    width = min(kept[chunk, 2, k], x2) - max(kept[chunk, 0, k], x1) + offset
                    height = min(kept[chunk, 3, k], y2) - max(kept[chunk, 1, k], y1) + offset
                    shared = max(width, zero) * max(height, zero)
                    base = kept[chunk, 4, k] + area - shared
                    value = np.divide(shared, base)
                    hit = (value if base > zero else zero) > limit
                    over[k] = hit
                    some += hit
                if some == 0:
                    continue
                for k in range(min(CHUNK, count - chunk * CHUNK)):
                    row = kept_row[chunk * CHUNK + k]
                    if over[k] and not (labelled and labels[row] != labels[i]):
                        winner[i] = row
                        break
                if winner[i] != i:
                    break
            if winner[i] == i:
                kept_row[count] = i
                chunk, k = count // CHUNK, count % CHUNK
                kept[chunk, 0, k], kept[chunk, 1, k], kept[chunk, 4, k] = x1, y1, area
                kept[chunk, 2, k], kept[chunk, 3, k] = x2, y2
                count += 1

    return suppress_boxes


# What a launch tells the kernel of soft suppression: one int64 array, in this order. NUMBERS points at the threshold,
# sigma, the least score and the offset. BOXES, five rows, the scores the last, are changed, and ROWS with them.
(_, F_BOXES, F_COUNT, F_NUMBERS, F_METHOD, F_ROWS, F_LEFT) = range(7)
NAIVE, LINEAR = 0, 1


@functools.cache
def soften_kernel(dtype: Any) -> Any:
    """For boxes of a NumPy dtype; one task does it all, and changes places as it goes, which decides between equals."""

    @cpu_kernel()
    def soften(start: int, stop: int, args: Any) -> None:
        n = args[F_COUNT]
        boxes = numba.carray(pointer(args[F_BOXES]), (5, n), dtype)
        numbers = numba.carray(pointer(args[F_NUMBERS]), (4,), dtype)
        rows = numba.carray(pointer(args[F_ROWS]), (n,), np.int64)
        threshold, sigma, least, offset = numbers[0], numbers[1], numbers[2], numbers[3]
        zero, one, method = dtype(0), dtype(1), args[F_METHOD]
        left, at = n, 0
        while at < left:
            best = at
            for k in range(at + 1, left):
                if boxes[4, best] < boxes[4, k]:
                    best = k
            for row in range(5):
                boxes[row, at], boxes[row, best] = boxes[row, best], boxes[row, at]
            rows[at], rows[best] = rows[best], rows[at]
            x1, y1, x2, y2 = boxes[0, at], boxes[1, at], boxes[2, at], boxes[3, at]
            area = (x2 - x1 + offset) * (y2 - y1 + offset)
            k = at + 1
            while k < left:
                width = max(min(x2, boxes[2, k]) - max(x1, boxes[0, k]) + offset, zero)
                height = max(min(y2, boxes[3, k]) - max(y1, boxes[1, k]) + offset, zero)
                shared = width * height
                other = (boxes[2, k] - boxes[0, k] + offset) * (boxes[3, k] - boxes[1, k] + offset)
                base = area + other - shared
                ratio = np.divide(shared, base) if base > zero else zero
                if method == NAIVE:
                    weight = zero if ratio >= threshold else one
                elif method == LINEAR:
                    weight = one - ratio if ratio >= threshold else one
                else:
                    weight = np.exp(np.divide(-(ratio * ratio), sigma))
                boxes[4, k] = boxes[4, k] * weight
                if boxes[4, k] < least:
                    left -= 1
                    for row in range(5):
                        boxes[row, k] = boxes[row, left]
                    rows[k] = rows[left]
                else:
                    k += 1
            at += 1
        numba.carray(pointer(args[F_LEFT]), (1,), np.int64)[0] = left

    return soften
