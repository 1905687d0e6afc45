"""Kernel maps on a CPU, compiled by numba: keys are sorted by digits, and lines of taps found by one sweep each.

Keys ascend, so what an output and the next one read of a line ascends too: two pointers walk through both lists, and
there is nothing to hash or to search.
"""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor

from kernelgraft_core.runtime.threads import Launch, Phase

GRAIN = 2048  # outputs worth a thread
BEYOND = torch.iinfo(torch.int64).max


def sparse_neighbors(
    in_keys: Tensor,
    in_order: Tensor | None,
    out_keys: Tensor,
    out_order: Tensor | None,
    lines: list[int],
    taps: int,
    apart: int,
) -> Tensor:
    from . import cpu_kernels as kernels

    rows = len(out_keys)
    found = torch.empty(rows, len(lines) * taps, dtype=torch.int32)
    if not rows:
        return found
    is_line = apart == 1 and taps <= kernels.SELECTED
    starts = torch.tensor(lines, dtype=torch.int64)
    known = torch.cat((in_keys, in_keys.new_full((taps,), BEYOND)))
    order = None if in_order is None else torch.cat((in_order, in_order.new_zeros(taps)))
    outputs, out_rows = out_keys.contiguous(), None if out_order is None else out_order.contiguous()
    _find_launch(rows, taps if is_line else 0, order is None)(
        rows, len(in_keys), known.data_ptr(), 0 if order is None else order.data_ptr(), outputs.data_ptr(),
        0 if out_rows is None else out_rows.data_ptr(), len(lines), starts.data_ptr(), taps, apart, found.data_ptr(),
    )  # fmt: skip
    return found


def sparse_transpose(neighbors: Tensor, rows: int) -> Tensor:
    from . import cpu_kernels as kernels

    neighbors, taps = neighbors.contiguous(), neighbors.shape[1]
    found = torch.full((rows, taps), -1, dtype=torch.int32)
    if len(neighbors):
        Launch(Phase(kernels.transpose.address, len(neighbors), GRAIN))(
            taps, neighbors.data_ptr(), len(neighbors), found.data_ptr(), rows
        )
    return found


def sparse_sort(sites: Tensor, steps: list[int]) -> tuple[Tensor, Tensor]:
    keys = sparse_keys(sites, None, steps, 0)
    if bool((keys[1:] > keys[:-1]).all()):
        return keys, keys.new_empty(0)
    from . import cpu_kernels as kernels

    order, spare_keys, spare_order = (torch.empty_like(keys) for _ in range(3))
    Launch(Phase(kernels.sort_keys.address, 1))(
        0, len(keys), 0, 0, 0, order.data_ptr(), keys.data_ptr(), spare_keys.data_ptr(), spare_order.data_ptr(),
        int(keys.max()),
    )  # fmt: skip
    return keys, order


def sparse_keys(sites: Tensor, order: Tensor | None, steps: list[int], offset: int) -> Tensor:
    sites, rows = sites.contiguous(), len(sites)
    keys = torch.empty(rows, dtype=torch.int64)
    order = None if order is None else order.contiguous()
    if rows:
        counts = torch.tensor(steps)
        _keys_launch(rows)(
            sites.data_ptr(), rows, len(steps), counts.data_ptr(), offset, 0 if order is None else order.data_ptr(),
            keys.data_ptr(), 0, 0, 0,
        )  # fmt: skip
    return keys


@functools.lru_cache(maxsize=256)
def _find_launch(rows: int, taps: int, in_place: bool) -> Launch:
    from . import cpu_kernels as kernels

    kernel = kernels.find_kernel(taps, in_place) if taps else kernels.find_apart
    return Launch(Phase(kernel.address, rows, GRAIN))


@functools.lru_cache(maxsize=256)
def _keys_launch(rows: int) -> Launch:
    from . import cpu_kernels as kernels

    return Launch(Phase(kernels.number_sites.address, rows, 4 * GRAIN))


def supports_sparse_neighbors(*_: object) -> str | None:
    return None if importlib.util.find_spec("numba") else "numba is not installed"


supports_sparse_transpose = supports_sparse_sort = supports_sparse_keys = supports_sparse_neighbors
