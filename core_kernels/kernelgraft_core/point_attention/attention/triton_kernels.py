"""The GPU kernels of attention in groups: rows are gathered where they are, groups need not be of one size.

A program is a group, a head and a block of its queries or keys. Heads of 16 channels are not padded.
"""

import triton
import triton.language as tl


@triton.jit
def _rows_of(members, first, at, there):
    """Rows of members ``at`` of a group, as 64 bits: a scan of many samples has more numbers than 32 bits count."""
    return tl.load(members + first + at, mask=there, other=0).to(tl.int64)


@triton.jit
def _load(base, rows, step, there, HEAD: tl.constexpr, HEAD_BLOCK: tl.constexpr):
    """Channels of one head of some rows; what is not there is 0."""
    channel = tl.arange(0, HEAD_BLOCK)
    mask = there[:, None] & (channel < HEAD)[None, :]
    return tl.load(base + rows[:, None] * step + channel[None, :], mask=mask, other=0.0)


@triton.jit
def _store(values, base, rows, step, there, HEAD: tl.constexpr, HEAD_BLOCK: tl.constexpr):
    channel = tl.arange(0, HEAD_BLOCK)
    mask = there[:, None] & (channel < HEAD)[None, :]
    tl.store(base + rows[:, None] * step + channel[None, :], values.to(base.dtype.element_ty), mask=mask)


@triton.jit
def _attended(query, qkv, members, first, size, channels, scale, HEAD: tl.constexpr, HEAD_BLOCK: tl.constexpr,
              QUERIES: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Attention of a block of queries to all members of their group, and the base-2 logarithm of its weights' sum."""
    largest = tl.full((QUERIES,), -float("inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    out = tl.zeros((QUERIES, HEAD_BLOCK), tl.float32)
    for begin in range(0, size, KEYS):
        at = begin + tl.arange(0, KEYS)
        there = at < size
        rows = _rows_of(members, first, at, there)
        key = _load(qkv + channels, rows, 3 * channels, there, HEAD, HEAD_BLOCK)
        value = _load(qkv + 2 * channels, rows, 3 * channels, there, HEAD, HEAD_BLOCK)
        scores = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale
        scores = tl.where(there[None, :], scores, -float("inf"))
        next_largest = tl.maximum(largest, tl.max(scores, 1))
        weights = tl.exp2(scores - next_largest[:, None])
        shrink = tl.exp2(largest - next_largest)
        total = total * shrink + tl.sum(weights, 1)
        out = out * shrink[:, None] + tl.dot(weights.to(value.dtype), value, input_precision=PRECISION)
        largest = next_largest
    return out / total[:, None], largest + tl.log2(total)


@triton.jit
def attention_kernel(qkv, members, starts, owned, out, channels, scale, HEAD: tl.constexpr, HEAD_BLOCK: tl.constexpr,
                     QUERIES: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """``out (N, C)``. ``scale`` holds log2(e)."""
    group, head, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    own = tl.load(owned + group)
    if block * QUERIES >= own:
        return
    first = tl.load(starts + group)
    size = tl.load(starts + group + 1) - first
    at = block * QUERIES + tl.arange(0, QUERIES)
    rows = _rows_of(members, first, at, at < own)
    qkv += head * HEAD
    query = _load(qkv, rows, 3 * channels, at < own, HEAD, HEAD_BLOCK)
    found, _ = _attended(
        query, qkv, members, first, size, channels, scale, HEAD, HEAD_BLOCK, QUERIES, KEYS, PRECISION
    )  # fmt: skip
    _store(found, out + head * HEAD, rows, channels, at < own, HEAD, HEAD_BLOCK)


@triton.jit
def query_gradient_kernel(grad, qkv, members, starts, owned, found, sums, deltas, channels, scale, places,
                          HEAD: tl.constexpr, HEAD_BLOCK: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
                          PRECISION: tl.constexpr):  # fmt: skip
    """Gradients of queries into the first third of ``found (N, 3 C)``; and for each head and place of a member, what
    :func:`key_gradient_kernel` needs: ``sums`` and ``deltas (heads, places)`` float32."""
    group, head, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    own = tl.load(owned + group)
    if block * QUERIES >= own:
        return
    first = tl.load(starts + group)
    size = tl.load(starts + group + 1) - first
    at = block * QUERIES + tl.arange(0, QUERIES)
    rows = _rows_of(members, first, at, at < own)
    qkv += head * HEAD
    query = _load(qkv, rows, 3 * channels, at < own, HEAD, HEAD_BLOCK)
    change = _load(grad + head * HEAD, rows, channels, at < own, HEAD, HEAD_BLOCK)
    out, logarithm = _attended(
        query, qkv, members, first, size, channels, scale, HEAD, HEAD_BLOCK, QUERIES, KEYS, PRECISION
    )  # fmt: skip
    delta = tl.sum(out * change.to(tl.float32), 1)
    place = head.to(tl.int64) * places + first + at
    tl.store(sums + place, logarithm, mask=at < own)
    tl.store(deltas + place, delta, mask=at < own)
    gradient = tl.zeros((QUERIES, HEAD_BLOCK), tl.float32)
    for begin in range(0, size, KEYS):
        other = begin + tl.arange(0, KEYS)
        there = other < size
        other_rows = _rows_of(members, first, other, there)
        key = _load(qkv + channels, other_rows, 3 * channels, there, HEAD, HEAD_BLOCK)
        value = _load(qkv + 2 * channels, other_rows, 3 * channels, there, HEAD, HEAD_BLOCK)
        scores = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale
        weights = tl.where(there[None, :], tl.exp2(scores - logarithm[:, None]), 0.0)
        moved = weights * (tl.dot(change, tl.trans(value), input_precision=PRECISION) - delta[:, None])
        gradient += tl.dot(moved.to(key.dtype), key, input_precision=PRECISION)
    gradient *= scale * 0.6931471805599453
    _store(gradient, found + head * HEAD, rows, 3 * channels, at < own, HEAD, HEAD_BLOCK)


@triton.jit
def key_gradient_kernel(grad, qkv, members, starts, owned, keys_found, values_found, sums, deltas, channels, scale,
                        places, step, HEAD: tl.constexpr, HEAD_BLOCK: tl.constexpr, QUERIES: tl.constexpr,
                        KEYS: tl.constexpr, PRECISION: tl.constexpr, DIRECT: tl.constexpr):  # fmt: skip
    """Gradients of keys and values, rows of ``step`` numbers: of each member where its row is (``DIRECT``: no row is a
    member twice), else of each place."""
    group, head, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first = tl.load(starts + group)
    size = tl.load(starts + group + 1) - first
    if block * KEYS >= size:
        return
    own = tl.load(owned + group)
    at = block * KEYS + tl.arange(0, KEYS)
    rows = _rows_of(members, first, at, at < size)
    qkv += head * HEAD
    key = _load(qkv + channels, rows, 3 * channels, at < size, HEAD, HEAD_BLOCK)
    value = _load(qkv + 2 * channels, rows, 3 * channels, at < size, HEAD, HEAD_BLOCK)
    for_key = tl.zeros((KEYS, HEAD_BLOCK), tl.float32)
    for_value = tl.zeros((KEYS, HEAD_BLOCK), tl.float32)
    for begin in range(0, own, QUERIES):
        other = begin + tl.arange(0, QUERIES)
        there = other < own
        other_rows = _rows_of(members, first, other, there)
        query = _load(qkv, other_rows, 3 * channels, there, HEAD, HEAD_BLOCK)
        change = _load(grad + head * HEAD, other_rows, channels, there, HEAD, HEAD_BLOCK)
        place = head.to(tl.int64) * places + first + other
        logarithm = tl.load(sums + place, mask=there, other=0.0)
        delta = tl.load(deltas + place, mask=there, other=0.0)
        scores = tl.dot(key, tl.trans(query), input_precision=PRECISION) * scale
        weights = tl.where(there[None, :], tl.exp2(scores - logarithm[None, :]), 0.0)
        for_value += tl.dot(weights.to(change.dtype), change, input_precision=PRECISION)
        moved = weights * (tl.dot(value, tl.trans(change), input_precision=PRECISION) - delta[None, :])
        for_key += tl.dot(moved.to(query.dtype), query, input_precision=PRECISION)
    for_key *= scale * 0.6931471805599453
    target = rows if DIRECT else (first + at).to(tl.int64)
    _store(for_key, keys_found + head * HEAD, target, step, at < size, HEAD, HEAD_BLOCK)
    _store(for_value, values_found + head * HEAD, target, step, at < size, HEAD, HEAD_BLOCK)
