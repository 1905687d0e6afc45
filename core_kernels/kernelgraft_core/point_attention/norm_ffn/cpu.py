"""Two normalizations with a feed-forward network between them on a CPU by :mod:`.cpu_kernels`, which needs numba.

Tiles of rows stay in the second-level cache from the first sum to the last normalization.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from kernelgraft_core.point_attention.cpu_weights import panels_of, set_for, unsupported
from kernelgraft_core.runtime.derived import DerivedOfValues
from kernelgraft_core.runtime.scratch import SCRATCH, laid_out
from kernelgraft_core.runtime.threads import available_threads, parallel_for

TILE_ROWS = 96  # a multiple of the rows of every block

_norms: DerivedOfValues[Tensor] = DerivedOfValues()


def norm_ffn(
    x: Tensor,
    update: Tensor,
    norm1_weight: Tensor,
    norm1_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    norm2_weight: Tensor,
    norm2_bias: Tensor,
    eps: float,
) -> Tensor:
    from . import cpu_kernels as kernels

    if not len(x):
        return torch.empty_like(x, memory_format=torch.contiguous_format)
    known, (count, channels) = set_for(x.dtype), x.shape
    dtype = x.dtype if known.pairs else torch.float32
    rows, added = x.to(dtype).contiguous(), update.to(dtype).contiguous()
    out = torch.empty_like(rows)
    first, second = panels_of(fc1_weight, fc1_bias, known), panels_of(fc2_weight, fc2_bias, known)
    norms = norm1_weight, norm1_bias, norm2_weight, norm2_bias
    factors = _norms.of(norms, lambda: torch.stack([each.detach().float() for each in norms]))
    precision = torch.tensor([eps], dtype=torch.float64)
    room = 4 * (TILE_ROWS + known.linear_rows)
    places, end = laid_out([room * wide for wide in (channels, first.depth, first.columns, second.columns)])
    parts = max(1, min(available_threads(), -(-count // TILE_ROWS)))
    memory, scratch = SCRATCH.reserve(parts * end)
    told = (
        rows.data_ptr(), added.data_ptr(), out.data_ptr(), count, channels, TILE_ROWS, parts, scratch, end,
        precision.data_ptr(), factors.data_ptr(), first.weight.data_ptr(), first.bias.data_ptr(), first.columns,
        first.depth, second.weight.data_ptr(), second.bias.data_ptr(), second.columns, second.depth, *places,
    )  # fmt: skip
    assert len(told) == kernels.NUMBERS
    parallel_for(kernels.norm_ffn_kernel(known).address, (ctypes.c_int64 * len(told))(*told), parts)
    del memory  # until here
    return out.to(x.dtype)


def supports_norm_ffn(x: Tensor, *_: object) -> str | None:
    return unsupported(x)
