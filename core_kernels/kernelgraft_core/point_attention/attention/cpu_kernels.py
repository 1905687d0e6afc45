"""The CPU kernels of attention in groups, compiled by numba.

A tile is a few groups: their rows are gathered once, and everything is done to them while they are in the cache.
"""

from __future__ import annotations

import functools
from typing import Any

import numba
import numpy as np

from kernelgraft_core.point_attention.cpu_rows import (
    GENERATORS,
    add_floats,
    copy_halves,
    copy_words,
    pad_halves,
    round_floats,
    turn_rows,
    vectors_of_block,
    widen_halves,
)
from kernelgraft_core.point_attention.cpu_tile import PLAIN, TILE_SETS, TileSet, attend, linear, turn_queries
from kernelgraft_core.runtime.native import cpu_kernel, pointer

# What a kernel is told: one int64 array, in this order. Steps are bytes from one row to the next. Of the buffers, the
# place of each in a part's scratch.
(X, POSITION, OUT, CHANNELS, HEADS, MEMBERS, STARTS, OWNED, GROUPS, TILE_GROUPS, PARTS, SCRATCH, SCRATCH_BYTES, SCALE,
 DEPTH, MOVED_WEIGHT, MOVED_BIAS, MOVED_COLUMNS, VALUE_WEIGHT, VALUE_BIAS, VALUE_COLUMNS, OUT_WEIGHT, OUT_BIAS,
 OUT_COLUMNS, B_MOVED, B_PLAIN, B_QKV, QKV_STEP, B_ATTENDED, ATTENDED_STEP, B_ROUNDED, B_RESULT, B_QUERIES, B_SCORES,
 B_SUMS, NUMBERS,
) = range(36)  # fmt: skip


@functools.cache
def attention_kernel(known: TileSet, floats: TileSet, head_size: int, projected: bool) -> Any:
    """Attention with its projections, or (``projected`` is false) of rows that hold queries, keys and values already.

    ``known`` is for the projections, ``floats`` for attention itself.
    """
    which, inner, generated_by = TILE_SETS.index(known), TILE_SETS.index(floats), GENERATORS
    lanes, panel, halves, number = floats.lanes, floats.panel, known.pairs, known.channel_bytes
    third, fourth = min(3, floats.width), min(4, floats.width)
    width, turns = floats.width, head_size % lanes == 0

    @cpu_kernel(fastmath={"contract"})
    def attention(start: int, stop: int, args: Any) -> None:
        """Parts ``start`` to ``stop`` of the tiles, each with scratch of its own."""
        _ = generated_by
        channels, heads, groups, per = args[CHANNELS], args[HEADS], args[GROUPS], args[TILE_GROUPS]
        starts = numba.carray(pointer(args[STARTS]), (groups + 1,), np.int32)
        owned = numba.carray(pointer(args[OWNED]), (groups,), np.int32)
        members = numba.carray(pointer(args[MEMBERS]), (starts[groups],), np.int32)
        scale = numba.carray(pointer(args[SCALE]), (1,), np.float32)[0]
        depth, tiles, parts = args[DEPTH], (groups + per - 1) // per, args[PARTS]
        x_step = number * channels
        for part in range(start, stop):
            scratch = args[SCRATCH] + part * args[SCRATCH_BYTES]
            moved, plain, qkv = scratch + args[B_MOVED], scratch + args[B_PLAIN], scratch + args[B_QKV]
            attended, result = scratch + args[B_ATTENDED], scratch + args[B_RESULT]
            queries, scores, sums = scratch + args[B_QUERIES], scratch + args[B_SCORES], scratch + args[B_SUMS]
            rounded = scratch + args[B_ROUNDED]
            qkv_step, attended_step = args[QKV_STEP], args[ATTENDED_STEP]
            turned = numba.carray(pointer(queries), (head_size, panel), np.float32)
            for tile in range(tiles * part // parts, tiles * (part + 1) // parts):
                first_group, last_group = tile * per, min(groups, (tile + 1) * per)
                first = np.int64(starts[first_group])
                count = starts[last_group] - first
                if count == 0:
                    continue
                if projected:
                    value_offset = 4 * args[MOVED_COLUMNS]
                    for i in range(count):
                        row = np.int64(members[first + i])
                        source, at = args[X] + row * x_step, plain + i * 4 * depth
                        if halves:
                            copy_halves(source, at, channels)
                        else:
                            copy_words(source, at, channels)
                        if args[POSITION]:
                            other, target = args[POSITION] + row * x_step, moved + i * 4 * depth
                            if halves:
                                widen_halves(source, result, channels)
                                widen_halves(other, attended, channels)
                                add_floats(result, attended, result, channels)
                                round_floats(result, target, channels)
                                pad_halves(target, channels)
                            else:
                                add_floats(source, other, target, channels)
                    from_rows = moved if args[POSITION] else plain
                    linear(
                        which, PLAIN, from_rows, 4 * depth, count, depth, args[MOVED_WEIGHT], args[MOVED_BIAS],
                        args[MOVED_COLUMNS], qkv, qkv_step,
                    )  # fmt: skip
                    linear(
                        which, PLAIN, plain, 4 * depth, count, depth, args[VALUE_WEIGHT], args[VALUE_BIAS],
                        args[VALUE_COLUMNS], qkv + value_offset, qkv_step,
                    )  # fmt: skip
                else:
                    value_offset = 8 * channels
                    for i in range(count):
                        row = np.int64(members[first + i])
                        copy_words(args[X] + row * 12 * channels, qkv + i * qkv_step, 3 * channels)
                for group in range(first_group, last_group):
                    begin = starts[group] - first
                    size, own = starts[group + 1] - starts[group], int(owned[group])
                    for head in range(heads):
                        at = qkv + begin * qkv_step + 4 * head * head_size
                        done = 0
                        while done < own:
                            wide = vectors_of_block(own - done, lanes, width)
                            some = min(wide * lanes, own - done)
                            if turns:
                                turn_queries(inner, head_size, at + done * qkv_step, qkv_step, wide, scale, queries)
                            else:
                                turn_rows(at + done * qkv_step, qkv_step, some, scale, turned)
                            keys, values = at + 4 * channels, at + value_offset
                            out = attended + (begin + done) * attended_step + 4 * head * head_size
                            if wide == 1:
                                attend(inner, 1, head_size, queries, some, keys, values, qkv_step, size, scores, sums,
                                       out, attended_step)  # fmt: skip
                            elif wide == 2:
                                attend(inner, 2, head_size, queries, some, keys, values, qkv_step, size, scores, sums,
                                       out, attended_step)  # fmt: skip
                            elif wide == 3:
                                attend(inner, third, head_size, queries, some, keys, values, qkv_step, size, scores,
                                       sums, out, attended_step)  # fmt: skip
                            else:
                                attend(inner, fourth, head_size, queries, some, keys, values, qkv_step, size, scores,
                                       sums, out, attended_step)  # fmt: skip
                            done += some
                if projected:
                    if halves:
                        for i in range(count):
                            source, at = attended + i * attended_step, rounded + i * 4 * depth
                            round_floats(source, at, channels)
                            pad_halves(at, channels)
                        linear(
                            which, PLAIN, rounded, 4 * depth, count, depth, args[OUT_WEIGHT], args[OUT_BIAS],
                            args[OUT_COLUMNS], result, 4 * args[OUT_COLUMNS],
                        )  # fmt: skip
                    else:
                        linear(
                            which, PLAIN, attended, attended_step, count, depth, args[OUT_WEIGHT], args[OUT_BIAS],
                            args[OUT_COLUMNS], result, 4 * args[OUT_COLUMNS],
                        )  # fmt: skip
                for group in range(first_group, last_group):
                    begin = starts[group] - first
                    for i in range(owned[group]):
                        target = args[OUT] + np.int64(members[first + begin + i]) * x_step
                        if projected:
                            source = result + (begin + i) * 4 * args[OUT_COLUMNS]
                            if halves:
                                round_floats(source, target, channels)
                            else:
                                copy_words(source, target, channels)
                        else:
                            copy_words(attended + (begin + i) * attended_step, target, channels)

    return attention
