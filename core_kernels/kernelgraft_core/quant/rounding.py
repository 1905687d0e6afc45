"""Round-to-nearest integer grids: asymmetric, one scale and zero point per group of weights in a row."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LEVELS = 15  # the largest 4-bit integer


@dataclass(frozen=True)
class Grid:
    """Scale and zero point of every group: ``w ~ (q - zeros) * scales``.

    Attributes:
        scales: ``(N, G)`` of the weight's dtype, but rounded to float16, which is what checkpoints store.
        zeros: ``(N, G)`` of the weight's dtype, integers in 0..15.
    """

    scales: Tensor
    zeros: Tensor

    @classmethod
    def spanning(cls, low: Tensor, high: Tensor) -> Grid:
        """The grid that reaches from ``low`` to ``high`` ``(N, G)``; zero is always on it.

        A group of one sign keeps zero as its end: a zero point must lie in 0..15, and clamping it afterwards, as
        AutoAWQ does, would cut the other end of the range off.
        """
        low, high = low.clamp(max=0), high.clamp(min=0)
        scales = ((high - low) / LEVELS).half().to(low.dtype)
        # A scale that rounds to zero in float16 (or a group of zeros) stores zeros; 1 keeps the division defined.
        scales = torch.where(scales > 0, scales, torch.ones_like(scales))
        return cls(scales, (-low / scales).round_().clamp_(0, LEVELS))

    def round(self, groups: Tensor) -> Tensor:
        """Integers 0..15 of weights ``(N, G, g)``, in their dtype."""
        scales, zeros = self.scales.unsqueeze(-1), self.zeros.unsqueeze(-1)
        return (groups / scales).round_().add_(zeros).clamp_(0, LEVELS)

    def reproduce(self, groups: Tensor) -> Tensor:
        """What the weights ``(N, G, g)`` become."""
        scales, zeros = self.scales.unsqueeze(-1), self.zeros.unsqueeze(-1)
        return self.round(groups).sub_(zeros).mul_(scales)


def split_groups(weight: Tensor, group_size: int) -> Tensor:
    """``(N, K)`` seen as ``(N, K / g, g)``; a group size of -1 is the whole row.

    Raises:
        ValueError: the group size does not divide K.
    """
    k = weight.shape[-1]
    size = k if group_size == -1 else group_size
    if size <= 0 or k % size:
        raise ValueError(f"group size {group_size} does not divide K = {k}")
    return weight.reshape(*weight.shape[:-1], k // size, size)


def fake_quantize(weight: Tensor, group_size: int) -> Tensor:
    """Round ``(N, K)`` to the nearest 4-bit values and back (RTN)."""
    groups = split_groups(weight, group_size)
    return Grid.spanning(groups.amin(-1), groups.amax(-1)).reproduce(groups).view_as(weight)
