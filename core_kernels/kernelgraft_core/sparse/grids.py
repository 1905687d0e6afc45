"""Sites of a grid as numbers, and back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

LARGEST_KEY = 1 << 62


def grid_steps(sizes: Sequence[int], batch_size: int) -> tuple[int, ...]:
    """How much a coordinate of each axis counts in the number of a site, the batch first.

    Raises:
        ValueError: there are more sites than numbers.
    """
    steps = [1]
    for size in reversed(sizes):
        steps.insert(0, steps[0] * size)
    if steps[0] * max(1, batch_size) >= LARGEST_KEY:
        raise ValueError(f"{batch_size} grids of {tuple(sizes)} have {steps[0] * batch_size} sites, more than 2^62")
    return tuple(steps)


def starts_of(counts: Tensor) -> Tensor:
    """Where each of ``counts (K,)`` entries that follow each other begins, and where the last ends: ``(K + 1,)``."""
    return torch.cat((counts.new_zeros(1), counts.cumsum(0)))


def grid_keys(indices: Tensor, steps: Sequence[int]) -> Tensor:
    """The numbers int64 ``(N,)`` of sites ``(N, 1 + D)``."""
    keys = indices[:, 0].long() * steps[0]
    for axis, step in enumerate(steps[1:], 1):
        keys += indices[:, axis].long() * step
    return keys


def grid_sites(keys: Tensor, steps: Sequence[int]) -> Tensor:
    """The sites int32 ``(N, 1 + D)`` of numbers."""
    columns = []
    for step in steps:
        columns.append(torch.div(keys, step, rounding_mode="floor"))
        keys = keys - columns[-1] * step
    return torch.stack(columns, 1).to(torch.int32)
