"""Arguments for deformable attention, for reports and tests that go over all ops; its gradient has three results."""

from __future__ import annotations

from typing import Any

import torch

TUNED: tuple[str, ...] = ()
LEVELS, HEADS, CHANNELS, QUERIES, POINTS = ((8, 12), (4, 6)), 4, 16, 50, 4


def example_args(
    device: torch.device | str, *, dtype: torch.dtype = torch.bfloat16, **_: int
) -> dict[str, tuple[Any, ...]]:
    """Arguments for each op by its name, the same on every call; sizes of linear layers mean nothing here."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.tensor(LEVELS)
    keys = sizes.prod(1)
    shape = (2, QUERIES, HEADS, len(LEVELS), POINTS)
    value = torch.randn((2, int(keys.sum()), HEADS, CHANNELS), generator=generator)
    locations = torch.rand((*shape, 2), generator=generator)
    weights = torch.rand(shape, generator=generator).flatten(3).softmax(-1).view(shape)
    value, locations, weights = (each.to(device, dtype) for each in (value, locations, weights))
    levels = sizes.to(device), (keys.cumsum(0) - keys).to(device)
    return {"deform_attention": (value, *levels, locations, weights)}


def peer(op: str, args: tuple[Any, ...]) -> None:
    """None: ``kernelgraft bench`` goes over sizes of linear layers."""
