"""Arguments for the ops that pool points in boxes, for reports and tests that go over all ops."""

from __future__ import annotations

from typing import Any

import torch

from .ops import roi_aware_pool_into

TUNED: tuple[str, ...] = ()
POINTS, BOXES, CHANNELS = 400, 6, 8


def example_args(
    device: torch.device | str, *, dtype: torch.dtype = torch.bfloat16, **_: int
) -> dict[str, tuple[Any, ...]]:
    """Arguments for each op by its name, the same on every call; sizes of linear layers mean nothing here."""
    generator = torch.Generator().manual_seed(0)
    # Eighths and boxes along the axes: all types agree about what is inside.
    points = torch.randint(-32, 32, (1, POINTS, 3), generator=generator).to(device) / 8
    rois = torch.randint(-16, 16, (1, BOXES, 7), generator=generator).to(device) / 8
    rois[..., 3:6], rois[..., 6] = 3.1875, 0
    feats = torch.randn((POINTS, CHANNELS), generator=generator).to(device, dtype)
    cells = (BOXES, 2, 3, 2)
    pooled = torch.zeros((*cells, CHANNELS), device=device, dtype=dtype)
    members = torch.zeros((*cells, 20), device=device, dtype=torch.int32)
    source = torch.empty(pooled.shape, device=device, dtype=torch.int32)
    roi_aware_pool_into(rois[0], points[0], feats, pooled, source, members)
    return {
        "roi_aware_gradient": (pooled, source, members, POINTS, "max"),
        "points_in_rois": (points, rois, 16),
    }


def peer(op: str, args: tuple[Any, ...]) -> None:
    """None: ``kernelgraft bench`` goes over sizes of linear layers."""
