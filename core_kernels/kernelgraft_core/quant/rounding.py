"""Round-to-nearest integer grids: one scale and zero point per group of weights in a row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Candidates of a search around a grid, scale by zero point. On layers of SmolLM2 finer or wider sets gain nothing.
RATIOS = (0.8, 0.85, 0.9, 0.95, 0.97, 1.0, 1.03, 1.05)
SHIFTS = (-1, 0, 1)


@dataclass(frozen=True)
class Scheme:
    """What weights are rounded to.

    Attributes:
        bits: 3 or 4.
        group_size: weights along K that share a scale and a zero point; -1 is the whole row.
        symmetric: the zero point is the middle of the range, ``2 ** (bits - 1)``, for every group.

    Raises:
        ValueError: bits or group size are not of that kind.
    """

    bits: int = 4
    group_size: int = 128
    symmetric: bool = False

    def __post_init__(self) -> None:
        if self.bits not in (3, 4):
            raise ValueError(f"{self.bits} bits per weight; 3 and 4 are supported")
        if self.group_size == 0 or self.group_size < -1:
            raise ValueError(f"group size {self.group_size} is neither positive nor -1")

    @property
    def levels(self) -> int:
        """The largest integer."""
        return (1 << self.bits) - 1

    @property
    def middle(self) -> int:
        """The zero point of a symmetric group."""
        return 1 << (self.bits - 1)


@dataclass(frozen=True)
class Grid:
    """Scale and zero point of every group: ``w ~ (q - zeros) * scales``.

    Attributes:
        scales: ``(N, G)`` of the weight's dtype, but rounded to float16, which is what checkpoints store.
        zeros: ``(N, G)`` of the weight's dtype, integers in ``0..scheme.levels``.
    """

    scales: Tensor
    zeros: Tensor
    scheme: Scheme

    @classmethod
    def spanning(cls, low: Tensor, high: Tensor, scheme: Scheme) -> Grid:
        """The grid that reaches from ``low`` to ``high`` ``(N, G)``; zero is always on it.

        An asymmetric group of one sign keeps zero as its end: a zero point must be one of the integers, and clamping it
        afterwards, as AutoAWQ does, would cut the other end of the range off. A symmetric group reaches as far down as
        its scale times ``middle``, one step further than up: the scale is the smallest that holds either end.
        """
        low, high = low.clamp(max=0), high.clamp(min=0)
        if scheme.symmetric:
            span = torch.maximum(-low / scheme.middle, high / (scheme.levels - scheme.middle))
        else:
            span = (high - low) / scheme.levels
        scales = span.half().to(low.dtype)
        # A scale that rounds to zero in float16 (or a group of zeros) stores zeros; 1 keeps the division defined.
        scales = torch.where(scales > 0, scales, torch.ones_like(scales))
        if scheme.symmetric:
            return cls(scales, torch.full_like(scales, scheme.middle), scheme)
        return cls(scales, (-low / scales).round_().clamp_(0, scheme.levels), scheme)

    def round(self, groups: Tensor) -> Tensor:
        """Integers of weights ``(N, G, g)``, in their dtype."""
        scales, zeros = self.scales.unsqueeze(-1), self.zeros.unsqueeze(-1)
        return (groups / scales).round_().add_(zeros).clamp_(0, self.scheme.levels)

    def reproduce(self, groups: Tensor) -> Tensor:
        """What the weights ``(N, G, g)`` become."""
        return self.round(groups).sub_(self.zeros.unsqueeze(-1)).mul_(self.scales.unsqueeze(-1))

    def values(self, integers: Tensor) -> Tensor:
        """What integers ``(N, G, g)`` stand for."""
        return integers.sub(self.zeros.unsqueeze(-1)).mul_(self.scales.unsqueeze(-1))

    @property
    def shape(self) -> torch.Size:
        """``(N, G)``."""
        return self.scales.shape

    def columns(self) -> list[Grid]:
        """The grids of each group by themselves."""
        parts = zip(self.scales.split(1, 1), self.zeros.split(1, 1), strict=True)
        return [Grid(scales, zeros, self.scheme) for scales, zeros in parts]

    def joined(self, columns: Sequence[Grid]) -> Grid:
        """The opposite of :meth:`columns`."""
        scales, zeros = torch.cat([c.scales for c in columns], 1), torch.cat([c.zeros for c in columns], 1)
        return Grid(scales, zeros, self.scheme)

    def nearby(self) -> Iterator[Grid]:
        """Grids that a search goes on to from here."""
        for shift in (0,) if self.scheme.symmetric else SHIFTS:
            for ratio in RATIOS:
                if (shift, ratio) != (0, 1.0):
                    scales = (self.scales * ratio).half().to(self.scales.dtype)
                    zeros = (self.zeros + shift).clamp(0, self.scheme.levels)
                    yield Grid(torch.where(scales > 0, scales, self.scales), zeros, self.scheme)

    def where(self, chosen: Tensor, other: Grid) -> Grid:
        """This grid for the groups that are ``chosen`` ``(N, G)``, ``other`` for the rest."""
        return Grid(
            torch.where(chosen, self.scales, other.scales), torch.where(chosen, self.zeros, other.zeros), self.scheme
        )


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


def nearest_grid(groups: Tensor, scheme: Scheme) -> Grid:
    """The grid over the whole range of every group of weights ``(N, G, g)``."""
    return Grid.spanning(groups.amin(-1), groups.amax(-1), scheme)


def fake_quantize(weight: Tensor, scheme: Scheme) -> Tensor:
    """Round ``(N, K)`` to the nearest values of the scheme and back (RTN)."""
    groups = split_groups(weight, scheme.group_size)
    return nearest_grid(groups, scheme).reproduce(groups).view_as(weight)
