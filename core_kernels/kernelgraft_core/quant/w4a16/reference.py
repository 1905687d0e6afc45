"""The plainest correct version of each op in this family: any device, any float type."""

from __future__ import annotations

import torch
from torch import Tensor

from kernelgraft_core.quant.int4 import unpack_int4
from kernelgraft_core.quant.packed.reference import accumulator, dequantize, dgrad, linear


def dequantize_w4a16(qweight: Tensor, scales: Tensor, zeros: Tensor, dtype: torch.dtype) -> Tensor:
    return dequantize(unpack_int4(qweight), scales, zeros, dtype)


def w4a16_linear(x: Tensor, qweight: Tensor, scales: Tensor, zeros: Tensor, bias: Tensor | None) -> Tensor:
    return linear(x, dequantize_w4a16(qweight, scales, zeros, accumulator(x.dtype)), bias)


def w4a16_linear_dgrad(grad: Tensor, qweight: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    return dgrad(grad, dequantize_w4a16(qweight, scales, zeros, accumulator(grad.dtype)))
