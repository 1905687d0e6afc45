"""Arguments for the op that orders vertices, for reports and tests that go over all ops."""

from __future__ import annotations

from typing import Any

import torch

TUNED: tuple[str, ...] = ()


def example_args(device: torch.device | str, **_: object) -> dict[str, tuple[Any, ...]]:
    """Arguments for each op by its name, the same on every call; sizes of linear layers mean nothing here."""
    generator = torch.Generator().manual_seed(0)
    vertices = torch.randn(2, 50, 24, 2, generator=generator)
    mask = torch.rand(2, 50, 24, generator=generator) < 0.25
    return {"sort_overlap_vertices": (vertices.to(device), mask.to(device))}


def peer(op: str, args: tuple[Any, ...]) -> None:
    """None: ``kernelgraft bench`` goes over sizes of linear layers."""
