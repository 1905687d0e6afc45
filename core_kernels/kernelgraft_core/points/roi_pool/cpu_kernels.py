"""The CPU kernels that pool points in boxes, compiled by numba."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from kernelgraft_core.runtime.native import cpu_kernel, pointer

# What a launch tells both kernels: one int64 array, in this order.
(TASK, ROIS, COUNT, COSINE, SINE, POINTS, ROWS) = range(7)
(FEATS, CHANNELS, CELLS_X, CELLS_Y, CELLS_Z, MAX_POINTS, MAXIMUM, POOLED, SOURCE, MEMBERS) = range(7, 17)
(CLOUDS, SAMPLES, FOUND) = range(7, 10)


@numba.njit(inline="always")
def _place(offset: Any, extent: Any, cells: Any) -> Any:
    """The cell of an offset from a box's lower bound; anything that is no number of a cell is in the first."""
    size = extent / np.float32(cells)
    if not size > 0:  # numba raises where it divides by 0
        return 0
    cell = offset / size
    if cell >= np.float32(cells - 1):
        return cells - 1
    return np.int64(cell) if cell > 0 else 0


@cpu_kernel()
def pool_cells(start: int, stop: int, args: Any) -> None:
    """Boxes ``start`` to ``stop``."""
    count, rows, channels, most = args[COUNT], args[ROWS], args[CHANNELS], args[MAX_POINTS]
    nx, ny, nz = args[CELLS_X], args[CELLS_Y], args[CELLS_Z]
    cells = nx * ny * nz
    rois = numba.carray(pointer(args[ROIS]), (count, 7), np.float32)
    cosines = numba.carray(pointer(args[COSINE]), (count,), np.float32)
    sines = numba.carray(pointer(args[SINE]), (count,), np.float32)
    points = numba.carray(pointer(args[POINTS]), (rows, 3), np.float32)
    feats = numba.carray(pointer(args[FEATS]), (rows, channels), np.float32)
    pooled = numba.carray(pointer(args[POOLED]), (count, cells, channels), np.float32)
    sources = numba.carray(pointer(args[SOURCE]), (count, cells, channels), np.int32)
    members = numba.carray(pointer(args[MEMBERS]), (count, cells, most), np.int32)
    half = np.float32(0.5)
    # How many points each cell has: MEMBERS, of which most is empty, is touched only where there are some.
    counts = np.zeros(cells, np.int32)
    for roi in range(start, stop):
        cx, cy, bottom = rois[roi, 0], rois[roi, 1], rois[roi, 2]
        dx, dy, dz = rois[roi, 3], rois[roi, 4], rois[roi, 5]
        cosine, sine, middle = cosines[roi], sines[roi], bottom + dz * half
        hx, hy, hz = dx * half, dy * half, dz * half
        for i in range(rows):
            if not np.abs(points[i, 2] - middle) <= hz:
                continue
            ax, ay = points[i, 0] - cx, points[i, 1] - cy
            x, y = ax * cosine - ay * sine, ax * sine + ay * cosine
            if x > -hx and x < hx and y > -hy and y < hy:
                cell = (_place(x + hx, dx, nx) * ny + _place(y + hy, dy, ny)) * nz + _place(
                    points[i, 2] - bottom, dz, nz
                )
                held = counts[cell]
                if held < most - 1:
                    members[roi, cell, held + 1] = np.int32(i)
                    counts[cell] = held + 1
        for cell in range(cells):
            held = counts[cell]
            if held > 0:
                members[roi, cell, 0] = held
                counts[cell] = 0
            if args[MAXIMUM]:
                for c in range(channels):
                    sources[roi, cell, c] = np.int32(-1)
            for slot in range(1, held + 1):
                row = members[roi, cell, slot]
                if args[MAXIMUM]:
                    for c in range(channels):
                        value = feats[row, c]
                        if value > pooled[roi, cell, c] or (sources[roi, cell, c] < 0 and value > -np.inf):
                            pooled[roi, cell, c] = value
                            sources[roi, cell, c] = row
                else:
                    for c in range(channels):
                        pooled[roi, cell, c] += feats[row, c]
            if held > 0 and not args[MAXIMUM]:
                for c in range(channels):
                    pooled[roi, cell, c] /= np.float32(held)


@cpu_kernel()
def first_inside(start: int, stop: int, args: Any) -> None:
    """The first SAMPLES points in boxes ``start`` to ``stop`` of all clouds, repeated where there are fewer."""
    count, rows, clouds, samples = args[COUNT], args[ROWS], args[CLOUDS], args[SAMPLES]
    rois = numba.carray(pointer(args[ROIS]), (count, 7), np.float32)
    cosines = numba.carray(pointer(args[COSINE]), (count,), np.float32)
    sines = numba.carray(pointer(args[SINE]), (count,), np.float32)
    points = numba.carray(pointer(args[POINTS]), (clouds, rows, 3), np.float32)
    found = numba.carray(pointer(args[FOUND]), (count, samples), np.int32)
    half = np.float32(0.5)
    for roi in range(start, stop):
        cloud, taken = points[roi // (count // clouds)], 0
        cx, cy, hz = rois[roi, 0], rois[roi, 1], rois[roi, 5] * half
        hx, hy, middle = rois[roi, 3] * half, rois[roi, 4] * half, rois[roi, 2] + hz
        cosine, sine = cosines[roi], sines[roi]
        for i in range(rows):
            if not np.abs(cloud[i, 2] - middle) <= hz:
                continue
            ax, ay = cloud[i, 0] - cx, cloud[i, 1] - cy
            x, y = ax * cosine - ay * sine, ax * sine + ay * cosine
            if x > -hx and x < hx and y > -hy and y < hy:
                found[roi, taken] = np.int32(i)
                taken += 1
                if taken == samples:
                    break
        if taken > 0:
            for slot in range(taken, samples):
                found[roi, slot] = found[roi, slot - taken]
