"""The CPU kernel of the gradient of attention in groups, compiled by numba: one group at a time, in the cache."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import Any

import numba
import numpy as np

from kernelgraft_core.point_attention import cpu_tile_backward
from kernelgraft_core.point_attention.cpu_rows import GENERATORS, copy_words, turn_rows, vectors_of_block
from kernelgraft_core.point_attention.cpu_tile import TILE_SETS, TileSet, turn_queries
from kernelgraft_core.point_attention.cpu_tile_backward import attend_backward
from kernelgraft_core.runtime.native import cpu_kernel, pointer

# What the kernel is told: one int64 array, in this order. BORROWED: gradients of keys and values of what groups borrow,
# for each place of a member, or 0. Of the buffers, the place of each in a part's scratch.
(GRAD, QKV, OUT, BORROWED, CHANNELS, HEADS, MEMBERS, STARTS, OWNED, GROUPS, PARTS, SCRATCH, SCRATCH_BYTES, SCALES,
 B_ROWS, ROW_STEP, B_GRAD, GRAD_STEP, B_FOUND, FOUND_STEP, B_TURNED, B_TURNED_GRAD, B_WEIGHTS, B_MOVED, NUMBERS,
) = range(25)  # fmt: skip

_GENERATED_BY = GENERATORS + hashlib.sha256(Path(cpu_tile_backward.__file__).read_bytes()).hexdigest()


@functools.cache
def gradient_kernel(floats: TileSet, head_size: int) -> Any:
    """Gradients of queries, keys and values, float32."""
    inner, generated_by, lanes, panel, width = (
        TILE_SETS.index(floats), _GENERATED_BY, floats.lanes, floats.panel, floats.width
    )  # fmt: skip
    third, fourth, turns = min(3, width), min(4, width), head_size % lanes == 0

    @cpu_kernel(fastmath={"contract"})
    def gradient(start: int, stop: int, args: Any) -> None:
        """Parts ``start`` to ``stop`` of the groups, each with scratch of its own."""
        _ = generated_by
        channels, heads, groups, parts = args[CHANNELS], args[HEADS], args[GROUPS], args[PARTS]
        starts = numba.carray(pointer(args[STARTS]), (groups + 1,), np.int32)
        owned = numba.carray(pointer(args[OWNED]), (groups,), np.int32)
        members = numba.carray(pointer(args[MEMBERS]), (starts[groups],), np.int32)
        scales = numba.carray(pointer(args[SCALES]), (2,), np.float32)
        for_turning, scale = scales[0], scales[1]
        row, grad_row, found_row = args[ROW_STEP], args[GRAD_STEP], args[FOUND_STEP]
        found_third = found_row // 3
        for part in range(start, stop):
            scratch = args[SCRATCH] + part * args[SCRATCH_BYTES]
            rows, grads, found = scratch + args[B_ROWS], scratch + args[B_GRAD], scratch + args[B_FOUND]
            turned_at, turned_grad_at = scratch + args[B_TURNED], scratch + args[B_TURNED_GRAD]
            weights, moved = scratch + args[B_WEIGHTS], scratch + args[B_MOVED]
            turned = numba.carray(pointer(turned_at), (head_size, panel), np.float32)
            turned_grad = numba.carray(pointer(turned_grad_at), (head_size, panel), np.float32)
            for group in range(groups * part // parts, groups * (part + 1) // parts):
                begin = int(starts[group])
                size, own = int(starts[group + 1]) - begin, int(owned[group])
                for i in range(size):
                    member = int(members[begin + i])
                    copy_words(args[QKV] + member * 12 * channels, rows + i * row, 3 * channels)
                    if i < own:
                        copy_words(args[GRAD] + member * 4 * channels, grads + i * grad_row, channels)
                for head in range(heads):
                    offset, done = 4 * head * head_size, 0
                    while done < own:
                        wide = vectors_of_block(own - done, lanes, width)
                        some = min(wide * lanes, own - done)
                        query, change = rows + offset + done * row, grads + offset + done * grad_row
                        if turns:
                            turn_queries(inner, head_size, query, row, wide, for_turning, turned_at)
                            turn_queries(inner, head_size, change, grad_row, wide, np.float32(1), turned_grad_at)
                        else:
                            turn_rows(query, row, some, for_turning, turned)
                            turn_rows(change, grad_row, some, np.float32(1), turned_grad)
                        at, grad_at, found_at = rows + offset, grads + offset, found + offset
                        if wide == 1:
                            attend_backward(inner, 1, head_size, turned_at, turned_grad_at, scale, at, row, grad_at,
                                            grad_row, 4 * channels, some, size, done, weights, moved, found_at,
                                            found_row, found_third)  # fmt: skip
                        elif wide == 2:
                            attend_backward(inner, 2, head_size, turned_at, turned_grad_at, scale, at, row, grad_at,
                                            grad_row, 4 * channels, some, size, done, weights, moved, found_at,
                                            found_row, found_third)  # fmt: skip
                        elif wide == 3:
                            attend_backward(inner, third, head_size, turned_at, turned_grad_at, scale, at, row, grad_at,
                                            grad_row, 4 * channels, some, size, done, weights, moved, found_at,
                                            found_row, found_third)  # fmt: skip
                        else:
                            attend_backward(inner, fourth, head_size, turned_at, turned_grad_at, scale, at, row,
                                            grad_at, grad_row, 4 * channels, some, size, done, weights, moved, found_at,
                                            found_row, found_third)  # fmt: skip
                        done += some
                for i in range(size):
                    source = found + i * found_row
                    if i < own:
                        target = args[OUT] + int(members[begin + i]) * 12 * channels
                        for each in range(3):
                            copy_words(source + each * found_third, target + 4 * each * channels, channels)
                    elif own:  # without rows of its own nothing was computed for the group
                        target = args[BORROWED] + (begin + i) * 8 * channels
                        for each in range(2):
                            copy_words(source + (each + 1) * found_third, target + 4 * each * channels, channels)

    return gradient
