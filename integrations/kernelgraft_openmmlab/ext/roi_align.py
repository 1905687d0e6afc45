"""Pooling of regions of interest: upright, rotated, curved, precise and deformable."""

from __future__ import annotations

import torch
from torch import Tensor

import kernelgraft_core.vision.bezier_align as bezier
import kernelgraft_core.vision.border_align as border
import kernelgraft_core.vision.deform_roi_pool as deformed
import kernelgraft_core.vision.precise_roi_pool as precise
import kernelgraft_core.vision.roi_align as upright
import kernelgraft_core.vision.roi_align_rotated as rotated
import kernelgraft_core.vision.roi_pool as largest

__all__ = (
    "bezier_align_backward",
    "bezier_align_forward",
    "border_align_backward",
    "border_align_forward",
    "deform_roi_pool_backward",
    "deform_roi_pool_forward",
    "prroi_pool_backward",
    "prroi_pool_coor_backward",
    "prroi_pool_forward",
    "riroi_align_rotated_backward",
    "riroi_align_rotated_forward",
    "roi_align_backward",
    "roi_align_forward",
    "roi_align_rotated_backward",
    "roi_align_rotated_forward",
    "roi_pool_backward",
    "roi_pool_forward",
)

_LARGEST = 0  # pool_mode; 1 is the mean


def roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    size = (aligned_height, aligned_width)
    if pool_mode == _LARGEST:
        found = upright.roi_align_max(input, rois, size, spatial_scale, sampling_ratio, aligned)
        for target, each in zip((output, argmax_y, argmax_x), found, strict=True):
            target.copy_(each)
    else:
        output.copy_(upright.roi_align(input, rois, size, spatial_scale, sampling_ratio, aligned))


def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    shape = grad_input.shape
    if pool_mode == _LARGEST:
        grad_input.copy_(upright.roi_align_max_backward(grad_output, rois, argmax_y, argmax_x, shape))
    else:
        grad_input.copy_(upright.roi_align_backward(grad_output, rois, shape, spatial_scale, sampling_ratio, aligned))


def roi_align_rotated_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    aligned: bool,
    clockwise: bool,
) -> None:
    size = (pooled_height, pooled_width)
    output.copy_(rotated.roi_align_rotated(input, rois, size, spatial_scale, sampling_ratio, aligned, clockwise))


def roi_align_rotated_backward(
    grad_output: Tensor,
    rois: Tensor,
    grad_input: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    aligned: bool,
    clockwise: bool,
) -> None:
    how = (spatial_scale, sampling_ratio, aligned, clockwise)
    grad_input.copy_(rotated.roi_align_rotated_backward(grad_output, rois, grad_input.shape, *how))


def riroi_align_rotated_forward(
    features: Tensor,
    rois: Tensor,
    output: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
    num_samples: int,
    num_orientations: int,
    clockwise: bool,
) -> None:
    how = (spatial_scale, num_samples, num_orientations, clockwise)
    output.copy_(rotated.riroi_align_rotated(features, rois, (pooled_height, pooled_width), *how))


def riroi_align_rotated_backward(
    grad_output: Tensor,
    rois: Tensor,
    grad_input: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
    num_samples: int,
    num_orientations: int,
    clockwise: bool,
) -> None:
    how = (spatial_scale, num_samples, num_orientations, clockwise)
    grad_input.copy_(rotated.riroi_align_rotated_backward(grad_output, rois, grad_input.shape, *how))


def roi_pool_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    found, pixels = largest.roi_pool(input, rois, (pooled_height, pooled_width), spatial_scale)
    output.copy_(found)
    argmax.copy_(pixels)


def roi_pool_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax: Tensor,
    grad_input: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    grad_input.copy_(largest.roi_pool_backward(grad_output, rois, argmax, grad_input.shape))


def bezier_align_forward(
    input: Tensor,
    beziers: Tensor,
    output: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    aligned: bool,
) -> None:
    size = (aligned_height, aligned_width)
    output.copy_(bezier.bezier_align(input, beziers, size, spatial_scale, sampling_ratio, aligned))


def bezier_align_backward(
    grad_output: Tensor,
    beziers: Tensor,
    grad_input: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    aligned: bool,
) -> None:
    how = (spatial_scale, sampling_ratio, aligned)
    grad_input.copy_(bezier.bezier_align_backward(grad_output, beziers, grad_input.shape, *how))


def border_align_forward(input: Tensor, boxes: Tensor, output: Tensor, argmax_idx: Tensor, pool_size: int) -> None:
    found, number = border.border_align(input, boxes, pool_size)
    output.copy_(found)
    argmax_idx.copy_(number)


def border_align_backward(
    grad_output: Tensor, boxes: Tensor, argmax_idx: Tensor, grad_input: Tensor, pool_size: int
) -> None:
    grad_input.copy_(border.border_align_backward(grad_output, boxes, argmax_idx, grad_input.shape, pool_size))


def prroi_pool_forward(
    features: Tensor, rois: Tensor, output: Tensor, pooled_height: int, pooled_width: int, spatial_scale: float
) -> None:
    output.copy_(precise.prroi_pool(features, rois, (pooled_height, pooled_width), spatial_scale))


def prroi_pool_backward(
    grad_output: Tensor, rois: Tensor, grad_input: Tensor, pooled_height: int, pooled_width: int, spatial_scale: float
) -> None:
    grad_input.copy_(precise.prroi_pool_backward(grad_output, rois, grad_input.shape, spatial_scale))


def prroi_pool_coor_backward(
    output: Tensor,
    grad_output: Tensor,
    features: Tensor,
    rois: Tensor,
    grad_coor: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    if not len(rois):
        return
    with torch.enable_grad():
        leaf = rois.detach().requires_grad_()
        again = precise.prroi_pool(features.detach(), leaf, (pooled_height, pooled_width), spatial_scale)
        grad_coor.copy_(torch.autograd.grad(again, leaf, grad_output)[0])


def deform_roi_pool_forward(
    input: Tensor,
    rois: Tensor,
    offset: Tensor,
    output: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    gamma: float,
) -> None:
    how = ((pooled_height, pooled_width), spatial_scale, sampling_ratio, gamma)
    output.copy_(deformed.deform_roi_pool(input, rois, offset if offset.numel() else None, *how))


def deform_roi_pool_backward(
    grad_output: Tensor,
    input: Tensor,
    rois: Tensor,
    offset: Tensor,
    grad_input: Tensor,
    grad_offset: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    gamma: float,
) -> None:
    if not len(rois):
        return
    how = ((pooled_height, pooled_width), spatial_scale, sampling_ratio, gamma)
    with torch.enable_grad():
        leaves = [input.detach().requires_grad_()]
        if offset.numel():
            leaves.append(offset.detach().requires_grad_())
        again = deformed.deform_roi_pool(leaves[0], rois, leaves[1] if len(leaves) > 1 else None, *how)
        found = torch.autograd.grad(again, leaves, grad_output)
    for target, each in zip((grad_input, grad_offset), found, strict=False):
        target.copy_(each)
