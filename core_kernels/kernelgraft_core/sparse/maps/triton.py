"""Kernel maps on a GPU: for every output and line of taps one search among the sorted keys, then one look for each
tap. Sorting and numbering are torch's own there.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 256


def sparse_neighbors(
    in_keys: Tensor,
    in_order: Tensor | None,
    out_keys: Tensor,
    out_order: Tensor | None,
    lines: list[int],
    taps: int,
    apart: int,
) -> Tensor:
    rows = len(out_keys)
    found = torch.empty((rows, len(lines) * taps), dtype=torch.int32, device=out_keys.device)
    if not rows or not len(in_keys):
        return found.fill_(-1)
    starts = torch.tensor(lines, device=out_keys.device)
    with torch.cuda.device_of(out_keys):
        neighbors_kernel[triton.cdiv(rows, BLOCK), len(lines)](
            in_keys.contiguous(), in_keys if in_order is None else in_order.contiguous(), out_keys.contiguous(),
            out_keys if out_order is None else out_order.contiguous(), starts, found, len(in_keys), rows, apart,
            TAPS=taps, ROUNDS=len(in_keys).bit_length(), IN_ORDER=in_order is not None, OUT_ORDER=out_order is not None,
            ADJACENT=apart == 1, BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
    return found


def sparse_transpose(neighbors: Tensor, rows: int) -> Tensor:
    found = torch.full((rows, neighbors.shape[1]), -1, dtype=torch.int32, device=neighbors.device)
    if neighbors.numel():
        with torch.cuda.device_of(neighbors):
            transpose_kernel[triton.cdiv(neighbors.numel(), 4 * BLOCK),](
                neighbors.contiguous(), found, neighbors.numel(), neighbors.shape[1], BLOCK=4 * BLOCK, num_warps=4
            )
    return found


@triton.jit
def neighbors_kernel(
    in_keys, in_order, out_keys, out_order, lines, found, in_rows, out_rows, apart,
    TAPS: tl.constexpr, ROUNDS: tl.constexpr, IN_ORDER: tl.constexpr, OUT_ORDER: tl.constexpr, ADJACENT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Programs ``(block of outputs, line of taps)``; ``found (out_rows, lines * TAPS)``."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < out_rows
    line = tl.program_id(1)
    first = tl.load(out_keys + at, mask=inside, other=0) + tl.load(lines + line)
    low = tl.zeros((BLOCK,), tl.int32)
    high = tl.full((BLOCK,), 0, tl.int32) + in_rows
    target = at
    if OUT_ORDER:
        target = tl.load(out_order + at, mask=inside, other=0)
    row = found + (target.to(tl.int64) * tl.num_programs(1) + line) * TAPS
    for tap in tl.static_range(TAPS):
        wanted = first + tap * apart
        if tap == 0 or not ADJACENT:
            # What the last tap found is a bound for the next: keys ascend.
            high = tl.full((BLOCK,), 0, tl.int32) + in_rows
            for _ in range(ROUNDS):
                middle = (low + high) // 2
                less = (low < high) & (tl.load(in_keys + middle, mask=low < high, other=0) < wanted)
                high = tl.where((low < high) & (less == 0), middle, high)
                low = tl.where(less, middle + 1, low)
        hit = (low < in_rows) & (tl.load(in_keys + low, mask=low < in_rows, other=-1) == wanted)
        source = low.to(tl.int64)
        if IN_ORDER:
            source = tl.load(in_order + low, mask=hit, other=0)
        tl.store(row + tap, tl.where(hit, source, -1).to(tl.int32), mask=inside)
        low += hit.to(tl.int32)


@triton.jit
def transpose_kernel(neighbors, found, count, taps, BLOCK: tl.constexpr):
    """Write where each input is read by each tap; no two outputs read one input by the same tap."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    source = tl.load(neighbors + at, mask=at < count, other=-1).to(tl.int64)
    tl.store(found + source * taps + at % taps, (at // taps).to(tl.int32), mask=source >= 0)


def supports_sparse_neighbors(*_: object) -> str | None:
    return None


supports_sparse_transpose = supports_sparse_neighbors
