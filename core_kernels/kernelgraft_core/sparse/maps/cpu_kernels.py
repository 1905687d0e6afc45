"""The CPU kernels of kernel maps, compiled by numba."""

from __future__ import annotations

import functools
from typing import Any

import numba
import numpy as np

from kernelgraft_core.runtime.native import cpu_kernel, pointer

# What a launch tells the kernels that look for neighbours: one int64 array, in this order. IN_KEYS end with TAPS
# numbers that no key reaches.
(TASK, OUT_ROWS, IN_ROWS, IN_KEYS, IN_ORDER, OUT_KEYS, OUT_ORDER, LINES, LINE_STARTS, TAPS, APART, FOUND) = range(12)
SELECTED = 3  # taps of a line up to which results are selected without a branch


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


@functools.cache
def find_kernel(taps: int, in_place: bool) -> Any:
    """The kernel for lines of ``taps`` neighbouring sites, 1 to 3; ``in_place``: without IN_ORDER."""

    @cpu_kernel()
    def find(start: int, stop: int, args: Any) -> None:
        """Outputs ``start`` to ``stop``, counted in the order of their keys."""
        rows = args[IN_ROWS]
        volume = args[LINES] * taps
        in_keys = numba.carray(pointer(args[IN_KEYS]), (rows + taps,), np.int64)
        in_order = numba.carray(pointer(args[IN_ORDER]), (rows + taps,), np.int64)
        out_keys = numba.carray(pointer(args[OUT_KEYS]), (args[OUT_ROWS],), np.int64)
        out_order = numba.carray(pointer(args[OUT_ORDER]), (args[OUT_ROWS],), np.int64)
        lines = numba.carray(pointer(args[LINE_STARTS]), (args[LINES],), np.int64)
        found = numba.carray(pointer(args[FOUND]), (args[OUT_ROWS] * volume,), np.int32)
        out_place = args[OUT_ORDER] == 0
        # Where each line has come to. Lines take turns: the way of one through its keys is a chain of loads that wait
        # for each other, and those of several overlap. Indices are unsigned, which spares a look at their sign.
        one, two = np.uint64(1), np.uint64(2)
        reached = np.empty(args[LINES], np.uint64)
        for line in range(args[LINES]):
            reached[line] = np.uint64(_first(in_keys, out_keys[start] + lines[line]))
        for i in range(np.uint64(start), np.uint64(stop)):
            place = np.uint64((i if out_place else np.uint64(out_order[i])) * np.uint64(volume))
            for line in range(np.uint64(args[LINES])):
                wanted = out_keys[i] + lines[line]
                at = reached[line]
                # Most often the next key is it, or the one after that: no branch to guess wrong.
                at += np.uint64(in_keys[at] < wanted)
                at += np.uint64(in_keys[at] < wanted)
                while in_keys[at] < wanted:
                    at += one
                reached[line] = at
                # All are read before any is written: what is written might be what is read, for all LLVM knows.
                none, key = np.int32(-1), in_keys[at]
                row = np.int32(at) if in_place else np.int32(in_order[at])
                first = row if key == wanted else none
                if taps == 1:
                    found[place] = first
                    place += one
                elif taps == 2:
                    next_row = np.int32(at + one) if in_place else np.int32(in_order[at + one])
                    second = row if key == wanted + 1 else none
                    second = next_row if in_keys[at + one] == wanted + 1 else second
                    found[place] = first
                    found[place + one] = second
                    place += two
                else:
                    next_row = np.int32(at + one) if in_place else np.int32(in_order[at + one])
                    last_row = np.int32(at + two) if in_place else np.int32(in_order[at + two])
                    next_key, last_key = in_keys[at + one], in_keys[at + two]
                    second = row if key == wanted + 1 else none
                    second = next_row if next_key == wanted + 1 else second
                    third = row if key == wanted + 2 else none
                    third = next_row if next_key == wanted + 2 else third
                    third = last_row if last_key == wanted + 2 else third
                    found[place] = first
                    found[place + one] = second
                    found[place + two] = third
                    place += np.uint64(3)

    return find


@cpu_kernel()
def find_apart(start: int, stop: int, args: Any) -> None:
    """The same for lines of any length, of sites that may be ``APART``."""
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
            found[place : place + taps] = np.int32(-1)
            while j < rows and in_keys[j] <= last:
                beyond = in_keys[j] - wanted
                if apart == 1 or beyond % apart == 0:
                    found[place + beyond // apart] = np.int32(j if in_place else in_order[j])
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


# What a launch tells the kernels that order sites.
(_, S_SITES, S_ROWS, S_AXES, S_STEPS, S_OFFSET, S_ORDER, S_KEYS, S_SPARE_KEYS, S_SPARE_ORDER, S_LARGEST) = range(11)
DIGIT = 11  # bits


@cpu_kernel()
def number_sites(start: int, stop: int, args: Any) -> None:
    """Numbers of the sites ``start`` to ``stop`` of ORDER, or of the rows themselves where that is 0, into KEYS."""
    axes, rows = args[S_AXES], args[S_ROWS]
    sites = numba.carray(pointer(args[S_SITES]), (rows * axes,), np.int32)
    order = numba.carray(pointer(args[S_ORDER]), (rows,), np.int64)
    steps = numba.carray(pointer(args[S_STEPS]), (axes,), np.int64)
    keys = numba.carray(pointer(args[S_KEYS]), (rows,), np.int64)
    in_place = args[S_ORDER] == 0
    for i in range(start, stop):
        row = i if in_place else order[i]
        key = args[S_OFFSET]
        for axis in range(axes):
            key += steps[axis] * sites[row * axes + axis]
        keys[i] = key


@cpu_kernel()
def sort_keys(start: int, stop: int, args: Any) -> None:
    """Sort KEYS, none above LARGEST, and their rows with them into ORDER, digit by digit; one task does it all.

    A key and its row are one number while that has room, as for any scan: half of the memory to move.
    """
    rows, largest = args[S_ROWS], args[S_LARGEST]
    passes, row_bits = 1, 1
    while passes * DIGIT < 62 and largest >> (passes * DIGIT):
        passes += 1
    while rows >> row_bits:
        row_bits += 1
    counts = np.zeros((passes, 1 << DIGIT), np.int64)
    keys = numba.carray(pointer(args[S_KEYS]), (rows,), np.int64)
    order = numba.carray(pointer(args[S_ORDER]), (rows,), np.int64)
    spare_keys = numba.carray(pointer(args[S_SPARE_KEYS]), (rows,), np.int64)
    spare_order = numba.carray(pointer(args[S_SPARE_ORDER]), (rows,), np.int64)
    for i in range(rows):
        for p in range(passes):
            counts[p, (keys[i] >> (p * DIGIT)) & ((1 << DIGIT) - 1)] += 1
    for p in range(passes):
        total = np.int64(0)
        for digit in range(1 << DIGIT):
            count = counts[p, digit]
            counts[p, digit] = total
            total += count
    if largest >> (62 - row_bits) == 0:
        for i in range(rows):
            spare_keys[i] = (keys[i] << row_bits) | i
        source, target = spare_keys, keys
        for p in range(passes):
            shift = p * DIGIT + row_bits
            for i in range(rows):
                digit = (source[i] >> shift) & ((1 << DIGIT) - 1)
                place = counts[p, digit]
                counts[p, digit] = place + 1
                target[place] = source[i]
            source, target = target, source
        for i in range(rows):
            both = source[i]
            order[i] = both & ((1 << row_bits) - 1)
            keys[i] = both >> row_bits
        return
    for i in range(rows):
        order[i] = i
    source_keys, source_order = keys, order
    target_keys, target_order = spare_keys, spare_order
    for p in range(passes):
        for i in range(rows):
            digit = (source_keys[i] >> (p * DIGIT)) & ((1 << DIGIT) - 1)
            place = counts[p, digit]
            counts[p, digit] = place + 1
            target_keys[place] = source_keys[i]
            target_order[place] = source_order[i]
        source_keys, target_keys = target_keys, source_keys
        source_order, target_order = target_order, source_order
    if passes % 2:
        keys[:] = spare_keys
        order[:] = spare_order
