"""Suppression on a GPU: who would drop whom, a bit for each pair, then one pass through the boxes in their order."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from kernelgraft_core.boxes.overlap.triton import EXACT
from kernelgraft_core.boxes.triton_kernels import box_mask_kernel, keep_kernel, outline_mask_kernel

from .reference import limit_of

LARGEST = 1 << 17  # boxes: 2 GB of bits
WARPS = 2  # a thread for each of 64 boxes
GROUP = 8  # rows whose loads are in flight together


def nms_boxes(boxes: Tensor, labels: Tensor | None, threshold: float, inclusive: bool, offset: float) -> Tensor:
    count, rows = len(boxes), boxes.T.contiguous()
    mask, words = _mask(boxes, count)
    limit = limit_of(threshold, boxes.dtype, inclusive)
    numbers = torch.full((2,), limit, dtype=boxes.dtype, device=boxes.device)  # as an argument it would be float32
    numbers[1:] = offset
    if count:
        with torch.cuda.device_of(boxes):
            box_mask_kernel[words, words](
                rows, rows if labels is None else labels.contiguous(), numbers, mask, count, words,
                LABELLED=labels is not None, num_warps=WARPS, **EXACT,
            )  # fmt: skip
    return _kept(mask, count)


def nms_outlines(outlines: Tensor, labels: Tensor | None, threshold: float, inclusive: bool, single: bool) -> Tensor:
    count, rows = outlines.shape[1], outlines.contiguous()
    mask, words = _mask(outlines, count)
    limit = limit_of(threshold, torch.float32 if single else torch.float64, inclusive)
    numbers = torch.full((1,), limit, dtype=torch.float64, device=outlines.device)
    if count:
        with torch.cuda.device_of(outlines):
            outline_mask_kernel[words, words](
                rows, rows if labels is None else labels.contiguous(), numbers, mask, count, words, SINGLE=single,
                LABELLED=labels is not None, num_warps=WARPS, **EXACT,
            )  # fmt: skip
    return _kept(mask, count)


def _mask(boxes: Tensor, count: int) -> tuple[Tensor, int]:
    words = triton.cdiv(count, 64)
    return torch.empty((64 * words, words), dtype=torch.int64, device=boxes.device), words


def _kept(mask: Tensor, count: int) -> Tensor:
    words = mask.shape[1]
    keep = torch.empty(count, dtype=torch.bool, device=mask.device)
    if count:
        lanes = triton.next_power_of_2(words)
        with torch.cuda.device_of(mask):
            keep_kernel[1,](
                mask, keep.view(torch.int8), count, words, WORDS=lanes, GROUP=GROUP,
                num_warps=warps_of(lanes),
            )  # fmt: skip
    return keep


def warps_of(lanes: int) -> int:
    """Of the one program that goes through all boxes: four words for each of its threads."""
    return min(16, max(1, lanes // 128))


def supports_nms_boxes(boxes: Tensor, *_: object) -> str | None:
    return _unsupported(len(boxes))


def supports_nms_outlines(outlines: Tensor, *_: object) -> str | None:
    return _unsupported(outlines.shape[1])


def _unsupported(count: int) -> str | None:
    return f"{count} boxes, at most {LARGEST} are supported" if count > LARGEST else None
