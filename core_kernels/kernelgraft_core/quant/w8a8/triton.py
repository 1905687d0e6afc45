"""The W8A8 ops on a GPU, by the kernels of :mod:`kernelgraft_core.quant.w4a8.triton_kernels`."""

from __future__ import annotations

import torch
from torch import Tensor

from kernelgraft_core.quant.w4a8 import triton
from kernelgraft_core.quant.w4a8.triton_kernels import BYTES
from kernelgraft_core.quant.w4a8.triton_tiles import COLUMNS


def w8a8_matmul(
    q: Tensor,
    x_scale: Tensor,
    x_sums: Tensor,
    qweight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    words = qweight.contiguous()
    prepared = triton.Prepared(BYTES.value, words, qweight.shape[1], 0, words, words)
    return triton.product((q, x_scale, x_sums), prepared, scale, None, bias, dtype)


def w8a8_linear(x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    return w8a8_matmul(*triton.quantize_activation(x), qweight, scale, bias, x.dtype)


def supports_w8a8_matmul(q: Tensor, x_scale: Tensor, x_sums: Tensor, qweight: Tensor, *args: object) -> str | None:
    return _unsupported_weight(qweight) or triton.unsupported(args[-1], q.device)


def supports_w8a8_linear(x: Tensor, qweight: Tensor, *_: object) -> str | None:
    return _unsupported_weight(qweight) or triton.unsupported(x.dtype, x.device)


def _unsupported_weight(qweight: Tensor) -> str | None:
    k = qweight.shape[1]
    return f"K = {k} is not a multiple of {COLUMNS}" if k == 0 or k % COLUMNS else None
