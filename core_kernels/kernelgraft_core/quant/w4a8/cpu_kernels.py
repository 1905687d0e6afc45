"""The CPU kernels of W4A8 and W8A8, compiled by numba: activations to int8, then products of bytes.

A call is two kernels, one after the other: what :func:`tile_kernel` gives for activations, then :func:`rows_kernel`.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import Any

import numba
import numpy as np

from kernelgraft_core.quant.packed import cpu_kernels as packed_kernels
from kernelgraft_core.quant.packed import cpu_numbers
from kernelgraft_core.quant.packed.cpu_kernels import load_floats, store_floats
from kernelgraft_core.quant.packed.cpu_numbers import RUN, float_of_half, largest_magnitude, round_bytes
from kernelgraft_core.runtime import cpu_vectors
from kernelgraft_core.runtime.native import cpu_kernel, pointer

from . import cpu_panels, cpu_tile
from .cpu_panels import BYTES, GROUP_SUMS, GROUPS, NIBBLES, ROWS, TOGETHER
from .cpu_tile import BYTE_SETS, SHIFT, SUMMED_TILES, ByteSet, expand_panel, multiply_tile

LARGEST = np.float32(127)  # what a token's largest magnitude becomes
AHEAD = 1536  # bytes that bytes are fetched ahead for few tokens, for which they come too fast for whole panels
EXPAND_TOKENS = 24  # from here on nibbles become bytes once for all tiles

# What a launch tells the kernels: one int64 array, in this order. Q is where int8 activations are or go, in rows of K;
# TILES where they are kept in tiles, K rounded up to PADDED; PART_SUMS, where it is not 0, where the sums of
# activations over each group are kept.
(TASK, TOKENS, K, PADDED, ROW_COUNT, GROUP_COUNT, WORDS, SCALE, GROUP_SCALE, GROUP_ZERO, ZERO,
 X, KIND, Q, X_SCALE, X_SUMS, TILES, PART_SUMS, OUT, OUT_KIND, BIAS, BIAS_KIND,
) = range(22)  # fmt: skip

# numba keeps a compiled kernel until the file that it is written in changes; these generate parts of it, or hold
# numbers that are compiled into it.
_SOURCES = (cpu_panels, cpu_tile, cpu_numbers, cpu_vectors, packed_kernels)
GENERATORS = hashlib.sha256(b"".join(Path(str(m.__file__)).read_bytes() for m in _SOURCES)).hexdigest()


@numba.njit(inline="always")
def _tile(t: int, tokens: int, sizes: Any) -> tuple[int, int]:
    """The first token and the size of tile ``t``: the largest tiles come first."""
    first = 0
    for size in sizes:
        count = (tokens - first) // size
        if t < count:
            return first + t * size, size
        t -= count
        first += count * size
    return first, 0


@numba.njit(inline="always")
def _spread(rows: Any, args: Any, first: int, size: int) -> None:
    """Int8 ``rows`` of a tile, padded, to where it is kept, four columns of one token after those of another."""
    padded, groups = args[PADDED], args[GROUP_COUNT]
    words = rows.view(np.int32)
    tile = numba.carray(pointer(args[TILES] + first * padded), (padded // 4 * size,), np.int32)
    for i in range(padded // 4):
        for t in range(size):
            tile[i * size + t] = words[t, i]
    if args[PART_SUMS]:
        sums = numba.carray(pointer(args[PART_SUMS] + 4 * first * groups), (size, groups), np.int32)
        for t in range(size):
            for g in range(groups):
                total = np.int32(0)
                for j in range(g * (padded // groups), (g + 1) * (padded // groups)):
                    total += np.int32(rows[t, j])
                sums[t, g] = total


@numba.njit(inline="always")
def _quantize_row(row: Any, q: int) -> tuple[np.float32, np.int32]:
    """Float32 ``row``, whose length is a multiple of RUN, to as many int8 at address ``q``; the scale and the sum."""
    as_bits = np.empty(1, np.int32)
    as_bits[0] = largest_magnitude(row.ctypes.data, row.size)
    largest = as_bits.view(np.float32)[0]
    if not np.isfinite(largest):
        zeros = numba.carray(pointer(q), (row.size,), np.int8)
        zeros[:] = np.int8(0)
        return np.float32(np.nan), np.int32(0)
    scale = largest / LARGEST if largest > np.float32(0) else np.float32(1)
    return scale, round_bytes(row.ctypes.data, q, row.size, scale)


@functools.cache
def quantize_kernel() -> Any:
    """The kernel that quantizes activations, each token for itself."""
    generated_by = GENERATORS

    @cpu_kernel()
    def quantize_tokens(start: int, stop: int, args: Any) -> None:
        """Tokens ``start`` to ``stop`` of ``X (TOKENS, K)`` to ``Q (TOKENS, K)``, ``X_SCALE`` and ``X_SUMS``."""
        _ = generated_by
        tokens, k, kind = args[TOKENS], args[K], args[KIND]
        whole, item = (k + RUN - 1) // RUN * RUN, 4 if kind == packed_kernels.FLOAT else 2
        row, q = np.zeros(whole, np.float32), np.zeros(whole, np.int8)
        scales = numba.carray(pointer(args[X_SCALE]), (tokens,), np.float32)
        sums = numba.carray(pointer(args[X_SUMS]), (tokens,), np.int32)
        for m in range(start, stop):
            load_floats(row, args[X] + m * k * item, kind, k)
            if k == whole:
                scales[m], sums[m] = _quantize_row(row, args[Q] + m * k)
            else:
                scales[m], sums[m] = _quantize_row(row, q.ctypes.data)
                out = numba.carray(pointer(args[Q] + m * k), (k,), np.int8)
                out[:] = q[:k]

    return quantize_tokens


@functools.cache
def tile_kernel(sizes: tuple[int, ...], quantizes: bool) -> Any:
    """The kernel that lays activations out in tiles of ``sizes``, and quantizes them first."""
    generated_by = GENERATORS

    @cpu_kernel()
    def fill_tiles(start: int, stop: int, args: Any) -> None:
        """Tiles ``start`` to ``stop`` of ``X (TOKENS, K)``, with ``X_SCALE`` and ``X_SUMS``, or of ``Q``."""
        _ = generated_by
        tokens, k, kind = args[TOKENS], args[K], args[KIND]
        whole, item = (k + RUN - 1) // RUN * RUN, 4 if kind == packed_kernels.FLOAT else 2
        row, rows = np.zeros(whole, np.float32), np.zeros((sizes[0], whole), np.int8)
        rows_at = rows.ctypes.data
        scales = numba.carray(pointer(args[X_SCALE]), (tokens,), np.float32)
        sums = numba.carray(pointer(args[X_SUMS]), (tokens,), np.int32)
        for tile in range(start, stop):
            first, size = _tile(tile, tokens, sizes)
            for t in range(size):
                if quantizes:
                    load_floats(row, args[X] + (first + t) * k * item, kind, k)
                    scales[first + t], sums[first + t] = _quantize_row(row, rows_at + t * whole)
                else:
                    rows[t, :k] = numba.carray(pointer(args[Q] + (first + t) * k), (k,), np.int8)
            _spread(rows, args, first, size)

    return fill_tiles


@functools.cache
def rows_kernel(known: ByteSet, form: int) -> Any:
    """The kernel for one form of weight."""
    which, generated_by, sizes, panels = BYTE_SETS.index(known), GENERATORS, known.tiles, known.panels
    width, step = ROWS * known.panels, 4 if form == BYTES else 8
    # What the products of unsigned bytes have too much.
    shift = np.int32(SHIFT if known.isa.accumulates and form != NIBBLES else 0)
    in_groups, few = form == GROUPS, SUMMED_TILES[0]

    @cpu_kernel()
    def multiply_rows(start: int, stop: int, args: Any) -> None:
        """Rows ``width * start`` to ``width * stop`` against all tokens into ``OUT (TOKENS, ROW_COUNT)``."""
        _ = generated_by
        tokens, padded, rows, kind = args[TOKENS], args[PADDED], args[ROW_COUNT], args[OUT_KIND]
        groups, item = args[GROUP_COUNT], 4 if kind == packed_kernels.FLOAT else 2
        panel_bytes, steps = ROWS * padded // (step // 4), padded // groups // step
        expand = in_groups and tokens >= EXPAND_TOKENS
        sum_parts = in_groups and args[PART_SUMS] != 0
        expanded = np.empty(width * padded if expand else 1, np.uint8)
        x_scale = numba.carray(pointer(args[X_SCALE]), (tokens,), np.float32)
        x_sums = numba.carray(pointer(args[X_SUMS]), (tokens,), np.int32)
        halves = numba.carray(pointer(args[SCALE]), (rows,), np.uint16)
        zeros = numba.carray(pointer(args[ZERO]), (rows,), np.uint8)
        sums = np.empty((sizes[0], width), np.int32)
        values, bias = np.empty(width, np.float32), np.zeros(width, np.float32)
        scale, zero = np.zeros(width, np.float32), np.zeros(width, np.int32)
        # Each array is also used by name in the loop: numba frees one after its last use.
        sums_at, expanded_at = sums.ctypes.data, expanded.ctypes.data
        for panel in range(start, stop):
            first = panel * width
            count = min(width, rows - first)
            zero[:] = shift
            for r in range(count):
                scale[r] = float_of_half(halves[first + r])
                if form == NIBBLES:
                    zero[r] = np.int32(zeros[first + r])
            if args[BIAS]:
                at = args[BIAS] + first * (4 if args[BIAS_KIND] == packed_kernels.FLOAT else 2)
                load_floats(bias, at, args[BIAS_KIND], count)
            words = args[WORDS] + panel * panels * panel_bytes
            in_pair = first // TOGETHER * TOGETHER * groups + first % TOGETHER
            scales_at, zeros_at = args[GROUP_SCALE] + in_pair, args[GROUP_ZERO] + in_pair
            if expand:
                for p in range(panels):
                    expand_panel(
                        which, words + p * panel_bytes, scales_at + p * ROWS, zeros_at + p * ROWS, TOGETHER, groups,
                        steps, expanded_at + p * ROWS * padded,
                    )  # fmt: skip
                expanded[0] = expanded[0]
            m, tile = 0, 0
            while m < tokens:
                _, size = _tile(tile, tokens, sizes)
                x, excess_count = args[TILES] + m * padded, 1
                # While the first tile is multiplied, the next panels are fetched: memory and arithmetic overlap.
                ahead, ahead_step, apart = words + panels * panel_bytes, panels * 4 * ROWS, 4 * ROWS
                if m > 0:
                    ahead, ahead_step = x, 0
                elif form == BYTES and size <= few:
                    ahead, ahead_step, apart = words + AHEAD, 4 * ROWS, panel_bytes
                if expand:
                    multiply_tile(
                        which, BYTES, size, expanded_at, ROWS * padded, 0, 0, 0, 1, padded // 4, x, 0, ahead,
                        ahead_step // 2, apart, sums_at,
                    )  # fmt: skip
                elif sum_parts and size <= few:
                    excess_count = 0
                    multiply_tile(
                        which, GROUP_SUMS, size, words, panel_bytes, scales_at, zeros_at, TOGETHER, groups, steps, x,
                        args[PART_SUMS] + 4 * m * groups, ahead, ahead_step, apart, sums_at,
                    )  # fmt: skip
                else:
                    multiply_tile(
                        which, form, size, words, panel_bytes, scales_at, zeros_at, TOGETHER, groups, steps, x, 0,
                        ahead, ahead_step, apart, sums_at,
                    )  # fmt: skip
                for t in range(size):
                    excess = np.int32(excess_count) * x_sums[m + t]
                    for r in range(width):
                        values[r] = np.float32(sums[t, r] - zero[r] * excess) * x_scale[m + t] * scale[r]
                    store_floats(args[OUT] + ((m + t) * rows + first) * item, kind, values, bias, count)
                m += size
                tile += 1

    return multiply_rows
