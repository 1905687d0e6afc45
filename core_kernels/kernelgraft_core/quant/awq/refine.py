"""Grids that make up for each other: AWQ's clip search, continued across the groups of a row."""

from __future__ import annotations

import torch
from torch import Tensor

from kernelgraft_core.quant.rounding import Grid

# Candidates around the present grid, scale by zero point. Found on layers of SmolLM2: finer or wider sets gain nothing.
RATIOS = (0.8, 0.85, 0.9, 0.95, 0.97, 1.0, 1.03, 1.05)
SHIFTS = (-1, 0, 1)


def refine_grid(groups: Tensor, moments: Tensor, grid: Grid, *, sweeps: int = 1) -> Grid:
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
    scales, zeros = grid.scales.clone(), grid.zeros.clone()
    change = (grid.reproduce(groups) - groups).flatten(1)
    moments = moments.to(groups.dtype)
    for _ in range(sweeps):
        for index in range(groups.shape[1]):
            columns = slice(index * size, (index + 1) * size)
            own, own_moments = change[:, columns], moments[columns, columns]
            others = change @ moments[:, columns] - own @ own_moments
            best = _Best(groups[:, index], own_moments, others, Grid(scales[:, index], zeros[:, index], grid.scheme))
            scales[:, index], zeros[:, index], change[:, columns] = best.scales, best.zeros, best.change
    return Grid(scales, zeros, grid.scheme)


class _Best:
    """The best grid of one group ``(N, g)`` in every row, while the errors of all others stay."""

    def __init__(self, weight: Tensor, moments: Tensor, others: Tensor, start: Grid) -> None:
        self._weight, self._moments, self._others, self._scheme = weight, moments, others, start.scheme
        self.scales, self.zeros = start.scales, start.zeros
        self.change, self._error = self._judge(start.scales, start.zeros)
        for shift in (0,) if start.scheme.symmetric else SHIFTS:
            for ratio in RATIOS:
                if (shift, ratio) != (0, 1.0):
                    self._offer((start.scales * ratio).half().to(weight.dtype), start.zeros + shift)

    def _offer(self, scales: Tensor, zeros: Tensor) -> None:
        scales = torch.where(scales > 0, scales, self.scales)
        zeros = zeros.clamp(0, self._scheme.levels)
        change, error = self._judge(scales, zeros)
        better = error < self._error
        self._error = torch.where(better, error, self._error)
        self.scales, self.zeros = torch.where(better, scales, self.scales), torch.where(better, zeros, self.zeros)
        self.change = torch.where(better.unsqueeze(-1), change, self.change)

    def _judge(self, scales: Tensor, zeros: Tensor) -> tuple[Tensor, Tensor]:
        """The weight's change, and the part of the output's squared error that depends on it, ``(N,)``."""
        grid = Grid(scales.unsqueeze(-1), zeros.unsqueeze(-1), self._scheme)
        change = grid.reproduce(self._weight.unsqueeze(1)).squeeze(1) - self._weight
        return change, ((change @ self._moments + 2 * self._others) * change).sum(-1)
