"""The CPU kernels of the 4-bit cache, compiled by numba: storing rows, attention over them, and merging its parts.

Attention is two kernels, one after the other. :func:`attend_kernel` goes over parts, each a run of tokens of one
sequence and one key-value head, for all queries of that head; :func:`merge_kernel` puts the parts of a query together
by their log-sum-exp and adds the queries' own tokens, which are not quantized.
"""

from __future__ import annotations

import functools
import hashlib
import math
from pathlib import Path
from typing import Any

import numba
import numpy as np

from kernelgraft_core.quant.packed import cpu_numbers
from kernelgraft_core.quant.packed.cpu_numbers import float_of_half, half_of_float
from kernelgraft_core.runtime import cpu_vectors
from kernelgraft_core.runtime.cpu_vectors import INSTRUCTION_SETS, InstructionSet
from kernelgraft_core.runtime.native import cpu_kernel, pointer

from . import cpu_steps
from .cpu_steps import (
    LARGEST,
    LOWEST,
    MEAN_NIBBLE,
    RUN,
    TILE,
    add_values,
    find_range,
    multiply_keys,
    pack_values,
    split_words,
    unpack_scales,
    weigh_tokens,
)

ROWS = 4  # queries that share one pass over keys and values
HALF_LARGEST = np.float32(65504)

# What kernels are told: one int64 array, in this order; behind TASK it begins with where the cache is. Attention goes
# on with float32 queries, keys and values, and FACTORS: float32 scale and cap of scores to base 2, the
# cap 0 for none. WINDOW 0 is none. PARTIAL is float32 (rows, head size + 2): sums, largest score, sum of weights.
(TASK, CACHE, BLOCK_STRIDE, HEAD_STRIDE, ROW_STRIDE, BLOCK_SIZE, KV_HEADS,
 QUERY, KEY, VALUE, GROUP, TABLES, TABLE_WIDTH, PARTS, TOKENS, FACTORS, CAUSAL, WINDOW, PARTIAL, OUT,
) = range(20)  # fmt: skip
SOURCE_KEY, SOURCE_VALUE, SLOTS = QUERY, KEY, VALUE  # for append
# A part: a row of the block table, its first query, how many there are, position of the first, the tokens that are
# read, and where its results begin in PARTIAL.
PART_TABLE, PART_QUERY, PART_QUERIES, PART_OFFSET, PART_FIRST, PART_LAST, PART_ROW, PART_SIZE = range(8)
# A query: its number in its part and how many there are, where its first part's results begin and how many parts it
# has; then its number in its sequence, the sequence's first query, and how many of those have keys of their own.
(TOKEN_NUMBER, TOKEN_QUERIES, TOKEN_ROW, TOKEN_PARTS, TOKEN_POSITION, TOKEN_FIRST, TOKEN_OWN, TOKEN_SIZE,
) = range(8)  # fmt: skip

# numba keeps a compiled kernel until the file that it is written in changes; these generate parts of it.
GENERATORS = hashlib.sha256(
    b"".join(Path(str(module.__file__)).read_bytes() for module in (cpu_steps, cpu_vectors, cpu_numbers))
).hexdigest()


@numba.njit(inline="always")
def _clamp_half(x: Any) -> Any:
    return min(max(np.float32(x), -HALF_LARGEST), HALF_LARGEST)


@numba.njit
def _store_row(source: int, target: int, scales: int, count: int) -> None:
    """``count`` floats to nibbles at ``target``; scale and low, float16, at ``scales``."""
    smallest, largest, finite = find_range(source, count)
    halves = np.empty(2, np.uint16)
    low = half_of_float(_clamp_half(smallest))
    scale = half_of_float(max(_clamp_half(largest) - float_of_half(low), np.float32(0)) / np.float32(15))
    step = float_of_half(scale)
    if finite == np.float32(0) and step > np.float32(0):
        pack_values(source, target, count, float_of_half(low), step)
    else:
        nibbles = numba.carray(pointer(target), (count // 2,), np.uint8)
        for i in range(count // 2):
            nibbles[i] = 0
    if finite != np.float32(0):
        low, scale = np.uint16(0), np.uint16(0x7E00)  # NaN
    halves[0], halves[1] = scale, low
    numbers = numba.carray(pointer(scales), (4,), np.uint8)
    as_bytes = halves.view(np.uint8)
    for i in range(4):
        numbers[i] = as_bytes[i]


@functools.cache
def append_kernel(head_size: int) -> Any:
    """The kernel that stores keys and values of a head size, a multiple of 8."""
    generated_by = GENERATORS

    @cpu_kernel(fastmath=False)
    def append_rows(start: int, stop: int, args: Any) -> None:
        """Rows ``start`` to ``stop`` of float32 ``(T, KV_HEADS, head_size)`` to where ``SLOTS`` sends their tokens."""
        _ = generated_by
        heads, block_size = args[KV_HEADS], args[BLOCK_SIZE]
        slots = numba.carray(pointer(args[SLOTS]), (stop // heads + 1,), np.int64)
        for row in range(start, stop):
            slot = slots[row // heads]
            if slot >= 0:
                at = args[CACHE] + slot // block_size * args[BLOCK_STRIDE] + row % heads * args[HEAD_STRIDE]
                at += slot % block_size * args[ROW_STRIDE]
                source = 4 * row * head_size
                _store_row(args[SOURCE_KEY] + source, at, at + head_size, head_size)
                _store_row(args[SOURCE_VALUE] + source, at + head_size // 2, at + head_size + 4, head_size)

    return append_rows


@numba.njit
def _round_query(row: Any, planes: Any, lanes: int, factor: Any) -> tuple[Any, Any, Any]:
    """A query to integers by planes; what products with them are multiplied with, what is added, and its sum."""
    largest, total = np.float32(0), np.float32(0)
    for x in row:
        total += x
        largest = max(largest, abs(x))
    if not np.isfinite(total) or not np.isfinite(largest):
        planes[:] = 0
        return np.float32(np.nan), np.float32(np.nan), np.float32(np.nan)
    step, rest = max(largest, np.float32(1e-30)) / np.float32(LARGEST), np.float32(0)
    for d in range(row.size):
        word = d // 4
        nearest = np.rint(row[d] / step)
        planes[(word // lanes * 4 + d % 4) * lanes + word % lanes] = np.int16(nearest)
        rest += row[d] / step - nearest
    return factor * step, factor * step * rest * np.float32(MEAN_NIBBLE), factor * total


@numba.njit(inline="always")
def _sees(position: int, keys: int, causal: int, window: int) -> tuple[int, int]:
    """``Scoring.sees`` for compiled code; a window of 0 is none."""
    first = max(0, position - window + 1) if window else 0
    last = min(keys, position + window) if window else keys
    return first, min(last, position + 1) if causal else last


@numba.njit
def _find_rows(addresses: Any, table: Any, base: int, first: int, last: int, args: Any) -> None:
    """Where the rows of TILE tokens from ``first`` on are; those from ``last`` on as the last one's."""
    count = min(TILE, last - first)
    block_size, row_stride = args[BLOCK_SIZE], args[ROW_STRIDE]
    block, inside = first // block_size, first % block_size
    t, at = 0, np.int64(0)
    while t < count:
        stop = min(count, t + block_size - inside)
        at = base + np.int64(table[block]) * args[BLOCK_STRIDE] + inside * row_stride
        for i in range(t, stop):
            addresses[i] = at + (i - t) * row_stride
        at += (stop - t - 1) * row_stride
        t, inside, block = stop, 0, block + 1
    for i in range(count, TILE):
        addresses[i] = at


@functools.cache
def attend_kernel(isa: InstructionSet, head_size: int) -> Any:
    """The kernel for a head size, a multiple of 8."""
    which, generated_by, lanes = INSTRUCTION_SETS.index(isa), GENERATORS, isa.lanes
    padded = 4 * lanes * len(split_words(head_size, lanes))  # of a query in planes
    width = lanes // 2
    summed = 4 * width * len(split_words(head_size, width))  # of sums in planes

    @cpu_kernel(fastmath={"contract"})
    def attend_parts(start: int, stop: int, args: Any) -> None:
        """Items ``start`` to ``stop``: part ``i // KV_HEADS``, head ``i % KV_HEADS``."""
        _ = generated_by
        heads, group = args[KV_HEADS], args[GROUP]
        causal, window = args[CAUSAL], args[WINDOW]
        parts = numba.carray(pointer(args[PARTS]), (stop // heads + 1, PART_SIZE), np.int64)
        factors = numba.carray(pointer(args[FACTORS]), (2,), np.float32)
        factor, cap = factors[0], factors[1]
        addresses = np.empty((2, TILE), np.int64)  # of this tile and the next
        products, weights = np.empty((ROWS, TILE), np.float32), np.empty((ROWS, TILE), np.int16)
        scales, row_factors = np.empty((4, TILE), np.float32), np.empty((ROWS, 2), np.float32)
        # numba frees an array after its last use by name: all are used again after the loop.
        addresses_at, scales_at = addresses.ctypes.data, scales.ctypes.data
        products_at, weights_at, row_factors_at = products.ctypes.data, weights.ctypes.data, row_factors.ctypes.data
        for item in range(start, stop):
            part, head = parts[item // heads], item % heads
            queries, first_query, offset = part[PART_QUERIES], part[PART_QUERY], part[PART_OFFSET]
            rows = queries * group
            room = (rows + ROWS - 1) // ROWS * ROWS
            planes, sums = np.zeros((room, padded), np.int16), np.zeros((room, summed), np.float32)
            query_numbers = np.zeros((room, 3), np.float32)
            largest, total, lower = np.full(room, LOWEST, np.float32), np.zeros(room), np.zeros(room)
            planes_at, sums_at = planes.ctypes.data, sums.ctypes.data
            query = numba.carray(pointer(args[QUERY]), (first_query + queries, heads * group, head_size), np.float32)
            for row in range(rows):
                values = query[first_query + row // group, head * group + row % group]
                numbers = _round_query(values, planes[row], lanes, factor)
                query_numbers[row, 0], query_numbers[row, 1], query_numbers[row, 2] = numbers
            table = numba.carray(
                pointer(args[TABLES] + 4 * part[PART_TABLE] * args[TABLE_WIDTH]), (args[TABLE_WIDTH],), np.int32
            )
            base = args[CACHE] + head * args[HEAD_STRIDE]
            turn = 0
            _find_rows(addresses[0], table, base, part[PART_FIRST], part[PART_LAST], args)
            for first in range(part[PART_FIRST], part[PART_LAST], TILE):
                count = min(TILE, part[PART_LAST] - first)
                filled = (count + RUN - 1) // RUN * RUN
                at = ahead = addresses_at + 8 * TILE * turn
                turn = 1 - turn
                if first + TILE < part[PART_LAST]:
                    ahead = addresses_at + 8 * TILE * turn
                    _find_rows(addresses[turn], table, base, first + TILE, part[PART_LAST], args)
                unpack_scales(at, head_size, filled // 4, scales_at)
                row = 0
                while row < rows:
                    left = rows - row
                    step = 1 if left == 1 else 2 if left == 2 else ROWS
                    row_planes, row_sums = planes_at + 2 * padded * row, sums_at + 4 * summed * row
                    if step == 1:
                        multiply_keys(which, head_size, 1, at, ahead, filled // 4, row_planes, products_at)
                    elif step == 2:
                        multiply_keys(which, head_size, 2, at, ahead, filled // 4, row_planes, products_at)
                    else:
                        multiply_keys(which, head_size, ROWS, at, ahead, filled // 4, row_planes, products_at)
                    for r in range(step):
                        row_factors[r, 0], row_factors[r, 1] = np.float32(1), np.float32(0)
                        low, high = 0, 0
                        if r < left:
                            low, high = _sees(offset + (row + r) // group, part[PART_LAST], causal, window)
                        low, high = max(low - first, 0), min(high - first, count)
                        if low >= high:
                            weights[r, :filled] = 0
                            continue
                        here = row + r
                        scale, rest, whole = query_numbers[here]
                        if cap > np.float32(0):
                            best, weight, lows, unit = weigh_tokens(
                                1, products_at + 4 * TILE * r, scales_at, filled // RUN, low, high,
                                scale, rest, whole, cap, largest[here], weights_at + 2 * TILE * r,
                            )  # fmt: skip
                        else:
                            best, weight, lows, unit = weigh_tokens(
                                0, products_at + 4 * TILE * r, scales_at, filled // RUN, low, high,
                                scale, rest, whole, cap, largest[here], weights_at + 2 * TILE * r,
                            )  # fmt: skip
                        decay = np.float32(2.0 ** (largest[here] - best))
                        row_factors[r, 0], row_factors[r, 1] = decay, unit
                        total[here] = total[here] * decay + weight
                        lower[here] = lower[here] * decay + lows
                        largest[here] = best
                    if step == 1:
                        add_values(which, head_size, 1, at, filled // 2, weights_at, row_factors_at, row_sums)
                    elif step == 2:
                        add_values(which, head_size, 2, at, filled // 2, weights_at, row_factors_at, row_sums)
                    else:
                        add_values(which, head_size, ROWS, at, filled // 2, weights_at, row_factors_at, row_sums)
                    row += step
            for row in range(rows):
                slot = part[PART_ROW] + (row // group * heads + head) * group + row % group
                out = numba.carray(pointer(args[PARTIAL] + 4 * slot * (head_size + 2)), (head_size + 2,), np.float32)
                for d in range(head_size):
                    word = d // 4
                    out[d] = sums[row, (word // width * 4 + d % 4) * width + word % width] + np.float32(lower[row])
                out[head_size], out[head_size + 1] = largest[row], np.float32(total[row])
            planes[0, 0] = 0
        addresses[0, 0] = weights[0, 0]
        scales[0, 0] = products[0, 0] + row_factors[0, 0]

    return attend_parts


@functools.cache
def merge_kernel(head_size: int) -> Any:
    """The kernel that puts the parts of each query together with its own chunk, for a head size."""

    @cpu_kernel(fastmath={"contract", "reassoc"})
    def merge_parts(start: int, stop: int, args: Any) -> None:
        """Items ``start`` to ``stop``: query ``i // heads``, head ``i % heads``, to float32 ``OUT``."""
        group, kv_heads = args[GROUP], args[KV_HEADS]
        heads = group * kv_heads
        causal, window = args[CAUSAL], args[WINDOW]
        tokens = numba.carray(pointer(args[TOKENS]), (stop // heads + 1, TOKEN_SIZE), np.int64)
        factors = numba.carray(pointer(args[FACTORS]), (2,), np.float32)
        factor, cap = factors[0], factors[1]
        result = np.empty(head_size, np.float32)
        for item in range(start, stop):
            token, head = tokens[item // heads], item % heads
            largest, total = np.float32(LOWEST), np.float32(0)
            result[:] = 0
            for part in range(token[TOKEN_PARTS]):
                slot = token[TOKEN_ROW] + (part * token[TOKEN_QUERIES] + token[TOKEN_NUMBER]) * heads + head
                found = numba.carray(pointer(args[PARTIAL] + 4 * slot * (head_size + 2)), (head_size + 2,), np.float32)
                best = max(largest, found[head_size])
                old, new = np.float32(2.0 ** (largest - best)), np.float32(2.0 ** (found[head_size] - best))
                for d in range(head_size):
                    result[d] = result[d] * old + found[d] * new
                total = total * old + found[head_size + 1] * new
                largest = best
            size = token[TOKEN_OWN]
            if size:
                shape = (token[TOKEN_FIRST] + size, kv_heads, head_size)
                keys, values = (
                    numba.carray(pointer(args[KEY]), shape, np.float32),
                    numba.carray(pointer(args[VALUE]), shape, np.float32),
                )
                query = numba.carray(pointer(args[QUERY] + 4 * item * head_size), (head_size,), np.float32)
                low, high = _sees(token[TOKEN_POSITION], size, causal, window)
                for other in range(low, high):
                    key = keys[token[TOKEN_FIRST] + other, head // group]
                    value = values[token[TOKEN_FIRST] + other, head // group]
                    score = np.float32(0)
                    for d in range(head_size):
                        score += query[d] * key[d]
                    score *= factor
                    if cap > np.float32(0):
                        score = cap * np.float32(math.tanh(score * np.float32(0.5 * math.log(2))))
                    best = max(largest, score)
                    old, new = np.float32(2.0 ** (largest - best)), np.float32(2.0 ** (score - best))
                    for d in range(head_size):
                        result[d] = result[d] * old + value[d] * new
                    total = total * old + new
                    largest = best
            out = numba.carray(pointer(args[OUT] + 4 * item * head_size), (head_size,), np.float32)
            inverse = np.float32(0) if total == np.float32(0) else np.float32(1) / total
            for d in range(head_size):
                out[d] = result[d] * inverse

    return merge_parts
