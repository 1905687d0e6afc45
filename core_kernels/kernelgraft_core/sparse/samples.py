"""A small kernel map and features for it, for reports and tests that go over all ops."""

from __future__ import annotations

import torch
from torch import Tensor

from .coordinates import Coordinates
from .geometry import ConvGeometry
from .kernel_map import KernelMap


def sample_map(device: torch.device | str) -> KernelMap:
    """Of a submanifold 3x3x3 convolution of a few hundred sites, the same on every call."""
    generator = torch.Generator().manual_seed(0)
    indices = (torch.rand(2, 12, 12, 8, generator=generator) < 0.2).nonzero()
    indices = indices[torch.randperm(len(indices), generator=generator)]
    coordinates = Coordinates(indices.to(device), (12, 12, 8), 2)
    return KernelMap.of(ConvGeometry.of(3, 3, submanifold=True), coordinates)


def sample_values(*shape: int, device: torch.device | str, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Normal numbers, the same on every call."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(device, dtype)
