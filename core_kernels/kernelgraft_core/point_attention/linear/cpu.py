"""Linear layers of float32 rows on a CPU by :mod:`.cpu_kernels`, which needs numba."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from kernelgraft_core.point_attention.cpu_weights import float_set, panels_of, unsupported
from kernelgraft_core.runtime.threads import parallel_for

TILE_ROWS = 96  # a multiple of the rows of every block


def row_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    (rows, depth), channels = x.shape, len(weight)
    if x.dtype != torch.float32 or not (rows and depth and channels):  # of half types torch's products are as fast
        return torch.nn.functional.linear(x, weight, bias)
    from . import cpu_kernels as kernels

    floats = float_set()
    if x.stride(1) != 1 or x.stride(0) < depth:
        x = x.contiguous()
    panels = panels_of(weight, bias, floats)
    out = x.new_empty((rows, panels.columns))
    last = x.new_empty(TILE_ROWS * (depth + panels.columns))
    told = (
        x.data_ptr(), 4 * x.stride(0), out.data_ptr(), rows, TILE_ROWS, depth, panels.weight.data_ptr(),
        panels.bias.data_ptr(), panels.columns, last.data_ptr(), last.data_ptr() + 4 * TILE_ROWS * depth,
    )  # fmt: skip
    assert len(told) == kernels.NUMBERS
    parallel_for(kernels.linear_kernel(floats).address, (ctypes.c_int64 * len(told))(*told), -(-rows // TILE_ROWS))
    return out if panels.columns == channels else out[:, :channels].contiguous()


def supports_row_linear(x: Tensor, *_: object) -> str | None:
    return unsupported(x)
