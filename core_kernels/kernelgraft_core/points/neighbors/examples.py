"""Arguments for the ops that look for neighbours, for reports and tests that go over all ops."""

from __future__ import annotations

from typing import Any

import torch

TUNED: tuple[str, ...] = ()
CLOUDS, POINTS, CENTERS = 2, 300, 50


def example_args(device: torch.device | str, **_: object) -> dict[str, tuple[Any, ...]]:
    """Arguments for each op by its name, the same on every call; sizes of linear layers mean nothing here."""
    generator = torch.Generator().manual_seed(0)
    # Eighths: squared distances are exact, and all types find the same points.
    points, centers = (
        torch.randint(-20, 20, (CLOUDS * count, 3), generator=generator).to(device) / 8 for count in (POINTS, CENTERS)
    )
    clouds = torch.arange(CLOUDS + 1, device=device)
    shared = points, centers, clouds * POINTS, clouds * CENTERS
    return {"points_knn": (*shared, 5), "points_in_ball": (*shared, 0.0, 0.75, 16)}


def peer(op: str, args: tuple[Any, ...]) -> None:
    """None: ``kernelgraft bench`` goes over sizes of linear layers."""
