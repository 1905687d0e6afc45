"""The CPU kernel that orders the vertices of overlaps, compiled by numba."""

from __future__ import annotations

import functools
from typing import Any

import numba
import numpy as np

from kernelgraft_core.runtime.native import cpu_kernel, pointer

# What a launch tells the kernel: one int64 array, in this order, after the launch's own number.
(_, VERTICES, MASK, CANDIDATES, OUT) = range(5)
CORNERS, LARGEST, CLOSE = 8, 8, 1e-8  # as in reference.py


@functools.cache
def sort_kernel(dtype: Any) -> Any:
    """For vertices of a NumPy dtype; an item is a polygon."""

    @cpu_kernel()
    def sort(start: int, stop: int, args: Any) -> None:
        count = args[CANDIDATES]
        vertices = numba.carray(pointer(args[VERTICES]), (stop, count, 2), dtype)
        mask = numba.carray(pointer(args[MASK]), (stop, count), np.bool_)
        out = numba.carray(pointer(args[OUT]), (stop, LARGEST + 1), np.int32)
        angles, order, close = np.empty(count, dtype), np.empty(count, np.int64), dtype(CLOSE)
        whole = dtype(2 * np.pi)
        for p in range(start, stop):
            xy, valid = vertices[p], mask[p]
            length, known, padding = 0, 0, -1
            for k in range(count):
                if not valid[k]:
                    if padding < 0 and k >= CORNERS:
                        padding = k
                    continue
                known += 1
                again = False
                for j in range(k):
                    again |= valid[j] and abs(xy[k, 0] - xy[j, 0]) < close and abs(xy[k, 1] - xy[j, 1]) < close
                if again:
                    continue
                angle = np.arctan2(xy[k, 1], xy[k, 0])
                if angle < dtype(0):
                    angle += whole
                if np.isnan(angle):
                    angle = dtype(0)
                at = length
                while at > 0 and angles[at - 1] > angle:
                    angles[at], order[at] = angles[at - 1], order[at - 1]
                    at -= 1
                angles[at], order[at] = angle, k
                length += 1
            while length > LARGEST:
                smallest, dropped = dtype(np.inf), 0
                for k in range(length):
                    before, here, after = order[k - 1 if k else length - 1], order[k], order[(k + 1) % length]
                    triangle = abs(
                        (xy[here, 0] - xy[before, 0]) * (xy[after, 1] - xy[here, 1])
                        - (xy[here, 1] - xy[before, 1]) * (xy[after, 0] - xy[here, 0])
                    )
                    if np.isnan(triangle):
                        triangle = dtype(0)
                    if triangle < smallest:
                        smallest, dropped = triangle, k
                length -= 1
                for k in range(dropped, length):
                    order[k] = order[k + 1]
            if padding < 0:
                padding = order[0]
            for k in range(LARGEST + 1):
                out[p, k] = order[k] if k < length else padding
                if k == length:
                    out[p, k] = order[0]
                if known < 3:
                    out[p, k] = padding

    return sort
