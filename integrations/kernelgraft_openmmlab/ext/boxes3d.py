"""3-D boxes: what they share seen from above, suppression, and the points in them."""

from __future__ import annotations

import torch
from torch import Tensor

from kernelgraft_core import boxes as core

__all__ = (
    "iou3d_boxes_overlap_bev_forward",
    "iou3d_nms3d_forward",
    "iou3d_nms3d_normal_forward",
    "points_in_boxes_all_forward",
    "points_in_boxes_cpu_forward",
    "points_in_boxes_part_forward",
)

_BEV = [0, 1, 3, 4, 6]  # of x, y, z, sizes along them, heading: what is seen from above


def iou3d_boxes_overlap_bev_forward(boxes_a: Tensor, boxes_b: Tensor, ans_overlap: Tensor) -> None:
    ans_overlap.copy_(core.boxes_overlap_bev(boxes_a.detach(), boxes_b.detach()))


def iou3d_nms3d_forward(boxes: Tensor, keep: Tensor, keep_num: Tensor, nms_overlap_thresh: float) -> None:
    _keep(core.rotated_nms(boxes.detach()[:, _BEV], None, nms_overlap_thresh), keep, keep_num)


def iou3d_nms3d_normal_forward(boxes: Tensor, keep: Tensor, keep_num: Tensor, nms_overlap_thresh: float) -> None:
    center, half = boxes.detach()[:, :2], boxes.detach()[:, 3:5] / 2
    flat = torch.cat((center - half, center + half), 1)
    _keep(core.nms(flat, None, nms_overlap_thresh), keep, keep_num)


def _keep(rows: Tensor, keep: Tensor, keep_num: Tensor) -> None:
    keep[: len(rows)] = rows
    keep_num.fill_(len(rows))


def points_in_boxes_part_forward(boxes: Tensor, points: Tensor, box_idx_of_points: Tensor) -> None:
    box_idx_of_points.copy_(core.first_box_of_points(points.detach(), boxes.detach()))


def points_in_boxes_all_forward(boxes: Tensor, points: Tensor, box_idx_of_points: Tensor) -> None:
    box_idx_of_points.copy_(core.points_in_boxes(points.detach(), boxes.detach()))


def points_in_boxes_cpu_forward(boxes: Tensor, points: Tensor, point_indices: Tensor) -> None:
    point_indices.copy_(core.points_in_boxes(points.detach().unsqueeze(0), boxes.detach().unsqueeze(0))[0].T)
