"""Boxes around a few objects, for reports and tests that go over all ops."""

from __future__ import annotations

import torch
from torch import Tensor

OBJECTS = 12


def sample_boxes(count: int, device: torch.device | str, seed: int = 0) -> Tensor:
    """Rotated boxes float32 ``(count, 5)`` as a detector finds them, several around each object."""
    generator = torch.Generator().manual_seed(seed)
    objects = torch.rand(OBJECTS, 5, generator=generator) * torch.tensor([40.0, 40.0, 3.0, 1.0, 3.0])
    objects += torch.tensor([0.0, 0.0, 2.0, 1.5, 0.0])
    found = objects[torch.randint(OBJECTS, (count,), generator=generator)]
    return (found + 0.2 * torch.randn(count, 5, generator=generator)).to(device)


def flat(boxes: Tensor) -> Tensor:
    """x1, y1, x2, y2 ``(N, 4)`` of boxes as if their angles were 0."""
    half = boxes[:, 2:4].abs() / 2
    return torch.cat((boxes[:, :2] - half, boxes[:, :2] + half), 1)
