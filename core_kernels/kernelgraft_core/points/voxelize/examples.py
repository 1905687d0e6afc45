"""Arguments for the ops of voxelization, for reports and tests that go over all ops."""

from __future__ import annotations

from typing import Any

import torch

TUNED: tuple[str, ...] = ()
POINTS, CHANNELS, VOXELS, ROWS = 600, 4, 200, 5


def example_args(device: torch.device | str, **_: object) -> dict[str, tuple[Any, ...]]:
    """Arguments for each op by its name, the same on every call; sizes of linear layers mean nothing here."""
    generator = torch.Generator().manual_seed(0)
    # Eighths, which every floating point type holds: all of them see the same voxels.
    points = torch.randint(-40, 40, (POINTS, CHANNELS), generator=generator).to(device) / 8
    grid = [0.5, 0.5, 1.0], [-4.0, -4.0, -2.0, 4.0, 4.0, 2.0]
    outputs = (
        torch.zeros((VOXELS, ROWS, CHANNELS), device=device),
        torch.zeros((VOXELS, 3), dtype=torch.int32, device=device),
        torch.zeros(VOXELS, dtype=torch.int32, device=device),
    )
    return {"dynamic_voxelize": (points, *grid), "hard_voxelize": (points, *grid, *outputs)}


def peer(op: str, args: tuple[Any, ...]) -> None:
    """None: ``kernelgraft bench`` goes over sizes of linear layers."""
