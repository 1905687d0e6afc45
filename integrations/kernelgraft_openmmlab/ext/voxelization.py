"""Voxelization, and the reduction of points to voxels."""

from __future__ import annotations

import torch
from torch import Tensor

from kernelgraft_core.points.reduce import ops as reduction
from kernelgraft_core.points.voxelize import ops as voxels_of

__all__ = (
    "dynamic_point_to_voxel_backward",
    "dynamic_point_to_voxel_forward",
    "dynamic_voxelize_forward",
    "hard_voxelize_forward",
)


def dynamic_voxelize_forward(
    points: Tensor, voxel_size: Tensor, coors_range: Tensor, coors: Tensor, NDim: int = 3
) -> None:
    coors.copy_(voxels_of.dynamic_voxelize(points, *_grid(voxel_size, coors_range, NDim)))


def hard_voxelize_forward(
    points: Tensor,
    voxel_size: Tensor,
    coors_range: Tensor,
    voxels: Tensor,
    coors: Tensor,
    num_points_per_voxel: Tensor,
    voxel_num: Tensor,
    max_points: int = 35,
    max_voxels: int = 20000,
    NDim: int = 3,
    deterministic: bool = True,
) -> None:
    """Ours is deterministic whatever is asked for."""
    found = voxels_of.hard_voxelize_into(
        points,
        *_grid(voxel_size, coors_range, NDim),
        voxels[:max_voxels, :max_points],
        coors[:max_voxels],
        num_points_per_voxel[:max_voxels],
    )
    voxel_num.copy_(found)


def dynamic_point_to_voxel_forward(
    feats: Tensor, coors: Tensor, reduce_type: str = "max"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return reduction.scatter_points(feats, coors, reduce_type)


def dynamic_point_to_voxel_backward(
    grad_feats: Tensor,
    grad_reduced_feats: Tensor,
    feats: Tensor,
    reduced_feats: Tensor,
    coors_idx: Tensor,
    reduce_count: Tensor,
    reduce_type: str = "max",
) -> None:
    if not (len(feats) and len(reduced_feats)):
        grad_feats.zero_()
    elif reduce_type == "max":
        source = reduction.largest_rows(feats, coors_idx, len(reduced_feats))
        grad_feats.copy_(reduction.pass_to_largest(grad_reduced_feats, source, len(feats)))
    else:
        grad = grad_reduced_feats
        if reduce_type == "mean":
            grad = grad / reduce_count.unsqueeze(1).to(grad.dtype)
        inside = (coors_idx >= 0).unsqueeze(1)
        grad_feats.copy_(torch.where(inside, grad[coors_idx.clamp(min=0).long()], 0))


def _grid(voxel_size: Tensor, coors_range: Tensor, dimensions: int) -> tuple[list[float], list[float]]:
    return voxel_size[:dimensions].tolist(), coors_range[: 2 * dimensions].tolist()
