"""Reduction of groups on a GPU: one program for each group and block of channels, so that nothing is atomic."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, CHANNELS = 8, 64  # of a tile, at most
KINDS = {"sum": 0, "mean": 1, "max": 2}


def points_reduce(feats: Tensor, order: Tensor, starts: Tensor, reduce: str) -> tuple[Tensor, Tensor]:
    feats, order, starts = feats.contiguous(), order.contiguous(), starts.contiguous()
    groups, channels = starts.shape[0] - 1, feats.shape[1]
    out = feats.new_empty((groups, channels))
    source = order.new_empty((groups, channels) if reduce == "max" else 0)
    if groups and channels:
        width = min(CHANNELS, triton.next_power_of_2(channels))
        with torch.cuda.device_of(feats):
            reduce_rows_kernel[groups, triton.cdiv(channels, width)](
                feats, order, starts, out, source, channels, KIND=KINDS[reduce], ROWS=ROWS, WIDTH=width, num_warps=1
            )
    return out, source


@triton.jit
def reduce_rows_kernel(
    feats, order, starts, out, source, channels, KIND: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """Programs ``(group, block of channels)``; KIND is 0 for sums, 1 for means, 2 for maxima."""
    group = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    real = column < channels
    first, last = tl.load(starts + group), tl.load(starts + group + 1)
    member = tl.arange(0, ROWS)
    place = group * channels + column
    if KIND < 2:
        total = tl.zeros((WIDTH,), tl.float32)
        for begin in range(first, last, ROWS):
            at = begin + member
            row = tl.load(order + at, mask=at < last, other=0)
            mask = (at < last)[:, None] & real[None, :]
            values = tl.load(feats + row[:, None] * channels + column[None, :], mask=mask, other=0)
            total += tl.sum(values.to(tl.float32), 0)
        if KIND == 1:
            total = total / tl.maximum(last - first, 1).to(tl.float32)
        tl.store(out + place, total.to(out.dtype.element_ty), mask=real)
    else:
        lowest = float("-inf")
        best = tl.full((WIDTH,), lowest, tl.float32)
        come_from = tl.full((WIDTH,), -1, tl.int64)
        for begin in range(first, last, ROWS):
            at = begin + member
            row = tl.load(order + at, mask=at < last, other=0)
            mask = (at < last)[:, None] & real[None, :]
            values = tl.load(feats + row[:, None] * channels + column[None, :], mask=mask, other=0).to(tl.float32)
            known = mask & (values == values)  # NaN is never taken
            values = tl.where(known, values, lowest)
            largest = tl.max(values, 0)
            rows = tl.where(known & (values == largest[None, :]), row[:, None], 1 << 62)
            lower = tl.min(rows, 0)
            # Rows ascend, so that an equal one which comes later takes the place of nothing but nothing.
            taken = (lower < (1 << 62)) & ((largest > best) | (come_from < 0))
            best = tl.where(taken, largest, best)
            come_from = tl.where(taken, lower, come_from)
        tl.store(out + place, best.to(out.dtype.element_ty), mask=real)
        tl.store(source + place, come_from, mask=real)


def supports_points_reduce(feats: Tensor, *_: object) -> str | None:
    return "float64 is computed by the reference" if feats.dtype == torch.float64 else None
