"""The W8A8 ops on a CPU: see :mod:`kernelgraft_core.quant.w4a8.cpu_products`."""

from __future__ import annotations

import torch
from torch import Tensor

from kernelgraft_core.quant.w4a8 import cpu_products
from kernelgraft_core.quant.w4a8.cpu_onednn import Packed
from kernelgraft_core.quant.w4a8.cpu_panels import Panels


def w8a8_matmul(
    q: Tensor,
    x_scale: Tensor,
    x_sums: Tensor,
    qweight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    return cpu_products.matmul(q, x_scale, x_sums, _weight(qweight, scale), bias, dtype)


def w8a8_linear(x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    return cpu_products.linear(x, _weight(qweight, scale), bias)


def _weight(qweight: Tensor, scale: Tensor) -> Panels | Packed:
    return cpu_products.as_bytes((qweight, scale), lambda: qweight, scale)


def supports_w8a8_matmul(*args: object) -> str | None:
    return cpu_products.unsupported(args[-1])


def supports_w8a8_linear(x: Tensor, *_: object) -> str | None:
    return cpu_products.unsupported(x.dtype)
