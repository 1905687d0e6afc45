"""The plainest correct membership of points in boxes and polygons, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 1 << 21  # pairs of a point and a box at a time


def points_in_boxes_all(points: Tensor, frames: Tensor) -> Tensor:
    found = torch.empty((*points.shape[:2], frames.shape[2]), dtype=torch.bool, device=points.device)
    for some, out in _chunks(points, found, frames.shape[2]):
        out.copy_(_inside(some, frames))
    return found


def points_in_boxes_first(points: Tensor, frames: Tensor) -> Tensor:
    found = torch.full(points.shape[:2], -1, dtype=torch.int32, device=points.device)
    if frames.shape[2]:
        for some, out in _chunks(points, found, frames.shape[2]):
            inside, box = _inside(some, frames).max(2)
            out.copy_(torch.where(inside, box, -1))
    return found


def points_in_polygons(points: Tensor, polygons: Tensor) -> Tensor:
    """Count the edges that a ray towards larger x crosses; what lies on an edge ends the count, so that it may be
    either way."""
    px, py = points.unsqueeze(2).unbind(1)
    corners = polygons.unflatten(1, (4, 2))
    crossings = torch.zeros((len(points), len(polygons)), dtype=torch.bool, device=points.device)
    ended = torch.zeros_like(crossings)
    for edge in range(4):
        (sx, sy), (tx, ty) = corners[:, edge].unbind(1), corners[:, edge - 1].unbind(1)
        at_corner = ((sx == px) & (sy == py)) | ((tx == px) & (ty == py))
        crosses = ((sy < py) & (ty >= py)) | ((sy >= py) & (ty < py))
        x = sx + (py - sy) * (tx - sx) / torch.where(ty == sy, 1, ty - sy)
        ended |= at_corner | (crosses & (x == px))
        crossings ^= crosses & (x > px) & ~ended
    return crossings


def _chunks(points: Tensor, out: Tensor, boxes: int) -> zip[tuple[Tensor, Tensor]]:
    rows = max(1, CHUNK // max(1, boxes * len(points)))
    return zip(points.split(rows, 1), out.split(rows, 1), strict=True)


def _inside(points: Tensor, frames: Tensor) -> Tensor:
    x, y, z = points.unsqueeze(3).unbind(2)
    center_x, center_y, center_z, half_x, half_y, half_z, cos, sin = frames.unsqueeze(2).unbind(1)
    x, y = x - center_x, y - center_y
    along, across = x * cos + y * sin, y * cos - x * sin
    # Faces on top and below belong to a box, those around it do not.
    return (along.abs() < half_x) & (across.abs() < half_y) & ((z - center_z).abs() <= half_z)
