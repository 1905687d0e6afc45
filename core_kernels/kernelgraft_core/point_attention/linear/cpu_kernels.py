"""The CPU kernel of linear layers, compiled by numba."""

from __future__ import annotations

import functools
from typing import Any

from kernelgraft_core.point_attention.cpu_rows import GENERATORS, copy_words
from kernelgraft_core.point_attention.cpu_tile import PLAIN, TILE_SETS, TileSet, linear
from kernelgraft_core.runtime.native import cpu_kernel

# What the kernel is told: one int64 array, in this order. LAST_X, LAST_OUT: room for the rows of a tile, for the last
# ones where they do not fill one: whole blocks are read and written.
(X, X_STEP, OUT, ROWS, TILE_ROWS, DEPTH, WEIGHT, BIAS, COLUMNS, LAST_X, LAST_OUT, NUMBERS) = range(12)


@functools.cache
def linear_kernel(floats: TileSet) -> Any:
    which, generated_by = TILE_SETS.index(floats), GENERATORS

    @cpu_kernel(fastmath={"contract"})
    def row_linear(start: int, stop: int, args: Any) -> None:
        """Tiles ``start`` to ``stop``."""
        _ = generated_by
        tile_rows, depth, columns, step = args[TILE_ROWS], args[DEPTH], args[COLUMNS], args[X_STEP]
        for tile in range(start, stop):
            first = tile * tile_rows
            count = min(args[ROWS] - first, tile_rows)
            x, out = args[X] + first * step, args[OUT] + 4 * first * columns
            if count == tile_rows:
                linear(
                    which, PLAIN, x, step, count, depth, args[WEIGHT], args[BIAS], columns, out, 4 * columns
                )  # fmt: skip
            else:
                for i in range(count):
                    copy_words(x + i * step, args[LAST_X] + 4 * i * depth, depth)
                linear(
                    which, PLAIN, args[LAST_X], 4 * depth, count, depth, args[WEIGHT], args[BIAS], columns,
                    args[LAST_OUT], 4 * columns,
                )  # fmt: skip
                copy_words(args[LAST_OUT], out, count * columns)

    return row_linear
