"""Pooling over the sites that a kernel map names, one tap after another, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from kernelgraft_core.sparse.maps.exchanged import exchanged


def sparse_sum_pool(x: Tensor, neighbors: Tensor) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    total = x.new_zeros((len(neighbors), x.shape[1]), dtype=wide)
    for column in neighbors.T:
        there = (column >= 0).nonzero().squeeze(1)
        total[there] += x[column[there].long()].to(wide)
    return total.to(x.dtype)


def sparse_max_pool(x: Tensor, neighbors: Tensor) -> tuple[Tensor, Tensor]:
    best = x.new_full((len(neighbors), x.shape[1]), -torch.inf)
    taps = torch.full_like(best, -1, dtype=torch.int16)
    for tap, column in enumerate(neighbors.T):
        there = (column >= 0).nonzero().squeeze(1)
        known, values = best[there], x[column[there].long()]
        larger = (values > known) | values.isnan() | (taps[there] < 0)
        best[there] = torch.where(larger, values, known)
        taps[there] = torch.where(larger, tap, taps[there]).to(torch.int16)
    return torch.where(taps < 0, 0, best), taps


def sparse_max_pool_dgrad(grad: Tensor, taps: Tensor, neighbors: Tensor, rows: int) -> Tensor:
    wide = torch.promote_types(grad.dtype, torch.float32)
    total = grad.new_zeros((rows, grad.shape[1]), dtype=wide)
    for tap, column in enumerate(exchanged(neighbors, rows).T):
        there = (column >= 0).nonzero().squeeze(1)
        outputs = column[there].long()
        total[there] += torch.where(taps[outputs] == tap, grad[outputs], 0).to(wide)
    return total.to(grad.dtype)
