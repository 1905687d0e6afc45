"""Public W4A16 ops: checked here once, run by the best backend at hand."""

from __future__ import annotations

import torch
from torch import Tensor

from kernelgraft_core.quant.packed.ops import LinearOps

from . import reference
from .weight import W4A16Weight

_OPS = LinearOps("w4a16", W4A16Weight, reference)


def w4a16_linear(x: Tensor, qweight: Tensor, scales: Tensor, zeros: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ W.T + bias`` with a 4-bit weight that is dequantized on the way (AWQ, arXiv 2306.00978; GPTQ alike).

    ``W[n, k] = (q[n, k] - zeros[n, k // g]) * scales[n, k // g]``; products are summed in float32 at least.

    Args:
        x: ``(..., K)`` float16, bfloat16, float32 or float64, any strides.
        qweight: int32 ``(N, K / 8)``, the layout of :class:`~kernelgraft_core.quant.w4a16.W4A16Weight`.
        scales: float16 ``(N, K / g)``.
        zeros: uint8 ``(N, K / g)``, 0..15.
        bias: ``(N,)`` of the dtype of ``x``.

    Returns:
        ``(..., N)``, contiguous, dtype of ``x``. Differentiable in ``x`` and ``bias``. Under ``torch.autocast``, ``x``
        and ``bias`` are converted to its dtype first, as for ``F.linear``.

    Raises:
        ValueError: a shape, dtype or device is wrong; the message names the tensor and the value.
        NoBackendError: no backend can run the call; the message gives each one's reason.
    """
    return _OPS.linear(x, (qweight, scales, zeros), bias)


def w4a16_linear_dgrad(grad: Tensor, qweight: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """Gradient of :func:`w4a16_linear` with respect to ``x``: ``grad @ W``.

    Args:
        grad: ``(..., N)``, as ``x`` in :func:`w4a16_linear`; the weight likewise.

    Returns:
        ``(..., K)``, contiguous, dtype of ``grad``.

    Raises:
        ValueError: a shape, dtype or device is wrong; the message names the tensor and the value.
    """
    return _OPS.dgrad(grad, (qweight, scales, zeros))


def dequantize_w4a16(qweight: Tensor, scales: Tensor, zeros: Tensor, dtype: torch.dtype = torch.float16) -> Tensor:
    """The weight ``(N, K)`` in ``dtype``, contiguous; arguments as for :func:`w4a16_linear`.

    Raises:
        ValueError: a shape, dtype or device is wrong; the message names the tensor and the value.
    """
    return _OPS.dequantize((qweight, scales, zeros), dtype)
