"""Overlaps of axis-aligned, rotated and quadrilateral boxes, and points in quadrilaterals."""

from __future__ import annotations

import torch
from torch import Tensor

from kernelgraft_core import boxes as core

__all__ = (
    "bbox_overlaps",
    "box_iou_quadri",
    "box_iou_rotated",
    "diff_iou_rotated_sort_vertices_forward",
    "points_in_polygons_forward",
)

_MODES = ("iou", "iof")


def bbox_overlaps(bboxes1: Tensor, bboxes2: Tensor, ious: Tensor, mode: int, aligned: bool, offset: int) -> None:
    ious.copy_(core.box_iou(*_alike(bboxes1, bboxes2), _MODES[mode], aligned, offset))


def box_iou_rotated(bboxes1: Tensor, bboxes2: Tensor, ious: Tensor, mode_flag: int, aligned: bool) -> None:
    found = core.rotated_iou(*_alike(bboxes1, bboxes2), _MODES[mode_flag], aligned)
    ious.copy_(found.view_as(ious))


def box_iou_quadri(bboxes1: Tensor, bboxes2: Tensor, ious: Tensor, mode_flag: int, aligned: bool) -> None:
    found = core.quad_iou(*_alike(bboxes1, bboxes2), _MODES[mode_flag], aligned)
    ious.copy_(found.view_as(ious))


def diff_iou_rotated_sort_vertices_forward(vertices: Tensor, mask: Tensor, num_valid: Tensor) -> Tensor:
    return core.sort_overlap_vertices(vertices, mask)


def points_in_polygons_forward(points: Tensor, polygons: Tensor, output: Tensor) -> None:
    output.copy_(core.points_in_polygons(*_alike(points, polygons)))


def _alike(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Of one floating point dtype, and without a gradient, as compiled ops take and give them."""
    dtype = torch.promote_types(first.dtype, second.dtype)
    dtype = dtype if dtype.is_floating_point else torch.float32
    return first.detach().to(dtype), second.detach().to(dtype)
