"""Triton kernels of a linear layer with packed weights; :mod:`.triton` launches them.

``slice_k`` (decode)
    Memory bound. Each warp of a program walks its own slices of K, and the partial sums meet once, in shared memory:
    no second pass over a workspace, and the order of summation is fixed. Even one token goes through the tensor cores,
    because a weight then costs about 3 instructions; a float32 FMA version costs 6 (both read from SASS).
``gemm``
    Compute bound. The operands are swapped, ``Y^T = W X^T``, so that the dequantized weights are the left operand,
    which tensor cores take from registers: they are never written to shared memory (``wgmma`` on sm_90).

How weights leave a word: a lane that feeds a tensor core needs pairs ``p = lane % 4`` and ``p + 4`` of every sixteen
columns, so the word is broadcast to four lanes; each shifts it and keeps one pair.

* 4 bits: a word has four pairs; a shift by ``4 p`` and ``0x000F000F``, one shift and one logic operation for a pair.
* 3 bits, the planes of :mod:`kernelgraft_core.quant.int3`: the low bits are shifted alike, by ``2 p``; the word of
  top bits is rotated until the pair's stand above them, and one logic operation selects from the two.

OR-ing the exponent of 1024 (float16) or 128 (bfloat16) into both halves then makes floats of the integers, exactly.
Constant arguments are the upper-case ones:

    BITS         of a weight, 3 or 4; qhigh is read for 3 only
    BM, BN, BK   tokens, output features and columns of a tile
    GROUP        columns that share a scale, 0 when a row has only one
    GROUPS       scales that a row of a tile meets; as many as BK has words of the shortest plane, UNIT columns each,
                 when a group may begin at any of them (8 for 4 bits, 32 for 3)
    ALIGN        words that rows of the shortest plane are aligned to
    EVEN_K       no tile reaches beyond K
    PACKED       scales and zeros have rows innermost, in multiples of four: two scales, four zeros are one load
    INTERPRETED  for Triton's interpreter: no assembly, and float32 arithmetic instead of bfloat16
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _load_words(at, word, k, k_end, PER_WORD: tl.constexpr, EVEN_K: tl.constexpr):
    """The words of a plane that a tile at column ``k`` needs, those from column ``k_end`` on as zeros."""
    if EVEN_K:
        words = tl.load(at + k // PER_WORD)
    else:
        words = tl.load(at + k // PER_WORD, mask=word < (k_end - k) // PER_WORD, other=0)
    return words


@triton.jit
def _fields(words, tops, ROWS: tl.constexpr, BK: tl.constexpr, BITS: tl.constexpr, PLAIN: tl.constexpr):
    """Packed words of a tile to pairs of integers ``(ROWS, BK / 2)``: the lowest BITS of either half; others are noise.

    Args:
        words: ``(ROWS, BK / PER_WORD)`` of qweight.
        tops: ``(ROWS, BK / 32)`` of qhigh, read for 3 bits.
        PLAIN: without assembly.
    """
    if BITS == 4:
        shift = tl.arange(0, 4) * 4
        fields = (words[:, :, None] >> shift[None, None, :]).reshape(ROWS, BK // 2)
    else:
        shift = tl.arange(0, 8) * 2
        pair = tl.arange(0, 16)
        low = (words[:, :, None] >> shift[None, None, :]).reshape(ROWS, BK // 2)
        if PLAIN:
            top = ((tops[:, :, None] >> pair[None, None, :]) & 0x00010001).reshape(ROWS, BK // 2)
            fields = (low & 0x00030003) | (top << 2)
        else:
            rotated = tl.inline_asm_elementwise(
                "shf.r.wrap.b32 $0, $1, $1, $2;",
                "=r,r,r", [tops[:, :, None], (pair - 2)[None, None, :]], dtype=tl.int32, is_pure=True, pack=1,
            ).reshape(ROWS, BK // 2)  # fmt: skip
            fields = tl.inline_asm_elementwise(
                "lop3.b32 $0, $1, $2, 0x00040004, 0xD8;",  # the bit of $2 where the constant has one, else that of $1
                "=r,r,r", [low, rotated], dtype=tl.int32, is_pure=True, pack=1,
            )  # fmt: skip
    return fields


@triton.jit
def _spread(parameter, ROWS: tl.constexpr, GROUPS: tl.constexpr, BK: tl.constexpr):
    """Parameters ``(ROWS, GROUPS)`` over the pairs of a tile ``(ROWS, BK / 2)``."""
    spread = tl.broadcast_to(parameter[:, :, None], (ROWS, GROUPS, BK // (2 * GROUPS))).reshape(ROWS, BK // 2)
    return spread


@triton.jit
def _load_groups(
    scales, zeros, row, rows, k, k_size, scale_row, scale_group, zero_row, zero_group,
    ROWS: tl.constexpr, RUN: tl.constexpr, BK: tl.constexpr,
    GROUP: tl.constexpr, GROUPS: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Scales (float16 bits) and zeros that a tile of ROWS x BK meets, both int32 ``(ROWS, GROUPS)``.

    Every RUN rows of the tile are the rows from ``row`` on again, one BK further along K.
    """
    slot = tl.arange(0, ROWS * GROUPS)
    n = tl.minimum(row + slot % RUN, rows - 1)
    if GROUP == 0:
        group = 0
    elif GROUPS == 1 and RUN == ROWS:
        group = k // GROUP
    else:
        group = tl.minimum(k + slot % ROWS // RUN * BK + slot // ROWS * (BK // GROUPS), k_size - 1) // GROUP
    if PACKED:
        # The words that hold a row's scale and its zero, read by one load: of 32 bits, because narrower ones are not
        # prefetched, and with an element for every thread, because Triton 3.6 lets all threads repeat smaller ones.
        is_scale = (tl.arange(0, 2) == 0)[None, :]
        scale_at = scales.to(tl.pointer_type(tl.int8), bitcast=True) + (n * 2 + group * (scale_group * 2))[:, None]
        zero_at = zeros.to(tl.pointer_type(tl.int8), bitcast=True) + (n + group * zero_group)[:, None]
        lane = tl.where(is_scale, (n % 2 * 2)[:, None], (n % 4)[:, None])  # the byte in the word
        words = tl.load((tl.where(is_scale, scale_at, zero_at) - lane).to(tl.pointer_type(tl.int32), bitcast=True))
        s, z = tl.split(words >> (lane * 8))
        s = s & 0xFFFF
        z = z & 0xFF
    else:
        s = tl.load(scales + n * scale_row + group * scale_group).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        z = tl.load(zeros + n * zero_row + group * zero_group).to(tl.int32)
    return s.reshape(GROUPS, ROWS).T, z.reshape(GROUPS, ROWS).T


@triton.jit
def _weights(
    words, tops, s, z, magic, BITS: tl.constexpr,
    ROWS: tl.constexpr, GROUPS: tl.constexpr, BK: tl.constexpr, DTYPE: tl.constexpr, SCALED: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Words as for :func:`_fields` to ``q - z``, exact in either type, times ``s`` if SCALED: ``(ROWS, BK)``."""
    fields = _fields(words, tops, ROWS, BK, BITS, INTERPRETED)
    mask = 0x000F000F if BITS == 4 else 0x00070007
    if INTERPRETED:
        # The interpreter knows no assembly, and computes on the bits of bfloat16 as if they were integers.
        pairs = (fields & mask) | magic
        zero = _spread((z | magic).to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32), ROWS, GROUPS, BK)
        low = pairs.to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32) - zero
        high = (pairs >> 16).to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32) - zero
        if SCALED:
            factor = _spread(s.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32), ROWS, GROUPS, BK)
            low = low * factor
            high = high * factor
    else:
        # Packed arithmetic is spelled out: from plain Triton ptxas packs half of it, with a permutation for each pair.
        # magic is an argument because one instruction has room for one constant only.
        scale = s.to(tl.int16).to(tl.float16, bitcast=True).to(DTYPE)
        bits = scale.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        zero = _spread((z | (z << 16)) | magic, ROWS, GROUPS, BK)
        factor = _spread(bits | (bits << 16), ROWS, GROUPS, BK)
        if DTYPE is tl.float16:
            if SCALED:
                pairs = tl.inline_asm_elementwise(
                    """{
                    .reg .b32 v;
                    lop3.b32 v, $1, $3, $2, 0xEA;
                    sub.f16x2 v, v, $4;
                    mul.f16x2 $0, v, $5;
                    }""",
                    "=r,r,r,r,r,r", [fields, magic, mask, zero, factor], dtype=tl.int32, is_pure=True, pack=1,
                )  # fmt: skip
            else:
                pairs = tl.inline_asm_elementwise(
                    """{
                    .reg .b32 v;
                    lop3.b32 v, $1, $3, $2, 0xEA;
                    sub.f16x2 $0, v, $4;
                    }""",
                    "=r,r,r,r,r", [fields, magic, mask, zero], dtype=tl.int32, is_pure=True, pack=1,
                )  # fmt: skip
        else:  # sm_80 adds and multiplies bfloat16 only in fma
            if SCALED:
                pairs = tl.inline_asm_elementwise(
                    """{
                    .reg .b32 v, one, nothing;
                    mov.b32 one, 0x3F803F80;
                    mov.b32 nothing, 0x80008000;
                    lop3.b32 v, $1, $3, $2, 0xEA;
                    fma.rn.bf16x2 v, v, one, $4;
                    fma.rn.bf16x2 $0, v, $5, nothing;
                    }""",
                    "=r,r,r,r,r,r", [fields, magic, mask, zero ^ -2147450880, factor],
                    dtype=tl.int32, is_pure=True, pack=1,
                )  # fmt: skip
            else:
                pairs = tl.inline_asm_elementwise(
                    """{
                    .reg .b32 v, one;
                    mov.b32 one, 0x3F803F80;
                    lop3.b32 v, $1, $3, $2, 0xEA;
                    fma.rn.bf16x2 $0, v, one, $4;
                    }""",
                    "=r,r,r,r,r", [fields, magic, mask, zero ^ -2147450880], dtype=tl.int32, is_pure=True, pack=1,
                )  # fmt: skip
        low = pairs.to(tl.int16).to(DTYPE, bitcast=True)
        high = (pairs >> 16).to(tl.int16).to(DTYPE, bitcast=True)
    return tl.join(low, high).reshape(ROWS, BK)


@triton.jit(do_not_specialize=["tokens", "magic"])
def slice_k_kernel(
    x, qweight, qhigh, scales, zeros, bias, out,
    tokens, rows, k_size, row_words, magic, scale_row, scale_group, zero_row, zero_group,
    BITS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SLICES: tl.constexpr,
    GROUP: tl.constexpr, GROUPS: tl.constexpr, ALIGN: tl.constexpr, EVEN_K: tl.constexpr, PACKED: tl.constexpr,
    HAS_BIAS: tl.constexpr, STAGES: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    # One program computes BN outputs of all tokens (at most BM). Warp s multiplies the columns [s * BK, (s + 1) * BK)
    # of each stretch of SLICES * BK: a batched dot gives every batch a warp of its own.
    DTYPE: tl.constexpr = x.dtype.element_ty
    ROWS: tl.constexpr = SLICES * BN
    PER_WORD: tl.constexpr = 8 if BITS == 4 else 16
    UNIT: tl.constexpr = 8 if BITS == 4 else 32
    row = tl.program_id(0) * BN
    m = tl.arange(0, BM)
    slot = tl.arange(0, ROWS)
    n = tl.minimum(row + slot % BN, rows - 1).to(tl.int64)
    word = (slot // BN * (BK // PER_WORD))[:, None] + tl.arange(0, BK // PER_WORD)[None, :]
    column = (tl.arange(0, SLICES) * BK)[:, None, None] + tl.arange(0, BK)[None, None, :]
    q_at = qweight + n[:, None] * (row_words * (ALIGN * UNIT // PER_WORD)) + word
    x_at = x + m[None, :, None] * (row_words * (ALIGN * UNIT)) + column
    if BITS == 3:
        top_word = (slot // BN * (BK // 32))[:, None] + tl.arange(0, BK // 32)[None, :]
        top_at = qhigh + n[:, None] * (row_words * ALIGN) + top_word
    acc = tl.zeros((SLICES, BN, BM), tl.float32)
    # Given the number of stages, Triton prefetches all loads of the loop, not only those that feed a dot.
    for k in tl.range(0, k_size, SLICES * BK, num_stages=STAGES):
        words = _load_words(q_at, word, k, k_size, PER_WORD, EVEN_K)
        tops = _load_words(top_at, top_word, k, k_size, 32, EVEN_K) if BITS == 3 else words
        if EVEN_K:
            tile = tl.load(x_at + k, mask=(m < tokens)[None, :, None], other=0.0)
        else:
            tile = tl.load(x_at + k, mask=(m < tokens)[None, :, None] & (column < k_size - k), other=0.0)
        s, z = _load_groups(
            scales, zeros, row, rows, k, k_size, scale_row, scale_group, zero_row, zero_group,
            ROWS, BN, BK, GROUP, GROUPS, PACKED,
        )  # fmt: skip
        weight = _weights(words, tops, s, z, magic, BITS, ROWS, GROUPS, BK, DTYPE, GROUPS > 1, INTERPRETED)
        if INTERPRETED:
            tile = tile.to(tl.float32)
        part = tl.dot(weight.reshape(SLICES, BN, BK), tl.trans(tile, 0, 2, 1))
        if GROUPS == 1:  # one scale per row of the tile: on the sums it is cheaper, and not rounded to 16 bits
            part = part * s.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32).reshape(SLICES, BN, 1)
        acc += part
    total = tl.sum(acc, 0)
    n = row + tl.arange(0, BN)
    if HAS_BIAS:
        total += tl.load(bias + n, mask=n < rows, other=0.0).to(tl.float32)[:, None]
    tl.store(out + m[None, :] * rows + n[:, None], total.to(DTYPE), mask=(m < tokens)[None, :] & (n < rows)[:, None])


@triton.jit(do_not_specialize=["tokens", "magic"])
def gemm_kernel(
    x, qweight, qhigh, scales, zeros, bias, out,
    tokens, rows, k_size, row_words, k_split, magic, scale_row, scale_group, zero_row, zero_group,
    BITS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr,
    GROUP: tl.constexpr, GROUPS: tl.constexpr, ALIGN: tl.constexpr, EVEN_K: tl.constexpr, PACKED: tl.constexpr,
    HAS_BIAS: tl.constexpr, STAGES: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    # One program computes the tile BN x BM of W X^T over k_split columns. Neighbouring programs share the weights,
    # which come from memory once; x fits L2. With SPLIT, out is a float32 workspace (splits, M, N).
    DTYPE: tl.constexpr = x.dtype.element_ty
    PER_WORD: tl.constexpr = 8 if BITS == 4 else 16
    UNIT: tl.constexpr = 8 if BITS == 4 else 32
    row_step = row_words * (ALIGN * UNIT // PER_WORD)
    m_tiles = tl.cdiv(tokens, BM)
    row = tl.program_id(0) // m_tiles * BN
    token = tl.program_id(0) % m_tiles * BM
    n = tl.arange(0, BN)
    m = tl.arange(0, BM)
    k_begin = tl.program_id(1) * k_split
    k_end = tl.minimum(k_begin + k_split, k_size)
    word = tl.arange(0, BK // PER_WORD)
    column = tl.arange(0, BK)
    # 64-bit offsets for the tile, 32-bit ones inside: registers decide how many programs share a multiprocessor.
    # Rows outside read the last row instead of nothing: a minimum here costs less than a predicate in the loop.
    q_tile = qweight + row.to(tl.int64) * row_step
    x_tile = x + token.to(tl.int64) * (row_words * (ALIGN * UNIT))
    q_at = q_tile + tl.minimum(n, rows - 1 - row)[:, None] * row_step + word[None, :]
    x_at = x_tile + tl.minimum(m, tokens - 1 - token)[:, None] * (row_words * (ALIGN * UNIT)) + column[None, :]
    if BITS == 3:
        top_word = tl.arange(0, BK // 32)
        top_tile = qhigh + row.to(tl.int64) * (row_words * ALIGN)
        top_at = top_tile + tl.minimum(n, rows - 1 - row)[:, None] * (row_words * ALIGN) + top_word[None, :]
    acc = tl.zeros((BN, BM), tl.float32)
    for k in tl.range(k_begin, k_end, BK, num_stages=STAGES):
        words = _load_words(q_at, word[None, :], k, k_end, PER_WORD, EVEN_K)
        tops = _load_words(top_at, top_word[None, :], k, k_end, 32, EVEN_K) if BITS == 3 else words
        tile = tl.load(x_at + k) if EVEN_K else tl.load(x_at + k, mask=(column < k_end - k)[None, :], other=0.0)
        s, z = _load_groups(
            scales, zeros, row, rows, k, k_size, scale_row, scale_group, zero_row, zero_group,
            BN, BN, BK, GROUP, GROUPS, PACKED,
        )  # fmt: skip
        weight = _weights(words, tops, s, z, magic, BITS, BN, GROUPS, BK, DTYPE, GROUP > 0, INTERPRETED)
        if INTERPRETED:
            tile = tile.to(tl.float32)
        acc = tl.dot(weight, tile.T, acc)
    inside_n = n < rows - row
    if GROUP == 0:  # one scale per row of the whole matrix
        scale = tl.load(scales + (row + n) * scale_row, mask=inside_n, other=0.0)
        acc = acc * scale.to(tl.float32)[:, None]
    inside = (m < tokens - token)[None, :] & inside_n[:, None]
    tile_at = token.to(tl.int64) * rows + row
    at = m[None, :] * rows + n[:, None]
    if SPLIT:
        tl.store(out + tl.program_id(1).to(tl.int64) * tokens * rows + tile_at + at, acc, mask=inside)
    else:
        if HAS_BIAS:
            acc += tl.load(bias + row + n, mask=inside_n, other=0.0).to(tl.float32)[:, None]
        tl.store(out + tile_at + at, acc.to(DTYPE), mask=inside)


@triton.jit
def sum_splits_kernel(
    workspace, bias, out, size, rows, SPLITS: tl.constexpr, BLOCK: tl.constexpr, HAS_BIAS: tl.constexpr
):
    # workspace float32 (SPLITS, size) -> out (size,), always summed in the same order.
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    total = tl.zeros((BLOCK,), tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(workspace + split * size.to(tl.int64) + at, mask=inside, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias + at % rows, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _load_block(plane, n, rows, columns, first, k_begin, row_step, PER_WORD: tl.constexpr, BK: tl.constexpr):
    """The words of a plane for BK columns of rows ``n``, from ``k_begin + first`` on; zeros outside."""
    word = tl.arange(0, BK // PER_WORD)
    inside = (n < rows)[:, None] & (word < (columns - first) // PER_WORD)[None, :]
    at = n.to(tl.int64)[:, None] * row_step + ((k_begin + first) // PER_WORD + word)[None, :]
    return tl.load(plane + at, mask=inside, other=0)


@triton.jit
def dequantize_kernel(
    qweight, qhigh, scales, zeros, out, rows, columns, k_begin, k_size, row_words,
    scale_row, scale_group, zero_row, zero_group,
    BITS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    GROUP: tl.constexpr, GROUPS: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    # Columns [k_begin, k_begin + columns) of rows [0, rows), to out (rows, columns). Products are formed in float32 and
    # rounded once. Output is written two neighbours to a store of 32 bits or more.
    row = tl.program_id(0) * BN
    first = tl.program_id(1) * BK
    n = row + tl.arange(0, BN)
    PER_WORD: tl.constexpr = 8 if BITS == 4 else 16
    units = row_words * ALIGN
    row_step = units if BITS == 4 else units * 2
    words = _load_block(qweight, n, rows, columns, first, k_begin, row_step, PER_WORD, BK)
    tops = _load_block(qhigh, n, rows, columns, first, k_begin, units, 32, BK) if BITS == 3 else words
    s, z = _load_groups(
        scales, zeros, row, rows, k_begin + first, k_size, scale_row, scale_group, zero_row, zero_group,
        BN, BN, BK, GROUP, GROUPS, False,
    )  # fmt: skip
    pairs = _fields(words, tops, BN, BK, BITS, True) & (0x000F000F if BITS == 4 else 0x00070007)
    q = tl.join(pairs & 0xF, pairs >> 16).reshape(BN, BK)
    scale = s.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    scale = tl.broadcast_to(scale[:, :, None], (BN, GROUPS, BK // GROUPS)).reshape(BN, BK)
    zero = tl.broadcast_to(z[:, :, None], (BN, GROUPS, BK // GROUPS)).reshape(BN, BK)
    value = (q - zero).to(tl.float32) * scale
    column = first + tl.arange(0, BK)
    tl.store(
        out + n.to(tl.int64)[:, None] * columns + column[None, :],
        value.to(out.dtype.element_ty),
        mask=(n < rows)[:, None] & (column < columns)[None, :],
    )
