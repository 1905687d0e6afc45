"""The CPU kernel of two normalizations with a feed-forward network between them, compiled by numba."""

from __future__ import annotations

import functools
from typing import Any

import numba
import numpy as np

from kernelgraft_core.point_attention.cpu_rows import GENERATORS, add_floats, pad_halves, round_floats, widen_halves
from kernelgraft_core.point_attention.cpu_tile import GELU, GELU_HALVES, PLAIN, TILE_SETS, TileSet, linear
from kernelgraft_core.runtime.native import cpu_kernel, pointer

# What the kernel is told: one int64 array, in this order. NORMS: weight and bias of both, float32. Of the buffers, the
# place of each in a part's scratch.
(X, UPDATE, OUT, ROWS, CHANNELS, TILE_ROWS, PARTS, SCRATCH, SCRATCH_BYTES, EPS, NORMS, WEIGHT1, BIAS1, COLUMNS1, DEPTH1,
 WEIGHT2, BIAS2, COLUMNS2, DEPTH2, B_HIDDEN, B_ROUNDED, B_INNER, B_LAST, NUMBERS,
) = range(24)  # fmt: skip


@numba.njit(inline="always")
def normalize(source: int, weight: int, bias: int, target: int, count: int, eps: float) -> None:
    """Layer normalization of a float32 row."""
    values, out = (
        numba.carray(pointer(source), (count,), np.float32),
        numba.carray(pointer(target), (count,), np.float32),
    )
    factors, addends = (
        numba.carray(pointer(weight), (count,), np.float32),
        numba.carray(pointer(bias), (count,), np.float32),
    )
    total = np.float32(0)
    for c in range(count):
        total += values[c]
    mean, squares = total / np.float32(count), np.float32(0)
    for c in range(count):
        difference = values[c] - mean
        squares += difference * difference
    scale = np.float32(1) / np.sqrt(squares / np.float32(count) + np.float32(eps))
    for c in range(count):
        out[c] = (values[c] - mean) * scale * factors[c] + addends[c]


@functools.cache
def norm_ffn_kernel(known: TileSet) -> Any:
    which, generated_by, halves, number = TILE_SETS.index(known), GENERATORS, known.pairs, known.channel_bytes

    # Sums of a row in any order, so that they are vectors; the order is the compiler's, the same on every run.
    @cpu_kernel(fastmath={"contract", "reassoc"})
    def norm_ffn(start: int, stop: int, args: Any) -> None:
        """Parts ``start`` to ``stop`` of the tiles, each with scratch of its own."""
        _ = generated_by
        rows, channels, tile_rows, parts = args[ROWS], args[CHANNELS], args[TILE_ROWS], args[PARTS]
        eps, step, tiles = numba.carray(pointer(args[EPS]), (1,), np.float64)[0], number * channels, 0
        tiles = (rows + tile_rows - 1) // tile_rows
        columns1, columns2, depth1, depth2 = args[COLUMNS1], args[COLUMNS2], args[DEPTH1], args[DEPTH2]
        norm1, bias1, norm2, bias2 = (
            args[NORMS], args[NORMS] + 4 * channels, args[NORMS] + 8 * channels, args[NORMS] + 12 * channels
        )  # fmt: skip
        for part in range(start, stop):
            scratch = args[SCRATCH] + part * args[SCRATCH_BYTES]
            hidden, rounded, inner = scratch + args[B_HIDDEN], scratch + args[B_ROUNDED], scratch + args[B_INNER]
            last = scratch + args[B_LAST]
            for tile in range(tiles * part // parts, tiles * (part + 1) // parts):
                first = tile * tile_rows
                count = min(rows - first, tile_rows)
                for i in range(count):
                    source, other = args[X] + (first + i) * step, args[UPDATE] + (first + i) * step
                    at = hidden + 4 * i * channels
                    if halves:
                        widen_halves(source, at, channels)
                        widen_halves(other, last, channels)
                        add_floats(at, last, at, channels)
                    else:
                        add_floats(source, other, at, channels)
                    normalize(at, norm1, bias1, at, channels, eps)
                    if halves:
                        round_floats(at, rounded + 4 * i * depth1, channels)
                        pad_halves(rounded + 4 * i * depth1, channels)
                if halves:  # columns beyond the hidden ones are 0, as gelu(0) is
                    linear(
                        which, GELU_HALVES, rounded, 4 * depth1, count, depth1, args[WEIGHT1], args[BIAS1], columns1,
                        inner, 2 * columns1,
                    )  # fmt: skip
                else:
                    linear(
                        which, GELU, hidden, 4 * depth1, count, depth1, args[WEIGHT1], args[BIAS1], columns1, inner,
                        4 * columns1,
                    )  # fmt: skip
                linear(
                    which, PLAIN, inner, number * columns1, count, depth2, args[WEIGHT2], args[BIAS2], columns2, last,
                    4 * columns2,
                )  # fmt: skip
                for i in range(count):
                    at = last + 4 * i * columns2
                    add_floats(at, hidden + 4 * i * channels, at, channels)
                    target = args[OUT] + (first + i) * step
                    if halves:
                        normalize(at, norm2, bias2, at, channels, eps)
                        round_floats(at, target, channels)
                    else:
                        normalize(at, norm2, bias2, target, channels, eps)

    return norm_ffn
