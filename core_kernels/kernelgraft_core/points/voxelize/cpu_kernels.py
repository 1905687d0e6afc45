"""The CPU kernels of voxelization, compiled by numba."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from kernelgraft_core.runtime.native import cpu_kernel, pointer

# What a launch tells the kernels: one int64 array, in this order.
(TASK, POINTS, ROWS, CHANNELS, AXES, SIZE, LOW, GRID, CELLS) = range(9)


@cpu_kernel()
def find_voxels(start: int, stop: int, args: Any) -> None:
    """The voxels of points ``start`` to ``stop``, last axis first. Subtracted and divided, never multiplied by an
    inverse: bits are what mmcv computes."""
    channels, axes = args[CHANNELS], args[AXES]
    points = numba.carray(pointer(args[POINTS]), (args[ROWS] * channels,), np.float32)
    size = numba.carray(pointer(args[SIZE]), (axes,), np.float32)
    low = numba.carray(pointer(args[LOW]), (axes,), np.float32)
    grid = numba.carray(pointer(args[GRID]), (axes,), np.int64)
    cells = numba.carray(pointer(args[CELLS]), (args[ROWS] * axes,), np.int32)
    for i in range(start, stop):
        inside = True
        for axis in range(axes):
            cell = np.floor((points[i * channels + axis] - low[axis]) / size[axis])
            # Compared before it becomes an integer, which NaN and infinity do not.
            if cell >= np.float32(0) and np.float64(cell) < np.float64(grid[axis]):
                cells[i * axes + axes - 1 - axis] = np.int32(cell)
            else:
                inside = False
        if not inside:
            for axis in range(axes):
                cells[i * axes + axis] = np.int32(-1)


# What a launch tells the kernel that fills voxels. TABLE has 1 << BITS numbers of voxels, all -1, and KEYS room for the
# MOST voxels that there can be.
(_, F_POINTS, F_ROWS, F_CHANNELS, F_AXES, F_CELLS, F_GRID, TABLE, BITS, KEYS, MOST, VOXELS, MAX_VOXELS, MAX_POINTS,
 COORDINATES, COUNTS, NUMBER) = range(17)  # fmt: skip
SPREAD = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio: neighbouring keys land far apart


@cpu_kernel()
def fill_voxels(start: int, stop: int, args: Any) -> None:
    """Number the voxels in the order of their first points and copy points to them; one task does it all."""
    rows, channels, axes = args[F_ROWS], args[F_CHANNELS], args[F_AXES]
    max_voxels, max_points = args[MAX_VOXELS], args[MAX_POINTS]
    points = numba.carray(pointer(args[F_POINTS]), (rows * channels,), np.float32)
    cells = numba.carray(pointer(args[F_CELLS]), (rows * axes,), np.int32)
    grid = numba.carray(pointer(args[F_GRID]), (axes,), np.int64)
    table = numba.carray(pointer(args[TABLE]), (1 << args[BITS],), np.int32)
    keys = numba.carray(pointer(args[KEYS]), (args[MOST],), np.int64)
    voxels = numba.carray(pointer(args[VOXELS]), (max_voxels * max_points * channels,), np.float32)
    coordinates = numba.carray(pointer(args[COORDINATES]), (max_voxels * axes,), np.int32)
    counts = numba.carray(pointer(args[COUNTS]), (max_voxels,), np.int32)
    number = numba.carray(pointer(args[NUMBER]), (1,), np.int64)
    found, last, shift = np.int64(0), (np.int64(1) << args[BITS]) - 1, np.uint64(64 - args[BITS])
    for i in range(rows):
        if cells[i * axes] < 0:
            continue
        key = np.int64(0)
        for axis in range(axes):
            key = key * grid[axes - 1 - axis] + cells[i * axes + axis]
        entry = np.int64((np.uint64(key) * np.uint64(SPREAD)) >> shift)
        voxel = np.int64(table[entry])
        while voxel >= 0 and keys[voxel] != key:
            entry = (entry + 1) & last
            voxel = np.int64(table[entry])
        if voxel < 0:
            if found == max_voxels:
                continue
            voxel = found
            table[entry] = np.int32(voxel)
            keys[voxel] = key
            for axis in range(axes):
                coordinates[found * axes + axis] = cells[i * axes + axis]
            found += 1
        count = counts[voxel]
        if count < max_points:
            place = (voxel * max_points + count) * channels
            for c in range(channels):
                voxels[place + c] = points[i * channels + c]
            counts[voxel] = count + 1
    number[0] = found
