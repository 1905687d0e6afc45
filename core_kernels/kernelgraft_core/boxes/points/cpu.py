"""Points in boxes and polygons on a CPU, compiled by numba; points are split over the threads."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor

from kernelgraft_core.boxes.overlap.cpu import DTYPES
from kernelgraft_core.runtime.threads import Launch, Phase

PAIRS = 1 << 15  # of a point and a box: worth a thread


def points_in_boxes_all(points: Tensor, frames: Tensor) -> Tensor:
    from .cpu_kernels import all_kernel

    out = torch.empty((*points.shape[:2], frames.shape[2]), dtype=torch.bool)
    return _run(all_kernel(DTYPES[points.dtype]), points, frames, out)


def points_in_boxes_first(points: Tensor, frames: Tensor) -> Tensor:
    from .cpu_kernels import first_kernel

    out = torch.empty(points.shape[:2], dtype=torch.int32)
    return _run(first_kernel(DTYPES[points.dtype]), points, frames, out)


def points_in_polygons(points: Tensor, polygons: Tensor) -> Tensor:
    from .cpu_kernels import polygon_kernel

    out = torch.empty((len(points), len(polygons)), dtype=torch.bool)
    return _run(polygon_kernel(DTYPES[points.dtype]), points.unsqueeze(0), polygons.T.unsqueeze(0), out)


def _run(kernel: Any, points: Tensor, boxes: Tensor, out: Tensor) -> Tensor:
    points, boxes, rows = points.contiguous(), boxes.contiguous(), points.shape[0] * points.shape[1]
    count = boxes.shape[2]
    if out.numel():
        Launch(Phase(kernel.address, rows, max(1, PAIRS // max(1, count))))(
            points.data_ptr(), points.shape[1], boxes.data_ptr(), count, out.data_ptr()
        )
    return out


def supports_points_in_boxes_all(*_: object) -> str | None:
    return None if importlib.util.find_spec("numba") else "numba is not installed"


supports_points_in_boxes_first = supports_points_in_polygons = supports_points_in_boxes_all
