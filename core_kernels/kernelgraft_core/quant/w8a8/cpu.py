"""The W8A8 ops on a CPU: see :mod:`kernelgraft_core.quant.w4a8.cpu_products`."""

from __future__ import annotations

import torch
from torch import Tensor

from kernelgraft_core.quant.w4a8 import cpu_products


def w8a8_matmul(
    q: Tensor,
    x_scale: Tensor,
    x_sums: Tensor,
    qweight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    panels = cpu_products.panels((qweight, scale), lambda: qweight, scale)
    if panels is None:
        return cpu_products.onednn_matmul(q, x_scale, (qweight, scale), qweight.clone, scale, bias, dtype)
    return cpu_products.matmul(q, x_scale, x_sums, panels, bias, dtype)


def w8a8_linear(x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    panels = cpu_products.panels((qweight, scale), lambda: qweight, scale)
    if panels is None:
        q, x_scale, _ = cpu_products.quantize(x)
        return cpu_products.onednn_matmul(q, x_scale, (qweight, scale), qweight.clone, scale, bias, x.dtype)
    return cpu_products.linear(x, panels, bias)


def supports_w8a8_matmul(*args: object) -> str | None:
    return cpu_products.unsupported(args[-1])


def supports_w8a8_linear(x: Tensor, *_: object) -> str | None:
    return cpu_products.unsupported(x.dtype)
