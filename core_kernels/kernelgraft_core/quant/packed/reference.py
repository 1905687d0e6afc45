"""The arithmetic that the references of all packed weights share: any device, any float type."""

from __future__ import annotations

import torch
from torch import Tensor


def dequantize(integers: Tensor, scales: Tensor, zeros: Tensor, dtype: torch.dtype) -> Tensor:
    """``(q - z) * s`` of uint8 ``(N, K)`` and ``(N, K / g)``, computed and returned in ``dtype``."""
    (rows, k), groups = integers.shape, scales.shape[1]
    values = integers.to(dtype).view(rows, groups, k // groups)
    return ((values - zeros.to(dtype).unsqueeze(-1)) * scales.to(dtype).unsqueeze(-1)).view(rows, k)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """What products of activations of a type are summed in; the weight is dequantized to it."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ weight.T + bias`` in the weight's dtype, rounded once to that of ``x``."""
    out = x.to(weight.dtype) @ weight.T
    if bias is not None:
        out += bias.to(out.dtype)
    return out.to(x.dtype)


def dgrad(grad: Tensor, weight: Tensor) -> Tensor:
    """``grad @ weight`` in the weight's dtype, rounded once to that of ``grad``."""
    return (grad.to(weight.dtype) @ weight).to(grad.dtype)
