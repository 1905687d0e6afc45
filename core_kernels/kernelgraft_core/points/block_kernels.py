"""The CPU kernels that sort points along a space-filling curve, compiled by numba."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from kernelgraft_core.runtime.native import cpu_kernel, pointer

AXIS_BITS = 10
KEY_BITS = 3 * AXIS_BITS

# What a launch tells the kernels: one int64 array, in this order.
(TASK, POINTS, ROWS, STARTS, CLOUDS, KEYS) = range(6)
(RANK, BLOCK_STARTS, BLOCKS, ORDER, PLACES, BOXES, BLOCK) = range(5, 12)


@numba.njit(inline="always")
def _spread(number: Any) -> Any:
    """The bits of a number of ten, with room for those of two others in between."""
    number = (number | (number << 16)) & 0x030000FF
    number = (number | (number << 8)) & 0x0300F00F
    number = (number | (number << 4)) & 0x030C30C3
    return (number | (number << 2)) & 0x09249249


@cpu_kernel()
def curve_keys(start: int, stop: int, args: Any) -> None:
    """Places along a Morton curve of the points of clouds ``start`` to ``stop``, above their cloud's number."""
    points = numba.carray(pointer(args[POINTS]), (args[ROWS], 3), np.float32)
    starts = numba.carray(pointer(args[STARTS]), (args[CLOUDS] + 1,), np.int64)
    keys = numba.carray(pointer(args[KEYS]), (args[ROWS],), np.int64)
    limit = np.float32((1 << AXIS_BITS) - 1)
    for cloud in range(start, stop):
        low, high = np.full(3, np.inf, np.float32), np.full(3, -np.inf, np.float32)
        for i in range(starts[cloud], starts[cloud + 1]):
            for axis in range(3):
                x = points[i, axis]
                if np.abs(x) < np.float32(np.inf):  # neither does NaN widen it
                    low[axis] = min(low[axis], x)
                    high[axis] = max(high[axis], x)
        # Cells are cubes: blocks shall be as compact as they can.
        extent = max(high[0] - low[0], max(high[1] - low[1], high[2] - low[2]))
        scale = np.float32(0)
        if extent > 0 and extent < np.inf:
            scale = limit / extent
        for i in range(starts[cloud], starts[cloud + 1]):
            key = np.int64(cloud) << KEY_BITS
            for axis in range(3):
                cell = (points[i, axis] - low[axis]) * scale
                # Anything that is no number of a cell, NaN above all, is in the first or the last.
                if cell >= limit:
                    cell = limit
                if not cell > 0:
                    cell = np.float32(0)
                key |= _spread(np.int64(cell)) << axis
            keys[i] = key


@cpu_kernel()
def make_blocks(start: int, stop: int, args: Any) -> None:
    """Points of clouds ``start`` to ``stop`` in their order, and the boxes of their blocks."""
    rows, blocks, size = args[ROWS], args[BLOCKS], args[BLOCK]
    points = numba.carray(pointer(args[POINTS]), (rows, 3), np.float32)
    starts = numba.carray(pointer(args[STARTS]), (args[CLOUDS] + 1,), np.int64)
    rank = numba.carray(pointer(args[RANK]), (rows,), np.int64)
    block_starts = numba.carray(pointer(args[BLOCK_STARTS]), (args[CLOUDS] + 1,), np.int64)
    order = numba.carray(pointer(args[ORDER]), (rows,), np.int32)
    places = numba.carray(pointer(args[PLACES]), (3, rows), np.float32)
    boxes = numba.carray(pointer(args[BOXES]), (6, blocks), np.float32)
    for cloud in range(start, stop):
        first, last = starts[cloud], starts[cloud + 1]
        for block in range(block_starts[cloud], block_starts[cloud + 1]):
            begin = first + (block - block_starts[cloud]) * size
            end = min(begin + size, last)
            for axis in range(3):
                low, high = np.float32(np.inf), np.float32(-np.inf)
                for i in range(begin, end):
                    x = points[rank[i], axis]
                    places[axis, i] = x
                    if x < low:
                        low = x
                    if x > high:
                        high = x
                boxes[axis, block] = low
                boxes[3 + axis, block] = high
            for i in range(begin, end):
                order[i] = np.int32(rank[i] - first)
