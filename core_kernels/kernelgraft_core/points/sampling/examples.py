"""Arguments for the op of furthest point sampling, for reports and tests that go over all ops."""

from __future__ import annotations

import math
from typing import Any

import torch

TUNED: tuple[str, ...] = ()
CLOUDS, POINTS, SAMPLES = 2, 300, 40


def example_args(device: torch.device | str, **_: object) -> dict[str, tuple[Any, ...]]:
    """Arguments for each op by its name, the same on every call; sizes of linear layers mean nothing here."""
    generator = torch.Generator().manual_seed(0)
    # Eighths: squared distances are exact, and all types choose the same points.
    points = torch.randint(-99, 99, (CLOUDS, POINTS, 3), generator=generator).to(device) / 8
    nearest = torch.full((CLOUDS, POINTS), math.inf, device=device)
    return {"furthest_points": (points, nearest, SAMPLES, False)}


def peer(op: str, args: tuple[Any, ...]) -> None:
    """None: ``kernelgraft bench`` goes over sizes of linear layers."""
