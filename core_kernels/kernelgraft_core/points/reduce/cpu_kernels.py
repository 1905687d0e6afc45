"""The CPU kernel that reduces groups of rows, compiled by numba."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from kernelgraft_core.runtime.native import cpu_kernel, pointer

# What a launch tells the kernel: one int64 array, in this order. KIND is 0 for sums, 1 for means, 2 for maxima.
(TASK, FEATS, ROWS, CHANNELS, ORDER, MEMBERS, STARTS, GROUPS, KIND, OUT, SOURCE) = range(11)


@cpu_kernel()
def reduce_rows(start: int, stop: int, args: Any) -> None:
    """Groups ``start`` to ``stop``."""
    channels, groups, kind = args[CHANNELS], args[GROUPS], args[KIND]
    feats = numba.carray(pointer(args[FEATS]), (args[ROWS], channels), np.float32)
    order = numba.carray(pointer(args[ORDER]), (args[MEMBERS],), np.int64)
    starts = numba.carray(pointer(args[STARTS]), (groups + 1,), np.int64)
    out = numba.carray(pointer(args[OUT]), (groups, channels), np.float32)
    for group in range(start, stop):
        first, last = starts[group], starts[group + 1]
        if kind < 2:
            for c in range(channels):
                out[group, c] = np.float32(0)
            for member in range(first, last):
                row = order[member]
                for c in range(channels):
                    out[group, c] += feats[row, c]
            if kind == 1 and last > first:  # numba raises where it divides by 0
                count = np.float32(last - first)
                for c in range(channels):
                    out[group, c] /= count
        else:
            source = numba.carray(pointer(args[SOURCE]), (groups, channels), np.int64)
            for c in range(channels):
                out[group, c] = np.float32(-np.inf)
                source[group, c] = -1
            for member in range(first, last):
                row = order[member]
                for c in range(channels):
                    value = feats[row, c]
                    # Equal takes the place of nothing: minus infinity itself has a row too. NaN is never taken.
                    if value > out[group, c] or (source[group, c] < 0 and value == out[group, c]):
                        out[group, c] = value
                        source[group, c] = row
