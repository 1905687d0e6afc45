"""The plainest correct kernel map: one binary search for every output and tap, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from kernelgraft_core.sparse.grids import grid_keys


def sparse_neighbors(
    in_keys: Tensor,
    in_order: Tensor | None,
    out_keys: Tensor,
    out_order: Tensor | None,
    lines: list[int],
    taps: int,
    apart: int,
) -> Tensor:
    found = torch.full((len(out_keys), len(lines) * taps), -1, dtype=torch.int32, device=out_keys.device)
    if not len(in_keys):
        return found
    for tap in range(len(lines) * taps):
        wanted = out_keys + (lines[tap // taps] + tap % taps * apart)
        at = torch.searchsorted(in_keys, wanted).clamp_(max=len(in_keys) - 1)
        hit = in_keys[at] == wanted
        rows = at if in_order is None else in_order[at]
        found[:, tap] = torch.where(hit, rows, -1).to(torch.int32)
    if out_order is None:
        return found
    placed = torch.empty_like(found)
    placed[out_order] = found
    return placed


def sparse_transpose(neighbors: Tensor, rows: int) -> Tensor:
    found = neighbors.new_full((rows, neighbors.shape[1]), -1)
    outputs, taps = (neighbors >= 0).nonzero(as_tuple=True)
    found[neighbors[outputs, taps].long(), taps] = outputs.to(torch.int32)
    return found


def sparse_sort(sites: Tensor, steps: list[int]) -> tuple[Tensor, Tensor]:
    keys = sparse_keys(sites, None, steps, 0)
    if bool((keys[1:] > keys[:-1]).all()):
        return keys, keys.new_empty(0)
    ordered, order = keys.sort(stable=True)
    return ordered, order


def sparse_keys(sites: Tensor, order: Tensor | None, steps: list[int], offset: int) -> Tensor:
    return grid_keys(sites if order is None else sites[order], steps).add_(offset)
