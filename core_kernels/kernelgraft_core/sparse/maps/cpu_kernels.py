"""The CPU kernels of kernel maps, compiled by numba."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from kernelgraft_core.runtime.native import cpu_kernel, pointer

# What a launch tells the kernels: one int64 array, in this order.
(TASK, OUT_ROWS, IN_ROWS, IN_KEYS, IN_ORDER, OUT_KEYS, OUT_ORDER, LINES, LINE_STARTS, TAPS, APART, FOUND) = range(12)


@cpu_kernel()
def clear(start: int, stop: int, args: Any) -> None:
    """Rows ``start`` to ``stop`` of ``FOUND (OUT_ROWS, LINES * TAPS)`` to -1."""
    taps = args[LINES] * args[TAPS]
    found = numba.carray(pointer(args[FOUND] + 4 * start * taps), ((stop - start) * taps,), np.int32)
    found[:] = np.int32(-1)


@numba.njit(inline="always")
def _first(keys: Any, wanted: int) -> int:
    """The first of ascending ``keys`` that is not below ``wanted``."""
    low, high = 0, keys.size
    while low < high:
        middle = (low + high) // 2
        if keys[middle] < wanted:
            low = middle + 1
        else:
            high = middle
    return low


@cpu_kernel()
def find_any(start: int, stop: int, args: Any) -> None:
    """Outputs ``start`` to ``stop``, counted in the order of their keys."""
    rows, taps, apart = args[IN_ROWS], args[TAPS], args[APART]
    volume = args[LINES] * taps
    in_keys = numba.carray(pointer(args[IN_KEYS]), (rows,), np.int64)
    in_order = numba.carray(pointer(args[IN_ORDER]), (rows,), np.int64)
    out_keys = numba.carray(pointer(args[OUT_KEYS]), (args[OUT_ROWS],), np.int64)
    out_order = numba.carray(pointer(args[OUT_ORDER]), (args[OUT_ROWS],), np.int64)
    lines = numba.carray(pointer(args[LINE_STARTS]), (args[LINES],), np.int64)
    found = numba.carray(pointer(args[FOUND]), (args[OUT_ROWS] * volume,), np.int32)
    in_place, out_place = args[IN_ORDER] == 0, args[OUT_ORDER] == 0
    for line in range(args[LINES]):
        at = _first(in_keys, out_keys[start] + lines[line])
        for i in range(start, stop):
            wanted = out_keys[i] + lines[line]
            while at < rows and in_keys[at] < wanted:
                at += 1
            last, j = wanted + (taps - 1) * apart, at
            place = (i if out_place else out_order[i]) * volume + line * taps
            while j < rows and in_keys[j] <= last:
                beyond = in_keys[j] - wanted
                if apart == 1 or beyond % apart == 0:
                    found[place + beyond // apart] = np.int32(j if in_place else in_order[j])
                j += 1


@cpu_kernel()
def find_mirrored(start: int, stop: int, args: Any) -> None:
    """The same where inputs are outputs and taps are symmetric: half of the lines tell what the others hold."""
    rows, taps, apart = args[IN_ROWS], args[TAPS], args[APART]
    volume = args[LINES] * taps
    keys = numba.carray(pointer(args[IN_KEYS]), (rows,), np.int64)
    order = numba.carray(pointer(args[IN_ORDER]), (rows,), np.int64)
    lines = numba.carray(pointer(args[LINE_STARTS]), (args[LINES],), np.int64)
    found = numba.carray(pointer(args[FOUND]), (rows * volume,), np.int32)
    in_place = args[IN_ORDER] == 0
    middle = args[LINES] // 2
    for line in range(middle + 1):
        at = _first(keys, keys[start] + lines[line])
        for i in range(start, stop):
            wanted = keys[i] + lines[line]
            while at < rows and keys[at] < wanted:
                at += 1
            last, j = wanted + (taps - 1) * apart, at
            row = i if in_place else order[i]
            while j < rows and keys[j] <= last:
                beyond = keys[j] - wanted
                if apart == 1 or beyond % apart == 0:
                    tap, other = line * taps + beyond // apart, j if in_place else order[j]
                    found[row * volume + tap] = np.int32(other)
                    if line < middle:
                        found[other * volume + volume - 1 - tap] = np.int32(row)
                j += 1


# What a launch tells the kernel that exchanges inputs and outputs.
(_, T_TAPS, T_NEIGHBORS, T_ROWS, T_FOUND, T_FOUND_ROWS) = range(6)


@cpu_kernel()
def transpose(start: int, stop: int, args: Any) -> None:
    """Outputs ``start`` to ``stop``: none of them writes what another one does."""
    taps = args[T_TAPS]
    neighbors = numba.carray(pointer(args[T_NEIGHBORS]), (args[T_ROWS] * taps,), np.int32)
    found = numba.carray(pointer(args[T_FOUND]), (args[T_FOUND_ROWS] * taps,), np.int32)
    for i in range(start, stop):
        for k in range(taps):
            other = neighbors[i * taps + k]
            if other >= 0:
                found[other * taps + k] = np.int32(i)
