"""Triton kernels of the 4-bit cache; :mod:`.triton` launches them.

``append_kernel`` quantizes and stores. Attention is up to three kernels: ``cached_kernel`` goes over the cache, cut
into SPLITS runs of tokens so that few sequences fill a GPU too, ``own_kernel`` over the queries' own keys, and
``merge_kernel`` puts their results together by log-sum-exp.

The queries of a sequence, in all heads that share keys, are the rows of a tile, so that keys are read once for a
group, and even one query goes through the tensor cores. A nibble is never converted: the bits of an integer below 16
are the float16 ``2 ** -24`` times it, which tensor cores multiply exactly, and two of them leave a word with one shift
and one mask. Scales, lower ends and ``2 ** 24`` enter scores and weights in float32, once per token:

    score  = key_scale * (q . nibbles) + key_low * sum(q)
    result = (weight * value_scale) @ nibbles + sum(weight * value_low)

That leaves channels in the order of ``_channels``, for queries and results too. Queries are divided by their largest
magnitude, and weights by the largest scale of a tile, so that float16 holds them. Constant arguments:

    BM, BN       rows and tokens of a tile; D head size, BD the same rounded up to a power of two
    GROUP, BQ    query heads that share keys, and queries of a tile
    CAUSAL, HAS_OWN, HAS_WINDOW, HAS_CAP    as the op's arguments say
    INTERPRETED  for Triton's interpreter, which computes on the bits of bfloat16 as if they were integers
"""

from __future__ import annotations

import triton
import triton.language as tl

LARGEST = tl.constexpr(65504.0)  # of float16
UNIT = tl.constexpr(16777216.0)  # 2 ** 24
LOWEST = tl.constexpr(-1e30)


@triton.jit
def _round(x):
    """To the nearest integer, ties to even, for magnitudes below 2 ** 22."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _store_row(x, inside, words, scale_word, D: tl.constexpr, BD: tl.constexpr):
    """Quantize ``x`` ``(BD,)`` to nibbles at ``words``, int32, and scale and low to the word at ``scale_word``."""
    # The interpreter knows no bits of scalars: these are blocks of one.
    whole = tl.sum(tl.where(inside, x - x, 0.0), 0, keep_dims=True) == 0.0  # NaN with anything that is not finite
    low = tl.min(tl.where(inside, x, float("inf")), 0, keep_dims=True)
    high = tl.max(tl.where(inside, x, float("-inf")), 0, keep_dims=True)
    low = tl.minimum(tl.maximum(low, -LARGEST), LARGEST).to(tl.float16)
    high = tl.minimum(tl.maximum(high, -LARGEST), LARGEST)
    scale = tl.maximum(tl.div_rn(high - low.to(tl.float32), 15.0), 0.0).to(tl.float16)
    step = scale.to(tl.float32)
    q = tl.div_rn(x - low.to(tl.float32), tl.where(step > 0.0, step, 1.0))
    q = _round(tl.minimum(tl.maximum(q, 0.0), 15.0))
    q = tl.where(inside & whole & (step > 0.0), q, 0.0).to(tl.int32).reshape(BD // 8, 8)
    packed = tl.sum(q << (tl.arange(0, 8) * 4)[None, :], 1)
    word = tl.arange(0, BD // 8)
    tl.store(words + word, packed, mask=word * 8 < D)
    low_bits = low.to(tl.int16, bitcast=True).to(tl.int32)
    scale_bits = scale.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    tl.store(scale_word + tl.arange(0, 1), tl.where(whole, scale_bits | (low_bits << 16), 0x7E00))


@triton.jit
def append_kernel(
    key, value, cache, slots, slot_count, key_token, key_head, value_token, value_head,
    block_stride, head_stride, row_stride, block_size,
    D: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    # One program stores the key and the value of one token and head; the cache is given as int32.
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(slots + token).to(tl.int64)
    if (slot < 0) | (slot >= slot_count):
        return
    row = cache + slot // block_size * block_stride + head.to(tl.int64) * head_stride + slot % block_size * row_stride
    channel = tl.arange(0, BD)
    inside = channel < D
    x = tl.load(key + token * key_token + head * key_head + channel, mask=inside, other=0.0).to(tl.float32)
    _store_row(x, inside, row, row + D // 4, D, BD)
    x = tl.load(value + token * value_token + head * value_head + channel, mask=inside, other=0.0).to(tl.float32)
    _store_row(x, inside, row + D // 8, row + D // 4 + 1, D, BD)


@triton.jit
def _find_block(query_start, batch, BQ: tl.constexpr):
    """The sequence of this program's block of queries, its first query, how many it has, and the block's first."""
    block = tl.program_id(0)
    low = tl.zeros((), tl.int32)
    high = low + batch
    while low < high:  # sequence s begins at block query_start[s] // BQ + s: there are blocks enough for each
        middle = (low + high) // 2
        if tl.load(query_start + middle) // BQ + middle <= block:
            low = middle + 1
        else:
            high = middle
    sequence = low - 1
    first = tl.load(query_start + sequence)
    queries = tl.load(query_start + sequence + 1) - first
    return sequence, first, queries, (block - first // BQ - sequence) * BQ


@triton.jit
def _channels(BD: tl.constexpr):
    """The channel that each column of unpacked nibbles holds: pairs four apart, as they leave a word."""
    column = tl.arange(0, BD)
    return column // 8 * 8 + column % 8 // 2 + column % 2 * 4


@triton.jit
def _nibbles(words, BN: tl.constexpr, BD: tl.constexpr):
    """int64 words ``(BN, BD / 16)`` to their nibbles times ``2 ** -24``, float16 ``(BN, BD)``."""
    halves = tl.join(words.to(tl.int32), (words >> 32).to(tl.int32)).reshape(BN, BD // 8)
    shift = tl.arange(0, 4) * 4
    pairs = (halves[:, :, None] >> shift[None, None, :]).reshape(BN, BD // 2) & 0x000F000F
    low = pairs.to(tl.int16).to(tl.float16, bitcast=True)
    high = (pairs >> 16).to(tl.int16).to(tl.float16, bitcast=True)
    return tl.join(low, high).reshape(BN, BD)


@triton.jit
def _cap(score, cap):
    """``cap * tanh(y)`` where score is ``2 y / ln(2)``."""
    return cap * (1.0 - 2.0 / (tl.exp2(score) + 1.0))


@triton.jit
def _store_partial(
    sums, state, out, best, total, slot, tokens, token, head, heads, channel, inside_row,
    D: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Sums ``(BM, BD)``, largest score and sum of weights to the partial results of ``slot``."""
    row = (slot.to(tl.int64) * tokens + token) * heads + head
    tl.store(sums + row[:, None] * D + channel[None, :], out, mask=inside_row[:, None] & (channel < D)[None, :])
    tl.store(state + row * 2, best, mask=inside_row)
    tl.store(state + row * 2 + 1, total, mask=inside_row)


@triton.jit(do_not_specialize=["tokens", "batch", "table_width", "window"])
def cached_kernel(
    query, cache, tables, context_lens, query_start, sums, state, tokens, batch, heads, table_width,
    query_token, query_head, block_stride, head_stride, row_stride, factor, cap, window,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr, BQ: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, SPLITS: tl.constexpr, CAUSAL: tl.constexpr, HAS_OWN: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_CAP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    # Program (block of queries, key-value head, split). The cache is given as int64.
    MASKED: tl.constexpr = HAS_WINDOW or (CAUSAL and not HAS_OWN)
    WORDS: tl.constexpr = D // 16
    kv_head, split = tl.program_id(1), tl.program_id(2)
    sequence, first, queries, start = _find_block(query_start, batch, BQ)
    if start >= queries:
        return
    context = tl.load(context_lens + sequence)
    offset = context if HAS_OWN else context - queries
    row = tl.arange(0, BM)
    number = start + row // GROUP
    inside_row = (row < BQ * GROUP) & (number < queries)
    token, head = (first + number).to(tl.int64), kv_head * GROUP + row % GROUP
    position = offset + number

    low = tl.zeros((), tl.int32)
    high = low + context
    final = offset + tl.minimum(start + BQ, queries) - 1  # position of the last query
    if HAS_WINDOW:
        low = tl.maximum(low, offset + start - window + 1)
        if not CAUSAL:
            high = tl.minimum(high, final + window)
    if CAUSAL and not HAS_OWN:
        high = tl.minimum(high, final + 1)
    run = tl.cdiv(tl.cdiv(tl.maximum(high - low, 0), BN), SPLITS) * BN
    low += split * run
    high = tl.minimum(high, low + run)

    channel = _channels(BD)
    q_at = query + token[:, None] * query_token + head[:, None] * query_head + channel[None, :]
    q = tl.load(q_at, mask=inside_row[:, None] & (channel < D)[None, :], other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(q), 1)
    largest = tl.where(largest > 0.0, largest, 1.0)
    q_total = tl.sum(q, 1) * factor
    q = (q / largest[:, None]).to(tl.float16)
    q_scale = largest * (factor * UNIT)

    best = tl.zeros((BM,), tl.float32) + LOWEST
    total, shift = tl.zeros((BM,), tl.float32), tl.zeros((BM,), tl.float32)
    out = tl.zeros((BM, BD), tl.float32)
    word = tl.arange(0, BD // 16)
    table = tables + sequence.to(tl.int64) * table_width
    base = cache + kv_head.to(tl.int64) * head_stride
    for n in tl.range(low, high, BN, num_stages=STAGES):
        key_position = n + tl.arange(0, BN)
        there = key_position < high
        block = tl.load(table + key_position // BLOCK_SIZE, mask=there, other=0).to(tl.int64)
        at = base + block * block_stride + key_position % BLOCK_SIZE * row_stride
        fits = there[:, None] & (word < WORDS)[None, :]
        k_words = tl.load(at[:, None] + word[None, :], mask=fits, other=0)
        v_words = tl.load(at[:, None] + (word + WORDS)[None, :], mask=fits, other=0)
        scales = tl.load(at + D // 8, mask=there, other=0)
        k_scale = scales.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        k_low = (scales >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        v_scale = (scales >> 32).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        v_low = (scales >> 48).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        # What is not finite enters by the lower end alone, where it can be kept from rows that do not see it.
        v_low += v_scale * 0.0
        v_scale = tl.where(tl.abs(v_scale) <= LARGEST, v_scale, 0.0)

        score = tl.dot(q, _nibbles(k_words, BN, BD).T) * q_scale[:, None]
        score = score * k_scale[None, :] + q_total[:, None] * k_low[None, :]
        if HAS_CAP:
            score = _cap(score, cap)
        seen = there[None, :]
        if MASKED:
            distance = position[:, None] - key_position[None, :]
            if CAUSAL:
                seen = seen & (distance >= 0)
            if HAS_WINDOW:
                seen = seen & (distance < window) & (distance > -window)
        score = tl.where(seen, score, float("-inf"))
        new_best = tl.maximum(best, tl.max(score, 1))
        weight = tl.exp2(score - new_best[:, None])
        decay = tl.exp2(best - new_best)
        lower = weight * v_low[None, :]
        if MASKED:
            lower = tl.where(seen, lower, 0.0)
        top = tl.max(v_scale, 0)
        top = tl.where(top > 0.0, top, 1.0)
        scaled = (weight * (v_scale / top)[None, :]).to(tl.float16)
        products = tl.dot(scaled, _nibbles(v_words, BN, BD))
        out = out * decay[:, None] + products * (top * UNIT)
        total = total * decay + tl.sum(weight, 1)
        shift = shift * decay + tl.sum(lower, 1)
        best = new_best
    out += shift[:, None]
    _store_partial(sums, state, out, best, total, split, tokens, token, head, heads, channel, inside_row, D, BM, BD)


@triton.jit(do_not_specialize=["tokens", "batch", "window", "slot"])
def own_kernel(
    query, key, value, query_start, sums, state, tokens, batch, heads, slot,
    query_token, query_head, key_token, key_head, value_token, value_head, factor, cap, window,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr, BQ: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_CAP: tl.constexpr, STAGES: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    # Program (block of queries, key-value head), over the keys of the same tokens.
    kv_head = tl.program_id(1)
    _, first, queries, start = _find_block(query_start, batch, BQ)
    if start >= queries:
        return
    row, channel, column = tl.arange(0, BM), tl.arange(0, BD), tl.arange(0, BN)
    number = start + row // GROUP
    inside_row = (row < BQ * GROUP) & (number < queries)
    token, head = (first + number).to(tl.int64), kv_head * GROUP + row % GROUP
    inside = channel < D
    q_at = query + token[:, None] * query_token + head[:, None] * query_head + channel[None, :]
    q = tl.load(q_at, mask=inside_row[:, None] & inside[None, :], other=0.0)
    low = tl.zeros((), tl.int32)
    high = low + queries
    final = tl.minimum(start + BQ, queries) - 1
    if HAS_WINDOW:
        low = tl.maximum(low, start - window + 1)
        if not CAUSAL:
            high = tl.minimum(high, final + window)
    if CAUSAL:
        high = tl.minimum(high, final + 1)
    best = tl.zeros((BM,), tl.float32) + LOWEST
    total = tl.zeros((BM,), tl.float32)
    out = tl.zeros((BM, BD), tl.float32)
    k_base = key + first.to(tl.int64) * key_token + kv_head * key_head
    v_base = value + first.to(tl.int64) * value_token + kv_head * value_head
    for n in tl.range(low, high, BN, num_stages=STAGES):
        other = (n + column).to(tl.int64)
        fits = (other < high)[:, None] & inside[None, :]
        k = tl.load(k_base + other[:, None] * key_token + channel[None, :], mask=fits, other=0.0)
        v = tl.load(v_base + other[:, None] * value_token + channel[None, :], mask=fits, other=0.0)
        if INTERPRETED:
            k, v = k.to(tl.float32), v.to(tl.float32)
            score = tl.dot(q.to(tl.float32), k.T) * factor
        else:
            score = tl.dot(q, k.T) * factor
        if HAS_CAP:
            score = _cap(score, cap)
        distance = number[:, None] - (n + column)[None, :]
        seen = (other < high)[None, :]
        if CAUSAL:
            seen = seen & (distance >= 0)
        if HAS_WINDOW:
            seen = seen & (distance < window) & (distance > -window)
        score = tl.where(seen, score, float("-inf"))
        new_best = tl.maximum(best, tl.max(score, 1))
        weight = tl.exp2(score - new_best[:, None])
        decay = tl.exp2(best - new_best)
        out = tl.dot(weight.to(v.dtype), v, out * decay[:, None])
        total = total * decay + tl.sum(weight, 1)
        best = new_best
    place = tl.zeros((), tl.int32) + slot
    _store_partial(sums, state, out, best, total, place, tokens, token, head, heads, channel, inside_row, D, BM, BD)


@triton.jit(do_not_specialize=["tokens", "batch"])
def merge_kernel(
    sums, state, query_start, out, tokens, batch, heads, D: tl.constexpr, BD: tl.constexpr, SLOTS: tl.constexpr
):
    # One program for one query and head; those behind the last sequence get zeros.
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    channel = tl.arange(0, BD)
    there = token < tl.load(query_start + batch)
    row = token * heads + head
    step = tokens.to(tl.int64) * heads
    best = tl.zeros((), tl.float32) + LOWEST
    total = tl.zeros((), tl.float32)
    summed = tl.zeros((BD,), tl.float32)
    for slot in tl.static_range(SLOTS):
        at = row + slot * step
        found_best, found_total = tl.load(state + at * 2), tl.load(state + at * 2 + 1)
        found = tl.load(sums + at * D + channel, mask=channel < D, other=0.0)
        new_best = tl.maximum(best, found_best)
        old, new = tl.exp2(best - new_best), tl.exp2(found_best - new_best)
        summed = summed * old + found * new
        total = total * old + found_total * new
        best = new_best
    result = tl.where(there & (total != 0.0), summed / total, 0.0)  # behind the last sequence nothing was written
    tl.store(out + row * D + channel, result.to(out.dtype.element_ty), mask=channel < D)
