"""Neighbours on a CPU, compiled by numba: points in blocks, and only the blocks that can hold any are looked at."""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor

from kernelgraft_core.points.blocks import BLOCK, PointBlocks
from kernelgraft_core.runtime.threads import Launch, Phase

GRAIN = 32  # centers worth a thread


def points_knn(
    points: Tensor, centers: Tensor, point_starts: Tensor, center_starts: Tensor, neighbors: int
) -> tuple[Tensor, Tensor]:
    rows, squares = torch.empty((len(centers), neighbors), dtype=torch.int32), torch.empty((len(centers), neighbors))
    if len(centers):
        centers, center_starts = centers.contiguous(), center_starts.contiguous()
        blocks = PointBlocks.of(points, point_starts)
        _launch("nearest", len(centers))(
            *_told(blocks, centers, center_starts), neighbors, rows.data_ptr(), squares.data_ptr()
        )
    return rows, squares


def points_in_ball(
    points: Tensor,
    centers: Tensor,
    point_starts: Tensor,
    center_starts: Tensor,
    min_radius: float,
    max_radius: float,
    samples: int,
) -> Tensor:
    rows, bounds = torch.empty((len(centers), samples), dtype=torch.int32), torch.tensor([min_radius, max_radius])
    bounds = bounds.square()
    if len(centers):
        points, centers, center_starts = points.contiguous(), centers.contiguous(), center_starts.contiguous()
        blocks = PointBlocks.of(points, point_starts)
        _launch("within", len(centers))(
            *_told(blocks, centers, center_starts), samples, rows.data_ptr(), bounds.data_ptr(), points.data_ptr()
        )
    return rows


def _told(blocks: PointBlocks, centers: Tensor, center_starts: Tensor) -> tuple[int, ...]:
    """What a launch tells both kernels."""
    return (
        blocks.starts.data_ptr(), blocks.block_starts.data_ptr(), len(blocks.starts) - 1, blocks.places.shape[1],
        blocks.order.data_ptr(), blocks.places.data_ptr(), blocks.boxes.shape[1], blocks.boxes.data_ptr(), BLOCK,
        centers.data_ptr(), len(centers), center_starts.data_ptr(),
    )  # fmt: skip


@functools.lru_cache(maxsize=256)
def _launch(kernel: str, centers: int) -> Launch:
    from . import cpu_kernels as kernels

    return Launch(Phase(getattr(kernels, kernel).address, centers, GRAIN))


def supports_points_knn(points: Tensor, *_: object) -> str | None:
    if points.dtype != torch.float32:
        return f"{points.dtype} is computed by the reference"
    return None if importlib.util.find_spec("numba") else "numba is not installed"


supports_points_in_ball = supports_points_knn
