"""The plainest correct furthest point sampling, on any device: one sample after another."""

from __future__ import annotations

import torch
from torch import Tensor


def furthest_points(values: Tensor, nearest: Tensor, samples: int, distances: bool) -> tuple[Tensor, Tensor]:
    clouds, points = nearest.shape
    nearest = nearest.clone(memory_format=torch.contiguous_format)
    found = torch.zeros((clouds, samples), dtype=torch.int32, device=values.device)
    cloud, rows = torch.arange(clouds, device=values.device), torch.arange(points, device=values.device)
    chosen = torch.zeros_like(cloud)
    for sample in range(1, samples):
        if distances:
            away = values[cloud, chosen]
        else:
            dx, dy, dz = (values - values[cloud, chosen].unsqueeze(1)).unbind(2)
            away = dx * dx + dy * dy + dz * dz
        nearest = torch.where(away < nearest, away, nearest)
        # The lowest of those that are furthest, which argmax does not promise.
        furthest = nearest.amax(1, keepdim=True) if points else nearest
        chosen = torch.where(nearest == furthest, rows, points).amin(1).clamp(max=points - 1)
        found[:, sample] = chosen.int()
    return found, nearest
