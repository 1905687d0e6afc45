"""Arguments for the op that reduces groups of points, for reports and tests that go over all ops."""

from __future__ import annotations

from typing import Any

import torch

from .ops import voxel_groups

TUNED: tuple[str, ...] = ()
POINTS, CHANNELS, SITES = 500, 24, 6


def example_args(
    device: torch.device | str, *, dtype: torch.dtype = torch.bfloat16, **_: int
) -> dict[str, tuple[Any, ...]]:
    """Arguments for each op by its name, the same on every call; sizes of linear layers mean nothing here."""
    generator = torch.Generator().manual_seed(0)
    sites = torch.randint(-1, SITES, (POINTS, 3), generator=generator, dtype=torch.int32)
    groups = voxel_groups(sites.to(device))
    feats = torch.randn((POINTS, CHANNELS), generator=generator).to(device, dtype)
    return {"points_reduce": (feats, groups.order, groups.starts, "mean")}


def peer(op: str, args: tuple[Any, ...]) -> None:
    """None: ``kernelgraft bench`` goes over sizes of linear layers."""
