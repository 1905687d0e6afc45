"""Suppression on a CPU, compiled by numba: one pass over the boxes, each compared with those that were kept so far."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor

from kernelgraft_core.boxes.overlap.cpu import DTYPES
from kernelgraft_core.runtime.threads import Launch, Phase

from .reference import limit_of


def nms_boxes(boxes: Tensor, labels: Tensor | None, threshold: float, inclusive: bool, offset: float) -> Tensor:
    return _kept(_suppress_boxes(boxes, labels, limit_of(threshold, boxes.dtype, inclusive), offset))


def nms_match(boxes: Tensor, threshold: float) -> Tensor:
    return _suppress_boxes(boxes, None, limit_of(threshold, boxes.dtype, True), 0)


def nms_outlines(outlines: Tensor, labels: Tensor | None, threshold: float, inclusive: bool, single: bool) -> Tensor:
    from kernelgraft_core.boxes.cpu_kernels import suppress_outlines

    limit = limit_of(threshold, torch.float32 if single else torch.float64, inclusive)
    numbers = torch.tensor([limit], dtype=torch.float64)
    return _kept(_suppress(suppress_outlines, outlines.contiguous(), labels, numbers, single))


def soft_nms(
    boxes: Tensor, scores: Tensor, threshold: float, sigma: float, min_score: float, method: int, offset: float
) -> tuple[Tensor, Tensor]:
    from kernelgraft_core.boxes.cpu_kernels import soften_kernel

    changing = torch.cat((boxes, scores.unsqueeze(1)), 1).T.contiguous()
    rows, left = torch.arange(len(boxes)), torch.zeros(1, dtype=torch.int64)
    numbers = torch.tensor([threshold, sigma, min_score, offset], dtype=boxes.dtype)
    Launch(Phase(soften_kernel(DTYPES[boxes.dtype]).address, 1))(
        changing.data_ptr(), len(boxes), numbers.data_ptr(), method, rows.data_ptr(), left.data_ptr()
    )
    count = int(left)
    return rows[:count].clone(), changing[4, :count].clone()


def _suppress_boxes(boxes: Tensor, labels: Tensor | None, limit: float, offset: float) -> Tensor:
    from kernelgraft_core.boxes.cpu_kernels import suppress_kernel

    numbers = torch.tensor([limit, offset], dtype=boxes.dtype)
    return _suppress(suppress_kernel(DTYPES[boxes.dtype]), boxes.T.contiguous(), labels, numbers, False)


def _suppress(kernel: Any, boxes: Tensor, labels: Tensor | None, numbers: Tensor, single: bool) -> Tensor:
    count = boxes.shape[1]
    winners = torch.empty(count, dtype=torch.int64)
    labels = None if labels is None else labels.contiguous()
    Launch(Phase(kernel.address, 1))(
        boxes.data_ptr(), count, 0 if labels is None else labels.data_ptr(), numbers.data_ptr(), winners.data_ptr(),
        single,
    )  # fmt: skip
    return winners


def _kept(winners: Tensor) -> Tensor:
    return winners == torch.arange(len(winners))


def supports_nms_boxes(*_: object) -> str | None:
    return None if importlib.util.find_spec("numba") else "numba is not installed"


supports_nms_outlines = supports_nms_match = supports_soft_nms = supports_nms_boxes
