"""The CPU kernels of the packed linear layers: 16-bit integer dot products, compiled by numba, no C compiler.

Activations become 16-bit block floating point: every block of at most 256 values along K, never larger than a weight
group, is scaled so that its largest magnitude is 32767. Every value is then off by at most half a step. The product
becomes ``sum(q * xq)``, exact in 32-bit integers: a lane adds at most 32 products, each below ``15 * 32768``.

    y[m, n] = sum_b  xs[m, b] * scale[n, b] * (sum_k q[n, k] * xq[m, k]  -  zero[n, b] * sum_k xq[m, k])

Where a block's largest value dwarfs the others, the token is uneven: what rounding left over becomes a second token,
quantized like the first, and its product is added. Such tokens end up more exact than the rest.

A call is two kernels, one after the other: :func:`quantize_tokens`, then what :func:`rows_kernel` gives.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import Any

import numba
import numpy as np

from kernelgraft_core.runtime import cpu_vectors
from kernelgraft_core.runtime.cpu_vectors import INSTRUCTION_SETS, InstructionSet
from kernelgraft_core.runtime.native import cpu_kernel, pointer

from . import cpu_numbers, cpu_tile
from .cpu_numbers import (
    RUN,
    float_of_half,
    half_of_float,
    largest_magnitude,
    round_run,
    spread_planes,
    unpack_scales,
)
from .cpu_tile import PANEL, QUAD, multiply_panel

TILE = 4  # tokens that share one pass over a weight row
LARGEST = 32767  # what a block's largest magnitude becomes
EVEN = 64  # a token is uneven when in some block one magnitude is more than this many times the mean of the others
SLACK = 16  # floats that a tile may read beyond its scales

FLOAT, BFLOAT, HALF = range(3)  # how activations, bias and result are stored

# What a launch tells the kernels: one int64 array, in this order. First the weight and where the result goes, which is
# all that dequantize_kernel needs. At SCRATCH, quantized activations are kept; X_SCALE, X_SHIFT,
# REST and UNEVEN are offsets into it.
(TASK, ROWS, K, GROUPS, QWEIGHT, QHIGH, SCALES, ZEROS, OUT,
 BIAS_KIND, BIAS, X, SCRATCH, TOKENS, BLOCKS, PADDED, STEPS, LANES, SPREAD, KIND, X_SCALE, X_SHIFT, REST, UNEVEN,
) = range(24)  # fmt: skip

# numba keeps a compiled kernel until the file that it is written in changes; these two generate parts of it.
GENERATORS = hashlib.sha256(
    b"".join(Path(str(module.__file__)).read_bytes() for module in (cpu_numbers, cpu_tile, cpu_vectors))
).hexdigest()


@numba.njit(inline="always")
def load_floats(target: Any, address: int, kind: int, count: int) -> None:
    """``count`` numbers of a kind at ``address`` to a float32 array."""
    if kind == BFLOAT:
        bits = target.view(np.int32)
        halves = numba.carray(pointer(address), (count,), np.uint16)
        for j in range(count):
            bits[j] = np.int32(halves[j]) << np.int32(16)
    elif kind == HALF:
        halves = numba.carray(pointer(address), (count,), np.uint16)
        for j in range(count):
            target[j] = float_of_half(halves[j])
    else:
        floats = numba.carray(pointer(address), (count,), np.float32)
        for j in range(count):
            target[j] = floats[j]


@numba.njit(inline="always")
def store_floats(address: int, kind: int, source: Any, addend: Any, count: int) -> None:
    """``source + addend``, float32, to ``count`` numbers of a kind, rounded to the nearest, ties to even."""
    if kind == BFLOAT:
        halves = numba.carray(pointer(address), (count,), np.uint16)
        total = np.empty(PANEL, np.float32)
        bits = total.view(np.int32)
        for j in range(count):
            total[j] = source[j] + addend[j]
        for j in range(count):
            word = bits[j]
            rounded = (word + np.int32(0x7FFF) + ((word >> np.int32(16)) & np.int32(1))) >> np.int32(16)
            is_nan = (word & np.int32(0x7FFFFFFF)) > np.int32(0x7F800000)
            halves[j] = np.uint16(0x7FC0) if is_nan else np.uint16(rounded)
    elif kind == HALF:
        halves = numba.carray(pointer(address), (count,), np.uint16)
        for j in range(count):
            halves[j] = half_of_float(source[j] + addend[j])
    else:
        floats = numba.carray(pointer(address), (count,), np.float32)
        for j in range(count):
            floats[j] = source[j] + addend[j]


@numba.njit
def _quantize_row(row: Any, rounded: Any, args: Any, scratch: int, slot: int, tile: int, lane: int) -> bool:
    """Float32 ``row`` to block floating point: token ``lane`` of the tile of ``tile`` tokens that begins at ``slot``.

    Returns whether it is uneven, and leaves in ``row`` what rounding dropped.
    """
    k, blocks, padded, steps = args[K], args[BLOCKS], args[PADDED], args[STEPS]
    lanes, spread = args[LANES], args[SPREAD]
    block = k // blocks
    row_at, rounded_at = row.ctypes.data, rounded.ctypes.data
    scales = numba.carray(pointer(scratch + args[X_SCALE]), ((slot + tile) * steps * spread,), np.float32)
    shifts = numba.carray(pointer(scratch + args[X_SHIFT]), ((slot + tile) * padded,), np.float32)
    scale_at, shift_at = slot * steps * spread, (slot + lane) * padded
    as_bits = np.empty(1, np.int32)
    as_float = as_bits.view(np.float32)
    uneven = False
    in_step = 4 * lanes // block if spread > 1 else 1
    copies = spread // in_step
    for i in range(blocks):
        as_bits[0] = largest_magnitude(row_at + 4 * i * block, block)
        largest, scale, total = as_float[0], np.float32(0), np.int32(0)
        if largest > np.float32(1e-30) and np.isfinite(largest):
            scale = largest / np.float32(LARGEST)
            total, sizes = round_run(
                row_at + 4 * i * block, rounded_at + 2 * i * block, block, scale, np.float32(LARGEST) / largest
            )
            if (sizes - LARGEST) * EVEN < LARGEST * (block - 1):
                uneven = True
        else:
            if not np.isfinite(largest):
                scale = np.float32(np.nan)
            for j in range(i * block, (i + 1) * block):
                rounded[j] = np.int16(0)
                row[j] = np.float32(0)
        at = scale_at + (i // in_step * tile + lane) * spread + i % in_step * copies
        for c in range(copies):
            scales[at + c] = scale
        shifts[shift_at + i] = -scale * np.float32(total)
    for i in range(blocks, padded):
        shifts[shift_at + i] = np.float32(0)
    vector, target = 8 * lanes, scratch + 2 * slot * k  # bytes, address
    whole = 2 * k // vector
    for v in range(whole):
        at = target + (v * tile + lane) * vector
        if lanes == 32:
            spread_planes(32, rounded_at + v * vector, at)
        else:
            spread_planes(16, rounded_at + v * vector, at)
    if 2 * k > whole * vector:
        spread_planes(16, rounded_at + whole * vector, target + (whole * 2 * tile + lane) * (vector // 2))
    return uneven


@numba.njit
def _unpack_panel(args: Any, first: int, width: int, per_group: int, w_scale: Any, w_shift: Any) -> None:
    """Scales of ``width`` rows from ``first`` on, one for each block, and those times the zero points."""
    groups = args[GROUPS]
    count = width * groups
    scales, zeros = args[SCALES] + 2 * first * groups, args[ZEROS] + first * groups
    if per_group == 1 and count >= RUN:
        unpack_scales(scales, zeros, w_scale.ctypes.data, w_shift.ctypes.data, count)
        return
    halves = numba.carray(pointer(scales), (count,), np.uint16)
    points = numba.carray(pointer(zeros), (count,), np.uint8)
    for i in range(count):
        scale = float_of_half(halves[i])
        for j in range(i * per_group, (i + 1) * per_group):
            w_scale[j] = scale
            w_shift[j] = scale * np.float32(points[i])


@functools.cache
def quantize_kernel() -> Any:
    """The kernel that quantizes activations."""
    generated_by = GENERATORS

    @cpu_kernel(fastmath={"contract"})
    def quantize_tokens(start: int, stop: int, args: Any) -> None:
        """Tokens ``start`` to ``stop`` of ``X (TOKENS, K)`` to block floating point, as ``multiply_panel`` takes them.

        Whole tiles of TILE tokens come first, then each of the others by itself. A block that holds a NaN or an
        infinity gets the scale NaN. Where UNEVEN becomes 1, what rounding left over of the token is a tile of its
        own, REST bytes further.
        """
        _ = generated_by
        tokens, k, kind, scratch = args[TOKENS], args[K], args[KIND], args[SCRATCH]
        row, rounded = np.empty(k, np.float32), np.empty(k, np.int16)
        uneven = numba.carray(pointer(scratch + args[UNEVEN]), (tokens,), np.uint8)
        tiled = tokens // TILE * TILE
        for m in range(start, stop):
            load_floats(row, args[X] + m * k * (4 if kind == FLOAT else 2), kind, k)
            if m < tiled:
                uneven[m] = _quantize_row(row, rounded, args, scratch, m // TILE * TILE, TILE, m % TILE)
            else:
                uneven[m] = _quantize_row(row, rounded, args, scratch, m, 1, 0)
            if uneven[m]:
                _quantize_row(row, rounded, args, scratch + args[REST], m, 1, 0)

    return quantize_tokens


@functools.cache
def rows_kernel(isa: InstructionSet, bits: int, vectors: int, parts: int) -> Any:
    """The kernel for blocks of ``vectors`` vectors, or for ``parts`` blocks in one vector, and weights of ``bits``."""
    which, generated_by = INSTRUCTION_SETS.index(isa), GENERATORS

    @cpu_kernel(fastmath={"contract", "reassoc"})
    def multiply_rows(start: int, stop: int, args: Any) -> None:
        """Weight rows ``4 * start`` to ``4 * stop`` against all tokens into ``OUT (TOKENS, ROWS)``, plus ``BIAS``.

        The last four rows overlap the four before when ROWS is not a multiple of 4.
        """
        _ = generated_by
        tokens, rows, k, groups = args[TOKENS], args[ROWS], args[K], args[GROUPS]
        blocks, padded, kind, scratch = args[BLOCKS], args[PADDED], args[KIND], args[SCRATCH]
        x_bytes, scale_bytes, shift_bytes = 2 * k, 4 * args[STEPS] * args[SPREAD], 4 * padded  # of a token
        per_group, steps, half = blocks // groups, blocks // parts, args[STEPS] - blocks // parts
        row_bytes, high_bytes = k // 4 if bits == 3 else k // 2, k // 8
        uneven = numba.carray(pointer(scratch + args[UNEVEN]), (tokens,), np.uint8)
        w_scale = np.empty(PANEL * blocks + SLACK, np.float32)
        w_shift = np.empty(PANEL * blocks + SLACK, np.float32)
        product, rest = np.empty((TILE, PANEL), np.float32), np.empty(PANEL, np.float32)
        bias = np.zeros(PANEL, np.float32)
        # Each array is also used by name in the loop: numba frees one after its last use.
        scale_at, shift_at = w_scale.ctypes.data, w_shift.ctypes.data
        tiled = tokens // TILE * TILE
        for panel in range(start, stop, PANEL // QUAD):
            first = min(panel * QUAD, rows - QUAD)
            width = min(min(panel + PANEL // QUAD, stop) * QUAD, rows) - first
            _unpack_panel(args, first, width, per_group, w_scale, w_shift)
            if args[BIAS]:
                at = args[BIAS] + first * (4 if args[BIAS_KIND] == FLOAT else 2)
                load_floats(bias, at, args[BIAS_KIND], width)
            words, high = args[QWEIGHT] + first * row_bytes, args[QHIGH] + first * high_bytes
            m = 0
            while m < tokens:
                x, x_scale = scratch + m * x_bytes, scratch + args[X_SCALE] + m * scale_bytes
                x_shift = scratch + args[X_SHIFT] + m * shift_bytes
                if m < tiled:
                    count = TILE
                    multiply_panel(
                        which, bits, TILE, vectors, parts, words, high, k, scale_at, shift_at, width, x, x_scale,
                        x_shift, blocks, padded, steps, half, product.ctypes.data,
                    )  # fmt: skip
                else:
                    count = 1
                    multiply_panel(
                        which, bits, 1, vectors, parts, words, high, k, scale_at, shift_at, width, x, x_scale,
                        x_shift, blocks, padded, steps, half, product.ctypes.data,
                    )  # fmt: skip
                for lane in range(count):
                    if uneven[m + lane]:
                        x = scratch + args[REST] + (m + lane) * x_bytes
                        x_scale = scratch + args[REST] + args[X_SCALE] + (m + lane) * scale_bytes
                        x_shift = scratch + args[REST] + args[X_SHIFT] + (m + lane) * shift_bytes
                        multiply_panel(
                            which, bits, 1, vectors, parts, words, high, k, scale_at, shift_at, width, x, x_scale,
                            x_shift, blocks, padded, steps, half, rest.ctypes.data,
                        )  # fmt: skip
                        for r in range(width):
                            product[lane, r] += rest[r]
                    at = args[OUT] + ((m + lane) * rows + first) * (4 if kind == FLOAT else 2)
                    store_floats(at, kind, product[lane], bias, width)
                m += count

    return multiply_rows


@functools.cache
def dequantize_kernel(bits: int) -> Any:
    """The kernel that writes rows of a weight of ``bits``."""

    @cpu_kernel(fastmath={"contract"})
    def dequantize_rows(start: int, stop: int, args: Any) -> None:
        """Rows ``start`` to ``stop`` of the weight to float32 ``OUT (ROWS, K)``."""
        k, groups, rows = args[K], args[GROUPS], args[ROWS]
        per_word = 16 if bits == 3 else 8
        words = numba.carray(pointer(args[QWEIGHT]), (rows, k // per_word), np.uint32)
        high = numba.carray(pointer(args[QHIGH]), (rows, k // 32), np.uint32)
        half_scales = numba.carray(pointer(args[SCALES]), (rows * groups,), np.uint16)
        zeros = numba.carray(pointer(args[ZEROS]), (rows, groups), np.uint8)
        out = numba.carray(pointer(args[OUT]), (rows, k), np.float32)
        for n in range(start, stop):
            for g in range(groups):
                scale = float_of_half(half_scales[n * groups + g])
                zero = np.int32(zeros[n, g])
                for t in range(g * (k // groups) // 8, (g + 1) * (k // groups) // 8):
                    for p in range(4):
                        for h in range(2):
                            if bits == 3:
                                low = words[n, t // 2] >> np.uint32(2 * (p + t % 2 * 4) + 16 * h)
                                top = high[n, t // 4] >> np.uint32(p + t % 4 * 4 + 16 * h)
                                q = np.int32((low & np.uint32(3)) | ((top & np.uint32(1)) << np.uint32(2)))
                            else:
                                q = np.int32((words[n, t] >> np.uint32(4 * p + 16 * h)) & np.uint32(15))
                            out[n, 8 * t + 2 * p + h] = np.float32(q - zero) * scale

    return dequantize_rows
