"""The plainest correct version of each op in this family: any device, any float type, integers exact."""

from __future__ import annotations

import torch
from torch import Tensor

from .weight import W4A8Weight

LARGEST = 127  # what a token's largest magnitude becomes

Quantized = tuple[Tensor, Tensor, Tensor]


def quantize_activation(x: Tensor) -> Quantized:
    values = x.double() if x.dtype == torch.float64 else x.float()
    largest = values.abs().amax(-1) if x.shape[-1] else values.new_zeros(x.shape[:-1])
    # A row of zeros has zeros for integers, whatever its scale. What is not finite makes all of its row NaN.
    scale = torch.where(largest > 0, largest / LARGEST, torch.ones_like(largest))
    scale = torch.where(largest.isfinite(), scale, torch.full_like(scale, torch.nan)).float()
    rounded = (values / scale.to(values.dtype).unsqueeze(-1)).round().clamp(-LARGEST, LARGEST)
    q = rounded.nan_to_num(0.0).to(torch.int8)
    return q, scale, q.sum(-1, dtype=torch.int32)


def rms_norm_quantize(x: Tensor, weight: Tensor, eps: float) -> Quantized:
    return quantize_activation(rms_norm(x, weight, eps))


def silu_mul_quantize(gate_up: Tensor) -> Quantized:
    return quantize_activation(silu_mul(gate_up))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """What :func:`rms_norm_quantize` quantizes, in float32 or float64."""
    values = x.double() if x.dtype == torch.float64 else x.float()
    return values * torch.rsqrt(values.square().mean(-1, keepdim=True) + eps) * weight.to(values.dtype)


def silu_mul(gate_up: Tensor) -> Tensor:
    """What :func:`silu_mul_quantize` quantizes, in float32 or float64."""
    values = gate_up.double() if gate_up.dtype == torch.float64 else gate_up.float()
    gate, up = values.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


def w4a8_matmul(
    q: Tensor,
    x_scale: Tensor,
    x_sums: Tensor,
    qweight: Tensor,
    scale: Tensor,
    group_scale: Tensor | None,
    group_zero: Tensor | None,
    zero: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    weight = W4A8Weight(qweight, scale, group_scale, group_zero, zero)
    return int8_product(q, x_scale, weight.int8(), scale, bias, dtype)


def w4a8_linear(
    x: Tensor,
    qweight: Tensor,
    scale: Tensor,
    group_scale: Tensor | None,
    group_zero: Tensor | None,
    zero: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    q, x_scale, x_sums = quantize_activation(x)
    return w4a8_matmul(q, x_scale, x_sums, qweight, scale, group_scale, group_zero, zero, bias, x.dtype)


def int8_product(
    q: Tensor, x_scale: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """``(q @ weight.T) * x_scale * scale + bias`` for int8 ``(..., K)`` and ``(N, K)``: integers summed exactly."""
    # float64 holds every integer up to 2^53 exactly, and unlike int64 has matrix products on every device.
    products = q.double() @ weight.double().T
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    out = products.to(wide) * x_scale.to(wide).unsqueeze(-1) * scale.to(wide)
    if bias is not None:
        out = out + bias.to(wide)
    return out.to(dtype)
