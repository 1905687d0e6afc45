"""The AWQ clip search: how far each group's rounding grid should reach."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from .refine import SearchGrid

G = TypeVar("G", bound=SearchGrid)

# The grid that reaches from ``low`` to ``high`` (N, G).
Span = Callable[[Tensor, Tensor], G]


def search_grid(groups: Tensor, moments: Tensor, span: Span[G], *, steps: int = 10, max_shrink: float = 0.5) -> G:
    """The grid of every group of weights that changes the layer's output least.

    AWQ shrinks a group's range symmetrically, ``steps`` times by up to ``max_shrink``, and keeps the best by the
    squared error of the group's contribution to the output. Here that error is exact over all calibration tokens,
    because it needs only their second moments, and the search goes on to shrink either end alone from the best
    symmetric range.

    Args:
        groups: ``(N, G, g)`` weights.
        moments: ``(G, g, g)`` second moments of each group's input
            (:func:`~kernelgraft_core.quant.moments.group_moments`).
        span: gives the grid for a range.
    """
    low, high = groups.amin(-1), groups.amax(-1)
    search = _Search(groups, moments, span)
    reach = torch.maximum(-low, high)
    ratios = [1 - max_shrink * i / steps for i in range(1, steps)]
    for ratio in ratios:
        search.offer(low.maximum(-reach * ratio), high.minimum(reach * ratio))
    for side in ("low", "high"):
        low, high = search.low, search.high
        for ratio in ratios:
            search.offer(low * (ratio if side == "low" else 1), high * (ratio if side == "high" else 1))
    grid: G = search.grid
    return grid


def _energy(groups: Tensor, moments: Tensor) -> Tensor:
    """``w^T M w`` of every group ``(N, G)``: the mean square that it contributes to the output."""
    by_group = groups.transpose(0, 1)
    return (torch.bmm(by_group, moments) * by_group).sum(-1).T


class _Search:
    """The best grid so far, group by group."""

    def __init__(self, groups: Tensor, moments: Tensor, span: Span[Any]) -> None:
        self._groups, self._moments, self._span = groups, moments, span
        self.low, self.high = groups.amin(-1), groups.amax(-1)
        self.grid = span(self.low, self.high)
        self._error = self._error_of(self.grid)

    def offer(self, low: Tensor, high: Tensor) -> None:
        """Take the grid from ``low`` to ``high`` wherever it is better."""
        grid = self._span(low, high)
        error = self._error_of(grid)
        better = error < self._error
        self._error = torch.where(better, error, self._error)
        self.low, self.high = torch.where(better, low, self.low), torch.where(better, high, self.high)
        self.grid = grid.where(better, self.grid)

    def _error_of(self, grid: SearchGrid) -> Tensor:
        return _energy(grid.reproduce(self._groups) - self._groups, self._moments)
