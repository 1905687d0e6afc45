"""Pooling of the points in oriented boxes."""

from __future__ import annotations

from torch import Tensor

from kernelgraft_core.points.roi_pool import ops as core

__all__ = ("roiaware_pool3d_backward", "roiaware_pool3d_forward", "roipoint_pool3d_forward")


def roiaware_pool3d_forward(
    rois: Tensor,
    pts: Tensor,
    pts_feature: Tensor,
    argmax: Tensor,
    pts_idx_of_voxels: Tensor,
    pooled_features: Tensor,
    pool_method: int,
) -> None:
    mode = core.MODES[pool_method]
    core.roi_aware_pool_into(rois, pts, pts_feature, pooled_features, argmax, pts_idx_of_voxels, mode)


def roiaware_pool3d_backward(
    pts_idx_of_voxels: Tensor, argmax: Tensor, grad_out: Tensor, grad_in: Tensor, pool_method: int
) -> None:
    mode = core.MODES[pool_method]
    grad_in.copy_(core.roi_aware_gradient(grad_out, argmax, pts_idx_of_voxels, len(grad_in), mode))


def roipoint_pool3d_forward(
    xyz: Tensor, boxes3d: Tensor, pts_feature: Tensor, pooled_features: Tensor, pooled_empty_flag: Tensor
) -> None:
    pooled, empty = core.roi_point_pool(xyz, pts_feature, boxes3d, pooled_features.shape[2])
    pooled_features.copy_(pooled)
    pooled_empty_flag.copy_(empty)
