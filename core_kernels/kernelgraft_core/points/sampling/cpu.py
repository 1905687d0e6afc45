"""Furthest point sampling on a CPU, compiled by numba: blocks of points that a new sample cannot change are skipped."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from kernelgraft_core.points.blocks import BLOCK, PointBlocks
from kernelgraft_core.runtime.threads import Launch, Phase


def furthest_points(values: Tensor, nearest: Tensor, samples: int, distances: bool) -> tuple[Tensor, Tensor]:
    from . import cpu_kernels as kernels

    (clouds, points), values = nearest.shape, values.contiguous()
    nearest = nearest.clone(memory_format=torch.contiguous_format)
    found = torch.zeros((clouds, samples), dtype=torch.int32)
    if clouds and points and samples > 1:
        if distances:
            Launch(Phase(kernels.sample_by_distance.address, clouds))(
                values.data_ptr(), nearest.data_ptr(), clouds, points, found.data_ptr(), samples
            )
        else:
            starts = torch.arange(clouds + 1) * points
            blocks = PointBlocks.of(values.view(clouds * points, 3), starts)
            Launch(Phase(kernels.sample_places.address, clouds))(
                values.data_ptr(), nearest.data_ptr(), clouds, points, found.data_ptr(), samples,
                blocks.block_starts.data_ptr(), blocks.boxes.shape[1], blocks.order.data_ptr(),
                blocks.places.data_ptr(), blocks.boxes.data_ptr(), BLOCK,
            )  # fmt: skip
    return found, nearest


def supports_furthest_points(values: Tensor, *_: object) -> str | None:
    if values.dtype != torch.float32:
        return f"{values.dtype} is computed by the reference"
    return None if importlib.util.find_spec("numba") else "numba is not installed"
