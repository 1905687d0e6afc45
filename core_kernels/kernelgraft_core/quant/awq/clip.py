"""The AWQ clip search: how far each group's rounding grid should reach."""

from __future__ import annotations

import torch
from torch import Tensor

from kernelgraft_core.quant.rounding import Grid, split_groups


def search_grid(
    weight: Tensor, moments: Tensor, *, group_size: int, steps: int = 10, max_shrink: float = 0.5, both: bool = True
) -> Grid:
    """The grid of every group that changes the layer's output least.

    AWQ shrinks a group's range symmetrically, ``steps`` times by up to ``max_shrink``, and keeps the best by the squared
    error of the group's contribution to the output. Here that error is exact over all calibration tokens, because it
    needs only their second moments; ``both`` goes on to shrink either end alone from the best symmetric range.

    Args:
        weight: ``(N, K)``.
        moments: ``(G, g, g)``, :attr:`~kernelgraft_core.quant.sequential.InputStatistics.moments` of the input.
    """
    groups = split_groups(weight, group_size)
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    search = _Search(groups, moments, Grid.spanning(low, high))
    reach = torch.maximum(-low, high)
    best = torch.zeros_like(low)
    ratios = [1 - max_shrink * i / steps for i in range(1, steps)]
    for ratio in ratios:
        clipped = search.offer(low.clamp(min=-reach * ratio), high.clamp(max=reach * ratio))
        best = torch.where(clipped, 1 - ratio, best)
    if both:
        for end in (0, 1):
            low, high = search.low, search.high
            for ratio in ratios:
                search.offer(low * ratio if end == 0 else low, high * ratio if end == 1 else high)
    return search.grid


class _Search:
    """The best grid so far, group by group."""

    def __init__(self, groups: Tensor, moments: Tensor, start: Grid) -> None:
        self._groups, self._moments = groups, moments
        self.grid = start
        self.error = self._error(start)
        self.low = -start.scales * start.zeros
        self.high = self.low + 15 * start.scales

    def offer(self, low: Tensor, high: Tensor) -> Tensor:
        """Keep the grid from ``low`` to ``high`` where it is better; returns where."""
        grid = Grid.spanning(low, high)
        error = self._error(grid)
        better = error < self.error
        self.error = torch.where(better, error, self.error)
        self.low, self.high = torch.where(better, low, self.low), torch.where(better, high, self.high)
        self.grid = Grid(
            torch.where(better, grid.scales, self.grid.scales), torch.where(better, grid.zeros, self.grid.zeros)
        )
        return better

    def _error(self, grid: Grid) -> Tensor:
        change = (grid.reproduce(self._groups) - self._groups).transpose(0, 1)
        return (torch.bmm(change, self._moments) * change).sum(-1).T
