"""The plainest correct version of each op in this family: any device, any float type, integers exact."""

from __future__ import annotations

import torch
from torch import Tensor

from kernelgraft_core.quant.w4a8.reference import int8_product, quantize_activation


def w8a8_matmul(
    q: Tensor,
    x_scale: Tensor,
    x_sums: Tensor,
    qweight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    return int8_product(q, x_scale, qweight, scale, bias, dtype)


def w8a8_linear(x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    return w8a8_matmul(*quantize_activation(x), qweight, scale, bias, x.dtype)
