"""Reduction of groups on a CPU, compiled by numba: each group by one thread, from its first row to its last."""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor

from kernelgraft_core.runtime.threads import Launch, Phase

GRAIN_NUMBERS = 1 << 14  # of the result, worth a thread
SUM, MEAN, MAX = range(3)
KINDS = {"sum": SUM, "mean": MEAN, "max": MAX}


def points_reduce(feats: Tensor, order: Tensor, starts: Tensor, reduce: str) -> tuple[Tensor, Tensor]:
    values, order, starts = feats.float().contiguous(), order.contiguous(), starts.contiguous()
    groups, channels = len(starts) - 1, feats.shape[1]
    out = torch.empty((groups, channels))
    source = torch.empty((groups, channels) if reduce == "max" else 0, dtype=torch.int64)
    if groups and channels:
        _launch(groups, channels)(
            values.data_ptr(), len(values), channels, order.data_ptr(), len(order), starts.data_ptr(), groups,
            KINDS[reduce], out.data_ptr(), source.data_ptr(),
        )  # fmt: skip
    return out.to(feats.dtype), source


@functools.lru_cache(maxsize=256)
def _launch(groups: int, channels: int) -> Launch:
    from . import cpu_kernels as kernels

    return Launch(Phase(kernels.reduce_rows.address, groups, max(1, GRAIN_NUMBERS // channels)))


def supports_points_reduce(feats: Tensor, *_: object) -> str | None:
    if feats.dtype == torch.float64:
        return "float64 is computed by the reference"
    return None if importlib.util.find_spec("numba") else "numba is not installed"
