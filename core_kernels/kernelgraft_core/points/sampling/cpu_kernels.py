"""The CPU kernels of furthest point sampling, compiled by numba.

Squared distances are compared as integers: of numbers that are not negative the bits are in the same order, and LLVM
finds the largest of integers many at a time, which of floats it may not.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from kernelgraft_core.runtime.native import cpu_kernel, pointer

# What a launch tells the kernels: one int64 array, in this order.
(TASK, VALUES, NEAREST, CLOUDS, POINTS, FOUND, SAMPLES, BLOCK_STARTS, BLOCKS, ORDER, PLACES, BOXES,
 BLOCK) = range(13)  # fmt: skip


@cpu_kernel()
def sample_places(start: int, stop: int, args: Any) -> None:
    """Samples of clouds ``start`` to ``stop``."""
    clouds, points, samples = args[CLOUDS], args[POINTS], args[SAMPLES]
    blocks, size = args[BLOCKS], args[BLOCK]
    values = numba.carray(pointer(args[VALUES]), (clouds, points, 3), np.float32)
    nearest = numba.carray(pointer(args[NEAREST]), (clouds, points), np.float32)
    found = numba.carray(pointer(args[FOUND]), (clouds, samples), np.int32)
    block_starts = numba.carray(pointer(args[BLOCK_STARTS]), (clouds + 1,), np.int64)
    order = numba.carray(pointer(args[ORDER]), (clouds, points), np.int32)
    places = numba.carray(pointer(args[PLACES]), (3, clouds, points), np.float32)
    boxes = numba.carray(pointer(args[BOXES]), (6, blocks), np.float32)
    zero = np.float32(0)
    near = np.empty(points, np.float32)
    for cloud in range(start, stop):
        xs, ys, zs, rows = places[0, cloud], places[1, cloud], places[2, cloud], order[cloud]
        first, count = block_starts[cloud], block_starts[cloud + 1] - block_starts[cloud]
        low_x, low_y, low_z = boxes[0, first:], boxes[1, first:], boxes[2, first:]
        high_x, high_y, high_z = boxes[3, first:], boxes[4, first:], boxes[5, first:]
        # Of each block: the least distance that it may have to the new sample, its furthest point and how far that is.
        least, furthest = np.empty(count, np.float32), np.empty(count, np.float32)
        leaders = np.empty(count, np.int32)
        for i in range(points):
            near[i] = nearest[cloud, rows[i]]
        bits, furthest_bits = near.view(np.int32), furthest.view(np.int32)
        chosen = np.int32(0)
        for sample in range(1, samples):
            x, y, z = values[cloud, chosen, 0], values[cloud, chosen, 1], values[cloud, chosen, 2]
            for block in range(count):
                dx, dy, dz = low_x[block] - x, low_y[block] - y, low_z[block] - z
                ex, ey, ez = x - high_x[block], y - high_y[block], z - high_z[block]
                dx = ex if ex > dx else dx
                dy = ey if ey > dy else dy
                dz = ez if ez > dz else dz
                dx = dx if dx > zero else zero
                dy = dy if dy > zero else zero
                dz = dz if dz > zero else zero
                least[block] = (dx * dx + dy * dy) + dz * dz
            for block in range(count):
                if sample > 1 and least[block] >= furthest[block]:
                    continue
                begin, end = block * size, min(block * size + size, points)
                for i in range(begin, end):
                    dx, dy, dz = xs[i] - x, ys[i] - y, zs[i] - z
                    away = (dx * dx + dy * dy) + dz * dz
                    near[i] = away if away < near[i] else near[i]
                largest, leader = bits[begin], np.int32(0x7FFFFFFF)
                for i in range(begin, end):
                    largest = max(largest, bits[i])
                for i in range(begin, end):
                    leader = min(leader, rows[i] if bits[i] == largest else np.int32(0x7FFFFFFF))
                furthest_bits[block] = largest
                leaders[block] = leader
            largest, chosen = furthest_bits[0], np.int32(0x7FFFFFFF)
            for block in range(count):
                largest = max(largest, furthest_bits[block])
            for block in range(count):
                chosen = min(chosen, leaders[block] if furthest_bits[block] == largest else np.int32(0x7FFFFFFF))
            found[cloud, sample] = chosen
        for i in range(points):
            nearest[cloud, rows[i]] = near[i]


@cpu_kernel()
def sample_by_distance(start: int, stop: int, args: Any) -> None:
    """Samples of clouds ``start`` to ``stop`` whose distances are known."""
    clouds, points, samples = args[CLOUDS], args[POINTS], args[SAMPLES]
    distances = numba.carray(pointer(args[VALUES]), (clouds, points, points), np.float32)
    nearest = numba.carray(pointer(args[NEAREST]), (clouds, points), np.float32)
    nearest_bits = numba.carray(pointer(args[NEAREST]), (clouds, points), np.int32)
    found = numba.carray(pointer(args[FOUND]), (clouds, samples), np.int32)
    for cloud in range(start, stop):
        near, bits = nearest[cloud], nearest_bits[cloud]
        chosen = 0
        for sample in range(1, samples):
            row = distances[cloud, chosen]
            for i in range(points):
                near[i] = row[i] if row[i] < near[i] else near[i]
            largest = bits[0]
            for i in range(points):
                largest = max(largest, bits[i])
            chosen = 0
            while bits[chosen] != largest:
                chosen += 1
            found[cloud, sample] = np.int32(chosen)
