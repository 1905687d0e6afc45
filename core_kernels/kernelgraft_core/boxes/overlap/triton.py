"""Overlaps on a GPU: one box of the first with a block of the second, or a block of pairs."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from kernelgraft_core.boxes.triton_kernels import box_kernel, overlap_kernel

BLOCK, WARPS = 64, 2  # a thread for each pair, and registers enough for it
LARGEST, LARGEST_GRID = 1 << 27, 65_535  # boxes whose 13 numbers are counted in 31 bits; programs along the second axis
# A product that is added at once is rounded once: not what a CPU does, and boxes at a threshold would part.
EXACT = {"enable_fp_fusion": False}


def box_iou(a: Tensor, b: Tensor, mode: int, aligned: bool, offset: float) -> Tensor:
    wide = torch.promote_types(a.dtype, torch.float32)
    first, second = (each.to(wide).T.contiguous() for each in (a, b))
    number = torch.full((1,), offset, dtype=wide, device=a.device)
    return _run(box_kernel, first, second, mode, aligned, a.dtype, number)


def outline_overlap(a: Tensor, b: Tensor, mode: int, aligned: bool, dtype: torch.dtype) -> Tensor:
    return _run(overlap_kernel, a.contiguous(), b.contiguous(), mode, aligned, dtype)


def _run(kernel: Any, a: Tensor, b: Tensor, mode: int, aligned: bool, dtype: torch.dtype, *numbers: Tensor) -> Tensor:
    rows, columns = a.shape[1], b.shape[1]
    out = torch.empty((rows,) if aligned else (rows, columns), dtype=dtype, device=a.device)
    blocks = triton.cdiv(columns, BLOCK)
    if out.numel():
        with torch.cuda.device_of(a):
            kernel[(blocks, 1) if aligned else (rows, blocks)](
                a, b, out, *numbers, rows, columns, MODE=mode, ALIGNED=aligned, BLOCK=BLOCK, num_warps=WARPS, **EXACT
            )
    return out


def supports_box_iou(a: Tensor, b: Tensor, mode: int, aligned: bool, *_: object) -> str | None:
    return _unsupported(len(a), len(b), aligned)


def supports_outline_overlap(a: Tensor, b: Tensor, mode: int, aligned: bool, *_: object) -> str | None:
    return _unsupported(a.shape[1], b.shape[1], aligned)


def _unsupported(rows: int, columns: int, aligned: bool) -> str | None:
    if rows > LARGEST or columns > (LARGEST if aligned else LARGEST_GRID * BLOCK):
        return f"{rows} and {columns} boxes are more than a launch can count"
    return None
