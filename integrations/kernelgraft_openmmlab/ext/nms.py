"""Suppression of axis-aligned, rotated and quadrilateral boxes."""

from __future__ import annotations

from torch import Tensor

from kernelgraft_core import boxes as core

__all__ = ("nms", "nms_match", "nms_quadri", "nms_rotated", "softnms")

_METHODS = ("naive", "linear", "gaussian")


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    return core.nms(boxes.detach(), scores.detach(), iou_threshold, offset)


def softnms(
    boxes: Tensor,
    scores: Tensor,
    dets: Tensor,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    method: int,
    offset: int,
) -> Tensor:
    boxes, scores = boxes.detach(), scores.detach()
    rows, left = core.soft_nms(boxes, scores, iou_threshold, sigma, min_score, _METHODS[method], offset)
    dets[: len(rows), :4] = boxes[rows]
    dets[: len(rows), 4] = left
    return rows


def nms_match(dets: Tensor, iou_threshold: float) -> list[list[int]]:
    dets = dets.detach()
    return [group.tolist() for group in core.nms_match(dets[:, :4], dets[:, 4], iou_threshold)]


# Compiled mmcv takes labels for rotated and quadrilateral boxes, and suppresses across them all the same: its own test
# expects that. On a CPU, unlike on a GPU, it drops a box at the very threshold too.


def nms_rotated(
    dets: Tensor,
    scores: Tensor,
    order: Tensor,
    dets_sorted: Tensor,
    labels: Tensor,
    iou_threshold: float,
    multi_label: bool,
) -> Tensor:
    best_first = dets_sorted.detach()[:, :5]
    return order[core.rotated_nms(best_first, None, iou_threshold, inclusive=dets.device.type == "cpu")]


def nms_quadri(
    dets: Tensor, scores: Tensor, order: Tensor, dets_sorted: Tensor, iou_threshold: float, multi_label: bool
) -> Tensor:
    best_first = dets_sorted.detach()[:, :8]
    return order[core.quad_nms(best_first, None, iou_threshold, inclusive=dets.device.type == "cpu")]
