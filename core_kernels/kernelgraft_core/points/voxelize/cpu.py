"""Voxelization on a CPU, compiled by numba: one pass over the points, which a table of voxels numbers as they come."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from kernelgraft_core.runtime.threads import Launch, Phase

from .grid import grid_of

GRAIN = 4096  # points worth a thread


def dynamic_voxelize(points: Tensor, voxel_size: list[float], point_range: list[float]) -> Tensor:
    from . import cpu_kernels as kernels

    grid, points = grid_of(voxel_size, point_range), points.contiguous()
    (rows, channels), dimensions = points.shape, len(voxel_size)
    cells = torch.empty((rows, dimensions), dtype=torch.int32)
    if rows:
        sizes, corner, shape = (torch.tensor(each) for each in (grid.size, grid.low, grid.shape))
        Launch(Phase(kernels.find_voxels.address, rows, GRAIN))(
            points.data_ptr(), rows, channels, dimensions, sizes.data_ptr(), corner.data_ptr(), shape.data_ptr(),
            cells.data_ptr(),
        )  # fmt: skip
    return cells


def hard_voxelize(
    points: Tensor,
    voxel_size: list[float],
    point_range: list[float],
    voxels: Tensor,
    coordinates: Tensor,
    counts: Tensor,
) -> Tensor:
    from . import cpu_kernels as kernels

    points = points.contiguous()
    rows, channels = points.shape
    max_voxels, max_points, _ = voxels.shape
    cells = dynamic_voxelize(points, voxel_size, point_range)
    number, shape = torch.zeros((), dtype=torch.int64), torch.tensor(grid_of(voxel_size, point_range).shape)
    # A third of the table stays free at least, so that a voxel is found within a few steps.
    most = min(rows, max_voxels)
    bits = max(6, (most + most // 2).bit_length())
    table, keys = torch.full((1 << bits,), -1, dtype=torch.int32), torch.empty(most, dtype=torch.int64)
    counts.zero_()
    if rows and max_voxels:
        Launch(Phase(kernels.fill_voxels.address, 1))(
            points.data_ptr(), rows, channels, len(voxel_size), cells.data_ptr(), shape.data_ptr(), table.data_ptr(),
            bits, keys.data_ptr(), most, voxels.data_ptr(), max_voxels, max_points, coordinates.data_ptr(),
            counts.data_ptr(), number.data_ptr(),
        )  # fmt: skip
    return number


def supports_dynamic_voxelize(points: Tensor, *_: object) -> str | None:
    if points.dtype != torch.float32:
        return f"{points.dtype} is computed by the reference"
    return None if importlib.util.find_spec("numba") else "numba is not installed"


def supports_hard_voxelize(
    points: Tensor,
    voxel_size: list[float],
    point_range: list[float],
    voxels: Tensor,
    coordinates: Tensor,
    counts: Tensor,
) -> str | None:
    if not (voxels.is_contiguous() and coordinates.is_contiguous() and counts.is_contiguous()):
        return "what is written to is not contiguous"
    return supports_dynamic_voxelize(points)
