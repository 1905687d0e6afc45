"""The W4A8 ops on a CPU: see :mod:`.cpu_products`."""

from __future__ import annotations

import torch
from torch import Tensor

from . import cpu_products, reference
from .cpu_onednn import Packed
from .cpu_panels import GROUPS, NIBBLES, Panels
from .reference import Quantized
from .weight import W4A8Weight


def quantize_activation(x: Tensor) -> Quantized:
    return cpu_products.quantize(x)


def rms_norm_quantize(x: Tensor, weight: Tensor, eps: float) -> Quantized:
    return cpu_products.quantize(reference.rms_norm(x, weight, eps))


def silu_mul_quantize(gate_up: Tensor) -> Quantized:
    return cpu_products.quantize(reference.silu_mul(gate_up))


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
    weight = _weight(qweight, scale, group_scale, group_zero, zero)
    return cpu_products.matmul(q, x_scale, x_sums, weight, bias, dtype)


def w4a8_linear(
    x: Tensor,
    qweight: Tensor,
    scale: Tensor,
    group_scale: Tensor | None,
    group_zero: Tensor | None,
    zero: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    return cpu_products.linear(x, _weight(qweight, scale, group_scale, group_zero, zero), bias)


def _weight(
    qweight: Tensor, scale: Tensor, group_scale: Tensor | None, group_zero: Tensor | None, zero: Tensor | None
) -> Panels | Packed:
    if qweight.dim() == 2:
        weight = qweight, scale, group_scale, group_zero, zero
        return cpu_products.as_bytes(weight, W4A8Weight(*weight).int8, scale)
    n, where = scale.shape[0], (qweight.data_ptr(), scale.data_ptr())
    if group_scale is None or group_zero is None:
        assert zero is not None
        return Panels(NIBBLES, n, (1, *where, 0, 0, zero.data_ptr()), ())
    return Panels(GROUPS, n, (group_scale.shape[1], *where, group_scale.data_ptr(), group_zero.data_ptr(), 0), ())


def supports_quantize_activation(*_: object) -> str | None:
    return None


supports_rms_norm_quantize = supports_silu_mul_quantize = supports_quantize_activation


def supports_w4a8_matmul(*args: object) -> str | None:
    return cpu_products.unsupported(args[-1])


def supports_w4a8_linear(x: Tensor, *_: object) -> str | None:
    return cpu_products.unsupported(x.dtype)
