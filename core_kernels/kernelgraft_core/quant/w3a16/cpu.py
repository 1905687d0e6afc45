"""The CPU backend of W3A16: blocks of the weight, dequantized for a GEMM."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from .weight import W3A16Weight

SCRATCH_BYTES = 8 << 20  # of one dequantized block


def w3a16_linear(
    x: Tensor, qweight: Tensor, qhigh: Tensor, scales: Tensor, zeros: Tensor, bias: Tensor | None
) -> Tensor:
    weight = W3A16Weight(qweight, qhigh, scales, zeros)
    rows = x.reshape(-1, weight.in_features).float()
    out = torch.empty(len(rows), weight.out_features)
    for first, last in _blocks(weight):
        out[:, first:last] = F.linear(rows, _dequantize_block(weight, first, last))
    if bias is not None:
        out += bias.to(out.dtype)
    return out.to(x.dtype).view(*x.shape[:-1], weight.out_features)


def w3a16_linear_dgrad(grad: Tensor, qweight: Tensor, qhigh: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    weight = W3A16Weight(qweight, qhigh, scales, zeros)
    rows = grad.unsqueeze(0).flatten(0, -2).float()  # not reshape(-1, N): N may be 0
    out = torch.zeros(len(rows), weight.in_features)
    for first, last in _blocks(weight):
        out += rows[:, first:last] @ _dequantize_block(weight, first, last)
    return out.to(grad.dtype).view(*grad.shape[:-1], weight.in_features)


def dequantize_w3a16(qweight: Tensor, qhigh: Tensor, scales: Tensor, zeros: Tensor, dtype: torch.dtype) -> Tensor:
    weight = W3A16Weight(qweight, qhigh, scales, zeros)
    out = torch.empty(weight.out_features, weight.in_features, dtype=dtype)
    for first, last in _blocks(weight):
        out[first:last] = _dequantize_block(weight, first, last)
    return out


def supports_w3a16_linear(x: Tensor, *_: object) -> str | None:
    return "float64 is computed by the reference" if x.dtype == torch.float64 else None


supports_w3a16_linear_dgrad = supports_w3a16_linear


def supports_dequantize_w3a16(
    qweight: Tensor, qhigh: Tensor, scales: Tensor, zeros: Tensor, dtype: torch.dtype
) -> str | None:
    return "float64 is computed by the reference" if dtype == torch.float64 else None


def _blocks(weight: W3A16Weight) -> list[tuple[int, int]]:
    rows = max(1, SCRATCH_BYTES // (4 * weight.in_features))
    return [(first, min(first + rows, weight.out_features)) for first in range(0, weight.out_features, rows)]


def _dequantize_block(weight: W3A16Weight, first: int, last: int) -> Tensor:
    qweight, qhigh, scales, zeros = (tensor[first:last] for tensor in weight.tensors)
    return reference.dequantize_w3a16(qweight, qhigh, scales, zeros, torch.float32)
