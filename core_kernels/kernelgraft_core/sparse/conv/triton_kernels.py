"""The Triton kernels of sparse convolution: what :mod:`.triton` launches.

They are templates: tile, steps in flight, dtype, epilogue and what need not be checked are constants, of which
:mod:`.triton_tiles` lists the combinations that are worth compiling.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def implicit_gemm_kernel(
    x, weight, bias, entries, taps, starts, order, out,
    out_rows, tiles, in_channels, out_channels, x_row, weight_tap, weight_group, weight_in, weight_out,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STEPS: tl.constexpr, WHOLE: tl.constexpr,
    SPLIT: tl.constexpr, HAS_BIAS: tl.constexpr, RELU: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A tile of ``out (out_rows, G * out_channels)``; for SPLIT of float32 ``(splits, out_rows, G * out_channels)``.

    The map is a :class:`~.packing.PackedMap`. One flat loop over taps and channels: a loop over the taps around one
    over few channels would leave nothing to prefetch. STEPS of BK channels; WHOLE: channels are whole steps and tiles.
    """
    tile, group = tl.program_id(0), tl.program_id(2)
    n, c = tl.program_id(1) * BN + tl.arange(0, BN), tl.arange(0, BK)
    first = tl.load(starts + tile)
    count = tl.load(starts + tile + 1) - first
    entry_at = entries + first.to(tl.int64) * BM + tl.arange(0, BM)
    tap_at = taps + first
    x_at = x + group * in_channels
    weight_at = weight + group * weight_group
    sums = tl.zeros((BM, BN), tl.float32)
    for step in tl.range(0, count * STEPS, num_stages=STAGES):
        slot, channel = step // STEPS, step % STEPS * BK + c
        rows = tl.load(entry_at + slot * BM)
        tap = tl.load(tap_at + slot).to(tl.int64)
        there, inside = (rows >= 0)[:, None], (channel < in_channels)
        sources = x_at + rows.to(tl.int64)[:, None] * x_row + channel[None, :]
        kernel = weight_at + tap * weight_tap + channel[:, None] * weight_in + n[None, :] * weight_out
        if WHOLE:
            left = tl.load(sources, mask=there, other=0.0)
            right = tl.load(kernel)
        else:
            left = tl.load(sources, mask=there & inside[None, :], other=0.0)
            right = tl.load(kernel, mask=inside[:, None] & (n < out_channels)[None, :], other=0.0)
        sums = tl.dot(left, right, sums, input_precision=PRECISION)
    row = tl.load(order + tile * BM + tl.arange(0, BM))
    width = out_channels * tl.num_programs(2)
    column = group * out_channels + n
    if HAS_BIAS:
        sums += tl.load(bias + column, mask=n < out_channels, other=0.0).to(tl.float32)[None, :]
    if RELU:
        sums = tl.maximum(sums, 0.0, propagate_nan=tl.PropagateNan.ALL)
    at = out + row.to(tl.int64)[:, None] * width + column[None, :]
    if SPLIT:
        at += (tile // tiles).to(tl.int64) * out_rows * width
    tl.store(at, sums.to(out.dtype.element_ty), mask=(row < out_rows)[:, None] & (n < out_channels)[None, :])


@triton.jit
def sum_parts_kernel(
    parts, bias, out, count, width, PARTS: tl.constexpr, HAS_BIAS: tl.constexpr, RELU: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """``out (count,)`` of ``parts (PARTS, count)``, the first part first; ``bias (width,)`` repeats along it."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    total = tl.zeros((BLOCK,), tl.float32)
    for part in tl.static_range(PARTS):
        total += tl.load(parts + part * tl.cast(count, tl.int64) + at, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        total += tl.load(bias + at % width, mask=inside, other=0.0).to(tl.float32)
    if RELU:
        total = tl.maximum(total, 0.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tap"])
def fetch_on_demand_kernel(
    x, weight, inputs, outputs, starts, out,
    tap, pair_tiles, in_channels, out_channels, x_row, weight_tap, weight_group, weight_in, weight_out,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STEPS: tl.constexpr, WHOLE: tl.constexpr,
    ALL: tl.constexpr, ATOMIC: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Add the products of a tile of pairs of one tap to float32 ``out (N_out, G * out_channels)``.

    Programs ``(pair tile and channel tile, group)`` for the tap that is given; or, for ALL, of all taps, the pair tiles
    of each behind each other. Without ATOMIC no two programs of a launch may have an output in common.
    """
    channel_tiles = tl.cdiv(out_channels, BN)
    tile, group = tl.program_id(0) // channel_tiles, tl.program_id(1)
    if ALL:  # the first axis of a grid is the one that may be long
        tap = tile // pair_tiles
        tile = tile % pair_tiles
    begin, end = tl.load(starts + tap), tl.load(starts + tap + 1)
    pair = begin + tile * BM + tl.arange(0, BM)
    if begin + tile * BM < end:
        n, c = tl.program_id(0) % channel_tiles * BN + tl.arange(0, BN), tl.arange(0, BK)
        inside = pair < end
        rows = tl.load(inputs + pair, mask=inside, other=0).to(tl.int64)
        x_at = x + group * in_channels + rows[:, None] * x_row
        weight_at = weight + tl.cast(tap, tl.int64) * weight_tap + group * weight_group + n[None, :] * weight_out
        sums = tl.zeros((BM, BN), tl.float32)
        for step in tl.range(0, STEPS, num_stages=STAGES):
            channel = step * BK + c
            if WHOLE:
                left = tl.load(x_at + channel[None, :])
                right = tl.load(weight_at + channel[:, None] * weight_in)
            else:
                left = tl.load(x_at + channel[None, :], mask=(channel < in_channels)[None, :], other=0.0)
                there = (channel < in_channels)[:, None] & (n < out_channels)[None, :]
                right = tl.load(weight_at + channel[:, None] * weight_in, mask=there, other=0.0)
            sums = tl.dot(left, right, sums, input_precision=PRECISION)
        target = tl.load(outputs + pair, mask=inside, other=0).to(tl.int64)
        width = out_channels * tl.num_programs(1)
        at = out + target[:, None] * width + (group * out_channels + n)[None, :]
        mask = inside[:, None] & (n < out_channels)[None, :]
        if ATOMIC:
            tl.atomic_add(at, sums, mask=mask, sem="relaxed")
        else:
            tl.store(at, tl.load(at, mask=mask, other=0.0) + sums, mask=mask)


@triton.jit
def weight_gradient_kernel(
    x, grad, inputs, outputs, starts, out,
    groups, in_channels, out_channels, x_row, grad_row,
    BI: tl.constexpr, BO: tl.constexpr, BP: tl.constexpr, PARTS: tl.constexpr, WHOLE: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A tile of float32 ``out (PARTS, K, G, in_channels, out_channels)``: products of a share of a tap's pairs.

    Programs ``(tap * G + group, channel tile, part)``. WHOLE: channels are whole tiles.
    """
    tap, group, part = tl.program_id(0) // groups, tl.program_id(0) % groups, tl.program_id(2)
    out_tiles = tl.cdiv(out_channels, BO)
    i = tl.program_id(1) // out_tiles * BI + tl.arange(0, BI)
    o = tl.program_id(1) % out_tiles * BO + tl.arange(0, BO)
    start, stop = tl.load(starts + tap), tl.load(starts + tap + 1)
    share = tl.cdiv(tl.cdiv(stop - start, BP), PARTS) * BP
    begin = start + part * share
    end = tl.minimum(begin + share, stop)
    lane = tl.arange(0, BP)
    x_at, grad_at = x + group * in_channels + i[:, None], grad + group * out_channels + o[None, :]
    sums = tl.zeros((BI, BO), tl.float32)
    for pair in tl.range(begin, end, BP, num_stages=STAGES):
        there = pair + lane < end
        source = tl.load(inputs + pair + lane, mask=there, other=0).to(tl.int64)
        target = tl.load(outputs + pair + lane, mask=there, other=0).to(tl.int64)
        if WHOLE:
            left = tl.load(x_at + source[None, :] * x_row, mask=there[None, :], other=0.0)
            right = tl.load(grad_at + target[:, None] * grad_row, mask=there[:, None], other=0.0)
        else:
            left = tl.load(x_at + source[None, :] * x_row, mask=there[None, :] & (i < in_channels)[:, None], other=0.0)
            right = tl.load(
                grad_at + target[:, None] * grad_row, mask=there[:, None] & (o < out_channels)[None, :], other=0.0
            )
        sums = tl.dot(left, right, sums, input_precision=PRECISION)
    at = (part.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * in_channels * out_channels
    mask = (i < in_channels)[:, None] & (o < out_channels)[None, :]
    tl.store(out + at + i[:, None] * out_channels + o[None, :], sums, mask=mask)
