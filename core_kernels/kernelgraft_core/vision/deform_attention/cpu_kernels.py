"""The compiled loops of deformable attention; what their arguments mean is in ``cpu.py``."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from kernelgraft_core.runtime.native import cpu_kernel, pointer

QUERIES, HEADS, LEVELS, POINTS, CHANNELS, KEYS, SIZES, VALUE, LOCATIONS, WEIGHTS = range(10)
OUT = 10  # forward
GRAD, BY_VALUE, BY_LOCATIONS, BY_WEIGHTS = range(10, 14)  # backward


@numba.njit(inline="always")
def _floats(args: Any, at: Any, address: Any) -> Any:
    """The float32 values from ``at`` on of an argument."""
    return numba.carray(pointer(args[address] + 4 * at), (1 << 40,), np.float32)


@numba.njit(inline="always")
def _there(row: Any, column: Any, height: Any, width: Any) -> Any:
    return row >= 0 and row < height and column >= 0 and column < width


@cpu_kernel(fastmath={"contract"})
def forward(start: Any, stop: Any, args: Any) -> None:
    """Items: queries of all images."""
    queries, heads, levels = args[QUERIES], args[HEADS], args[LEVELS]
    points, channels, keys = args[POINTS], args[CHANNELS], args[KEYS]
    sizes = numba.carray(pointer(args[SIZES]), (levels, 3), np.int64)
    step = heads * channels
    one, half, zero = np.float32(1), np.float32(0.5), np.float32(0)
    for item in range(start, stop):
        image = item // queries
        for head in range(heads):
            out = _floats(args, item * step + head * channels, OUT)
            for c in range(channels):
                out[c] = zero
            for level in range(levels):
                height, width, first = sizes[level, 0], sizes[level, 1], sizes[level, 2]
                base = (image * keys + first) * step + head * channels
                sample = ((item * heads + head) * levels + level) * points
                locations = _floats(args, 2 * sample, LOCATIONS)
                weights = _floats(args, sample, WEIGHTS)
                for point in range(points):
                    x = locations[2 * point] * np.float32(width) - half
                    y = locations[2 * point + 1] * np.float32(height) - half
                    if not (y > -one and x > -one and y < np.float32(height) and x < np.float32(width)):
                        continue
                    row, column = np.int64(np.floor(y)), np.int64(np.floor(x))
                    down, across = y - np.float32(row), x - np.float32(column)
                    weight = weights[point]
                    w1 = weight * (one - down) * (one - across)
                    w2 = weight * (one - down) * across
                    w3 = weight * down * (one - across)
                    w4 = weight * down * across
                    # A corner outside weighs nothing, and reads one that is inside.
                    if row < 0:
                        w1, w2 = zero, zero
                    if row >= height - 1:
                        w3, w4 = zero, zero
                    if column < 0:
                        w1, w3 = zero, zero
                    if column >= width - 1:
                        w2, w4 = zero, zero
                    top, bottom = max(row, 0) * width, min(row + 1, height - 1) * width
                    left, right = max(column, 0), min(column + 1, width - 1)
                    v1 = _floats(args, base + (top + left) * step, VALUE)
                    v2 = _floats(args, base + (top + right) * step, VALUE)
                    v3 = _floats(args, base + (bottom + left) * step, VALUE)
                    v4 = _floats(args, base + (bottom + right) * step, VALUE)
                    for c in range(channels):
                        out[c] += w1 * v1[c] + w2 * v2[c] + w3 * v3[c] + w4 * v4[c]


@cpu_kernel(fastmath={"contract", "reassoc"})
def backward(start: Any, stop: Any, args: Any) -> None:
    """Items: heads of levels of images."""
    queries, heads, levels = args[QUERIES], args[HEADS], args[LEVELS]
    points, channels, keys = args[POINTS], args[CHANNELS], args[KEYS]
    sizes = numba.carray(pointer(args[SIZES]), (levels, 3), np.int64)
    step = heads * channels
    one, half, zero = np.float32(1), np.float32(0.5), np.float32(0)
    for item in range(start, stop):
        head = item % heads
        level = item // heads % levels
        image = item // (heads * levels)
        height, width, first = sizes[level, 0], sizes[level, 1], sizes[level, 2]
        base = (image * keys + first) * step + head * channels
        for query in range(image * queries, (image + 1) * queries):
            grad = _floats(args, query * step + head * channels, GRAD)
            sample = ((query * heads + head) * levels + level) * points
            locations = _floats(args, 2 * sample, LOCATIONS)
            weights = _floats(args, sample, WEIGHTS)
            by_locations = _floats(args, 2 * sample, BY_LOCATIONS)
            by_weights = _floats(args, sample, BY_WEIGHTS)
            for point in range(points):
                x = locations[2 * point] * np.float32(width) - half
                y = locations[2 * point + 1] * np.float32(height) - half
                if not (y > -one and x > -one and y < np.float32(height) and x < np.float32(width)):
                    by_locations[2 * point] = zero
                    by_locations[2 * point + 1] = zero
                    by_weights[point] = zero
                    continue
                row, column = np.int64(np.floor(y)), np.int64(np.floor(x))
                down, across = y - np.float32(row), x - np.float32(column)
                up, back = one - down, one - across
                weight = weights[point]
                # What each corner's value is multiplied with: nothing outside.
                s1 = s2 = s3 = s4 = zero
                for corner in range(4):
                    r, k = row + corner // 2, column + corner % 2
                    if not _there(r, k, height, width):
                        continue
                    share = (down if corner >= 2 else up) * (across if corner % 2 else back) * weight
                    at = base + (r * width + k) * step
                    value, by_value = _floats(args, at, VALUE), _floats(args, at, BY_VALUE)
                    dot = zero
                    for c in range(channels):
                        dot += grad[c] * value[c]
                    for c in range(channels):
                        by_value[c] += share * grad[c]
                    if corner == 0:
                        s1 = dot
                    elif corner == 1:
                        s2 = dot
                    elif corner == 2:
                        s3 = dot
                    else:
                        s4 = dot
                by_weights[point] = up * (back * s1 + across * s2) + down * (back * s3 + across * s4)
                by_locations[2 * point] = weight * np.float32(width) * (up * (s2 - s1) + down * (s4 - s3))
                by_locations[2 * point + 1] = weight * np.float32(height) * (back * (s3 - s1) + across * (s4 - s2))
