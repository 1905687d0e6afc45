"""The CPU kernels of sparse convolution, compiled by numba."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import Any

import numba
import numpy as np

from kernelgraft_core.runtime import cpu_vectors
from kernelgraft_core.runtime.native import cpu_kernel, pointer

from . import cpu_tile
from .cpu_tile import FLOAT_SETS, FloatSet, add_outer, add_products

# What a launch tells the kernels: one int64 array, in this order. Pairs of a tile of output rows are kept tap by tap;
# those of tap k of tile t are PAIR_STARTS[t * TAPS + k] to the next.
(TASK, TILE_ROWS, OUT_ROWS, TAPS, INPUTS, OUTPUTS, PAIR_STARTS, MIRRORED, GROUPS, IN_CHANNELS, OUT_CHANNELS, X, WEIGHT,
 BIAS, OUT, PARTIAL, PARTS, TILES, RELU,
) = range(19)  # fmt: skip

# numba keeps a compiled kernel until the file that it is written in changes; these generate parts of it.
GENERATORS = hashlib.sha256(
    b"".join(Path(str(module.__file__)).read_bytes() for module in (cpu_tile, cpu_vectors))
).hexdigest()

# To make the pairs: what the kernels below are told.
(P_TASK, P_TILE_ROWS, P_ROWS, P_TAPS, P_NEIGHBORS, P_COUNTS, P_STARTS, P_INPUTS, P_OUTPUTS) = range(9)


@cpu_kernel()
def count_pairs(start: int, stop: int, args: Any) -> None:
    """How many pairs tiles ``start`` to ``stop`` have of each tap."""
    taps, tile, rows = args[P_TAPS], args[P_TILE_ROWS], args[P_ROWS]
    for t in range(start, stop):
        counts = numba.carray(pointer(args[P_COUNTS] + 8 * t * taps), (taps,), np.int64)
        counts[:] = 0
        first, last = t * tile, min(rows, (t + 1) * tile)
        neighbors = numba.carray(pointer(args[P_NEIGHBORS] + 4 * first * taps), (last - first, taps), np.int32)
        for i in range(last - first):
            for k in range(taps):
                counts[k] += np.int64(neighbors[i, k] >= 0)


@cpu_kernel()
def fill_pairs(start: int, stop: int, args: Any) -> None:
    """Write those pairs, tap by tap."""
    taps, tile, rows = args[P_TAPS], args[P_TILE_ROWS], args[P_ROWS]
    for t in range(start, stop):
        starts = numba.carray(pointer(args[P_STARTS] + 8 * t * taps), (taps + 1,), np.int64)
        first, last = t * tile, min(rows, (t + 1) * tile)
        neighbors = numba.carray(pointer(args[P_NEIGHBORS] + 4 * first * taps), (last - first, taps), np.int32)
        end = starts[taps]
        inputs = numba.carray(pointer(args[P_INPUTS]), (end,), np.int32)
        outputs = numba.carray(pointer(args[P_OUTPUTS]), (end,), np.int32)
        for k in range(taps):
            at, full = starts[k], starts[k + 1]
            i = 0
            # Every row is written, and the place moves on where it counts: no branch to guess wrong.
            while at < full:
                other = neighbors[i, k]
                inputs[at] = other
                outputs[at] = np.int32(first + i)
                at += np.int64(other >= 0)
                i += 1


@functools.cache
def forward_kernel(known: FloatSet) -> Any:
    """The kernel that computes outputs; channels of every group are multiples of a vector."""
    which, generated_by, lanes = FLOAT_SETS.index(known), GENERATORS, known.lanes
    widths = known.widths
    first_width, second_width = widths[0], widths[1]
    third, last_width = len(widths) > 2, len(widths) - 1

    @cpu_kernel(fastmath={"contract"})
    def convolve(start: int, stop: int, args: Any) -> None:
        """Tiles ``start`` to ``stop`` of ``OUT (OUT_ROWS, GROUPS * OUT_CHANNELS)``; channels are those of a group."""
        _ = generated_by
        taps, groups, cin, cout = args[TAPS], args[GROUPS], args[IN_CHANNELS], args[OUT_CHANNELS]
        x_step, out_step, weight_step = 4 * groups * cin, 4 * groups * cout, 4 * cout
        starts = numba.carray(pointer(args[PAIR_STARTS]), (args[TILES] * taps + 1,), np.int64)
        bias = numba.carray(pointer(args[BIAS]), (groups * cout,), np.float32)
        for t in range(start, stop):
            first, last = t * args[TILE_ROWS], min(args[OUT_ROWS], (t + 1) * args[TILE_ROWS])
            out = numba.carray(pointer(args[OUT] + first * out_step), (last - first, groups * cout), np.float32)
            if args[BIAS]:
                for i in range(last - first):
                    out[i] = bias
            else:
                out[:] = np.float32(0)
            for k in range(taps):
                begin = starts[t * taps + k]
                count = starts[t * taps + k + 1] - begin
                if count == 0:
                    continue
                inputs, outputs = args[INPUTS] + 4 * begin, args[OUTPUTS] + 4 * begin
                tap = taps - 1 - k if args[MIRRORED] else k
                for g in range(groups):
                    x, weight = args[X] + 4 * g * cin, args[WEIGHT] + 4 * (tap * groups + g) * cin * cout
                    at, channel = args[OUT] + 4 * g * cout, 0
                    while channel + first_width * lanes <= cout:
                        add_products(
                            which, 0, inputs, outputs, count, x, x_step, weight + 4 * channel, weight_step,
                            at + 4 * channel, out_step, cin,
                        )  # fmt: skip
                        channel += first_width * lanes
                    while channel + second_width * lanes <= cout:
                        add_products(
                            which, 1, inputs, outputs, count, x, x_step, weight + 4 * channel, weight_step,
                            at + 4 * channel, out_step, cin,
                        )  # fmt: skip
                        channel += second_width * lanes
                    if third and channel + lanes <= cout:
                        add_products(
                            which, last_width, inputs, outputs, count, x, x_step, weight + 4 * channel,
                            weight_step, at + 4 * channel, out_step, cin,
                        )  # fmt: skip
            if args[RELU]:
                for i in range(last - first):
                    for channel in range(groups * cout):
                        value = out[i, channel]
                        out[i, channel] = value if value > 0 or value != value else np.float32(0)

    return convolve


@functools.cache
def weight_kernel(known: FloatSet) -> Any:
    """The kernel that sums the gradient of a weight over parts of the tiles."""
    which, generated_by, lanes = FLOAT_SETS.index(known), GENERATORS, known.lanes
    high, wide = known.outer

    @cpu_kernel(fastmath={"contract"})
    def sum_outer(start: int, stop: int, args: Any) -> None:
        """Parts ``start`` to ``stop`` into ``PARTIAL (PARTS, TAPS, GROUPS, IN_CHANNELS, OUT_CHANNELS)``.

        Here X is the input and OUT the gradient of the output.
        """
        _ = generated_by
        taps, groups, cin, cout = args[TAPS], args[GROUPS], args[IN_CHANNELS], args[OUT_CHANNELS]
        x_step, grad_step = 4 * groups * cin, 4 * groups * cout
        tiles, parts = args[TILES], args[PARTS]
        starts = numba.carray(pointer(args[PAIR_STARTS]), (tiles * taps + 1,), np.int64)
        for part in range(start, stop):
            sums_at = args[PARTIAL] + 4 * part * taps * groups * cin * cout
            sums = numba.carray(pointer(sums_at), (taps * groups * cin * cout,), np.float32)
            sums[:] = np.float32(0)
            for t in range(tiles * part // parts, tiles * (part + 1) // parts):
                for k in range(taps):
                    begin = starts[t * taps + k]
                    count = starts[t * taps + k + 1] - begin
                    if count == 0:
                        continue
                    inputs, outputs = args[INPUTS] + 4 * begin, args[OUTPUTS] + 4 * begin
                    for g in range(groups):
                        x, grad = args[X] + 4 * g * cin, args[OUT] + 4 * g * cout
                        at = sums_at + 4 * (k * groups + g) * cin * cout
                        channel = 0
                        while channel < cout:
                            row = 0
                            double = channel + wide * lanes <= cout
                            while row < cin:
                                place = at + 4 * (row * cout + channel)
                                if row + high <= cin and double:
                                    add_outer(
                                        which, high, wide, inputs, outputs, count, x + 4 * row, x_step,
                                        grad + 4 * channel, grad_step, place, 4 * cout,
                                    )  # fmt: skip
                                    row += high
                                elif row + high <= cin:
                                    add_outer(
                                        which, high, 1, inputs, outputs, count, x + 4 * row, x_step,
                                        grad + 4 * channel, grad_step, place, 4 * cout,
                                    )  # fmt: skip
                                    row += high
                                elif double:
                                    add_outer(
                                        which, 1, wide, inputs, outputs, count, x + 4 * row, x_step,
                                        grad + 4 * channel, grad_step, place, 4 * cout,
                                    )  # fmt: skip
                                    row += 1
                                else:
                                    add_outer(
                                        which, 1, 1, inputs, outputs, count, x + 4 * row, x_step,
                                        grad + 4 * channel, grad_step, place, 4 * cout,
                                    )  # fmt: skip
                                    row += 1
                            channel += wide * lanes if double else lanes

    return sum_outer
