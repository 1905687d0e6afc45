"""Arguments for the ops of points in boxes, for reports and tests that go over all ops."""

from __future__ import annotations

from typing import Any

import torch

from kernelgraft_core.boxes.samples import sample_boxes

TUNED: tuple[str, ...] = ()


def example_args(device: torch.device | str, **_: object) -> dict[str, tuple[Any, ...]]:
    """Arguments for each op by its name, the same on every call; sizes of linear layers mean nothing here."""
    generator = torch.Generator().manual_seed(0)
    points = torch.rand(2, 800, 3, generator=generator) * torch.tensor([40.0, 40.0, 2.0])
    x, y, width, height, angle = sample_boxes(60, "cpu").view(2, 30, 5).unbind(2)
    one = torch.ones_like(x)
    frames = torch.stack((x, y, one, width / 2, height / 2, one, angle.cos(), angle.sin()), 1)
    left, right, low, high = x - width, x + width, y - height, y + height
    diamonds = torch.stack((x, low, right, y, x, high, left, y), 2)[0]
    boxes = points.to(device), frames.to(device)
    return {
        "points_in_boxes_all": boxes,
        "points_in_boxes_first": boxes,
        "points_in_polygons": (points[0, :, :2].to(device), diamonds.to(device)),
    }


def peer(op: str, args: tuple[Any, ...]) -> None:
    """None: ``kernelgraft bench`` goes over sizes of linear layers."""
