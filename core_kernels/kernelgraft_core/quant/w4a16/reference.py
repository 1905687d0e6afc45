"""The plainest correct version of each op in this family: any device, any float type."""

from __future__ import annotations

import torch
from torch import Tensor

from kernelgraft_core.quant.int4 import unpack_int4


def dequantize_w4a16(qweight: Tensor, scales: Tensor, zeros: Tensor, dtype: torch.dtype) -> Tensor:
    rows, groups = scales.shape
    values = unpack_int4(qweight).to(dtype).view(rows, groups, -1)
    return ((values - zeros.to(dtype).unsqueeze(-1)) * scales.to(dtype).unsqueeze(-1)).view(rows, -1)


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def w4a16_linear(x: Tensor, qweight: Tensor, scales: Tensor, zeros: Tensor, bias: Tensor | None) -> Tensor:
    weight = dequantize_w4a16(qweight, scales, zeros, _accumulator(x.dtype))
    out = x.to(weight.dtype) @ weight.T
    if bias is not None:
        out += bias.to(out.dtype)
    return out.to(x.dtype)


def w4a16_linear_dgrad(grad: Tensor, qweight: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    weight = dequantize_w4a16(qweight, scales, zeros, _accumulator(grad.dtype))
    return (grad.to(weight.dtype) @ weight).to(grad.dtype)
