"""Grids that make up for each other: AWQ's clip search, continued across the groups of a row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Generic, Protocol, Self, TypeVar

import torch
from torch import Tensor

from kernelgraft_core.quant.gptq.solver import ColumnGrid


class SearchGrid(ColumnGrid, Protocol):
    """What a search needs of the grids ``(N, G)`` that it improves; :class:`~kernelgraft_core.quant.rounding.Grid`."""

    def reproduce(self, groups: Tensor) -> Tensor: ...
    def where(self, chosen: Tensor, other: Self) -> Self: ...
    def columns(self) -> list[Self]: ...
    def joined(self, columns: Sequence[Self]) -> Self: ...
    def nearby(self) -> Iterator[Self]: ...


G = TypeVar("G", bound=SearchGrid)


def refine_grid(groups: Tensor, moments: Tensor, grid: G, *, sweeps: int = 1) -> G:
    """Change the grids of groups one after another such that the whole output is off least.

    The clip search of the paper takes each group of a row for itself. Their errors add up in the output, though, and
    inputs correlate across groups: here each group in turn is given the grid that serves best beside the errors that
    all others make at that moment (coordinate descent on ``(Q - W) H (Q - W)^T``). No row's error ever grows.

    Args:
        groups: ``(N, G, g)`` weights.
        moments: ``(K, K)`` second moments of the input.
        grid: where to start.
        sweeps: how many times to go over all groups; 0 returns ``grid``.
    """
    size = groups.shape[-1]
    columns = grid.columns()
    change = (grid.reproduce(groups) - groups).flatten(1)
    moments = moments.to(groups.dtype)
    for _ in range(sweeps):
        for index, start in enumerate(columns):
            span = slice(index * size, (index + 1) * size)
            own, own_moments = change[:, span], moments[span, span]
            others = change @ moments[:, span] - own @ own_moments
            best: _Best[G] = _Best(groups[:, index : index + 1], own_moments, others, start)
            columns[index], change[:, span] = best.grid, best.change
    return grid.joined(columns)


class _Best(Generic[G]):
    """The best grid of one group ``(N, 1, g)`` in every row, while the errors of all others stay."""

    def __init__(self, weight: Tensor, moments: Tensor, others: Tensor, start: G) -> None:
        self._weight, self._moments, self._others = weight, moments, others
        self.grid = start
        self.change, self._error = self._judge(start)
        for grid in start.nearby():
            change, error = self._judge(grid)
            better = error < self._error
            self._error = torch.where(better, error, self._error)
            self.grid = grid.where(better.unsqueeze(-1), self.grid)
            self.change = torch.where(better.unsqueeze(-1), change, self.change)

    def _judge(self, grid: G) -> tuple[Tensor, Tensor]:
        """The weight's change ``(N, g)``, and the part of the output's squared error that depends on it, ``(N,)``."""
        change = (grid.reproduce(self._weight) - self._weight).squeeze(1)
        return change, ((change @ self._moments + 2 * self._others) * change).sum(-1)
