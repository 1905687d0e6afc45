"""The W4A16 ops on a CPU: :mod:`kernelgraft_core.quant.packed.cpu` for weights of 4 bits."""

from __future__ import annotations

import torch
from torch import Tensor

from kernelgraft_core.quant.packed.cpu import dequantize, dgrad, linear, unsupported

from .weight import W4A16Weight


def w4a16_linear(x: Tensor, qweight: Tensor, scales: Tensor, zeros: Tensor, bias: Tensor | None) -> Tensor:
    return linear(x, W4A16Weight(qweight, scales, zeros), bias)


def w4a16_linear_dgrad(grad: Tensor, qweight: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    return dgrad(grad, W4A16Weight(qweight, scales, zeros))


def dequantize_w4a16(qweight: Tensor, scales: Tensor, zeros: Tensor, dtype: torch.dtype) -> Tensor:
    return dequantize(W4A16Weight(qweight, scales, zeros), dtype)


def supports_w4a16_linear(x: Tensor, *_: object) -> str | None:
    return unsupported(x.dtype)


supports_w4a16_linear_dgrad = supports_w4a16_linear


def supports_dequantize_w4a16(qweight: Tensor, scales: Tensor, zeros: Tensor, dtype: torch.dtype) -> str | None:
    return unsupported(dtype)
