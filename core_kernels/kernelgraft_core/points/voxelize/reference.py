"""The plainest correct voxelization, on any device: points are sorted by voxel."""

from __future__ import annotations

import torch
from torch import Tensor

from kernelgraft_core.sparse.grids import grid_keys, grid_steps, starts_of

from .grid import grid_of


def dynamic_voxelize(points: Tensor, voxel_size: list[float], point_range: list[float]) -> Tensor:
    grid, wide = grid_of(voxel_size, point_range), torch.promote_types(points.dtype, torch.float32)
    corner, extent = (torch.tensor(each, dtype=wide, device=points.device) for each in (grid.low, grid.size))
    cells = torch.floor((points[:, : len(voxel_size)].to(wide) - corner) / extent)
    # Compared as floats, in float64 that has room for every grid: integers of NaN and infinity are anything.
    inside = ((cells >= 0) & (cells.double() < torch.tensor(grid.shape, device=points.device))).all(1, keepdim=True)
    return torch.where(inside, cells, -1).to(torch.int32).flip(1)


def hard_voxelize(
    points: Tensor,
    voxel_size: list[float],
    point_range: list[float],
    voxels: Tensor,
    coordinates: Tensor,
    counts: Tensor,
) -> Tensor:
    max_voxels, max_points, _ = voxels.shape
    cells = dynamic_voxelize(points, voxel_size, point_range)
    rows = (cells[:, 0] >= 0).nonzero().squeeze(1)
    cells = cells[rows]
    shape = grid_of(voxel_size, point_range).shape[::-1]
    steps = grid_steps(shape[1:], shape[0])
    keys, order = grid_keys(cells, steps).sort(stable=True)
    begins = torch.ones_like(keys, dtype=torch.bool)
    begins[1:] = keys[1:] != keys[:-1]
    group = begins.cumsum(0) - 1
    first = order[begins]  # of each voxel, in the order of keys
    by_first = first.argsort()
    place = torch.empty_like(by_first)
    place[by_first] = torch.arange(len(first), device=points.device)
    sizes = torch.bincount(group, minlength=len(first))
    voxel = place[group]
    slot = torch.arange(len(keys), device=points.device) - starts_of(sizes)[group]
    kept = (voxel < max_voxels) & (slot < max_points)
    voxels[voxel[kept], slot[kept]] = points[rows[order[kept]]]
    number = min(len(first), max_voxels)
    coordinates[:number] = cells[first[by_first[:number]]]
    counts.zero_()
    counts[:number] = sizes[by_first[:number]].clamp(max=max_points).int()
    return torch.tensor(number, device=points.device)
