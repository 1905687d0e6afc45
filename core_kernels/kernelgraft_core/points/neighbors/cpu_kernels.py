"""The CPU kernels that look for neighbours, compiled by numba."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from kernelgraft_core.runtime.native import cpu_kernel, pointer

# What a launch tells the kernels: one int64 array, in this order. Points are those of PointBlocks.
(TASK, STARTS, BLOCK_STARTS, CLOUDS, POINTS, ORDER, PLACES, BLOCKS, BOXES, BLOCK, CENTERS, ROWS, CENTER_STARTS, WIDTH,
 FOUND) = range(15)  # fmt: skip
SQUARES = 15  # of the nearest
BOUNDS, VALUES = 15, 16  # of what is within: low and high, and the points in their own order


@numba.njit(inline="always")
def _cloud_of(center_starts: Any, center: int) -> int:
    """The last cloud that begins no later, which is the one that has the center: empty ones come before it."""
    low, high = 0, center_starts.size - 1
    while high - low > 1:
        middle = (low + high) // 2
        if center_starts[middle] <= center:
            low = middle
        else:
            high = middle
    return low


@numba.njit(inline="always")
def _least_distances(boxes: Any, first: int, last: int, x: Any, y: Any, z: Any, least: Any) -> None:
    """Squared distances from a center to boxes, 0 inside; NaN is as near as can be, and finds nothing later."""
    zero = np.float32(0)
    for block in range(last - first):
        at = first + block
        dx, dy, dz = boxes[0, at] - x, boxes[1, at] - y, boxes[2, at] - z
        ex, ey, ez = x - boxes[3, at], y - boxes[4, at], z - boxes[5, at]
        dx = ex if ex > dx else dx
        dy = ey if ey > dy else dy
        dz = ez if ez > dz else dz
        dx = dx if dx > zero else zero
        dy = dy if dy > zero else zero
        dz = dz if dz > zero else zero
        least[block] = (dx * dx + dy * dy) + dz * dz


@cpu_kernel()
def nearest(start: int, stop: int, args: Any) -> None:
    """The WIDTH nearest points of centers ``start`` to ``stop``."""
    clouds, points, blocks, size, width = args[CLOUDS], args[POINTS], args[BLOCKS], args[BLOCK], args[WIDTH]
    starts = numba.carray(pointer(args[STARTS]), (clouds + 1,), np.int64)
    block_starts = numba.carray(pointer(args[BLOCK_STARTS]), (clouds + 1,), np.int64)
    order = numba.carray(pointer(args[ORDER]), (points,), np.int32)
    places = numba.carray(pointer(args[PLACES]), (3, points), np.float32)
    boxes = numba.carray(pointer(args[BOXES]), (6, blocks), np.float32)
    centers = numba.carray(pointer(args[CENTERS]), (args[ROWS], 3), np.float32)
    center_starts = numba.carray(pointer(args[CENTER_STARTS]), (clouds + 1,), np.int64)
    found = numba.carray(pointer(args[FOUND]), (args[ROWS], width), np.int32)
    squares = numba.carray(pointer(args[SQUARES]), (args[ROWS], width), np.float32)
    xs, ys, zs = places[0], places[1], places[2]
    least, away = np.empty(blocks, np.float32), np.empty(size, np.float32)
    for center in range(start, stop):
        x, y, z = centers[center, 0], centers[center, 1], centers[center, 2]
        rows, best = found[center], squares[center]
        for k in range(width):
            rows[k] = np.int32(-1)
            best[k] = np.float32(np.inf)
        cloud = _cloud_of(center_starts, center)
        first_block, last_block = block_starts[cloud], block_starts[cloud + 1]
        count = last_block - first_block
        _least_distances(boxes, first_block, last_block, x, y, z, least)
        # The nearest block first: what it holds tells which others are too far.
        leader = 0
        for block in range(1, count):
            if least[block] < least[leader]:
                leader = block
        for turn in range(count):
            block = leader if turn == 0 else (turn if turn > leader else turn - 1)
            if least[block] > best[width - 1]:
                continue
            begin = starts[cloud] + block * size
            members = min(size, starts[cloud + 1] - begin)
            for i in range(members):
                dx, dy, dz = x - xs[begin + i], y - ys[begin + i], z - zs[begin + i]
                away[i] = (dx * dx + dy * dy) + dz * dz
            for i in range(members):
                if away[i] <= best[width - 1] and away[i] < np.float32(np.inf):
                    row = order[begin + i]
                    if away[i] == best[width - 1] and row > rows[width - 1]:
                        continue
                    k = width - 1
                    while k > 0 and (away[i] < best[k - 1] or (away[i] == best[k - 1] and row < rows[k - 1])):
                        best[k] = best[k - 1]
                        rows[k] = rows[k - 1]
                        k -= 1
                    best[k] = away[i]
                    rows[k] = row


@cpu_kernel()
def within(start: int, stop: int, args: Any) -> None:
    """The first WIDTH points within the bounds of centers ``start`` to ``stop``."""
    clouds, points, blocks, size, width = args[CLOUDS], args[POINTS], args[BLOCKS], args[BLOCK], args[WIDTH]
    starts = numba.carray(pointer(args[STARTS]), (clouds + 1,), np.int64)
    block_starts = numba.carray(pointer(args[BLOCK_STARTS]), (clouds + 1,), np.int64)
    order = numba.carray(pointer(args[ORDER]), (points,), np.int32)
    places = numba.carray(pointer(args[PLACES]), (3, points), np.float32)
    boxes = numba.carray(pointer(args[BOXES]), (6, blocks), np.float32)
    centers = numba.carray(pointer(args[CENTERS]), (args[ROWS], 3), np.float32)
    center_starts = numba.carray(pointer(args[CENTER_STARTS]), (clouds + 1,), np.int64)
    found = numba.carray(pointer(args[FOUND]), (args[ROWS], width), np.int32)
    bounds = numba.carray(pointer(args[BOUNDS]), (2,), np.float32)
    values = numba.carray(pointer(args[VALUES]), (points, 3), np.float32)
    low, high = bounds[0], bounds[1]
    xs, ys, zs = places[0], places[1], places[2]
    least, away = np.empty(blocks, np.float32), np.empty(size, np.float32)
    marks = np.zeros((points >> 6) + 1, np.uint64)  # a bit for each point that is within
    one = np.uint64(1)
    for center in range(start, stop):
        x, y, z = centers[center, 0], centers[center, 1], centers[center, 2]
        rows = found[center]
        cloud = _cloud_of(center_starts, center)
        first, last = starts[cloud], starts[cloud + 1]
        count = block_starts[cloud + 1] - block_starts[cloud]
        _least_distances(boxes, block_starts[cloud], block_starts[cloud + 1], x, y, z, least)
        near = np.int64(0)
        for block in range(count):
            near += size if least[block] < high or least[block] == 0 else 0
        taken = 0
        if near * near > (last - first) * width:
            # Many are within: the first ones come soon, in the points' own order.
            for i in range(first, last):
                dx, dy, dz = x - values[i, 0], y - values[i, 1], z - values[i, 2]
                square = (dx * dx + dy * dy) + dz * dz
                if square == 0 or (square >= low and square < high):
                    rows[taken] = np.int32(i - first)
                    taken += 1
                    if taken == width:
                        break
        else:
            lowest, highest = np.int64(len(marks)), np.int64(-1)
            for block in range(count):
                if not (least[block] < high or least[block] == 0):
                    continue
                begin = first + block * size
                members = min(size, last - begin)
                for i in range(members):
                    dx, dy, dz = x - xs[begin + i], y - ys[begin + i], z - zs[begin + i]
                    away[i] = (dx * dx + dy * dy) + dz * dz
                for i in range(members):
                    if away[i] == 0 or (away[i] >= low and away[i] < high):
                        row = np.int64(order[begin + i])
                        marks[row >> 6] |= one << np.uint64(row & 63)
                        lowest, highest = min(lowest, row >> 6), max(highest, row >> 6)
            for word in range(lowest, highest + 1):
                bits = marks[word]
                marks[word] = np.uint64(0)
                bit = 0
                while bits and taken < width:
                    if bits & one:
                        rows[taken] = np.int32((word << 6) + bit)
                        taken += 1
                    bits >>= one
                    bit += 1
        for k in range(taken, width):
            rows[k] = rows[0] if taken else np.int32(-1)
