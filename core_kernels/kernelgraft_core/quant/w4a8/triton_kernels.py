"""The Triton kernels of W4A8 and W8A8: activations to int8, and products of integers with swapped operands.

``Y^T = W X^T``: weights are the left operand, so that every warp expands only the rows that it multiplies, and that on
Hopper they go from registers into the matrix instruction without a way through shared memory. Four bits become eight in
two instructions for four weights, ``(q * s + c) ^ 0x80808080`` on the bytes of a word: ``c`` holds 128 minus the zero
point in every byte, so that nothing is ever negative or carried, and the exclusive or takes the 128 away again.

Words hold eight weights of a row. Of every 64 columns, word ``j`` (0 to 7) has columns ``4 j`` to ``4 j + 3`` in the
low halves of its bytes, and those 32 further in the high ones: expanded, they lie in the order of the columns.
"""

from __future__ import annotations

import triton
import triton.language as tl

GROUPS, EXACT_GROUPS, NIBBLES, BYTES = (tl.constexpr(form) for form in range(4))
"""How a weight is stored and expanded. EXACT_GROUPS is for weights that leave a byte on the way: one at a time."""


@triton.jit
def _bytes(words):
    """int32 ``(..., C)`` to its bytes, int8 ``(..., C, 2, 2)``, the lowest first when it is flattened."""
    low = tl.join(words.to(tl.int8), (words >> 16).to(tl.int8))
    high = tl.join((words >> 8).to(tl.int8), (words >> 24).to(tl.int8))
    return tl.join(low, high)


@triton.jit
def _group_numbers(scales, zeros, rows, row, stride, first_group, BN: tl.constexpr, GROUPS_HERE: tl.constexpr):
    """Scales and zero points of a tile's rows, int32 ``(BN, GROUPS_HERE)`` each, four rows to a load."""
    slot = tl.arange(0, BN * GROUPS_HERE)
    at = tl.minimum(row + slot % BN, rows - 1) + (first_group + slot // BN) * stride
    lane = (at % 4)[:, None]
    # One load for both: two would be two asynchronous copies of four bytes each.
    is_scale = (tl.arange(0, 2) == 0)[None, :]
    where = tl.where(is_scale, scales + at[:, None], zeros + at[:, None]) - lane
    words = tl.load(where.to(tl.pointer_type(tl.int32), bitcast=True))
    scale, zero = tl.split((words >> (lane * 8)) & 0xFF)
    return scale.reshape(GROUPS_HERE, BN).T, zero.reshape(GROUPS_HERE, BN).T


@triton.jit
def _spread(numbers, BN: tl.constexpr, BK: tl.constexpr, GROUPS_HERE: tl.constexpr, PER: tl.constexpr):
    """``(BN, GROUPS_HERE)`` to one for every ``PER`` columns, ``(BN, BK // PER)``."""
    wide = tl.broadcast_to(numbers[:, :, None], (BN, GROUPS_HERE, BK // PER // GROUPS_HERE))
    return wide.reshape(BN, BK // PER)


@triton.jit
def product_kernel(
    x, weight, group_scale, group_zero, scale, zero, x_scale, x_sums, bias, out,
    tokens, rows, k_size, group_stride, k_split,
    FORM: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    GROUPS_HERE: tl.constexpr, SPLIT: tl.constexpr, HAS_BIAS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A tile of ``out (tokens, rows)``; or, where K is split, of int32 ``out (splits, tokens, rows)`` without scales.

    ``x`` int8 ``(tokens, k_size)``; ``weight`` int32 ``(rows, k_size / 8)``, or int8 ``(rows, k_size)`` for BYTES.
    """
    m_tiles = tl.cdiv(tokens, BM)
    row, token = tl.program_id(0) // m_tiles * BN, tl.program_id(0) % m_tiles * BM
    n, m = tl.arange(0, BN), tl.arange(0, BM)
    begin = tl.program_id(1) * k_split
    end = tl.minimum(begin + k_split, k_size)
    column = tl.arange(0, BK)
    x_at = x + token.to(tl.int64) * k_size + tl.minimum(m, tokens - 1 - token)[:, None] * k_size + column[None, :]
    own_row = tl.minimum(n, rows - 1 - row)[:, None]
    if FORM == BYTES:
        w_at = weight + row.to(tl.int64) * k_size + own_row * k_size + column[None, :]
    else:
        words = k_size // 8
        w_at = weight + row.to(tl.int64) * words + own_row * words + tl.arange(0, BK // 8)[None, :]
    sums = tl.zeros((BN, BM), tl.int32)
    for k in tl.range(begin, end, BK, num_stages=STAGES):
        tile = tl.load(x_at + k)
        if FORM == BYTES:
            values = tl.load(w_at + k)
        else:
            packed = tl.load(w_at + k // 8).reshape(BN, BK // 64, 8)
            halves = tl.join(packed & 0x0F0F0F0F, (packed >> 4) & 0x0F0F0F0F)
            nibbles = tl.permute(halves, (0, 1, 3, 2)).reshape(BN, BK // 4)
            if FORM == NIBBLES:
                values = _bytes(nibbles).reshape(BN, BK)
            else:
                first = k // GROUP
                steps, zeros = _group_numbers(group_scale, group_zero, rows, row, group_stride, first, BN, GROUPS_HERE)
                if FORM == GROUPS:
                    steps = _spread(steps, BN, BK, GROUPS_HERE, 4)
                    offsets = _spread((128 - zeros) * 0x01010101, BN, BK, GROUPS_HERE, 4)
                    values = _bytes((nibbles * steps + offsets) ^ -2139062144).reshape(BN, BK)
                else:
                    single = _bytes(nibbles).reshape(BN, BK).to(tl.int32)
                    steps = _spread(steps, BN, BK, GROUPS_HERE, 1)
                    values = (single * steps - _spread(zeros, BN, BK, GROUPS_HERE, 1)).to(tl.int8)
        sums = tl.dot(values, tile.T, sums)
    inside = (m < tokens - token)[None, :] & (n < rows - row)[:, None]
    at = (token + m).to(tl.int64)[None, :] * rows + row + n[:, None]
    if SPLIT:
        tl.store(out + tl.program_id(1).to(tl.int64) * tokens * rows + at, sums, mask=inside)
    else:
        of_row, of_token = n < rows - row, m < tokens - token
        if FORM == NIBBLES:
            points = tl.load(zero + row + n, mask=of_row, other=0).to(tl.int32)
            sums -= points[:, None] * tl.load(x_sums + token + m, mask=of_token, other=0)[None, :]
        values = sums.to(tl.float32) * tl.load(x_scale + token + m, mask=of_token, other=0.0)[None, :]
        values *= tl.load(scale + row + n, mask=of_row, other=0.0).to(tl.float32)[:, None]
        if HAS_BIAS:
            values += tl.load(bias + row + n, mask=of_row, other=0.0).to(tl.float32)[:, None]
        tl.store(out + at, values.to(out.dtype.element_ty), mask=inside)


@triton.jit
def sum_splits_kernel(
    parts, scale, zero, x_scale, x_sums, bias, out, tokens, rows,
    SPLITS: tl.constexpr, BLOCK: tl.constexpr, HAS_ZERO: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """What :func:`product_kernel` left undone: the sum of int32 ``parts (SPLITS, tokens, rows)``, scales and bias."""
    token = tl.program_id(1)
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = n < rows
    at = token.to(tl.int64) * rows + n
    sums = tl.load(parts + at, mask=inside, other=0)
    for split in tl.static_range(1, SPLITS):
        sums += tl.load(parts + split * tokens.to(tl.int64) * rows + at, mask=inside, other=0)
    if HAS_ZERO:
        sums -= tl.load(zero + n, mask=inside, other=0).to(tl.int32) * tl.load(x_sums + token)
    values = sums.to(tl.float32) * tl.load(x_scale + token) * tl.load(scale + n, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        values += tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, values.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _source(x, weight, at, other, inside, inverse, KIND: tl.constexpr):
    """What is quantized, in float32: 0 ``x`` itself, 1 normalized and weighted, 2 ``silu(gate) * up``."""
    values = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if KIND == 1:
        values = values * inverse * tl.load(weight + other, mask=inside, other=0.0).to(tl.float32)
    if KIND == 2:
        up = tl.load(x + at + other, mask=inside, other=0.0).to(tl.float32)
        values = values / (1.0 + tl.exp(-values)) * up
    return values


@triton.jit
def quantize_kernel(
    x, weight, q, scales, sums, k_size, x_stride, eps, KIND: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """One token to int8, with its scale and the sum of its integers; ``KIND`` as for :func:`_source`."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inverse = 1.0
    if KIND == 1:
        squares = tl.zeros((BLOCK,), tl.float32)
        for k in range(0, k_size, BLOCK):
            values = tl.load(x + token * x_stride + k + column, mask=k + column < k_size, other=0.0).to(tl.float32)
            squares += values * values
        inverse = tl.math.div_rn(1.0, tl.math.sqrt_rn(tl.math.div_rn(tl.sum(squares), k_size.to(tl.float32)) + eps))
    # Magnitudes compare like the integers of their bits, and what is not finite is larger than all others.
    largest = tl.zeros((BLOCK,), tl.int32)
    for k in range(0, k_size, BLOCK):
        inside = k + column < k_size
        other = k_size if KIND == 2 else k + column
        values = _source(x, weight, token * x_stride + k + column, other, inside, inverse, KIND)
        largest = tl.maximum(largest, values.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    bits = tl.max(largest)
    scale = tl.math.div_rn(bits.to(tl.float32, bitcast=True), 127.0)
    scale = tl.where(bits == 0, 1.0, tl.where(bits >= 0x7F800000, float("nan"), scale))
    total = tl.zeros((BLOCK,), tl.int32)
    for k in range(0, k_size, BLOCK):
        inside = k + column < k_size
        other = k_size if KIND == 2 else k + column
        values = _source(x, weight, token * x_stride + k + column, other, inside, inverse, KIND)
        # Adding 1.5 * 2^23 leaves no bits behind the point: the nearest integer, ties to even.
        integers = (tl.math.div_rn(values, scale) + 12582912.0) - 12582912.0
        integers = tl.where(bits >= 0x7F800000, 0.0, integers).to(tl.int32)
        tl.store(q + token * k_size + k + column, integers.to(tl.int8), mask=inside)
        total += tl.where(inside, integers, 0)
    tl.store(scales + token, scale)
    tl.store(sums + token, tl.sum(total))
