"""The plainest correct search for neighbours, on any device: all distances of some centers at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

NUMBERS = 1 << 22  # distances that are held at a time


def points_knn(
    points: Tensor, centers: Tensor, point_starts: Tensor, center_starts: Tensor, neighbors: int
) -> tuple[Tensor, Tensor]:
    rows = torch.full((len(centers), neighbors), -1, dtype=torch.int32, device=points.device)
    squares = points.new_full((len(centers), neighbors), torch.inf)
    for first, last, distances in _distances(points, centers, point_starts, center_starts):
        found, order = torch.where(distances.isnan(), torch.inf, distances).sort(dim=1, stable=True)
        found, order = found[:, :neighbors], order[:, :neighbors]
        squares[first:last, : found.shape[1]] = found
        rows[first:last, : found.shape[1]] = torch.where(found.isinf(), -1, order).int()
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
    low, high = squared(min_radius), squared(max_radius)
    rows = torch.full((len(centers), samples), -1, dtype=torch.int32, device=points.device)
    for first, last, distances in _distances(points, centers, point_starts, center_starts):
        count = distances.shape[1]
        near = (distances == 0) | ((distances >= low) & (distances < high))
        numbers = torch.where(near, torch.arange(count, device=points.device), count)
        found = numbers.sort(dim=1).values[:, :samples]
        found = torch.where(found == count, found[:, :1], found)
        rows[first:last, : found.shape[1]] = torch.where(found == count, -1, found).int()
        rows[first:last, found.shape[1] :] = rows[first:last, :1]
    return rows


def squared(radius: float) -> float:
    """A radius in float32 times itself, rounded to float32: what mmcv compares squared distances with."""
    return torch.tensor(radius, dtype=torch.float32).square().item()


def _distances(
    points: Tensor, centers: Tensor, point_starts: Tensor, center_starts: Tensor
) -> Iterator[tuple[int, int, Tensor]]:
    """Squared distances of centers ``first`` to ``last`` to all points of their cloud; clouds without points are left
    out."""
    point_bounds, center_bounds = point_starts.tolist(), center_starts.tolist()
    for cloud in range(len(point_bounds) - 1):
        known = points[point_bounds[cloud] : point_bounds[cloud + 1]]
        if not len(known):
            continue
        step = max(1, NUMBERS // len(known))
        for first in range(center_bounds[cloud], center_bounds[cloud + 1], step):
            last = min(first + step, center_bounds[cloud + 1])
            dx, dy, dz = (centers[first:last, None] - known).unbind(2)
            yield first, last, dx * dx + dy * dy + dz * dz
