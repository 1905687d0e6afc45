"""Kernel maps on a CPU: one sweep over sorted keys for every line of taps, compiled by numba.

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


def sparse_neighbors(
    in_keys: Tensor,
    in_order: Tensor | None,
    out_keys: Tensor,
    out_order: Tensor | None,
    lines: list[int],
    taps: int,
    apart: int,
    mirrored: bool,
) -> Tensor:
    rows = len(out_keys)
    found = torch.empty(rows, len(lines) * taps, dtype=torch.int32)
    if not rows:
        return found
    starts = torch.tensor(lines, dtype=torch.int64)
    keys = [in_keys.contiguous(), out_keys.contiguous()]
    orders = [None if order is None else order.contiguous() for order in (in_order, out_order)]
    addresses = [0 if order is None else order.data_ptr() for order in orders]
    _launch(rows, mirrored)(
        rows, len(in_keys), keys[0].data_ptr(), addresses[0], keys[1].data_ptr(), addresses[1],
        len(lines), starts.data_ptr(), taps, apart, found.data_ptr(),
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


@functools.lru_cache(maxsize=256)
def _launch(rows: int, mirrored: bool) -> Launch:
    from . import cpu_kernels as kernels

    walk = kernels.find_mirrored if mirrored else kernels.find_any
    return Launch(Phase(kernels.clear.address, rows, GRAIN), Phase(walk.address, rows, GRAIN))


def supports_sparse_neighbors(*_: object) -> str | None:
    return None if importlib.util.find_spec("numba") else "numba is not installed"


supports_sparse_transpose = supports_sparse_neighbors
