"""The W3A16 ops on a CPU: :mod:`kernelgraft_core.quant.packed.cpu` for weights of 3 bits."""

from __future__ import annotations

import torch
from torch import Tensor

from kernelgraft_core.quant.packed.cpu import dequantize, dgrad, linear, unsupported

from .weight import W3A16Weight


def w3a16_linear(
    x: Tensor, qweight: Tensor, qhigh: Tensor, scales: Tensor, zeros: Tensor, bias: Tensor | None
) -> Tensor:
    return linear(x, W3A16Weight(qweight, qhigh, scales, zeros), bias)


def w3a16_linear_dgrad(grad: Tensor, qweight: Tensor, qhigh: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    return dgrad(grad, W3A16Weight(qweight, qhigh, scales, zeros))


def dequantize_w3a16(qweight: Tensor, qhigh: Tensor, scales: Tensor, zeros: Tensor, dtype: torch.dtype) -> Tensor:
    return dequantize(W3A16Weight(qweight, qhigh, scales, zeros), dtype)


def supports_w3a16_linear(x: Tensor, *_: object) -> str | None:
    return unsupported(x.dtype)


supports_w3a16_linear_dgrad = supports_w3a16_linear


def supports_dequantize_w3a16(
    qweight: Tensor, qhigh: Tensor, scales: Tensor, zeros: Tensor, dtype: torch.dtype
) -> str | None:
    return unsupported(dtype)
