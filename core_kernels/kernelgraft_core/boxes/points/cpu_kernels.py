"""The CPU kernels of points in boxes and polygons, compiled by numba."""

from __future__ import annotations

import functools
from typing import Any

import numba
import numpy as np

from kernelgraft_core.runtime.native import cpu_kernel, pointer

# What a launch tells the kernels: one int64 array, in this order, after the launch's own number. POINTS are (B, M, 3),
# BOXES (B, 8, T); for polygons there is one batch, and they are (M, 2) and (8, T).
(_, POINTS, POINT_COUNT, BOXES, BOX_COUNT, OUT) = range(6)
NUMBERS = 8


@functools.cache
def all_kernel(dtype: Any) -> Any:
    """For points of a NumPy dtype; an item is a point of some batch, and fills its row of the result."""

    @cpu_kernel()
    def every(start: int, stop: int, args: Any) -> None:
        boxes, points = args[BOX_COUNT], args[POINT_COUNT]
        xyz = numba.carray(pointer(args[POINTS]), (3 * stop,), dtype)
        frames = numba.carray(pointer(args[BOXES]), ((stop - 1) // points + 1, NUMBERS, boxes), dtype)
        out = numba.carray(pointer(args[OUT]), (stop * boxes,), np.bool_)
        for i in range(start, stop):
            batch = i // points
            x, y, z = xyz[3 * i], xyz[3 * i + 1], xyz[3 * i + 2]
            row = out[i * boxes : (i + 1) * boxes]
            for t in range(boxes):
                away_x, away_y, away_z = x - frames[batch, 0, t], y - frames[batch, 1, t], z - frames[batch, 2, t]
                cos, sin = frames[batch, 6, t], frames[batch, 7, t]
                along, across = away_x * cos + away_y * sin, away_y * cos - away_x * sin
                inside = (abs(along) < frames[batch, 3, t]) & (abs(across) < frames[batch, 4, t])
                row[t] = inside & (abs(away_z) <= frames[batch, 5, t])

    return every


@functools.cache
def first_kernel(dtype: Any) -> Any:
    """For points of a NumPy dtype; an item is a point of some batch."""

    @cpu_kernel()
    def first(start: int, stop: int, args: Any) -> None:
        boxes, points = args[BOX_COUNT], args[POINT_COUNT]
        xyz = numba.carray(pointer(args[POINTS]), (3 * stop,), dtype)
        frames = numba.carray(pointer(args[BOXES]), ((stop - 1) // points + 1, NUMBERS, boxes), dtype)
        out = numba.carray(pointer(args[OUT]), (stop,), np.int32)
        for i in range(start, stop):
            batch = i // points
            x, y, z = xyz[3 * i], xyz[3 * i + 1], xyz[3 * i + 2]
            out[i] = -1
            for t in range(boxes):
                away_x, away_y, away_z = x - frames[batch, 0, t], y - frames[batch, 1, t], z - frames[batch, 2, t]
                if not abs(away_z) <= frames[batch, 5, t]:
                    continue
                cos, sin = frames[batch, 6, t], frames[batch, 7, t]
                along, across = away_x * cos + away_y * sin, away_y * cos - away_x * sin
                if abs(along) < frames[batch, 3, t] and abs(across) < frames[batch, 4, t]:
                    out[i] = t
                    break

    return first


@functools.cache
def polygon_kernel(dtype: Any) -> Any:
    """For points of a NumPy dtype; an item is a point."""

    @cpu_kernel()
    def polygons(start: int, stop: int, args: Any) -> None:
        boxes = args[BOX_COUNT]
        xy = numba.carray(pointer(args[POINTS]), (2 * stop,), dtype)
        corners = numba.carray(pointer(args[BOXES]), (8 * boxes,), dtype)
        out = numba.carray(pointer(args[OUT]), (stop * boxes,), np.bool_)
        for i in range(start, stop):
            px, py = xy[2 * i], xy[2 * i + 1]
            for t in range(boxes):
                odd = False
                for edge in range(4):
                    other = (edge + 3) & 3
                    sx, sy = corners[2 * edge * boxes + t], corners[(2 * edge + 1) * boxes + t]
                    tx, ty = corners[2 * other * boxes + t], corners[(2 * other + 1) * boxes + t]
                    if (sx == px and sy == py) or (tx == px and ty == py):
                        break
                    if (sy < py and ty >= py) or (sy >= py and ty < py):
                        x = sx + np.divide((py - sy) * (tx - sx), ty - sy)  # "/" may raise, and nobody could catch it
                        if x == px:
                            break
                        odd ^= x > px
                out[i * boxes + t] = odd

    return polygons
